"""Where each judgement of a reward begins, and at which record a loss begins and ends."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.support.courses import CALM, levels, state
from tests.support.step_logs import ramp
from wapo_analysis.diagnose.reward import RewardState
from wapo_analysis.series import Departure

WAVE = np.random.default_rng(5).normal(0, 1, 200)


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
        lambda s: s.stands_from > 0, lambda x: levels((30, 0.5), (30, 0.5 + x)), 0.0111, 0.0113),
    "one last record does not move its last third": (
        lambda s: s.stands_from, lambda x: levels((10, 0.2), (49, 0.8), (1, 0.8 + x)), 0.1, 0.4),
    "nor a tenth of its gain below": (
        lambda s: s.stands_from, lambda x: levels((10, 0.2), (30, 0.8 - x), (20, 0.8)),
        0.058, 0.0587),
    "a little less is as good as the best": (
        lambda s: s.best_step, lambda x: levels((10, 0.3), (30, 0.8), (20, 0.8 - x)),
        0.0031, 0.0032),
    "less still in a long quiet run": (
        lambda s: s.best_step, lambda x: levels((10, 0.3), (100, 0.8), (90, 0.8 - x)),
        0.00095, 0.00097),
    "and more in noise": (
        lambda s: s.best_step,
        lambda x: levels((10, 0.3), (30, 0.8), (20, 0.8 - x)) + 0.02 * WAVE[:60], 0.042, 0.0423),
    "half of the baseline is a loss, also if it comes back": (
        told, lambda x: levels((30, 0.6), (10, x), (20, 0.6)), 0.304, 0.303),
    "half of the gain": (
        told, lambda x: levels((10, 0.3), (20, 0.7), (10, x), (20, 0.7)), 0.503, 0.501),
    "of a gain beyond the margin": (
        told, lambda x: levels((10, 0.5), (20, x), (10, 0.3), (20, x)), 0.5145, 0.5155),
    "a fifth of the peak at least": (
        told, lambda x: levels((10, 1), (20, 1.2), (10, x), (20, 1.2)), 0.964, 0.962),
    "six sigma at least": (
        told, lambda x: levels((10, 0.3), (20, 0.7), (10, x), (20, 0.7)) + 0.1 * WAVE[:60],
        0.219, 0.217),
    "a quarter of the baseline is a drop": (
        told, lambda x: levels((30, 0.6), (10, x)), 0.454, 0.4525),
    "a quarter of the gain": (
        told, lambda x: levels((10, 0.2), (20, 0.8), (10, x)), 0.653, 0.652),
    "a tenth of the peak at least": (
        told, lambda x: levels((10, 1), (20, 1.2), (10, x)), 1.0835, 1.0823),
    "eight sigma at least": (
        told,
        lambda x: levels((10, 0.2), (20, 0.8), (10, x))
        + np.r_[0.01 * WAVE[:30], 0.03 * WAVE[:10]],
        0.562, 0.56),
    "eight sigma of what is noisy late": (
        told, lambda x: levels((90, 0.6), (10, x)) + np.r_[np.zeros(60), 0.03 * WAVE[:40]],
        0.585, 0.584),
    "a quarter deeper than one that came back": (
        told, lambda x: levels((10, 0.2), (10, 0.8), (10, 0.6), (20, 0.8), (10, x)),
        0.5495, 0.5475),
    "two records show a loss of half": (falls, lambda x: levels((30, 0.6), (2, x)), 0.3035, 0.302),
    "of half of the gain": (falls, lambda x: levels((15, 0.2), (15, 0.8), (2, x)), 0.502, 0.5),
    "of a fifth of the peak": (falls, lambda x: levels((15, 1), (15, 1.2), (2, x)), 0.963, 0.961),
    "of three sigma": (falls, lambda x: np.r_[0.6 + 0.15 * WAVE[:40], x, x], 0.381, 0.378),
    "each by half of that": (falls, lambda x: levels((30, 0.6), (1, x), (1, -0.3)), 0.4535, 0.4525),
    "after four records": (falls, lambda x: levels((int(x), 0.6), (2, 0.1)), 3, 4),
    "five records in a run of two hundred": (
        falls, lambda x: levels((200 - int(x), 0.6), (int(x), 0.1)), 4, 5),
    "eight sigma leave no doubt": (
        lambda s: s.lost, lambda x: np.r_[0.6 + 0.1 * WAVE[:40], x, x], 0.0695, 0.068),
    "but in a longer run two records do": (
        lambda s: s.lost, lambda x: levels((int(x) - 2, 0.6), (2, 0.1)), 80, 79),
    "what lost a fifth and never comes back is dead": (
        lambda s: told(s) and s.loss.onset == 30, lambda x: levels((30, 0.5), (30, x)),
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
    "half of the baseline": (levels((30, 0.5), (10, 0.25), (20, 0.5)), (30, 30, 30, False)),
    "a fifth of the peak": (
        levels((10, 1), (30, 1.25), (10, 1), (30, 1.25)), (40, 40, 40, False)),
    "a gain of just the margin is none": (
        levels((60, 50), (80, 51), (20, 36), (40, 51)), None),
    "and a larger one is a gain": (
        levels((60, 50), (80, 51.5), (20, 36), (40, 51.5)), (140, 140, 140, False)),
    "the second of two equal dips is no deeper": (
        levels((30, 0.5), (10, 0.125), (20, 0.5), (9, 0.125), (10, 0.5)), (30, 30, 30, False)),
    "a quarter of the baseline": (np.r_[np.ones(45), QUARTER], (45, 45, None, True)),
    "a little less than a quarter": (np.r_[np.ones(45), QUARTER + 0.01], None),
    "a tenth of the peak": (
        np.r_[np.full(70, 8), np.full(98, 10), TENTH], (168, 170, None, True)),
    "a little less than a tenth": (
        np.r_[np.full(70, 8), np.full(98, 10), TENTH + 0.02], None),
    "an eighth lower is still at home": (
        np.r_[levels((30, 1), (10, 0.875)), LAST], (40, 40, 40, True)),
    "and more is not": (np.r_[levels((30, 1), (10, 0.87)), LAST], (30, 40, 40, True)),
    "within three sigma it is at home": (
        np.r_[ramp(1, 1.1, 50, 10, 30), ramp(1.1, 0.7, 50, 0, 49)] + CALM[:100],
        (53, 64, 77, True)),
    "the last two records": (levels((30, 0.5), (2, 0.25)), (30, 30, 30, True)),
    "the last two, one of them by a quarter": (
        levels((30, 0.5), (1, 0.375), (1, 0.125)), (30, 30, 30, True)),
    "dead is what loses more than a fifth": (levels((30, 10), (30, 8)), None),
    "as here": (levels((30, 10), (30, 7.9)), (30, 30, 30, True)),
    "dead after two records": (levels((2, 0.5), (30, 0.39)), (2, 2, 2, True)),
    "one record is no life": (levels((1, 0.5), (30, 0.39)), None),
    "the last two, after a loss that came back": (
        levels((30, 0.5), (10, 0.125), (28, 0.5), (2, 0.1)), (68, 68, 68, True)),
    "half of it in blocks": (
        np.r_[ramp(0.2, 0.8, 40, 8, 16), ramp(0.8, 0.3, 30, 4, 16), np.full(10, 0.4)],
        (47, 49, 54, True)),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_begins_and_ends_at_a_record(case: str) -> None:
    values, expected = LOSSES[case]
    loss = state(values).loss
    assert loss == (None if expected is None else Departure(*expected))


@pytest.mark.parametrize(("chance", "completions"), [(0.01, 8), (0.01, 64), (0.03, 32), (0.3, 8)])
def test_a_reward_that_is_rarely_earned_and_stays_as_it_is_is_not_lost(
    chance: float, completions: int
) -> None:
    rng = np.random.default_rng(7)
    for records in (40, 120, 300):
        for earned in rng.binomial(completions, chance, (12, records)):
            assert not state(earned / completions).lost


def test_a_rarely_earned_reward_that_is_earned_no_more_is_lost() -> None:
    earned = np.random.default_rng(3).binomial(8, 0.2, 60)
    judged = state(np.r_[earned, np.zeros(30)] / 8)
    assert judged.lost
    assert judged.loss is not None
    assert 55 <= judged.loss.onset <= 60
