"""Over what a batch's token losses are averaged: weights, normaliser and multiplier.

The loss of a mini-batch is ``multiplier * sum(token_loss * kept * weight of its rollout)``; the
sum may be split over micro-batches in any way. N rollouts, B rollouts of a mini-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWeights:
    """How the token losses of a batch are averaged."""

    #: (N,): weight of every token of a rollout.
    sequence_weight: Tensor
    #: Number of units averaged over (rollouts, groups or tokens), at least 1.
    normalizer: float
    #: Factor of the weighted sum; with several ranks, before the mean over ranks.
    multiplier: float
    #: Optimizer steps the batch is split into.
    num_minibatches: int

    def on(self, device: torch.device) -> BatchWeights:
        """The same with its tensors on a device."""
        return replace(self, sequence_weight=self.sequence_weight.to(device))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs of a weight rule, arrays of shape (N,); ``member`` numbers the groups from 0."""

    tokens: FloatArray
    member: NDArray[np.intp]
    contributing: BoolArray
    rollouts_per_prompt: int
    max_seq_len: int | None


def _per_sequence(b: _Batch) -> tuple[FloatArray, float]:
    return 1 / np.maximum(b.tokens, 1), float(b.contributing.sum())


def _per_group(b: _Batch) -> tuple[FloatArray, float]:
    total = np.bincount(b.member, weights=b.tokens * b.contributing)
    return 1 / np.maximum(total, 1)[b.member], float((total > 0).sum())


def _fixed_length(b: _Batch) -> tuple[FloatArray, float]:
    if b.max_seq_len is None:
        raise UserError("max_seq_len is not set, but the loss divides by a constant group length")
    weight = np.full_like(b.tokens, 1 / (b.rollouts_per_prompt * b.max_seq_len))
    return weight, float(np.unique(b.member[b.contributing]).size)


def _per_token(b: _Batch) -> tuple[FloatArray, float]:
    return np.ones_like(b.tokens), float((b.tokens * b.contributing).sum())


def _longest(b: _Batch) -> tuple[FloatArray, float]:
    return np.ones_like(b.tokens), float(b.tokens.size * b.tokens.max(initial=0))


#: Rule -> (weight of each rollout, number of units). See `batch_weights` for the formulas.
WEIGHT_RULES: dict[str, Callable[[_Batch], tuple[FloatArray, float]]] = {
    "seq": _per_sequence,
    "group": _per_group,
    "fixed_length": _fixed_length,
    "global": _per_token,
    "longest": _longest,
}


def _multiplier(config: ObjectiveConfig, units: float, num_minibatches: int, world: int) -> float:
    """num_minibatches * world / units, or the published float32, never above num_minibatches."""
    if config.rules.fair_units:
        return num_minibatches * world / units
    divisor = max(np.float32(units) / np.float32(world), np.float32(1))
    return float(np.float32(num_minibatches) / divisor)


def _advantage_gate(config: ObjectiveConfig, advantage: FloatArray) -> BoolArray:
    """Rollouts whose advantage the objective's gates let through, shape (N,)."""
    passed = np.ones(advantage.shape, dtype=np.bool_)
    if config.drops_negative:
        passed &= advantage > 0
    if config.mask_positive_advantages:
        passed &= advantage < 0
    return passed


def batch_weights(
    config: ObjectiveConfig,
    advantages: ArrayLike,
    token_counts: ArrayLike,
    group: ArrayLike,
    rollouts_per_prompt: int,
    num_minibatches: int = 1,
    world_size: int = 1,
) -> BatchWeights:
    """Weight of each rollout of a whole batch, before any kept-token normalisation.

    With n_i completion tokens of rollout i and "contributing" = not dropped by its advantage::

        rule           weight w_i                                  units Z
        seq            1 / max(n_i, 1)                             contributing rollouts
        group          1 / sum of n_j over contributing members    groups where that sum > 0
        fixed_length   1 / (rollouts_per_prompt * max_seq_len)     groups with a contributing member
        global         1                                           tokens of contributing rollouts
        longest        1                                           N * max_i n_i

    multiplier = num_minibatches * world_size / max(Z, 1), so one mini-batch's loss estimates the
    batch mean and a mean of gradients over ranks is the mean over the whole batch. Returns float64
    weights on the CPU. Raises UserError if shapes differ, a count is negative or a size is below 1.

    Parameters
    ----------
    config : ObjectiveConfig
        Objective settings; ``config.weight_rule`` picks the row.
    advantages : array_like of float, shape (N,)
        Advantage of each rollout.
    token_counts : array_like of int, shape (N,)
        Completion tokens of each rollout that the loss mask lets in.
    group : array_like of int, shape (N,)
        Group (prompt) of each rollout.
    rollouts_per_prompt : int
        Rollouts sampled per prompt.
    num_minibatches, world_size : int
        Optimizer steps per batch; ranks that share it.

    Notes
    -----
    Source: the published WAPO code; ``fixed_length`` is WAPO's mean (arXiv 2606.16154),
    ``longest`` that code's Dr. GRPO. Its own rules compute the multiplier in float32 and hold
    Z / world_size at 1 or more, which shrinks updates with fewer units than ranks.
    """
    advantage_n = np.asarray(advantages, dtype=np.float64)
    tokens_n = np.asarray(token_counts, dtype=np.float64)
    group_n = np.asarray(group)
    if not advantage_n.shape == tokens_n.shape == group_n.shape or advantage_n.ndim != 1:
        raise UserError(
            "advantages, token_counts and group must be one-dimensional and of equal length, got "
            f"shapes {advantage_n.shape}, {tokens_n.shape} and {group_n.shape}"
        )
    if (tokens_n < 0).any() or min(rollouts_per_prompt, num_minibatches, world_size) < 1:
        raise UserError(
            "token_counts must be >= 0; rollouts_per_prompt, num_minibatches and world_size >= 1"
        )
    contributing = _advantage_gate(config, advantage_n)
    member = np.unique(group_n, return_inverse=True)[1]
    weight, units = WEIGHT_RULES[config.weight_rule](
        _Batch(tokens_n, member, contributing, rollouts_per_prompt, config.max_seq_len)
    )
    units = max(units, 1.0)
    return BatchWeights(
        sequence_weight=torch.from_numpy(weight),
        normalizer=units,
        multiplier=_multiplier(config, units, num_minibatches, world_size),
        num_minibatches=num_minibatches,
    )


def _group_totals(count_B: Tensor, group: Tensor) -> Tensor:
    """Sum of the counts over each rollout's group, repeated for every member."""
    member_B = torch.unique(group, return_inverse=True)[1]
    return torch.zeros_like(count_B).scatter_add_(0, member_B, count_B)[member_B]


_KEPT_TOTALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "seq": lambda count, group: count,
    "group": _group_totals,
    "global": lambda count, group: count.sum().expand_as(count),
}


def _kept_per_microbatch(
    config: ObjectiveConfig, count_B: Tensor, group: Tensor, batch: BatchWeights
) -> BatchWeights:
    """Weigh as the published code: float32, a phantom token for each fully dropped rollout."""
    is_global = config.level == "global"
    phantom_B = count_B.float() if is_global else count_B.float().clamp(min=1)
    weight = 1 / _KEPT_TOTALS[config.level](phantom_B, group).clamp(min=1)
    return replace(
        batch,
        sequence_weight=weight,
        normalizer=1.0 if is_global else batch.normalizer,
        multiplier=float(batch.num_minibatches) if is_global else batch.multiplier,
    )


def kept_token_weights(
    config: ObjectiveConfig, keep: Tensor, group: Tensor, batch: BatchWeights
) -> BatchWeights:
    """Weights of a mini-batch averaged over the tokens that are really kept.

    With k_i kept tokens of rollout i, over the rollouts passed in::

        seq      1 / k_i                            units: rollouts with k_i > 0
        group    1 / sum of k_j over the group      units: groups with a kept token
        global   1 / sum of all k_j                 units: 1

    multiplier = 1 / units: the loss is the mean over rollouts (or groups) of each one's mean over
    kept tokens, or the mean over all kept tokens. With several ranks each averages its own rows.
    Returns weights on ``keep``'s device.

    Parameters
    ----------
    config : ObjectiveConfig
        Objective settings; only the level and the rules matter here.
    keep : Tensor of bool, shape (B, T)
        Kept tokens (`loss.keep_tokens`) of one whole mini-batch.
    group : Tensor of int, shape (B,)
        Group of each rollout.
    batch : BatchWeights
        Weights of the whole batch.

    Notes
    -----
    Source: the published WAPO code. Under its own rules (``config.needs_whole_minibatch`` is False)
    the call must pass one micro-batch, as there: float32 weights, one phantom token for each fully
    dropped rollout, the batch's own normaliser at seq and group level, and at global level
    micro-batch means that add up.
    """
    count_B = keep.sum(1)
    if not config.rules.kept_per_minibatch:
        return _kept_per_microbatch(config, count_B, group, batch)
    count_B = count_B.double()
    total_B = _KEPT_TOTALS[config.level](count_B, group)
    weight_B = torch.where(count_B > 0, 1 / total_B, 0.0)
    # The weighted counts of one unit add up to 1, so their sum is the number of units.
    units = max(round(float((weight_B * count_B).sum())), 1)
    return replace(
        batch,
        sequence_weight=weight_B,
        normalizer=float(units),
        multiplier=1.0 / units,
    )


def minibatch_weights(
    config: ObjectiveConfig, batch: BatchWeights, rows: Tensor, keep: Tensor, group: Tensor
) -> BatchWeights:
    """Weights of one mini-batch under either normalisation.

    Returns `kept_token_weights` with ``normalize_by_kept_tokens``, else the rows of ``batch``.

    Parameters
    ----------
    batch : BatchWeights
        Weights of the whole batch (`batch_weights`).
    rows : Tensor of int64, shape (B,)
        Rollouts of the mini-batch.
    keep : Tensor of bool, shape (B, T)
        Their kept tokens.
    group : Tensor of int, shape (B,)
        Their groups.
    """
    if config.normalize_by_kept_tokens:
        return kept_token_weights(config, keep, group, batch)
    rows = rows.to(batch.sequence_weight.device)
    return replace(batch, sequence_weight=batch.sequence_weight[rows].to(keep.device))
