"""Checked settings of one objective.

An objective is a token loss plus three choices: how advantages are formed, over what the loss is
averaged, and whether only positive advantages are kept. `table.OBJECTIVES` declares them;
`ObjectiveConfig` adds the user's settings and answers what is in force. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from numpy.typing import ArrayLike
from wapo_taxonomy import CLASSES, expand_bins

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.objectives.advantages import FloatArray, group_advantages
from wapo_analysis.objectives.official import Rules, rules
from wapo_analysis.objectives.table import OBJECTIVES, Objective
from wapo_analysis.objectives.token_losses import Bounds, TokenLoss, TokenLossFunction

__all__ = [
    "BIN_NAMES",
    "LEVELS",
    "OBJECTIVES",
    "Bounds",
    "Objective",
    "ObjectiveConfig",
    "TokenLoss",
    "TokenLossFunction",
]

LEVELS = ("seq", "group", "global")
"""Over what the token losses are averaged first: each rollout, each group, or all tokens."""

BIN_NAMES = (*CLASSES, "pos", "neg", "peak", "valley")
"""What include_bins and exclude_bins accept."""


def _known_classes(names: tuple[str, ...]) -> tuple[str, ...]:
    known = [name for name in names if name in BIN_NAMES]
    return tuple(expand_bins(known)) if known else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Settings of one objective; checked when made.

    Raises
    ------
    UserError
        On any value that is not allowed, naming what is; also on settings that leave no token to
        train on, and on the fixed-length WAPO mean without ``max_seq_len``.
    """

    name: str
    """Objective, one of `OBJECTIVES`."""
    clip_eps: float | None = None
    """Clip half-width of the ratio; None takes the objective's default."""
    mask_ratio_low: float = 0.8
    """Lower ratio bound of the DAPO family, 0 to 1."""
    mask_ratio_high: float = 1.2
    """Upper ratio bound of the DAPO family, 1 or more."""
    use_importance_sampling: bool = True
    """False: WAPO uses -A log p without a ratio; no other objective changes."""
    include_bins: tuple[str, ...] = ()
    """Train on tokens of these classes only."""
    exclude_bins: tuple[str, ...] = ()
    """Train on all tokens but those of these classes."""
    loss_mean_level: str | None = None
    """``seq``, ``group``, ``global``; None takes the objective's default."""
    normalize_by_kept_tokens: bool = False
    """Average over the tokens kept after bins and gates instead of over all completion tokens."""
    mask_negative_advantages: bool = False
    """Drop rollouts with advantage <= 0."""
    mask_positive_advantages: bool = False
    """Drop rollouts with advantage >= 0."""
    max_seq_len: int | None = None
    """Tokens of a longest sequence, prompt included: the constant length of WAPO's group mean."""
    official: bool = False
    """Reproduce the official code with its defects (docs/objectives.md lists them)."""

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise unknown_name("objective", self.name, OBJECTIVES)
        self._check_clip()
        self._check_level()
        for field in ("include_bins", "exclude_bins"):
            object.__setattr__(self, field, self._checked_bins(field, getattr(self, field)))
        if self.rules.strict_names:
            self._check_something_is_kept()

    def _check_clip(self) -> None:
        eps = self.clip_eps
        if eps is not None and not (math.isfinite(eps) and eps >= 0):
            raise UserError(f"clip_eps must be a finite number >= 0, got {eps}")
        low, high = self.mask_ratio_low, self.mask_ratio_high
        if not (0 <= low <= 1 <= high < math.inf):
            raise UserError(
                "mask_ratio_low and mask_ratio_high must satisfy 0 <= low <= 1 <= high, "
                f"got {low} and {high}"
            )

    def _check_level(self) -> None:
        level = self.loss_mean_level
        if self.rules.strict_names and level is not None and level not in LEVELS:
            raise unknown_name("loss_mean_level", level, LEVELS)
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise UserError(f"max_seq_len must be a positive integer, got {self.max_seq_len}")
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
        return self.objective.clip != "none" and self.token_loss is self.objective.token_loss

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
        eps = self.objective.default_clip_eps if self.clip_eps is None else self.clip_eps
        low, high = {
            "two_sided": (1 - (eps or 0.0), 1 + (eps or 0.0)),
            "upper": (0.0, 1 + (eps or 0.0)),
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
