"""How a reward went, part by part: falls in blocks, rises, what was won back, what is solved."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from tests.support.step_logs import ramp
from wapo_analysis.diagnose.reward import (
    RewardState,
    _differ,
    _won_back,
    block_fall,
    ends_solved,
    fell_before,
    reward_state,
    straight_rise,
)
from wapo_analysis.diagnose.samples import (
    _steps,
    answer_shares,
    evenly,
    noise_share,
    shared_answers,
)
from wapo_analysis.series import Departure, Series

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


# ---- where each judgement begins


CALM = 0.002 * np.random.default_rng(3).normal(0, 1, 200)


def parts(*lengths_and_levels: tuple[int, float]) -> np.ndarray:
    return np.concatenate([np.full(length, level) for length, level in lengths_and_levels])


def line(records: int, **points: float) -> np.ndarray:
    """Straight lines through points, named by their record: ``at0=0.2, at20=0.7``."""
    places = [int(name.removeprefix("at")) for name in points]
    return np.interp(np.arange(records), places, list(points.values()))


def hump(end: float, start: float = 0.3) -> np.ndarray:
    return np.r_[ramp(start, 0.7, 50, 10, 20), ramp(0.7, end, 50, 10, 10)]


def told(judged: RewardState) -> bool:
    return judged.loss is not None


def falls(judged: RewardState) -> bool:
    return judged.falling is not None


# A judgement, a course with one number in it, and two values of it between which it changes.
BOUNDS: dict[
    str, tuple[Callable[[RewardState], object], Callable[[float], np.ndarray], float, float]
] = {
    "its best is of a block where noise is a tenth of its range": (
        lambda s: s.best == s.peak, lambda x: hump(0.5) + x * WAVE[:100], 0.103, 0.101),
    "it improved beyond four sigma": (
        lambda s: s.improved, lambda x: ramp(0.5, x, 60, 20, 10), 0.5137, 0.5143),
    "and beyond its own noise": (
        lambda s: s.improved, lambda x: ramp(0.5, x, 60, 20, 10) + 0.05 * WAVE[:60], 0.625, 0.629),
    "a third of that is a rise": (
        lambda s: s.rising, lambda x: line(60, at0=0.5, at8=0.5, at20=0.53, at40=0.49, at48=x),
        0.5035, 0.5065),
    "so is a line that rises by 1.5 sigma": (
        lambda s: s.rising,
        lambda x: np.r_[np.full(5, 0.5), ramp(0.5 - x, 0.49, 55, 0, 54)] + 0.03 * WAVE[:60],
        0.038, 0.039),
    "margins of 0.3 hide a gain": (
        lambda s: s.hidden, lambda x: 0.5 + x * np.random.default_rng(6).uniform(-1, 1, 60),
        0.147, 0.149),
    "still gaining by a tenth of the gain": (
        lambda s: s.gaining, lambda x: line(60, at0=0.2, at5=0.2, at25=0.6, at40=0.6, at59=x),
        0.643, 0.648),
    "still gaining by 2.5 sigma": (
        lambda s: s.gaining,
        lambda x: line(60, at0=0.2, at5=0.2, at25=0.6, at40=0.6, at59=x) + 0.05 * WAVE[:60],
        0.646, 0.653),
    "no longer, once it stood for a quarter of the run": (
        lambda s: s.gaining, lambda x: line(60, at0=0.2, **{f"at{60 - int(x)}": 0.6}), 15, 14),
    "or for seven of eight records": (
        lambda s: s.gaining, lambda x: line(18, at0=0.2, **{f"at{18 - int(x)}": 0.6}), 7, 6),
    "three and a half sigma from its last third it does not stand yet": (
        lambda s: s.stands_from > 0, lambda x: parts((30, 0.5), (30, 0.5 + x)), 0.0111, 0.0113),
    "one last record does not move its last third": (
        lambda s: s.stands_from, lambda x: parts((10, 0.2), (49, 0.8), (1, 0.8 + x)), 0.1, 0.4),
    "nor a tenth of its gain below": (
        lambda s: s.stands_from, lambda x: parts((10, 0.2), (30, 0.8 - x), (20, 0.8)),
        0.058, 0.0587),
    "a little less is as good as the best": (
        lambda s: s.best_step, lambda x: parts((10, 0.3), (30, 0.8), (20, 0.8 - x)),
        0.0031, 0.0032),
    "less still in a long quiet run": (
        lambda s: s.best_step, lambda x: parts((10, 0.3), (100, 0.8), (90, 0.8 - x)),
        0.00095, 0.00097),
    "and more in noise": (
        lambda s: s.best_step,
        lambda x: parts((10, 0.3), (30, 0.8), (20, 0.8 - x)) + 0.02 * WAVE[:60], 0.042, 0.0423),
    "half of the baseline is a loss, also if it comes back": (
        told, lambda x: parts((30, 0.6), (10, x), (20, 0.6)), 0.304, 0.303),
    "half of the gain": (
        told, lambda x: parts((10, 0.3), (20, 0.7), (10, x), (20, 0.7)), 0.503, 0.501),
    "of a gain beyond the margin": (
        told, lambda x: parts((10, 0.5), (20, x), (10, 0.3), (20, x)), 0.5145, 0.5155),
    "a fifth of the peak at least": (
        told, lambda x: parts((10, 1), (20, 1.2), (10, x), (20, 1.2)), 0.964, 0.962),
    "six sigma at least": (
        told, lambda x: parts((10, 0.3), (20, 0.7), (10, x), (20, 0.7)) + 0.1 * WAVE[:60],
        0.219, 0.217),
    "a quarter of the baseline is a drop": (
        told, lambda x: parts((30, 0.6), (10, x)), 0.454, 0.4525),
    "a quarter of the gain": (
        told, lambda x: parts((10, 0.2), (20, 0.8), (10, x)), 0.653, 0.652),
    "a tenth of the peak at least": (
        told, lambda x: parts((10, 1), (20, 1.2), (10, x)), 1.0835, 1.0823),
    "eight sigma at least": (
        told,
        lambda x: parts((10, 0.2), (20, 0.8), (10, x))
        + np.r_[0.01 * WAVE[:30], 0.03 * WAVE[:10]],
        0.562, 0.56),
    "eight sigma of what is noisy late": (
        told, lambda x: parts((90, 0.6), (10, x)) + np.r_[np.zeros(60), 0.03 * WAVE[:40]],
        0.585, 0.584),
    "a quarter deeper than one that came back": (
        told, lambda x: parts((10, 0.2), (10, 0.8), (10, 0.6), (20, 0.8), (10, x)), 0.5495, 0.5475),
    "two records show a loss of half": (falls, lambda x: parts((30, 0.6), (2, x)), 0.3035, 0.302),
    "of half of the gain": (falls, lambda x: parts((15, 0.2), (15, 0.8), (2, x)), 0.502, 0.5),
    "of a fifth of the peak": (falls, lambda x: parts((15, 1), (15, 1.2), (2, x)), 0.963, 0.961),
    "of three sigma": (falls, lambda x: np.r_[0.6 + 0.15 * WAVE[:40], x, x], 0.381, 0.378),
    "each by half of that": (falls, lambda x: parts((30, 0.6), (1, x), (1, -0.3)), 0.4535, 0.4525),
    "after four records": (falls, lambda x: parts((int(x), 0.6), (2, 0.1)), 3, 4),
    "five records in a run of two hundred": (
        falls, lambda x: parts((200 - int(x), 0.6), (int(x), 0.1)), 4, 5),
    "eight sigma leave no doubt": (
        lambda s: s.lost, lambda x: np.r_[0.6 + 0.1 * WAVE[:40], x, x], 0.0695, 0.068),
    "but in a longer run two records do": (
        lambda s: s.lost, lambda x: parts((int(x) - 2, 0.6), (2, 0.1)), 80, 79),
    "what lost a fifth and never comes back is dead": (
        lambda s: told(s) and s.loss.onset == 30, lambda x: parts((30, 0.5), (30, x)),
        0.376, 0.3745),
    "blocks fall by four sigma": (
        lambda s: s.fall is not None, lambda x: hump(x) + 0.1 * WAVE[:100], 0.615, 0.613),
    "blocks climb by four sigma": (
        lambda s: s.fall.climbed, lambda x: hump(0.1, start=x) + 0.1 * WAVE[:100], 0.58, 0.578),
    "blocks lose a fifth of the best": (
        lambda s: s.fall.lost,
        lambda x: np.r_[ramp(1, 1.3, 40, 10, 10), ramp(1.3, x, 40, 10, 10)], 1.0415, 1.0405),
    "blocks lose half of the climb": (
        lambda s: s.fall.lost,
        lambda x: np.r_[ramp(0.25, 0.75, 40, 10, 10), ramp(0.75, x, 40, 10, 10)], 0.5012, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDS)
def test_a_judgement_begins_at_its_bound(case: str) -> None:
    what, course, inside, beyond = BOUNDS[case]
    said = [what(state(values + CALM[: len(values)])) for values in map(course, (inside, beyond))]
    assert said[0] != said[1]


QUARTER = np.r_[np.tile([0.75, 0.75, 0.8], 5), 0.75, 0.75]  # not always its lowest: that were dead
TENTH = np.r_[np.tile([9, 9, 9.5], 10), 9, 9]
LAST = np.tile([0.25, 0.25, 0.3], 6)
# A course of exact numbers, and its loss: onset, warned, crossed, ongoing.
LOSSES: dict[str, tuple[np.ndarray, tuple[int, int, int | None, bool] | None]] = {
    "half of the baseline": (parts((30, 0.5), (10, 0.25), (20, 0.5)), (30, 30, 30, False)),
    "a fifth of the peak": (
        parts((10, 1), (30, 1.25), (10, 1), (30, 1.25)), (40, 40, 40, False)),
    "a gain of just the margin is none": (
        parts((60, 50), (80, 51), (20, 36), (40, 51)), None),
    "and a larger one is a gain": (
        parts((60, 50), (80, 51.5), (20, 36), (40, 51.5)), (140, 140, 140, False)),
    "the second of two equal dips is no deeper": (
        parts((30, 0.5), (10, 0.125), (20, 0.5), (9, 0.125), (10, 0.5)), (30, 30, 30, False)),
    "a quarter of the baseline": (np.r_[np.ones(45), QUARTER], (45, 45, None, True)),
    "a little less than a quarter": (np.r_[np.ones(45), QUARTER + 0.01], None),
    "a tenth of the peak": (
        np.r_[np.full(70, 8), np.full(98, 10), TENTH], (168, 170, None, True)),
    "a little less than a tenth": (
        np.r_[np.full(70, 8), np.full(98, 10), TENTH + 0.02], None),
    "an eighth lower is still at home": (
        np.r_[parts((30, 1), (10, 0.875)), LAST], (40, 40, 40, True)),
    "and more is not": (np.r_[parts((30, 1), (10, 0.87)), LAST], (30, 40, 40, True)),
    "within three sigma it is at home": (
        np.r_[ramp(1, 1.1, 50, 10, 30), ramp(1.1, 0.7, 50, 0, 49)] + CALM[:100],
        (53, 64, 77, True)),
    "the last two records": (parts((30, 0.5), (2, 0.25)), (30, 30, 30, True)),
    "the last two, one of them by a quarter": (
        parts((30, 0.5), (1, 0.375), (1, 0.125)), (30, 30, 30, True)),
    "dead is what loses more than a fifth": (parts((30, 10), (30, 8)), None),
    "as here": (parts((30, 10), (30, 7.9)), (30, 30, 30, True)),
    "dead after two records": (parts((2, 0.5), (30, 0.39)), (2, 2, 2, True)),
    "one record is no life": (parts((1, 0.5), (30, 0.39)), None),
    "the last two, after a loss that came back": (
        parts((30, 0.5), (10, 0.125), (28, 0.5), (2, 0.1)), (68, 68, 68, True)),
    "half of it in blocks": (
        np.r_[ramp(0.2, 0.8, 40, 8, 16), ramp(0.8, 0.3, 30, 4, 16), np.full(10, 0.4)],
        (47, 49, 54, True)),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_begins_and_ends_at_a_record(case: str) -> None:
    values, expected = LOSSES[case]
    loss = state(values).loss
    assert loss == (None if expected is None else Departure(*expected))


def test_a_gain_is_more_than_the_margin_and_more_than_none() -> None:
    at = state(parts((100, 50), (100, 51)))
    assert at.margin == 1.0, "a fiftieth of the baseline, in a long quiet run"
    assert not at.improved
    assert at.words() == "reward did not clearly change (50.00 to 51.00)"
    wave = state(parts((10, 150), (70, 152), (100, 149), (20, 151)))
    assert (wave.margin, wave.rising) == (3.0, False), "a third of the margin"
    assert state(parts((10, 150), (70, 152), (100, 149), (20, 151.01))).rising
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
    stands = state(parts((20, 0), (20, 9), (20, 10)))
    assert stands.stands_from == 20, "a tenth of the gain from its end"
    assert state(parts((59, 0.5), (1, 1.5))).stands_from == 59, "the last record is away"
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
    fall = block_fall(series(parts((48, 0.25), (48, 0.75), (32, 0.5))))
    assert fall is not None
    assert (fall.start, fall.best, fall.end) == (0.25, 0.75, 0.5)
    assert (fall.middle, fall.onset, fall.half) == (56, 64, 103)
    assert fall.lost, "half of the climb"
    half = block_fall(series(parts((48, 0.25), (40, 0.75), (40, 0.25))))
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
    quiet = [parts((20, 0.8), (20, x)) for x in (0.7880, 0.7889)]
    assert [ends_solved(series(v)) for v in quiet] == [False, True]
    noisy = [np.r_[0.85 + 0.2 * WAVE[:40], np.full(20, x)] for x in (0.699, 0.701)]
    assert [ends_solved(series(v)) for v in noisy] == [False, True]
    never = [parts((20, 0.5), (20, x)) for x in (0.799, 0.8)]
    assert [ends_solved(series(v)) for v in never] == [False, True]


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
