"""The official WAPO trainer: ``plots/<run>/data`` with its checkpoints, completions and eval.

The files are aggregates, so what a run gets is what they determine: exact token counts per class
from ``token_bins.jsonl``, sums per probability bin and sign from ``grad_mass`` and ``token_count``,
a sample of token rows from ``scatter_step_*.npz``. Files count steps from 0, logs and completions
from 1; steps of a run are from 1.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from wapo_analysis.importers.official_classes import StepCounts, class_table
from wapo_analysis.importers.official_tree import OfficialTree, step_of
from wapo_analysis.importers.readers import json_records, message_text
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import filled_records, numbers
from wapo_analysis.importers.sequences import Codes
from wapo_analysis.importers.sink import Sink, as_number, as_step
from wapo_analysis.importers.trl_files import newest_log, read_log
from wapo_analysis.schema import TOKENS
from wapo_analysis.table import Array

LACKS = {
    "classes.grad_mass": "the official files hold the (1 - p) proxy, not the exact norm",
    "classes.coef_sum": "the official files hold w x ratio x A without clip and normaliser",
    "classes.pred_dentropy_sum": "the official files hold no statistic of the whole distribution",
    "tokens.pred_dentropy": "the official files hold no statistic of the whole distribution",
    "tokens.dprob": "the official trainer does not score tokens again after the update",
    "tokens.dentropy": "the official trainer does not score tokens again after the update",
}
SAMPLE_LIMIT = 10_000
_TEXT_KEYS = ("step", "prompt", "completion", "reward")


def read_official(files: tuple[Path, ...], sink: Sink, report: ImportReport) -> None:
    """Read the output of one official run.

    Raises
    ------
    UserError
        If the source holds several runs, or a file that cannot be read.
    """
    tree = OfficialTree.of(files)
    log = newest_log(tree.states(), report)
    read_log(log, sink, report, "official")
    counts = _counts(tree, sink, report)
    for step in sorted(counts):
        _write_classes(step, counts, sink, report)
    sizes = _rewards(tree, sink, report)
    _completions(tree, sizes, sink, report)
    _eval(tree, sink, report)
    if any("entropy_pos" in row for row in log):
        report.note(
            "entropy_pos and entropy_neg are the official means over sequences; sequences without "
            "advantage count as pos"
        )


def _arrays(file: Path, report: ImportReport) -> dict[str, Array]:
    report.files += 1
    try:
        # numpy leaves a file open that it cannot read, so it is opened here.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, KeyError, BadZipFile) as error:
        report.bad_line(file, 1, f"not readable ({str(error).splitlines()[0]})")
        return {}


@dataclass
class _Counted:
    """Everything that counts tokens, per step from 1."""

    steps: dict[int, StepCounts] = field(default_factory=dict)

    def at(self, file: Path) -> StepCounts:
        return self.steps.setdefault(step_of(file) + 1, StepCounts())


def _counts(tree: OfficialTree, sink: Sink, report: ImportReport) -> dict[int, StepCounts]:
    counted = _Counted()
    _token_bins(tree, counted, report)
    for kind in ("token_count", "grad_mass"):
        for file in tree.data(f"{kind}/step_*.npz"):
            stored = _arrays(file, report)
            if {"pos", "neg"} <= stored.keys():
                getattr(counted.at(file), kind).update({1: stored["pos"], -1: stored["neg"]})
                _keep_bins(kind, step_of(file) + 1, stored, sink)
    for file in tree.data("token_strength/*step_*.npz"):
        stored = _arrays(file, report)
        scale = "fine" if file.name.startswith("fine") else "coarse"
        if {"pos", "neg", "bins"} <= stored.keys():
            _keep_bins(f"token_strength_{scale}", step_of(file) + 1, stored, sink)
    for file in tree.data("scatter_step_*.npz"):
        _scatter(file, counted.at(file), sink, report)
    return counted.steps


def _keep_bins(kind: str, step: int, stored: dict[str, Array], sink: Sink) -> None:
    """The official numbers as they are, as step columns official/<kind>/<sign>/<bin>."""
    for sign in ("pos", "neg"):
        pairs = zip(stored["bins"].tolist(), stored[sign].tolist(), strict=False)
        sink.add_step(step, {f"official/{kind}/{sign}/{name}": value for name, value in pairs})


def _token_bins(tree: OfficialTree, counted: _Counted, report: ImportReport) -> None:
    seen: set[int] = set()
    for file in tree.bins():
        for number, values in json_records(file, report):
            step = as_step(values.get("step"))
            counts = values.get("counts")
            if step is None or not isinstance(counts, dict):
                report.bad_line(file, number, "no step or no counts")
                continue
            if step in seen:
                report.repeated_steps.add(step + 1)
            seen.add(step)
            entry = counted.steps.setdefault(step + 1, StepCounts())
            entry.bins = {name: int(as_number(value) or 0) for name, value in counts.items()}
            chosen = values.get("hyperparams") or {}
            entry.filtered = any(chosen.get(k) for k in ("include_bins", "exclude_bins"))


def _scatter(file: Path, counts: StepCounts, sink: Sink, report: ImportReport) -> None:
    """Token rows of a step: probabilities and advantage of at most ``SAMPLE_LIMIT`` tokens."""
    stored = _arrays(file, report)
    names = ("prob_train", "prob_inference", "advantages")
    if not all(name in stored for name in names):
        return
    step, rows = step_of(file) + 1, len(stored["advantages"])
    counts.sampled, counts.zeros = rows, int((stored["advantages"] == 0).sum())
    with np.errstate(divide="ignore"):
        columns = {
            "step": np.full(rows, step),
            "advantage": stored["advantages"],
            "logp": np.log(stored["prob_train"].astype(np.float64)),
            "logp_old": np.log(stored["prob_inference"].astype(np.float64)),
        }
    frame = pd.DataFrame(columns)
    lost = sum(int(np.isnan(numbers(frame[name], rows)).sum()) for name in ("logp", "logp_old"))
    if lost:
        report.counts["probabilities of 0 or not finite, now null"] += lost
    if rows:
        sink.write_records(filled_records(TOKENS, frame), step)
        report.token_rows += rows
    report.mapped |= {"logp": "prob_train", "logp_old": "prob_inference", "advantage": "advantages"}
    if rows >= SAMPLE_LIMIT:
        report.note(f"token rows are the official random sample of {SAMPLE_LIMIT} tokens a step")


def _write_classes(
    step: int, counts: dict[int, StepCounts], sink: Sink, report: ImportReport
) -> None:
    gated = StepCounts.gated(counts.values())
    entry = counts[step]
    records = class_table(step, entry, gated, report)
    if len(records):
        sink.write_records(records, step)
    if entry.bins:
        eligible = sum(v for name, v in entry.bins.items() if name.endswith("_eligible"))
        kept = sum(v for name, v in entry.bins.items() if name.endswith("_kept"))
        sink.add_step(step, {"tokens": eligible, "kept_tokens": kept})


def _rewards(tree: OfficialTree, sink: Sink, report: ImportReport) -> dict[int, int]:
    """Rewards of the batch; returns the number of completions per step."""
    sizes: dict[int, int] = {}
    for file in tree.data("rewards/*_step_*.npy"):
        report.files += 1
        try:
            with file.open("rb") as stream:
                values = np.load(stream, allow_pickle=False).astype(np.float64)
        except (ValueError, OSError, EOFError) as error:
            report.bad_line(file, 1, f"not readable ({str(error).splitlines()[0]})")
            continue
        step, name = step_of(file) + 1, file.name.split("_step_")[0]
        if not len(values):
            continue
        if name == "reward":
            sizes[step] = len(values)
            sink.add_step(step, {"pass_rate": float((values >= 1).mean())})
            own = {"reward": float(values.mean()), "reward_std": float(values.std())}
            sink.fill_step(step, own)
        else:
            sink.fill_step(step, {f"reward/{name}": float(values.mean())})
    return sizes


def _rows_of(file: Path, report: ImportReport) -> list[dict[str, Any]]:
    report.files += 1
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        report.bad_line(file, 1, "no JSON; still being written?")
        return []
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def _completions(
    tree: OfficialTree, sizes: dict[int, int], sink: Sink, report: ImportReport
) -> None:
    codes = Codes()
    for file in tree.texts("completions"):
        step, rows = step_of(file), _rows_of(file, report)
        if not rows:
            report.note(f"{file.name} of the completions is empty, as the official trainer leaves "
                        "its last one")  # fmt: skip
        if tree.shared and len(rows) != sizes.get(step, len(rows)):
            report.note(f"{file.name} holds evaluation rows: without 'checkpoints' in the output "
                        "path they overwrite the completions")  # fmt: skip
            continue
        for row in rows:
            _add_completion(step, row, codes, sink, report)


def _add_completion(
    step: int, row: dict[str, Any], codes: Codes, sink: Sink, report: ImportReport
) -> None:
    reward = as_number(row.get("reward"))
    if reward is None:
        report.counts["completions without a reward left out"] += 1
        return
    sink.add_rollout(
        {
            "step": step,
            "group": codes.code("group", step, json.dumps(row.get("prompt"))),
            "rollout": codes.next("rollout", step),
            "prompt": message_text(row.get("prompt")),
            "completion": message_text(row.get("completion")),
            "reward": reward,
        }
    )
    for key in row.keys() - set(_TEXT_KEYS):
        # Means of these are in the log as reward/<name>; single values have no column.
        report.unknown_keys[f"completions: {key}"] += 1


def _eval(tree: OfficialTree, sink: Sink, report: ImportReport) -> None:
    if tree.shared:
        return
    for file in tree.texts("eval"):
        columns: dict[str, list[float]] = {}
        for row in _rows_of(file, report):
            for key, value in row.items():
                number = as_number(value)
                if key != "step" and number is not None:
                    columns.setdefault(f"eval/{key}", []).append(number)
        sink.fill_step(step_of(file), {k: sum(v) / len(v) for k, v in columns.items()})
