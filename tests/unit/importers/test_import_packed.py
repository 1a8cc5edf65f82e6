"""Files that hold another: packed, UTF-16, returns for line ends, containers' logs, pages."""

import codecs
import gzip
import json
import zlib
from pathlib import Path

import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers import packed
from wapo_analysis.importers.packed import (
    notebook_text,
    page_text,
    plain_file,
    wide_encoding,
    wrapped_by,
)

TABLE = "step,reward\n1,0.125\n2,0.25\n3,0.375\n"
REWARDS = [0.125, 0.25, 0.375]
LOG = "".join(f"step={n} reward={r} entropy=0.4\n" for n, r in enumerate(REWARDS, start=1))


def rewards(file: Path, content: bytes) -> list[float]:
    """What is read of a file, by step."""
    file.write_bytes(content)
    steps, report = read(file, file.parent / f"{file.name}-run")
    assert steps.index.tolist() == list(range(1, len(steps) + 1))
    assert not report.broken_lines
    return list(steps["reward"])


def text_in(file: Path, content: bytes) -> str:
    """The text that readers get of a file."""
    file.write_bytes(content)
    read = plain_file(file, file, file.parent / "unpacked", [])
    assert read is not None
    return read.read_bytes().decode("utf-8", "replace")


# ---- UTF-16


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step,reward", True), ("step,rewarł" * 3, True), ("step,rewał", False), ("ał" * 9, False),
        ("ła" * 9, False), ("\0" * 9, False), ("step\0reward", False),
    ],
)  # fmt: skip
def test_utf_16_without_a_mark_is_told_by_more_than_nine_zeros_in_ten_characters(
    text: str, told: bool, encoding: str
) -> None:
    assert wide_encoding(text.encode(encoding)) == (encoding if told else None)


def test_a_text_with_a_stray_zero_is_not_utf_16(tmp_path: Path) -> None:
    assert wide_encoding(b"step=1 rewar\0d=0.5") is None
    assert wide_encoding(b"step=1 rewa\0rd=0.5") is None
    lines = [json.dumps({"step": 1, "reward": 0.5}), "\0", json.dumps({"step": 2, "reward": 1.0})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    assert read(tmp_path / "t.jsonl", tmp_path / "out")[0]["reward"].tolist() == [0.5, 1.0]


def test_what_is_utf_16_is_seen_in_the_first_256_characters(tmp_path: Path) -> None:
    text = LOG.ljust(256, "\n") + "step=4 reward=0.5 note=数学题目数学题目\n" * 16
    assert text_in(tmp_path / "train.log", text.encode("utf-16-le")) == text
    assert text_in(tmp_path / "other.log", text[-256:].encode("utf-16-le")) != text[-256:]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "sep=;\n" + TABLE.replace(",", ";")),
        ("t.csv", TABLE.replace("\n", "\r")),
        ("t.json", "".join(json.dumps({"log": line}) + "\n" for line in LOG.splitlines())),
    ],
)
@pytest.mark.parametrize("form", ["utf-16", "gzip", "both"])
def test_a_file_in_two_wrappings_is_read(name: str, text: str, form: str, tmp_path: Path) -> None:
    content = text.encode("utf-8" if form == "gzip" else "utf-16")
    suffix = "" if form == "utf-16" else ".gz"
    content = content if form == "utf-16" else gzip.compress(content)
    assert rewards(tmp_path / f"{name}{suffix}", content) == REWARDS


# ---- gzip


def test_a_packed_file_is_known_by_its_first_bytes_or_by_its_name(tmp_path: Path) -> None:
    # Its header holds the time, whose bytes may be those of any text: here of line ends.
    for name, written in (("t", 0), ("u", 0x0D0D0D0D), ("v", 0x0A0A0D0D)):
        packed = gzip.compress(TABLE.encode(), mtime=written)
        assert rewards(tmp_path / f"{name}.csv", packed) == REWARDS
    for content in (TABLE.encode(), zlib.compress(TABLE.encode())):
        with pytest.raises(UserError, match=r"u\.csv\.gz cannot be unpacked"):
            rewards(tmp_path / "u.csv.gz", content)


@pytest.mark.parametrize("members", [1, 3])
def test_a_packed_file_may_be_larger_than_a_block(members: int, tmp_path: Path) -> None:
    rows = [f'{{"step": {n}, "reward": 0.5}}\n'.ljust(1 << 10) for n in range(1, 2501)]
    part = len(rows) // members + 1
    texts = ["".join(rows[n : n + part]) for n in range(0, len(rows), part)]
    content = b"".join(gzip.compress(text.encode(), 1) for text in texts)
    assert len(content) < 1 << 20 < sum(map(len, texts))
    assert rewards(tmp_path / "t.jsonl.gz", content) == [0.5] * 2500
    assert 0 < len(rewards(tmp_path / "cut.jsonl.gz", content[: len(content) // 2])) < 2500


def test_a_packed_file_may_hold_as_much_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MAX_UNPACKED", len(TABLE))
    assert rewards(tmp_path / "t.csv.gz", gzip.compress(TABLE.encode())) == REWARDS
    with pytest.raises(UserError, match="is larger than 4 GiB unpacked"):
        rewards(tmp_path / "u.csv.gz", gzip.compress(f"{TABLE}4,1\n".encode()))


def test_packed_files_below_a_folder_keep_their_places(tmp_path: Path) -> None:
    for name, content in (("a/t.csv", TABLE), ("b/t.csv", "step,entropy\n1,0.5\n2,0.25\n")):
        file = tmp_path / "logs" / f"{name}.gz"
        file.parent.mkdir(parents=True)
        file.write_bytes(gzip.compress(content.encode()))
    steps, report = read(tmp_path / "logs", tmp_path / "out")
    assert steps["reward"].tolist() == REWARDS
    assert steps["entropy"].tolist()[:2] == [0.5, 0.25]
    assert report.files == 2


# ---- other texts within


@pytest.mark.parametrize(
    ("head", "table", "how"),
    [
        (b"a,b\r1,2\r3,4", True, "returns"), (b"a,b\r1,2\r3,4", False, None),
        (b"a,b\r\n1,2\r\n", True, None), (b"a,b\n1,2\n", True, None), (b"a,b", True, None),
        (b"sep=;\na;b\n", True, "sep"), (b"\xef\xbb\xbfsep=;\r\na;b\r\n", True, "sep"),
        (b"a,sep=;\n", True, None), (b'{"message": "x"}\n{"message": "y"}', False, "message"),
        (b'[{"log": "x"}]', False, None), (b'{"log": {"step": 1, "reward": 2}}', False, None),
    ],
)  # fmt: skip
def test_what_a_text_holds_by_its_beginning(head: bytes, table: bool, how: str | None) -> None:
    assert wrapped_by(head, table) == how


@pytest.mark.parametrize(("place", "how"), [(50, None), (51, "log")])
def test_records_with_numbers_of_their_own_among_the_first_fifty_are_no_wrapping(
    place: int, how: str | None
) -> None:
    lines = [b'{"log": "starting"}'] * (place - 1) + [b'{"log": "done", "step": 1, "reward": 0.5}']
    assert wrapped_by(b"\n".join(lines)) == how


@pytest.mark.parametrize("feed", [1 << 10, 70 << 10])
def test_a_late_line_feed_in_a_table_with_returns_is_part_of_a_note(
    feed: int, tmp_path: Path
) -> None:
    """How its lines end is told from the first 64 KiB: of a table with both it is the feed."""
    rows = [f'{n},0.5,"{"x" * 1000}"\r' for n in range(1, 100)]
    text = "step,reward,note\r" + "".join(rows)
    text = f"{text[:feed]}\n{text[feed:]}"
    late = text.replace("\r", "\n") if feed > 1 << 16 else text
    assert text_in(tmp_path / "t.csv", text.encode()) == late


def test_returns_are_line_ends_of_tables_alone(tmp_path: Path) -> None:
    bar = "\r".join(f"{n}/3 [00:01<00:02, 1.2it/s, reward={r}]" for n, r in enumerate(REWARDS, 1))
    assert rewards(tmp_path / "train.log", bar.encode()) == REWARDS


# ---- pages and notebooks


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<tr><td><b>step</b> 1</td><td>0.5</td></tr>", "| step 1 | 0.5 |\n"),
        ("<tr></td><td>1</td></tr>", "| 1 |\n"),
        ("<tr><td>1</td></tr><tr><th>2<br>3</th></tr></table>", "| 1 |\n| 23 |\n\n"),
        ("<td>1</td>", "\n"), ("words <p>1</p>", "\n"),
    ],
)  # fmt: skip
def test_tables_of_a_page(html: str, text: str) -> None:
    assert page_text(html) == text


def test_of_an_output_of_a_notebook_the_table_goes_before_the_text() -> None:
    def shown(*outputs: object) -> str:
        return notebook_text(json.dumps({"cells": [{"outputs": outputs}]}).encode())

    table = {"text/html": "<tr><td>1</td></tr>", "text/plain": "2"}
    assert shown({"data": table}) == "| 1 |\n"
    assert shown({"data": {"text/plain": ["2", "3"]}}) == "23\n"
    assert shown({"text": "4"}, {"data": {}}) == "4\n\n\n"


@pytest.mark.parametrize("name", ["page.html", "page.htm"])
def test_a_page_is_read_as_one_and_a_folder_leaves_pages_out(name: str, tmp_path: Path) -> None:
    rows = "".join(f"<tr><td>{n}</td><td>{r}</td></tr>" for n, r in enumerate(REWARDS, start=1))
    page = f"<table><tr><th>step</th><th>reward</th></tr>{rows}</table>".encode()
    assert rewards(tmp_path / name, page) == REWARDS
    assert rewards(tmp_path / f"{name}.gz", gzip.compress(page)) == REWARDS
    assert rewards(tmp_path / f"wide-{name}", page.decode().encode("utf-16")) == REWARDS
    folder = tmp_path / "logs"
    write_lines(folder / "t.jsonl", [{"step": 1, "reward": 0.75}])
    (folder / name).write_bytes(page)
    (folder / f"{name}.gz").write_bytes(gzip.compress(b"<p>words</p>"))
    assert read(folder, tmp_path / "out")[0]["reward"].tolist() == [0.75]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.ipynb", b"{}", "is no page or notebook"),
        ("a.ipynb", b"nonsense", "is no page or"),
        ("a.ipynb", b'{"cells": [{"outputs": [3]}]}', "is no page or notebook"),
        ("a.ipynb", b'{"cells": []}', "shows no numbers: a notebook must be saved after its"),
        ("a.html", b"<p>words</p>", "shows no numbers"),
        ("a.log", codecs.BOM_UTF16_LE, "is empty"),
    ],
)
def test_a_page_that_shows_nothing_says_so(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read(tmp_path / name, tmp_path / "out")
