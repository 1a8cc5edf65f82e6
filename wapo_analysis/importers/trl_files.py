"""TRL and other Transformers trainers: ``trainer_state.json`` and logged completions.

A checkpoint's state holds the log from the first step on, so the newest is enough. Completions
(``log_completions=True``) have one column per reward function; which columns those are is told by
the ``rewards/<name>/mean`` of the log.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError
from wapo_analysis.importers.readers import message_text
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.sequences import Codes
from wapo_analysis.importers.sink import Sink, as_number, as_step

LACKS = {
    "tokens": "TRL writes text and step averages, nothing per token; use wapo_analysis.attach",
    "classes": "TRL writes nothing per token, so no class can be told; use wapo_analysis.attach",
}
_SUMMARY = ("train_runtime", "train_loss", "total_flos", "train_steps_per_second",
            "train_samples_per_second", "epoch")  # fmt: skip


def read_trl(files: tuple[Path, ...], sink: Sink, report: ImportReport) -> None:
    """Read a trainer state and logged completions into a run."""
    states = [file for file in files if file.name == "trainer_state.json"]
    log = newest_log(states, report)
    read_log(log, sink, report, "trl")
    rewards = [
        parts[1] for key in {key for row in log for key in row}
        if len(parts := key.split("/")) == 3 and parts[0] == "rewards" and parts[2] == "mean"
    ]  # fmt: skip
    codes = Codes()
    for file in files:
        if file.suffix == ".parquet":
            _read_completions(file, sorted(rewards), codes, sink, report)
    if any("reward_std" in row for row in log):
        report.note("reward_std is TRL's: by default the mean of the groups' standard deviations")


def newest_log(states: Iterable[Path], report: ImportReport) -> list[dict[str, Any]]:
    """Log of the state with the most steps.

    Raises
    ------
    UserError
        If the only state is broken.
    """
    best: list[dict[str, Any]] = []
    most = -1
    files = list(states)
    for file in files:
        report.files += 1
        try:
            state = json.loads(file.read_bytes())
            log, step = list(state["log_history"]), int(state.get("global_step") or 0)
        except (ValueError, KeyError, TypeError) as error:
            if len(files) == 1:
                raise UserError(f"{file} is no trainer state: {error}") from error
            report.bad_line(file, 1, "not a trainer state")
            continue
        if step > most:
            best, most = [row for row in log if isinstance(row, dict)], step
    return best


def read_log(
    log: Iterable[Mapping[str, Any]], sink: Sink, report: ImportReport, prefix: str
) -> None:
    """Rows of a ``log_history`` into steps; evaluation and the final summary keep their names."""
    for row in log:
        named = {
            (f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else
             f"summary/{key}" if key in _SUMMARY else key): value
            for key, value in row.items()
        }  # fmt: skip
        if not sink.add_log(named, prefix):
            report.counts["log records without a step left out"] += 1


def _read_completions(
    file: Path, rewards: list[str], codes: Codes, sink: Sink, report: ImportReport
) -> None:
    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is broken or no Parquet: {str(error).splitlines()[0]}") from error
    report.files += 1
    for number, row in enumerate(rows, start=1):
        named = rewards or [k for k, v in row.items() if _is_reward(k, v)]
        if not rewards:
            report.note("no log names the reward functions; every numeric column counts as one")
        parts = [as_number(row.get(name)) for name in named]
        given = [part for part in parts if part is not None]
        step = as_step(row.get("step"))
        if step is None or not given:
            report.bad_line(file, number, "no step or no reward")
            continue
        if len(named) > 1:
            report.note(f"reward of a completion is the plain sum of {', '.join(named)}")
        sink.add_rollout(
            {
                "step": step,
                "group": codes.code("group", step, str(row.get("prompt"))),
                "rollout": codes.next("rollout", step),
                "prompt": message_text(row.get("prompt")),
                "completion": message_text(row.get("completion")),
                "reward": sum(given),
                "advantage": as_number(row.get("advantage")),
            }
        )
        for key in row.keys() - {"step", "prompt", "completion", "advantage", *named}:
            report.unknown_keys[key] += 1


def _is_reward(key: str, value: Any) -> bool:
    return key not in ("step", "advantage") and isinstance(value, int | float)
