"""The objectives declared as data, over their three token losses; the published code's own rules.

Loads no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

#: Largest |log-ratio| in nats; exp(20) = 4.9e8 lies far above every clip range in use.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Range of the clipped ratio, and the largest |log-ratio| (nats) that is exponentiated.

    ``low = 0`` clips on the upper side only. A log-ratio beyond ``max_log_ratio`` is held there
    and passes no gradient, so no ratio overflows; ``inf`` leaves every ratio as it is.
    """

    low: float
    high: float
    max_log_ratio: float


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Loss of every position, before mask, weight and mean."""

    #: (B, T): differentiable token loss.
    loss: Tensor
    #: (B, T): importance ratio: of the token, for GSPO of the sequence. Detached.
    ratio: Tensor
    #: (B, T): the clip branch is active, so the position gets no gradient.
    clipped: Tensor


class TokenLossFunction(Protocol):
    """What every token loss looks like."""

    def __call__(
        self, logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
    ) -> TokenLoss:
        """Return the loss of every position."""


def _surrogate(log_ratio_BT: Tensor, advantage: Tensor, bounds: Bounds) -> TokenLoss:
    """``-min(x A, clip(x) A)`` with x = exp(log-ratio)."""
    limit = bounds.max_log_ratio
    ratio_BT = log_ratio_BT.clamp(-limit, limit).exp()
    advantage_B1 = advantage.unsqueeze(1)
    plain_BT = ratio_BT * advantage_B1
    held_BT = ratio_BT.clamp(bounds.low, bounds.high) * advantage_B1
    clipped_BT = (plain_BT > held_BT) | (log_ratio_BT.abs() > limit)
    return TokenLoss(-plain_BT.minimum(held_BT), ratio_BT.detach(), clipped_BT.detach())


def token_surrogate(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """Clipped surrogate on the token ratio x = p / p_old: GRPO, DAPO, RAFT++, WAPO and relatives.

    ``-min(x A, clip(x, low, high) A)``; low = 0 clips above only. Sources: Shao et al. 2024 (arXiv
    2402.03300), eq. 3, without its KL term; Yu et al. 2025 (arXiv 2503.14476) for a bound of its
    own on each side; the WAPO paper (arXiv 2606.16154) for the upper bound alone. Returns loss,
    ratio and clip flag of every position.

    Parameters
    ----------
    logp, logp_old : Tensor, shape (B, T)
        Log-probabilities in nats under the trained and the behaviour policy.
    advantage : Tensor, shape (B,)
        Advantage of each rollout.
    mask : Tensor, shape (B, T)
        Completion tokens; unused here, the ratio is per token.
    bounds : Bounds
        Clip range.
    """
    return _surrogate(logp - logp_old, advantage, bounds)


def rollout_surrogate(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """Clipped surrogate with one ratio per rollout, the geometric mean over its tokens: GSPO.

    ``x_i = exp( sum_t m_t (logp_t - logp_old_t) / n_i )`` with n_i = number of masked-in tokens
    (an empty rollout has ratio 1). Source: Zheng et al. 2025 (arXiv 2507.18071).
    Parameters as `token_surrogate`.
    """
    mask_BT = mask.to(logp.dtype)
    total_B1 = ((logp - logp_old) * mask_BT).sum(1, keepdim=True)
    mean_B1 = total_B1 / mask_BT.sum(1, keepdim=True).clamp(min=1.0)
    return _surrogate(mean_B1.expand_as(logp), advantage, bounds)


def likelihood(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """Advantage-weighted likelihood ``-A log p``: RAFT (A = 1) and WAPO without a ratio.

    The ratio is not in the loss but still reported. Sources: Dong et al. 2023 (arXiv 2304.06767);
    the WAPO paper (arXiv 2606.16154), its on-policy form. Parameters as `token_surrogate`.
    """
    limit = bounds.max_log_ratio
    ratio_BT = (logp - logp_old).detach().clamp(-limit, limit).exp()
    unclipped_BT = ratio_BT.new_zeros(ratio_BT.shape).bool()
    return TokenLoss(-advantage.unsqueeze(1) * logp, ratio_BT, unclipped_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One objective of the registry."""

    #: Loss of every position.
    token_loss: TokenLossFunction
    #: Kind of `group_advantages`.
    advantage: str
    #: Level of the mean when the user sets none.
    level: str
    #: ``two_sided`` or ``upper`` (by clip_eps), ``ratio`` (mask_ratio_low, _high) or ``none``.
    clip: str
    #: clip_eps when the user sets none; None where clip_eps has no meaning.
    default_clip_eps: float | None = None
    #: Only rollouts with positive advantage are trained on.
    positive_only: bool = False
    #: Weight rule that replaces the level's own when the user sets no level.
    unset_rule: str | None = None
    #: Weight rule at group level.
    group_rule: str = "group"
    #: Token loss for use_importance_sampling=False; None where that setting changes nothing.
    without_ratio: TokenLossFunction | None = None
    #: The token loss takes 1 in the place of the advantage.
    unit_advantage: bool = False
    #: One line for help texts.
    doc: str


#: Every objective by the name users type.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Where the published code (layer6ai-labs/wapo) has a defect; the defaults are the safe side.

    One object of named rules, read by `wapo_analysis.objectives` alone: whoever trains, watches or
    replays calls the same functions either way. docs/objectives.md tells each rule in words;
    tests/unit/objectives/test_hazards.py holds both sides of every known defect.
    """

    #: r - mean of rounding size is exactly 0; else sums run left to right and residues stay.
    exact_deviations: bool = True
    #: A zero advantage belongs to no class; else it is positive in bins.
    zero_has_no_class: bool = True
    #: Largest |log-ratio| (nats) that is exponentiated.
    max_log_ratio: float = MAX_LOG_RATIO
    #: Nothing outside the kept tokens reaches value or gradient; else masks multiply, NaN too.
    masks_select: bool = True
    #: Kept tokens are counted over the mini-batch; else per micro-batch, with phantom tokens.
    kept_per_minibatch: bool = True
    #: The mean is over the units of all ranks, float64; else held at one unit a rank, float32.
    fair_units: bool = True
    #: Unknown bins and levels, and settings that keep no token, are refused; else ignored.
    strict_names: bool = True


SAFE = Rules()
OFFICIAL = Rules(
    exact_deviations=False,
    zero_has_no_class=False,
    max_log_ratio=math.inf,
    masks_select=False,
    kept_per_minibatch=False,
    fair_units=False,
    strict_names=False,
)


def rules(official: bool) -> Rules:
    """Rules in force: the published code's own, or the safe ones."""
    return OFFICIAL if official else SAFE
