"""Group advantages: how far each rollout's reward lies from the other rollouts of its prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.objectives.table import rules

FloatArray = NDArray[np.float64]

STD_OFFSET = 1e-8
"""Added to the standard deviation of a group before dividing by it (GRPO's published code)."""

RESIDUAL_ULPS = 8
"""A deviation from the group mean below this many rounding units of the largest reward is 0."""

LARGEST_REWARD = 1e100
"""Beyond this the squared deviation could overflow."""


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
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    return [0.0 if abs(reward - mean) <= floor else reward - mean for reward in rewards]


def _standardized(rewards: list[float], deviations: list[float]) -> list[float]:
    variance = _sum_left_to_right([d * d for d in deviations]) / len(deviations)
    scale = math.sqrt(variance) + STD_OFFSET
    return [d / scale for d in deviations]


def _centered(rewards: list[float], deviations: list[float]) -> list[float]:
    return deviations


def _raw(rewards: list[float], deviations: list[float]) -> list[float]:
    return rewards


ADVANTAGE_KINDS: dict[str, Callable[[list[float], list[float]], list[float]]] = {
    "standardized": _standardized,
    "centered": _centered,
    "raw": _raw,
}
"""Name -> function of one group's (rewards, deviations from their mean)."""


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

    Returns
    -------
    ndarray of float64, shape (N,)
        Advantages, in reward units (``standardized``: dimensionless).

    Raises
    ------
    UserError
        If the kind is unknown, the shapes differ, or a reward is not finite or beyond 1e100.

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
