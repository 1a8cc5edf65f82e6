"""What an audit looks at, with its error bounds, and what its checks find.

Shapes: N token rows of the audited steps, U units (one rollout in one gradient pass).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.derive import derived_columns
from wapo_analysis.settings import fresh_steps
from wapo_analysis.store import Run
from wapo_analysis.table import Array

_KEYS = ("step", "rank", "minibatch", "group", "rollout", "position", "token_id")
_FLOATS = (
    "advantage", "logp", "logp_old", "logp_prox", "entropy", "collision_rest",
    "collision_logp_rest", "coef", "logp_after", "entropy_after",
)  # fmt: skip
#: Sources whose settings say what the loss should be; a loop's name of an objective says less.
OWN_SOURCES = ("built-in", "trl")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Rows of the audited steps and what is known beside them."""

    #: (N,): token table; floats as float64, what is missing NaN.
    columns: Mapping[str, Array]
    #: Rollouts of the same steps; empty if none were recorded.
    rollouts: pd.DataFrame
    #: Step lines of the same steps.
    steps: pd.DataFrame
    manifest: Mapping[str, Any]
    rounding: float = field(default=2.0**-16)

    @classmethod
    def of_run(cls, run: Run, most: int) -> "Evidence":
        """Evidence of the first steps of a run that have token rows."""
        chosen = run.token_steps()[:most]
        table = run.table("tokens", chosen)
        rollouts, steps = run.table("rollouts", chosen), run.steps
        return cls.of(
            {name: table[name].to_numpy() for name in table.columns},
            rollouts,
            steps[steps["step"].isin(chosen)],
            run.manifest,
        )

    @classmethod
    def of(
        cls,
        tokens: Mapping[str, Array],
        rollouts: pd.DataFrame,
        steps: pd.DataFrame,
        manifest: Mapping[str, Any],
        rounding: float | None = None,
    ) -> "Evidence":
        """Evidence of plain columns; ``rounding`` is the relative error of stored floats."""
        rows = len(tokens["step"])
        kept = {name: np.asarray(tokens[name]) for name in tokens}
        for name in _FLOATS:
            kept[name] = np.asarray(kept.get(name, np.full(rows, np.nan)), np.float64)
        for name in _KEYS:
            if name in kept:  # a source may not tell a rollout or its group: -1 then
                kept[name] = _whole(kept[name])
        rollouts = rollouts.assign(
            **{name: _whole(rollouts[name].to_numpy()) for name in _KEYS if name in rollouts}
        )
        if rounding is None:
            rounding = 2.0 ** -(float(manifest.get("store_bits") or 15) + 1)
        return cls(
            columns=kept, rollouts=rollouts, steps=steps, manifest=manifest, rounding=rounding
        )

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["step"])

    def where(self, rows: Array) -> "Evidence":
        """The same with some of its token rows."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Evidence(
            columns=columns,
            rollouts=self.rollouts,
            steps=self.steps,
            manifest=self.manifest,
            rounding=self.rounding,
        )

    @cached_property
    def source(self) -> str:
        """What wrote the run: built-in, trl, loop, a trainer's name or import."""
        return str(self.manifest.get("source") or "unknown")

    @cached_property
    def log_ratio(self) -> Array:
        """Ln of the loss's ratio, shape (N,), nats; NaN without old log-probabilities."""
        with np.errstate(invalid="ignore"):  # both may be logs of 0
            return np.asarray(self["logp"] - self._old)

    @cached_property
    def _old(self) -> Array:
        return np.where(np.isnan(self["logp_prox"]), self["logp_old"], self["logp_prox"])

    @cached_property
    def ratio_error(self) -> Array:
        """Bound on what rounding does to `log_ratio`, shape (N,), nats."""
        size = np.abs(self["logp"]) + np.where(np.isnan(self._old), 0, np.abs(self._old))
        return np.asarray(1.1 * self.rounding * size + 3e-6)

    @cached_property
    def at_one(self) -> Array:
        """Rows whose ratio is 1 up to rounding, bool of shape (N,); without one it counts as 1."""
        return np.asarray(~(np.abs(self.log_ratio) > 4 * self.ratio_error))

    @cached_property
    def coef_error(self) -> float:
        """Bound on the relative rounding of a coefficient: wide where gradients are half-precise.

        Gradients of a half-precise tensor lie on its grid, which is how they are known; several
        roundings may have come before.
        """
        coef = self["coef"][np.isfinite(self["coef"]) & (self["coef"] != 0)].astype(np.float32)
        bits = coef.view(np.uint32)
        if len(coef) >= 8 and not (bits & 0xFFFF).any():
            return 0.025  # bfloat16
        if len(coef) >= 8 and not (bits & 0x1FFF).any():
            return 0.004  # float16
        return 2.2 * self.rounding + 2e-6

    @cached_property
    def units(self) -> Array:
        """Number of each row's unit, one rollout in one gradient pass; shape (N,)."""
        return numbered([self["step"], self["rank"], self["minibatch"], self["rollout"]])

    @cached_property
    def passes(self) -> Array:
        """Number of each row's gradient pass of one process; shape (N,)."""
        return numbered([self["step"], self["rank"], self["minibatch"]])

    @cached_property
    def members(self) -> Array:
        """Number of each row's rollout, whatever the pass; shape (N,)."""
        return numbered([self["step"], self["rank"], self["rollout"]])

    @cached_property
    def groups(self) -> Array:
        """Number of each row's group, -1 where it is unknown; shape (N,)."""
        keys = [self["step"], self["group"]]
        if self.source not in OWN_SOURCES:  # processes of a loop count groups on their own
            keys.append(self["rank"])
        return np.where(self["group"] >= 0, numbered(keys), -1)

    @cached_property
    def derived(self) -> dict[str, Array]:
        """Derived columns of the token table."""
        return derived_columns(self.columns, float(self.manifest.get("temperature") or 1.0))

    @cached_property
    def sampled(self) -> bool:
        """Whether only some of the rollouts have token rows."""
        share = float(self.manifest.get("token_fraction") or 1.0)
        told = self.steps.get("token_fraction", pd.Series(dtype=float))
        return share < 1 or bool((told < 1).any())

    def first_passes(self) -> Array:
        """Rows of a rollout's first gradient pass after it was sampled, bool of shape (N,).

        Only the very first pass of a step, for an update may follow it; of TRL only steps that
        sampled anew. A table that numbers no passes may hold a later one: none then.
        """
        if self.source == "import" and not (self["minibatch"] > 0).any():
            return np.zeros(len(self), bool)
        fresh = np.isin(self["step"], list(self.fresh_steps()))
        return np.asarray(fresh & (self["minibatch"] == 0))

    def fresh_steps(self) -> list[int]:
        """Steps that train on rollouts sampled just before."""
        return fresh_steps(self.manifest, sorted({int(s) for s in np.unique(self["step"])}))


def exponential(values: Array) -> Array:
    """Exp of logs of any size: held within what a float can be."""
    return np.asarray(np.exp(np.clip(values, -700.0, 700.0)))


def _whole(values: Array) -> Array:
    """Integers; -1 where none is known."""
    numbers = np.asarray(pd.to_numeric(pd.Series(values), errors="coerce"), np.float64)
    return np.nan_to_num(numbers, nan=-1.0).astype(np.int64)


def numbered(keys: Sequence[Array]) -> Array:
    """Number of each row's combination of keys, from 0, in the order of the keys."""
    order = np.lexsort(keys[::-1])
    new = np.any([np.diff(key[order]) != 0 for key in keys], axis=0)
    numbers = np.zeros(len(order), np.int64)
    numbers[order[1:]] = np.cumsum(new)
    return numbers


def first_of(index: Array) -> Array:
    """Row at which each number of ``index`` (from 0, without gaps) comes first."""
    return np.unique(index, return_index=True)[1]


def by_unit(values: Array, index: Array, count: int = 0) -> Array:
    """Mean of values per number of ``index``; NaN where there is none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(
            np.bincount(index, values, minlength=count) / np.bincount(index, minlength=count)
        )


#: Relative distance from a whole count at which a sum of weights is that count.
_SCALE = 1e-3
#: Means that a form may be as long as nothing is known of the size of its weights.
ANY_SIZE = {
    "seq": {"seq"}, "group": {"group"}, "pass": {"pass"}, "padded": {"padded"},
    "even": {"batch", "constant", "sum"}, "long": {"long"}, "rank": {"rank"},
}  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """What the weights of each step sum to."""

    #: (steps,): over all rollouts, each once: 1 where a step's losses are averaged.
    totals: Array
    #: Processes; each may scale its loss up by their number.
    ranks: int
    #: (steps,): gradient passes and updates of a step, each rollout counted once; NaN if not known.
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
        size = rollouts[0] / per_group[0]
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
                with np.errstate(divide="ignore", invalid="ignore"):  # nothing may be counted
                    length = factor[there] / (scale[there] * base[there])
                    whole = np.round(length)
                    near = np.abs(length - whole) < np.minimum(2e-4 * length, 0.2)
                if (near & (whole >= self.longest)).all() and len(set(whole)) <= 1:
                    return True
        return False


#: Deviation beside which odds of tokens mean nothing.
NO_SAMPLES = "tokens are no samples of the policy"


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Something the trainer does that it should not, or not by what was declared.

    Attributes
    ----------
    name : str
        Short name of the kind, for programs.
    says : str
        What was seen, with its size.
    tokens : str
        The tokens that show it.
    cause : str
        The usual cause.
    look : str
        The place to look at in this trainer.
    """

    name: str
    says: str
    tokens: str
    cause: str
    look: str


@dataclass
class Findings:
    """What the checks of an audit add to, one after the other."""

    deviations: list[Deviation] = field(default_factory=list)
    #: Of every check that could be made, what it found.
    facts: dict[str, str] = field(default_factory=dict)
    #: Of every check that could not, why.
    missing: dict[str, str] = field(default_factory=dict)

    def deviates(self, name: str, says: str, *, tokens: str, cause: str, look: str) -> None:
        """Add a deviation, once for each kind."""
        if all(found.name != name for found in self.deviations):
            self.deviations.append(
                Deviation(name=name, says=says, tokens=tokens, cause=cause, look=look)
            )
