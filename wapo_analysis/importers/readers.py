"""Files to records and blocks of rows, in bounded memory, while they may still be written to."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError, first_line, printable
from wapo_analysis.importers.jsonl import JsonLines, as_number, parse_json, reason_of
from wapo_analysis.importers.packed import PAGES, head_of
from wapo_analysis.importers.report import ImportReport, shown
from wapo_analysis.store.files import JSON_DEPTH, open_regular

PASSES = 3
MAX_JSON_BYTES = 1 << 30
#: More of a line is not looked at to tell what it is.
LINE_BYTES = 1 << 20
_BLOCK = 4 << 20
_TAIL_BYTES = 1 << 16  # of a table, read backwards until a line ends
_ROWS = 8192
_TOLD_DOUBLES = 5
_SWALLOWED = 3  # lines; a completion may hold a line or two that look like a row
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


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


def table_kind(file: Path) -> str:
    """What a table is: csv, parquet, lines of JSON, one JSON value (json), a table in a text."""
    known = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "lines",
             ".ndjson": "lines", **dict.fromkeys(PAGES, "text")}  # fmt: skip
    if file.suffix in known:
        return known[file.suffix]
    head = head_of(file).removeprefix(codecs.BOM_UTF8)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.lstrip().startswith((b"{", b"[")) or file.suffix == ".json":
        return "lines" if is_json_lines(file) else "json"
    return "csv" if is_csv(head.decode("utf-8", "replace")) else "text"


def is_json_lines(file: Path) -> bool:
    """Whether the first line is a JSON object by itself, and not the last."""
    with open_regular(file) as stream:
        first = stream.readline(LINE_BYTES)
        more = stream.read(LINE_BYTES)
    try:
        return isinstance(parse_json(first), dict) and bool(more.strip())
    except ValueError:
        return len(list(islice(JsonLines(file).records(), 2))) == 2 and file.suffix != ".json"


def is_csv(text: str) -> bool:
    """Whether the first two lines have as many separators, and the second holds numbers."""
    first, _, rest = text.partition("\n")
    second = rest.partition("\n")[0]
    for mark in ",\t;":
        count = first.count(mark)
        if count and count == second.count(mark) and "=" not in first:
            cells = [cell.strip().strip('"') for cell in second.split(mark)]
            return any(re.fullmatch(r"[-+]?[\d.]+(?:e[-+]?\d+)?", cell) for cell in cells)
    return False


def json_value(file: Path, report: ImportReport) -> Any:
    """What a JSON file holds.

    Raises UserError if it is no JSON, or larger than ``MAX_JSON_BYTES``.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{file} is larger than 1 GiB; JSON is read as a whole, use JSON lines")
        changed: list[str] = []
        with open_regular(file) as stream:
            value = _one_or_more(stream.read(), changed)
        for what in changed:
            report.count(what, file, 1)
        return value
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{printable(shown(file))} is no JSON: {reason_of(error)}") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


_BETWEEN = re.compile(r"[ \t\r\n,]*")


def _one_or_more(data: bytes, changed: list[str]) -> Any:
    """A JSON value, or the list of those that follow each other, as of indented records."""
    try:
        return parse_json(data, changed)
    except ValueError as error:
        if not str(error).startswith("Extra data"):
            raise
        text, values, place = data.decode("utf-8-sig").strip(), [], 0
        while place < len(text):
            try:
                _, end = json.JSONDecoder().raw_decode(text, place)
            except RecursionError:
                raise ValueError(f"nested deeper than {JSON_DEPTH} levels") from None
            values.append(parse_json(text[place:end], changed))
            place = end + len(_BETWEEN.match(text, end)[0])  # type: ignore[index]
        return values


class _WholeLines(io.RawIOBase):
    """A table up to its last whole line, as UTF-8: the line after it may still be being written.

    Bytes that are no UTF-8 become U+FFFD and are counted by line.
    """

    def __init__(self, file: Path, report: ImportReport, fields: int, delimiter: str) -> None:
        self._stream = open_regular(file)
        size = self._stream.seek(0, io.SEEK_END)
        self._left = self._last_feed(size)
        if self._left and self._whole(fields, delimiter):
            self._left = size
        self.cut = size - self._left
        self._stream.seek(0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._held = b""
        self._file, self._report, self._line = file, report, 1

    def _last_feed(self, size: int) -> int:
        end = size
        while end:
            start = max(0, end - _TAIL_BYTES)
            self._stream.seek(start)
            found = self._stream.read(end - start).rfind(b"\n")  # not beyond: it may grow
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    def _whole(self, fields: int, delimiter: str) -> bool:
        """Whether what follows the last line feed has all fields, the last one no shorter."""
        start = max(0, self._left - _TAIL_BYTES)
        self._stream.seek(start)
        *before, _ = self._stream.read(self._left - start).decode("latin-1").split("\n")
        last = self._stream.read(_TAIL_BYTES).decode("latin-1")
        cells = [line.rstrip("\r").split(delimiter) for line in before]
        ends = [len(row[-1]) for row in cells[-200:] if len(row) == fields]
        mine = last.split(delimiter)
        if len(mine) != fields or len(ends) < 2:
            return False
        return mine[-1].endswith('"') or bool(len(mine[-1]) >= np.median(ends[1:]))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held and self._left:
            data = self._stream.read(min(len(buffer), self._left))
            self._left = self._left - len(data) if data else 0
            self._held = self._clean(self._decoder.decode(data, final=not self._left))
        piece, self._held = self._held[: len(buffer)], self._held[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def _clean(self, text: str) -> bytes:
        begun = self._line
        self._line += text.count("\n")
        try:
            return text.encode()
        except UnicodeEncodeError:
            for number, line in enumerate(text.split("\n"), start=begun):
                if _NOT_UTF8.search(line):
                    what = "lines with bytes that are not UTF-8, now U+FFFD"
                    self._report.count(what, self._file, number)
            return _NOT_UTF8.sub("\ufffd", text).encode()

    def close(self) -> None:
        self._stream.close()
        super().close()


def csv_frames(file: Path, report: ImportReport) -> Iterator[tuple[int, pd.DataFrame]]:
    """Blocks of a CSV or TSV file as text columns, each with the row number it begins at.

    Rows with a wrong number of fields are counted. A last line without line feed is left out if its
    last number is shorter than those before it: it may be half a number. Spaces around names are
    left out; a name that occurs twice is told, and the second column is called ``name.2``. Raises
    UserError if it is no table.
    """

    def skip(row: Any) -> str:
        report.lines += 1
        fields = f"{row.actual_columns} fields, not {row.expected_columns}"
        report.bad_line(file, row.number, fields)
        return "skip"

    names, delimiter = csv_header(file)
    if names and all(as_number(name) is not None for name in names):
        raise UserError(
            f"{printable(shown(file))} begins with numbers: its first line must name the columns"
        )
    columns = unique_names(names, file, report)
    source = _WholeLines(file, report, len(columns), delimiter)
    if source.cut:
        report.half_lines.append(shown(file.name))
    spelling = _Spelling(file, report, delimiter)
    parse = pacsv.ParseOptions(
        delimiter=delimiter, invalid_row_handler=skip, newlines_in_values=True
    )
    # Types guessed from the first block fail on a later one; numbers are made from text.
    convert = pacsv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=True
    )
    read = pacsv.ReadOptions(
        block_size=_BLOCK, use_threads=False, column_names=columns, skip_rows=1
    )
    try:
        stream = pa.PythonFile(source, mode="r")
        row = 2
        for batch in pacsv.open_csv(stream, read, parse, convert):
            report.lines += batch.num_rows
            frame = batch.to_pandas()
            _tell_swallowed(frame, row, delimiter, file, report)
            yield row, spelling.read(frame)
            row += batch.num_rows
    except (pa.ArrowException, UnicodeDecodeError) as error:
        if "Empty CSV file" not in str(error):
            why = printable(f"{shown(file)} is no CSV table: {first_line(error)}")
            raise UserError(why) from error
    finally:
        source.close()
    report.files += 1


def _tell_swallowed(
    frame: pd.DataFrame, first: int, delimiter: str, file: Path, report: ImportReport
) -> None:
    """Count lines inside quotation marks if most look like rows: one may not have been closed."""
    for number in range(frame.shape[1]):
        texts = frame.iloc[:, number]
        if not pd.api.types.is_string_dtype(texts):  # numbers alone, or nothing
            continue
        for place in np.flatnonzero(texts.str.contains("\n", regex=False, na=False)):
            _, *lines = str(texts.iloc[place]).split("\n")
            cells = [line.split(delimiter) for line in lines]
            numbers = [any(as_number(cell) is not None for cell in row) for row in cells]
            rows = sum(
                n and len(row) == frame.shape[1] for n, row in zip(numbers, cells, strict=True)
            )
            if rows >= _SWALLOWED and 2 * rows > len(lines):
                what = "lines in quotation marks that look like rows, read as text"
                report.count(what, file, first + int(place), rows)


_GROUPED = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_COMMA = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:\.\d{3})+),\d+(?:[eE][-+]?\d+)?")
_PERCENT = re.compile(r"[-+]?\d+(?:[.,]\d+)?\s*%")
_SAMPLE = 200


@dataclass
class _Spelling:
    """How a table spells its numbers: with decimal commas, grouped thousands, or in percent."""

    file: Path
    report: ImportReport
    delimiter: str
    _decimal: bool | None = None

    def read(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame with such numbers as Python spells them; what was changed is told."""
        samples = {name: _sample(frame[name]) for name in frame.columns}
        odd = {n: cells for n, cells in samples.items() if any(re.search("[,%]", c) for c in cells)}
        if self._decimal is None:
            cells = [cell for sample in odd.values() for cell in sample]
            self._decimal = self.delimiter != "," and any(
                _COMMA.fullmatch(cell) and not _GROUPED.fullmatch(cell) for cell in cells
            )
        for name, sample in odd.items():
            for pattern, what in self._ways():
                if any(map(pattern.fullmatch, sample)):
                    frame[name] = [self._number(cell, pattern) for cell in frame[name]]
                    self.report.told(f"{shown(self.file.name)}: {what}")
        return frame

    def _ways(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        comma = (_COMMA, "commas are read as decimal points")
        return (
            (_PERCENT, "numbers in percent are read as shares"),
            comma if self._decimal else (_GROUPED, "commas are read as separators of thousands"),
        )

    def _number(self, cell: Any, pattern: re.Pattern[str]) -> Any:
        if not isinstance(cell, str) or not pattern.fullmatch(cell.strip()):
            return cell
        bare = cell.strip().removesuffix("%").strip()
        if self._decimal and "," in bare:
            bare = bare.replace(".", "").replace(",", ".")
        number = float(bare.replace(",", ""))
        return repr(number / 100) if pattern is _PERCENT else f"{number:.17g}"


def _sample(values: pd.Series) -> list[str]:
    return [cell.strip() for cell in values.head(_SAMPLE) if isinstance(cell, str)]


def csv_header(file: Path) -> tuple[list[str], str]:
    """Names in the first line of a table, and the character between them."""
    with open_regular(file) as stream:
        line = stream.readline(LINE_BYTES).decode("utf-8-sig", "replace").rstrip("\r\n")
    delimiter = max("\t,;", key=line.count) if file.suffix != ".tsv" else "\t"
    delimiter = delimiter if line.count(delimiter) else ","
    try:
        names = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error as error:
        raise UserError(f"{printable(shown(file))} is no CSV table: {error}") from error
    return [name.strip() for name in names], delimiter


def unique_names(names: list[str], file: Path, report: ImportReport) -> list[str]:
    """Names of columns; the second of a name that is there twice becomes ``name.2``, and told."""
    unique: dict[str, None] = {}
    numbers: dict[str, int] = {}
    for name in names:
        new = name
        while new in unique:
            numbers[name] = numbers.get(name, 1) + 1
            new = f"{name}.{numbers[name]}"
        unique[new] = None
    for name, number in list(numbers.items())[:_TOLD_DOUBLES]:
        others = f"{name}.2" if number == 2 else f"{name}.2 to {name}.{number}"
        report.told(
            f"{shown(file.name)} has {number} columns {name!r}: the first is read, the rest "
            f"{'is' if number == 2 else 'are'} {others}"
        )
    if len(numbers) > _TOLD_DOUBLES:
        report.told(f"{shown(file.name)} has {len(numbers)} names of columns more than once")
    return list(unique)


def parquet_frames(file: Path, report: ImportReport) -> Iterator[tuple[int, pd.DataFrame]]:
    """Blocks of a Parquet file, each with the row number it begins at.

    Raises UserError if it is broken.
    """
    try:
        # Opened here: the name of a file may be no UTF-8, which Arrow wants.
        with open_regular(file) as stream:
            row = 1
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=_ROWS):
                if row == 1:
                    names = unique_names(list(batch.schema.names), file, report)
                report.lines += batch.num_rows
                yield row, batch.rename_columns(names).to_pandas()
                row += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = printable(f"{shown(file)} is broken or no Parquet: {first_line(error)}")
        raise UserError(why) from error
    report.files += 1


def plain(value: Any) -> Any:
    """A cell as plain Python: arrays are lists, missing is None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | dict | str | bool):
        return value
    return None if value is None or pd.isna(value) else value
