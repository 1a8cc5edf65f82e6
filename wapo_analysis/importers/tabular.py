"""Plain tables: CSV, TSV, JSON lines, JSON and Parquet with token, rollout or step rows.

What a row is follows from its columns: a log-probability and an advantage make it a token (or, as
lists, a completion's tokens), a completion with a reward a rollout, anything else with a step a
line of a metrics log. CSV and Parquet are read in blocks, so memory does not grow with the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from wapo_analysis.errors import UserError
from wapo_analysis.importers.readers import (
    csv_frames,
    json_list,
    json_records,
    message_text,
    parquet_frames,
)
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.sequences import Codes, sequence_rows
from wapo_analysis.importers.sink import Sink, as_step

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_BATCH = 8192


def read_tables(files: list[Path], sink: Sink, report: ImportReport) -> None:
    """Read plain tables into a run.

    Raises
    ------
    UserError
        If a file is broken as a whole, or no row has a step and columns of ours.
    """
    for file in files:
        feed = TableFeed(sink, report, file)
        if file.suffix == ".json":
            for number, values in enumerate(json_list(file), start=1):
                feed.record(values, number)
            report.files += 1
        elif file.suffix in (".jsonl", ".ndjson"):
            for number, values in json_records(file, report):
                feed.record(values, number)
        else:
            frames = parquet_frames if file.suffix == ".parquet" else csv_frames
            for first, frame in frames(file, report):
                feed.frame(frame, first)
        feed.close()


@dataclass
class TableFeed:
    """Takes the rows of one table and hands them to the sink as what they are."""

    sink: Sink
    report: ImportReport
    file: Path
    _codes: Codes = field(default_factory=Codes)
    _held: list[dict[str, Any]] = field(default_factory=list)
    _keys: tuple[str, ...] = ()

    def record(self, values: Mapping[str, Any], number: int) -> None:
        """Take one row; its number is named if it cannot be used."""
        keys = tuple(values)
        kind, taken = self._kind(keys)
        if kind == "tokens" and isinstance(values[taken.get("logp", taken.get("prob", ""))], list):
            self._sequence(values, keys, taken, number)
        elif kind == "tokens":
            if keys != self._keys:
                self._flush()
                self._keys = keys
            self._held.append({theirs: values[theirs] for theirs in taken.values()})
            if len(self._held) >= _BATCH:
                self._flush()
        elif kind == "rollouts":
            self._rollout(values, keys, taken, number)
        elif not self.sink.add_log(values, "table"):
            self.report.bad_line(self.file, number, "no step")

    def frame(self, frame: pd.DataFrame, first: int) -> None:
        """Take rows of a data frame, the first of them with this number."""
        keys = tuple(frame.columns)
        kind, taken = self._kind(keys)
        lists = kind == "tokens" and self._is_list(frame, taken)
        if kind == "tokens" and not lists:
            self._tokens(frame, keys, taken)
            return
        for number, values in enumerate(frame.to_dict("records"), start=first):
            self.record({str(k): _plain(v) for k, v in values.items()}, number)

    def close(self) -> None:
        """Hand over what is held."""
        self._flush()

    def _kind(self, keys: tuple[str, ...]) -> tuple[str, dict[str, str]]:
        tokens, _ = self.sink.names.plan("tokens", keys)
        if ("logp" in tokens or "prob" in tokens) and "advantage" in tokens:
            if "step" not in tokens:
                raise UserError(
                    f"{self.file} has token rows but no step; give its name with --map step=NAME "
                    f"(columns: {', '.join(keys)})"
                )
            return "tokens", tokens
        rollouts, _ = self.sink.names.plan("rollouts", keys)
        if "completion" in rollouts and "reward" in rollouts and "step" in rollouts:
            return "rollouts", rollouts
        return "steps", {}

    @staticmethod
    def _is_list(frame: pd.DataFrame, taken: Mapping[str, str]) -> bool:
        values = frame[taken.get("logp", taken.get("prob", ""))]
        return len(values) > 0 and not isinstance(values.iloc[0], str | int | float | None)

    def _note_names(self, table: str, keys: tuple[str, ...], rows: int) -> None:
        taken, rest = self.sink.names.plan(table, keys)
        self.report.mapped.update(taken)
        for key in rest:
            self.report.unknown_keys[key] += rows

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, []
            frame = pd.DataFrame(held)
            self._tokens(frame, self._keys, self._kind(self._keys)[1])

    def _tokens(self, frame: pd.DataFrame, keys: tuple[str, ...], taken: dict[str, str]) -> None:
        self._note_names("tokens", keys, len(frame))
        named = pd.DataFrame({ours: frame[theirs] for ours, theirs in taken.items()})
        steps = [as_step(value) for value in named["step"]]
        lost = sum(step is None for step in steps)
        if lost:
            self.report.counts["token rows without a step left out"] += lost
        named["step"] = pd.Series(steps, index=named.index, dtype="float64")
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
        try:
            rows = sequence_rows(named)
        except ValueError as error:
            self.report.bad_line(self.file, number, str(error))
            return
        self._note_names("tokens", keys, len(rows))
        self.sink.add_tokens(self._codes.apply(rows))

    def _rollout(
        self, values: Mapping[str, Any], keys: tuple[str, ...], taken: dict[str, str], number: int
    ) -> None:
        step = as_step(values[taken["step"]])
        if step is None:
            self.report.bad_line(self.file, number, "no step")
            return
        self._note_names("rollouts", keys, 1)
        named = {ours: values[theirs] for ours, theirs in taken.items()} | {"step": step}
        named.setdefault("group", str(named.get("prompt")))
        named["rollout"] = self._codes.next("rollout", step)
        named["group"] = self._codes.code("group", step, named["group"])
        for name in ("prompt", "completion", "answer"):
            named[name] = message_text(named.get(name))
        self.sink.add_rollout(named)


def _plain(value: Any) -> Any:
    """A cell as plain Python: arrays are lists, missing is None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | dict | str | bool):
        return value
    return None if value is None or pd.isna(value) else value
