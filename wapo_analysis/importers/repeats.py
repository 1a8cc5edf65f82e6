"""What several numbers of one step mean: a later run, ranks, or epochs that each count anew."""

import re
from dataclasses import dataclass, field

import numpy as np

from wapo_analysis.table import Array

# How the numbers of several ranks make one, by the name; running totals are the same on all.
_WAYS = (
    ("mean", re.compile(r".*(?:mean|avg|std|ratio|frac|rate|share|p\d\d)", re.I)),
    ("max", re.compile(r".*[/_]max|(?:.*/)?max_.*|.*(?:total|num_(?:input_)?tokens).*", re.I)),
    ("min", re.compile(r".*[/_]min|(?:.*/)?min_.*", re.I)),
    ("sum", re.compile(r"(?:.*[/_])?(?:num|n|counts?)(?:_.*)?|(?:kept_)?tokens|nonfinite", re.I)),
)


@dataclass
class Epochs:
    """Steps of a run whose log counts them anew in each epoch."""

    #: Steps before each epoch.
    before: dict[float, int] = field(default_factory=dict)
    _first: int = 0
    _last: tuple[float, int] | None = None

    def through(self, epoch: float | None, step: int) -> int:
        """Step counted through the epochs: where it goes back, a higher epoch has begun."""
        if epoch is None or epoch != round(epoch):
            return step if self._last is None else step + self.before[self._last[0]]
        if self._last is None:
            self._first = step
        known = 0 if self._last is None else self.before[self._last[0]]
        if self._last is not None and epoch > self._last[0] and step < self._last[1]:
            known += self._last[1] + 1 - self._first
        self.before.setdefault(epoch, known)
        self._last = epoch, step
        return step + self.before[epoch]


@dataclass(frozen=True)
class Repeats:
    """A name that was logged more than once at some step."""

    steps: Array
    values: Array
    #: How often the step had gone back before each number.
    run: Array
    #: Steps logged again after the step went back.
    back: Array
    #: Repeated steps whose numbers differ.
    differing: Array

    @classmethod
    def of(cls, steps: Array, values: Array) -> "Repeats | None":
        """Steps and values as they were logged; None if no step occurs twice."""
        order = np.argsort(steps, kind="stable")
        ordered, numbers = steps[order], values[order]
        same = ordered[1:] == ordered[:-1]
        if not same.any():
            return None
        run = np.concatenate(([0], np.cumsum(np.diff(steps) < 0)))
        between = run[order]
        back = np.unique(ordered[1:][same & (between[1:] != between[:-1])])
        unlike = same & ~(
            (numbers[1:] == numbers[:-1]) | (np.isnan(numbers[1:]) & np.isnan(numbers[:-1]))
        )
        return cls(steps, values, run, back, np.unique(ordered[1:][unlike]))

    @property
    def jumps(self) -> int:
        """How often the step went back to one that was there."""
        return int(self.run[-1]) if len(self.back) else 0

    @property
    def alternates(self) -> bool:
        """It goes back all the time, and nearly all steps occur again, as when ranks take turns."""
        whole = len(np.unique(self.steps))
        return self.jumps > 1 and len(self.back) / self.jumps < 3 and 2 * len(self.back) > whole

    def settled(self, later: bool, way: str) -> dict[int, float]:
        """One number a step: of the later run alone, or of all; several are combined."""
        steps, values = self.steps, self.values
        if later:
            last = dict(zip(steps.tolist(), self.run.tolist(), strict=True))
            kept = self.run == np.array([last[step] for step in steps.tolist()])
            steps, values = steps[kept], values[kept]
        order = np.argsort(steps, kind="stable")
        unique, starts = np.unique(steps[order], return_index=True)
        groups = np.split(values[order], starts[1:])
        return {int(s): _combined(g, way) for s, g in zip(unique, groups, strict=True)}


def _combined(values: Array, way: str) -> float:
    if way == "one" or len(values) == 1:
        return float(values[-1])
    if way == "sum":
        return float(values.sum())
    if way == "max" or values.min() == values.max():
        return float(values.max())
    return float(values.min() if way == "min" else values.mean())


def way_of(key: str) -> str:
    """How numbers of several ranks make one: counts add up, extremes stay extremes."""
    name = key.removeprefix("train/")
    return next((way for way, pattern in _WAYS if pattern.fullmatch(name)), "mean")


def whole(values: Array) -> bool:
    """Whether all are whole numbers from 0 on."""
    return bool((np.isfinite(values) & (values >= 0) & (values == np.rint(values))).all())
