"""How a reward went, judged against its own baseline: gained, still gaining, standing, lost."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wapo_analysis.series import Departure, Series, departure, silent_since

#: Score in [0, 1] at which a task is all but solved.
SOLVED = 0.8
#: Standard deviations below it that a score which was there stays solved, and at most so far.
SOLVED_SIGMAS, SOLVED_SLACK = 2.0, 0.1
#: Records, as of a whole run or up to the peak, by which noise and a gain can be told.
CALM_STEPS = 8
#: Standard deviations of the rise over the last third that make a reward still gain.
GAINING = 2.5
#: Standard deviations of the rise over the whole run that are more than chance.
RISING = 1.5
#: Standard deviations of a smoothed value within which a reward stands.
STANDS_SIGMAS = 3.5
#: Share of the whole gain that the last third must add for it to be still gaining.
LEAST_GAIN = 0.1
#: Noise of a record, as a share of the peak, from which on the noise of the whole run counts, not
#: that up to the peak: medians of rewards of 0, 1 or 2 completions jump further than normal ones.
COARSE = 0.3
#: Noise of a smoothed value, as a share of its range, from which on its extremes are not told.
NOISY = 0.1
#: Change of a score in [0, 1] that must be no noise for a gain to be seen.
UNSEEN = 0.3
#: Way from the baseline to certain success that is much gained.
ENOUGH = 1 / 3
#: Standard deviations of the difference of two block means that make a fall after a climb.
FALLEN = 4.0
#: Share of the gain, or of the baseline, whose loss is a collapse.
LOST = 0.5
#: Share of the peak that such a loss must be, at least.
LEAST_LOSS = 0.2
#: Records that show a fast loss.
FEW = 2
SIGMAS = 6.0
#: Standard deviations of their mean that leave no doubt: two batches of hard prompts look alike.
FAST_SIGMAS = 8.0
#: The same where something else says that the updates are too large.
FALLING_SIGMAS = 3.0
#: Standard deviations of a drop that is no loss yet.
DROP_SIGMAS = 8.0

#: A drop that is no loss yet is this much deeper than any that was won back.
SWING = 1.25


@dataclass(frozen=True)
class RewardState:
    """How the reward went; see :func:`reward_state` for the rules."""

    #: The reward.
    series: Series
    #: Highest smoothed reward, at least the level of the baseline.
    peak: float
    #: Change that counts as more than noise.
    margin: float
    #: Stretch in which half of the gain (or of the baseline) was lost.
    loss: Departure | None
    #: The task is all but solved: a score within [0, 1] ends at ``SOLVED`` or more.
    solved: bool
    #: The same by the last records alone, which on their own might be noise.
    falling: Departure | None = None

    @cached_property
    def fall(self) -> "Fall | None":
        """A fall in means of blocks, None without one."""
        return block_fall(self.series)

    @property
    def _noisy(self) -> bool:
        return self.series.smooth_noise > NOISY * (self.peak - float(self.series.smooth.min()))

    @property
    def best(self) -> float:
        """The best reward to tell of: that of a block where smoothed values are mostly noise."""
        return self.fall.best if self.fall is not None and self._noisy else self.peak

    def low(self, onset: int) -> float:
        """The same for the lowest since an index."""
        if self.fall is not None and self._noisy:
            return self.fall.end
        return float(self.series.smooth[onset:].min())

    @property
    def lost(self) -> bool:
        """At least half of the gain, or of the baseline, is lost and has not come back."""
        return _lost_by(self.loss)

    @property
    def _no_gain(self) -> bool:
        """What it had gained is lost, or it is too short to tell a gain."""
        return self.lost or len(self.series) < CALM_STEPS

    @property
    def improved(self) -> bool:
        """It ends above its baseline by more than noise, and did not lose what it had gained."""
        return not self._no_gain and self.series.end - self.series.level > self.margin

    @property
    def rising(self) -> bool:
        """It ends above its baseline, or went up over the run, by more than chance."""
        if self._no_gain:
            return False
        rise, noise = straight_rise(self.series.values)
        ends = self.series.end - self.series.level
        return ends > self.margin / 3 or rise > RISING * noise

    @property
    def bounded(self) -> bool:
        """It lies in [0, 1] all along."""
        return bool(self.series.values.min() >= 0 and self.series.values.max() <= 1)

    @property
    def hidden(self) -> bool:
        """It lies in [0, 1], so noisy, as of one prompt a step, that a gain would not show."""
        return self.bounded and self.margin >= UNSEEN

    @property
    def much_gained(self) -> bool:
        """It lies in [0, 1] and ends a third of the way from its baseline to 1, or further."""
        level = self.series.level
        return self.bounded and self.series.end >= level + ENOUGH * (1 - level)

    @cached_property
    def gaining(self) -> bool:
        """It still rises over its last third, by more than noise and than a tenth of its gain."""
        if self._no_gain:
            return False
        count = max(CALM_STEPS, len(self.series) // 3)
        rise, noise = straight_rise(self.series.values[-count:])
        rounding = 1e-9 * abs(self.peak)  # a reward that never moves has no other noise
        return rise > max(GAINING * noise, LEAST_GAIN * (self.peak - self.series.level), rounding)

    @cached_property
    def stands_from(self) -> int:
        """Index from which it stays near its last third, by noise or by a tenth of its gain.

        The last value alone is noisy itself: half of a long run would lie outside by chance. What
        it gained is no standing, however large the noise.
        """
        s = self.series
        near = max(STANDS_SIGMAS * s.smooth_noise, LEAST_GAIN * (self.peak - s.level))
        level = s.values[-max(CALM_STEPS, len(s) // 3) :].mean()
        if self.improved:
            near = min(near, (level - s.level) / 2)
        away = np.flatnonzero(np.abs(s.smooth - level) > near)
        return min(int(away[-1]) + 1, len(s) - 1) if len(away) else 0

    @cached_property
    def best_step(self) -> int:
        """Last step before the loss at which the smoothed reward was at its best, but for noise."""
        until = len(self.series) if self.loss is None else max(self.loss.onset, 1)
        smooth = self.series.smooth[:until]
        near = smooth.max() - min(self.series.smooth_noise, self.margin / 4)
        return self.series.step(int(np.flatnonzero(smooth >= near)[-1]))

    def gain_since(self, step: int) -> float:
        """Smoothed reward at the end minus the one at a step."""
        index = min(int(np.searchsorted(self.series.steps, step)), len(self.series) - 1)
        return self.series.end - float(self.series.smooth[index])

    def evidence(self) -> dict[str, float]:
        """Where it began, was best and ends."""
        ends = {"reward_start": self.series.level, "reward_peak": self.best}
        return ends | {"reward_end": self.series.end}

    def words(self) -> str:
        """How it went, in a few words with numbers."""
        s = self.series
        if self.lost:
            return f"reward fell from {self.best:.2f} to {s.end:.2f}"
        if abs(s.end - s.level) <= self.margin and not _differ(s):
            return f"reward did not clearly change ({s.level:.2f} to {s.end:.2f})"
        return f"reward {'rose' if s.end > s.level else 'fell'} from {s.level:.2f} to {s.end:.2f}"


@dataclass(frozen=True, slots=True)
class Fall:
    """A fall in means of blocks of records; indices into the series."""

    #: Means of the first, the best and the last block.
    start: float
    best: float
    end: float
    #: Difference of two blocks that may be noise.
    noise: float
    #: Middle of the best block, the record after it, and the last record of the first block that is
    #: halfway down.
    middle: int
    onset: int
    half: int

    @property
    def climbed(self) -> bool:
        """Whether it had climbed before by more than noise."""
        return self.best - self.start >= self.noise

    @property
    def lost(self) -> bool:
        """Half of the climb, or of the baseline without one, is gone."""
        stake = self.best - self.start if self.climbed else abs(self.start)
        return self.best - self.end >= max(LOST * stake, LEAST_LOSS * abs(self.best))


def reward_state(series: Series, solved: bool) -> RewardState:
    """Judge a reward series against its own baseline.

    With a gain beyond noise, losing half of it is a loss; without one, losing half of the baseline
    is. Either way the drop from the peak must be a fifth of the peak and six times the noise of a
    smoothed value, so that the best of many noisy steps does not make a loss. A reward that was
    there and then shows nothing but its lowest value, a fifth less, is lost from that record on. A
    slow loss may show in means of blocks alone, and a deep one in its first two records.
    """
    level, smooth, noise = series.level, series.smooth, _calm_noise(series)
    peak = np.maximum(np.maximum.accumulate(smooth), level)
    gain, drop = peak - level, peak - smooth
    margin = max(4 * noise, 0.02 * abs(level))
    stake = np.where(gain > margin, gain, abs(level))
    before = _won_back(drop)
    coarse = series.whole_noise > COARSE * abs(peak[-1])
    most = SIGMAS * (series.late_noise if coarse else noise)
    most = np.maximum(most, LEAST_LOSS * abs(peak))
    strict = (drop >= LOST * stake) & (drop >= most) & (drop > before)
    least = np.maximum(DROP_SIGMAS * series.late_noise, 0.1 * abs(peak))
    least = np.maximum(least, SWING * before)
    loose = strict | ((drop >= 0.25 * stake) & (drop >= least))
    home = drop <= np.maximum(3 * noise, 0.125 * stake)
    loss = _from_a_stage(series, departure(loose, strict, home, series.persist))
    death = _death(series)
    # Where it was lost well before it went silent, the silence is the end of a fall.
    if death is not None and not _lost_by(loss, death.onset - series.window):
        loss = death
    if not _lost_by(loss):
        loss = _slow_loss(series) or _fast_loss(series, peak[-1], stake[-1]) or loss
    falling = _last_loss(series, peak[-1], stake[-1], FALLING_SIGMAS)
    return RewardState(series, float(peak[-1]), margin, loss, solved, falling)


def _from_a_stage(series: Series, loss: Departure | None) -> Departure | None:
    """A departure from a height that lasted: a median of rewards of 0 and 1 may jump for a record.

    None if fewer smoothed records than make a condition count lie above the middle of the fall. The
    baseline is such a height, however soon it was left.
    """
    if loss is None:
        return None
    before, since = series.smooth[: loss.warned], series.smooth[loss.warned :]
    high = float(before.max(initial=series.level))
    if high <= series.level:
        return loss
    held = int((before >= (high + since.min()) / 2).sum())
    return loss if held >= min(series.persist, loss.warned) else None


def ends_solved(series: Series) -> bool:
    """Whether a score in [0, 1] ends at ``SOLVED``, or was there and is lower by noise at most."""
    least = SOLVED
    if series.smooth.max() >= SOLVED:
        least -= min(SOLVED_SIGMAS * series.smooth_noise, SOLVED_SLACK)
    return series.end >= least


def _lost_by(loss: Departure | None, index: int | None = None) -> bool:
    """Whether a loss lasts to the end and was severe, by an index if one is given."""
    if loss is None or not loss.ongoing or loss.crossed is None:
        return False
    return index is None or loss.crossed < index


def _won_back(drop: np.ndarray) -> np.ndarray:
    """Deepest drop that a later peak had made good, by each record."""
    peaks = np.maximum.accumulate(np.where(drop <= 0, np.arange(len(drop)), 0))
    return np.asarray(np.maximum.accumulate(drop)[peaks])


def _death(series: Series) -> Departure | None:
    """The reward was there for a few records, and then never again."""
    floor = series.values.min()
    dead = silent_since(series.values <= floor)
    if dead is None or dead < 2:
        return None
    before = float(np.median(series.values[:dead]))
    if before - floor <= LEAST_LOSS * abs(before):
        return None
    return Departure(dead, dead, dead, ongoing=True)


def _slow_loss(series: Series) -> Departure | None:
    """A loss that only the means of blocks tell from noise."""
    fall = block_fall(series)
    if fall is None or not fall.lost:
        return None
    return Departure(fall.onset, fall.half, fall.half, ongoing=True)


def _fast_loss(series: Series, peak: float, stake: float) -> Departure | None:
    """A loss so deep that its first two records leave no doubt; short runs only."""
    return _last_loss(series, peak, stake, FAST_SIGMAS) if series.window <= 3 else None


def _last_loss(series: Series, peak: float, stake: float, sigmas: float) -> Departure | None:
    """A loss that the last two records show, or half a window of them.

    Their mean is lost, and each of them by half of that at least, as one bad batch is no loss.
    """
    count = max(FEW, series.window // 2)
    begin = len(series) - count
    if begin < CALM_STEPS // 2:
        return None
    drops = peak - series.values[begin:]
    least = max(LOST * stake, LEAST_LOSS * abs(peak))
    noise = series.whole_noise / np.sqrt(count)
    if drops.mean() < max(least, sigmas * noise) or drops.min() < least / 2:
        return None
    return Departure(begin, begin, begin, ongoing=True)


def fell_before(series: Series) -> bool:
    """Whether a fall in means of blocks was there one and two records ago too."""
    falls = [block_fall(series.head(len(series) - back)) for back in range(1, FEW + 1)]
    return all(fall is not None and fall.climbed for fall in falls)


def block_size(series: Series) -> int:
    """Records of a block: an eighth of the run, four at least."""
    return max(CALM_STEPS // 2, len(series) // 8)


def block_fall(series: Series) -> Fall | None:
    """Where the reward ends below its best, in means of an eighth of the run; None within noise.

    Means of blocks see what a median of a few records cannot tell from noise.
    """
    size = block_size(series)
    if len(series) < 3 * size:
        return None
    means = np.convolve(series.values, np.full(size, 1 / size), "valid")
    best = int(np.argmax(means))
    noise = FALLEN * float(np.sqrt(2 * (series.whole_noise**2 / size + series.wander)))
    top, end = float(means[best]), float(means[-1])
    if top - end < noise:
        return None
    half = best + int(np.argmax(means[best:] <= (top + end) / 2))
    return Fall(
        start=float(means[0]),
        best=top,
        end=end,
        noise=noise,
        middle=best + size // 2,
        onset=best + size,
        half=half + size - 1,
    )


def _differ(series: Series) -> bool:
    """Whether the first and the last eighth differ by more than they spread."""
    size = block_size(series)
    first, last = series.values[:size], series.values[-size:]
    noise = float(np.sqrt((first.var() + last.var()) / size))
    return bool(abs(last.mean() - first.mean()) > max(FALLEN * noise, 0.02 * abs(series.level)))


def straight_rise(values: np.ndarray) -> tuple[float, float]:
    """Rise of the straight line through values, first to last, and its standard deviation.

    Three values at least.
    """
    x = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(x @ values / (x @ x))
    rest = values - values.mean() - slope * x
    spread = float(np.sqrt(rest @ rest / (len(values) - 2) / (x @ x)))
    return slope * (len(values) - 1), spread * (len(values) - 1)


def _calm_noise(series: Series) -> float:
    """Noise of a smoothed value, before the peak alone if that is less: a fall is no noise."""
    until = int(np.argmax(series.smooth)) + 1
    if until < CALM_STEPS:
        return series.smooth_noise
    return min(series.smooth_noise, series.head(until).smooth_noise)
