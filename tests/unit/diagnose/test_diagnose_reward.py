"""How a reward went, part by part: falls in blocks, rises, what was won back, what is solved."""

import numpy as np
import pandas as pd
import pytest

from tests.support.step_logs import ramp
from wapo_analysis.diagnose.reward import (
    RewardState,
    _differ,
    _straight_rise,
    _won_back,
    block_fall,
    ends_solved,
    fell_before,
    reward_state,
)
from wapo_analysis.diagnose.samples import (
    _steps,
    answer_shares,
    evenly,
    noise_share,
    shared_answers,
)
from wapo_analysis.series import Series

WAVE = np.random.default_rng(5).normal(0, 1, 200)


def series(values: np.ndarray) -> Series:
    return Series(np.arange(1, len(values) + 1), np.asarray(values, float))


def state(values: np.ndarray, solved: bool = False) -> RewardState:
    return reward_state(series(values), solved)


def test_a_fall_in_means_of_an_eighth() -> None:
    values = np.r_[ramp(0.2, 0.8, 40, 8, 16), ramp(0.8, 0.4, 40, 8, 16)]
    fall = block_fall(series(values))
    assert fall is not None
    assert (fall.start, fall.best, fall.end) == pytest.approx((0.20375, 0.8, 0.4), abs=0.005)
    assert (fall.middle, fall.onset, fall.half) == (29, 34, 61)
    assert fall.climbed
    assert fall.lost, "0.4 of a climb of 0.6"
    less = block_fall(series(np.r_[values[:40], ramp(0.8, 0.55, 40, 8, 16)]))
    assert less is not None
    assert (less.climbed, less.lost) == (True, False)
    assert block_fall(series(values[:11])) is None, "too short for three blocks"
    assert block_fall(series(np.full(40, 0.5))) is None
    assert block_fall(series(values[:40])) is None, "its best is its end"
    assert fell_before(series(values))
    assert not fell_before(series(values[:50]))


def test_the_rise_of_a_straight_line_and_its_error() -> None:
    rise, error = _straight_rise(np.arange(11.0) * 0.5)
    assert (rise, error) == pytest.approx((5.0, 0.0), abs=1e-12)
    x = np.arange(101)
    rise, error = _straight_rise(0.01 * x + np.where(x % 2, 0.1, -0.1))
    assert rise == pytest.approx(1.0, abs=0.02)
    # Spread s of the residuals over the root of the sum of squares, times the length.
    assert error == pytest.approx(0.1 * 100 / np.sqrt(101 * 102 * 100 / 12), rel=0.02)


def test_the_deepest_drop_that_was_won_back() -> None:
    drop = np.array([0, 0.3, 0.1, 0, 0.2, 0.5, 0.0, 0.1])
    assert _won_back(drop).tolist() == [0, 0, 0, 0.3, 0.3, 0.3, 0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "solved"),
    [([0.8] * 20, True), ([0.79] * 20, False), ([0.5] * 10 + [0.95] * 10, True),
     ([0.95] * 10 + [0.5] * 10, False)],
)  # fmt: skip
def test_what_is_solved(values: list[float], solved: bool) -> None:
    assert ends_solved(series(np.array(values))) is solved


def test_a_score_that_was_solved_stays_so_within_its_noise() -> None:
    wavy = 0.78 + 0.06 * WAVE[:60]
    assert ends_solved(series(wavy)) is True
    assert not ends_solved(series(np.clip(wavy - 0.2, 0, 1)))


def test_words_and_margins_of_a_reward() -> None:
    rise = state(ramp(0.2, 0.7, 60, 5, 20))
    assert rise.words() == "reward rose from 0.20 to 0.70"
    assert (rise.improved, rise.rising, rise.gaining, rise.lost) == (True, True, False, False)
    assert (rise.bounded, rise.much_gained, rise.hidden) == (True, True, False)
    assert (rise.best_step, rise.stands_from) == (60, 24)
    assert rise.gain_since(1) == pytest.approx(0.5)
    assert rise.gain_since(16) == pytest.approx(0.25)
    assert rise.gain_since(999) == 0
    slow = state(ramp(0.2, 0.7, 60, 0, 59))
    assert slow.gaining
    still = state(np.full(60, 0.5))
    assert still.words() == "reward did not clearly change (0.50 to 0.50)"
    assert (still.improved, still.rising, still.gaining) == (False, False, False)
    fell = state(ramp(0.7, 0.5, 60, 5, 20) + 0.001 * WAVE[:60])
    assert fell.words() == "reward fell from 0.70 to 0.50"
    assert (fell.lost, fell.improved, fell.rising) == (False, False, False)
    lost = state(ramp(0.7, 0.2, 60, 5, 20))
    assert lost.words() == "reward fell from 0.70 to 0.20"
    assert (lost.lost, lost.rising, lost.gaining) == (True, False, False)
    assert lost.evidence() == pytest.approx(
        {"reward_start": 0.7, "reward_peak": 0.7, "reward_end": 0.2}
    )
    assert (state(np.full(60, 1.5)).bounded, state(np.full(60, -0.5)).bounded) == (False, False)


@pytest.mark.parametrize(("end", "much"), [(0.45, False), (0.49, True)])
def test_a_third_of_the_way_to_certainty_is_much(end: float, much: bool) -> None:
    assert state(ramp(0.2, end, 60, 5, 20)).much_gained is much


@pytest.mark.parametrize(("noise", "hidden"), [(0.05, False), (0.3, True)])
def test_a_gain_is_hidden_in_noise(noise: float, hidden: bool) -> None:
    assert state(np.clip(0.5 + noise * WAVE[:60], 0, 1)).hidden is hidden
    assert not state(1.5 + noise * WAVE[:60]).hidden


@pytest.mark.parametrize(("rise", "differs"), [(0.005, False), (0.015, True)])
def test_first_and_last_eighth_differ_by_more_than_a_fiftieth(rise: float, differs: bool) -> None:
    assert _differ(series(np.repeat([0.5, 0.5 + rise], 40))) is differs


# ---- completions


def test_steps_are_read_evenly_and_the_nearest_to_a_window() -> None:
    assert evenly(np.arange(5), 5) == [0, 1, 2, 3, 4]
    assert evenly(np.arange(6), 2) == [0, 5]
    assert evenly(np.arange(100), 3) == [0, 50, 99]
    recorded = [1, 5, 20, 21, 22, 23]
    assert _steps(recorded, 20, 23) == [20, 21, 22], "three at most"
    assert _steps(recorded, 6, 9) == [5]
    assert _steps(recorded, 33, 40) == [23]
    assert _steps(recorded, 34, 40) == []
    assert _steps([], 1, 2) == []


def test_shares_of_completions() -> None:
    rows = pd.DataFrame(
        {
            "step": [1, 1, 1, 1, 2, 2, 3],
            "group": [0, 0, 1, 1, 0, 1, 0],
            "prompt": ["p", "p", "q", "q", "p", "p", None],
            "completion": ["a", "b", "a", "c", "d", "d", "!" * 16],
            "answer": ["a", "x", " A ", "", "d", "e", None],
            "reward": [1.0, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0],
        }
    )
    shared = shared_answers(rows)
    assert (shared.steps.tolist(), shared.values.tolist()) == ([1], [0.5])
    assert not len(shared_answers(rows.assign(completion=None)))
    noise = noise_share(rows)
    assert (noise.steps.tolist(), noise.values.tolist()) == ([1, 2, 3], [0, 0, 1])
    held, missed = answer_shares(rows)
    assert held.values.tolist() == pytest.approx([2 / 3, 0.5])
    assert (missed.steps.tolist(), missed.values.tolist()) == ([1, 2], [0.5, 0.0])
    late = rows.assign(completion=["a" + " " * 100] + ["xay"] * 6)
    assert answer_shares(late)[0].values.tolist() == [0, 0]
