"""How the coefficient of a token depends on advantage, ratio and length: the objective in force.

A policy-gradient loss puts ``coef = A f(ratio) w`` on a token: f is the loss's own function of the
ratio (of the token, of the rollout, or none), w the weight of the mean. Each candidate f is divided
out; it fits if what is left is constant within every rollout up to the rounding of the record. Each
candidate mean then says how that constant depends on the lengths. What the data cannot tell apart
stays a tie.

Shapes: N rows that carry gradient, U units (one rollout in one gradient pass).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from wapo_analysis.audit.evidence import (
    ANY_SIZE,
    Evidence,
    Sum,
    Totals,
    by_unit,
    exponential,
    first_of,
    numbered,
)
from wapo_analysis.table import Array

#: Share of tokens that may lie beyond the bound of rounding where a candidate fits.
OUTLIERS = 0.002
#: Fewer tokens with gradient tell nothing.
LEAST = 8


@dataclass(frozen=True, slots=True)
class Core:
    """How the loss uses the ratio: the name of its function, and whose ratio."""

    kind: str
    level: str = "token"

    def __str__(self) -> str:
        whose = {"token": "token ratio", "mean": "rollout ratio (mean)"}
        ratio = whose.get(self.level, "rollout ratio (sum)")
        names = {"plain": ratio, "none": "no ratio", "inverse": f"inverted {ratio}"}
        names["unit"] = "no ratio, size of A ignored"
        return names.get(self.kind, f"{self.kind} of the {ratio}")


CORES = (
    Core("plain"), Core("plain", "mean"), Core("plain", "sum"), Core("none"), Core("unit"),
    Core("inverse"), Core("cispo"), Core("sapo"), Core("vespo", "sum"), Core("cispo", "mean"),
    Core("sapo", "mean"), Core("gmpo", "mean"),
)  # fmt: skip

MEANS = {
    "seq": "mean over each rollout's tokens",
    "batch": "token mean over the batch",
    "pass": "token mean over each gradient pass",
    "group": "token mean over each group",
    "rank": "token mean over each process",
    "constant": "division by a constant length",
    "padded": "division by the padded length",
    "sum": "sum over a rollout's tokens",
    "long": "weights that grow with the rollout's length",
    "offset": "each rollout's sum divided by its length and a constant more",
}


@dataclass
class Coefficient:
    """What the coefficients say."""

    #: Cores that fit, each with the names of the means that fit with it.
    fits: dict[Core, set[str]] = field(default_factory=dict)
    #: Why nothing is known.
    why_not: str | None = None
    #: Share of tokens pushed against their advantage.
    against: float = 0.0
    #: (N,): rows of the evidence that carry gradient and have an advantage.
    pushed: Array = field(default_factory=lambda: np.zeros(0, bool))
    #: What the weights of the first fit divide by, and their scale, where it is one number.
    form: tuple[str, float] | None = None
    #: Tokens that the mean counts in every rollout beside its own, if they are what fits.
    offset: int = 0
    #: Why all this is detected from the very first gradient pass alone.
    only_first: str | None = None
    #: Where the weights are not those of a mean: what they sum to.
    scale: dict[str, Sum] = field(default_factory=dict)
    #: What the weights of the first fit sum to, where they are those of a mean.
    summed: Sum | None = None
    #: Whether ratios differ from 1 by more than rounding.
    ratio_moves: bool = False

    def weight(self, seen: Evidence) -> Array | None:
        """What the mean multiplies the loss of each row with, shape (N,); None if not known."""
        if self.form is None:
            return None
        kind, scale = self.form
        if kind == "seq":
            lengths: Array = np.bincount(seen.units)[seen.units]
            return scale / lengths
        if kind != "even" or "batch" not in self.means:
            return None
        # One over the tokens of a step, each counted once.
        keys = np.stack([seen["step"], seen.members, seen["position"]])
        step = np.unique(keys, axis=1)[0]
        steps, tokens = np.unique(step, return_counts=True)
        if abs(scale * tokens[0] - 1) > 1e-3:
            return None
        return np.asarray(1 / tokens[np.searchsorted(steps, seen["step"])])

    @property
    def means(self) -> set[str]:
        """Means that fit with any core that fits."""
        return set().union(*self.fits.values()) if self.fits else set()


def read_coefficient(seen: Evidence, settings: dict[str, Any]) -> Coefficient:
    """Find the cores and means that fit the coefficients.

    ``settings``: numbers of the losses: ``bounds``, ``cap`` (CISPO), ``sapo`` and ``vespo``.
    """
    found = _read(seen, settings)
    if found.fits or not found.pushed.any():
        return found
    # Before the first update a KL term has no gradient, if the reference is where training began.
    first = (seen["step"] == seen["step"].min()) & (seen["minibatch"] == 0)
    if first.all():
        return found
    alone = _read(seen.where(first), settings)
    if not alone.fits:
        return found
    pushed = np.zeros(len(seen), bool)
    pushed[first] = alone.pushed
    return replace(alone, pushed=pushed, only_first=found.why_not)


def _read(seen: Evidence, settings: dict[str, Any]) -> Coefficient:
    found = Coefficient()
    coef, advantage = seen["coef"], seen["advantage"]
    if not np.isfinite(coef).any():
        found.why_not = "no coefficients were recorded"
        return found
    found.pushed = np.isfinite(coef) & np.isfinite(advantage) & (coef != 0) & (advantage != 0)
    if found.pushed.sum() < LEAST:
        found.why_not = f"only {int(found.pushed.sum())} tokens with an advantage carry gradient"
        return found
    push = seen.where(found.pushed)
    found.against = float((np.sign(push["coef"]) != np.sign(push["advantage"])).mean())
    if OUTLIERS < found.against < 1 - OUTLIERS:
        found.why_not = (
            f"{found.against:.0%} of the tokens are pushed against their advantage, so the loss "
            "has another term (KL, entropy) that cannot be split off"
        )
        return found
    units = _Units(seen, push, found.pushed)
    found.ratio_moves = units.ratio_moves
    for core in CORES:
        means = units.means_of(core, settings)
        if means:
            found.fits[core] = means
    if not found.fits:
        found.why_not = "no known loss gives these coefficients from advantage, ratio and lengths"
    found.form, found.scale, found.offset = units.form, units.scale, units.offset
    found.summed = units.summed
    return found


class _Units:
    """Rows that carry gradient, by unit, and what the means need to know of the units."""

    def __init__(self, seen: Evidence, push: Evidence, pushed: Array) -> None:
        self._push, self._pushed = push, pushed
        self._positive = push["advantage"] > 0
        known = np.unique(seen.units[pushed])
        self._unit = np.searchsorted(known, seen.units[pushed])
        self._count = len(known)
        first = first_of(seen.units)[known]
        self._totals = Totals(seen)
        self._step = np.searchsorted(self._totals.steps, seen["step"][first])
        self._pass = np.unique(seen.passes[first], return_inverse=True)[1]
        ratio = _finite(seen.log_ratio)
        lengths = np.bincount(seen.units)
        mean = np.bincount(seen.units, ratio) / lengths
        self._log_ratio = {
            "token": ratio[pushed],
            "mean": mean[seen.units[pushed]],
            "sum": (mean * lengths)[seen.units[pushed]],
        }
        self._clipped = _clipped_means(seen, ratio, lengths)
        error = _finite(seen.ratio_error[pushed])
        sums = by_unit(error, self._unit, self._count)[self._unit]
        self._error = {"token": error, "mean": sums, "sum": sums * lengths[known][self._unit]}
        self._noise = push.coef_error + 2.2 * seen.rounding
        size = np.abs(self._log_ratio["token"])
        self.ratio_moves = bool((size > 4 * error + 0.01).mean() > 0.02)
        self.form: tuple[str, float] | None = None
        self.scale: dict[str, Sum] = {}
        self.offset = 0
        self.summed: Sum | None = None
        self._lengths = lengths[known]
        self._forms = _forms(seen, known, first, lengths, pushed)

    def means_of(self, core: Core, settings: dict[str, Any]) -> set[str]:
        """Means that fit with a core; none if the core itself does not fit."""
        log_factor = self._factor(core, settings)
        if log_factor is None:
            return set()
        noise = self._noise + self._rounding(core, settings)
        size = np.log(np.abs(self._push["coef"]))
        size = size if core.kind == "unit" else size - np.log(np.abs(self._push["advantage"]))
        left = size - log_factor
        constant = by_unit(left, self._unit, self._count)
        bound = by_unit(noise, self._unit, self._count)
        near = np.abs(left - constant[self._unit]) <= 2 * (noise + bound[self._unit])
        if (~near).mean() > OUTLIERS:
            return set()
        return self._named_means(core, constant, bound)

    def _factor(self, core: Core, settings: dict[str, Any]) -> Array | None:
        """Ln f(ratio) of each row, shape (N,)."""
        x = self._log_ratio[core.level]
        if core.kind in ("none", "unit"):
            return np.zeros_like(x)
        if core.kind == "plain":
            return x
        if core.kind == "inverse":
            return -x
        if core.kind == "cispo":
            return np.asarray(np.minimum(x, np.log(settings["cap"])))
        if core.kind == "gmpo":
            low, high = settings["bounds"]
            if not low or not np.isfinite(high):
                return None
            return np.asarray(self._clipped(np.log(low), np.log(high))[self._pushed])
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if core.kind == "sapo":  # 4 sigmoid(z) sigmoid(-z) ratio
                z = self._sapo_argument(core, settings)
                return np.asarray(np.log(4) - np.logaddexp(0, -z) - np.logaddexp(0, z) + x)
            k_pos, l_pos, k_neg, l_neg = settings["vespo"]
            k = np.where(self._positive, k_pos, k_neg)
            rate = np.where(self._positive, l_pos, l_neg)
            held = np.clip(x, np.log(1e-8), 20)
            return np.asarray(rate + k * held - rate * np.exp(held))

    def _sapo_argument(self, core: Core, settings: dict[str, Any]) -> Array:
        heat = np.where(self._positive, *settings["sapo"])
        return np.asarray(heat * (exponential(self._log_ratio[core.level]) - 1))

    def _rounding(self, core: Core, settings: dict[str, Any]) -> Array:
        """Bound on what the rounding of the ratio does to ln f."""
        error: Array = self._error[core.level]
        x: Array = self._log_ratio[core.level]
        if core.kind in ("none", "unit"):
            return np.zeros_like(x)
        if core.kind not in ("sapo", "vespo"):
            return error
        steep = max(*settings["sapo"], *settings["vespo"])
        error = error * steep * (1 + np.exp(np.minimum(x, 20)))  # the ratio is held at e^20
        if core.kind == "vespo":
            return np.asarray(error)
        # Autograd has sigmoid (1 - sigmoid), whose second factor loses its digits near 1 and is 0
        # in float32 beyond 17: what has a gradient there is of another loss.
        z = self._sapo_argument(core, settings)
        return np.asarray(error + 3e-7 * np.exp(np.minimum(z, 17)))

    def _named_means(self, core: Core, constant: Array, bound: Array) -> set[str]:
        """Names of the means whose weights the units' constants follow."""
        even = [n for n, f in self._forms.items() if self._spread(constant + f, bound, self._step)]
        if not even:  # weights that differ from pass to pass
            even = [
                n for n, f in self._forms.items() if self._spread(constant + f, bound, self._pass)
            ]
        if not even:
            self.offset = self._counted_too(constant, bound)
            return {"offset"} if self.offset else set()
        scales = {}
        for form in even:
            level = by_unit(constant + self._forms[form], self._step, len(self._totals.steps))
            scales[form] = exponential(level)
        if even == ["long"] and core.level == "sum":  # a token mean of what all tokens share
            even, scales = ["even"], {"even": scales["long"]}
        names = set().union(*(self._totals.names(f, scale) for f, scale in scales.items()))
        if self.form is None:
            self.form = even[0], float(np.nanmedian(scales[even[0]]))
            sums = {f: self._totals.sum_of(f, scale) for f, scale in scales.items()}
            if not names and self._totals.whole:
                self.scale = sums
            elif names in ({"seq"}, {"batch"}) and self._totals.whole:
                self.summed = sums[even[0]]
        return names or set().union(*(ANY_SIZE[form.split(" ")[0]] for form in even))

    def _counted_too(self, constant: Array, bound: Array) -> int:
        """Whole number c for which weights go as 1 / (length + c); 0 if there is none."""
        steps = len(self._totals.steps)
        size = exponential(by_unit(constant, self._step, steps)[self._step] - constant)
        size = size / by_unit(size, self._step, steps)[self._step]
        lengths = self._lengths.astype(float)
        if len(np.unique(lengths)) < 4:
            return 0
        # size = (length + c) / (mean length + c) in each step, so c solves a linear equation.
        middle = by_unit(lengths, self._step, steps)[self._step]
        away = size - 1
        guess = float(((lengths - middle - away * middle) * away).sum() / (away**2).sum())
        c = round(guess)
        if not c or abs(guess - c) > 0.2 or (lengths + c <= 0).any():
            return 0
        return c if self._spread(constant + np.log(lengths + c), bound, self._step) else 0

    def _spread(self, values: Array, bound: Array, index: Array) -> bool:
        """Whether values are constant within each number of the index, up to their bounds."""
        mean, slack = by_unit(values, index), by_unit(bound, index)
        near = np.abs(values - mean[index]) <= 2 * (bound + slack[index])
        return bool((~near).mean() <= OUTLIERS)


def _finite(values: Array) -> Array:
    """What is not known, or is the log of 0, counts as 0."""
    return np.where(np.isfinite(values), values, 0.0)


def _clipped_means(seen: Evidence, ratio: Array, lengths: Array) -> Any:
    def of(low: float, high: float) -> Array:
        # min(x A, clip(x) A) in logs: the upper bound holds A > 0, the lower one A < 0.
        positive = seen["advantage"] > 0
        held = np.where(positive, np.minimum(ratio, high), np.maximum(ratio, low))
        return np.asarray((np.bincount(seen.units, held) / lengths)[seen.units])

    return of


def _forms(
    seen: Evidence, known: Array, first: Array, lengths: Array, pushed: Array
) -> dict[str, Array]:
    """Ln of what each mean divides by, shape (U,) for the units that carry gradient."""
    unit = seen.units
    kept = np.asarray(seen["kept"], bool)
    kept_lengths = np.bincount(unit, kept)
    first_all = first_of(unit)
    passes = seen.passes[first_all]
    per_pass = np.bincount(passes, lengths)
    longest = np.zeros(len(per_pass))
    np.maximum.at(longest, passes, lengths)
    # A group's tokens: each rollout once, whatever the number of passes.
    member, group = seen.members, seen.groups
    member_first = first_of(member)
    visits = np.bincount(member[first_all])
    sizes = np.bincount(member) / visits
    owner = np.unique(group[member_first], return_inverse=True)[1]
    active = np.bincount(member, pushed) > 0
    per_group = np.bincount(owner, sizes)
    active_group = np.bincount(owner, sizes * active)
    # Which tokens are kept may change from update to update.
    both = numbered([passes, owner[member[first_all]]])
    kept_group = np.bincount(both, kept_lengths)[both[known]]
    mine = owner[member[first]]
    forms = {
        "seq": lengths[known],
        "seq of kept tokens": kept_lengths[known],
        "even": np.ones(len(known)),
        "long": 1 / lengths[known],
        "pass": per_pass[passes[known]],
        "pass of kept tokens": np.bincount(passes, kept_lengths)[passes[known]],
        "padded": longest[passes[known]],
    }
    if len(np.unique(seen["rank"])) > 1:
        # Each token once, whatever the number of passes.
        here = numbered([seen["step"], seen["rank"]])[first_all]
        shares = np.bincount(here, lengths / visits[member[first_all]])
        forms["rank"] = shares[here[known]]
    if (group[pushed] >= 0).all():
        forms["group"] = per_group[mine]
        forms["group of active rollouts"] = active_group[mine]
        forms["group of kept tokens"] = kept_group
    return {name: np.log(np.maximum(values, 1e-9)) for name, values in forms.items()}
