"""Bytes on disk: names of the layout, atomic writes, the Parquet encoding, guarded reads."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError
from wapo_analysis.schema import SCHEMA_VERSION, Column
from wapo_analysis.table import Array, Records

MANIFEST = "manifest.json"
STEP_LOG = "steps.jsonl"
VOCAB = "vocab.parquet"
PART_TABLES = ("tokens", "classes", "rollouts", "probes")
MANTISSA_BITS = 15

_ARROW = {"str": pa.string(), "bool": pa.bool_()}


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a half."""
    beside = path.parent / f".{path.name}.{uuid4().hex[:8]}"
    try:
        with beside.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
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


def arrow_table(records: Records) -> pa.Table:
    """Stored columns of records as an Arrow table; NaN and masked become null."""
    stored = records.table.stored
    arrays = [_arrow_array(records[column.name], column) for column in stored]
    return pa.Table.from_arrays(arrays, names=[column.name for column in stored])


def _arrow_array(values: Array, column: Column) -> pa.Array:
    kind = _ARROW.get(column.dtype) or pa.from_numpy_dtype(np.dtype(column.dtype))
    if column.dtype == "float32":
        values = round_mantissa(np.ascontiguousarray(values, dtype=np.float32))
    if column.dtype.startswith("float"):
        return pa.array(values, type=kind, mask=np.isnan(values))
    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, type=kind, mask=np.ma.getmaskarray(values))
    return pa.array(values, type=kind)


def parquet_bytes(table: pa.Table) -> bytes:
    """Encode as Parquet: zstd, byte-stream-split floats, dictionaries for the rest."""
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


def part_step(part: Path) -> int:
    """Step a part belongs to, from its name."""
    return int(part.name.split("-")[1])


def step_lines(log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def read_part(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file.

    Raises
    ------
    UserError
        If it is broken; the message names it.
    """
    try:
        return pq.ParquetFile(file).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file} is broken or truncated ({str(error).splitlines()[0]}); "
            "move it away to read the other parts"
        ) from error


def read_vocab(path: Path) -> dict[int, str]:
    """Token id to text of the ids a run has seen; empty if none were written."""
    file = path / VOCAB
    if not file.exists():
        return {}
    table = read_part(file)
    return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))
