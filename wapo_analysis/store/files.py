"""Files: names of the layout, atomic writes, reads that neither block nor flood memory."""

import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from wapo_analysis.errors import UserError

MANIFEST = "manifest.json"
STEP_LOG = "steps.jsonl"
VOCAB = "vocab.parquet"
PART_TABLES = ("tokens", "classes", "rollouts", "probes", "topk")
JSON_BYTES = 1 << 26
"""Most bytes of a manifest that are read."""
JSON_DEPTH = 64
"""Levels of nesting that are read."""


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


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a loss of power; where the file system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_regular(path: Path, limit: int = 1 << 62) -> io.BufferedReader:
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


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: halves of characters, as JSON can name them, are escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


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
