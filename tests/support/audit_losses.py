"""Gradient passes of known losses, and what an audit reads of their coefficients."""

from typing import Any

import numpy as np

from tests.support.audit_rows import Rows, evidence, token_rows
from wapo_analysis.audit.coefficient import CORES, Coefficient, Core, read_coefficient
from wapo_analysis.audit.declared import settings_of

LENGTHS = np.array([3, 5, 4, 7, 6, 8, 5, 9])
LEVELS = np.array([-1.3, 0.7, 0.4, -1.1, 0.9, -0.2, 1.7, -0.6])
MOVED = np.random.default_rng(3).normal(0, 0.3, LENGTHS.sum())
MOVED[:3] += 2  # beyond CISPO's cap, as tokens and as a rollout
SETTINGS = settings_of({"objective": {"bounds": [0.8, 1.2]}})
SEQ, EVEN = 1 / (LENGTHS * 8), 1 / LENGTHS.sum()


def mean_of(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return (np.bincount(owner, x) / lengths)[owner]


def factor(core: Core, x: np.ndarray, lengths: np.ndarray, advantage: np.ndarray) -> np.ndarray:
    """f(ratio) of every token by the formulas of the losses, as their gradients have it."""
    if core.level != "token":
        x = mean_of(x, lengths) * (np.repeat(lengths, lengths) if core.level == "sum" else 1)
    ratio, up = np.exp(x), advantage > 0
    if core.kind == "sapo":
        heat = np.where(up, 1.0, 1.05)
        gate = 1 / (1 + np.exp(-heat * (ratio - 1)))
        return 4 * gate * (1 - gate) * ratio
    if core.kind == "vespo":
        k, rate = np.where(up, 2.0, 3.0), np.where(up, 3.0, 2.0)
        return np.exp(rate + k * x - rate * ratio)
    return {
        "plain": ratio, "none": np.ones_like(x), "unit": 1 / np.maximum(np.abs(advantage), 1e-9),
        "inverse": 1 / ratio, "cispo": np.minimum(ratio, 5.0),
    }[core.kind]  # fmt: skip


def batch(
    core: Core = CORES[0], weight: Any = SEQ, x: Any = MOVED, lengths: Any = LENGTHS,
    levels: Any = LEVELS, **given: Any,
) -> Rows:  # fmt: skip
    """A gradient pass over eight rollouts with coef = A f(ratio) weight."""
    rows = token_rows(lengths, advantage=levels, log_ratio=x, **given)
    weight = np.repeat(np.broadcast_to(weight, len(lengths)), lengths)
    made = factor(core, np.broadcast_to(x, len(weight)), np.asarray(lengths), rows["advantage"])
    return rows | {"coef": rows["advantage"] * made * weight}


def halves(**given: Any) -> Rows:
    """The same in two gradient passes, every second rollout in each."""
    return batch(minibatch=np.arange(8) % 2, **given)


def read(rows: Rows, steps: Any = None, **manifest: Any) -> Coefficient:
    return read_coefficient(evidence(rows, steps=steps, **manifest), SETTINGS)
