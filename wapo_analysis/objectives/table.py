"""The objectives declared as data: token loss, advantage, mean and clip of each.

This module loads no torch, so help texts can list the objectives cheaply.
"""

from __future__ import annotations

from dataclasses import dataclass

from wapo_analysis.objectives.token_losses import (
    TokenLossFunction,
    likelihood,
    rollout_surrogate,
    token_surrogate,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One objective of the registry."""

    token_loss: TokenLossFunction
    """Loss of every position."""
    advantage: str
    """Kind of `group_advantages`."""
    level: str
    """Level of the mean when the user sets none."""
    clip: str
    """``two_sided`` or ``upper`` (by clip_eps), ``ratio`` (mask_ratio_low, _high) or ``none``."""
    default_clip_eps: float | None = None
    """clip_eps when the user sets none; None where clip_eps has no meaning."""
    positive_only: bool = False
    """Only rollouts with positive advantage are trained on."""
    unset_rule: str | None = None
    """Weight rule that replaces the level's own when the user sets no level."""
    group_rule: str = "group"
    """Weight rule at group level."""
    without_ratio: TokenLossFunction | None = None
    """Token loss for use_importance_sampling=False; None where that setting changes nothing."""
    unit_advantage: bool = False
    """The token loss takes 1 in the place of the advantage."""
    doc: str
    """One line for help texts."""


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(
        token_loss=token_surrogate,
        advantage="standardized",
        level="seq",
        clip="two_sided",
        default_clip_eps=0.2,
        doc="standardised advantage, ratio clipped to 1 +- clip_eps, mean per rollout",
    ),
    "dr_grpo": Objective(
        token_loss=token_surrogate,
        advantage="centered",
        level="global",
        clip="two_sided",
        default_clip_eps=0.2,
        unset_rule="longest",
        doc="GRPO with centred advantage and one constant length (the batch's longest rollout)",
    ),
    "dapo": Objective(
        token_loss=token_surrogate,
        advantage="standardized",
        level="group",
        clip="ratio",
        doc="standardised advantage, separate clip bounds, mean over a group's tokens",
    ),
    "dr_dapo": Objective(
        token_loss=token_surrogate,
        advantage="centered",
        level="group",
        clip="ratio",
        doc="DAPO with centred advantage",
    ),
    "dr_dapo_seq": Objective(
        token_loss=token_surrogate,
        advantage="centered",
        level="seq",
        clip="ratio",
        doc="DAPO with centred advantage and a mean per rollout",
    ),
    "gspo": Objective(
        token_loss=rollout_surrogate,
        advantage="standardized",
        level="seq",
        clip="two_sided",
        default_clip_eps=0.04,
        doc="one ratio per rollout (geometric mean of its token ratios), clipped",
    ),
    "raft": Objective(
        token_loss=likelihood,
        advantage="raw",
        level="seq",
        clip="none",
        positive_only=True,
        unit_advantage=True,
        doc="log-likelihood of the rollouts with positive reward",
    ),
    "raft++": Objective(
        token_loss=token_surrogate,
        advantage="raw",
        level="seq",
        clip="upper",
        default_clip_eps=0.2,
        positive_only=True,
        doc="RAFT with reward as weight and the ratio clipped above",
    ),
    "wapo": Objective(
        token_loss=token_surrogate,
        advantage="centered",
        level="group",
        clip="upper",
        default_clip_eps=9.0,
        positive_only=True,
        group_rule="fixed_length",
        without_ratio=likelihood,
        doc="positive centred advantages only, ratio clipped above, constant group length",
    ),
}
"""Every objective by the name users type."""
