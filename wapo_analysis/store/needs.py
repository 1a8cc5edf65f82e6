"""What a detector or a figure reads of a run, and why a run cannot give it."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from wapo_analysis.schema import TABLES

if TYPE_CHECKING:
    from wapo_analysis.store.reader import Run

_NONE = {
    "steps": "no steps yet",
    "classes": "no class totals yet",
    "probes": "no probes (recorded with probe_every)",
    "tokens": "no token rows (recorded with token_every or token_fraction 0)",
    "rollouts": "no completions",
}
_RESCORED = ("dprob", "dentropy", "logp_after", "entropy_after")


@dataclass(frozen=True, slots=True)
class Need:
    """A column that must hold something, or one of several that serve alike.

    Parameters
    ----------
    table : str
        Table of the run: steps, classes, tokens, rollouts or probes.
    column : str
        Column of it, stored or derived; of the step table also any other name the log has, and a
        pattern such as ``rewards/*/mean``.
    others : tuple of Need
        What serves in its place; made with ``|``.

    Examples
    --------
    >>> str(Need("steps", "kl_old") | Need("tokens", "logp_old"))
    'kl_old or tokens.logp_old'
    """

    table: str
    column: str
    others: tuple["Need", ...] = ()

    def __or__(self, other: "Need") -> "Need":
        return Need(self.table, self.column, (*self.others, other))

    def __str__(self) -> str:
        name = self.column if self.table == "steps" else f"{self.table}.{self.column}"
        return " or ".join([name, *map(str, self.others)])


def lack(run: "Run", need: Need) -> str | None:
    """Why a run cannot meet a need, as one clause; None if it can.

    Of tokens and completions only the ends of the run are read: a column is there or not.
    """
    reason = _lack(run, need)
    if reason is None or any(lack(run, other) is None for other in need.others):
        return None
    return f"{run.name} has {reason}"


def _lack(run: "Run", need: Need) -> str | None:
    table, column = need.table, need.column
    rescored = table == "tokens" and column in _RESCORED
    frame = _ends(run, table, column, rescored) if table in ("tokens", "rollouts") else None
    if frame is None:
        frame = getattr(run, table)
    if frame.empty:
        known = rescored and run.token_steps()
        return "no token that was re-scored after its update" if known else _NONE[table]
    names = (
        [name for name in map(str, frame) if fnmatchcase(name, column)]
        if "*" in column
        else [column]
    )
    text = column in TABLES[table] and TABLES[table][column].dtype == "str"
    if any(name in frame and _holds(frame[name], text) for name in names):
        return None
    return f"no {column!r} in its {table} table"


def _ends(run: "Run", table: str, column: str, rescored: bool) -> pd.DataFrame:
    """Rows of the first, the middle and the last step that a table has."""
    steps = run.recorded_steps(table)
    if rescored:
        cells = run.classes
        scored = set(cells.loc[cells["rescored"] > 0, "step"].astype(int))
        steps = [step for step in steps if step in scored]
    ends = {steps[place] for place in (0, len(steps) // 2, -1)} if steps else set()
    return run.tokens(ends) if table == "tokens" else run.table(table, ends)


def _holds(values: pd.Series, text: bool) -> bool:
    """Whether any value is there: a finite number, or a text in a column of texts."""
    if text:
        return bool(values.notna().any())
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
    return bool(np.isfinite(numbers).any())
