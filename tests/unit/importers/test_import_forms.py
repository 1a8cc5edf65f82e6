"""Forms of files one by one: tables, JSON of every shape, pages, wrappers, copies."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers.console import holds_reward
from wapo_analysis.importers.detect import _copies, _told_copies
from wapo_analysis.importers.jsonl import as_number
from wapo_analysis.importers.logs import _is_reward, _reach
from wapo_analysis.importers.packed import notebook_text, page_text, wrapped_by
from wapo_analysis.importers.printed import line_of
from wapo_analysis.importers.readers import (
    csv_frames,
    csv_header,
    is_csv,
    is_json_lines,
    json_value,
    table_kind,
    unique_names,
)
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.run import _named
from wapo_analysis.importers.shapes import json_rows, text_tables, told_apart, unwrapped
from wapo_analysis.importers.sink import StepTotals


def fresh() -> ImportReport:
    return ImportReport("table", "t")


# ---- tables


@pytest.mark.parametrize(
    ("text", "table"),
    [("step,reward\n1,0.5\n", True), ("a;b\n1;x\n", True), ("a\tb\nx\ty\n", False),
     ("a,b\n1,2,3\n", False), ("a=1,b\n1,2\n", False), ("alone\n1\n", False),
     ('a,b\n"1e-3","x"\n', True), ("a,b\n-1,+.5\n", True)],
)  # fmt: skip
def test_what_is_a_table_by_its_first_two_lines(text: str, table: bool) -> None:
    assert is_csv(text) is table


@pytest.mark.parametrize(
    ("line", "names", "mark"),
    [("a,b;c,d", ["a", "b;c", "d"], ","), ("a;b;c,d", ["a", "b", "c,d"], ";"),
     ("alone", ["alone"], ","), (' a , "b,c" ', ["a", '"b', 'c"'], ","),
     ("a\tb", ["a", "b"], "\t")],
)  # fmt: skip
def test_names_and_the_character_between_them(
    tmp_path: Path, line: str, names: list[str], mark: str
) -> None:
    (tmp_path / "t.csv").write_text(f"{line}\n1\n")
    assert csv_header(tmp_path / "t.csv") == (names, mark)


def test_names_that_occur_again_are_numbered_and_told() -> None:
    report = fresh()
    assert unique_names(["a", "b", "a", "a", "b"], Path("t.csv"), report) == [
        "a", "b", "a.2", "a.3", "b.2",
    ]  # fmt: skip
    assert report.events == [
        "t.csv has 3 columns 'a': the first is read, the rest are a.2 to a.3",
        "t.csv has 2 columns 'b': the first is read, the rest is b.2",
    ]
    for count, lines in ((5, 5), (6, 6)):
        report = fresh()
        unique_names([f"n{n}" for n in range(count)] * 2, Path("t.csv"), report)
        assert len(report.events) == lines
    assert report.events[-1] == "t.csv has 6 names of columns more than once"


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["30%", "1.5 %", "5"], ["0.3", "0.015", "5"]),
        (['"1,234"', '"12,345.5"', "7"], ["1234", "12345.5", "7"]),
        (["x", "", "1e-3"], ["x", None, "1e-3"]),
    ],
)
def test_numbers_as_tables_spell_them(
    tmp_path: Path, cells: list[str], read: list[str | None]
) -> None:
    rows = "".join(f"{n},{cell}\n" for n, cell in enumerate(cells))
    (tmp_path / "t.csv").write_text(f"step,x\n{rows}")
    report = fresh()
    ((first, frame),) = csv_frames(tmp_path / "t.csv", report)
    assert first == 2
    found = [None if value != value else value for value in frame["x"].tolist()]
    assert [v and v.rstrip() for v in found] == read
    assert (report.lines, report.files) == (len(cells), 1)


def test_decimal_commas_stand_beside_semicolons(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("step;x;y\n1;0,5;1.234,5\n2;1,25;7\n")
    ((_, frame),) = csv_frames(tmp_path / "t.csv", fresh())
    assert frame["x"].tolist() == ["0.5", "1.25"]
    assert [float(v) for v in frame["y"]] == [1234.5, 7]


def test_rows_with_another_number_of_fields_are_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("step,x\n1,2\n1,2,3\n4\n5,6\n")
    report = fresh()
    ((_, frame),) = csv_frames(tmp_path / "t.csv", report)
    assert frame["step"].tolist() == ["1", "5"]
    assert report.broken == ["t.csv:3: 3 fields, not 2", "t.csv:4: 1 fields, not 2"]
    assert report.lines == 4
    (tmp_path / "n.csv").write_text("1,2\n3,4\n")
    with pytest.raises(UserError, match="begins with numbers"):
        list(csv_frames(tmp_path / "n.csv", report))


@pytest.mark.parametrize(
    ("text", "lines", "kind"),
    [('{"a": 1}\n{"a": 2}\n', True, "lines"), ('{"a": 1}\n', False, "json"),
     ('{x\n' + '{"a": 1}\n' * 3, True, "lines"), ('{x\n{"a": 1}\n', False, "json"),
     ('{\n"a": 1}\n', False, "json"), ("[1, 2]\n[3]\n", False, "json"),
     ("a,b\n1,2\n", False, "csv"), ("a b\n1 2\n", False, "text")],
)  # fmt: skip
def test_what_a_table_is_by_what_it_holds(
    tmp_path: Path, text: str, lines: bool, kind: str
) -> None:
    (tmp_path / "t").write_text(text)
    assert is_json_lines(tmp_path / "t") is lines
    assert table_kind(tmp_path / "t") == kind


def test_values_that_follow_each_other_are_a_list(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{\n"a": 1\n},\n{\n"a": 2\n}\n')
    assert json_value(tmp_path / "t.json", fresh()) == [{"a": 1}, {"a": 2}]


# ---- JSON of every shape

ROWS = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}]


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        (ROWS, ROWS),
        ([], None), ([1, 2], None), ("text", None), ({}, None),
        ({"step": [1, 2], "reward": [0.1, 0.2]}, ROWS),
        ({"columns": ["step", "reward"], "data": [[1, 0.1], [2, 0.2]]}, ROWS),
        ({"columns": ["reward"], "index": [3, 4], "data": [[0.1], [0.2]]},
         [{"step": 3, "reward": 0.1}, {"step": 4, "reward": 0.2}]),
        ({"columns": ["reward"], "index": [0, 1], "data": [[0.1], [0.2]]},
         [{"reward": 0.1}, {"reward": 0.2}]),
        ({"schema": {}, "data": ROWS}, ROWS),
        ({"reward": {"1": 0.1, "2": 0.2}}, ROWS),
        ({"step": {"0": 1, "1": 2}, "reward": {"0": 0.1, "1": 0.2}}, ROWS),
        ({"10": {"reward": 0.1}, "9": {"reward": 0.2}},
         [{"step": 9, "reward": 0.2}, {"step": 10, "reward": 0.1}]),
        ({"reward": {"steps": [1, 2], "values": [0.1, 0.2]}}, ROWS),
        ({"reward": {"x": [1, 2], "y": [0.1, 0.2]}}, ROWS),
        ({"reward": [[1, 0.1], [2, 0.2]]}, ROWS),
        ({"reward": [{"step": 1, "value": 0.1}, {"step": 2, "value": 0.2}]}, ROWS),
        ({"train": {"reward": {"steps": [1, 2], "values": [0.1, 0.2]}}},
         [{"step": 1, "train/reward": 0.1}, {"step": 2, "train/reward": 0.2}]),
        ({"info": {"name": "x"}, "history": ROWS}, ROWS),
        ({"deep": {"er": {"log": ROWS}}}, ROWS), ({"history": ROWS}, ROWS),
        ({"a": 1, "reward": 0.5}, [{"a": 1, "reward": 0.5}]),
        ({"m": {"step": [1, 2], "reward": [0.1, 0.2]}, "lr": 1}, ROWS),
    ],
)  # fmt: skip
def test_records_of_a_json_value(value: Any, rows: Any) -> None:
    assert json_rows(value) == rows


def test_of_two_logs_in_a_file_the_longer_is_read_and_told() -> None:
    told: list[str] = []
    assert json_rows({"x": ROWS, "y": [*ROWS, {"step": 3}], "one": ROWS[:1]}, told.append) == [
        *ROWS, {"step": 3},
    ]  # fmt: skip
    assert told == ["y of the file is read; not x"]
    told.clear()
    lists = {"step": [1, 2, 3], "reward": [1, 2, 3], "short": [1, 2], "n": 5}
    assert json_rows(lists, told.append) == [{"step": n, "reward": n} for n in (1, 2, 3)]
    assert told == [
        "lists of 3 numbers are read; short has another length, so their steps are unknown"
    ]


def test_numbers_below_one_name_stand_by_themselves() -> None:
    assert unwrapped({"t": 1, "metrics": {"a": 2}}) == {"t": 1, "a": 2}
    two = {"metrics": {"a": 2}, "data": {"b": 3}}
    assert unwrapped(two) == two
    parts = unwrapped({"kl_positional": list(range(70))})
    assert (parts["kl_positional/0"], parts["kl_positional/63"]) == (0, 63)
    assert "kl_positional/64" not in parts


def test_a_row_is_its_metric_and_its_split() -> None:
    assert told_apart({"step": 1, "key": "kl", "metric_value": 2, "split": "Valid "}) == {
        "step": 1, "eval/kl": 2,
    }  # fmt: skip
    both = {"step": 1, "name": "x", "value": 1, "metricValue": 2}
    assert told_apart(both) == both, "two numbers, and no telling which"
    assert told_apart({"step": 1, "value": 2, "split": "train"}) == {
        "step": 1, "value": 2, "split": "train",
    }  # fmt: skip
    assert told_apart({"global_step": 1, "mode": "test", "a": None}) == {"global_step": 1}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("| step | reward |\n|---|---|\n| 1 | 0.5 |\n| 2 | - |\n",
         [(3, {"step": "1", "reward": "0.5"}), (4, {"step": "2"})]),
        ("step reward\n1 0.5\n2 0.6\n", [(2, {"step": "1", "reward": "0.5"}),
                                         (3, {"step": "2", "reward": "0.6"})]),
        ("  step reward\n0 1 0.5\n", [(2, {"step": "1", "reward": "0.5"})]),
        ("step reward\n\n1 0.5\n", []),
        ("step step\n1 0.5\n", []),
        ("| step | reward |\n| 1 | 0.5 | 3 |\n", []),
        ("| | step | reward |\n| 0 | 1 | **0.5** |\n", [(2, {"step": "1", "reward": "0.5"})]),
    ],
)  # fmt: skip
def test_tables_in_a_text(text: str, rows: list[tuple[int, dict[str, str]]]) -> None:
    assert list(text_tables(enumerate(text.split("\n"), start=1))) == rows


# ---- pages and wrappers


def test_tables_of_a_page_and_outputs_of_a_notebook() -> None:
    page = "<table><tr><th>a|b</th><td> x\n y</td></tr><tr></tr></table>text"
    assert page_text(page) == "| a/b | x y |\n\n"
    cells = [
        {"outputs": [{"text": ["reward=", "1\n"]}, {"data": {"text/plain": "2"}}]},
        {"outputs": [{"data": {"text/html": [page]}}]}, {"source": "x"}, 3,
    ]  # fmt: skip
    told = notebook_text(json.dumps({"cells": cells}).encode())
    assert told.split() == ["reward=1", "2", "|", "a/b", "|", "x", "y", "|"]
    with pytest.raises(ValueError, match="no cells"):
        notebook_text(b'{"a": 1}')


@pytest.mark.parametrize(
    ("head", "how"),
    [(b"sep=;\na;b\n", "sep"), (b'"sep=,"\r\na', "sep"), (b'{"log": "x"}\n{"log": "y"}', "log"),
     (b'{"log": "x"}\n{"log": 3}', None), (b'{"log": "x", "step": 1}', None),
     (b'{"log": "x", "reward": 1}', None), (b"plain", None), (b"{broken\n{", None)],
)  # fmt: skip
def test_how_a_file_holds_another(head: bytes, how: str | None) -> None:
    assert wrapped_by(head) == how


def test_copies_of_a_table_are_read_once(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.csv" for n in range(7)]
    for n, file in enumerate(files):
        file.write_text("same" if n < 6 else "else")
    assert _copies(files) == set(files[1:6])
    assert _copies(files[5:]) == set()
    assert _told_copies(set(files[1:5])) == [
        f"{n}.csv holds the same bytes as another file: read once" for n in range(1, 5)
    ]
    assert _told_copies(set(files[1:6])) == [
        "5 files hold the same bytes as another file, read once: "
        "1.csv, 2.csv, 3.csv, 4.csv and 1 more"
    ]


@pytest.mark.parametrize("odd", [b"\0\1\2\xff" * 500, b"no JSON at all\n", b'{"foo": 1}\n'])
def test_a_file_named_like_the_others_that_holds_no_log_is_told(tmp_path: Path, odd: bytes) -> None:
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for n in (1, 2):
        (folder / f"{n}.jsonl").write_text(f'{{"step": {n}, "reward": 0.5}}\n')
    (folder / "3.jsonl").write_bytes(odd)
    (folder / "4.jsonl").write_bytes(b"")  # just begun
    (folder / "vocabulary.json").write_text('{"a": 1}')
    _, report = read(folder, tmp_path / "out")
    assert report.events == [
        "3.jsonl: named like the files that are read, but no log of that kind: not read"
    ]


def test_the_last_step_of_a_log_and_what_is_a_reward() -> None:
    assert _reach([(1, {"step": 3}), (2, {"current_steps": 7}), (3, {"loss": 1})]) == 7
    assert _reach([(1, {"global_step/max_steps": "4/9"})]) == 4
    assert _reach([]) == 0
    assert _is_reward("accuracy", 1)
    assert not _is_reward("accuracy", "1")
    assert not _is_reward("advantage", 1.0)


def test_columns_whose_rows_have_another_length_are_no_table_of_pandas() -> None:
    for data in ([[1]], [[1, 2], [3]], [1, 2]):
        value = {"columns": ["step", "reward"], "data": data}
        assert json_rows(value) != [{"step": 1, "reward": 2}]


def test_a_column_may_be_called_by_a_number(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("step,1\n1,0.5\n")
    ((_, frame),) = csv_frames(tmp_path / "t.csv", fresh())
    assert frame.columns.tolist() == ["step", "1"]


@pytest.mark.parametrize(
    ("line", "reward"),
    [("step=1 reward=0.5 loss=0.1", True), ("step=1 lr=0.5 loss=0.1", False),
     ("{'loss': 0.1, 'reward': 0.5}", True), ("words alone", False)],
)  # fmt: skip
def test_whether_a_printed_log_holds_a_reward(line: str, reward: bool) -> None:
    assert holds_reward(iter([(1, line)])) is reward


@pytest.mark.parametrize(
    ("line", "values"),
    [("Loaded 5 files and 7 words of it", None), ("loss 0.5", None),
     ("loss 0.5 reward 0.1", {"loss": 0.5, "reward": 0.1}),
     ("loss 0.5, reward 0.1", {"loss": 0.5, "reward": 0.1})],
)  # fmt: skip
def test_names_and_numbers_side_by_side_are_two_at_least(
    line: str, values: dict[str, float] | None
) -> None:
    found = line_of(line)
    assert (found and found.values) == values


@pytest.mark.parametrize(
    ("cells", "values", "told"),
    [
        (["1,234", "50%"], [1234, 0.5], ["percent are read as shares", "separators of thousands"]),
        (["1,5", "50%"], [1.5, 0.5], ["percent are read as shares", "decimal points"]),
        (["1.234,5", "7,5%"], [1234.5, 0.075], ["decimal points", "percent are read as shares"]),
        (["1,234", "2,5"], [1.234, 2.5], ["decimal points"]),
        (["1.5", "x,y"], [1.5, None], []),
    ],
)  # fmt: skip
def test_how_a_table_with_semicolons_spells_its_numbers(
    cells: list[str], values: list[float | None], told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(f"step;reward;speed\n1;{';'.join(cells)}\n")
    report = fresh()
    ((_, frame),) = csv_frames(tmp_path / "t.csv", report)
    found = [as_number(frame[name][0]) for name in ("reward", "speed")]
    assert found == pytest.approx(values) if None not in values else found == values
    assert all(any(what in said for said in report.events) for what in told)
    assert len(report.events) == len(told)


@pytest.mark.parametrize(
    ("names", "chosen", "read"),
    [
        (["a.log", "b.log"], None, ["a.log", "b.log"]),
        (["a.log", "b.log"], "a.log", ["a.log"]),
        (["a.log", "ab.log"], "a", ["a.log"]),
        (["seed-1.log", "seed-2.log"], "2", ["seed-2.log"]),
        (["seed-1.log", "seed-2.log"], "seed", ["seed-1.log", "seed-2.log"]),
        (["a.log", "b.log"], "x", ["a.log", "b.log"]),
        (["a.log"], "x", ["a.log"]),
    ],
)
def test_of_several_files_the_chosen_one_is_read(
    names: list[str], chosen: str | None, read: list[str]
) -> None:
    files = tuple(Path("logs") / name for name in names)
    assert [file.name for file in _named(files, chosen)] == read
    assert _named(files, "logs/a.log") == (files[:1] if names[0] == "a.log" else files)


def test_tokens_of_a_step_add_up_over_the_blocks_they_come_in() -> None:
    rows = pd.DataFrame({"advantage": [1.0, -1, 1, 0], "logp": [-1.0, -2, -0.5, -0.1],
                         "logp_old": [-1.1, -2, -0.5, -0.2], "entropy": [1.0, 2, 3, 4],
                         "kept": [True, True, False, True],
                         "clipped": [True, False, False, False]})  # fmt: skip
    whole, parts = StepTotals(), StepTotals()
    whole.add_tokens(1, rows)
    for part in (rows[:1], rows[1:]):
        parts.add_tokens(1, part)
    columns = whole.columns()[1]
    assert parts.columns()[1] == pytest.approx(columns)
    assert (columns["tokens"], columns["kept_tokens"], columns["entropy"]) == (4, 3, 2.5)
