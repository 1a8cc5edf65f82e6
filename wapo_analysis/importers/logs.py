"""Metrics logs and completions of verl and of trainers built on Transformers."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError, first_line, printable
from wapo_analysis.importers.jsonl import as_number, as_step, message_text
from wapo_analysis.importers.readers import json_records, json_value
from wapo_analysis.importers.report import ImportReport, shown
from wapo_analysis.importers.shapes import trainer_names
from wapo_analysis.importers.sink import Sink
from wapo_analysis.importers.tables import Codes
from wapo_analysis.store.files import open_regular

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

    Raises UserError if the files belong to several runs, or the only state is broken. ``files``:
    files by kind: "state", "swift-log", "trainer-log".
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
    steps = (as_step(record.get(key)) for _, record in records for key in keys)
    return max((step for step in steps if step is not None), default=0)


def newest_state(states: Iterable[Path], report: ImportReport) -> list[tuple[Path, Records]]:
    """Log of the trainer state with the most steps, with its file; none if there is no state.

    Raises UserError if the only state is broken.
    """
    best: list[tuple[Path, Records]] = []
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
        best = [max([*best, (file, records)], key=lambda state: _reach(state[1]))]
    return best


def read_log(records: Records, sink: Sink, report: ImportReport, file: Path, prefix: str) -> None:
    """Records of a trainer; evaluation and the final summary keep their names."""
    for number, record in records:
        with report.record(file, number):
            sink.add_log(trainer_names(record), prefix, (file, number))


_VERL = ("input", "output", "gts", "score", "step", "uid")
_TEXTS = ("step", "prompt", "completion", "advantage", "advantages", "gen_step")


def read_verl_rollouts(file: Path, sink: Sink, report: ImportReport) -> None:
    """Read one dump of verl's completions."""
    codes = Codes()
    extras: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, values in json_records(file, report):
        # The file is named after its step; old dumps lack the key inside.
        step = as_step(values.get("step", file.stem))
        reward = as_number(values.get("score"))
        if step is None or reward is None:
            report.bad_line(file, number, "no step or no score")
            continue
        with report.record(file, number):
            named = (
                str(values["uid"]).split("_")[0] if "uid" in values else str(values.get("input"))
            )
            sink.add_rollout(
                {
                    "step": step,
                    "group": codes.code("group", step, named),
                    "rollout": codes.next("rollout", step),
                    "prompt": message_text(values.get("input")),
                    "completion": message_text(values.get("output")),
                    "answer": message_text(values.get("gts")),
                    "reward": reward,
                }
            )
            _collect(values, extras[step], report)
    for step, columns in extras.items():
        means = {f"rollouts/{name}": sum(v) / len(v) for name, v in columns.items()}
        sink.add_step(step, means)
    report.mapped |= {"prompt": "input", "completion": "output", "answer": "gts"}
    report.mapped.setdefault("reward", "score")
    report.trainer = "verl"


def _collect(
    values: Mapping[str, Any], columns: dict[str, list[float]], report: ImportReport
) -> None:
    """Numbers the reward function added are kept as means of the step; the rest is reported."""
    for key, value in values.items():
        if key in _VERL:
            continue
        number = as_number(value)
        if number is None:
            report.unknown_keys[key] += 1
        else:
            columns[key].append(number)
            report.kept_keys[key] += 1


@dataclass
class TrainerCompletions:
    """Reads completions that have one column for each reward function.

    ``rewards``: names of the reward functions, as the log tells them; empty if there is no log.
    """

    sink: Sink
    report: ImportReport
    rewards: list[str]
    _codes: Codes = field(default_factory=Codes)

    def read(self, file: Path) -> None:
        """Read one file, Parquet or JSON lines. Raises UserError if a Parquet file is broken."""
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file, self.report)
        for number, row in rows:
            with self.report.record(file, number):
                self._row(file, number, row)
        self.report.files += file.suffix == ".parquet"

    def _row(self, file: Path, number: int, row: Mapping[str, Any]) -> None:
        named = self.rewards or [k for k, v in row.items() if _is_reward(k, v)]
        if not self.rewards:
            self.report.note(
                "no log names the reward functions; every numeric column counts as one"
            )
        parts = [as_number(row.get(name)) for name in named]
        given = [part for part in parts if part is not None]
        step = as_step(row.get("step"))
        if step is None or not given:
            self.report.bad_line(file, number, "no step or no reward")
            return
        if len(named) > 1:
            self.report.note(f"reward of a completion is the plain sum of {', '.join(named)}")
        self.sink.add_rollout(
            {
                "step": step,
                "group": self._codes.code("group", step, str(row.get("prompt"))),
                "rollout": self._codes.next("rollout", step),
                "prompt": message_text(row.get("prompt")),
                "completion": message_text(row.get("completion")),
                "reward": sum(given),
                "advantage": as_number(row.get("advantage", row.get("advantages"))),
            }
        )
        for key in row.keys() - {*_TEXTS, *named}:
            self.report.unknown_keys[key] += 1


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open_regular(file) as stream:
            rows = pq.read_table(stream).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = printable(f"{shown(file)} is broken or no Parquet: {first_line(error)}")
        raise UserError(why) from error
    yield from enumerate(rows, start=1)


def _json_rows(file: Path, report: ImportReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """One row a completion; columns that are lists hold one entry for each."""
    for number, values in json_records(file, report):
        lists = {key: value for key, value in values.items() if isinstance(value, list)}
        lengths = {len(value) for value in lists.values()}
        if len(lengths) > 1:
            said = ", ".join(f"{key} {len(value)}" for key, value in sorted(lists.items()))
            report.bad_line(file, number, f"lists of different length ({said})")
            continue
        for place in range(next(iter(lengths), 1)):
            yield number, {k: v[place] if k in lists else v for k, v in values.items()}


def _is_reward(key: str, value: Any) -> bool:
    return key not in _TEXTS and isinstance(value, int | float)
