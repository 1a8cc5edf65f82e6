"""The reader of JSON lines: whole lines only, none lost, none twice, constant memory."""

import json
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run, jsonl, readers
from wapo_analysis.importers.jsonl import JsonLines
from wapo_analysis.importers.readers import json_records, json_value
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.store import open_run


def numbers(log: JsonLines) -> list[int]:
    return [record.values["n"] for record in log.records()]


def line(n: int, size: int = 0) -> bytes:
    return json.dumps({"n": n, "pad": "x" * size}).encode() + b"\n"


def test_a_half_line_waits_for_its_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(line(1) + line(2)[:5])
    log = JsonLines(file)
    assert numbers(log) == [1]
    assert log.tail() == (None, True)
    with file.open("ab") as stream:
        stream.write(line(2)[5:] + line(3))
    assert numbers(log) == [2, 3]
    assert log.tail() == (None, False)
    assert log.offset == file.stat().st_size


def test_a_last_line_that_only_lacks_its_line_feed_counts(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(line(1) + line(2).rstrip())
    log = JsonLines(file)
    assert numbers(log) == [1]
    values, half = log.tail()
    assert values is not None
    assert (values["n"], half) == (2, False)
    with file.open("ab") as stream:
        stream.write(b"\n" + line(3))
    assert numbers(log) == [3], "a line taken without its line feed is not read again"


def test_broken_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    file = tmp_path / "b.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line(1) + b"{oops\n\n[3]\n\xff\xfe\n" + line(6))
    log = JsonLines(file)
    assert numbers(log) == [1, 6]
    assert log.broken == 3
    assert [text.split(":")[:2] for text in log.named] == [["b.jsonl", n] for n in "245"]


def test_places_lead_back_to_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(line(1, 50) + b"\n" + line(2) + line(3, 9))
    log = JsonLines(file)
    for record in log.records():
        assert log.at(record.start)["n"] == record.values["n"]


def test_a_replaced_file_is_an_error_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(line(1) + line(2))
    log = JsonLines(file)
    assert numbers(log) == [1, 2]
    file.write_bytes(line(1))
    with pytest.raises(UserError, match="became shorter"):
        numbers(log)
    with pytest.raises(UserError, match="cannot read"):
        numbers(JsonLines(tmp_path / "absent.jsonl"))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=30),
    block=st.integers(1, 70),
    cut=st.integers(0, 30),
)
def test_any_block_size_and_any_cut_give_the_same_lines(
    sizes: list[int], block: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("j") / "e.jsonl"
    content = b"".join(line(n, size) for n, size in enumerate(sizes))
    kept = jsonl.BLOCK_BYTES
    jsonl.BLOCK_BYTES = block
    try:
        file.write_bytes(content[: max(0, len(content) - cut)])
        log = JsonLines(file)
        first = numbers(log)
        file.write_bytes(content)
        assert first + numbers(log) == list(range(len(sizes)))
    finally:
        jsonl.BLOCK_BYTES = kept


def test_a_line_beyond_all_limits_is_broken_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 256)
    file = tmp_path / "f.jsonl"
    file.write_bytes(line(1) + line(2, 5000) + line(3))
    log = JsonLines(file)
    assert numbers(log) == [1, 3]
    assert log.broken == 1
    assert log.offset == file.stat().st_size


def read_beside_a_writer(file: Path, lines: int, pad: int) -> tuple[int, int]:
    """Sum over all lines read while they are written, and the peak of traced memory in bytes."""
    file.touch()
    written = threading.Event()

    def write() -> None:
        with file.open("ab", buffering=0) as stream:
            for n in range(0, lines, 64):
                content = b"".join(line(k, pad) for k in range(n, min(n + 64, lines)))
                middle = len(content) // 3
                stream.write(content[:middle])
                stream.write(content[middle:])
        written.set()

    writer = threading.Thread(target=write)
    tracemalloc.start()
    writer.start()
    log, found, total = JsonLines(file), 0, 0
    try:
        while True:
            done = written.is_set()
            for record in log.records():
                assert record.values["n"] == found, "a line is lost, doubled or out of order"
                found += 1
                total += record.values["n"]
            if done:
                break
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        writer.join()
    assert found == lines
    assert log.broken == 0
    return total, peak


def test_30_megabytes_beside_a_writer_in_constant_memory(tmp_path: Path) -> None:
    total, peak = read_beside_a_writer(tmp_path / "g.jsonl", 25_000, 1200)
    assert (tmp_path / "g.jsonl").stat().st_size > 30_000_000
    assert total == 25_000 * 24_999 // 2
    assert peak < 12_000_000


def test_an_import_beside_a_writer_takes_what_was_whole(tmp_path: Path) -> None:
    file, stop = tmp_path / "tokens.jsonl", threading.Event()
    row = {"step": 1, "logp": -0.5, "advantage": 1.0, "pad": "x" * 200}
    file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for _ in range(3000)))

    def write() -> None:
        text = json.dumps(row | {"step": 2}).encode() + b"\n"
        with file.open("ab", buffering=0) as stream:
            while not stop.is_set():
                stream.write(text[:100])
                stop.wait(0.0005)  # the half line is there for a while
                stream.write(text[100:])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        report = import_run(file, tmp_path / "run")
    finally:
        stop.set()
        writer.join()
    assert report.broken_lines == 0
    assert len(open_run(tmp_path / "run").tokens([1])) == 3000
    assert report.token_rows >= 3000


@pytest.mark.slow
def test_1_2_gigabytes_beside_a_writer_in_constant_memory(tmp_path: Path) -> None:
    total, peak = read_beside_a_writer(tmp_path / "h.jsonl", 1_000_000, 1200)
    assert (tmp_path / "h.jsonl").stat().st_size > 1_200_000_000
    assert total == 1_000_000 * 999_999 // 2
    assert peak < 12_000_000


def test_what_is_written_meanwhile_is_read_in_two_more_passes(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(line(0))
    found = []
    for number, values in json_records(file, ImportReport("table", "t")):
        found.append((number, values["n"]))
        with file.open("ab") as more:
            more.write(line(number))
    assert found == [(1, 0), (2, 1), (3, 2)]


def test_a_json_value_may_be_as_large_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, report = tmp_path / "t.json", ImportReport("table", "t")
    file.write_text('{"a": 1, "a": 2}')
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 16)
    assert json_value(file, report) == {"a": 2}
    assert report.places == {jsonl.DOUBLED: ["t.json:1"]}
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 15)
    with pytest.raises(UserError, match="is larger than 1 GiB"):
        json_value(file, report)
