"""Findings on the training signal: shares that stay high, gradient spikes, silence on noise."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import judge, names, noisy, ramp


@pytest.mark.parametrize(
    ("column", "values", "name"),
    [
        ("groups_all_wrong", np.full(60, 0.7), "zero_signal_too_hard"),
        ("groups_all_right", np.full(60, 0.7), "zero_signal_too_easy"),
        ("truncated", ramp(0.05, 0.4, 60, 20, 20), "truncation_drift"),
        ("repetition", ramp(0.02, 0.4, 60, 20, 20), "repetition_drift"),
        ("clip_low", ramp(0.02, 0.3, 60, 20, 20), "clip_saturation_low"),
        ("clip_high", ramp(0.02, 0.3, 60, 20, 20), "clip_saturation_high"),
        ("actor/pg_clipfrac", ramp(0.02, 0.3, 60, 20, 20), "clip_saturation"),
        ("clip_ratio/region_mean", ramp(0.02, 0.3, 60, 20, 20), "clip_saturation"),
    ],
)
def test_shares_that_stay_high_warn(
    tmp_path: Path, column: str, values: np.ndarray, name: str
) -> None:
    d = judge(tmp_path, reward=np.full(60, 0.3), **{column: values})
    assert names(d) == {name}
    assert d.worst_severity == "warning"
    early = judge(tmp_path / "back", reward=np.full(60, 0.3), **{column: values[::-1] * 0.2})
    assert not early.findings


def test_gradient_spikes_are_found_but_a_smooth_rise_is_none(tmp_path: Path) -> None:
    grad = np.exp(noisy(np.zeros(100), 0.1))
    rise = judge(tmp_path, grad_norm=grad * np.exp(np.linspace(0, 4, 100)))
    assert names(rise) == {"gradient_grows"}
    grad[[30, 70]] = (8.0, 40.0)
    (finding,) = judge(tmp_path / "b", grad_norm=grad, reward=np.full(100, 0.5)).findings
    assert finding.name == "gradient_spikes"
    assert finding.severity == "warning"
    assert (finding.step, finding.evidence["largest_step"]) == (31, 71)
    assert finding.evidence["spikes"] == 2


def test_a_small_gradient_that_is_back_at_its_old_size_is_no_spike(tmp_path: Path) -> None:
    grad = np.exp(noisy(ramp(0.0, -3.0, 100, 10, 40), 0.1))
    grad[[70, 80, 90]] = (1.0, 1.5, 2.0)
    reward = np.full(100, 0.5)
    assert not judge(tmp_path / "back", grad_norm=grad, reward=reward).findings
    grad[80] = 12.0
    (finding,) = judge(tmp_path / "above", grad_norm=grad, reward=reward).findings
    assert (finding.name, finding.severity) == ("gradient_spikes", "warning")
    assert (finding.step, finding.evidence["spikes"]) == (81, 1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("steps", [8, 30, 200])
def test_pure_noise_is_silent(tmp_path: Path, steps: int, seed: int) -> None:
    rng = np.random.default_rng([steps, seed])

    def share(mean: float, sigma: float) -> np.ndarray:
        return np.clip(rng.normal(mean, sigma, steps), 0, 1)

    d = judge(
        tmp_path,
        entropy=np.abs(rng.normal(0.4, 0.03, steps)),
        reward=share(0.5, 0.08),
        grad_norm=np.exp(rng.normal(0, 0.4, steps)),
        loss=rng.normal(size=steps),
        truncated=share(0.1, 0.05),
        repetition=share(0.05, 0.02),
        groups_all_wrong=share(0.2, 0.1),
        groups_all_right=share(0.2, 0.1),
        clip_low=share(0.02, 0.01),
        clip_high=share(0.02, 0.01),
    )
    assert d.verdict == "healthy"
    assert not d.findings
