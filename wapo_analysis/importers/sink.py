"""The one way into a run: importers hand rows over in any order, memory stays bounded.

Token rows are written in parts of at most ``CHUNK_ROWS`` together with the class totals they add
up to; the reader sums totals over parts, so a step may span several. Step rows are merged by step
and written at the end, with what tokens and rollouts say about a step filled in where the source's
own log does not.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.derive import reward_columns, rollout_sums, step_columns, token_sums
from wapo_analysis.importers.jsonl import as_number, as_step, flat
from wapo_analysis.importers.mapping import VITAL, NameTable
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import class_rows, clean_tokens, filled_records, numbers
from wapo_analysis.importers.steplog import StepLog
from wapo_analysis.schema import ROLLOUTS, TOKENS
from wapo_analysis.store import RunWriter
from wapo_analysis.store.needs import holds
from wapo_analysis.table import Array, Records


@dataclass
class StepTotals:
    """Sums over the tokens of every step and numbers of its rollouts, for the ``steps`` table."""

    _tokens: dict[int, dict[str, float]] = field(default_factory=dict)
    _rollouts: list[dict[str, Array]] = field(default_factory=list)

    def add_tokens(self, step: int, rows: pd.DataFrame) -> None:
        """Add token rows of one step, columns of the ``tokens`` table."""
        names = [c.name for c in TOKENS.stored if c.dtype != "str" and c.name in rows]
        given = {name: numbers(rows[name], len(rows)) for name in names}
        known = [name for name, values in given.items() if np.isfinite(values).any()]
        sums = self._tokens.setdefault(step, {})
        for name, value in token_sums(given, known).items():
            sums[name] = sums.get(name, 0.0) + float(value)

    def add_rollouts(self, frame: pd.DataFrame) -> None:
        """Add rollouts, columns of the ``rollouts`` table."""
        ends = frame.get("finish_reason", pd.Series(None, frame.index))
        cut = np.where(ends.notna(), ends == "length", np.nan)
        self._rollouts.append(
            {
                "step": frame["step"].to_numpy(np.int64),
                "group": numbers(frame.get("group"), len(frame)),
                "reward": numbers(frame["reward"], len(frame)),
                "length": numbers(frame.get("length"), len(frame)),
                "truncated": cut.astype(np.float64),
            }
        )

    def columns(self) -> dict[int, dict[str, float]]:
        """Columns of the ``steps`` table per step."""
        found = dict(self._rollout_columns())
        for step, sums in self._tokens.items():
            found[step] = found.get(step, {}) | step_columns(sums)
        return found

    def _rollout_columns(self) -> Iterable[tuple[int, dict[str, float]]]:
        if not self._rollouts:
            return
        names = self._rollouts[0]
        whole = {name: np.concatenate([part[name] for part in self._rollouts]) for name in names}
        order = np.argsort(whole["step"], kind="stable")
        steps, starts = np.unique(whole["step"][order], return_index=True)
        for step, rows in zip(steps.tolist(), np.split(order, starts[1:]), strict=True):
            columns = reward_columns(whole["reward"][rows], whole["group"][rows])
            lengths = {name: whole[name][rows] for name in ("length", "truncated")}
            # Only the tokens count tokens: a source may hold some of its completions.
            columns |= step_columns(rollout_sums(lengths))
            columns.pop("tokens", None)
            yield step, columns


CHUNK_ROWS = 200_000
CHUNK_TEXT = 32 << 20
MAX_STEPLESS = 200_000
#: Names that count where no record has a step, in the order they are tried.
COUNTERS = ("epoch", "episode", "iter", "update", "round", "batch", "generation")
#: W&B's number of a log call.
ROW_COUNTER = "_step"


@dataclass
class Sink:
    """Collects rows and writes them as a normal run.

    Attributes
    ----------
    log : StepLog
        The source's own metrics log.
    """

    #: Run being written.
    writer: RunWriter
    #: Account of the import.
    report: ImportReport
    #: Which key is which column.
    names: NameTable
    #: Softmax temperature of the statistics.
    temperature: float
    _tokens: list[pd.DataFrame] = field(default_factory=list)
    _token_rows: int = 0
    _rollouts: list[dict[str, Any]] = field(default_factory=list)
    _text: int = 0
    _parts: defaultdict[tuple[str, int], "count[int]"] = field(
        default_factory=lambda: defaultdict(count)
    )
    _waiting: dict[tuple[str, int], dict[int, Records]] = field(default_factory=dict)
    _waiting_rows: int = 0
    _steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    _totals: StepTotals = field(default_factory=StepTotals)
    _stepless: list[tuple[Path, int]] = field(default_factory=list)
    _last_step: int | None = None
    _file_steps: dict[Path, tuple[int, int]] = field(default_factory=dict)
    #: Where no record has a step: names that may count them, with their first numbers.
    step_candidates: dict[str, list[float]] = field(default_factory=dict)
    #: By table, the columns that hold a value.
    held: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log = StepLog(self.report)
        self._unstepped = StepLog(self.report)

    # ---- steps

    def add_step(self, step: int, values: Mapping[str, Any]) -> None:
        """Columns of a step, or names with a slash, where the source's own log has none."""
        row = self._steps.setdefault(step, {})
        for name, value in values.items():
            row.setdefault(name, value)

    def add_log(
        self, record: Mapping[str, Any], prefix: str, place: tuple[Path, int],
        null_is_nan: bool = False,
    ) -> None:  # fmt: skip
        """Take one record of a metrics log.

        Parameters
        ----------
        record : mapping
            Names to values; nested objects are joined with a slash.
        prefix : str
            Put before a kept name that has no slash.
        place : (Path, int)
            File and line, named if the record cannot be used.
        null_is_nan : bool
            The writer turns numbers that are not finite into null.
        """
        items = {k: v for k, v in flat(record) if v is not None}
        key = self.names.step_key(tuple(items))
        if key is None:
            if items:
                self._add_stepless(record, prefix, place)
            return
        step = as_step(items[key])
        if step is None:
            self.report.bad_line(*place, "no step")
            return
        if key == ROW_COUNTER and self._last_step is not None:
            step = self._last_step  # beside records that count training steps it counts log calls
        elif key != ROW_COUNTER:
            self._last_step = step
        step = self.log.add(record, step, prefix, place, step_key=key, null_is_nan=null_is_nan)
        first, last = self._file_steps.get(place[0], (step, step))
        self._file_steps[place[0]] = (min(first, step), max(last, step))

    def _add_stepless(
        self, record: Mapping[str, Any], prefix: str, place: tuple[Path, int]
    ) -> None:
        self._stepless.append(place)
        if len(self._stepless) <= MAX_STEPLESS:
            self._unstepped.add(record, len(self._stepless), prefix, place)

    def _log_rows(self) -> dict[int, dict[str, Any]]:
        """Rows of the source's own log; records without a step are counted if none has one."""
        if not self.log and len(self._stepless) > 1:
            self.step_candidates = self._unstepped.step_candidates()
            files = {file for file, _ in self._stepless}
            counter = next((n for n in COUNTERS if self._unstepped.counts(n, len(files))), None)
            if self.knows_any and (counter is not None or not self.step_candidates):
                self._tell_counted(counter)
                return self._unstepped.finish(self.names)
        for place in self._stepless:
            self.report.bad_line(*place, "no step")
        for file, (first, last) in self._file_steps.items():
            self.log.end_of_file(file, first, last)
        return self.log.finish(self.names)

    def _tell_counted(self, counter: str | None) -> None:
        many = len(self._stepless)
        if many > MAX_STEPLESS:
            self.report.told(f"of {many} records without a step the first {MAX_STEPLESS} are read")
        if counter is None:
            self.report.told(f"no record has a step, so the {many} records are counted from 1")
        else:
            self.report.told(f"no record has a step: {counter} is read as the step")
            self._unstepped.count_by(counter)

    @property
    def stepless(self) -> int:
        """How many records have no step."""
        return len(self._stepless)

    @property
    def unstepped_names(self) -> list[str]:
        """Names of the numbers of records without a step."""
        return self._unstepped.names

    @property
    def knows_any(self) -> bool:
        """Whether records without a step hold a vital column by a known name."""
        return bool(self.names.feeds(self._unstepped.names).keys() & set(VITAL))

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
        self._write_waiting()

    def _write_tokens(self, step: int, rows: pd.DataFrame) -> None:
        records = filled_records(TOKENS, rows, self.report)
        totals = class_rows(records, self.temperature)
        self._totals.add_tokens(step, rows)
        self.write_records(totals, step)
        self.write_records(records, step)
        self.report.token_rows += len(records)

    def write_records(self, records: Records, step: int) -> None:
        """Rows of a step of a table; what comes for it later has another part number."""
        name = records.table.name
        number = next(self._parts[name, step])
        self._waiting.setdefault((name, number), {})[step] = records
        known = self.held.setdefault(name, set())
        known |= {n for n, v in records.columns.items() if n not in known and holds(v)}
        self._waiting_rows += len(records)
        if self._waiting_rows > CHUNK_ROWS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Write what waits, many steps a file."""
        for (_, number), records in self._waiting.items():
            self.writer.write_steps(records, number)
        self._waiting, self._waiting_rows = {}, 0

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
            self.write_records(filled_records(ROLLOUTS, rows, self.report), int(str(step)))
        self._write_waiting()
        self.report.rollouts += len(frame)

    # ---- end

    def finish(self) -> None:
        """Write what is held; step columns the source did not log come from tokens and rollouts."""
        self._flush_tokens()
        self._flush_rollouts()
        self._write_waiting()
        rows = self._log_rows()
        for given in (self._steps, self._totals.columns()):
            for step, values in given.items():
                row = rows.setdefault(step, {})
                for name, value in values.items():
                    row.setdefault(name, value)
        known = self.held.setdefault("steps", set()) if rows else set()
        for step in sorted(rows):
            row = {"step": step, **rows[step]}
            self.writer.append_step(row)
            fresh = {name: as_number(row[name]) for name in row.keys() - known}
            known |= {n for n, value in fresh.items() if value is not None and isfinite(value)}
        self.report.steps = len(rows)
