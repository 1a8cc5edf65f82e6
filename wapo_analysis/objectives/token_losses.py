"""The token losses: plain functions of log-probabilities, advantages and a clip range.

Three serve every objective (`table.OBJECTIVES` says which and how): the clipped surrogate with a
ratio per token or per rollout, and the weighted likelihood.

Shapes: B rollouts, T completion positions. ``logp`` and ``logp_old`` (B, T) are the sampled
token's log-probability in nats under the policy that is trained and under the behaviour policy
that sampled it, ``advantage`` (B,) is constant over a rollout, ``mask`` (B, T) marks completion
tokens. Below, x is an importance ratio, A the advantage and clip(x) the ratio held in
[bounds.low, bounds.high]. The clipped surrogate is ``-min(x A, clip(x) A)``; a ratio exactly on a
bound still passes its whole gradient. Nothing here masks, weights or averages: ``loss`` and
``weights`` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Largest |log-ratio| in nats; exp(20) = 4.9e8 lies far above every clip range in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Range of the clipped ratio, and the largest |log-ratio| (nats) that is exponentiated.

    ``low = 0`` clips on the upper side only. A log-ratio beyond ``max_log_ratio`` is held there
    and passes no gradient, so no ratio overflows; ``inf`` leaves every ratio as it is.
    """

    low: float = 0.0
    high: float = float("inf")
    max_log_ratio: float = MAX_LOG_RATIO


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Loss of every position, before mask, weight and mean.

    Attributes
    ----------
    loss : Tensor, shape (B, T)
        Differentiable token loss.
    ratio : Tensor, shape (B, T)
        Importance ratio: of the token, for GSPO of the sequence. Detached.
    clipped : Tensor of bool, shape (B, T)
        The clip branch is active, so the position gets no gradient.
    """

    loss: Tensor
    ratio: Tensor
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
    advantage_B1 = advantage.unsqueeze(-1)
    plain_BT = ratio_BT * advantage_B1
    held_BT = ratio_BT.clamp(bounds.low, bounds.high) * advantage_B1
    clipped_BT = (plain_BT > held_BT) | (log_ratio_BT.abs() > limit)
    return TokenLoss(-plain_BT.minimum(held_BT), ratio_BT.detach(), clipped_BT.detach())


def token_surrogate(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """Clipped surrogate on the token ratio x = p / p_old: GRPO, DAPO, RAFT++, WAPO and relatives.

    ``-min(x A, clip(x, low, high) A)``; low = 0 clips above only. Sources: Shao et al. 2024
    (arXiv 2402.03300), eq. 3, without its KL term; Yu et al. 2025 (arXiv 2503.14476) for a bound of
    its own on each side; the WAPO paper (arXiv 2606.16154) for the upper bound alone.

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

    Returns
    -------
    TokenLoss
        Loss, ratio and clip flag of every position.
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
    total_B1 = ((logp - logp_old) * mask_BT).sum(-1, keepdim=True)
    mean_B1 = total_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1.0)
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
    return TokenLoss(-advantage.unsqueeze(-1) * logp, ratio_BT, unclipped_BT)
