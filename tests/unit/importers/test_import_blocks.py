"""Tables that are read block by block: where they end, what is no UTF-8, what changes meanwhile."""

import json
import os
from pathlib import Path

import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.importers import readers
from wapo_analysis.importers.readers import _WholeLines, csv_frames, json_records, table_kind
from wapo_analysis.importers.report import ImportReport

ROWS = "step,note\n" + "".join(f"{n},{'word ' * 10}{n % 10}\n" for n in range(4000))


def fresh() -> ImportReport:
    return ImportReport("table", "t")


@pytest.mark.parametrize(
    ("last", "whole"),
    [
        (f"9,{'word ' * 10}7", True), ("9,word", False), ("9", False), (f"9,{'x' * 90_000}", True),
        ("x" * 90_000, False), ("x" * 200_000, False), ("", True),
    ],
)  # fmt: skip
def test_the_last_row_of_a_long_table_is_left_out_while_it_is_being_written(
    last: str, whole: bool, tmp_path: Path
) -> None:
    file = tmp_path / "t.csv"
    file.write_text(ROWS + last)
    source = _WholeLines(file, fresh(), 2, ",")
    read = source.readall()
    source.close()
    assert read == (ROWS + last if whole else ROWS).encode()
    assert source.cut == (0 if whole else len(last))
    report = fresh()
    assert sum(len(frame) for _, frame in csv_frames(file, report)) == 4000 + bool(last and whole)
    assert report.half_lines == ([] if whole else ["t.csv"])


def test_a_table_that_is_cut_while_it_is_read_ends_there(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(ROWS)
    source = _WholeLines(tmp_path / "t.csv", fresh(), 2, ",")
    begin = source.read(100)
    os.truncate(tmp_path / "t.csv", 150)
    read = (begin or b"") + source.readall()
    assert ROWS.encode().startswith(read)
    assert 100 <= len(read) < len(ROWS)
    source.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 4096])
def test_a_character_of_several_bytes_may_lie_across_two_blocks(size: int, tmp_path: Path) -> None:
    text = "step,näme\n" + "".join(f"{n},grün €{n} \U0001f600\n" for n in range(20))
    (tmp_path / "t.csv").write_text(text)
    report = fresh()
    source = _WholeLines(tmp_path / "t.csv", report, 2, ",")
    parts = iter(lambda: source.read(size), b"")
    assert b"".join(part for part in parts if part) == text.encode()
    assert not report.counts
    source.close()


def test_lines_that_are_no_utf8_are_counted_and_the_first_three_named(tmp_path: Path) -> None:
    lines = [b"step,note"] + [b"%d,%s" % (n, b"gr\xfcn" if n % 3 == 0 else b"x") for n in range(12)]
    lines[2] = "1,grün".encode()
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines) + b"\n")
    what = "lines with bytes that are not UTF-8, now U+FFFD"
    for size in (-1, 20):
        report = fresh()
        source = _WholeLines(tmp_path / "t.csv", report, 2, ",")
        parts = iter(lambda size=size, source=source: source.read(size), b"")
        read = b"".join(part for part in parts if part).decode()
        source.close()
        assert (read.count("gr\ufffdn"), read.count("grün")) == (4, 1)
        assert report.counts[what] == 4
        assert report.places[what] == ["t.csv:2", "t.csv:5", "t.csv:8"]


def test_a_cell_longer_than_a_block_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_BLOCK", 64)
    (tmp_path / "t.csv").write_text(f"step,note\n1,{'x' * 500}\n2,y\n")
    with pytest.raises(UserError, match=r"t\.csv is no CSV table: .*block"):
        list(csv_frames(tmp_path / "t.csv", fresh()))


def test_lines_that_are_written_while_a_log_is_read_are_read_too(tmp_path: Path) -> None:
    """Up to three times, or a log that grows as fast as it is read would never end."""
    file = tmp_path / "t.jsonl"
    file.write_text('{"n": 0}\n')
    found = []
    for number, values in json_records(file, fresh()):
        found.append((number, values["n"]))
        with file.open("a") as stream:
            stream.write(json.dumps({"n": values["n"] + 1}) + "\n")
        assert len(found) < 1000
    assert found[:2] == [(1, 0), (2, 1)]
    last = file.read_text().count("\n")
    assert len(found) < last


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("t", b"PAR1xxxx", "parquet"), ("t", b"\xef\xbb\xbfa,b\n1,2\n", "csv"),
        ("t.json", b'  \n[{"a": 1}]', "json"), ("t", b'  {"a": 1}\n{"a": 2}\n', "lines"),
        ("t.json", b"words", "json"), ("t.json", b'{"a": 1}\n{"a": 2}\n', "lines"),
        ("t.ndjson", b"", "lines"), ("t.html", b"", "text"), ("t.tsv", b"", "csv"),
        ("t", b'{"a": 1}\n   \n', "json"),
    ],
)  # fmt: skip
def test_what_a_table_is_by_its_name_or_its_beginning(
    name: str, data: bytes, kind: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    assert table_kind(tmp_path / name) == kind
