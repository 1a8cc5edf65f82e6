"""Bytes on disk: names of the layout, atomic writes, the Parquet encoding, guarded reads."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError
from wapo_analysis.schema import Column
from wapo_analysis.store.parts import read_part
from wapo_analysis.table import Array, Records

MANIFEST = "manifest.json"
STEP_LOG = "steps.jsonl"
VOCAB = "vocab.parquet"
PART_TABLES = ("tokens", "classes", "rollouts", "probes")
MANTISSA_BITS = 15
FULL_BITS = 23
"""Mantissa bits of a float32."""
JSON_BYTES = 1 << 26
"""Most bytes of a manifest that are read."""
JSON_DEPTH = 64
"""Levels of nesting that are read."""
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


def open_regular(path: Path, limit: int) -> BinaryIO:
    """Open a regular file for reading; never a pipe, a socket or a device, which could block.

    Parameters
    ----------
    path : Path
        A link to a regular file will do.
    limit : int
        Most bytes it may have.

    Raises
    ------
    FileNotFoundError
        If it is not there (any more).
    UserError
        If it is no regular file, is larger, or cannot be opened; the message names it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is no regular file; move it away")
        # A pipe that has taken its place since must not block either.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        stream = open(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {error}") from error
    status = os.fstat(stream.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return stream
    stream.close()
    raise UserError(
        f"{path} has {status.st_size:,} bytes, more than the {limit:,} that are read"
        if stat.S_ISREG(status.st_mode)
        else f"{path} is no regular file; move it away"
    )


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """Content of a JSON file.

    Raises
    ------
    FileNotFoundError
        If it is not there (any more).
    UserError
        If it cannot be read, is no JSON, or is too large or too deeply nested.
    """
    try:
        with open_regular(path, limit) as stream:
            return parse_json(stream.read(limit + 1).decode("utf-8"))
    except (UserError, FileNotFoundError):
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def parse_json(text: str) -> Any:
    """Value of a JSON text; ValueError if it is none or is nested more than `JSON_DEPTH` deep."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {JSON_DEPTH} deep")


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


def read_vocab(path: Path) -> dict[int, str]:
    """Token id to text of the ids a run has seen; empty if none were written."""
    file = path / VOCAB
    if not file.exists():
        return {}
    table = read_part(file)
    return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))
