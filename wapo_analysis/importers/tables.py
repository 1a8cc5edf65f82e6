"""Plain tables: CSV, TSV, JSON lines, JSON and Parquet with token, rollout or step rows.

What a row is follows from its columns: a log-probability and an advantage make it a token (or, as
lists, a completion's tokens), a completion with a reward a rollout, anything else with a step a
line of a metrics log. CSV and Parquet are read in blocks, so memory does not grow with the file.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, compress, count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.errors import UserError, printable
from wapo_analysis.importers.boards import pick
from wapo_analysis.importers.jsonl import MAX_STEP, as_number, as_step, message_text
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.readers import (
    csv_frames,
    json_records,
    json_value,
    parquet_frames,
    plain,
    table_kind,
)
from wapo_analysis.importers.report import ImportReport, shown
from wapo_analysis.importers.shapes import (
    is_name,
    json_rows,
    text_lines,
    text_tables,
    told_apart,
    unwrapped,
)
from wapo_analysis.importers.sink import Sink

#: Columns that name the run of a row; of text, as numbers count records as well, but for a seed.
RUN_KEYS = ("run", "run_name", "run_id", "experiment", "experiment_name", "exp_name", "Name",
            "experimentKey", "method", "algorithm", "algo", "variant")  # fmt: skip
SEED = "seed"
#: Where a row has one of these it is of a sample, and so is its seed.
SAMPLED = {"prompt", "question", "completion", "response", "output", "text", "logp", "advantage"}
#: Why rlprobe keeps a completion that is no fair sample of a step.
CHOSEN = ("top_k", "bottom_k")
_SUMMED = 3
_BATCH = 8192
_HELD = 512


def read_tables(
    files: tuple[Path, ...], sink: Sink, report: ImportReport, chosen: str | None = None
) -> None:
    """Read plain tables into a run, of several runs the chosen one.

    Raises UserError if a file is broken as a whole, or no row has a step and columns of ours, or a
    column names several runs and none was chosen, or the chosen one is not there.
    """
    if chosen is not None and (runs := _runs_in(files, sink.names)):
        chosen = pick(runs, chosen, Path(report.source))
    for file in files:
        feed = TableFeed(sink, report, file, chosen)
        for number, part in _parts(file, sink.names, report, beside=len(files) > 1):
            if isinstance(part, pd.DataFrame):
                feed.frame(part, number)
            else:
                feed.record(part, number)
        feed.close()


def _parts(
    file: Path, names: NameTable, report: ImportReport, beside: bool
) -> Iterator[tuple[int, pd.DataFrame | Mapping[str, Any]]]:
    """Rows of a table with their numbers, or blocks of rows with the number of the first."""
    kind = table_kind(file)
    if kind == "lines":
        yield from json_records(file, report)
    elif kind == "parquet":
        yield from parquet_frames(file, report)
    elif kind == "csv":
        yield from csv_frames(file, report)
    elif kind == "text":
        rows = list(text_tables(text_lines(file)))
        logged = [row for row in rows if names.step_key(tuple(row[1])) is not None]
        rows = logged or rows  # beside a log other tables are other things
        report.files += 1
        report.lines += len(rows)
        yield from rows
    else:
        found = json_rows(json_value(file, report), report.told)
        if found is None:
            raise UserError(
                f"{printable(shown(file))} holds no records: looked for a list of objects, "
                "lists of numbers by name, numbers by step, and what pandas writes with names"
            )
        report.files += 1
        if beside and len(found) == 1 and names.step_key(tuple(found[0])) is None:
            report.note(f"{shown(file.name)} holds settings, no log")
            return
        report.lines += len(found)
        yield from enumerate(found, start=1)


def _runs_in(files: tuple[Path, ...], names: NameTable) -> list[str]:
    """Names of the runs of all rows. A row alone does not tell whether a later one fits better."""
    found: dict[str | None, None] = {}
    for file in files:
        for _, part in _parts(file, names, ImportReport("table", ""), len(files) > 1):
            runs = _run_names(part) if isinstance(part, pd.DataFrame) else [_run_name(part)]
            found |= dict.fromkeys(runs)
    return [name for name in found if name is not None]


def _run_names(frame: pd.DataFrame) -> list[str | None]:
    columns = [name for name in (*RUN_KEYS, SEED, *SAMPLED) if name in frame]
    if not columns:
        return [None] * len(frame)
    return [_run_name(values) for values in frame[columns].to_dict("records")]


def _run_name(values: Mapping[Any, Any]) -> str | None:
    """Name of the run that a row is of; several seeds of one method are runs of their own."""
    named = [str(values[key]) for key in RUN_KEYS if is_name(values.get(key))][:1]
    seed = None if SAMPLED & values.keys() else as_step(values.get(SEED))
    return " ".join(named if seed is None else [*named, f"seed-{seed}"]) or None


@dataclass
class TableFeed:
    """Takes the rows of one table and hands them to the sink as what they are."""

    sink: Sink
    report: ImportReport
    file: Path
    chosen: str | None = None
    _runs: dict[str, int] = field(default_factory=dict)
    _codes: "Codes" = field(default_factory=lambda: Codes())
    _held: list[dict[str, Any]] = field(default_factory=list)
    _lists: dict[str, list[Any]] = field(default_factory=dict)
    _keys: tuple[str, ...] = ()

    def record(self, values: Mapping[str, Any], number: int) -> None:
        """Take one row; its number is named if it cannot be used."""
        with self.report.record(self.file, number):
            if not self._mine(_run_name(values)):
                return
            values = told_apart(unwrapped(values))
            keys = tuple(values)
            kind, taken = self._kind(keys)
            if kind == "tokens":
                self._token_row(values, keys, taken, number)
            elif kind == "rollouts":
                self._rollout(values, keys, taken, number)
            else:
                self.sink.add_log(values, "table", (self.file, number))

    def frame(self, frame: pd.DataFrame, first: int) -> None:
        """Take rows of a data frame, the first of them with this number."""
        keys = tuple(str(name) for name in frame.columns)
        kind, taken = self._kind(keys)
        if kind == "tokens" and not _has_lists([frame[name] for name in taken.values()]):
            mine = [self._mine(name) for name in _run_names(frame)]
            numbered = frame.set_axis(range(first, first + len(frame)))
            self._tokens(numbered.loc[mine], keys, taken)
            return
        for number, values in enumerate(frame.to_dict("records"), start=first):
            self.record({str(k): plain(v) for k, v in values.items()}, number)

    def close(self) -> None:
        """Hand over what is held.

        Raises UserError if there are rows of several runs and none was chosen.
        """
        if len(self._runs) > 1 and max(self._runs.values()) <= _SUMMED and self.sink.stepless:
            raise UserError(
                f"{printable(shown(self.file))} holds {len(self._runs)} runs, a row or two of each "
                "and no step: a summary of runs, not the log of one"
            )
        # Where every step has a seed of its own, that is no name of a run.
        runs = [run for run, rows in self._runs.items() if rows > _SUMMED or "seed-" not in run]
        if runs and self.chosen is None:
            pick(runs, None, self.file)
        self._flush()

    def _mine(self, run: str | None) -> bool:
        """Whether a row of a run is read, as one of none is; notes the runs there are."""
        if run is None:
            return True
        self._runs[run] = self._runs.get(run, 0) + 1
        return self.chosen in (None, run)

    def _kind(self, keys: tuple[str, ...]) -> tuple[str, dict[str, str]]:
        tokens, _ = self.sink.names.plan("tokens", keys)
        if ("logp" in tokens or "prob" in tokens) and "advantage" in tokens:
            if "step" not in tokens:
                raise UserError(
                    f"{shown(self.file)} has token rows but no step; give its name with --map "
                    f"step=NAME (columns: {', '.join(map(printable, keys))})"
                )
            return "tokens", tokens
        rollouts, _ = self.sink.names.plan("rollouts", keys)
        if "completion" in rollouts and "reward" in rollouts and "step" in rollouts:
            return "rollouts", rollouts
        return "steps", {}

    def _note_names(self, table: str, keys: tuple[str, ...], rows: int) -> None:
        taken, rest = self.sink.names.plan(table, keys)
        self.report.mapped.update(taken)
        for key in rest:
            self.report.unknown_keys[key] += rows

    def _token_row(
        self, values: Mapping[str, Any], keys: tuple[str, ...], taken: dict[str, str], number: int
    ) -> None:
        """A row of a token, held until a block is full, or the lists of one completion."""
        if any(isinstance(values[theirs], list) for theirs in taken.values()):
            self._sequence(values, keys, taken, number)
            return
        if keys != self._keys:
            self._flush()
            self._keys = keys
        if as_step(values[taken["step"]]) is None:
            self.report.count(_NO_STEP, self.file, number)
            return
        self._held.append({theirs: values[theirs] for theirs in taken.values()})
        if len(self._held) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._lists:
            frame = pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in self._lists.items()})
            self._lists = {}
            self.sink.add_tokens(self._codes.apply(frame.astype({"step": "int64"})))
        if self._held:
            held, self._held = self._held, []
            frame = pd.DataFrame({key: pd.Series([row[key] for row in held], dtype=object)
                                  for key in held[0]})  # fmt: skip
            self._tokens(frame, self._keys, self._kind(self._keys)[1])

    def _tokens(self, frame: pd.DataFrame, keys: tuple[str, ...], taken: dict[str, str]) -> None:
        """Rows of tokens; the index is their number in the file."""
        self._note_names("tokens", keys, len(frame))
        named = pd.DataFrame({ours: frame[theirs] for ours, theirs in taken.items()})
        named["step"] = [as_step(value) for value in named["step"]]
        for number in named.index[named["step"].isna()]:
            self.report.count(_NO_STEP, self.file, number)
        named = named.dropna(subset="step").astype({"step": "int64"})
        self.sink.add_tokens(self._codes.apply(named))

    def _sequence(
        self, values: Mapping[str, Any], keys: tuple[str, ...], taken: dict[str, str], number: int
    ) -> None:
        step = as_step(values[taken["step"]])
        if step is None:
            self.report.bad_line(self.file, number, "no step")
            return
        named = {ours: values[theirs] for ours, theirs in taken.items()} | {"step": step}
        named.setdefault("rollout", self._codes.next("rollout", step))
        rows = expanded(named)
        if rows.keys() != self._lists.keys():
            self._flush()
            self._lists = {name: [] for name in rows}
        for name, cells in rows.items():
            self._lists[name] += cells
        self._note_names("tokens", keys, len(rows["position"]))
        if len(self._lists["position"]) >= _BATCH:
            self._flush()

    def _rollout(
        self, values: Mapping[str, Any], keys: tuple[str, ...], taken: dict[str, str], number: int
    ) -> None:
        step = as_step(values[taken["step"]])
        if step is None:
            self.report.bad_line(self.file, number, "no step")
            return
        if values.get("capture_reason") in CHOSEN:
            self.report.count("completions kept for their reward, left out", self.file, number)
            return
        self._note_names("rollouts", keys, 1)
        named = {ours: values[theirs] for ours, theirs in taken.items()} | {"step": step}
        named.setdefault("group", str(named.get("prompt")))
        named["rollout"] = self._codes.next("rollout", step)
        named["group"] = self._codes.code("group", step, named["group"])
        for name in ("prompt", "completion", "answer"):
            named[name] = message_text(named.get(name))
        for name in ("reward", "advantage", "length"):
            if named.get(name) is not None and as_number(named[name]) is None:
                what = f"values of {name} that are no number, left out"
                self.report.count(what, self.file, number)
                named[name] = None
        self.sink.add_rollout(named)


_NO_STEP = "token rows without a step left out"


def _has_lists(columns: Iterable[pd.Series]) -> bool:
    """Whether any cell of some columns holds a list; a missing first one says nothing."""
    cells = chain.from_iterable(column for column in columns if column.dtype == object)
    return any(isinstance(cell, list | np.ndarray | tuple) for cell in cells)


@dataclass
class Codes:
    """Numbers for groups and rollouts that a source names by text, from 0 within each step.

    Whole numbers that fit the column stay as they are; texts, and numbers beyond it, get the next
    free number. Those of the ``_HELD`` steps seen last are remembered.
    """

    _known: dict[tuple[str, int], dict[Any, int]] = field(default_factory=dict)
    _used: dict[tuple[str, int], set[int]] = field(default_factory=dict)

    def code(self, name: str, step: int, value: Any) -> int | None:
        """Number of a value; None stays None."""
        if value is None or value != value:  # nan
            return None
        number = as_step(value) if isinstance(value, int | float | np.number) else None
        known, used = self._of(name, step)
        key = number if number is not None else str(value)
        if key not in known:
            free = number if number is not None and number not in used else self._free(used)
            known[key] = free
            used.add(free)
        return known[key]

    def next(self, name: str, step: int) -> int:
        """Number of the next thing of a step that has no name."""
        known, used = self._of(name, step)
        free = self._free(used)
        known[f"#{len(known)}"] = free
        used.add(free)
        return free

    def apply(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows with ``group`` and ``rollout`` as numbers, ``step`` given."""
        for name in ("group", "rollout"):
            if name in frame and not _are_codes(frame[name]):
                pairs = zip(frame["step"], frame[name], strict=True)
                codes = [self.code(name, step, value) for step, value in pairs]
                frame = frame.assign(**{name: pd.Series(codes, index=frame.index, dtype="float64")})
        return frame

    @staticmethod
    def _free(used: set[int]) -> int:
        return next(number for number in count(len(used)) if number not in used)

    def _of(self, name: str, step: int) -> tuple[dict[Any, int], set[int]]:
        key = (name, step)
        if key not in self._known and len(self._known) >= _HELD:
            oldest = next(iter(self._known))
            del self._known[oldest], self._used[oldest]
        return self._known.setdefault(key, {}), self._used.setdefault(key, set())


def _are_codes(values: pd.Series) -> bool:
    """Whether a column holds whole numbers that fit, and nothing else."""
    try:
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError, OverflowError):
        return False
    return bool(((numbers == np.rint(numbers)) & (numbers >= 0) & (numbers <= MAX_STEP)).all())


def expanded(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Columns of the tokens of one completion: lists as they are, single values repeated.

    Returns rows of the loss mask; ``position`` counts them from 0 unless it is given. Raises
    ValueError if the lists differ in length. ``values``: columns of the ``tokens`` table (and
    ``loss_mask``) to lists of one length, or to values.
    """
    lengths = {name: len(value) for name, value in values.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists of different length {lengths}")
    rows = next(iter(lengths.values()), 1)
    columns = {
        name: value if isinstance(value, list) else [value] * rows for name, value in values.items()
    }
    if "loss_mask" in columns:
        inside = [bool(mark) and mark == mark for mark in columns.pop("loss_mask")]
        columns = {name: list(compress(cells, inside)) for name, cells in columns.items()}
        rows = sum(inside)
    columns.setdefault("position", list(range(rows)))
    return columns


def sequence_rows(values: Mapping[str, Any]) -> pd.DataFrame:
    """The same as a data frame."""
    return pd.DataFrame(expanded(values))
