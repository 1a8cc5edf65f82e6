"""Tokens and rollouts behind the predicted dH of a class, from the rows nearest the onset."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from wapo_analysis.diagnose.result import Culprits
from wapo_analysis.store import Run

READ_STEPS = 3
"""Most steps whose token rows are read."""
NEAR = 10
"""Steps beyond the window at which token rows still speak for it."""
SHOWN = 3


def find_culprits(
    run: Run, finding: str, cls: str, first: int, last: int, direction: int
) -> Culprits | None:
    """Split the predicted dH of a class over its tokens and rollouts.

    A token counts with its exact first-order dH (taxonomy/README.md) where that points in the
    direction, summed over the gradient passes that saw it.

    Parameters
    ----------
    run : Run
        The run.
    finding : str
        Name of the finding the class is behind.
    cls : str
        Class name of the taxonomy.
    first, last : int
        Window of steps; of those in it that have token rows the earliest are read, else the nearest
        one at most ``NEAR`` steps away.
    direction : int
        1 for what raises the entropy, -1 for what lowers it.

    Returns
    -------
    Culprits or None
        None without token rows near the window, or with none that point there. Tokens and
        rollouts whose number the source could not give (-1) are not named.
    """
    steps = _steps(run.token_steps(), first, last)
    if not steps:
        return None
    rows = run.tokens(steps)
    toward = direction * rows["pred_dentropy"].astype(np.float64)
    mine = (rows["cls"] == cls) & (toward > 0)
    if not mine.any():
        return None
    toward, rows = toward[mine], rows[mine]
    total = float(toward.sum())
    vocab = run.vocab
    by_token = _largest(toward[rows["token_id"] >= 0].groupby(rows["token_id"]).sum())
    named = toward[rows["rollout"] >= 0].groupby([rows["step"], rows["rollout"]]).sum()
    by_rollout = _largest(named).reset_index()
    return Culprits(
        finding=finding,
        cls=cls,
        steps=tuple(steps),
        tokens=tuple(
            (vocab.get(int(token), f"#{token}"), value / total)
            for token, value in zip(by_token.index, by_token.to_list(), strict=True)
        ),
        rollouts=tuple(
            (int(step), int(number), float(value) / total)
            for step, number, value in by_rollout.itertuples(index=False)
        ),
    )


def _steps(recorded: Sequence[int], first: int, last: int) -> list[int]:
    inside = [step for step in recorded if first <= step <= last]
    if inside or not recorded:
        return inside[:READ_STEPS]
    away = {step: max(first - step, step - last) for step in recorded}
    nearest = min(recorded, key=away.__getitem__)
    return [nearest] if away[nearest] <= NEAR else []


def _largest(values: pd.Series) -> pd.Series:
    return values.sort_values(ascending=False, kind="stable").head(SHOWN)
