"""The recorded tokens of a few steps as an audit needs them, with the error of every number.

N token rows. A *pass* is one gradient pass of one process, a *piece* the tokens of one rollout in
one pass; within a piece every objective gives all tokens one advantage and one weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from wapo_analysis.store import Run
from wapo_analysis.table import Array

_ROUNDING = 2.0**-15
"""Relative rounding of stored float32 columns (15 mantissa bits) and of what went before."""
_FLOOR = 2e-4
"""Relative error of a coefficient that float32 sums of a backward pass may leave."""


@dataclass(frozen=True)
class Evidence:
    """Token rows with a gradient, sorted by pass and piece.

    Parameters
    ----------
    run : Run
    steps : tuple of int
    rows : DataFrame
        Stored columns of the token table, with ``passes``, ``piece`` and ``log_ratio``.
    whole : bool
        All rollouts of these steps have their rows.
    """

    run: Run
    steps: tuple[int, ...]
    rows: pd.DataFrame
    whole: bool

    @classmethod
    def of(cls, run: Run, steps: Sequence[int]) -> "Evidence":
        """Read the token rows of some steps."""
        rows = run.tokens(steps, derived=False)
        old = rows["logp_prox"].fillna(rows["logp_old"])
        rows = rows.assign(
            passes=rows.groupby(["step", "rank", "minibatch"], sort=False).ngroup(),
            piece=rows.groupby(["step", "rank", "minibatch", "rollout"], sort=False).ngroup(),
            old=old,
            log_ratio=rows["logp"].astype(float) - old.astype(float),
        )
        shares = run.steps.set_index("step")["token_fraction"].reindex(list(steps))
        return cls(run, tuple(steps), rows, bool((shares.fillna(1.0) >= 1.0).all()))

    def column(self, name: str) -> Array:
        """A column as float64, shape (N,)."""
        return np.asarray(self.rows[name].to_numpy(np.float64, na_value=np.nan))

    @cached_property
    def coef(self) -> Array:
        """-dL/dlogp of every row, NaN where it was not recorded."""
        return self.column("coef")

    @cached_property
    def advantage(self) -> Array:
        """Advantage of every row."""
        return self.column("advantage")

    @cached_property
    def ratio_error(self) -> Array:
        """Largest error of the log-ratio that rounding explains, nats."""
        size = np.abs(self.column("logp")) + np.abs(self.column("old"))
        error: Array = 2 * _ROUNDING * size + _FLOOR
        return error

    @cached_property
    def kept(self) -> Array:
        """Rows that are said to take part in the loss."""
        return np.asarray(self.rows["kept"].fillna(True).to_numpy(bool))

    @cached_property
    def clipped(self) -> Array:
        """Rows whose gradient the clip is said to have taken."""
        return np.asarray(self.rows["clipped"].fillna(False).to_numpy(bool))

    @cached_property
    def active(self) -> Array:
        """Rows with an advantage and a gradient."""
        return np.asarray(np.isfinite(self.coef) & (self.coef != 0) & (self.advantage != 0))

    @cached_property
    def pieces(self) -> pd.DataFrame:
        """One row a piece: step, pass, rollout, group, advantage, tokens, mean log-ratio."""
        return self.rows.groupby("piece").agg(
            step=("step", "first"), passes=("passes", "first"), rank=("rank", "first"),
            minibatch=("minibatch", "first"), rollout=("rollout", "first"),
            group=("group", "first"), advantage=("advantage", "first"),
            tokens=("position", "size"), mean_log_ratio=("log_ratio", "mean"),
            length=("position", "max"),
        )  # fmt: skip

    def named(self, mask: Array, most: int = 3) -> tuple[tuple[int, int, int], ...]:
        """Step, rollout and position of a few rows."""
        found = self.rows.loc[mask, ["step", "rollout", "position"]].head(most)
        return tuple((int(s), int(r), int(p)) for s, r, p in found.itertuples(index=False))


def steps_to_look_at(run: Run, most: int) -> list[int]:
    """Steps with token rows, the first ones: before a run has gone astray they say most."""
    return run.token_steps()[:most]
