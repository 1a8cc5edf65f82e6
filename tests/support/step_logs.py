"""Run folders written from columns: a step log, class totals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wapo_analysis.diagnose import Diagnosis, Finding, diagnose
from wapo_analysis.schema import CLASSES
from wapo_analysis.store import RunWriter, open_run
from wapo_analysis.table import Records

Columns = Mapping[str, Sequence[float] | np.ndarray]
Flows = Mapping[tuple[int, int], np.ndarray]


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
