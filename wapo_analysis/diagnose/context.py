"""What detectors read: the step columns of a run as series, its reward, its class flows."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.diagnose.samples import (
    completion_rows,
    first_pass_gap,
    length_pay,
    shared_answers,
)
from wapo_analysis.series import Departure, Series, departure
from wapo_analysis.store import Run
from wapo_analysis.table import Array

SOLVED = 0.8
CALM_STEPS = 8
"""Steps up to the peak on which the noise of the reward can be measured."""
SOLVED_SOURCES = ("pass_rate", "reward")


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
        The pass rate, or a reward within [0, 1], ends at ``SOLVED`` or more.
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
        """It ends above its beginning by more than chance, short of a clear gain."""
        return not self.lost and self.series.end - self.series.level > self.margin / 3

    @property
    def much_gained(self) -> bool:
        """It lies in [0, 1] and ends a third of the way from its beginning to 1, or further."""
        values, level = self.series.values, self.series.level
        bounded = values.min() >= 0 and values.max() <= 1
        return bool(bounded and self.series.end >= level + (1 - level) / 3)

    def gain_since(self, step: int) -> float:
        """Smoothed reward at the end minus the one at a step."""
        index = min(int(np.searchsorted(self.series.steps, step)), len(self.series) - 1)
        return self.series.end - float(self.series.smooth[index])

    def words(self) -> str:
        """How it went, in a few words with numbers."""
        s = self.series
        if self.lost:
            return f"reward fell from {self.peak:.2f} to {s.end:.2f}"
        if abs(s.end - s.level) <= self.margin:
            return f"reward did not clearly change ({s.level:.2f} to {s.end:.2f})"
        return f"reward {'rose' if s.end > s.level else 'fell'} from {s.level:.2f} to {s.end:.2f}"


def reward_state(series: Series, solved: bool) -> RewardState:
    """Judge a reward series against its own beginning.

    With a gain beyond noise, losing half of it is a loss; without one, losing half of the beginning
    is. Either way the drop from the peak must be a fifth of the peak and six times the noise of a
    smoothed value, so that the best of many noisy steps does not make a loss.
    """
    level, smooth, noise = series.level, series.smooth, _calm_noise(series)
    peak = np.maximum(np.maximum.accumulate(smooth), level)
    gain, drop = peak - level, peak - smooth
    margin = max(4 * noise, 0.02 * abs(level))
    stake = np.where(gain > margin, gain, abs(level))
    strict = (drop >= 0.5 * stake) & (drop >= np.maximum(6 * noise, 0.2 * abs(peak)))
    loose = strict | ((drop >= 0.25 * stake) & (drop >= np.maximum(6 * noise, 0.1 * abs(peak))))
    home = drop <= np.maximum(3 * noise, 0.125 * stake)
    loss = departure(loose, strict, home, series.persist)
    return RewardState(series, float(peak.max()), margin, loss, solved)


def _calm_noise(series: Series) -> float:
    """Noise of a smoothed value, before the peak alone if that is less: a fall is no noise."""
    until = int(np.argmax(series.smooth)) + 1
    if until < CALM_STEPS:
        return series.smooth_noise
    before = Series(series.steps[:until], series.values[:until])
    return min(series.smooth_noise, before.smooth_noise)


@dataclass(frozen=True)
class Context:
    """A run as detectors see it; every part is computed once, when asked for.

    Parameters
    ----------
    run : Run
        The run.
    """

    run: Run

    LOGP_GAP_COLUMN: ClassVar = "sampling/sampling_logp_difference/mean"
    """TRL's name of the mean |logp of sampler - logp of trainer|; the step log keeps it."""

    _series: dict[str, Series] = field(default_factory=dict, repr=False)

    @cached_property
    def step_numbers(self) -> Array:
        """Step numbers of the step table, shape (n,)."""
        return self.run.steps["step"].to_numpy(np.int64)

    def values(self, column: str) -> Array:
        """A step column as float64, shape (n,); whatever is no finite number is NaN."""
        if column not in self.run.steps:
            return np.full(len(self.step_numbers), np.nan)
        numbers = pd.to_numeric(self.run.steps[column], errors="coerce").to_numpy(np.float64)
        return np.where(np.isfinite(numbers), numbers, np.nan)

    def null(self, column: str) -> Array:
        """Steps whose record holds the column, but no finite number; shape (n,)."""
        steps = self.run.steps.attrs.get("null", {}).get(column, ())
        return np.isin(self.step_numbers, np.fromiter(steps, np.int64, len(steps)))

    def series(self, column: str) -> Series:
        """Finite values of a step column with their steps."""
        if column not in self._series:
            values = self.values(column)
            finite = np.isfinite(values)
            self._series[column] = Series(self.step_numbers[finite], values[finite])
        return self._series[column]

    @cached_property
    def reward(self) -> RewardState | None:
        """Judged reward, None without one."""
        series = self.series("reward")
        return reward_state(series, self._solved()) if len(series) else None

    def _solved(self) -> bool:
        for name in SOLVED_SOURCES:
            series = self.series(name)
            bounded = len(series) and series.values.min() >= 0 and series.values.max() <= 1
            if bounded:
                return series.end >= SOLVED
        return False

    @cached_property
    def flows(self) -> pd.DataFrame:
        """Predicted entropy flow in nats per unit learning rate, shape (steps, classes).

        Zero where a class had no token; no rows if the run has no such totals.
        """
        return self._per_class("pred_dentropy_sum")

    @cached_property
    def gradient_mass(self) -> pd.DataFrame:
        """Sum of exact logit-gradient norms, laid out like :attr:`flows`."""
        return self._per_class("grad_mass")

    @cached_property
    def first_pass(self) -> pd.DataFrame:
        """How far the first gradient pass is from the sampling policy, one row per sampled step.

        Columns k3 (nats), ess (share of the tokens), max_dp (probability), tokens; see
        :func:`first_pass_gap`. No rows if the run has no token rows with ``logp_old``.
        """
        return first_pass_gap(self.run)

    @cached_property
    def completions(self) -> pd.DataFrame:
        """Rows of the rollouts table of a bounded number of steps."""
        return completion_rows(self.run)

    @cached_property
    def sameness(self) -> Series:
        """Share of completions that another prompt got too, over the sampled steps."""
        return shared_answers(self.completions)

    @cached_property
    def length_pay(self) -> Series:
        """Correlation of reward and length within groups, over the sampled steps."""
        return length_pay(self.completions)

    @cached_property
    def has_flow(self) -> bool:
        """Whether the class totals hold predicted entropy changes at all."""
        return bool(self.run.classes["pred_dentropy_sum"].notna().any())

    def _per_class(self, column: str) -> pd.DataFrame:
        totals = self.run.classes
        known = totals[totals["cls"].isin(range(len(tax.CLASSES)))].dropna(subset=[column])
        table = known.pivot_table(index="step", columns="cls", values=column, aggfunc="sum")
        table = table.reindex(columns=range(len(tax.CLASSES))).fillna(0.0)
        return table.set_axis(list(tax.CLASSES), axis=1)
