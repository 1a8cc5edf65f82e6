"""Where findings begin: a log just inside of what docs/diagnose.md allows, and one just beyond."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.step_logs import finding, judge, names, ramp

N = 60
FLAT = np.full(N, 0.3)
GAINS = ramp(0.2, 0.7, N, 5, 55)


def moved(start: float, end: float) -> np.ndarray:
    return ramp(start, end, N, 20, 15)


def tail(value: float, count: int, steps: int = 100) -> np.ndarray:
    """A learning rate of 1e-5, and another one for the last records."""
    return np.r_[np.full(steps - count, 1e-5), np.full(count, value)]


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "clip": (
        "clip_saturation_low", "warning",
        {"reward": FLAT, "clip_low": moved(0.02, 0.19)},
        {"reward": FLAT, "clip_low": moved(0.02, 0.2)},
    ),
    "slower": (
        "steps_slow_down", "info",
        {"reward": FLAT, "seconds": moved(10, 19.5)},
        {"reward": FLAT, "seconds": moved(10, 20)},
    ),
    "KL unpaid": (
        "kl_drift", "warning",
        {"reward": FLAT, "kl_ref": moved(0.01, 0.48)},
        {"reward": FLAT, "kl_ref": moved(0.01, 0.5)},
    ),
    "KL as started": (
        "kl_drift", "warning",
        {"reward": FLAT, "kl_ref": moved(0.25, 1.2)},
        {"reward": FLAT, "kl_ref": moved(0.25, 1.25)},
    ),
    "KL paid": (
        "kl_drift", "info",
        {"reward": GAINS, "kl_ref": moved(0.01, 0.95)},
        {"reward": GAINS, "kl_ref": moved(0.01, 1.0)},
    ),
    "KL far": (
        "kl_drift", "warning",
        {"reward": GAINS, "kl_ref": moved(0.01, 0.9)},
        {"reward": GAINS, "kl_ref": moved(0.01, 2.0)},
    ),
    "gradient gone": (
        "gradient_vanishes", "warning",
        {"reward": FLAT, "grad_norm": moved(1.0, 0.03)},
        {"reward": FLAT, "grad_norm": moved(1.0, 0.0199)},
    ),
    "gradient grown": (
        "gradient_grows", "warning",
        {"reward": FLAT, "grad_norm": moved(1.0, 9.5)},
        {"reward": FLAT, "grad_norm": moved(1.0, 10.0)},
    ),
    "truncated": (
        "truncation_drift", "warning",
        {"reward": FLAT, "truncated": moved(0.05, 0.19)},
        {"reward": FLAT, "truncated": moved(0.05, 0.21)},
    ),
    "rate jumps": (
        "lr_schedule", "warning",
        {"reward": np.full(100, 0.3), "lr": tail(2.9e-5, 50)},
        {"reward": np.full(100, 0.3), "lr": tail(3.1e-5, 50)},
    ),
    "rate ends": (
        "lr_schedule", "warning",
        {"reward": np.full(100, 0.3), "lr": tail(0.9e-8, 19)},
        {"reward": np.full(100, 0.3), "lr": tail(0.9e-8, 20)},
    ),
    "rate of nothing": (
        "lr_schedule", "warning",
        {"reward": np.full(100, 0.3), "lr": tail(1.2e-8, 30)},
        {"reward": np.full(100, 0.3), "lr": tail(1e-8, 30)},
    ),
    "high rate": (
        "lr_far_off", "warning",
        {"reward": FLAT, "lr": np.full(N, 9e-4), "clip_low": np.full(N, 0.3)},
        {"reward": FLAT, "lr": np.full(N, 1e-3), "clip_low": np.full(N, 0.3)},
    ),
    "high rate in the clip": (
        "lr_far_off", "warning",
        {"reward": FLAT, "lr": np.full(N, 2e-3), "clip_low": np.full(N, 0.19)},
        {"reward": FLAT, "lr": np.full(N, 2e-3), "clip_high": np.full(N, 0.2)},
    ),
    "high rate and k3": (
        "lr_far_off", "warning",
        {"reward": FLAT, "lr": np.full(N, 2e-3), "kl_old": np.full(N, 0.09)},
        {"reward": FLAT, "lr": np.full(N, 2e-3), "kl_old": np.full(N, 0.1)},
    ),
    "high rate and entropy": (
        "lr_far_off", "warning",
        {"reward": FLAT, "lr": np.full(N, 2e-3), "entropy": moved(0.4, 0.79)},
        {"reward": FLAT, "lr": np.full(N, 2e-3), "entropy": moved(0.4, 0.81)},
    ),
    "low rate": (
        "lr_far_off", "warning",
        {"reward": FLAT, "lr": np.full(N, 1.1e-8)},
        {"reward": FLAT, "lr": np.full(N, 1e-8)},
    ),
    "low rate for long": (
        "lr_far_off", "warning",
        {"reward": FLAT[:29], "lr": np.full(29, 1e-9)},
        {"reward": FLAT[:30], "lr": np.full(30, 1e-9)},
    ),
    "longer": (
        "length_drift", "warning",
        {"reward": FLAT, "length": moved(100, 149)},
        {"reward": FLAT, "length": moved(100, 150)},
    ),
    "shorter": (
        "length_drift", "warning",
        {"reward": FLAT, "length": moved(150, 101)},
        {"reward": FLAT, "length": moved(150, 100)},
    ),
    "length paid": (
        "length_drift", "info",
        {"reward": GAINS, "length": moved(100, 149)},
        {"reward": GAINS, "length": moved(100, 150)},
    ),
    "repetition": (
        "repetition_drift", "warning",
        {"reward": FLAT, "repetition": moved(0.05, 0.19)},
        {"reward": FLAT, "repetition": moved(0.05, 0.21)},
    ),
    "fewer distinct": (
        "diversity_falls", "warning",
        {"reward": FLAT, "distinct": moved(0.8, 0.41)},
        {"reward": FLAT, "distinct": moved(0.8, 0.39)},
    ),
    "few distinct as ever": (
        "diversity_falls", "warning",
        {"reward": FLAT, "distinct": moved(0.25, 0.11)},
        {"reward": FLAT, "distinct": moved(0.25, 0.09)},
    ),
    "advantages": (
        "advantages_vanish", "warning",
        {"reward": FLAT, "advantage_std": moved(1.0, 0.11)},
        {"reward": FLAT, "advantage_std": moved(1.0, 0.09)},
    ),
    "critic": (
        "value_diverges", "warning",
        {"reward": FLAT, "value_loss": moved(1.0, 2.9)},
        {"reward": FLAT, "value_loss": moved(1.0, 3.0)},
    ),
    "critic that had learned": (
        "value_diverges", "warning",
        {"reward": FLAT, "value_loss": np.r_[np.ones(20), np.full(20, 0.4), np.full(20, 1.4)]},
        {"reward": FLAT, "value_loss": np.r_[np.ones(20), np.full(20, 0.4), np.full(20, 1.6)]},
    ),
    "critic explains": (
        "value_diverges", "warning",
        {"reward": FLAT, "value_explained": moved(0.19, 0.0)},
        {"reward": FLAT, "value_explained": moved(0.2, 0.0)},
    ),
    "critic explains nothing": (
        "value_diverges", "warning",
        {"reward": FLAT, "value_explained": moved(0.5, 0.01)},
        {"reward": FLAT, "value_explained": moved(0.5, -0.01)},
    ),
    "no signal": (
        "stalled", "critical",
        {"reward": FLAT, "groups_flat": np.full(N, 0.89)},
        {"reward": FLAT, "groups_flat": np.full(N, 0.9)},
    ),
    "no gradient": (
        "stalled", "critical",
        {"reward": FLAT, "grad_norm": np.r_[np.ones(20), np.full(40, 1.1e-3)]},
        {"reward": FLAT, "grad_norm": np.r_[np.ones(20), np.full(40, 1e-3)]},
    ),
    "held-out score": (
        "held_out_falls", "warning",
        {"reward": FLAT, "eval_reward": moved(0.8, 0.69)},
        {"reward": FLAT, "eval_reward": moved(0.8, 0.67)},
    ),
    "low held-out score": (
        "held_out_falls", "warning",
        {"reward": FLAT, "eval_reward": moved(0.1, 0.075)},
        {"reward": FLAT, "eval_reward": moved(0.1, 0.065)},
    ),
    "held-out score that stands": (
        "held_out_stands", "warning",
        {"reward": moved(0.2, 0.34), "eval_reward": np.full(N, 0.4)},
        {"reward": moved(0.2, 0.36), "eval_reward": np.full(N, 0.4)},
    ),
    "held-out score that follows": (
        "held_out_stands", "warning",
        {"reward": moved(0.2, 0.7), "eval_reward": moved(0.4, 0.52)},
        {"reward": moved(0.2, 0.7), "eval_reward": moved(0.4, 0.48)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_finding_begins_where_the_docs_say(tmp_path: Path, case: str) -> None:
    name, severity, inside, beyond = CASES[case]
    within = judge(tmp_path / "inside", **inside)
    told = {f.name for f in within.findings if f.severity == severity}
    assert name not in told
    found = judge(tmp_path / "beyond", **beyond)
    assert name in names(found)
    assert finding(found, name).severity == severity


def test_of_many_broken_steps_five_are_named(tmp_path: Path) -> None:
    loss = np.full(40, 0.5)
    loss[[4, 8, 12, 16, 20]] = np.nan
    (found,) = judge(tmp_path / "five", loss=loss, reward=np.full(40, 0.3)).findings
    assert found.message == "At steps 5, 9, 13, 17, 21 loss was not finite."
    loss[24] = np.inf
    (found,) = judge(tmp_path / "six", loss=loss, reward=np.full(40, 0.3)).findings
    assert found.message == "At steps 5, 9, 13, 17, 21, ... (6 in all) loss was not finite."
    assert found.evidence["broken_steps"] == 6


@pytest.mark.parametrize(("last", "name"), [(2, "nonfinite_step"), (3, "diverged")])
def test_three_broken_steps_at_the_end_are_a_run_that_diverged(
    tmp_path: Path, last: int, name: str
) -> None:
    loss = np.full(40, 0.5)
    loss[-last:] = np.nan
    (found,) = judge(tmp_path, loss=loss, reward=np.full(40, 0.3)).findings
    assert (found.name, found.step) == (name, 41 - last)
