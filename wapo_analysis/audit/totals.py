"""Over what a mean runs, by the size of its weights.

Arrays have shape (steps,), one number for each audited step.
"""

from dataclasses import dataclass

import numpy as np

from wapo_analysis.audit.evidence import Evidence, first_of
from wapo_analysis.table import Array

_SCALE = 1e-3
"""Relative distance from a whole count at which a sum of weights is that count."""
ANY_SIZE = {
    "seq": {"seq"}, "group": {"group"}, "pass": {"pass"}, "padded": {"padded"},
    "even": {"batch", "constant", "sum"}, "long": {"long"}, "rank": {"rank"},
}  # fmt: skip
"""Means that a form may be as long as nothing is known of the size of its weights."""


@dataclass(frozen=True)
class Sum:
    """What the weights of each step sum to.

    Attributes
    ----------
    totals : ndarray, shape (steps,)
        Over all rollouts, each once: 1 where a step's losses are averaged.
    ranks : int
        Processes; each may scale its loss up by their number.
    passes, updates : ndarray, shape (steps,)
        Gradient passes and updates of a step, each rollout counted once; NaN if not known.
    """

    totals: Array
    ranks: int
    passes: Array
    updates: Array


class Totals:
    """Counts of each step that the size of a weight is compared with; arrays of shape (steps,)."""

    def __init__(self, seen: Evidence) -> None:
        unit_first, member_first = first_of(seen.units), first_of(seen.members)
        self.steps, step = np.unique(seen["step"][member_first], return_inverse=True)
        count = len(self.steps)
        visits = np.bincount(seen.members[unit_first])
        sizes = np.bincount(seen.members) / visits
        self.longest = float(sizes.max())
        self.whole = not seen.sampled
        ranks = self.ranks = len(np.unique(seen["rank"]))
        self.passes = self._per_step(seen, seen.passes, count) / ranks
        repeats = np.bincount(step, visits, minlength=count) / np.bincount(step, minlength=count)
        self.passes = np.maximum(self.passes / repeats, 1)
        updates = self._updates(seen) / repeats
        self.updates = updates
        updates = np.where(np.isfinite(updates), updates, self.passes)
        plain = [np.ones(count), self.passes, updates]
        self._factors = [*plain, *(ranks * values for values in plain)]
        advantage = seen["advantage"][member_first]
        kept = np.bincount(seen.members, np.asarray(seen["kept"], bool)) > 0
        chosen = [np.ones(len(step), bool), advantage != 0, advantage > 0, kept]
        groups = seen.groups[member_first]
        rollouts = [np.bincount(step, c, minlength=count) for c in chosen]
        tokens = [np.bincount(step, c * sizes, minlength=count) for c in chosen]
        per_group = [self._groups(groups, step, c, count) for c in chosen]
        size = rollouts[0] / np.maximum(per_group[0], 1)
        self._lengths = [rollouts[0], *(size * g for g in per_group[1:])]
        self._bases = {
            "seq": rollouts, "padded": rollouts, "sum": rollouts, "batch": tokens,
            "group": per_group, "pass": [self.passes], "long": rollouts,
            "rank": [np.full(count, float(ranks))],
        }  # fmt: skip

    def _per_step(self, seen: Evidence, index: Array, count: int) -> Array:
        place = np.searchsorted(self.steps, seen["step"][first_of(index)])
        return np.bincount(place, minlength=count).astype(float)

    @staticmethod
    def _groups(groups: Array, step: Array, chosen: Array, count: int) -> Array:
        pairs = np.unique(np.stack([step[chosen], groups[chosen]]), axis=1)
        return np.bincount(pairs[0], minlength=count).astype(float)

    def _updates(self, seen: Evidence) -> Array:
        if "updates" not in seen.steps or seen.steps["step"].duplicated().any():
            return np.full(len(self.steps), np.nan)
        told = seen.steps.set_index("step")["updates"]
        return np.asarray(told.reindex(self.steps).to_numpy(float))

    def names(self, form: str, scale: Array) -> set[str]:
        """Names of the means that a form is, by the size of its weights, shape (steps,)."""
        kind = form.split(" ")[0]
        if not self.whole:
            return ANY_SIZE[kind]
        named = ANY_SIZE[kind] - {"constant"}
        found = {name for name in named if self._close(scale, self._bases[name])}
        return found | ({"constant"} if kind == "even" and self._constant_length(scale) else set())

    def sum_of(self, form: str, scale: Array) -> Sum:
        """Weights of each step summed, for scales of shape (steps,)."""
        kind = form.split(" ")[0]
        base = self._bases["batch" if kind == "even" else kind][0]
        return Sum(scale * base, self.ranks, self.passes, self.updates)

    def _close(self, scale: Array, bases: list[Array]) -> bool:
        there = np.isfinite(scale)
        sums = [scale[there] * base[there] for base in bases]
        return any(
            bool((np.abs(total / factor[there] - 1) < _SCALE).all())
            for total in sums
            for factor in self._factors
        )

    def _constant_length(self, scale: Array) -> bool:
        """Whether the weights are those of a whole number of tokens per rollout."""
        there = np.isfinite(scale)
        for base in self._lengths:
            for factor in self._factors:
                length = factor[there] / (scale[there] * np.maximum(base[there], 1))
                whole = np.round(length)
                near = np.abs(length - whole) < np.minimum(2e-4 * length, 0.2)
                if (near & (whole >= self.longest)).all() and len(set(whole)) <= 1:
                    return True
        return False
