"""The step log: one JSON line a step, each with a checksum of itself.

A line is appended and flushed; the last one may be half written and is then left out on reading.
Any reader of JSON lines can follow it: the checksum is one more entry, ``crc32``, at the end.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd

from wapo_analysis.errors import UserError
from wapo_analysis.schema import STEPS
from wapo_analysis.store.files import encodable, open_regular

CHECKSUM = "crc32"
LOG_BYTES = 1 << 32
"""Most bytes of a step log that are read."""
LINE_BYTES = 1 << 22
"""Most bytes of one line."""
_BEFORE, _AFTER = b', "crc32": "', b'"}'
_DIGITS = 8
_ENDING = len(_BEFORE) + _DIGITS + len(_AFTER)
_MOST_STEPS, _INT64 = 2**31, 2**63


def step_line(row: Mapping[str, Any]) -> bytes:
    """Line of a step; numbers that are not finite become null."""
    text = json.dumps({name: _json_number(value) for name, value in row.items()})
    return f'{text[:-1]}, "{CHECKSUM}": "{crc32(text.encode()):08x}"}}\n'.encode()


def _json_number(value: Any) -> float | int | None:
    if type(value) is float:
        return value if value - value == 0 else None
    number = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(number, float) and not isfinite(number) else number


class LineReader:
    """Turns lines of one log into rows; once a line had a checksum, all that follow need theirs."""

    def __init__(self) -> None:
        self._summed = False

    def row(self, line: bytes) -> dict[str, Any]:
        """Return the row of a line.

        Raises
        ------
        ValueError
            With the reason, if it is no step record or does not match its checksum.
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
        if type(step) is not int or not 0 <= step < _MOST_STEPS:
            raise ValueError("no integer 'step'")
        for name, value in row.items():
            if value is not None and (type(value) is not float or value - value != 0):
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


def step_lines(log: Path) -> Iterator[dict[str, Any]]:
    """Rows of the whole lines of a step log, in order; an unfinished last line is left out.

    Raises
    ------
    FileNotFoundError
        If there is no log.
    UserError
        On a line that is no step record or is damaged; the message names it.
    """
    reader = LineReader()
    with open_regular(log, LOG_BYTES) as stream:
        for number, line in enumerate(iter(partial(stream.readline, LINE_BYTES), b""), start=1):
            if not line.strip():
                continue
            try:
                row = reader.row(line)
            except ValueError as error:
                if not line.endswith(b"\n") and len(line) < LINE_BYTES:
                    return
                raise UserError(
                    f"{log}: line {number} is not a step record ({error}); "
                    "delete that line to read the others"
                ) from error
            yield row


def steps_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Step rows in the order they were written as a step table; see :attr:`Run.steps`.

    ``attrs["null"]`` maps a column to the steps whose record holds it without a finite number:
    there something went wrong, where a record without the name just did not log it.
    """
    extra = {key for row in rows for key in row} - set(STEPS.names)
    frame = pd.DataFrame(rows, columns=[*STEPS.names, *sorted(extra)])
    frame = frame.drop_duplicates("step", keep="last").sort_values("step")
    frame = frame.reset_index(drop=True).astype({"step": "int64"})
    nulls: dict[str, set[int]] = {}
    for row in rows:
        for name, value in row.items():
            if not isinstance(value, int) and not (isinstance(value, float) and isfinite(value)):
                nulls.setdefault(name, set()).add(row["step"])
    frame.attrs["null"] = nulls
    return frame
