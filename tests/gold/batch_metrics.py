"""The published WAPO code's batch metrics (groups, overlap, lengths), recomputed for verification.

N rollouts of one batch. Numbers only: text never enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def _pair_overlap(first: Sequence[int], second: Sequence[int]) -> dict[str, float]:
    """First difference, set similarity and equal positions of two token sequences, each 0..1."""
    shorter = min(len(first), len(second))
    equal = [a == b for a, b in zip(first, second, strict=False)]
    prefix = equal.index(False) if False in equal else shorter
    union = set(first) | set(second)
    return {
        "divergence": prefix / max(len(first), len(second), 1),
        "jaccard": len(set(first) & set(second)) / max(len(union), 1),
        "contested": sum(equal) / max(shorter, 1),
    }


def overlap_metrics(
    tokens: Sequence[Sequence[int]], advantages: FloatArray, group: NDArray[np.int64]
) -> dict[str, float]:
    """Mean overlap of the pairs of a group, by the signs of the two advantages.

    Parameters
    ----------
    tokens : sequence of N sequences of int
        Prompt and completion ids of each rollout.
    advantages : ndarray, shape (N,)
        Pairs with a zero advantage are left out.
    group : ndarray of int, shape (N,)
        Group of each rollout.

    Returns
    -------
    dict of str to float
        ``overlap/<measure>_<pair>``; a kind of pair that does not occur is absent.
    """
    found: dict[str, list[float]] = {}
    live = np.flatnonzero(advantages != 0)
    for i, j in combinations(live.tolist(), 2):
        if group[i] != group[j]:
            continue
        signs = sorted(("pos" if advantages[k] > 0 else "neg" for k in (i, j)), reverse=True)
        for measure, value in _pair_overlap(tokens[i], tokens[j]).items():
            found.setdefault(f"overlap/{measure}_{'_'.join(signs)}", []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def batch_metrics(
    rewards: FloatArray,
    advantages: FloatArray,
    group: NDArray[np.int64],
    completion_masks: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Group, reward and length metrics of one batch.

    Parameters
    ----------
    rewards, advantages : ndarray, shape (N,)
        Reward and advantage of each rollout.
    group : ndarray of int, shape (N,)
        Group of each rollout.
    completion_masks : sequence of N sequences of 0/1
        Loss mask of each completion; its length is the completion's.

    Returns
    -------
    dict of str to float
        Under the published names.
    """
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    lengths = np.array([len(mask) for mask in completion_masks], dtype=np.float64)
    trained = sum(sum(mask) for mask in completion_masks)
    return {
        "groups/with_correct": float(np.mean([(rewards[m] > 0).any() for m in members])),
        "groups/all_neg_masked": float(np.mean([(advantages[m] <= 0).all() for m in members])),
        "groups/all_pos_masked": float(np.mean([(advantages[m] >= 0).all() for m in members])),
        "masking/neg_adv_seq_fraction": float(np.mean(advantages <= 0)),
        "reward": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "advantage/absmean": float(np.abs(advantages).mean()),
        "tokens/completion": float(lengths.mean()),
        "tokens/masked_fraction": float(1 - trained / max(lengths.sum(), 1)),
    }
