"""Files to records and blocks of rows, in bounded memory, while they may still be written to."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError
from wapo_analysis.importers.jsonl import JsonLines
from wapo_analysis.importers.report import ImportReport

PASSES = 3
_BLOCK = 4 << 20
_ROWS = 8192


def json_records(file: Path, report: ImportReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of a file of JSON lines with their numbers; lines written meanwhile are read too."""
    log = JsonLines(file)
    for _ in range(PASSES):
        before = log.offset
        for number, _, values in log.records():
            yield number, values
        if log.offset == before:
            break
    last, half = log.tail()
    if last is not None:
        yield log.line, last
    report.close_lines(log, half)


def json_list(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSON file that holds a list of them, or one.

    Raises
    ------
    UserError
        If it holds anything else.
    """
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {str(error).split(':')[0]}") from error
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file} is no list of JSON objects")
    return rows


class _WholeLines(io.RawIOBase):
    """A file up to its last line feed: the line after it may still be being written."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("rb")
        size = self._stream.seek(0, 2)
        self._left = self._last_feed(size)
        self.cut = size - self._left
        self._stream.seek(0)

    def _last_feed(self, size: int) -> int:
        end = size
        while end > 0:
            start = max(0, end - 65536)
            self._stream.seek(start)
            found = self._stream.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def csv_frames(file: Path, report: ImportReport) -> Iterator[tuple[int, pd.DataFrame]]:
    """Blocks of a CSV or TSV file as text columns, each with the row number it begins at.

    Rows with a wrong number of fields are counted, and a last line without line feed is left out:
    nobody can tell whether its last number is whole.

    Raises
    ------
    UserError
        If it is no table.
    """

    def skip(row: Any) -> str:
        fields = f"{row.actual_columns} fields, not {row.expected_columns}"
        report.bad_line(file, row.number or 0, fields)
        return "skip"

    source = _WholeLines(file)
    if source.cut:
        report.half_lines.append(file.name)
    parse = pacsv.ParseOptions(
        delimiter="\t" if file.suffix == ".tsv" else ",",
        invalid_row_handler=skip,
        newlines_in_values=True,
    )
    try:
        # Types guessed from the first block fail on a later one; numbers are made from text.
        texts = dict.fromkeys(_header(file, parse.delimiter), pa.string())
        reader = pacsv.open_csv(
            pa.PythonFile(source, mode="r"),
            pacsv.ReadOptions(block_size=_BLOCK, use_threads=False),
            parse,
            pacsv.ConvertOptions(column_types=texts, strings_can_be_null=True),
        )
        row = 2
        for batch in reader:
            yield row, batch.to_pandas()
            row += batch.num_rows
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no CSV table: {str(error).splitlines()[0]}") from error
    finally:
        source.close()
    report.files += 1


def _header(file: Path, delimiter: str) -> list[str]:
    with file.open("rb") as stream:
        first = pa.BufferReader(stream.readline())
    parse = pacsv.ParseOptions(delimiter=delimiter)
    return list(pacsv.read_csv(first, parse_options=parse).column_names)


def parquet_frames(file: Path, report: ImportReport) -> Iterator[tuple[int, pd.DataFrame]]:
    """Blocks of a Parquet file, each with the row number it begins at.

    Raises
    ------
    UserError
        If it is broken.
    """
    try:
        row = 1
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS):
            yield row, batch.to_pandas()
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is broken or no Parquet: {str(error).splitlines()[0]}") from error
    report.files += 1


def message_text(value: Any) -> str | None:
    """Text of a prompt or completion: a string, chat messages joined, or anything as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(m, dict) for m in value):
        return "\n".join(message_text(m.get("content")) or "" for m in value)
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return str(value["text"])
    return json.dumps(value, default=str, ensure_ascii=False)
