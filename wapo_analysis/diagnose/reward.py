"""How a reward went, judged against its own beginning: gained, still gaining, standing, lost."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wapo_analysis.series import Departure, Series, departure, silent_since

SOLVED = 0.8
CALM_STEPS = 8
"""Steps up to the peak on which the noise of the reward can be measured."""
GAINING = 2.5
"""Standard deviations of the rise over the last third that make a reward still gain."""
RISING = 1.5
"""Standard deviations of the rise over the whole run that are more than chance."""
LEAST_GAIN = 0.1
"""Share of the whole gain that the last third must add for it to be still gaining."""
ENOUGH = 1 / 3
"""Way from the beginning to certain success that is much gained."""
FALLEN = 4.0
"""Standard deviations of the difference of two block means that make a fall after a climb."""
FALLEN_SHARE = 0.25
"""Share of the climb that a fall must undo."""


@dataclass(frozen=True)
class RewardState:
    """How the reward went; see :func:`reward_state` for the rules.

    Attributes
    ----------
    series : Series
        The reward.
    peak : float
        Highest smoothed reward, at least the level of the beginning.
    margin : float
        Change that counts as more than noise.
    loss : Departure or None
        Stretch in which half of the gain (or of the beginning) was lost.
    solved : bool
        The task is all but solved: a score within [0, 1] ends at ``SOLVED`` or more.
    """

    series: Series
    peak: float
    margin: float
    loss: Departure | None
    solved: bool

    @property
    def lost(self) -> bool:
        """At least half of the gain, or of the beginning, is lost and has not come back."""
        return self.loss is not None and self.loss.ongoing and self.loss.crossed is not None

    @property
    def improved(self) -> bool:
        """It ends above its beginning by more than noise, and did not lose what it had gained."""
        return not self.lost and self.series.end - self.series.level > self.margin

    @property
    def rising(self) -> bool:
        """It ends above its beginning, or went up over the run, by more than chance."""
        if self.lost:
            return False
        rise, noise = _straight_rise(self.series.values)
        ends = self.series.end - self.series.level
        return ends > self.margin / 3 or rise > RISING * noise

    @property
    def bounded(self) -> bool:
        """It lies in [0, 1] all along."""
        return bool(self.series.values.min() >= 0 and self.series.values.max() <= 1)

    @property
    def much_gained(self) -> bool:
        """It lies in [0, 1] and ends a third of the way from its beginning to 1, or further."""
        level = self.series.level
        return self.bounded and self.series.end >= level + ENOUGH * (1 - level)

    @cached_property
    def gaining(self) -> bool:
        """It still rises over its last third, by more than noise and than a tenth of its gain."""
        if self.lost:
            return False
        count = max(CALM_STEPS, len(self.series) // 3)
        rise, noise = _straight_rise(self.series.values[-count:])
        return rise > max(GAINING * noise, LEAST_GAIN * (self.peak - self.series.level))

    @cached_property
    def stands_from(self) -> int:
        """Index from which it stays near its end, by noise or by a tenth of its gain."""
        s = self.series
        near = max(3 * s.smooth_noise, LEAST_GAIN * (self.peak - s.level))
        away = np.flatnonzero(np.abs(s.smooth - s.end) > near)
        return int(away[-1]) + 1 if len(away) else 0

    @cached_property
    def best_step(self) -> int:
        """Step of the highest smoothed reward."""
        return self.series.step(int(np.argmax(self.series.smooth)))

    def gain_since(self, step: int) -> float:
        """Smoothed reward at the end minus the one at a step."""
        index = min(int(np.searchsorted(self.series.steps, step)), len(self.series) - 1)
        return self.series.end - float(self.series.smooth[index])

    def evidence(self) -> dict[str, float]:
        """Where it began, was best and ends."""
        ends = {"reward_start": self.series.level, "reward_peak": self.peak}
        return ends | {"reward_end": self.series.end}

    def words(self) -> str:
        """How it went, in a few words with numbers."""
        s = self.series
        if self.lost:
            return f"reward fell from {self.peak:.2f} to {s.end:.2f}"
        if abs(s.end - s.level) <= self.margin:
            return f"reward did not clearly change ({s.level:.2f} to {s.end:.2f})"
        return f"reward {'rose' if s.end > s.level else 'fell'} from {s.level:.2f} to {s.end:.2f}"


@dataclass(frozen=True, slots=True)
class Fall:
    """A fall after a climb, in means of blocks of records.

    Attributes
    ----------
    start, best, end : float
        Means of the first, the best and the last block.
    best_step, onset : int
        Step in the middle of the best block, and the one that follows the block.
    """

    start: float
    best: float
    end: float
    best_step: int
    onset: int


def reward_state(series: Series, solved: bool) -> RewardState:
    """Judge a reward series against its own beginning.

    With a gain beyond noise, losing half of it is a loss; without one, losing half of the beginning
    is. Either way the drop from the peak must be a fifth of the peak and six times the noise of a
    smoothed value, so that the best of many noisy steps does not make a loss. A reward that was
    there and then shows nothing but its lowest value is lost from that record on.
    """
    level, smooth, noise = series.level, series.smooth, _calm_noise(series)
    peak = np.maximum(np.maximum.accumulate(smooth), level)
    gain, drop = peak - level, peak - smooth
    margin = max(4 * noise, 0.02 * abs(level))
    stake = np.where(gain > margin, gain, abs(level))
    strict = (drop >= 0.5 * stake) & (drop >= np.maximum(6 * noise, 0.2 * abs(peak)))
    loose = strict | ((drop >= 0.25 * stake) & (drop >= np.maximum(6 * noise, 0.1 * abs(peak))))
    home = drop <= np.maximum(3 * noise, 0.125 * stake)
    loss = _death(series) or departure(loose, strict, home, series.persist)
    return RewardState(series, float(peak.max()), margin, loss, solved)


def _death(series: Series) -> Departure | None:
    """The reward was there for a few records, and then never again."""
    floor = series.values.min()
    dead = silent_since(series.values <= floor)
    if dead is None or dead < 2 or np.median(series.values[:dead]) <= floor:
        return None
    return Departure(dead, dead, dead, ongoing=True)


def fall_after_climb(series: Series) -> Fall | None:
    """A climb of which a quarter or more was lost by the end, in means of an eighth of the run.

    Means of blocks see what a median of a few steps cannot tell from noise. None without a climb,
    or where the fall may be noise.
    """
    size = max(CALM_STEPS // 2, len(series) // 8)
    if len(series) < 3 * size:
        return None
    means = np.convolve(series.values, np.full(size, 1 / size), "valid")
    best = int(np.argmax(means))
    noise = FALLEN * max(_block_noise(series, size), 1e-12)
    start, top, end = float(means[0]), float(means[best]), float(means[-1])
    climb, drop = top - start, top - end
    if climb < noise or drop < max(noise, FALLEN_SHARE * climb) or best + size >= len(series):
        return None
    return Fall(start, top, end, series.step(best + size // 2), series.step(best + size))


def _block_noise(series: Series, size: int) -> float:
    """Standard deviation of the difference of the means of two blocks."""
    return float(np.sqrt(2 * (series.noise**2 / size + series.wander)))


def _straight_rise(values: np.ndarray) -> tuple[float, float]:
    """Rise of the straight line through values, first to last, and its standard deviation."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(x @ values / (x @ x))
    rest = values - values.mean() - slope * x
    spread = float(np.sqrt(rest @ rest / max(len(values) - 2, 1) / (x @ x)))
    return slope * (len(values) - 1), spread * (len(values) - 1)


def _calm_noise(series: Series) -> float:
    """Noise of a smoothed value, before the peak alone if that is less: a fall is no noise."""
    until = int(np.argmax(series.smooth)) + 1
    if until < CALM_STEPS:
        return series.smooth_noise
    before = Series(series.steps[:until], series.values[:until])
    return min(series.smooth_noise, before.smooth_noise)
