"""Bytes on disk: names of the layout, atomic writes, the Parquet encoding, guarded reads."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError
from wapo_analysis.schema import SCHEMA_VERSION, Column
from wapo_analysis.store.parts import read_part
from wapo_analysis.table import Array, Records

MANIFEST = "manifest.json"
STEP_LOG = "steps.jsonl"
VOCAB = "vocab.parquet"
PART_TABLES = ("tokens", "classes", "rollouts", "probes")
MANTISSA_BITS = 15
FULL_BITS = 23
"""Mantissa bits of a float32."""
# Counters climb by one or repeat; differences of neighbours take almost nothing.
_COUNTERS = frozenset(("group", "rollout", "position"))

_ARROW = {"str": pa.string(), "bool": pa.bool_()}


@contextmanager
def renamed_when_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` that takes its name, fsynced, once the block has ended well."""
    beside = path.parent / f".{path.name}.{uuid4().hex[:8]}"
    try:
        with beside.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a half."""
    with renamed_when_whole(path) as stream:
        stream.write(data)


def round_mantissa(values: Array, bits: int = MANTISSA_BITS) -> Array:
    """Round float32 values to the given number of mantissa bits (NaN and inf stay).

    Mantissas of measured statistics do not compress; 15 bits keep a relative error of 1.5e-5 and
    take a quarter off the file.

    Parameters
    ----------
    values : ndarray of float32
    bits : int
        Bits kept, 1..23; 23 keeps all.
    """
    drop = FULL_BITS - bits
    if drop == 0:
        return values
    raw = values.view(np.uint32)
    rounded = (raw + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def arrow_table(records: Records, bits: int = MANTISSA_BITS) -> pa.Table:
    """Stored columns of records as an Arrow table; NaN and masked become null.

    Parameters
    ----------
    records : Records
    bits : int
        Mantissa bits that float32 columns keep.
    """
    stored = records.table.stored
    arrays = [_arrow_array(records[column.name], column, bits) for column in stored]
    return pa.Table.from_arrays(arrays, names=[column.name for column in stored])


def _arrow_array(values: Array, column: Column, bits: int) -> pa.Array:
    kind = _ARROW.get(column.dtype) or pa.from_numpy_dtype(np.dtype(column.dtype))
    if column.dtype == "float32":
        values = round_mantissa(np.ascontiguousarray(values, dtype=np.float32), bits)
    if column.dtype.startswith("float"):
        return pa.array(values, type=kind, mask=np.isnan(values))
    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, type=kind, mask=np.ma.getmaskarray(values))
    return pa.array(values, type=kind)


def encoding(schema: pa.Schema) -> dict[str, Any]:
    """Options of the Parquet writer: zstd; floats byte-split, counters as differences.

    Everything else is a dictionary. Parquet has no integers narrower than 32 bits, but the indices
    of a dictionary take as many bits as they need, and a constant column takes none. Only the step
    has statistics, which is what row groups are left out by.
    """
    floats = {f.name for f in schema if pa.types.is_floating(f.type)}
    counters = {f.name for f in schema if f.name in _COUNTERS and pa.types.is_int32(f.type)}
    special = dict.fromkeys(floats, "BYTE_STREAM_SPLIT")
    special |= dict.fromkeys(counters, "DELTA_BINARY_PACKED")
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [name for name in schema.names if name not in special],
        "column_encoding": special,
        "write_statistics": ["step"],
    }


def parquet_bytes(table: pa.Table) -> bytes:
    """Encode as Parquet, see `encoding`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **encoding(table.schema))
    return bytes(sink.getvalue())


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


def read_vocab(path: Path) -> dict[int, str]:
    """Token id to text of the ids a run has seen; empty if none were written."""
    file = path / VOCAB
    if not file.exists():
        return {}
    table = read_part(file)
    return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))
