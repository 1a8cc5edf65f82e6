"""The published WAPO code's own diagnostics, recomputed for verification; training uses none.

Shapes: B rollouts of one micro-batch, T positions. Sums are reported in float32 as there. The
definitions, with their oddities, are listed in docs/objectives.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.gold.tokens import (
    Microbatch,
    grad_magnitude,
    is_clipped,
    token_strength,
)

PROB_BINS = {
    "0-0.01": (0.0, 0.01),
    "0.01-0.1": (0.01, 0.1),
    "0.1-0.25": (0.1, 0.25),
    "0.25-0.5": (0.25, 0.5),
    "0.5-1.0": (0.5, 1.0),
}
"""Half-open probability bins; p = 1 is in none of them."""

FINE_BINS = 50
TOKEN_BINS = ("pos_valley", "pos_peak", "neg_valley", "neg_peak")
COUNT_KEYS = (
    "clipped_tokens",
    "total_kept_tokens",
    "clipped_tokens_pos",
    "kept_tokens_pos",
    "clipped_tokens_neg",
    "kept_tokens_neg",
    "clipped_fraction",
)
SUMMARY_KEYS = (
    "importance_sampling",
    "entropy",
    "mismatch_kl",
    "tv_distance",
    "chi_squared",
    "perplexity_mean",
    "prob_train_mean",
    "prob_train_min",
    "prob_train_max",
    "entropy_pos",
    "entropy_neg",
    "perplexity_pos",
    "perplexity_neg",
    "weighted_prob_pos",
    "weighted_prob_neg",
)

__all__ = [
    "COUNT_KEYS",
    "FINE_BINS",
    "PROB_BINS",
    "SUMMARY_KEYS",
    "TOKEN_BINS",
    "Microbatch",
    "bin_counts",
    "binned",
    "clip_counts",
    "fine_edges",
    "grad_magnitude",
    "is_clipped",
    "logged_metrics",
    "summaries",
    "token_strength",
]

FloatArray = NDArray[np.float64]


def clip_counts(batch: Microbatch) -> FloatArray:
    """Clip counters in the order of `COUNT_KEYS`."""
    clipped, keep, sign = is_clipped(batch), batch.keep, batch.sign
    if not batch.config.uses_ratio:
        return np.array([0.0, max(int(keep.sum()), 1), 0, 0, 0, 0, 0])
    counts = [int(clipped.sum()), int(keep.sum())]
    for side in (sign > 0, sign < 0):
        counts += [int((clipped & side).sum()), int((keep & side).sum())]
    return np.array([*counts, counts[0] / max(counts[1], 1)], dtype=np.float64)


def bin_counts(batch: Microbatch) -> NDArray[np.int64]:
    """Tokens per `TOKEN_BINS` x (in the loss mask, kept); zero advantage counts as positive."""
    is_positive = batch.sign >= 0
    rows = []
    for name in TOKEN_BINS:
        side = is_positive if name.startswith("pos") else ~is_positive
        inside = batch.mask & side & (batch.valley == name.endswith("valley"))
        rows.append([int(inside.sum()), int((inside & batch.keep).sum())])
    return np.array(rows)


def _sides(batch: Microbatch) -> tuple[Tensor, Tensor]:
    return batch.mask & (batch.sign > 0), batch.mask & (batch.sign < 0)


def _sum32(values: Tensor) -> float:
    return float(values.to(torch.float32).sum())


def binned(
    batches: Sequence[Microbatch], values: Sequence[Tensor], edges: Sequence[tuple[float, float]]
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Sum and number of values per probability bin x sign, over loss-mask tokens.

    Parameters
    ----------
    batches : sequence of Microbatch
        Micro-batches to add up.
    values : sequence of Tensor, shape (B, T) each
        Value of each token.
    edges : sequence of (float, float)
        Half-open bins of the token probability.

    Returns
    -------
    sums, counts : ndarray, shape (len(edges), 2)
        Second axis: positive, negative advantage (zero is in neither).
    """
    sums = np.zeros((len(edges), 2))
    counts = np.zeros((len(edges), 2), dtype=np.int64)
    for batch, value in zip(batches, values, strict=True):
        prob = batch.logp.exp()
        for column, side in enumerate(_sides(batch)):
            for row, (low, high) in enumerate(edges):
                chosen = value[side & (prob >= low) & (prob < high)]
                sums[row, column] += _sum32(chosen)
                counts[row, column] += chosen.numel()
    return sums, counts


def fine_edges() -> list[tuple[float, float]]:
    """Return the 50 equal probability bins of the fine token-strength plot."""
    edges = np.linspace(0, 1, FINE_BINS + 1).tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def _per_sequence_means(batch: Microbatch) -> dict[str, Tensor]:
    """Per-rollout values of the non-empty rollouts, shape (number of them,)."""
    filled = batch.lengths > 0
    mask = batch.mask.to(batch.logp.dtype)
    length = batch.lengths.clamp(min=1)
    gap = (batch.logp.exp() - batch.logp_old.exp()).abs()
    return {
        "tv_distance": torch.where(batch.mask, gap, torch.zeros_like(gap)).amax(-1)[filled],
        "chi_squared": ((batch.token_ratio**2 * mask).sum(-1) / length - 1)[filled],
        "perplexity": (-(batch.logp * mask).sum(-1) / length).exp()[filled],
        "entropy": ((batch.entropy * mask).sum(-1) / length)[filled],
        "positive": (batch.advantage >= 0)[filled],
    }


def _weighted_prob(batch: Microbatch, side: Tensor) -> Tensor:
    """Mean probability of the kept tokens of one sign, weighted by |token strength|; shape (1,)."""
    strength = token_strength(batch).abs() * (batch.keep & side).to(batch.logp.dtype)
    mean = (batch.logp.exp() * strength).sum() / (strength.sum() + 1e-8)
    return mean.unsqueeze(0)


def summaries(batch: Microbatch) -> tuple[FloatArray, FloatArray]:
    """Sum and number of values per key of `SUMMARY_KEYS`, over one micro-batch.

    Parameters
    ----------
    batch : Microbatch
        What the loss saw.

    Returns
    -------
    sums, counts : ndarray of float64, shape (15,)
        The published metric is the sum of sums over the sum of counts.
    """
    prob = batch.logp.exp()[batch.mask]
    ratio, log_ratio = batch.token_ratio[batch.mask], batch.log_ratio[batch.mask]
    rollout = _per_sequence_means(batch)
    positive = rollout["positive"]
    values = {
        "importance_sampling": batch.sequence_ratio,
        "entropy": batch.entropy[batch.mask],
        "mismatch_kl": ratio - log_ratio - 1,
        "tv_distance": rollout["tv_distance"],
        "chi_squared": rollout["chi_squared"],
        "perplexity_mean": rollout["perplexity"],
        "prob_train_mean": prob,
        "prob_train_min": prob.amin(0, keepdim=True) if prob.numel() else prob,
        "prob_train_max": prob.amax(0, keepdim=True) if prob.numel() else prob,
        "entropy_pos": rollout["entropy"][positive],
        "entropy_neg": rollout["entropy"][~positive],
        "perplexity_pos": rollout["perplexity"][positive],
        "perplexity_neg": rollout["perplexity"][~positive],
        "weighted_prob_pos": _weighted_prob(batch, batch.sign > 0),
        "weighted_prob_neg": _weighted_prob(batch, batch.sign < 0),
    }
    sums = [_sum32(values[key]) for key in SUMMARY_KEYS]
    return np.array(sums), np.array([float(values[key].numel()) for key in SUMMARY_KEYS])


def logged_metrics(sums: FloatArray, counts: FloatArray, clip: FloatArray) -> Mapping[str, float]:
    """Metrics of one optimizer-step batch as logged.

    Parameters
    ----------
    sums, counts : ndarray, shape (M, 15)
        `summaries` of each micro-batch.
    clip : ndarray, shape (M, 7)
        `clip_counts` of each micro-batch.

    Returns
    -------
    mapping of str to float
        Keys without a single value are absent.
    """
    metrics = {
        "importance_ratio" if key == "importance_sampling" else key: float(total / number)
        for key, total, number in zip(SUMMARY_KEYS, sums.sum(0), counts.sum(0), strict=True)
        if number > 0
    }
    tally = dict(zip(COUNT_KEYS, clip.sum(0).tolist(), strict=True))
    if tally["total_kept_tokens"] > 0:  # an absent count is an absent metric there
        metrics["clipped_tokens"] = tally["clipped_tokens"]
    for suffix, kept in (
        ("", "total_kept_tokens"),
        ("_pos", "kept_tokens_pos"),
        ("_neg", "kept_tokens_neg"),
    ):
        if tally[kept] > 0:
            metrics[f"clipped_fraction{suffix}"] = tally[f"clipped_tokens{suffix}"] / tally[kept]
    return metrics
