"""What a detector or a figure reads of a run, and why a run cannot give it."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from wapo_analysis.schema import TABLES
from wapo_analysis.table import Array

if TYPE_CHECKING:
    from wapo_analysis.store.reader import Run

_NONE = {
    "steps": "no steps yet",
    "classes": "no class totals (recorded by wapo train, attach or watched_loss)",
    "probes": "no probes (recorded with probe_every)",
    "tokens": "no token rows (recorded with token_every and token_fraction above 0)",
    "rollouts": "no completions",
    "topk": "no most probable tokens (recorded with topk)",
}
#: Tables of which only the ends are read: a column is there or not.
_LARGE = ("tokens", "rollouts", "topk")
_FIRST_ROWS = 1000
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
    held = _held_in(run, table)
    if held is not None and column not in held and table == "tokens" and column in _RESCORED:
        held = _held_in(run, table, rescored=True)
        if held is None:
            return "no token that was re-scored after its update"
    if held is None:
        return _NONE[table]
    if column in held or ("*" in column and any(fnmatchcase(name, column) for name in held)):
        return None
    return f"no {column!r} in its {table} table"


def _held_in(run: "Run", table: str, rescored: bool = False) -> frozenset[str] | None:
    """Columns of a table that hold any value, read once a run; None if it has no rows."""
    key = f"{table} re-scored" if rescored else table
    if key not in run.held:
        frame = _ends(run, table, rescored) if table in _LARGE else getattr(run, table)
        if frame is None or frame.empty:
            run.held[key] = None
        else:
            run.held[key] = frozenset(_holding(frame, table))
    return run.held[key]


def _ends(run: "Run", table: str, rescored: bool) -> pd.DataFrame | None:
    """Rows of the first, the middle and the last step that a table has."""
    steps = run.rescored_steps() if rescored else run.recorded_steps(table)
    if not steps:
        return None
    ends = {steps[place] for place in (0, len(steps) // 2, -1)}
    return run.tokens(ends) if table == "tokens" else run.table(table, ends)


def _holding(frame: pd.DataFrame, table: str) -> Iterator[str]:
    """Names of the columns with a value: a finite number, or a text in a column of texts."""
    # A look at the first rows, of all columns of numbers at once, is nearly always enough.
    numbers = frame.iloc[:_FIRST_ROWS].select_dtypes(["number", "bool"], exclude=["timedelta"])
    known = set(numbers.columns[np.isfinite(numbers.to_numpy(np.float64)).any(axis=0)])
    seen = set(numbers.columns) if len(numbers) == len(frame) else known
    declared = TABLES[table]
    for name in map(str, frame.columns):
        if name in declared and declared[name].dtype == "str":
            there = name in known or bool(frame[name].notna().any())
        else:
            there = name in known if name in seen else _finite(frame[name])
        if there:
            yield name


def holds(values: Array) -> bool:
    """Whether a column of `Records` holds a finite number or a text."""
    if values.dtype.kind == "f":
        return bool(np.isfinite(values).any())
    if isinstance(values, np.ma.MaskedArray):
        return bool(values.count())
    return any(value is not None for value in values)


def _finite(values: pd.Series) -> bool:
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
    return bool(np.isfinite(numbers).any())
