"""The nine token losses: plain functions of log-probabilities, advantages and a clip range.

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


def _clipped_surrogate(log_ratio_BT: Tensor, advantage: Tensor, bounds: Bounds) -> TokenLoss:
    """``-min(x A, clip(x) A)`` with x = exp(log-ratio): the core that seven objectives share."""
    limit = bounds.max_log_ratio
    ratio_BT = log_ratio_BT.clamp(-limit, limit).exp()
    advantage_B1 = advantage.unsqueeze(-1)
    plain_BT = ratio_BT * advantage_B1
    held_BT = ratio_BT.clamp(bounds.low, bounds.high) * advantage_B1
    clipped_BT = (plain_BT > held_BT) | (log_ratio_BT.abs() > limit)
    return TokenLoss(-plain_BT.minimum(held_BT), ratio_BT.detach(), clipped_BT.detach())


def _weighted_likelihood(
    logp: Tensor, logp_old: Tensor, factor_BT: Tensor, bounds: Bounds
) -> TokenLoss:
    """``-factor * log p``: no ratio in the loss; the ratio is still reported, detached."""
    limit = bounds.max_log_ratio
    ratio_BT = (logp - logp_old).detach().clamp(-limit, limit).exp()
    return TokenLoss(-factor_BT * logp, ratio_BT, ratio_BT.new_zeros(ratio_BT.shape).bool())


def dapo_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """DAPO: clipped surrogate on the token ratio x = p / p_old, with its own bound on each side.

    ``-min(x A, clip(x, low, high) A)``. Source: Yu et al. 2025 (arXiv 2503.14476).

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
    return _clipped_surrogate(logp - logp_old, advantage, bounds)


def grpo_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """GRPO: DAPO's surrogate with equal clips, low = 1 - eps and high = 1 + eps; no KL term.

    Source: Shao et al. 2024 (arXiv 2402.03300), eq. 3. Parameters as `dapo_token_loss`.
    """
    return dapo_token_loss(logp, logp_old, advantage, mask, bounds)


def dr_grpo_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """Dr. GRPO: GRPO's token loss; it differs in the advantage (centred) and in the mean.

    Source: Liu et al. 2025 (arXiv 2503.20783). Parameters as `dapo_token_loss`.
    """
    return dapo_token_loss(logp, logp_old, advantage, mask, bounds)


def dr_dapo_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """Dr. DAPO: DAPO's token loss with the centred advantage of Dr. GRPO.

    Source: baseline of the WAPO paper (arXiv 2606.16154). Parameters as `dapo_token_loss`.
    """
    return dapo_token_loss(logp, logp_old, advantage, mask, bounds)


def dr_dapo_seq_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """Dr. DAPO averaged per rollout first: `dr_dapo_token_loss` with sequence-level means.

    Source: baseline of the WAPO paper (arXiv 2606.16154). Parameters as `dapo_token_loss`.
    """
    return dapo_token_loss(logp, logp_old, advantage, mask, bounds)


def gspo_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """GSPO: the clipped surrogate with one ratio per sequence, the geometric mean over its tokens.

    ``x_i = exp( sum_t m_t (logp_t - logp_old_t) / n_i )`` with n_i = number of masked-in tokens
    (an empty sequence has ratio 1). Source: Zheng et al. 2025 (arXiv 2507.18071).
    Parameters as `dapo_token_loss`.
    """
    mask_BT = mask.to(logp.dtype)
    total_B1 = ((logp - logp_old) * mask_BT).sum(-1, keepdim=True)
    mean_B1 = total_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1.0)
    return _clipped_surrogate(mean_B1.expand_as(logp), advantage, bounds)


def raft_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """RAFT: ``-log p``, supervised learning on the rewarded rollouts; ratio and A are not used.

    Source: Dong et al. 2023 (arXiv 2304.06767). Parameters as `dapo_token_loss`.
    """
    return _weighted_likelihood(logp, logp_old, logp.new_ones(()), bounds)


def raft_plus_plus_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """RAFT++: the surrogate on rewarded rollouts, A = reward, ratio clipped above only.

    Source: Xiong et al. 2025 (arXiv 2504.11343). Parameters as `dapo_token_loss`.
    """
    return dapo_token_loss(logp, logp_old, advantage, mask, bounds)


def wapo_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """WAPO: the surrogate on positive centred advantages only, ratio clipped above only.

    ``-min(x, 1 + eps) A`` for A > 0; rollouts with A <= 0 are dropped.
    Source: the WAPO paper (arXiv 2606.16154). Parameters as `dapo_token_loss`.
    """
    return dapo_token_loss(logp, logp_old, advantage, mask, bounds)


def wapo_no_ratio_token_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, bounds: Bounds
) -> TokenLoss:
    """WAPO without importance sampling: ``-A log p``, advantage-weighted likelihood.

    Source: the WAPO paper (arXiv 2606.16154), its on-policy form. Parameters as
    `dapo_token_loss`.
    """
    return _weighted_likelihood(logp, logp_old, advantage.unsqueeze(-1), bounds)
