"""Files that hold another: compressed ones, UTF-16, tables of Excel, containers' logs, pages.

What a web page or a notebook shows is written out as text with bars between cells, which the
readers of printed logs and of tables then read.
"""

import codecs
import json
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO

from wapo_analysis.errors import UserError, printable
from wapo_analysis.importers.jsonl import BLOCK_BYTES, JsonLines, parse_json
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.report import shown
from wapo_analysis.store.files import open_regular

MAX_UNPACKED = 4 << 30
MAX_PAGE_BYTES = 1 << 30
_HEAD, _FIRST = 1 << 16, 512
_GZIP = 31  # of zlib: the largest window, behind a header of gzip
_WRAPPED = (b"{", b"s", b'"', b"\xef")
_TABLES = (".csv", ".tsv")
#: What is read as the text that it shows.
PAGES = (".ipynb", ".html", ".htm")


def head_of(file: Path, size: int = _HEAD) -> bytes:
    """First bytes of a file."""
    try:
        with open_regular(file) as stream:
            return stream.read(size)
    except OSError as error:
        raise UserError(f"cannot read {printable(shown(file))}: {error.strerror}") from error


def plain_file(file: Path, source: Path, unpacked: Path | None, told: list[str]) -> Path | None:
    """A file, or elsewhere what a compressed or UTF-16 one holds, or a page or notebook shows."""
    start = head_of(file, _FIRST)
    packed = file.name.endswith(".gz") or start.startswith(b"\x1f\x8b")
    wide = None if packed else wide_encoding(start)
    table, how = file.suffix in _TABLES, None
    if wide is None and not packed and (table or start[:1] in _WRAPPED):
        how = wrapped_by(head_of(file), table)
    if wide is None and file == source and file.suffix in PAGES and unpacked is not None:
        text = unpacked / file.name
        text.parent.mkdir(parents=True, exist_ok=True)
        with text.open("wb") as out:
            whole = shown_text(file, out)
        if not whole:
            raise UserError(f"{printable(shown(file))} is no page or notebook: it cannot be read")
        if not text.stat().st_size:
            raise UserError(
                f"{printable(shown(file))} shows no numbers: a notebook must be saved after its "
                "cells have run, a page must hold a table"
            )
        return text
    if wide is None and how is None and not packed:
        return file
    if unpacked is None:
        return None
    inside = file.relative_to(source) if source != file else Path(file.name)
    kept = how in (None, "sep", "returns")
    name = inside.name.removesuffix(".gz") if kept else f"{inside.stem}.log"
    target = unpacked / inside.with_name(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        if how is not None:
            whole = unwrapped_into(file, how, out)
        else:
            whole = widened(file, wide, out) if wide else unpacked_into(file, out)
    if not whole:
        told.append(f"{shown(file.name)} is cut or damaged: what could be unpacked is read")
        if not target.stat().st_size:
            raise UserError(f"{printable(shown(file))} cannot be unpacked")
    shutil.copystat(file, target)
    if how:
        return target
    # What was packed or UTF-16 may be another of these itself.
    below = target if file == source else target.parent
    return plain_file(target, below, target.parent / "inside", told)


def wide_encoding(head: bytes) -> str | None:
    r"""Encoding of a text of two bytes a character, by its mark or, without one, by its zeros.

    Examples
    --------
    >>> [wide_encoding("step,reward".encode(name)) for name in ("utf-16", "utf-16-be", "utf-8")]
    ['utf-16', 'utf-16-be', None]
    >>> wide_encoding(b"\x18" + bytes(7))  # an event file of TensorBoard
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    first, second = head[::2], head[1::2]
    for name, zeros, marks in (("utf-16-le", second, first), ("utf-16-be", first, second)):
        if zeros.count(0) > 0.9 * len(zeros) and 0 not in marks:
            return name
    return None


def widened(file: Path, encoding: str, out: BinaryIO) -> bool:
    """UTF-16, as PowerShell writes what a command printed, as UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    try:
        with open_regular(file) as wide:
            while data := wide.read(BLOCK_BYTES):
                out.write(decoder.decode(data).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot read {printable(shown(file))}: {error.strerror}") from error
    return True


_SEPARATOR = re.compile(rb'(?:\xef\xbb\xbf)?"?sep=.?"?\r?\n')
#: Names under which containers and log collectors keep a line that was printed.
_WRAPS = ("log", "message", "line", "textPayload")
#: Lines of which none may hold numbers by known names of its own.
_TELLING = 50


def wrapped_by(head: bytes, table: bool = False) -> str | None:
    r"""How a file holds another text: "sep" above a table of Excel, or a name of each record.

    Of a ``table`` also "returns", where no line ends otherwise.

    Examples
    --------
    >>> wrapped_by(b"sep=;\nstep;reward\n"), wrapped_by(b'{"log": "step=1", "stream": "stdout"}')
    ('sep', 'log')
    """
    if _SEPARATOR.match(head):
        return "sep"
    if table and b"\r" in head and b"\n" not in head:
        return "returns"
    if not head.startswith(b"{"):
        return None
    found = list(_objects(head.split(b"\n")[:_TELLING]))
    keys = tuple(key for record in found for key in record)
    names = NameTable({})
    if not found or names.step_key(keys) is not None or names.feeds(keys):
        return None
    return next((n for n in _WRAPS if all(isinstance(r.get(n), str) for r in found)), None)


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def unwrapped_into(file: Path, how: str, out: BinaryIO) -> bool:
    """Write the text that a file holds as :func:`wrapped_by` says."""
    if how == "sep":
        with open_regular(file) as table:
            table.readline()
            shutil.copyfileobj(table, out)
        return True
    if how == "returns":
        with open_regular(file) as table:
            while data := table.read(BLOCK_BYTES):
                out.write(data.replace(b"\r", b"\n"))
        return True
    for record in JsonLines(file).records():
        text = record.values.get(how)
        if isinstance(text, str):
            out.write(f"{text.rstrip(chr(10))}\n".encode("utf-8", "replace"))
    return True


def unpacked_into(file: Path, out: BinaryIO) -> bool:
    """Unpack gzip as far as it goes, as of a file that is still being written; whether it ended."""
    reader = zlib.decompressobj(_GZIP)
    try:
        with open_regular(file) as packed:
            while data := packed.read(BLOCK_BYTES):
                while data:
                    out.write(reader.decompress(data, BLOCK_BYTES))
                    if out.tell() > MAX_UNPACKED:
                        raise UserError(f"{printable(shown(file))} is larger than 4 GiB unpacked")
                    data = reader.unused_data if reader.eof else reader.unconsumed_tail
                    if reader.eof and data:
                        reader = zlib.decompressobj(_GZIP)
    except zlib.error:
        return False
    except OSError as error:
        raise UserError(f"cannot unpack {printable(shown(file))}: {error.strerror}") from error
    return reader.eof


# ---- web pages and notebooks


class _Tables(HTMLParser):
    """Text of a page; cells of a row have bars between them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._cell: list[str] | None = None
        self._row: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self._row.append(" ".join("".join(self._cell).split()).replace("|", "/"))
            self._cell = None
        if tag == "tr" and self._row:
            self.lines.append(f"| {' | '.join(self._row)} |")
        if tag == "table":
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def page_text(html: str) -> str:
    """Tables of a web page as text."""
    page = _Tables()
    page.feed(html)
    return "\n".join(page.lines) + "\n"


def notebook_text(data: bytes) -> str:
    """What the cells of a notebook printed, and its tables as text.

    Raises ValueError if it is no notebook.
    """
    value = parse_json(data)
    cells = value.get("cells") if isinstance(value, dict) else None
    if not isinstance(cells, list):
        raise ValueError("no cells")
    parts = []
    for cell in cells:
        for output in cell.get("outputs", ()) if isinstance(cell, dict) else ():
            shows = output.get("data", {}) if isinstance(output, dict) else {}
            if isinstance(shows, dict) and "text/html" in shows:
                parts.append(page_text(_joined(shows["text/html"])))
            else:
                told = output.get("text", shows.get("text/plain", ""))
                parts.append(_joined(told) + "\n")
    return "\n".join(parts)


def _joined(text: Any) -> str:
    return "".join(map(str, text)) if isinstance(text, list) else str(text)


def shown_text(file: Path, out: BinaryIO) -> bool:
    """Write what a notebook or a page shows as text; whether it could be read."""
    with open_regular(file) as stream:
        data = stream.read(MAX_PAGE_BYTES)
    try:
        page = file.suffix in (".html", ".htm")
        text = page_text(data.decode("utf-8", "replace")) if page else notebook_text(data)
    except (ValueError, AttributeError, json.JSONDecodeError):
        return False
    out.write(text.encode("utf-8", "replace") if text.strip() else b"")
    return True
