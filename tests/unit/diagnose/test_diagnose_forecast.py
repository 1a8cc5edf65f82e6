"""Detectors that look ahead: the trend, the early warning, the step of arrival."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import (
    Flows,
    finding,
    judge,
    names,
    noisy,
    ramp,
    write_flows,
    write_steps,
)
from wapo_analysis.diagnose import Diagnosis, diagnose
from wapo_analysis.diagnose.detectors.forecast import TREND_WINDOW, rolling_trend
from wapo_analysis.store import open_run


def test_rolling_trend_is_theil_sen_and_kendall() -> None:
    line = 0.5 * np.arange(20.0)
    trend = rolling_trend(line)
    assert np.isnan(trend.slope[: TREND_WINDOW - 1]).all()
    assert trend.slope[TREND_WINDOW - 1 :] == pytest.approx(0.5)
    assert trend.agree[TREND_WINDOW - 1 :] == pytest.approx(1)
    line[10] = 100.0  # one outlier moves neither far
    assert rolling_trend(line).slope[TREND_WINDOW - 1 :] == pytest.approx(0.5, abs=0.2)
    assert not rolling_trend(np.ones(3)).agree.any()


def rising(steps: int, onset: int, rate: float, flow: float) -> tuple[np.ndarray, Flows]:
    """Entropy that grows by a rate from a step on, and the net flow of two classes."""
    entropy = 0.4 * np.exp(rate * np.clip(np.arange(steps) - onset, 0, None))
    return noisy(entropy, 0.002), {(-1, 1): np.full(steps, 1.0 + flow), (1, 1): np.full(steps, -1)}


def early(tmp_path: Path, entropy: np.ndarray, flows: Flows, reward: np.ndarray) -> Diagnosis:
    path = write_steps(tmp_path / "run", {"entropy": entropy, "reward": reward})
    write_flows(path, flows)
    return diagnose(open_run(path))


def test_the_early_warning_comes_before_the_entropy_leaves_its_band(tmp_path: Path) -> None:
    entropy, flows = rising(28, 20, 0.04, flow=1.0)
    assert entropy.max() < 1.5 * 0.4
    d = early(tmp_path, entropy, flows, np.full(28, 0.5))
    found = finding(d, "early_warning")
    assert not names(d) & {"entropy_rise", "entropy_explosion"}
    assert found.severity == "warning"
    assert 21 <= found.step <= 27
    assert found.evidence["class"] == "neg_peak"
    assert found.evidence["flow_agrees"] == 1
    assert "exclude_bins = neg_peak" in str(found.advice)
    assert d.first_warning_step == found.step


def test_against_the_flow_it_blames_the_step_size(tmp_path: Path) -> None:
    entropy, flows = rising(30, 20, 0.04, flow=-0.5)
    found = finding(early(tmp_path, entropy, flows, np.full(30, 0.5)), "early_warning")
    assert found.evidence["flow_agrees"] == 0
    assert "too large" in found.message
    assert found.advice.steps[0].text.startswith("Lower lr tenfold")


def test_a_rise_that_comes_to_nothing_is_taken_back(tmp_path: Path) -> None:
    entropy, flows = rising(28, 20, 0.04, flow=1.0)
    settled = np.r_[entropy, noisy(np.full(40, 0.42), 0.002, 1)]
    flows = {key: np.r_[values, np.zeros(40)] for key, values in flows.items()}
    assert "early_warning" not in names(early(tmp_path, settled, flows, np.full(68, 0.5)))


@pytest.mark.parametrize("end", [0.9, 0.1])
def test_a_fall_warns_early_only_if_the_reward_falls_with_it(tmp_path: Path, end: float) -> None:
    entropy = noisy(0.4 * np.exp(-0.05 * np.clip(np.arange(30) - 18, 0, None)), 0.001)
    flows = {(1, 1): np.full(30, -1.0), (-1, 0): np.full(30, -2.0)}
    d = early(tmp_path, entropy, flows, noisy(ramp(0.5, end, 30, 18, 10), 0.005, 1))
    assert ("early_warning" in names(d)) == (end < 0.5)
    if end < 0.5:
        assert finding(d, "early_warning").evidence["class"] == "neg_valley"


def test_a_fall_the_reward_paid_for_is_not_announced_when_the_reward_wobbles(
    tmp_path: Path,
) -> None:
    entropy = noisy(0.4 * np.exp(-0.03 * np.arange(50)), 0.001)
    reward = noisy(ramp(0.3, 0.75, 50, 0, 40), 0.005, 1)
    reward[-5:] -= 0.1
    d = early(tmp_path, entropy, {(1, 1): np.full(50, -1.0)}, reward)
    assert "entropy_decline" in names(d)
    assert "early_warning" not in names(d)


@pytest.mark.parametrize(
    ("rate", "onset", "reward", "severity"),
    [
        (0.038, 30, 0.5, "warning"),
        (0.038, 30, 0.95, "info"),  # the reward pays
        (0.02, 20, 0.5, "info"),  # due late
        (-0.03, 20, 0.5, "info"),
        (0.0, 20, 0.5, None),
    ],
)
def test_the_step_of_arrival_is_projected(
    tmp_path: Path, rate: float, onset: int, reward: float, severity: str | None
) -> None:
    steps = 40
    entropy = 0.4 * np.exp(rate * np.clip(np.arange(steps) - onset, 0, None))
    entropy = entropy * np.exp(noisy(np.zeros(steps), 0.003))
    d = judge(tmp_path, entropy=entropy, reward=noisy(ramp(0.5, reward, steps, 5, 20), 0.01, 1))
    assert ("entropy_arrival" in names(d)) == (severity is not None)
    if severity is not None:
        found = finding(d, "entropy_arrival")
        factor = 2 if rate > 0 else 0.2
        due = onset + 1 + math.log(factor) / rate
        assert found.evidence["arrival_step"] == pytest.approx(due, rel=0.1)
        assert found.evidence["target"] == pytest.approx(0.4 * factor, rel=0.02)
        assert found.severity == severity
