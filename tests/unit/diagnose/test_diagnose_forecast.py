"""Detectors that look ahead: the trend, the early warning, the step of arrival."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import theilslopes

from tests.support.step_logs import (
    Flows,
    finding,
    found_by,
    judge,
    names,
    noisy,
    ramp,
    seen,
    write_flows,
    write_steps,
)
from wapo_analysis.diagnose import Diagnosis, Finding, diagnose
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
    assert found.evidence["prediction_agrees"] == 1
    assert "exclude_bins = neg_peak" in str(found.advice)
    assert d.first_warning_step == found.step


def test_against_the_flow_it_blames_the_step_size(tmp_path: Path) -> None:
    entropy, flows = rising(30, 20, 0.04, flow=-0.5)
    found = finding(early(tmp_path, entropy, flows, np.full(30, 0.5)), "early_warning")
    assert found.evidence["prediction_agrees"] == 0
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


# ---- where they begin, on courses without noise --------------------------------------------------

PEAK = (1, 1)


def flat_then(rate: float, steps: int, onset: int = 20) -> np.ndarray:
    """An entropy of 0.4 nats that from a record on changes by a constant factor."""
    return 0.4 * np.exp(rate * np.clip(np.arange(steps) - onset, 0, None))


def back(first: float, rate: float, steps: int) -> np.ndarray:
    """An entropy that dips, and then rises from a part of its baseline."""
    return 0.4 * np.r_[np.ones(20), first * np.exp(rate * np.arange(steps))]


def net(*values: float) -> Flows:
    return {PEAK: np.array(values)}


def warned(path: Path, entropy: np.ndarray, flow: float | Flows = 1.0, **more: np.ndarray) -> list:
    """Early warnings beside a predicted dH that is the same at every step, or given by step."""
    flows = flow if isinstance(flow, dict) else {PEAK: np.full(len(entropy), flow)}
    return found_by("early_warning", seen(path / "run", {"entropy": entropy, **more}, flows))


def test_the_trend_of_a_window_is_that_of_its_fifteen_pairs() -> None:
    values = np.array([0.0, 3.0, 1.0, 1.0, 7.0, 4.0])
    pairs = list(combinations(range(6), 2))
    trend = rolling_trend(values)
    slope = np.median([(values[j] - values[i]) / (j - i) for i, j in pairs])
    agree = np.mean([np.sign(values[j] - values[i]) for i, j in pairs])
    assert (trend.slope[-1], trend.agree[-1]) == pytest.approx((slope, agree))
    assert np.isnan(rolling_trend(values[:5]).slope).all()


EARLY_STEPS: dict[str, tuple[np.ndarray, float, int | None]] = {
    # Ten records after the onset the rate takes it from 9 times itself to 1.5 times the baseline
    # in 8 records more: ln 1.5 / 17 a record.
    "too slow to arrive within eight steps": (flat_then(0.0238, 31), 1, None),
    "fast enough": (flat_then(0.0239, 31), 1, 30),
    "fast enough for one record": (flat_then(0.0239, 30), 1, None),
    "down, too slow": (flat_then(-0.0407, 31), -1, None),
    "down, to half": (flat_then(-0.0408, 31), -1, 30),
    "with the flow, after three records": (flat_then(0.06, 25), 1, 24),
    "with the flow, but once": (flat_then(0.06, 24), 1, None),
    "against the flow, not after three": (flat_then(0.06, 25), -1, None),
    "against the flow, after four": (flat_then(0.06, 26), -1, 25),
    "without a flow": (flat_then(0.06, 26), 0, 25),
    "down against the flow": (flat_then(-0.12, 26), 1, 25),
    # Six rates above its lowest, it stands at 1.095 and 1.105 times its baseline.
    "back, and not yet a tenth above": (back(1.095 * math.exp(-0.48), 0.08, 8), 1, None),
    "back, and a tenth above": (back(1.105 * math.exp(-0.48), 0.08, 8), 1, 27),
    "back, and a tenth above but once": (back(1.105 * math.exp(-0.48), 0.08, 7), 1, None),
    "two records up are no trend": (np.r_[np.full(20, 0.4), 0.48, 0.59], 1, None),
    "a jump is no trend": (np.r_[np.full(20, 0.4), np.full(10, 1.2)], 1, None),
    "announced, and it came": (0.4 * np.exp(ramp(0, 1.5, 60, 20, 25)), 1, 24),
    "announced, and it came down": (0.4 * np.exp(ramp(0, -1.5, 60, 20, 15)), -1, 24),
    "rising from the start, in seven records": (flat_then(0.06, 7, 0), 1, 6),
    "in six": (flat_then(0.06, 6, 0), 1, None),
    "not where an entropy of 0 has no logarithm": (
        np.where(np.arange(31) == 2, 0, flat_then(0.06, 31)), 1, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EARLY_STEPS)
def test_the_early_warning_begins_with_the_trend(tmp_path: Path, case: str) -> None:
    entropy, flow, step = EARLY_STEPS[case]
    assert [found.step for found in warned(tmp_path, entropy, flow)] == ([step] if step else [])


SAID_EARLY: dict[str, tuple[float, Flows, str, int, float | None]] = {
    "with the flow": (
        0.06, {PEAK: np.where(np.arange(26) == 18, 9.0, 0.0), (-1, 0): np.ones(26)},
        "Entropy rises steadily at step 24 (0.4 to 0.479 nats) and leaves its band within 8 steps "
        "at this rate; pos_peak tokens account for 60% of the predicted rise.", 1, 15,
    ),
    "against it": (
        0.06, {PEAK: np.arange(26.0) - 26.0},
        "Entropy rises steadily at step 25 (0.4 to 0.508 nats) and leaves its band within 8 steps "
        "at this rate; all classes together predict the opposite, so the steps are too large for "
        "first order.", 0, -27,
    ),
    "without one": (
        0.06, {PEAK: np.arange(26.0), (-1, 1): -np.arange(26.0)},
        "Entropy rises steadily at step 25 (0.4 to 0.508 nats) and leaves its band within 8 steps "
        "at this rate.", 0, 0,
    ),
    "downward": (
        -0.12, {PEAK: -np.arange(26.0)},
        "Entropy falls steadily at step 24 (0.4 to 0.279 nats) and leaves its band within 8 steps "
        "at this rate; pos_peak tokens account for 100% of the predicted fall.", 1, -123,
    ),
    "totals of one step alone": (
        0.06, {PEAK: np.where(np.arange(26) == 23, 0.5, np.nan)},
        "Entropy rises steadily at step 24 (0.4 to 0.479 nats) and leaves its band within 8 steps "
        "at this rate; pos_peak tokens account for 100% of the predicted rise.", 1, 0.5,
    ),
    "no totals near": (
        0.06, {PEAK: np.where(np.arange(26) < 5, 2.0, np.nan)},
        "Entropy rises steadily at step 25 (0.4 to 0.508 nats) and leaves its band within 8 steps "
        "at this rate.", 0, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID_EARLY)
def test_the_early_warning_says_what_the_flow_predicts_over_six_steps(
    tmp_path: Path, case: str
) -> None:
    rate, flows, said, agrees, predicted = SAID_EARLY[case]
    (found,) = warned(tmp_path, flat_then(rate, 26), flows)
    assert found.message == said
    told = found.evidence
    assert told["direction"] == ("up" if rate > 0 else "down")
    assert told["entropy_start"] == pytest.approx(0.4)
    assert told["entropy_then"] == pytest.approx(0.4 * math.exp(rate * (found.step - 21)))
    assert (told["prediction_agrees"], told["predicted_dentropy"]) == (agrees, predicted)
    assert ("exclude_bins" in str(found.advice)) == bool(agrees)


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (np.full(26, 0.5), False),  # stands
        (ramp(0.95, 0.85, 26, 20, 4), False),  # falls a little, and is solved all the same
        (ramp(0.5, 0.4, 26, 20, 4), True),
    ],
)
def test_a_falling_entropy_is_announced_only_while_the_reward_falls(
    tmp_path: Path, reward: np.ndarray, told: bool
) -> None:
    assert bool(warned(tmp_path, flat_then(-0.12, 26), -1.0, reward=reward)) is told
    assert warned(tmp_path / "up", flat_then(0.12, 26), 1.0, reward=reward)


def arrival(path: Path, entropy: np.ndarray, every: int = 1, **more: np.ndarray) -> list[Finding]:
    context = seen(path / "run", {"entropy": entropy, **more}, every=every)
    return found_by("entropy_projection", context)


ARRIVES: dict[str, tuple[np.ndarray, int, tuple[int, str, int] | None]] = {
    # (entropy, every n-th step, (first step of the trend, severity, step of arrival))
    "twenty records": (flat_then(0.03, 20, 10), 1, (11, "info", 34)),
    "nineteen": (flat_then(0.03, 19, 9), 1, None),
    "the last ten of forty": (flat_then(0.03, 40, 30), 1, (31, "info", 54)),
    "the last quarter": (flat_then(0.015, 80, 61), 1, (61, "info", 108)),
    "the last 200 of 1000": (flat_then(0.001, 1000, 800), 1, (801, "info", 1494)),
    "due within as many records as the trend has": (
        flat_then(0.038, 40, 30), 1, (31, "warning", 49),
    ),
    "due one later": (flat_then(0.034, 40, 30), 1, (31, "info", 51)),
    "of every tenth step, due soon": (flat_then(0.038, 40, 30), 10, (310, "warning", 492)),
    "of every tenth step, due late": (flat_then(0.034, 40, 30), 10, (310, "info", 514)),
    "of every tenth step, later than as long again": (flat_then(0.01, 40, 30), 10, None),
    "within as long again": (flat_then(0.0145, 40, 30), 1, (31, "info", 79)),
    "later": (flat_then(0.0135, 40, 30), 1, None),
    "down to a fifth": (flat_then(-0.05, 40, 30), 1, (31, "info", 63)),
    "down within as many": (flat_then(-0.069, 40, 30), 1, (31, "info", 54)),
    "up again from a half": (
        0.4 * np.r_[np.ones(20), np.full(10, 0.6), 0.6 * np.exp(0.1 * np.arange(10))], 1,
        (31, "warning", 43),
    ),
    "outside of its band above": (flat_then(0.05, 40, 30), 1, None),
    "outside of it below": (flat_then(-0.085, 40, 30), 1, None),
    "at its edge above": (np.r_[np.full(30, 0.5), np.arange(8) / 64 + 0.55, 0.6875, 0.8125],
        1, None),
    "at its edge below": (np.r_[np.full(30, 0.5), 0.45 - np.arange(8) / 64, 0.3125, 0.1875],
        1, None),
    "flat": (np.full(40, 0.4), 1, None),
    "an entropy of 0 has no logarithm": (
        np.where(np.arange(40) == 2, 0, flat_then(0.03, 40, 30)), 1, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRIVES)
def test_the_arrival_is_that_of_the_last_quarter_continued(tmp_path: Path, case: str) -> None:
    entropy, every, expected = ARRIVES[case]
    found = arrival(tmp_path, entropy, every)
    told = [(f.step, f.severity, f.evidence["arrival_step"]) for f in found]
    assert told == ([expected] if expected else [])


def test_the_arrival_tells_its_factor_its_target_and_the_latest_step(tmp_path: Path) -> None:
    rates = np.where(np.arange(40) >= 36, 0.01, 0.04)  # slower at the end
    logs = math.log(0.4) + np.cumsum(np.where(np.arange(40) > 30, rates, 0.0))
    (found,) = arrival(tmp_path, np.exp(logs))
    slope, _, low, _ = theilslopes(logs[-10:], np.arange(10), alpha=0.99)
    way = math.log(0.8) - np.median(logs[-10:] + slope * np.arange(9, -1, -1))
    assert low < 0.9 * slope
    assert found.evidence == {
        "arrival_step": round(40 + way / slope),
        "latest_step": round(40 + way / low),
        "factor_per_step": pytest.approx(math.exp(slope)),
        "target": pytest.approx(0.8),
    }


@pytest.mark.parametrize(("wobble", "told"), [(0.05, True), (0.07, False)])
def test_a_trend_within_its_99_percent_interval_of_none_is_not_projected(
    tmp_path: Path, wobble: float, told: bool
) -> None:
    saw = np.where(np.arange(40) % 2, wobble, -wobble)
    assert bool(arrival(tmp_path, flat_then(0.025, 40, 30) * np.exp(saw))) is told


@pytest.mark.parametrize(
    ("reward", "severity"),
    [
        (ramp(0.2, 0.6, 40, 5, 20), "info"),  # it rose
        (np.full(40, 0.9), "info"),  # it is solved
        (np.full(40, 0.5), "warning"),
    ],
)
def test_an_arrival_that_the_reward_pays_for_is_no_warning(
    tmp_path: Path, reward: np.ndarray, severity: str
) -> None:
    (found,) = arrival(tmp_path, flat_then(0.038, 40, 30), reward=reward)
    assert found.severity == severity
    assert ("Fine while" in found.advice.text) == (severity == "info")
