"""How a reward went, part by part: falls in blocks, rises, what was won back, what is solved."""

import numpy as np
import pytest

from tests.support.courses import CALM, levels, series, state
from tests.support.step_logs import ramp
from wapo_analysis.diagnose.reward import (
    _differ,
    _won_back,
    block_fall,
    ends_solved,
    fell_before,
    reward_state,
    straight_rise,
)

WAVE = np.random.default_rng(5).normal(0, 1, 200)


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
    rise, error = straight_rise(np.arange(11.0) * 0.5)
    assert (rise, error) == pytest.approx((5.0, 0.0), abs=1e-12)
    x = np.arange(101)
    rise, error = straight_rise(0.01 * x + np.where(x % 2, 0.1, -0.1))
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
    assert (rise.best_step, rise.stands_from) == (60, 23)
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


def test_a_gain_is_more_than_the_margin_and_more_than_none() -> None:
    at = state(levels((100, 50), (100, 51)))
    assert at.margin == 1.0, "a fiftieth of the baseline, in a long quiet run"
    assert not at.improved
    assert at.words() == "reward did not clearly change (50.00 to 51.00)"
    wave = state(levels((10, 150), (70, 152), (100, 149), (20, 151)))
    assert (wave.margin, wave.rising) == (3.0, False), "a third of the margin"
    assert state(levels((10, 150), (70, 152), (100, 149), (20, 151.01))).rising
    assert state(ramp(0.25, 0.5, 60, 5, 20)).much_gained, "a third of the way to 1"
    assert not state(np.zeros(60)).gaining
    assert not state(ramp(-0.5, 0.5, 60, 5, 20)).bounded
    tiny = state(np.r_[np.full(40, 0.5), ramp(0.5, 0.5 + 4.9e-10, 20, 0, 19)])
    least = state(np.r_[np.full(40, 0.5), ramp(0.5, 0.5 + 5.1e-10, 20, 0, 19)])
    assert (tiny.gaining, least.gaining) == (False, True), "more than rounding"
    for few in range(1, 8):
        short = state(np.arange(1.0, few + 1))
        assert not any((short.improved, short.rising, short.gaining)), few
    eight = state(np.arange(1.0, 9))
    assert (eight.improved, eight.rising, eight.gaining) == (True, True, True)


def test_words_follow_the_blocks_where_the_ends_are_within_the_margin() -> None:
    inside = state(np.repeat([0.5, 0.56], 100) + 0.05 * WAVE)
    assert inside.series.end - inside.series.level < inside.margin
    assert inside.words() == "reward rose from 0.49 to 0.57"


def test_where_it_stands_and_how_much_it_gained_since() -> None:
    stands = state(levels((20, 0), (20, 9), (20, 10)))
    assert stands.stands_from == 20, "a tenth of the gain from its end"
    assert state(levels((59, 0.5), (1, 1.5))).stands_from == 59, "the last record is away"
    assert state(np.full(60, 0.5)).stands_from == 0
    straight = state(ramp(0.2, 0.8, 60, 0, 59))
    assert straight.gain_since(60) == straight.gain_since(999) == pytest.approx(-1.2 / 59)
    assert straight.gain_since(59) == pytest.approx(-0.9 / 59)
    back = state(np.r_[ramp(0.2, 0.8, 40, 8, 16), ramp(0.8, 0.3, 30, 4, 16), np.full(10, 0.4)])
    assert back.low(60) == pytest.approx(0.3), "what is told is smoothed, not a block"
    assert back.best_step == 45, "before the loss"


def test_the_noise_of_a_reward_is_that_before_its_peak_if_that_is_less() -> None:
    quiet = series(np.full(60, 0.5))
    assert reward_state(quiet, solved=False).margin == 4 * quiet.smooth_noise
    for first, until in ((6, 8), (9, 11)):
        peak = [0.9, 1.0, 1.1]
        values = series(np.r_[0.5 + 0.01 * WAVE[:first], peak, 0.5 + 0.2 * WAVE[first + 3 : 60]])
        margin = reward_state(values, solved=False).margin
        assert margin == pytest.approx(4 * values.head(until).smooth_noise)
        assert margin < 2 * values.smooth_noise
    late = series(np.r_[0.5 + 0.01 * WAVE[:5], 0.9, 1.0, 1.1, 0.5 + 0.2 * WAVE[8:60]])
    assert reward_state(late, solved=False).margin == 4 * late.smooth_noise, "seven are too few"


def test_blocks_are_an_eighth_of_the_run_or_four_records() -> None:
    fall = block_fall(series(levels((48, 0.25), (48, 0.75), (32, 0.5))))
    assert fall is not None
    assert (fall.start, fall.best, fall.end) == (0.25, 0.75, 0.5)
    assert (fall.middle, fall.onset, fall.half) == (56, 64, 103)
    assert fall.lost, "half of the climb"
    half = block_fall(series(levels((48, 0.25), (40, 0.75), (40, 0.25))))
    assert half is not None
    assert (half.middle, half.onset, half.half) == (56, 64, 95), "halfway in the block up to it"
    least = np.r_[np.tile([1, 1.01], 3), 0.9, 0.8, 0.7, 0.6, 0.6, 0.6]
    short = block_fall(series(least))
    assert short is not None
    assert (short.best, short.end) == pytest.approx((1.005, 0.625))
    assert block_fall(series(least[:11])) is None, "too short for three blocks"
    assert block_fall(series(np.zeros(60))) is None


def test_the_noise_of_blocks_is_that_of_records_and_what_wanders() -> None:
    wander = 0.1 * np.sin(np.arange(96) / 6) + 0.03 * WAVE[:96]
    values = series(np.r_[ramp(0.2, 0.9, 48, 4, 20), ramp(0.9, 0.1, 48, 10, 20)] + wander)
    fall = block_fall(values)
    assert fall is not None
    assert values.wander > 0
    expected = 4 * np.sqrt(2 * (values.whole_noise**2 / 12 + values.wander))
    assert fall.noise == pytest.approx(expected)


def test_a_fall_is_told_two_records_after_it_shows() -> None:
    values = np.r_[ramp(0.2, 0.8, 40, 8, 16), ramp(0.8, 0.4, 40, 8, 16)] + CALM[:80]
    shown = [n for n in range(40, 60) if block_fall(series(values[:n])) is not None]
    told = [n for n in range(40, 60) if fell_before(series(values[:n]))]
    assert (shown[0], told[0]) == (53, 55)


def test_a_score_that_was_solved_once_may_be_two_sigma_lower_but_no_more_than_a_tenth() -> None:
    quiet = [levels((20, 0.8), (20, x)) for x in (0.7880, 0.7889)]
    assert [ends_solved(series(v)) for v in quiet] == [False, True]
    noisy = [np.r_[0.85 + 0.2 * WAVE[:40], np.full(20, x)] for x in (0.699, 0.701)]
    assert [ends_solved(series(v)) for v in noisy] == [False, True]
    never = [levels((20, 0.5), (20, x)) for x in (0.799, 0.8)]
    assert [ends_solved(series(v)) for v in never] == [False, True]


def test_a_fall_that_ends_in_silence_began_where_it_began() -> None:
    falls = np.r_[np.full(30, 0.6), ramp(0.6, 0.01, 30, 0, 21)].round(2)
    fallen, rest = state(falls), state(np.r_[levels((4, 0.6), (56, 0.01))])
    assert fallen.loss is not None
    assert 30 <= fallen.loss.onset <= 33
    assert fallen.best_step >= 30
    assert rest.loss is not None
    assert rest.loss.onset == 4, "at once is as before"


def test_a_fall_within_the_first_records_of_a_long_run_is_one_from_its_baseline() -> None:
    rest = -1 + 0.002 * np.abs(np.sin(np.arange(227)))
    fallen = state(np.r_[[-0.68, -0.72, -0.84, -0.91, -0.92, -0.94, -0.97, -0.97], rest])
    assert fallen.loss is not None
    assert fallen.loss.ongoing
    assert fallen.loss.onset <= 3
