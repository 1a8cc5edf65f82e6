"""verl: completions dumped by ``rollout_data_dir`` and the ``file`` metrics logger.

One file of rollouts is one step, ``{step}.jsonl``: input, output, gts, score, step and whatever
the reward function adds; the newer trainer adds ``uid`` = sample_rollout_output. The logger writes
``{"step": N, "data": {name: number}}``.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wapo_analysis.importers.detect import first_record
from wapo_analysis.importers.readers import json_records, message_text
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.sequences import Codes
from wapo_analysis.importers.sink import Sink, as_number, as_step

LACKS = {
    "tokens": "verl writes text and metrics, nothing per token",
    "classes": "verl writes nothing per token, so no class can be told",
}
_KNOWN = ("input", "output", "gts", "score", "step", "uid")


def read_verl(files: tuple[Path, ...], sink: Sink, report: ImportReport) -> None:
    """Read metrics and rollouts of verl into a run."""
    for file in files:
        if isinstance(first_record(file).get("data"), dict):
            _read_metrics(file, sink, report)
        else:
            _read_rollouts(file, sink, report)


def _read_metrics(file: Path, sink: Sink, report: ImportReport) -> None:
    for number, values in json_records(file, report):
        data = values.get("data")
        named = {**data, "step": values.get("step")} if isinstance(data, dict) else {}
        if not sink.add_log(named, "verl"):
            report.bad_line(file, number, "no step or no data")


def _read_rollouts(file: Path, sink: Sink, report: ImportReport) -> None:
    codes = Codes()
    extras: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, values in json_records(file, report):
        # The file is named after its step; old dumps lack the key inside.
        step = as_step(values.get("step", file.stem))
        reward = as_number(values.get("score"))
        if step is None or reward is None:
            report.bad_line(file, number, "no step or no score")
            continue
        group = str(values["uid"]).split("_")[0] if "uid" in values else str(values.get("input"))
        sink.add_rollout(
            {
                "step": step,
                "group": codes.code("group", step, group),
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
    report.mapped |= {"prompt": "input", "completion": "output", "answer": "gts", "reward": "score"}


def _collect(
    values: Mapping[str, Any], columns: dict[str, list[float]], report: ImportReport
) -> None:
    """Numbers the reward function added are kept as means of the step; the rest is reported."""
    for key, value in values.items():
        if key in _KNOWN:
            continue
        number = as_number(value)
        if number is None:
            report.unknown_keys[key] += 1
        else:
            columns[key].append(number)
            report.kept_keys[key] += 1
