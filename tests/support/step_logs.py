"""Run folders written from columns: a step log, class totals."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wapo_analysis.diagnose import DETECTORS, Diagnosis, Finding, diagnose
from wapo_analysis.diagnose.context import Context
from wapo_analysis.schema import CLASSES
from wapo_analysis.store import STEP_LOG, RunWriter, open_run
from wapo_analysis.store.manifest import Manifest, write_manifest
from wapo_analysis.table import Records

Columns = Mapping[str, Sequence[float] | np.ndarray]
Flows = Mapping[tuple[int, int], np.ndarray]
#: Finding, its severity, columns by a number, a number inside the bound and one beyond it.
Bound = tuple[str, str, Callable[[float], Columns], float, float]


def write_steps(
    path: Path, columns: Columns, source: str = "built-in", objective: str = "grpo"
) -> Path:
    """Run folder with a step log alone."""
    manifest = {"name": path.name, "source": source, "objective": {"name": objective}}
    writer = RunWriter(path, manifest)
    length = len(next(iter(columns.values())))
    for i in range(length):
        row = {"step": i + 1} | {name: float(values[i]) for name, values in columns.items()}
        writer.append_step(row)
    writer.close("finished")
    return path


def judge(tmp_path: Path, **columns: Sequence[float] | np.ndarray) -> Diagnosis:
    return diagnose(open_run(write_steps(tmp_path / "run", columns)))


def said_on_both_sides(tmp_path: Path, case: Bound) -> list[bool]:
    """Whether the finding is there, with its severity, inside a bound and beyond it."""
    name, severity, columns, inside, beyond = case
    runs = (judge(tmp_path / str(x), **columns(x)) for x in (inside, beyond))
    return [(name, severity) in {(f.name, f.severity) for f in run.findings} for run in runs]


def seen(
    path: Path,
    columns: Mapping[str, Sequence[float | None] | np.ndarray],
    flows: Flows | None = None,
    every: int = 1,
    **described: Any,
) -> Context:
    """A run as a detector sees it: its step log written at once, NaN as null, None left out.

    Steps are the multiples of ``every``; what else is given goes into the manifest.
    """
    path.mkdir(parents=True)
    told = {"name": path.name, "source": "built-in", "objective": {"name": "grpo"}}
    write_manifest(path, Manifest.of(told | {"status": "finished"} | described))
    names, lines = list(columns), []
    for step, row in enumerate(zip(*columns.values(), strict=True), start=1):
        numbers = {
            name: float(x) if np.isfinite(x) else None
            for name, x in zip(names, row, strict=True)
            if x is not None
        }
        lines.append(json.dumps({"step": every * step} | numbers) + "\n")
    (path / STEP_LOG).write_text("".join(lines))
    if flows:
        write_flows(path, flows)
    return Context(open_run(path))


def ramp(start: float, end: float, steps: int, onset: int, length: int) -> np.ndarray:
    """Level, then a straight line from step ``onset + 1`` on, then level again."""
    u = np.clip((np.arange(steps) - onset) / length, 0, 1)
    return start + (end - start) * u


def noisy(values: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    return values + np.random.default_rng(seed).normal(0, sigma, len(values))


def names(diagnosis: Diagnosis) -> set[str]:
    return {found.name for found in diagnosis.findings}


def finding(diagnosis: Diagnosis, name: str) -> Finding:
    return next(f for f in diagnosis.findings if f.name == name)


def reopened(path: Path) -> RunWriter:
    """Writer that adds parts to a run folder."""
    return RunWriter(path, open_run(path).manifest, resume_after=10**6)


def write_flows(
    path: Path,
    flows: Mapping[tuple[int, int], Sequence[float]],
    column: str = "pred_dentropy_sum",
) -> None:
    """Add class totals: (sign, regime) to a number of each step, by default the predicted dH."""
    writer, records = reopened(path), {}
    for step, values in enumerate(zip(*flows.values(), strict=True), start=1):
        columns = {
            "step": [step] * len(flows),
            "rank": [0] * len(flows),
            "sign": [sign for sign, _ in flows],
            "regime": [regime for _, regime in flows],
            "prob_bin": [4] * len(flows),
            "tokens": [10] * len(flows),
            column: list(values),
        }
        records[step] = Records.build(CLASSES, columns)
    writer.write_steps(records)
    writer.close("finished")


def found_by(check: str, context: Context) -> list[Finding]:
    """Findings of one check, by its name: none where it lacks its data or the run is too short."""
    (detector,) = [d for d in DETECTORS if d.name == check]
    return [] if detector.missing(context) else detector.run(context)
