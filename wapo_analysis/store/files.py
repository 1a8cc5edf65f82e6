"""Files of a run: layout, atomic writes, reads that neither block nor flood memory, step log.

The step log has one JSON line a step, each with a checksum of itself (``crc32``, its last entry).
A line is appended and flushed; the last one may be half written and is then left out on reading.
"""

import io
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4
from zlib import crc32

import numpy as np
import pandas as pd

from wapo_analysis.errors import UserError
from wapo_analysis.schema import STEPS

MANIFEST = "manifest.json"
STEP_LOG = "steps.jsonl"
VOCAB = "vocab.parquet"
PART_TABLES = ("tokens", "classes", "rollouts", "probes", "topk")
#: Most bytes of a manifest that are read.
JSON_BYTES = 1 << 26
#: Levels of nesting that are read.
JSON_DEPTH = 64


@contextmanager
def renamed_when_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` that takes its name, fsynced, once the block has ended well."""
    beside = path.parent / f".{path.name}.{uuid4().hex[:8]}"
    try:
        with beside.open("x+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file so that readers see the old content or the new, never a half."""
    with renamed_when_whole(path) as stream:
        for piece in pieces:
            stream.write(piece)


@contextmanager
def folder_when_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name ``path``, fsynced, once the block has ended well.

    Until then it is ``.NAME`` beside it, which nothing reads; a folder of the name is replaced.
    """
    unfinished = path.with_name(f".{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in (*(f for f in unfinished.rglob("*") if f.is_file()), unfinished):
            to_disk(file)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if path.exists():
        remove_folder(path)
    unfinished.rename(path)
    for folder in (path.parent, path.parent.parent):
        to_disk(folder)


def check_new(out: Path) -> None:
    """Refuse an output folder that already holds files. Raises UserError if it does."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out or delete it")


def remove_folder(path: Path) -> None:
    """Delete a folder; a half deleted one does not have its name any more."""
    doomed = path.with_name(f".old-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a loss of power; where the file system can do that."""
    with suppress(OSError):
        to_disk(folder)


def open_regular(path: Path, limit: int = 1 << 62) -> io.BufferedReader:
    """Open a regular file for reading; never a pipe, a socket or a device, which could block.

    Raises FileNotFoundError if it is not there (any more); UserError if it is no regular file, is
    larger, or cannot be opened; the message names it. ``path``: a link to a regular file will do;
    ``limit``: most bytes it may have.
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

    Raises FileNotFoundError if it is not there (any more); UserError if it cannot be read, is no
    JSON, or is too large or too deeply nested.
    """
    try:
        with open_regular(path, limit) as stream:
            return parse_json(stream.read(limit).decode("utf-8"))
    except (UserError, FileNotFoundError):
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: halves of characters, as JSON can name them, are escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def parse_json(text: str) -> Any:
    """Value of a JSON text; ValueError if it is none or is nested more than `JSON_DEPTH` deep."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if too_deep(value):
        raise ValueError(f"nested more than {JSON_DEPTH} deep")
    return value


def too_deep(value: Any) -> bool:
    """Whether the lists and objects of a JSON value are nested more than `JSON_DEPTH` deep."""
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        nested = [inner for inner in level if isinstance(inner, dict | list)]
        if not nested:
            return False
        level = [x for n in nested for x in (n.values() if isinstance(n, dict) else n)]
    return True


CHECKSUM = "crc32"
#: Most bytes of a step log that are read.
LOG_BYTES = 1 << 32
#: Most bytes of one line.
LINE_BYTES = 1 << 22
_BEFORE, _AFTER = b', "crc32": "', b'"}'
_DIGITS = 8
_ENDING = len(_BEFORE) + _DIGITS + len(_AFTER)
#: Steps have numbers below it.
MOST_STEPS = 2**31
_INT64 = 2**63


def step_line(row: Mapping[str, Any]) -> bytes:
    """Line of a step; numbers that are not finite become null.

    Raises UserError on a value that is no number, nor the text of a column of the trainer's own.
    """
    text = json.dumps({name: _json_number(name, value) for name, value in row.items()})
    return f'{text[:-1]}, "{CHECKSUM}": "{crc32(text.encode()):08x}"}}\n'.encode()


def _json_number(name: str, value: Any) -> float | int | str | None:
    if type(value) is float:
        return value if isfinite(value) else None
    number = value.item() if isinstance(value, np.generic | np.ndarray) else value
    if not isinstance(number, int | float | None) and not (isinstance(number, str) and "/" in name):
        raise UserError(f"step column {name!r} must be a number, got {value!r:.60}")
    return None if isinstance(number, float) and not isfinite(number) else number


class LineReader:
    """Turns lines of one log into rows; once a line had a checksum, all that follow need theirs."""

    def __init__(self) -> None:
        self._summed = False

    def row(self, line: bytes) -> dict[str, Any]:
        """Return the row of a line.

        Raises ValueError with the reason, if it is no step record or does not match its checksum.
        """
        body = line.rstrip(b"\r\n")
        ending = body[-_ENDING:]
        if ending.startswith(_BEFORE) and ending.endswith(_AFTER):
            self._summed = True
            body = body[:-_ENDING] + b"}"
            if b"%08x" % crc32(body) != ending[len(_BEFORE) : -len(_AFTER)]:
                raise ValueError("it does not match its checksum")
        elif self._summed:
            raise ValueError("its checksum is missing")
        try:
            parsed: Any = json.loads(body)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        row: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
        if b"\\ud" in body or b"\\uD" in body:  # halves of characters, which no table can hold
            row = {encodable(name): _encodable(value) for name, value in row.items()}
        step = row.get("step")
        if type(step) is not int or not 0 <= step < MOST_STEPS:
            raise ValueError("no integer 'step'")
        for name, value in row.items():
            if value is not None and (type(value) is not float or not isfinite(value)):
                row[name] = _value(name, value)
        return row


def _encodable(value: Any) -> Any:
    return encodable(value) if isinstance(value, str) else value


def _value(name: str, value: Any) -> float | int | str | None:
    """Value as it is kept: a number of 64 bits, None for one that is not finite."""
    if isinstance(value, int) and -_INT64 <= value < _INT64:
        return value
    if isinstance(value, str) and "/" in name:  # a column of the trainer's own
        return value
    try:
        if isinstance(value, int | float):
            return float(value) if isfinite(value) else None
    except OverflowError:
        pass
    raise ValueError(f"{name[:40]} is not a number")


def log_lines(log: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | ValueError]]:
    """Number of each line of a step log that is not blank, the line, its row or why it has none.

    Raises FileNotFoundError if there is no log; UserError if it cannot be opened.
    """
    reader = LineReader()
    with open_regular(log, LOG_BYTES) as stream:
        for number, line in enumerate(iter(partial(stream.readline, LINE_BYTES), b""), start=1):
            if not line.strip():
                continue
            try:
                yield number, line, reader.row(line)
            except ValueError as error:
                yield number, line, error


def step_lines(log: Path) -> Iterator[dict[str, Any]]:
    """Rows of the whole lines of a step log, in order; an unfinished last line is left out.

    Raises FileNotFoundError if there is no log; UserError on a line that is no step record or is
    damaged; the message names it.
    """
    for number, line, row in log_lines(log):
        if not isinstance(row, ValueError):
            yield row
        elif not line.endswith(b"\n") and len(line) < LINE_BYTES:
            return
        else:
            raise UserError(
                f"{log}: line {number} is not a step record ({row}); "
                "delete that line to read the others"
            ) from row


def steps_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Step rows in the order they were written as a step table; see :attr:`Run.steps`.

    ``attrs["null"]`` maps a column to the steps whose record holds it without a finite number:
    there something went wrong, where a record without the name just did not log it.
    """
    extra = {key for row in rows for key in row} - set(STEPS.names)
    frame = pd.DataFrame(rows, columns=[*STEPS.names, *sorted(extra)])
    steps = frame["step"].to_numpy(np.int64)
    frame["step"] = steps
    if (steps[1:] <= steps[:-1]).any():
        frame = frame.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
    nulls: dict[str, set[int]] = {}
    for row in rows:
        for name, value in row.items():
            if not isinstance(value, int) and not (isinstance(value, float) and isfinite(value)):
                nulls.setdefault(name, set()).add(row["step"])
    frame.attrs["null"] = nulls
    return frame
