"""Records of a metrics log in the names of two trainers, and reading a log as a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from wapo_analysis.importers import ImportReport, import_run
from wapo_analysis.importers.run import ImportSettings
from wapo_analysis.store import open_run

STEPS = 12


def read(
    source: Path, out: Path, run: str | None = None, **mapping: str
) -> tuple[pd.DataFrame, ImportReport]:
    """Steps by their number, and the report."""
    report = import_run(source, out, ImportSettings(mapping=mapping, run=run))
    return open_run(out).steps.set_index("step"), report


def records(make: Callable[[int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A record a step."""
    return [dict(make(step)) for step in range(1, STEPS + 1)]


def trl(step: int) -> dict[str, Any]:
    """What TRL logs at a step."""
    return {
        "loss": 0.01, "grad_norm": 0.2, "learning_rate": 1e-6, "num_tokens": 100.0 * step,
        "completions/mean_length": 40.0, "completions/clipped_ratio": 0.1, "kl": 0.01 * step,
        "rewards/exact/mean": step / 100, "rewards/exact/std": 0.3, "reward": step / 100,
        "reward_std": 0.3, "frac_reward_zero_std": 0.5, "entropy": 0.4, "epoch": step / 100,
        "sampling/sampling_logp_difference/mean": 0.02,
    }  # fmt: skip


def verl(step: int) -> dict[str, Any]:
    """What verl logs at a step."""
    return {
        "actor/entropy": 0.4, "actor/pg_loss": 0.01, "actor/grad_norm": 0.3, "actor/lr": 1e-6,
        "actor/kl_loss": 0.02, "critic/score/mean": step / 100, "critic/score/max": 1.0,
        "critic/rewards/mean": step / 100 - 0.5, "response_length/mean": 90.0,
        "response_length/clip_ratio": 0.06, "rollout_corr/k3_kl": 3e-4,
        "training/rollout_probs_diff_mean": 0.003, "timing_s/gen": 2.0,
    }  # fmt: skip
