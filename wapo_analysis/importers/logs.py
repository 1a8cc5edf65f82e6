"""Metrics logs of verl and of trainers built on Transformers: TRL, ms-swift, LLaMA-Factory.

verl's ``file`` logger writes ``{"step": N, "data": {name: number}}``. A trainer's state holds the
log from the first step on under ``log_history``, so the newest is enough. ms-swift writes the same
records to ``logging.jsonl`` with the step as "17/4389", LLaMA-Factory some of them to
``trainer_log.jsonl`` with ``current_steps``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wapo_analysis.errors import UserError, printable
from wapo_analysis.importers.jsonl import as_step
from wapo_analysis.importers.readers import json_records, json_value
from wapo_analysis.importers.report import ImportReport, shown
from wapo_analysis.importers.sink import Sink

_SUMMARY = ("train_runtime", "train_loss", "total_flos", "train_steps_per_second",
            "train_samples_per_second", "epoch")  # fmt: skip
_REWARD_STD = "reward_std is TRL's: by default the mean of the groups' standard deviations"
Records = Sequence[tuple[int, Mapping[str, Any]]]


def read_verl_metrics(file: Path, sink: Sink, report: ImportReport) -> None:
    """Read a file of verl's ``file`` logger. It writes numbers that are not finite as null."""
    report.trainer = "verl"
    for number, values in json_records(file, report):
        data = values.get("data")
        if not isinstance(data, dict) or as_step(values.get("step")) is None:
            report.bad_line(file, number, "no step or no data")
            continue
        named = {**data, "step": values["step"]}
        sink.add_log(named, "verl", (file, number), null_is_nan=True)


def read_trainer_logs(
    files: Mapping[str, Sequence[Path]], sink: Sink, report: ImportReport
) -> list[str]:
    """Read the log of a trainer built on Transformers; returns the names of its reward functions.

    Parameters
    ----------
    files : mapping of str to sequence of Path
        Files by kind: "state", "swift-log", "trainer-log".

    Raises
    ------
    UserError
        If the files belong to several runs, or the only state is broken.
    """
    _one_run([file for kind in files for file in files[kind]])
    logs: list[tuple[Path, Records]] = [
        (file, list(json_records(file, report))) for file in files.get("swift-log", ())
    ]
    logs += newest_state(files.get("state", ()), report)
    logs += [(file, list(json_records(file, report))) for file in files.get("trainer-log", ())]
    if not logs:
        return []
    # The first holds most columns; another goes before it only if it holds twice the steps.
    reach = [_reach(records) for _, records in logs]
    best = next(place for place, last in enumerate(reach) if 2 * last >= max(reach))
    file, records = logs[best]
    for place, (other, _) in enumerate(logs):
        if place != best:
            report.note(
                f"{shown(other.name)} holds the same log up to step {reach[place]}: not read"
            )
    for kind, trainer in (("swift-log", "ms-swift"), ("trainer-log", "LLaMA-Factory")):
        report.trainer = trainer if file in files.get(kind, ()) else report.trainer
    read_log(records, sink, report, file, "trl")
    names = {key for _, record in records for key in record}
    if "reward_std" in names:
        report.note(_REWARD_STD)
    parts = (key.split("/") for key in names)
    return [p[1] for p in parts if len(p) == 3 and p[0] == "rewards" and p[2] == "mean"]


def _one_run(files: Sequence[Path]) -> None:
    places = {
        f.parent.parent if f.parent.name.startswith("checkpoint-") else f.parent for f in files
    }
    if len(places) > 1:
        names = ", ".join(printable(shown(place)) for place in sorted(places)[:6])
        raise UserError(f"{len(places)} runs are here; name one of: {names}")


def _reach(records: Records) -> int:
    """Last step of a log."""
    keys = ("step", "global_step/max_steps", "current_steps")
    return max((as_step(r.get(key)) or 0 for _, r in records for key in keys), default=0)


def newest_state(states: Iterable[Path], report: ImportReport) -> list[tuple[Path, Records]]:
    """Log of the trainer state with the most steps, with its file; none if there is no state.

    Raises
    ------
    UserError
        If the only state is broken.
    """
    best: list[tuple[Path, Records]] = []
    most = -1
    files = list(states)
    for file in files:
        report.files += 1
        try:
            log = json_value(file, report)["log_history"]
            records = [(n, row) for n, row in enumerate(log, start=1) if isinstance(row, dict)]
        except (UserError, KeyError, TypeError) as error:
            if len(files) == 1:
                why = "no log_history" if isinstance(error, KeyError) else error
                raise UserError(f"{printable(shown(file))} is no trainer state: {why}") from error
            report.bad_line(file, 1, "not a trainer state")
            continue
        report.lines += len(log)
        if _reach(records) > most:
            best, most = [(file, records)], _reach(records)
    return best


def read_log(records: Records, sink: Sink, report: ImportReport, file: Path, prefix: str) -> None:
    """Records of a trainer; evaluation and the final summary keep their names."""
    for number, record in records:
        with report.record(file, number):
            sink.add_log(trainer_names(record), prefix, (file, number))


def trainer_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a Transformers log: eval_x is eval/x, the final summary is summary/x."""
    return {
        (f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else
         f"summary/{key}" if key in _SUMMARY else key): value
        for key, value in record.items()
    }  # fmt: skip
