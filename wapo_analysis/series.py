"""A step series and the few robust statistics that every detector shares.

Everything is judged against the run's own baseline: the level is the median of the first steps,
the noise is the median absolute deviation of step-to-step differences (so a trend does not count as
noise), and a condition must hold for several smoothed steps in a row before it counts. Arrays in,
arrays out; cost is linear in the number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.table import Array

BASELINE_STEPS = 5
RANGE_SIGMAS = 5.0
HOME_RANGE = 0.1
MAX_WINDOW = 25
MAD_TO_SIGMA = 1.4826
#: Distance of the first and the last quintile of a normal distribution, in standard deviations.
QUINTILES = 1.683
MEDIAN_EFFICIENCY = 1.2533
RELATIVE_FLOOR = 0.01
#: Share of quiet records at which a stretch neither gains nor loses as a silence.
QUIET_SHARE = 0.82
#: Share of quiet records of a silence.
SILENT_SHARE = 0.88
#: Records of a silence, at least.
MIN_SILENT = 8
#: Chance of so few records that show something, of all there are, that is no accident; and where
#: all before show something, and none of the later.
CHANCE, CLEAN_CHANCE = 1e-4, 2.5e-3


#: Values are held within this, both ways.
LARGEST = 1e100


@dataclass(frozen=True)
class Series:
    """The finite values of one step column, smoothed, with the level and noise of its baseline.

    ``steps`` (n,): step numbers, ascending; ``values`` (n,): finite values, in the unit of the
    column.
    """

    steps: Array
    values: Array

    def __post_init__(self) -> None:
        # A square of what is larger is no number any more.
        object.__setattr__(self, "values", np.clip(self.values, -LARGEST, LARGEST))

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def window(self) -> int:
        """Odd width of the rolling median: a twentieth of the run, from 3 to ``MAX_WINDOW``."""
        return int(np.clip(len(self) // 20, 3, MAX_WINDOW)) | 1

    @cached_property
    def persist(self) -> int:
        """Smoothed steps in a row that make a condition count."""
        return max(3, self.window // 2)

    @cached_property
    def smooth(self) -> Array:
        """Centred rolling median, shape (n,); the window is cut at both ends."""
        rolling = pd.Series(self.values).rolling(self.window, center=True, min_periods=1)
        return rolling.median().to_numpy()

    @cached_property
    def level(self) -> float:
        """Where the run began: median of the first few values."""
        return float(np.median(self.values[: self.few])) if len(self) else float("nan")

    @cached_property
    def few(self) -> int:
        """How many values the level rests on: those before the series left its first value.

        Five (three in a short run), or fewer if these spread more than noise explains: then the
        run departed at once, and later values would hide where it began.
        """
        most = BASELINE_STEPS if len(self) >= 20 else BASELINE_STEPS // 2 + 1
        noise = _spread(self._early, 1)
        for few in range(most, 1, -1):
            part = self.values[:few]
            if np.ptp(part) <= max(RANGE_SIGMAS * noise, HOME_RANGE * abs(np.median(part))):
                return few
        return 1

    @cached_property
    def end(self) -> float:
        """Where the run is now: median of the last tenth of the values, at least three."""
        return float(np.median(self.values[-max(3, len(self) // 10) :])) if len(self) else np.nan

    @cached_property
    def _early(self) -> Array:
        """The first third of the values, at least twenty: what noise is measured on."""
        return self.values[: max(20, len(self) // 3)]

    @cached_property
    def noise(self) -> float:
        """Standard deviation between neighbouring values early in the run; never zero."""
        return max(_spread(self._early, 1), RELATIVE_FLOOR * abs(self.level), 1e-12)

    @cached_property
    def whole_noise(self) -> float:
        """Like :attr:`noise`, but of the whole series where that is noisier."""
        return max(self.noise, _spread(self.values, 1))

    @cached_property
    def smooth_noise(self) -> float:
        """Standard deviation of a smoothed value.

        Independent noise shrinks with the window. Slow wandering does not, and shows as a larger
        spread between values two windows apart than between neighbours. The early part and the
        whole run are both asked, and the smaller answer holds: a departure of the run from its
        baseline inflates one of them and is no noise.
        """
        return float(np.sqrt(MEDIAN_EFFICIENCY**2 * self.noise**2 / self.window + self.wander))

    @cached_property
    def late_noise(self) -> float:
        """Like :attr:`smooth_noise`, but of the whole series where that is noisier."""
        whole = MEDIAN_EFFICIENCY * self.whole_noise / float(np.sqrt(self.window))
        return max(self.smooth_noise, whole)

    @cached_property
    def wander(self) -> float:
        """Variance that comes slowly, so that no averaging takes it away."""
        return min(_slow_variance(part, self.window) for part in (self._early, self.values))

    @cached_property
    def gap_noise(self) -> float:
        """Standard deviation of a smoothed value minus the level, which rests on few values."""
        level_noise = MEDIAN_EFFICIENCY * self.noise / float(np.sqrt(self.few))
        return float(np.hypot(self.smooth_noise, level_noise))

    def step(self, index: int) -> int:
        """Step number at an index."""
        return int(self.steps[index])

    def head(self, count: int) -> "Series":
        """The first records alone, as they were when there were no others."""
        return Series(self.steps[:count], self.values[:count])


def _spread(values: Array, lag: int) -> float:
    """Standard deviation of one value, from differences ``lag`` apart: a steady trend adds none."""
    apart = values[lag:] - values[:-lag] if lag else values[:0]
    if not len(apart):
        return 0.0
    # Many neighbours are equal where a reward is mostly 0 or 1: the quintiles see what moves then.
    low, high = np.quantile(apart, (0.2, 0.8))
    return max(robust_sigma(apart), float(high - low) / QUINTILES) / float(np.sqrt(2))


def _slow_variance(values: Array, window: int) -> float:
    """Variance of values two windows apart that neighbours do not show.

    From second differences, so that a straight course, up or down, adds none.
    """
    lag = min(2 * window + 1, len(values) // 6)
    if lag < 1:
        return 0.0
    bends = values[2 * lag :] - 2 * values[lag:-lag] + values[: -2 * lag]
    return max(robust_sigma(bends) ** 2 / 6 - _spread(values, 1) ** 2, 0.0)


def robust_sigma(values: Array) -> float:
    """Standard deviation estimated from the median absolute deviation.

    Falls back to the plain standard deviation where more than half of the values are equal, as in
    a reward that is almost always zero.
    """
    deviation = float(np.median(np.abs(values - np.median(values))))
    return MAD_TO_SIGMA * deviation if deviation > 0 else float(np.std(values))


def episodes(mask: Array, persist: int) -> list[tuple[int, int]]:
    """Half-open index ranges in which a condition holds at least ``persist`` times in a row.

    ``mask`` (n,): the condition per step; ``persist``: shortest run of True that counts.

    Examples
    --------
    >>> episodes(np.array([1, 0, 1, 1, 1, 0, 1, 1], bool), 2)
    [(2, 5), (6, 8)]
    """
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False]))
    starts, stops = edges[::2], edges[1::2]
    long = stops - starts >= persist
    return [(int(a), int(b)) for a, b in zip(starts[long], stops[long], strict=True)]


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the steps, evenly spread, the first and the last among them.

    Examples
    --------
    >>> evenly(range(1, 10), 3)
    [1, 5, 9]
    """
    if len(steps) <= most:
        return [int(step) for step in steps]
    return [int(steps[place]) for place in np.linspace(0, len(steps) - 1, most).round().astype(int)]


def silent_since(quiet: Array) -> int | None:
    """Index from which a series is quiet to its end, one record in eight excepted.

    A record may be quiet by chance, as where the one prompt of a step is solved by every rollout or
    by none. So the records that show something must stand before the stretch more often than chance
    puts them there (Fisher's exact test). It begins where the sum of (quiet - 0.82) up to the end
    is largest. Returns None if the series is alive, or was always as quiet as it is now. ``quiet``
    (n,): whether a record shows nothing: no gradient, no reward.

    Examples
    --------
    >>> silent_since(np.arange(40) >= 4)
    4
    >>> silent_since(np.arange(400) % 3 > 0)
    """
    if not len(quiet):
        return None
    excess = np.cumsum(quiet[::-1] - QUIET_SHARE)[::-1]
    begin = int(np.argmax(excess))
    length = len(quiet) - begin
    if length < MIN_SILENT or float(quiet[begin:].mean()) < SILENT_SHARE:
        return None
    clean = quiet[begin:].all() and not quiet[:begin].any()
    accident = _chance_of_so_many(~quiet, begin) > (CLEAN_CHANCE if clean else CHANCE)
    return None if begin and accident else begin


def _chance_of_so_many(alive: Array, begin: int) -> float:
    """Chance that the first ``begin`` records hold as many of those alive, were these anywhere."""
    n, count, seen = len(alive), int(alive.sum()), int(alive[:begin].sum())
    factorial = np.r_[0.0, np.cumsum(np.log(np.arange(1, n + 1)))]

    def ways(among: Any, chosen: Any) -> Any:
        return factorial[among] - factorial[chosen] - factorial[among - chosen]

    held = np.arange(seen, min(count, begin) + 1)
    held = held[begin - held <= n - count]
    return float(np.exp(ways(count, held) + ways(n - count, begin - held) - ways(n, begin)).sum())


def theil_sen(values: Array, steps: Array, sigmas: float) -> tuple[float, float, float]:
    """Median of the pairwise slopes, and an interval around it.

    The interval is Sen's (1968): the slopes whose ranks lie within ``sigmas`` standard deviations
    of Kendall's S, for a series without ties. Cost is quadratic in the number of values. Returns
    slope per step, lower end, upper end. ``values``, ``steps`` (n,): the series; steps ascend;
    ``sigmas``: half width of the interval; 2.576 is 99%.
    """
    first, second = np.triu_indices(len(values), 1)
    slopes = np.sort((values[second] - values[first]) / (steps[second] - steps[first]))
    n, count = len(values), len(slopes)
    half = sigmas * np.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = max(int(np.round((count - half) / 2)) - 1, 0)
    high = min(int(np.round((count + half) / 2)), count - 1)
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


@dataclass(frozen=True, slots=True)
class Departure:
    """A stretch in which a series left its baseline; indices into the series."""

    #: First index after the series was last at home.
    onset: int
    #: First index beyond the loose threshold.
    warned: int
    #: First index beyond the strict threshold, if it got there.
    crossed: int | None
    #: It still lasts at the end of the series.
    ongoing: bool


def departure(loose: Array, strict: Array, home: Array, persist: int) -> Departure | None:
    """Find the departure that matters: the one that lasts to the end, else the last severe one.

    Two thresholds keep the answer stable: a departure begins at the loose one, is severe once the
    strict one is passed for ``persist`` steps, and lasts until it falls back inside the loose one.
    Returns None if nothing lasted to the end and nothing was severe.

    Parameters
    ----------
    loose, strict : ndarray of bool, shape (n,)
        Beyond the loose and the strict threshold; strict implies loose.
    home : ndarray of bool, shape (n,)
        Close enough to where the series came from to count as not departed.
    persist : int
        Steps in a row that make a condition count.
    """
    severe = episodes(strict, persist)
    for start, stop in reversed(episodes(loose, persist)):
        crossed = next((a for a, b in severe if start <= a < stop), None)
        ongoing = stop == len(loose)
        if ongoing or crossed is not None:
            before = np.flatnonzero(home[:start])
            onset = int(before[-1]) + 1 if len(before) else 0
            return Departure(onset, start, crossed, ongoing)
    return None
