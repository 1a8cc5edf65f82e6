"""Checked settings of one objective, and the group advantages that it takes.

An objective is a token loss plus three choices: how advantages are formed, over what the loss is
averaged, and whether only positive advantages are kept. `table.OBJECTIVES` declares them;
`ObjectiveConfig` adds the user's settings and answers what is in force. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from wapo_taxonomy import BIN_NAMES, CLASSES, expand_bins

from wapo_analysis.declare import Limit, between, check_settings, setting
from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.objectives.table import (
    OBJECTIVES,
    Bounds,
    Objective,
    Rules,
    TokenLossFunction,
    likelihood,
    rules,
)

#: Over what the token losses are averaged first: each rollout, each group, or all tokens.
LEVELS = ("seq", "group", "global")


def _known_classes(names: tuple[str, ...]) -> tuple[str, ...]:
    known = [name for name in names if name in BIN_NAMES]
    return tuple(expand_bins(known)) if known else ()


#: Beyond exp(MAX_LOG_RATIO) no ratio is ever clipped.
_MOST_CLIP = 1e9
_LOW = Limit(lambda value: 0 <= value <= 1, "0 to 1 (0 <= low <= 1 <= high)")
_HIGH = Limit(
    lambda value: 1 <= value <= _MOST_CLIP, f"1 to {_MOST_CLIP:g} (0 <= low <= 1 <= high)"
)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What a user may set of an objective; declared once, for `ObjectiveConfig` and the trainer."""

    clip_eps: float | None = setting(
        None, "Clip half-width of the importance ratio.", between(0, _MOST_CLIP),
        unset="the objective's own")
    mask_ratio_low: float = setting(
        0.8, "Lower clip bound of the ratio, dapo family.", _LOW)
    mask_ratio_high: float = setting(
        1.2, "Upper clip bound of the ratio, dapo family.", _HIGH)
    use_importance_sampling: bool = setting(
        True, "wapo only: false drops the ratio from the loss, -A log p.")
    include_bins: tuple[str, ...] = setting(
        (), "Train on tokens of these classes only, e.g. neg_peak or pos_peak,pos_valley.",
        cli=True)
    exclude_bins: tuple[str, ...] = setting(
        (), "Leave tokens of these classes out of the loss.", cli=True)
    loss_mean_level: str | None = setting(
        None, "Over what token losses are averaged first: seq, group or global.",
        unset="the objective's own")
    normalize_by_kept_tokens: bool = setting(
        False, "Average over the tokens kept after bins and gates instead of all.")
    mask_negative_advantages: bool = setting(
        False, "Drop rollouts with advantage <= 0; always done by raft, raft++ and wapo.")
    mask_positive_advantages: bool = setting(False, "Drop rollouts with advantage >= 0.")
    max_seq_len: int | None = setting(
        None, "Tokens of a longest sequence: the constant length in wapo's group mean.",
        between(1, 10_000_000), unset="max_new_tokens")
    official: bool = setting(
        False, "Reproduce the published code with its defects, see docs/objectives.md.")
# fmt: on


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(ObjectiveSettings):
    """Settings of one objective; checked when made.

    Raises UserError on any value that is not allowed, naming what is; also on settings that leave
    no token to train on, and on the fixed-length WAPO mean without ``max_seq_len``.
    """

    #: Objective, one of `OBJECTIVES`.
    name: str

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise unknown_name("objective", self.name, OBJECTIVES)
        check_settings(self)
        self._check_level()
        for field in ("include_bins", "exclude_bins"):
            object.__setattr__(self, field, self._checked_bins(field, getattr(self, field)))
        if self.rules.strict_names:
            self._check_something_is_kept()

    def _check_level(self) -> None:
        level = self.loss_mean_level
        if self.rules.strict_names and level is not None and level not in LEVELS:
            raise unknown_name("loss_mean_level", level, LEVELS)
        if (
            self.weight_rule == "fixed_length"
            and self.max_seq_len is None
            and not self.normalize_by_kept_tokens
        ):
            raise UserError(
                f"objective {self.name!r} at group level divides by a constant length: set "
                "max_seq_len (prompt + completion tokens), or loss_mean_level 'seq' or 'global'"
            )

    def _checked_bins(self, field: str, names: Iterable[str]) -> tuple[str, ...]:
        if isinstance(names, str):
            raise UserError(f"{field} must be a list of names, got the string {names!r}")
        checked = tuple(names)
        unknown = [name for name in checked if name not in BIN_NAMES]
        if unknown and self.rules.strict_names:
            raise unknown_name(f"bin in {field}", unknown[0], BIN_NAMES)
        return checked

    def _check_something_is_kept(self) -> None:
        if self.include_bins and self.exclude_bins:
            raise UserError("give include_bins or exclude_bins, not both")
        included = self.included_classes
        kept = set(CLASSES if included is None else included) - set(self.excluded_classes)
        dropped = {sign for sign, gone in self._gates.items() if gone}
        if all(name.partition("_")[0] in dropped for name in kept):
            raise UserError(
                f"these settings leave no token to train on: objective {self.name!r} with "
                f"advantage signs {sorted(dropped)} dropped and bins {sorted(kept)} left"
            )

    @property
    def _gates(self) -> dict[str, bool]:
        return {"neg": self.drops_negative, "pos": self.mask_positive_advantages}

    @property
    def rules(self) -> Rules:
        """Safe rules, or those of the published code."""
        return rules(self.official)

    @property
    def objective(self) -> Objective:
        """Its row of the table."""
        return OBJECTIVES[self.name]

    def advantages(self, rewards: ArrayLike, group: ArrayLike) -> FloatArray:
        """Advantage of every rollout within its group, shape (N,); see `group_advantages`."""
        return group_advantages(self.objective.advantage, rewards, group, self.official)

    @property
    def drops_negative(self) -> bool:
        """Rollouts with advantage <= 0 are dropped."""
        return self.mask_negative_advantages or self.objective.positive_only

    @property
    def level(self) -> str:
        """Level in force; an unknown name, which only the official rules let pass, means global."""
        level = self.loss_mean_level or self.objective.level
        return level if level in LEVELS else "global"

    @property
    def weight_rule(self) -> str:
        """How `batch_weights` averages: seq, group, global, fixed_length or longest."""
        objective = self.objective
        if self.loss_mean_level is None and objective.unset_rule is not None:
            return objective.unset_rule
        return objective.group_rule if self.level == "group" else self.level

    @property
    def uses_ratio(self) -> bool:
        """The loss contains an importance ratio."""
        return self.token_loss is not likelihood

    @property
    def token_loss(self) -> TokenLossFunction:
        """Token loss in force."""
        replacement = self.objective.without_ratio
        if self.use_importance_sampling or replacement is None:
            return self.objective.token_loss
        return replacement

    @property
    def bounds(self) -> Bounds:
        """Clip range in force."""
        chosen = self.objective.default_clip_eps if self.clip_eps is None else self.clip_eps
        eps = chosen or 0.0  # of rules without one
        low, high = {
            "two_sided": (1 - eps, 1 + eps),
            "upper": (0.0, 1 + eps),
            "ratio": (self.mask_ratio_low, self.mask_ratio_high),
            "none": (0.0, math.inf),
        }[self.objective.clip]
        return Bounds(low=low, high=high, max_log_ratio=self.rules.max_log_ratio)

    @property
    def needs_whole_minibatch(self) -> bool:
        """The weights depend on which tokens of the whole mini-batch are kept."""
        return self.normalize_by_kept_tokens and self.rules.kept_per_minibatch

    @property
    def included_classes(self) -> tuple[str, ...] | None:
        """Classes to train on; None without include_bins. Unknown names, if let pass, vanish."""
        if not self.include_bins:
            return None
        return _known_classes(self.include_bins)

    @property
    def excluded_classes(self) -> tuple[str, ...]:
        """Classes left out; none when include_bins is given, which wins where both are let pass."""
        if self.include_bins:
            return ()
        return _known_classes(self.exclude_bins)


FloatArray = NDArray[np.float64]

#: Added to the standard deviation of a group before dividing by it (GRPO's published code).
STD_OFFSET = 1e-8

#: A deviation from the group mean below this many rounding units of the largest reward is 0.
RESIDUAL_ULPS = 8

#: Beyond this the squared deviation could overflow.
LARGEST_REWARD = 1e100


def _sum_left_to_right(values: list[float]) -> float:
    """Add in order, one rounding a step; Python 3.12 made ``sum`` compensate, this never does."""
    total = 0.0
    for value in values:
        total += value
    return total


def _deviations_rounded(rewards: list[float]) -> list[float]:
    """Deviations from the mean of a plain sum, with whatever residue its rounding leaves."""
    mean = _sum_left_to_right(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def _deviations_exact(rewards: list[float]) -> list[float]:
    """Deviations from the exactly rounded mean, with rounding residues set to exactly 0."""
    mean = math.fsum(rewards) / len(rewards)
    floor = RESIDUAL_ULPS * np.finfo(np.float64).eps * max(abs(reward) for reward in rewards)
    return [0.0 if abs(reward - mean) <= floor else reward - mean for reward in rewards]


def _standardized(rewards: list[float], deviations: list[float]) -> list[float]:
    variance = _sum_left_to_right([d * d for d in deviations]) / len(deviations)
    scale = math.sqrt(variance) + STD_OFFSET
    return [d / scale for d in deviations]


def _centered(rewards: list[float], deviations: list[float]) -> list[float]:
    return deviations


def _raw(rewards: list[float], deviations: list[float]) -> list[float]:
    return rewards


#: Name -> function of one group's (rewards, deviations from their mean).
ADVANTAGE_KINDS: dict[str, Callable[[list[float], list[float]], list[float]]] = {
    "standardized": _standardized,
    "centered": _centered,
    "raw": _raw,
}


def _checked(rewards: ArrayLike, group: ArrayLike) -> tuple[FloatArray, NDArray[Any]]:
    reward_n = np.asarray(rewards, dtype=np.float64)
    group_n = np.asarray(group)
    if reward_n.ndim != 1 or reward_n.shape != group_n.shape:
        raise UserError(
            f"rewards and group must be one-dimensional and of equal length, "
            f"got shapes {reward_n.shape} and {group_n.shape}"
        )
    bad = np.flatnonzero(~(np.abs(reward_n) <= LARGEST_REWARD))
    if bad.size:
        raise UserError(
            f"reward {reward_n[bad[0]]} of rollout {bad[0]} is not usable; a reward must be a "
            f"finite number of size at most {LARGEST_REWARD:g}"
        )
    return reward_n, group_n


def group_advantages(
    kind: str, rewards: ArrayLike, group: ArrayLike, official: bool = False
) -> FloatArray:
    """Advantage of every rollout within its group.

    With mean and population standard deviation taken over the rollouts of one group::

        standardized   (r - mean) / (std + 1e-8)     GRPO, DAPO, GSPO
        centered       r - mean                      Dr. GRPO, Dr. DAPO, WAPO
        raw            r                             RAFT, RAFT++

    Returns advantages, in reward units (``standardized``: dimensionless), shape (N,). Raises
    UserError if the kind is unknown, the shapes differ, or a reward is not finite or beyond 1e100.

    Parameters
    ----------
    kind : {"standardized", "centered", "raw"}
        Which of the three.
    rewards : array_like of float, shape (N,)
        Reward of each rollout, in reward units.
    group : array_like of int, shape (N,)
        Group (prompt) of each rollout; members need not be adjacent.
    official : bool, default False
        Reproduce the official code bit for bit: sums run left to right in float64, so a group of
        equal fractional rewards may keep a residue of about 1e-17 whose sign decides whether
        positive-only objectives train on it. By default such a residue is exactly 0, and so is
        the deviation of a reward that equals its group's mean up to rounding.

    Notes
    -----
    Sources: Shao et al. 2024 (arXiv 2402.03300); Liu et al. 2025 (arXiv 2503.20783) for the
    centred form; Dong et al. 2023 (arXiv 2304.06767) for raw rewards.

    Examples
    --------
    >>> group_advantages("centered", [1.0, 0.0, 0.5, 0.5], [0, 0, 1, 1]).tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    if kind not in ADVANTAGE_KINDS:
        raise unknown_name("advantage kind", kind, ADVANTAGE_KINDS)
    reward_n, group_n = _checked(rewards, group)
    exact = rules(official).exact_deviations
    deviations_of = _deviations_exact if exact else _deviations_rounded
    advantage_n = np.zeros_like(reward_n)
    for member in np.unique(group_n):
        index = np.flatnonzero(group_n == member)
        values = reward_n[index].tolist()
        advantage_n[index] = ADVANTAGE_KINDS[kind](values, deviations_of(values))
    return advantage_n
