"""What a figure shows in one sentence with its number: the title above it."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from wapo_analysis.series import Series

_MOST = 3


def joined(parts: Iterable[str]) -> str:
    """Clauses of several labels as one title; of more than three labels the first ones."""
    every = list(parts)
    more = [f"and {len(every) - _MOST} more"] if len(every) > _MOST else []
    return "; ".join([*every[:_MOST], *more])


def ends(frame: pd.DataFrame, column: str) -> dict[str, tuple[float, float]]:
    """Where a step column began and where it ended, mean over the runs of each label.

    Labels without a number are left out. Beginning and end are those that a diagnosis uses.
    """
    found: dict[str, tuple[float, float]] = {}
    for label, rows in frame.groupby("label", sort=False):
        known = rows.dropna(subset=["step", column])
        pairs = [
            (series.level, series.end)
            for _, part in known.groupby("run")
            if len(series := Series(part["step"].to_numpy(), part[column].to_numpy()))
        ]
        if pairs:
            first, last = np.mean(pairs, axis=0)
            found[str(label)] = (float(first), float(last))
    return found


def changes(frame: pd.DataFrame, column: str, digits: str = ".2f") -> str:
    """``GRPO 0.48 to 0.73; WAPO 0.47 to 0.81``: every label from its baseline to its end."""
    pairs = ends(frame, column).items()
    return joined(f"{label} {a:{digits}} to {b:{digits}}" for label, (a, b) in pairs)


def after(what: str, text: str) -> str:
    """``what: text``, or nothing where there is nothing to tell."""
    return f"{what}: {text}" if text else ""


def largest(rows: pd.DataFrame, column: str) -> pd.Series:
    """Row in which a column without NaN is largest in size."""
    return rows.iloc[int(np.argmax(rows[column].abs().to_numpy(np.float64)))]


def largest_key(values: pd.Series) -> int:
    """Integer key of the value that is largest in size."""
    return int(values.index.to_numpy()[int(np.argmax(values.abs().to_numpy(np.float64)))])
