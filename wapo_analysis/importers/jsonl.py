"""Reading JSON lines that may still be written to, in constant memory.

The file is read in binary blocks up to the size it had when the pass began, so a pass ends even if
the writer is faster than the reader. Only whole lines come out; what follows the last line feed
waits for the next pass, so no line is lost and none is read twice.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wapo_analysis.errors import UserError, printable
from wapo_analysis.store.files import JSON_DEPTH, open_regular, too_deep

MAX_STEP = 2**31 - 1
_OF_ALL = re.compile(
    r"\s*(?:(?:global_?)?(?:step|iter(?:ation)?)[ _:-]*)?(\d+)(?:\s*/\s*\d+)?\s*", re.I
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def as_number(value: Any) -> float | int | None:
    """A number, numbers written as text and the words nan and inf included, else None.

    "30.1%" is 0.301. An integer beyond 2^53 becomes the nearest float; one beyond the floats is no
    number.
    """
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        try:
            return float(value[:-1]) / 100 if value.endswith("%") else float(value)
        except ValueError:
            return None
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, int) and abs(value) > 2**53:
        try:
            return float(value)
        except OverflowError:
            return None
    return value if isinstance(value, int | float) else None


def as_step(value: Any) -> int | None:
    """A step number: a whole number that fits the column; as text "3.0", "3/100", "step_3" too."""
    if isinstance(value, str) and (found := _OF_ALL.fullmatch(value)):
        value = found[1]
    number = as_number(value)
    if number is None or not math.isfinite(number) or number != int(number):
        return None
    return int(number) if 0 <= number <= MAX_STEP else None


def flat(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Items of a record, nested objects joined with a slash."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value


DOUBLED = "records that give a name twice, the last is read"
REPAIRED = "texts with half a surrogate pair, now U+FFFD"


def parse_json(data: bytes | str, changed: list[str] | None = None) -> Any:
    """A JSON value of bounded depth; lone surrogates in its texts become U+FFFD.

    Raises ValueError if it is no JSON, is not UTF-8, or is nested deeper than ``JSON_DEPTH``.
    ``data``: UTF-8 text; ``changed``: gets what was changed or overwritten on the way: `DOUBLED`,
    `REPAIRED`.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    told = [] if changed is None else changed

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            told.append(DOUBLED)
        return found

    try:
        value = json.loads(text, object_pairs_hook=made)
    except RecursionError:
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        value = json.loads(text, object_pairs_hook=made, parse_int=float)
    if text.count("[") + text.count("{") > JSON_DEPTH and too_deep(value):
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels")
    if "\\ud" in text or "\\uD" in text:
        whole = _repaired(value)
        if whole != value:
            told.append(REPAIRED)
        return whole
    return value


def _repaired(value: Any) -> Any:
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, list):
        return [_repaired(v) for v in value]
    if isinstance(value, dict):
        return {whole_text(k): _repaired(v) for k, v in value.items()}
    return value


def whole_text(text: str) -> str:
    """Text in which lone surrogates, which no encoding has, are U+FFFD."""
    return _SURROGATE.sub("\ufffd", text) if _SURROGATE.search(text) else text


def message_text(value: Any) -> str | None:
    """Text of a prompt or completion: a string, chat messages joined, or anything as JSON."""
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple) and all(isinstance(m, dict) for m in value):
        return "\n".join(message_text(m.get("content")) or "" for m in value)
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return str(value["text"])
    return json.dumps(value, default=str, ensure_ascii=False)


BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 256 << 20
MAX_NAMED = 20


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

        Raises UserError if the file cannot be read, or became shorter than what was read of it
        already.
        """
        try:
            with open_regular(self.path) as stream:
                size = os.fstat(stream.fileno()).st_size
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
        held = 0
        left = size - self.offset
        while block := stream.read(min(BLOCK_BYTES, left)):
            left -= len(block)
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

        An object ends with its closing brace, so a cut one never parses. ``offset`` moves only past
        a whole one. Returns ``values`` (the object of a last line that only lacks its line feed)
        and ``half`` (there is an unfinished line).
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
