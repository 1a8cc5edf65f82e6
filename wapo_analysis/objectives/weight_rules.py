"""Weight rules: over what a batch's token losses are averaged, and by how much.

`weights.batch_weights` documents the formulas; here is each rule as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWeights:
    """How the token losses of a batch are averaged.

    Attributes
    ----------
    sequence_weight : Tensor, shape (N,)
        Weight of every token of a rollout.
    normalizer : float
        Number of units averaged over (rollouts, groups or tokens), at least 1.
    multiplier : float
        Factor of the weighted sum; with several ranks, before the mean over ranks.
    contributing : Tensor of bool, shape (N,)
        Rollouts that are counted.
    num_minibatches : int
        Optimizer steps the batch is split into.
    world_size : int
        Ranks whose gradients are averaged.
    """

    sequence_weight: Tensor
    normalizer: float
    multiplier: float
    contributing: Tensor
    num_minibatches: int = 1
    world_size: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of a weight rule, arrays of shape (N,); ``member`` numbers the groups from 0."""

    tokens: FloatArray
    member: NDArray[np.intp]
    contributing: BoolArray
    rollouts_per_prompt: int
    max_seq_len: int | None


def _per_sequence(b: Batch) -> tuple[FloatArray, float]:
    return 1 / np.maximum(b.tokens, 1), float(b.contributing.sum())


def _per_group(b: Batch) -> tuple[FloatArray, float]:
    total = np.bincount(b.member, weights=b.tokens * b.contributing)
    return 1 / np.maximum(total, 1)[b.member], float((total > 0).sum())


def _fixed_length(b: Batch) -> tuple[FloatArray, float]:
    if b.max_seq_len is None:
        raise UserError("max_seq_len is not set, but the loss divides by a constant group length")
    weight = np.full_like(b.tokens, 1 / (b.rollouts_per_prompt * b.max_seq_len))
    return weight, float(np.unique(b.member[b.contributing]).size)


def _per_token(b: Batch) -> tuple[FloatArray, float]:
    return np.ones_like(b.tokens), float((b.tokens * b.contributing).sum())


def _longest(b: Batch) -> tuple[FloatArray, float]:
    return np.ones_like(b.tokens), float(b.tokens.size * b.tokens.max(initial=0))


WEIGHT_RULES: dict[str, Callable[[Batch], tuple[FloatArray, float]]] = {
    "seq": _per_sequence,
    "group": _per_group,
    "fixed_length": _fixed_length,
    "global": _per_token,
    "longest": _longest,
}
"""Rule -> (weight of each rollout, number of units). See `batch_weights` for the formulas."""


def outer_multiplier(
    config: ObjectiveConfig, units: float, num_minibatches: int, world: int
) -> float:
    """Factor num_minibatches * world / units; official: float32, never above num_minibatches."""
    if config.official:
        divisor = max(np.float32(units) / np.float32(world), np.float32(1))
        return float(np.float32(num_minibatches) / divisor)
    return num_minibatches * world / units


def advantage_gate(config: ObjectiveConfig, advantage: FloatArray) -> BoolArray:
    """Rollouts whose advantage the objective's gates let through, shape (N,)."""
    passed = np.ones(advantage.shape, dtype=np.bool_)
    if config.drops_negative:
        passed &= advantage > 0
    if config.mask_positive_advantages:
        passed &= advantage < 0
    return passed
