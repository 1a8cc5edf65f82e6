"""Tables as Parquet: encoding, checksums, and reading that trusts nothing in the file.

Every page carries Parquet's own checksum, verified on reading. The file metadata hold one of their
own, of themselves and of all bytes before them (entry ``wapo_crc32``), since no checksum of the
format covers them. Any Parquet reader reads these files.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError, first_line
from wapo_analysis.schema import INTERACTION, OTHER_TOKENS, PROB_EDGES, Column, Table
from wapo_analysis.store.files import encodable, open_regular
from wapo_analysis.table import Array, Records

MANTISSA_BITS = 15
#: Mantissa bits of a float32.
FULL_BITS = 23
# Counters climb by one or repeat; differences of neighbours take almost nothing.
_COUNTERS = frozenset(("group", "rollout", "position"))

_ARROW = {"str": pa.string(), "bool": pa.bool_()}

#: Most bytes of a Parquet file that is read.
PART_BYTES = 1 << 40
#: Smaller files are read in one go; of larger ones, columns and row groups.
WHOLE_BYTES = 1 << 24
#: A file may take this many bytes in memory, or this many times its size if that is more.
LEAST_ROOM_BYTES = 1 << 30
ROOM = 256
_SEAL, _BLANK = b"wapo_crc32", b"00000000-00000000"
_SEALED = re.compile(_SEAL + rb".{2}([0-9a-f]{8})-([0-9a-f]{8})", re.DOTALL)
#: Bytes after the footer: its length and the magic number.
_END = 8
_BLOCK = 1 << 20
#: Columns that version 0.1 wrote under another name.
_RENAMED = {"probes": {"cls": "part"}}
# Codes that count classes, bins or parts; another one has no meaning to anything that reads them.
_CODES = {
    "classes": {"sign": (-1, 1), "regime": (-1, 1), "prob_bin": (-1, len(PROB_EDGES) - 2)},
    "probes": {"part": (0, INTERACTION), "tokens_of": (0, OTHER_TOKENS)},
}


def round_mantissa(values: Array, bits: int = MANTISSA_BITS) -> Array:
    """Round float32 values to the given number of mantissa bits (NaN and inf stay).

    Mantissas of measured statistics do not compress; 15 bits keep a relative error of 1.5e-5 and
    take a quarter off the file. ``bits``: bits kept, 1..23; 23 keeps all.
    """
    drop = FULL_BITS - bits
    if drop == 0:
        return values
    raw = values.view(np.uint32)
    rounded = raw + np.uint32(1 << (drop - 1))
    rounded &= np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    finite = np.isfinite(values)
    whole = rounded.view(np.float32)
    return whole if finite.all() else np.where(finite, whole, values)


def arrow_table(records: Records, bits: int = MANTISSA_BITS) -> pa.Table:
    """Stored columns of records as an Arrow table; NaN and masked become null.

    ``bits``: mantissa bits that float32 columns keep.
    """
    stored = records.table.stored
    arrays = [_arrow_array(records[column.name], column, bits) for column in stored]
    return pa.Table.from_arrays(arrays, names=[column.name for column in stored])


def arrow_type(column: Column) -> pa.DataType:
    """Type of a column on disk and on reading."""
    return _ARROW.get(column.dtype) or pa.from_numpy_dtype(np.dtype(column.dtype))


def _arrow_array(values: Array, column: Column, bits: int) -> pa.Array:
    kind = arrow_type(column)
    if column.dtype == "float32":
        values = round_mantissa(np.ascontiguousarray(values, dtype=np.float32), bits)
    if column.dtype.startswith("float"):
        missing = np.isnan(values)
        return pa.array(values, type=kind, mask=missing if missing.any() else None)
    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, type=kind, mask=np.ma.getmaskarray(values))
    return texts_array(values) if column.dtype == "str" else pa.array(values, type=kind)


def texts_array(texts: Sequence[str | None] | Array) -> pa.Array:
    """Texts for a file; halves of characters, which UTF-8 cannot hold, are escaped."""
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([encodable(t) if isinstance(t, str) else t for t in texts], pa.string())


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


def parquet_bytes(table: pa.Table) -> tuple[memoryview, bytes]:
    """Encode as Parquet, see `encoding`: two pieces, sealed, that make the file."""
    sink = pa.BufferOutputStream()
    with parquet_writer(sink, table.schema) as writer:
        writer.write_table(table)
    whole = memoryview(sink.getvalue())
    start = len(whole) - _footer_length(whole[-_END:])
    return whole[:start], _sealed(bytes(whole[start:]), crc32(whole[:start]))


@contextmanager
def parquet_writer(sink: Any, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Writer with our encoding, page checksums, and room for `seal`."""
    with pq.ParquetWriter(sink, schema, write_page_checksum=True, **encoding(schema)) as writer:
        yield writer
        writer.add_key_value_metadata({_SEAL: _BLANK})


# ---- the seal: checksums of the file metadata and of all that is before them ---------------------


def seal(stream: BinaryIO) -> None:
    """Fill in the checksums of a file that `parquet_writer` has written."""
    start, footer = _footer(stream)
    sealed = _sealed(footer, _crc_until(stream, start))
    stream.seek(start)
    stream.write(sealed)


def _sealed(footer: bytes, body: int) -> bytes:
    """Footer with the checksum of what is before it, and of itself but for this checksum."""
    found = _SEALED.search(footer)
    assert found is not None
    first, second = found.span(1), found.span(2)
    footer = footer[: first[0]] + b"%08x" % body + footer[first[1] :]
    return footer[: second[0]] + b"%08x" % crc32(footer) + footer[second[1] :]


def check_seal(stream: BinaryIO, whole: bool = False) -> bool:
    """Check the file metadata of a Parquet file, and if asked all bytes before them.

    Returns whether there are checksums; files of version 0.1 or of other tools have none and pass.
    Raises ValueError if a checksum does not match.
    """
    start, footer = _footer(stream)
    found = _SEALED.search(footer)
    if found is None:
        return False
    blank = footer[: found.start(2)] + b"0" * 8 + footer[found.end(2) :]
    if int(found[2], 16) != crc32(blank):
        raise ValueError("its metadata do not match their checksum")
    if whole and int(found[1], 16) != _crc_until(stream, start):
        raise ValueError("its content does not match its checksum")
    return True


def _footer_length(end: bytes | memoryview) -> int:
    """Bytes of the footer, its length and the magic number included."""
    return int.from_bytes(end[:4], "little") + _END


def _footer(stream: BinaryIO) -> tuple[int, bytes]:
    """Where the footer begins, and its bytes to the end of the file."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - _END, 0))
    length = _footer_length(stream.read(_END))
    if length > size:
        return size, b""  # no Parquet file, as its reader will say
    stream.seek(size - length)
    return size - length, stream.read(length)


def _crc_until(stream: BinaryIO, end: int) -> int:
    stream.seek(0)
    value = 0
    for start in range(0, end, _BLOCK):
        value = crc32(stream.read(min(_BLOCK, end - start)), value)
    return value


# ---- reading -------------------------------------------------------------------------------------


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn whatever reading a broken file raises into one line that names it."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:
        raise UserError(
            f"{path} is broken or truncated ({first_line(error)}); move it away to read the other "
            "parts"
        ) from error


def verify(path: Path) -> bool:
    """Check every byte of a file; whether it has the checksums for it. Raises as `open_part`."""
    with named(path), open_regular(path, PART_BYTES) as stream:
        return check_seal(stream, whole=True)


def open_part(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; its pages are verified as they are read.

    Raises FileNotFoundError if it is not there (any more); UserError if it is broken, is no regular
    file or would not fit into memory; the message names it.
    """
    with named(path), open_regular(path, PART_BYTES) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= WHOLE_BYTES:
            content = stream.read()
            check_seal(io.BytesIO(content))
            source = pa.BufferReader(content)
        else:
            check_seal(stream)
            source = pa.OSFile(str(path))
        file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
        meta = file.metadata
        groups = sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))
        _check_room(path, max(groups, 8 * meta.num_rows * meta.num_columns), size)
        names = file.schema_arrow.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"it has twice column {twice}")
        texts = [f.name for f in file.schema_arrow if f.type in (pa.string(), pa.binary())]
        if texts:  # each text once, until it is known how much memory all of them take
            options = {"metadata": meta, "read_dictionary": texts}
            file = pq.ParquetFile(source, page_checksum_verification=True, **options)
        return file


def read_part(
    path: Path, columns: list[str] | None = None, groups: list[int] | None = None
) -> pa.Table:
    """Read a Parquet file, or some of its row groups; raises as `open_part`."""
    with named(path), open_part(path) as file:
        # Sharing a small file out to threads takes longer than reading it.
        threads = path.stat().st_size > WHOLE_BYTES
        if groups is None:
            table = file.read(columns=columns, use_threads=threads)
        else:
            table = file.read_row_groups(groups, columns=columns, use_threads=threads)
        for place, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):
                if (
                    len(column) * column.nbytes > LEAST_ROOM_BYTES
                ):  # no row takes more than all texts
                    _check_room(path, _text_bytes(column), path.stat().st_size)
                table = table.set_column(place, table.field(place).name, column.cast(pa.string()))
        return table


def _check_room(path: Path, wanted: int, size: int) -> None:
    if wanted > max(LEAST_ROOM_BYTES, ROOM * size):
        raise UserError(
            f"{path} has {size:,} bytes and would take {wanted:,} in memory; move it away"
        )


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of the texts of a column that holds each text once."""
    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
        total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total


def fitted(table: pa.Table, declared: Table, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a table in the types the schema declares; others stay as they are.

    Raises ValueError if a required column is missing, a column has another kind of values or codes
    without meaning, or a row has no step. ``columns``: columns that were asked for; others need not
    be there.
    """
    table = table.rename_columns(current_names(table.schema.names, declared))
    names = table.schema.names
    wanted = declared.required if columns is None else set(columns) & set(declared.required)
    for name in wanted:
        if name not in names:
            raise ValueError(f"it lacks column {name}")
    for place, name in enumerate(names):
        if name in declared:
            column = table.column(place)
            fit = _fitted(column, declared[name])
            if fit is not column:
                table = table.set_column(place, name, fit)
    if "step" in names and table["step"].null_count:
        raise ValueError("a row has no step")
    for name, (least, most) in _CODES.get(declared.name, {}).items():
        if name in names and len(table):
            found = pc.min_max(table[name])
            low, high = found["min"].as_py(), found["max"].as_py()
            if table[name].null_count or low < least or high > most:
                raise ValueError(f"column {name} is not {least} to {most} in every row")
    return table


def current_names(names: Sequence[str], declared: Table) -> list[str]:
    """Names of columns as the schema has them today."""
    renamed = _RENAMED.get(declared.name, {})
    return [renamed.get(name, name) for name in names]


def _fitted(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    kind = arrow_type(column)
    try:
        fit = values if values.type == kind else values.cast(kind)
        if kind == pa.string():
            fit.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"column {column.name} holds {values.type}, not {column.dtype}") from error
    return fit
