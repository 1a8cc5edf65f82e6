"""prime-rl: token exports (until August 2026), then the file monitor with annotated traces.

Exports: ``token_exports/step_<s>/rank_<r>.jsonl``, one completion a line with aligned lists, and an
empty ``STABLE`` when a step is whole. Monitor: ``metrics.jsonl`` and, below ``traces/``,
``stream.jsonl`` (episodes as they arrived) with ``annotations/<producer>.jsonl`` (what trainer and
orchestrator learned later, joined by trace). Of annotations only places are kept in memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wapo_analysis.importers.prime_traces import read_traces
from wapo_analysis.importers.readers import json_records
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.sequences import Codes, sequence_rows
from wapo_analysis.importers.sink import Sink, as_number, as_step

LACKS = {
    "classes.grad_mass": "prime-rl writes neither collision sums nor gradients",
    "classes.coef_sum": "prime-rl writes no gradient coefficients",
    "classes.pred_dentropy_sum": "prime-rl writes neither collision sums nor gradients",
    "tokens.pred_dentropy": "prime-rl writes neither collision sums nor gradients",
    "tokens.dprob": "prime-rl does not score tokens again after the update",
    "tokens.dentropy": "prime-rl does not score tokens again after the update",
}
_COLUMNS = {
    "token_id": "token_ids",
    "loss_mask": "loss_mask",
    "advantage": "advantages",
    "logp": "trainer_logprobs",
    "logp_old": "inference_logprobs",
    "entropy": "entropy",
    "clipped": "is_masked",
}
# Follow from the columns above, or only place the sequence in a batch.
_RECOMPUTED = {
    "schema_version", "step", "export_step", "rank", "micro_step", "micro_sequence_idx",
    "export_sequence_idx", "mismatch_kl", "log_importance_ratio", "importance_ratio", "prob_delta",
    "is_masked_high", "is_masked_low", "rewards", "position_ids",
}  # fmt: skip
_CLIP_NOTE = (
    "clipped is prime-rl's is_masked: tokens whose probability moved too far, which its loss drops"
)


def read_prime_rl(files: tuple[Path, ...], sink: Sink, report: ImportReport) -> None:
    """Read token exports, metrics and traces into a run."""
    sealed = [file for file in files if file.suffix == ".zst"]
    if sealed:
        report.note(f"{len(sealed)} sealed parts of streams are not read; unpack them with zstd -d")
    files = tuple(file for file in files if file not in sealed)
    exports = [file for file in files if file.name.startswith("rank_")]
    _read_exports(exports, sink, report)
    metrics = [file for file in files if file.name == "metrics.jsonl"]
    for file in metrics:
        _read_metrics(file, sink, report)
    traces = [file for file in files if file not in exports and file not in metrics]
    read_traces(traces, sink, report)


def _read_exports(files: list[Path], sink: Sink, report: ImportReport) -> None:
    codes = Codes()
    # A file named alone is the user's choice; in the layout a step counts once it is marked.
    marked = any((file.parent / "STABLE").exists() for file in files) or len(files) > 1
    for file in files:
        if marked and not (file.parent / "STABLE").exists():
            report.note(f"{file.parent.name} has no STABLE mark, so it is unfinished and left out")
            continue
        for number, values in json_records(file, report):
            try:
                _add_sequence(values, codes, sink, report)
            except (ValueError, TypeError, KeyError) as error:
                report.bad_line(file, number, str(error))


def _add_sequence(
    values: Mapping[str, Any], codes: Codes, sink: Sink, report: ImportReport
) -> None:
    step = as_step(values.get("export_step") if "export_step" in values else values.get("step"))
    if step is None:
        raise ValueError("no step")
    rank = int(values.get("rank") or 0)
    name = f"{rank}.{values.get('export_sequence_idx', codes.next('unnamed', step))}"
    rollout = codes.code("rollout", step, name)
    columns = {ours: values[theirs] for ours, theirs in _COLUMNS.items() if theirs in values}
    rows = sequence_rows(columns | {"step": step, "rank": rank, "rollout": rollout})
    rows = rows.assign(kept=True, minibatch=values.get("micro_step", 0))
    report.mapped |= {ours: theirs for ours, theirs in _COLUMNS.items() if theirs in values}
    if "is_masked" in values:
        report.note(_CLIP_NOTE)
    sink.add_tokens(rows)
    rewards = [r for r in values.get("rewards") or [] if as_number(r) is not None]
    if rewards:
        sink.add_rollout(
            {"step": step, "rank": rank, "rollout": rollout, "reward": rewards[-1],
             "length": len(rows)}
        )  # fmt: skip
    for key in values.keys() - _RECOMPUTED - set(_COLUMNS.values()):
        report.unknown_keys[key] += 1


def _read_metrics(file: Path, sink: Sink, report: ImportReport) -> None:
    """Metric rows; several a step, one or more per producer."""
    for _, values in json_records(file, report):
        producer = values.get("producer", "trainer")
        named = {
            # Every producer times its own step; the trainer's is the step's.
            (f"{producer}/{key}" if key.startswith("time/") and producer != "trainer" else key): v
            for key, v in values.items()
            if key not in ("time", "producer")
        }
        if not sink.add_log(named, "prime-rl"):
            report.counts["metric rows without a step left out"] += 1
