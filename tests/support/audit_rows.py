"""Token rows of made-up gradient steps, of which an audit's answer is known."""

from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.audit.evidence import Deviation, Evidence, Findings
from wapo_analysis.table import Array

Rows = dict[str, Array]


def token_rows(lengths: Any, **given: Any) -> Rows:
    """Token rows of rollouts of these lengths, one gradient pass: by default a right GRPO step.

    A column may be one value, one of each rollout or one of each token; a column per rollout wins
    where both counts are equal. ``log_ratio`` sets ``logp_old``, and ``weight`` is what A times
    the ratio is multiplied with, by default that of a mean over each rollout's tokens.
    """
    lengths = np.asarray(lengths)
    number, total = len(lengths), int(lengths.sum())
    rollout = np.repeat(np.arange(number), lengths)
    first = np.cumsum(lengths) - lengths

    def spread(values: Any) -> Array:
        values = np.asarray(values)
        if values.ndim == 0:
            return np.full(total, values)
        return np.asarray(values[rollout] if len(values) == number else values)

    position = np.arange(total) - first[rollout]
    usual = {
        "step": 1, "rank": 0, "minibatch": 0, "group": np.arange(number) // 4,
        "rollout": np.arange(number), "position": position, "token_id": 100 + np.arange(total),
        "advantage": np.where(np.arange(number) % 2, -1.0, 1.0), "logp": -0.5, "kept": True,
        "log_ratio": 0.0, "weight": 1 / (lengths * number),
    }  # fmt: skip
    rows = {name: spread(values) for name, values in (usual | given).items()}
    log_ratio, weight = rows.pop("log_ratio"), rows.pop("weight")
    rows.setdefault("logp_old", rows["logp"] - log_ratio)
    rows.setdefault("coef", rows["advantage"] * np.exp(log_ratio) * weight)
    return rows


def joined(*parts: Rows) -> Rows:
    """Rows of several passes, steps or processes."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def evidence(
    rows: Rows,
    rollouts: pd.DataFrame | dict[str, Any] | None = None,
    steps: dict[str, Any] | None = None,
    **manifest: Any,
) -> Evidence:
    """Evidence of token rows, of a loop unless the manifest says otherwise."""
    return Evidence.of(
        rows,
        pd.DataFrame(rollouts if rollouts is not None else {}),
        pd.DataFrame(steps if steps is not None else {"step": np.unique(rows["step"])}),
        {"source": "loop"} | manifest,
    )


def checked(check: Any, seen: Evidence, *more: Any) -> Findings:
    """What one check finds."""
    found = Findings()
    check(seen, *more, found)
    return found


def only(found: Findings) -> Deviation:
    """The one deviation that was found."""
    (deviation,) = found.deviations
    return deviation
