"""Reading JSON lines that may still be written to, in constant memory.

The file is read in binary blocks up to the size it had when the pass began, so a pass ends even if
the writer is faster than the reader. Only whole lines come out; what follows the last line feed
waits for the next pass, so no line is lost and none is read twice.
"""

import codecs
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from wapo_analysis.errors import UserError, printable
from wapo_analysis.importers.values import parse_json
from wapo_analysis.store.files import open_regular

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 256 << 20
MAX_NAMED = 20
MAX_UNPACKED = 4 << 30


class Line(NamedTuple):
    """A whole line: its number from 1, the byte it begins at, its content without line feed."""

    number: int
    start: int
    data: bytes


class Record(NamedTuple):
    """A parsed line: its number from 1, the byte it begins at, the JSON object."""

    number: int
    start: int
    values: dict[str, Any]


@dataclass
class JsonLines:
    """One file of JSON objects, a line each; every pass goes on where the last one stopped.

    Parameters
    ----------
    path : Path
        The file; only read.
    offset : int
        Byte to begin at, the start of a line.
    line : int
        Number of lines before ``offset``.

    Attributes
    ----------
    broken : int
        Whole lines that are no JSON object.
    named : list of str
        The first of them, as ``file:line: reason``.
    changed : list of (int, str)
        Lines in which something was changed or overwritten by reading them, and what.

    Examples
    --------
    >>> log = JsonLines(Path("run.jsonl"))  # doctest: +SKIP
    >>> for record in log.records():        # doctest: +SKIP
    ...     print(record.values["step"])
    """

    path: Path
    offset: int = 0
    line: int = 0
    broken: int = 0
    named: list[str] = field(default_factory=list)
    changed: list[tuple[int, str]] = field(default_factory=list)

    def lines(self) -> Iterator[Line]:
        """Whole lines from ``offset`` to the size the file has now; empty ones are left out.

        Raises
        ------
        UserError
            If the file cannot be read, or became shorter than what was read of it already.
        """
        try:
            with open_regular(self.path) as stream:
                size = stream.seek(0, 2)
                if size < self.offset:
                    raise UserError(
                        f"{self.path} became shorter while it was read; was it replaced?"
                    )
                stream.seek(self.offset)
                yield from self._whole(stream, size)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error

    def _whole(self, stream: Any, size: int) -> Iterator[Line]:
        pieces: list[bytes] = []
        held = read = 0
        begin = self.offset
        while begin + read < size:
            block = stream.read(min(BLOCK_BYTES, size - begin - read))
            if not block:
                return
            read += len(block)
            *ends, rest = block.split(b"\n")
            for end in ends:
                data = b"".join([*pieces, end])
                start = self.offset
                self.line += 1
                self.offset += held + len(end) + 1
                pieces, held = [], 0
                if data.strip():
                    yield Line(self.line, start, data)
            if held + len(rest) <= MAX_LINE_BYTES:
                pieces.append(rest)
            else:
                # Too long to keep: what is left of it cannot be JSON and is counted as broken.
                pieces = [b"(line too long)"]
            held += len(rest)

    def records(self) -> Iterator[Record]:
        """JSON objects of :meth:`lines`; broken lines are counted and named, not raised."""
        for number, start, data in self.lines():
            values = self._parse(number, data)
            if values is not None:
                yield Record(number, start, values)

    def tail(self) -> tuple[dict[str, Any] | None, bool]:
        """What follows the last line feed: its object if it is whole, and whether it is a half.

        An object ends with its closing brace, so a cut one never parses. ``offset`` moves only
        past a whole one.

        Returns
        -------
        values : dict or None
            The object of a last line that only lacks its line feed.
        half : bool
            There is an unfinished line.
        """
        with open_regular(self.path) as stream:
            stream.seek(self.offset)
            data = stream.read(MAX_LINE_BYTES)
        if b"\n" in data or not data.strip():
            return None, False
        try:
            values = parse_json(data)
        except ValueError:
            return None, True
        if not isinstance(values, dict):
            return None, True
        self.offset += len(data)
        self.line += 1
        return values, False

    def at(self, start: int) -> dict[str, Any]:
        """Object of the whole line that begins at a byte; its place comes from :meth:`records`."""
        with open_regular(self.path) as stream:
            stream.seek(start)
            return dict(parse_json(stream.readline()))

    def _parse(self, number: int, data: bytes) -> dict[str, Any] | None:
        try:
            changed: list[str] = []
            values = parse_json(data, changed)
            self.changed += [(number, what) for what in changed]
        except ValueError as error:
            self._bad(number, reason_of(error))
            return None
        if not isinstance(values, dict):
            self._bad(number, "not a JSON object")
            return None
        return values

    def _bad(self, number: int, reason: str) -> None:
        self.broken += 1
        if len(self.named) < MAX_NAMED:
            self.named.append(f"{_shown(Path(self.path.name))}:{number}: {reason}")


def reason_of(error: ValueError) -> str:
    """Why a text is no JSON, in a few words."""
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).split(":")[0]


def _shown(path: Path) -> str:
    return printable(str(path).encode("utf-8", "replace").decode())


def widened(file: Path, out: BinaryIO) -> bool:
    """UTF-16, as PowerShell writes what a command printed, as UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    try:
        with open_regular(file) as wide:
            while data := wide.read(1 << 20):
                out.write(decoder.decode(data).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot read {_shown(file)}: {error.strerror}") from error
    return True


def unpacked_into(file: Path, out: BinaryIO) -> bool:
    """Unpack gzip as far as it goes, as of a file that is still being written; whether it ended."""
    reader = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        with open_regular(file) as packed:
            while data := packed.read(1 << 20):
                while data:
                    out.write(reader.decompress(data, 1 << 20))
                    if out.tell() > MAX_UNPACKED:
                        raise UserError(f"{_shown(file)} is larger than 4 GiB unpacked")
                    data = reader.unused_data if reader.eof else reader.unconsumed_tail
                    if reader.eof and data:
                        reader = zlib.decompressobj(zlib.MAX_WBITS | 16)
    except zlib.error:
        return False
    except OSError as error:
        raise UserError(f"cannot unpack {_shown(file)}: {error.strerror}") from error
    return reader.eof
