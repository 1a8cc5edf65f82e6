"""The one way into a run: importers hand rows over in any order, memory stays bounded.

Token rows are written in parts of at most ``CHUNK_ROWS`` together with the class totals they add
up to; the reader sums totals over parts, so a step may span several. Step rows are merged by step
and written at the end, with what tokens and rollouts say about a step filled in where the source's
own log does not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.importers.names import NameTable
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import class_rows, clean_tokens, filled_records
from wapo_analysis.importers.totals import StepTotals
from wapo_analysis.schema import ROLLOUTS, STEPS, TOKENS
from wapo_analysis.store import RunWriter
from wapo_analysis.table import Records

CHUNK_ROWS = 200_000
CHUNK_TEXT = 32 << 20
HELD_STEPS = 10_000
MAX_STEP = 2**31 - 1


@dataclass
class Sink:
    """Collects rows and writes them as a normal run.

    Parameters
    ----------
    writer : RunWriter
        Run being written.
    report : ImportReport
        Account of the import.
    names : NameTable
        Which key is which column.
    temperature : float
        Softmax temperature of the statistics.
    """

    writer: RunWriter
    report: ImportReport
    names: NameTable
    temperature: float = 1.0
    _tokens: list[pd.DataFrame] = field(default_factory=list)
    _token_rows: int = 0
    _rollouts: list[dict[str, Any]] = field(default_factory=list)
    _text: int = 0
    _parts: dict[tuple[str, int], int] = field(default_factory=dict)
    _steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    _written_to: int = -1
    _totals: StepTotals = field(default_factory=StepTotals)

    # ---- steps

    def add_step(self, step: int, values: Mapping[str, Any]) -> None:
        """Merge columns of the ``steps`` table, or names with a slash, into a step; later wins."""
        row = self._steps.setdefault(step, {"step": step})
        for name, value in values.items():
            if name in STEPS and name in row and not _same(row[name], value):
                self.report.repeated_steps.add(step)
            row[name] = value
        if len(self._steps) > HELD_STEPS:
            self._write_steps()

    def fill_step(self, step: int, values: Mapping[str, Any]) -> None:
        """Columns of a step where no record gave them."""
        row = self._steps.setdefault(step, {"step": step})
        for name, value in values.items():
            row.setdefault(name, value)

    def add_log(self, record: Mapping[str, Any], prefix: str) -> bool:
        """Take one record of a metrics log: known names are mapped, other numbers are kept.

        Parameters
        ----------
        record : mapping
            Names to values; nested objects are joined with a slash.
        prefix : str
            Put before a kept name that has no slash.

        Returns
        -------
        bool
            False if the record has no usable step.
        """
        flat = dict(_flat(record))
        taken, rest = self.names.plan("steps", tuple(flat))
        step = as_step(flat.get(taken.get("step", "")))
        if step is None:
            return False
        values = self._mapped(taken, flat)
        for key in rest:
            number = as_number(flat[key])
            if number is not None:
                values[key if "/" in key else f"{prefix}/{key}"] = number
                self.report.kept_keys[key] += 1
            elif flat[key] is not None:
                self.report.unknown_keys[key] += 1
        self.add_step(step, values)
        return True

    def _mapped(self, taken: Mapping[str, str], flat: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for ours, theirs in taken.items():
            if ours == "step":
                continue
            self.report.mapped[ours] = theirs
            number = as_number(flat[theirs])
            if number is not None:
                values[ours] = number
                if not np.isfinite(number):
                    self.report.counts["numbers that were not finite, now null"] += 1
        return values

    # ---- tokens

    def add_tokens(self, frame: pd.DataFrame) -> None:
        """Take token rows: columns of the ``tokens`` table; needs ``step`` and ``advantage``."""
        if len(frame):
            self._tokens.append(frame)
            self._token_rows += len(frame)
        if self._token_rows >= CHUNK_ROWS:
            self._flush_tokens()

    def _flush_tokens(self) -> None:
        if not self._tokens:
            return
        frame = pd.concat(self._tokens, ignore_index=True)
        self._tokens, self._token_rows = [], 0
        frame = clean_tokens(frame, self.report)
        for step, rows in frame.groupby("step", sort=True):
            self._write_tokens(int(str(step)), rows)

    def _write_tokens(self, step: int, rows: pd.DataFrame) -> None:
        records = filled_records(TOKENS, rows)
        totals = class_rows(records, self.temperature)
        self._totals.add_tokens(step, rows)
        self.write_records(totals, step)
        self.write_records(records, step)
        self.report.token_rows += len(records)

    def write_records(self, records: Records, step: int) -> None:
        """Write rows of one step as a part of their own; a part's number has no other meaning."""
        key = (records.table.name, step)
        number = self._parts.get(key, 0)
        self._parts[key] = number + 1
        self.writer.write_part(records, step, number)

    # ---- rollouts

    def add_rollout(self, row: Mapping[str, Any]) -> None:
        """Take one completion: columns of the ``rollouts`` table; needs ``step, reward``."""
        self._rollouts.append(dict(row))
        self._text += sum(len(value) for value in row.values() if isinstance(value, str))
        if self._text >= CHUNK_TEXT or len(self._rollouts) >= CHUNK_ROWS:
            self._flush_rollouts()

    def _flush_rollouts(self) -> None:
        if not self._rollouts:
            return
        frame = pd.DataFrame(self._rollouts)
        self._rollouts, self._text = [], 0
        self._totals.add_rollouts(frame)
        for step, rows in frame.groupby("step", sort=True):
            self.write_records(filled_records(ROLLOUTS, rows), int(str(step)))
        self.report.rollouts += len(frame)

    # ---- end

    def finish(self) -> None:
        """Write what is held; step columns the source did not log come from tokens and rollouts."""
        self._flush_tokens()
        self._flush_rollouts()
        for step, values in self._totals.columns().items():
            if step <= self._written_to:
                self.report.note(
                    f"steps up to {self._written_to} were written before their tokens were known; "
                    "their columns come from the log alone"
                )
                continue
            row = self._steps.setdefault(step, {"step": step})
            for name, value in values.items():
                row.setdefault(name, value)
        self._write_steps()

    def _write_steps(self) -> None:
        for step in sorted(self._steps):
            self.writer.append_step(self._steps[step])
        self.report.steps += sum(step > self._written_to for step in self._steps)
        self._written_to = max([self._written_to, *self._steps])
        self._steps = {}


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)  # nan is nan here


def as_number(value: Any) -> float | int | None:
    """A number, numbers written as text and the words nan and inf included, else None."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, int | float | np.integer | np.floating):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def as_step(value: Any) -> int | None:
    """A step number: a whole number that fits the column, also written as text or as 3.0."""
    number = as_number(value)
    if number is None or not np.isfinite(number) or number != int(number):
        return None
    return int(number) if 0 <= number <= MAX_STEP else None


def _flat(record: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Items of a record, nested objects joined with a slash."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value
