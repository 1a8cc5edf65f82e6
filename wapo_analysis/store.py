"""A run on disk: manifest, step log and Parquet parts; the only module that knows the layout.

A part is written beside its final name, fsynced and renamed, so it is whole or absent. The step
log is appended and flushed; its last line may be half written and is then left out on reading.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.derive import derived_columns, with_class
from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.schema import SCHEMA_VERSION, STEPS, TABLES, Column, Table
from wapo_analysis.table import Array, Records

MANIFEST = "manifest.json"
STEP_LOG = "steps.jsonl"
VOCAB = "vocab.parquet"
PART_TABLES = ("tokens", "classes", "rollouts", "probes")
MANTISSA_BITS = 15

_ARROW = {"str": pa.string(), "bool": pa.bool_()}


# ---- writing ----------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a half."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def round_mantissa(values: Array, bits: int = MANTISSA_BITS) -> Array:
    """Round float32 values to the given number of mantissa bits (NaN and inf stay).

    Mantissas of measured statistics do not compress; 15 bits keep a relative error of 1.5e-5 and
    take a quarter off the file.
    """
    drop = 23 - bits
    raw = values.view(np.uint32)
    rounded = (raw + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _arrow_table(records: Records) -> pa.Table:
    stored = records.table.stored
    arrays = [_arrow_array(records[column.name], column) for column in stored]
    return pa.Table.from_arrays(arrays, names=[column.name for column in stored])


def _arrow_array(values: Array, column: Column) -> pa.Array:
    kind = _ARROW.get(column.dtype) or pa.from_numpy_dtype(np.dtype(column.dtype))
    if column.dtype == "float32":
        values = round_mantissa(np.ascontiguousarray(values, dtype=np.float32))
    if column.dtype.startswith("float"):
        return pa.array(values, type=kind, mask=np.isnan(values))
    return pa.array(values, type=kind)


def _parquet_bytes(table: pa.Table) -> bytes:
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    others = [f.name for f in table.schema if f.name not in floats]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=others,
        use_byte_stream_split=floats,
    )
    return bytes(sink.getvalue())


class RunWriter:
    """Writes one run folder.

    Parameters
    ----------
    path : Path
        Folder; made if absent.
    manifest : mapping
        Description of the run (JSON values); schema version is added.
    resume_after : int, optional
        Continue an existing run after this step: later steps and parts are dropped.

    Raises
    ------
    UserError
        If the folder already holds a run and ``resume_after`` is None, or cannot be written.
    """

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], resume_after: int | None = None
    ) -> None:
        self.path = path
        if resume_after is None and (path / MANIFEST).exists():
            raise UserError(
                f"{path} already holds a run; choose another folder, continue it with --resume, "
                "or delete it"
            )
        try:
            for name in PART_TABLES:
                (path / name).mkdir(parents=True, exist_ok=True)
            if resume_after is not None:
                _rewind(path, resume_after)
            self.manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **manifest}
            self.update_manifest(status="running")
        except OSError as error:
            raise UserError(f"cannot write run folder {path}: {error.strerror}") from error
        self._steps = (path / STEP_LOG).open("a", encoding="utf-8")
        self._vocab: dict[int, str] = read_vocab(path)

    def update_manifest(self, **changes: Any) -> None:
        """Change manifest entries and write the manifest anew."""
        self.manifest.update(changes)
        text = json.dumps(self.manifest, indent=1, sort_keys=False, default=str)
        write_atomic(self.path / MANIFEST, text.encode())

    def append_step(self, row: Mapping[str, float]) -> None:
        """Append one line to the step log and flush it; non-finite numbers become null."""
        unknown = [name for name in row if name not in STEPS and "/" not in name]
        if unknown:
            raise unknown_name("step column", unknown[0], STEPS.names)
        clean = {name: _json_number(value) for name, value in row.items()}
        self._steps.write(json.dumps(clean) + "\n")
        self._steps.flush()

    def write_part(self, records: Records, step: int, rank: int = 0) -> None:
        """Write one whole part of a table for one step and rank."""
        name = f"part-{step:08d}-{rank}.parquet"
        write_atomic(self.path / records.table.name / name, _parquet_bytes(_arrow_table(records)))

    def add_vocab(self, texts: Mapping[int, str]) -> None:
        """Add token id -> text entries; rewritten only when something is new."""
        if all(token in self._vocab for token in texts):
            return
        self._vocab.update(texts)
        ids = sorted(self._vocab)
        table = pa.table(
            {"token_id": pa.array(ids, pa.int32()), "text": [self._vocab[i] for i in ids]}
        )
        write_atomic(self.path / VOCAB, _parquet_bytes(table))

    def missing_vocab(self, ids: Iterable[int]) -> list[int]:
        """Token ids that have no text yet."""
        return [token for token in ids if token not in self._vocab]

    def close(self, status: str) -> None:
        """Close the step log and note how the run ended."""
        if not self._steps.closed:
            self._steps.close()
            self.update_manifest(status=status)


def _json_number(value: float) -> float | int | None:
    number = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(number, float) and not np.isfinite(number) else number


def _rewind(path: Path, last: int) -> None:
    """Drop steps and parts after ``last``, and a half-written last line."""
    log = path / STEP_LOG
    if log.exists():
        kept = [line for line, row in _step_lines(log) if row["step"] <= last]
        write_atomic(log, "".join(f"{line}\n" for line in kept).encode())
    for name in PART_TABLES:
        for part in (path / name).glob("part-*.parquet"):
            if _part_step(part) > last:
                part.unlink()


def _part_step(part: Path) -> int:
    return int(part.name.split("-")[1])


# ---- reading ----------------------------------------------------------------------------------


def _step_lines(log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines of the step log with their content; an unfinished last line is left out."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no integer 'step'")
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(
                f"{log}: line {number} is not a step record ({error}); "
                "delete that line to read the others"
            ) from error
        yield line, row


def read_manifest(path: Path) -> dict[str, Any]:
    """Manifest of a run folder.

    Raises
    ------
    UserError
        If the folder is missing, is no run, is broken, or is of another schema version.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise UserError(f"no run folder at {path}; give a folder written by wapo train or attach")
    if not file.exists():
        inside = sorted(p.parent.name for p in path.glob(f"*/{MANIFEST}"))
        hint = f"; runs inside it: {', '.join(inside)}" if inside else ""
        raise UserError(f"{path} is not a run: it has no {MANIFEST}{hint}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{file} has no schema_version; it is no manifest of a run")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}; this installation reads version {SCHEMA_VERSION}"
        )
    return dict(manifest)


def read_vocab(path: Path) -> dict[int, str]:
    """Token id to text of the ids a run has seen; empty if none were written."""
    file = path / VOCAB
    if not file.exists():
        return {}
    table = _guarded_read(file)
    return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))


def _guarded_read(file: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(file).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file} is broken or truncated ({str(error).splitlines()[0]}); "
            "move it away to read the other parts"
        ) from error


@dataclass(frozen=True, repr=False)
class Run:
    """A run opened for reading; tables are pandas data frames.

    Parameters
    ----------
    path : Path
        Run folder.
    manifest : dict
        Its manifest.
    """

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name shown in figures: the manifest's, else the folder's."""
        return str(self.manifest.get("name") or self.path.name)

    @property
    def objective(self) -> str:
        """Name of the objective, or ``"unknown"``."""
        return str(self.manifest.get("objective", {}).get("name", "unknown"))

    @property
    def temperature(self) -> float:
        """Softmax temperature of the recorded statistics."""
        return float(self.manifest.get("temperature", 1.0))

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Step table, one row per step, last record of a repeated step; NaN where missing."""
        log = self.path / STEP_LOG
        rows = [row for _, row in _step_lines(log)] if log.exists() else []
        frame = pd.DataFrame(rows, columns=_union(STEPS.names, rows))
        frame = frame.drop_duplicates("step", keep="last").sort_values("step")
        return frame.reset_index(drop=True).astype({"step": "int64"})

    @cached_property
    def classes(self) -> pd.DataFrame:
        """Class totals with a ``cls`` code column, summed over ranks."""
        frame = self.table("classes").drop(columns="rank")
        keys = ["step", "sign", "regime", "prob_bin"]
        return with_class(frame.groupby(keys, as_index=False).sum(min_count=1))

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        """Completions with rewards and advantages."""
        return self.table("rollouts")

    @cached_property
    def probes(self) -> pd.DataFrame:
        """Counterfactual probes; empty if the run had none."""
        return self.table("probes")

    @cached_property
    def vocab(self) -> dict[int, str]:
        """Token id to text."""
        return read_vocab(self.path)

    def tokens(self, steps: Iterable[int] | None = None, derived: bool = True) -> pd.DataFrame:
        """Token rows, by default of the whole run and with derived columns.

        Parameters
        ----------
        steps : iterable of int, optional
            Only these steps; parts of other steps are not opened.
        derived : bool
            Add the derived columns of the schema.
        """
        frame = self.table("tokens", steps)
        if not derived:
            return frame
        columns = {name: frame[name].to_numpy() for name in frame.columns}
        return frame.assign(**derived_columns(columns, self.temperature))

    def token_steps(self) -> list[int]:
        """Steps that have token rows."""
        return sorted({_part_step(part) for part in (self.path / "tokens").glob("part-*.parquet")})

    def table(self, name: str, steps: Iterable[int] | None = None) -> pd.DataFrame:
        """Stored columns of a table of parts.

        Raises
        ------
        UserError
            On an unknown table or a broken part (the message names the file).
        """
        if name not in PART_TABLES:
            raise unknown_name("table", name, PART_TABLES)
        wanted = None if steps is None else set(steps)
        parts = sorted((self.path / name).glob("part-*.parquet"))
        tables = [
            _guarded_read(part) for part in parts if wanted is None or _part_step(part) in wanted
        ]
        return _to_frame(tables, TABLES[name])

    def __repr__(self) -> str:
        status = self.manifest.get("status", "?")
        return f"Run({self.name!r}, {self.objective}, {len(self.steps)} steps, {status})"

    def _repr_html_(self) -> str:
        from html import escape

        shown = self.steps[["step", "reward", "entropy", "grad_norm"]].tail(5)
        return f"<b>{escape(repr(self))}</b>{shown.to_html(index=False)}"


def _union(names: tuple[str, ...], rows: list[dict[str, Any]]) -> list[str]:
    extra = {key for row in rows for key in row} - set(names)
    return [*names, *sorted(extra)]


def _to_frame(tables: list[pa.Table], declared: Table) -> pd.DataFrame:
    """Concatenate parts; null floats become NaN and absent columns are filled."""
    if not tables:
        return Records.build(declared, {name: [] for name in declared.required}).to_frame()
    frame: pd.DataFrame = pa.concat_tables(tables, promote_options="default").to_pandas()
    for column in declared.stored:
        if column.name not in frame:
            frame[column.name] = np.nan if column.dtype.startswith("float") else None
    return frame


def open_run(path: str | Path) -> Run:
    """Open a run folder for reading, finished or still being written.

    Parameters
    ----------
    path : str or Path
        Run folder.

    Raises
    ------
    UserError
        If it is no run, is broken, or has another schema version.

    Examples
    --------
    >>> open_run("no/such/folder")
    Traceback (most recent call last):
    wapo_analysis.errors.UserError: no run folder at no/such/folder; give a folder ...
    """
    folder = Path(path)
    return Run(folder, read_manifest(folder))


def find_runs(path: str | Path) -> list[Path]:
    """Run folders at or below a path: the path itself if it is a run, else its run subfolders.

    Raises
    ------
    UserError
        If there is none.
    """
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return [folder]
    found = sorted(p.parent for p in folder.glob(f"**/{MANIFEST}")) if folder.is_dir() else []
    if not found:
        read_manifest(folder)
    return found
