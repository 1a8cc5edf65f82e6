"""One value of a source: what counts as a number, a step, a text; nothing here ever raises."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

MAX_STEP = 2**31 - 1
MAX_DEPTH = 64
_OF_ALL = re.compile(r"\s*(\d+)\s*/\s*\d+\s*")
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
    """A step number: a whole number that fits the column, also as text, as 3.0 or as "3/100"."""
    if isinstance(value, str) and (found := _OF_ALL.fullmatch(value)):
        value = found[1]
    number = as_number(value)
    if number is None or not math.isfinite(number) or number != int(number):
        return None
    return int(number) if 0 <= number <= MAX_STEP else None


def flat(record: Mapping[str, Any], before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Items of a record, nested objects joined with a slash, down to ``MAX_DEPTH``."""
    for key, value in record.items():
        if isinstance(value, dict) and depth < MAX_DEPTH:
            yield from flat(value, f"{before}{key}/", depth + 1)
        else:
            yield f"{before}{key}", value


DOUBLED = "records that give a name twice, the last is read"
REPAIRED = "texts with half a surrogate pair, now U+FFFD"


def parse_json(data: bytes | str, changed: list[str] | None = None) -> Any:
    """A JSON value of bounded depth; lone surrogates in its texts become U+FFFD.

    Parameters
    ----------
    data : bytes or str
        UTF-8 text.
    changed : list of str, optional
        Gets what was changed or overwritten on the way: `DOUBLED`, `REPAIRED`.

    Raises
    ------
    ValueError
        If it is no JSON, is not UTF-8, or is nested deeper than ``MAX_DEPTH``.
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
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        value = json.loads(text, object_pairs_hook=made, parse_int=float)
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if "\\ud" in text or "\\uD" in text:
        whole = _repaired(value)
        if whole != value:
            told.append(REPAIRED)
        return whole
    return value


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        nested = [v for v in level if isinstance(v, dict | list)]
        level = [x for v in nested for x in (v.values() if isinstance(v, dict) else v)]
        depth += bool(nested)
    return depth


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


def message_text(value: Any, depth: int = 0) -> str | None:
    """Text of a prompt or completion: a string, chat messages joined, or anything as JSON."""
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple) and all(isinstance(m, dict) for m in value) and depth < 8:
        return "\n".join(message_text(m.get("content"), depth + 1) or "" for m in value)
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return str(value["text"])
    return json.dumps(value, default=str, ensure_ascii=False)
