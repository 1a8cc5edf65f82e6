"""Values of a log one by one: numbers, steps, the depth of JSON, texts that no encoding has."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.importers import jsonl
from wapo_analysis.importers.jsonl import (
    DOUBLED,
    REPAIRED,
    JsonLines,
    as_number,
    as_step,
    parse_json,
)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3), (0.5, 0.5), (True, 1), (np.bool_(False), 0), (np.float32(0.5), 0.5),
        (np.int64(7), 7), (Decimal("0.25"), 0.25), ("0.5", 0.5), ("30.1%", 0.301), ("-5%", -0.05),
        ("1e3", 1000), ("-inf", -np.inf), ("word", None), ("%", None), ("x%", None), ("", None),
        (None, None), ([1], None), ({}, None), (2**53, 2**53), (-(2**53) - 1, -(2.0**53)),
        (2**64, 2.0**64), (10**400, None), ("1e400", np.inf),
    ],
)  # fmt: skip
def test_what_is_a_number(value: Any, number: float | None) -> None:
    found = as_number(value)
    assert found == pytest.approx(number, rel=1e-12) if number is not None else found is None
    if isinstance(value, int) and found is not None:
        assert isinstance(found, int if abs(value) <= 2**53 else float)


@pytest.mark.parametrize(
    ("value", "step"),
    [
        (0, 0), (3, 3), (3.0, 3), ("3", 3), ("3.0", 3), (" 3/100 ", 3), ("step_3", 3),
        ("global_step: 12", 12), ("iteration 4 / 9", 4), ("Iter-7", 7), (2**31 - 1, 2**31 - 1),
        (2**31, None), (-1, None), (0.5, None), (np.inf, None), (np.nan, None), ("nan", None),
        ("3.5", None), ("epoch 3", None), (None, None), ([3], None),
    ],
)  # fmt: skip
def test_what_is_a_step(value: Any, step: int | None) -> None:
    assert as_step(value) == step


@pytest.mark.parametrize("opening", ["[", '{"a": ', '[{"a": '])
def test_json_may_be_64_levels_deep(opening: str) -> None:
    levels = opening.count("[") + opening.count("{")
    closing = {"[": "]", "{": "}"}

    def nested(depth: int) -> str:
        ends = "".join(closing[mark] for mark in reversed(opening) if mark in closing)
        return opening * (depth // levels) + "1" + ends * (depth // levels)

    value = parse_json(nested(64))
    for _ in range(64):
        (value,) = value.values() if isinstance(value, dict) else value
    assert value == 1
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        parse_json(nested(66) if levels == 2 else nested(65))
    wide = parse_json(json.dumps([[n] for n in range(100)]))
    assert len(wide) == 100, "many brackets are not deep"


@pytest.mark.parametrize(
    ("text", "value", "told"),
    [
        (r'"a\ud83d"', "a\ufffd", [REPAIRED]), (r'"a\uD83D"', "a\ufffd", [REPAIRED]),
        (r'"a\uDE00b"', "a\ufffdb", [REPAIRED]), (r'"\ud83d\ude00"', "\U0001f600", []),
        (r'{"a\udc00": ["\udc00", 1]}', {"a\ufffd": ["\ufffd", 1]}, [REPAIRED]),
        ('{"a": 1, "a": 2}', {"a": 2}, [DOUBLED]), ('{"a": {"a": 2}}', {"a": {"a": 2}}, []),
        ("[1]", [1], []), ("\ufeff[1]".encode(), [1], []),
    ],
)  # fmt: skip
def test_what_is_changed_in_a_value_is_told(text: str | bytes, value: Any, told: list[str]) -> None:
    changed: list[str] = []
    assert parse_json(text, changed) == value
    assert changed == told
    assert parse_json(text) == value


def test_of_many_broken_lines_twenty_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n' + "broken\n[3]\n" * 12)
    log = JsonLines(file)
    assert [record.number for record in log.records()] == [1]
    assert log.broken == log.line - 1 == 24
    assert len(log.named) == 20
    assert log.named[:2] == ["a.jsonl:2: Expecting value", "a.jsonl:3: not a JSON object"]


@pytest.mark.parametrize(("length", "read"), [(512, True), (600, True), (768, True), (769, False),
                                              (2000, False)])  # fmt: skip
def test_a_line_may_be_as_long_as_the_limit_in_whole_blocks(
    length: int, read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of a line are held; if the third does not end it, it is too long."""
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 512)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 256)
    file = tmp_path / "a.jsonl"
    first = b'{"n": 1}'.ljust(length - 1) + b"\n"
    file.write_bytes(first + b'{"n": 2}\n')
    log = JsonLines(file)
    found = [(record.number, record.start, record.values["n"]) for record in log.records()]
    assert found == [(1, 0, 1)][: int(read)] + [(2, length, 2)]
    assert log.broken == 1 - read
    assert (log.offset, log.line) == (file.stat().st_size, 2)


def test_a_pass_ends_where_the_file_ended_when_it_began(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 0}\n')
    log = JsonLines(file)
    for _ in range(3):
        for record in log.records():
            with file.open("a") as more:
                more.write(f'{{"n": {record.values["n"] + 1}}}\n')
    assert log.line == 3
    assert list(log.records())[0].values == {"n": 3}
    file.write_text("")
    with pytest.raises(UserError, match="became shorter while it was read; was it replaced"):
        list(log.records())


@pytest.mark.parametrize(
    ("end", "found"),
    [(b"", (None, False)), (b"  ", (None, False)), (b'{"n": 2}', ({"n": 2}, False)),
     (b'{"n": ', (None, True)), (b"[2]", (None, True)), (b'{"n": 2}\n', (None, False))],
)  # fmt: skip
def test_what_follows_the_last_line_feed(
    end: bytes, found: tuple[dict[str, int] | None, bool], tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"n": 1}\n' + end)
    log = JsonLines(file)
    assert next(log.records()).values == {"n": 1}
    assert log.tail() == found
    whole = 9 + len(end) if found[0] else 9
    assert (log.offset, log.line) == (whole, 2 if found[0] else 1)
