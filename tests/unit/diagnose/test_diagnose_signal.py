"""Findings on the training signal: shares that stay high, spikes, advantages, silence on noise."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import Columns, found_by, judge, names, noisy, ramp, seen
from wapo_analysis.diagnose import Finding

N = 60
FLAT = np.full(N, 0.3)
LATE = np.arange(N) >= 30


def check(name: str, path: Path, columns: Columns) -> list[Finding]:
    return found_by(name, seen(path / "run", columns))


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


@pytest.mark.parametrize(("groups", "share"), [(1, 0.58), (2, 0.82), (2, 0.65)])
def test_flat_groups_all_along_are_flat_from_the_first_step_however_few_are_in_a_step(
    tmp_path: Path, groups: int, share: float
) -> None:
    flat = np.random.default_rng(7).binomial(groups, share, 600) / groups
    found = judge(tmp_path, reward=noisy(np.full(600, 0.9), 0.3), groups_flat=flat).findings
    (finding,) = [f for f in found if f.name.startswith("zero_signal")]
    assert finding.step == 1
    assert finding.message.startswith(f"{flat.mean():.0%} of the groups")


def test_groups_that_become_flat_are_flat_from_then_on(tmp_path: Path) -> None:
    chance = np.repeat([0.1, 0.75], 300)
    flat = np.random.default_rng(7).binomial(8, chance) / 8
    found = judge(tmp_path, reward=noisy(np.full(600, 0.9), 0.3), groups_flat=flat).findings
    (finding,) = [f for f in found if f.name.startswith("zero_signal")]
    assert 290 <= finding.step <= 312


def test_completions_that_were_cut_all_along_are_cut_from_the_first_step(tmp_path: Path) -> None:
    cut = np.random.default_rng(3).binomial(8, 0.9, 90) / 8
    cut[:2] = (0.25, 0.75)
    found = judge(tmp_path, reward=noisy(np.full(90, 0.4), 0.2), truncated=cut).findings
    (finding,) = [f for f in found if f.name == "truncation_drift"]
    assert finding.step == 1


@pytest.mark.parametrize("first", [15.2, 3.0, 0.4])
def test_a_fast_first_step_is_no_baseline_for_the_pace(tmp_path: Path, first: float) -> None:
    seconds = np.abs(noisy(np.full(90, 90.0), 7.0))
    seconds[0] = first
    reward = np.full(90, 0.4)
    assert "steps_slow_down" not in names(judge(tmp_path, reward=reward, seconds=seconds))
    seconds[50:] *= 3
    slow = judge(tmp_path / "slow", reward=reward, seconds=seconds).findings
    assert [f.step for f in slow if f.name == "steps_slow_down"][0] in range(49, 54)


# ---- advantages, and the critic ------------------------------------------------------------------

ADVANTAGES: dict[str, tuple[Columns, tuple[int, str] | None]] = {
    "a tenth of ten": ({"advantage_std": np.where(LATE, 1.0, 10.0)}, (31, "warning")),
    "more": ({"advantage_std": np.where(LATE, 1.01, 10.0)}, None),
    "a tenth of a small spread": ({"advantage_std": np.where(LATE, 0.05, 0.5)}, (31, "warning")),
    "solved": (
        {"advantage_std": np.where(LATE, 0.05, 0.5), "reward": FLAT + 0.6}, (31, "info")
    ),
    "none from the start": ({"advantage_std": np.zeros(N)}, None),
    "in eight records": ({"advantage_std": np.array([1, 1, 1, 1, 1, 0, 0, 0.0])}, (6, "warning")),
    "in seven": ({"advantage_std": np.array([1, 1, 1, 1, 0, 0, 0.0])}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", ADVANTAGES)
def test_the_advantages_vanish(tmp_path: Path, case: str) -> None:
    columns, expected = ADVANTAGES[case]
    found = check("advantages_vanish", tmp_path, columns)
    assert [(f.step, f.severity) for f in found] == ([expected] if expected else [])
    for one in found:
        assert ("Nothing is left" in one.advice.text) == (one.severity == "info")


CRITICS: dict[str, tuple[dict[str, np.ndarray], int | None]] = {
    "three times its lowest": ({"value_loss": np.where(LATE, 12.0, 4.0)}, 31),
    "less": ({"value_loss": np.where(LATE, 11.9, 4.0)}, None),
    "once half again above its start": ({"value_loss": np.repeat([4, 1.5, 6.0], 20)}, 41),
    "not above its start": ({"value_loss": np.repeat([4, 1.5, 5.9], 20)}, None),
    "of a small loss": ({"value_loss": np.repeat([0.4, 0.1, 0.5], 20)}, None),
    "a loss of nothing": ({"value_loss": np.repeat([1, 0, 2.0], 20)}, 41),
    "a loss below zero": ({"value_loss": np.repeat([1, 0, 2.0], 20) - 1e-3}, None),
    "in eight records": ({"value_loss": np.array([1, 1, 1, 2, 4, 6, 8, 10.0])}, 6),
    "in seven": ({"value_loss": np.array([1, 1, 2, 4, 6, 8, 10.0])}, None),
    "explained a fifth": ({"value_explained": np.where(LATE, 0.0, 0.2)}, 31),
    "never explained a fifth": ({"value_explained": np.where(LATE, 0.0, 0.19)}, None),
    "explains a little": ({"value_explained": np.where(LATE, 0.01, 0.5)}, None),
    "explained, in eight": ({"value_explained": np.array([1, 1, 1, 1, 1, 0, 0, 0.0])}, 6),
    "explained, in seven": ({"value_explained": np.array([1, 1, 1, 1, 0, 0, 0.0])}, None),
    "both, since the first": (
        {"value_loss": np.where(LATE, 12.0, 4.0),
         "value_explained": np.where(np.arange(N) < 40, 0.5, -0.1)}, 31,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CRITICS)
def test_the_critic_fails(tmp_path: Path, case: str) -> None:
    columns, step = CRITICS[case]
    found = check("value_diverges", tmp_path, columns)
    assert [f.step for f in found] == ([step] if step else [])
    assert not found or f"before step {step}" in found[0].advice.steps[-1].text
