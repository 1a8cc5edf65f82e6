"""Records of a JSON value in every shape that is read, and values that just miss one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.import_sources import write_lines
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.shapes import (
    holds_table,
    json_rows,
    may_be_log,
    text_lines,
    text_tables,
    told_apart,
    unwrapped,
)

R2 = [{"step": 1, "r": 0.1}, {"step": 2, "r": 0.2}]
BARE = [{"r": 0.1}, {"r": 0.2}]


def split(names: list[str], data: Any, **more: Any) -> dict[str, Any]:
    return {"columns": names, "data": data, **more}


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        pytest.param(R2, R2, id="records"),
        pytest.param([], None, id="nothing"),
        pytest.param([1], None, id="a list of numbers"),
        pytest.param([{"r": 1}, 2], None, id="not all are records"),
        pytest.param({}, None, id="an empty object"),
        pytest.param(3, None, id="a number"),
        pytest.param({"r": 0.5}, [{"r": 0.5}], id="one record"),
        # pandas
        pytest.param(split(["step", "r"], [[1, 0.1], [2, 0.2]], index=[0, 1]), R2, id="split"),
        pytest.param(split(["r"], [[0.1], [0.2]], index=[0, 1]), BARE, id="split, plain index"),
        pytest.param(split(["r"], [[0.1], [0.2]], index=[1, 2]), R2, id="split, index of steps"),
        pytest.param(split(["r"], [[0.1], [0.2]], index=["1", "2"]), R2, id="index as text"),
        pytest.param(split(["r"], [[0.1], [0.2]], index=["a", 2]), BARE, id="index of names"),
        pytest.param(split(["r"], [[0.1], [0.2]], index=[1, 2, 3]), BARE, id="longer index"),
        pytest.param(split(["step", "r"], [[1, 0.1], [2, 0.2]], index=[7, 8]), R2, id="two steps"),
        pytest.param(split(["r"], [[0.1]], index=[5]), [{"step": 5, "r": 0.1}], id="one row"),
        pytest.param({"5": {"r": 0.1}}, [{"step": 5, "r": 0.1}], id="one record by step"),
        pytest.param({"schema": {}, "data": R2}, R2, id="table"),
        pytest.param({"0": BARE[0], "1": BARE[1]}, BARE, id="by row"),
        pytest.param({"1": BARE[0], "2": BARE[1]}, R2, id="by step"),
        pytest.param({"10": {"r": 2}, "9": {"r": 1}},
                     [{"step": 9, "r": 1}, {"step": 10, "r": 2}], id="by step, unordered"),
        pytest.param({"r": {"10": 2, "9": 1}, "q": {"10": 5}},
                     [{"step": 9, "r": 1}, {"step": 10, "r": 2, "q": 5}], id="numbers by step"),
        pytest.param({"step": {"0": 1, "1": 2}, "r": {"0": 0.1, "1": 0.2}}, R2, id="columns"),
        # series
        pytest.param({"r": {"steps": [1, 2], "values": [0.1, 0.2]}}, R2, id="steps, values"),
        pytest.param({"r": {"step": [1, 2], "value": [0.1, 0.2]}}, R2, id="step, value"),
        pytest.param({"r": {"x": [1, 2], "y": [0.1, 0.2]}}, R2, id="x, y"),
        pytest.param({"r": [[1, 0.1], [2, 0.2]], "q": [[1, 5], [2, 6]]},
                     [*R2, {"step": 1, "q": 5}, {"step": 2, "q": 6}], id="pairs"),
        pytest.param({"r": [{"step": 1, "value": 0.1}, {"step": 2, "value": 0.2}],
                      "q": [{"step": 1, "value": 5}, {"step": 2, "value": 6}]},
                     [*R2, {"step": 1, "q": 5}, {"step": 2, "q": 6}], id="points"),
        pytest.param({"a": {"b": {"r": {"x": [1], "y": [2]}}}}, [{"step": 1, "a/b/r": 2}],
                     id="two levels down"),
        pytest.param({"a": {"b": {"r": {"x": [1], "y": [2]}}}},
                     [{"step": 1, "a/b/r": 2}], id="a name of three parts"),
        pytest.param({"run": {"r": {"x": [1], "y": [2]}, "a": {"b": {"c": {"x": [1], "y": [3]}}}}},
                     [{"step": 1, "r": 2}, {"step": 1, "a/b/c": 3}], id="in a run"),
        # lists by name
        pytest.param({"step": [1, 2], "r": [0.1, 0.2]}, R2, id="lists"),
        pytest.param({"step": [1], "r": [0.1]}, R2[:1], id="lists of one"),
        pytest.param({"m": {"step": [1, 2], "r": [0.1, 0.2]}}, R2, id="lists below one name"),
        pytest.param({"m": {"r": [0.1, 0.2]}, "n": {"q": [5, 6]}},
                     [{"m/r": 0.1, "n/q": 5}, {"m/r": 0.2, "n/q": 6}], id="below two names"),
        pytest.param({"reward": 0.5, "xs": [1, 2, 3]}, [{"reward": 0.5, "xs": [1, 2, 3]}],
                     id="one record with a list in it"),
        pytest.param({"lr": 0.5, "xs": [1, 2, 3]}, [{"xs": 1}, {"xs": 2}, {"xs": 3}],
                     id="lists beside a setting"),
        pytest.param({"r": [1], "note": "x"}, [{"r": [1], "note": "x"}], id="a list of one number"),
        pytest.param({"r": ["a", "b"], "q": {"x": ["c", "d"]}, "n": 1}, [{"r": "a"}, {"r": "b"}],
                     id="texts count at the top alone"),
        pytest.param({"m": {"b": {"c": {"d": {"r": [1, 2]}}}}, "n": {"q": [5, 6]}},
                     [{"m/b/c/d/r": 1, "n/q": 5}, {"m/b/c/d/r": 2, "n/q": 6}], id="four down"),
        pytest.param({"m": {"b": {"c": {"d": {"e": {"r": [1, 2]}}}}}, "n": {"q": [5, 6]}},
                     [{"q": 5}, {"q": 6}], id="five down"),
        pytest.param({"r": [0.1, 0.2], "r/x": [5, 6], "n": "x"},
                     [{"r": 0.1, "r/x": 5}, {"r": 0.2, "r/x": 6}], id="a name with a slash"),
        pytest.param({"r": [1, 2], "m": [1, {"x": 2}], "n": 3}, [{"r": 1}, {"r": 2}],
                     id="a list with a record in it is none of numbers"),
        pytest.param({"m": {"r": [1, "x"]}, "k": {"q": [5, 6]}},
                     [{"m/r": 1, "k/q": 5}, {"m/r": "x", "k/q": 6}], id="a text among numbers"),
        pytest.param({"a": [], "b": []}, [{"a": [], "b": []}], id="empty lists"),
        # what just misses a shape
        pytest.param({"schema": {}, "data": [R2[0], 3]}, [{"schema": {}, "data": [R2[0], 3]}],
                     id="a table whose rows are not all records"),
        pytest.param({"columns": ["a"], "data": 3}, [{"columns": ["a"], "data": 3}],
                     id="split without rows"),
        pytest.param({"columns": 3, "data": [[1]]}, [{"columns": 3, "data": [[1]]}],
                     id="split without names"),
        pytest.param({"r": {"1": 0.1, "x": 0.2}}, [{"r": {"1": 0.1, "x": 0.2}}],
                     id="numbers by step and by name"),
        pytest.param({"r": {"steps": [1], "values": 3}}, [{"r": {"steps": [1], "values": 3}}],
                     id="steps without values"),
        pytest.param({"r": {"steps": 3, "values": [1]}}, [{"r": {"steps": 3, "values": [1]}}],
                     id="values without steps"),
        pytest.param({"r": {"steps": [1, 2, 3], "values": [0.1]}},
                     [{"steps": 1}, {"steps": 2}, {"steps": 3}], id="more steps than values"),
        pytest.param({"r": [[1, 0.1]]}, [{"r": [1, 0.1]}], id="one pair"),
        pytest.param({"r": [[1, 0.1], [2]]}, [{"r": [1, 0.1]}, {"r": [2]}], id="not all pairs"),
        pytest.param({"r": [[1, 2, 3], [4, 5, 6]]}, [{"r": [1, 2, 3]}, {"r": [4, 5, 6]}],
                     id="triples"),
        pytest.param({"r": [{"step": 1, "value": 0.1}, {"step": 2}]},
                     [{"step": 1, "value": 0.1}, {"step": 2}], id="not all points"),
        # records below a name
        pytest.param({"history": R2, "config": {"lr": 1}}, R2, id="below a name"),
        pytest.param({"a": {"b": {"c": {"d": {"e": R2}}}}, "n": 1}, R2, id="five names down"),
        pytest.param({"a": {"b": {"c": {"d": {"e": {"f": R2}}}}}, "n": 1},
                     [{"a": {"b": {"c": {"d": {"e": {"f": R2}}}}}, "n": 1}], id="six names down"),
        pytest.param({"history": R2[:1], "n": 1}, [{"history": R2[:1], "n": 1}], id="one record"),
    ],
)  # fmt: skip
def test_records_of_a_json_value(value: Any, rows: list[dict[str, Any]] | None) -> None:
    assert json_rows(value) == rows


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"a": [1, 2], "b": [3, 4]}, []),
        ({"a": [1, 2], "b": [3, 4], "c": [5]},
         ["lists of 2 numbers are read; c has another length, so their steps are unknown"]),
        ({"a": [1, 2], "b": [3, 4], "c": [5], "d": [1, 2, 3]},
         ["lists of 2 numbers are read; c, d have another length, so their steps are unknown"]),
        ({"a": [1, 2], "b": [3, 4, 5]},
         ["lists of 3 numbers are read; a has another length, so their steps are unknown"]),
        ({"a": [1, 2], "b": [3, 4], "e": [], "n": "x"}, []),
        ({"data": R2}, ["data of the file is read"]),
        ({"log": R2, "n": 1}, ["log of the file is read"]),
        ({"eval": R2, "log": [*R2, *R2], "n": 1}, ["log of the file is read; not eval"]),
        ({"eval": R2, "log": R2, "n": 1}, ["eval of the file is read; not log"]),
    ],
)  # fmt: skip
def test_what_is_chosen_of_a_json_value_is_told(value: Any, told: list[str]) -> None:
    said: list[str] = []
    json_rows(value, said.append)
    assert said == told


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"step": 1, "metrics": {"r": 2}}, {"step": 1, "r": 2}),
        ({"step": 1, "metrics": {"r": 2}, "data": {"q": 3}},
         {"step": 1, "metrics": {"r": 2}, "data": {"q": 3}}),
        ({"step": 1, "mine": {"r": 2}}, {"step": 1, "mine": {"r": 2}}),
        ({"r": 1, "kl_positional": [0.5, 0.25]},
         {"r": 1, "kl_positional": [0.5, 0.25], "kl_positional/0": 0.5, "kl_positional/1": 0.25}),
    ],
)  # fmt: skip
def test_numbers_below_one_name_of_a_logger(record: Any, found: dict[str, Any]) -> None:
    assert unwrapped(record) == found
    many = unwrapped({"kl_positional": list(range(100))})
    assert len(many) == 1 + 64


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"step": 1, "name": "reward", "value": 0.5}, {"step": 1, "reward": 0.5}),
        ({"step": 1, "name": " ", "value": 0.5}, {"step": 1, "name": " ", "value": 0.5}),
        ({"step": 1, "name": "reward", "value": "x"}, {"step": 1, "name": "reward", "value": "x"}),
        ({"name": "r", "value": 0.5, "metric_value": 1},
         {"name": "r", "value": 0.5, "metric_value": 1}),
        ({"step": 1, "split": " Test ", "r": 0.5, "note": None}, {"step": 1, "eval/r": 0.5}),
        ({"step": 1, "type": "eval", "r": 0.5}, {"step": 1, "eval/r": 0.5}),
        ({"step": 1, "type": "metric", "r": 0.5}, {"step": 1, "type": "metric", "r": 0.5}),
        ({"step": 1, "split": "train", "r": 0.5}, {"step": 1, "split": "train", "r": 0.5}),
        ({"The_Step": 1, "mode": "val", "tag": "r", "value": 2}, {"The_Step": 1, "eval/r": 2}),
    ],
)  # fmt: skip
def test_a_row_is_read_by_the_names_it_means(row: Any, found: dict[str, Any]) -> None:
    assert told_apart(row) == found


def tables(text: str) -> list[tuple[int, dict[str, Any]]]:
    return list(text_tables(enumerate(text.splitlines(), start=1)))


ROWS = [{"step": "1", "r": "0.1"}, {"step": "2", "r": "0.2"}]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        pytest.param("| step | r |\n|---|---|\n| 1 | 0.1 |\n| 2 | 0.2 |", ROWS, id="markdown"),
        pytest.param("step r\n1 0.1\n2 0.2", ROWS, id="columns"),
        pytest.param("   step r\n0  1 0.1\n1  2 0.2", ROWS, id="pandas"),
        pytest.param("|   | step | r |\n| 0 | 1 | 0.1 |\n| 1 | 2 | 0.2 |", ROWS, id="with index"),
        pytest.param("step r\n1 0.1\n\n2 0.2", ROWS[:1], id="an empty line ends it"),
        pytest.param("step r\n-----\n1 0.1\n2 0.2", ROWS, id="a ruler does not"),
        pytest.param("step r\n1 0.1 5 6\n2 0.2", [], id="a line of other cells ends it"),
        pytest.param("step step\n1 0.1", [], id="names are unlike"),
        pytest.param("step\n1", [], id="one name is no table"),
        pytest.param("step 2nd\n1 0.1", [], id="a name begins with a letter"),
        pytest.param("step nan\n1 0.1", [], id="a name is no number"),
        pytest.param("| step | r |\n| 1 | - |\n| 2 |  |", [{"step": "1"}, {"step": "2"}],
                     id="cells without a number"),
        pytest.param("step r\none two\n2 0.2", [{"one": "2", "two": "0.2"}], id="other names"),
        pytest.param("5\n7\n9\nstep r\n1 0.1", ROWS[:1], id="numbers alone before it"),
        pytest.param("step note\n1 ok", [{"step": "1", "note": "ok"}], id="a text among numbers"),
        pytest.param("**|\nstep r\n1 0.1", ROWS[:1], id="a bar behind marks"),
        pytest.param("step | r\n1 | 0.1\n2 | 0.2", ROWS, id="bars between cells alone"),
        pytest.param("| step | r\n| 1 | 0.1\n| 2 | 0.2", ROWS, id="bars before cells"),
        pytest.param("| **step** | `r` |\n| 1 | 0.1 |", ROWS[:1], id="marked names"),
    ],
)  # fmt: skip
def test_tables_in_a_text(text: str, rows: list[dict[str, Any]]) -> None:
    assert [row for _, row in tables(text)] == rows


def test_rows_of_a_table_in_a_text_have_the_number_of_their_line() -> None:
    assert [number for number, _ in tables("hello\nstep r\n-----\n1 0.1\n2 0.2")] == [4, 5]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("kind size\na 1\nb 2\n\nstep reward\n1 0.5\n", True), ("kind size\na 1\n", False),
        ("reward speed\n0.5 2\n", True), ("words\n", False),
    ],
)  # fmt: skip
def test_a_table_of_a_text_says_something_of_a_run_by_one_known_name(
    text: str, held: bool, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(text)
    lines = list(text_lines(tmp_path / "t.txt"))
    assert lines == list(enumerate(text.splitlines(), start=1))
    assert holds_table(lines) is held
    assert may_be_log(tmp_path / "t.txt", NameTable({})) is held


RECORDS = [
    ({"step": 1, "x": 2}, True), ({"reward": 1, "x": 2}, True), ({"tag": "x", "y": 2}, True),
    ({"x": 1, "y": 2}, False), ({"x": 1, "mine": 2}, True), ({"metrics": {"step": 1}}, True),
]  # fmt: skip


@pytest.mark.parametrize(("record", "log"), RECORDS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_table_may_be_a_log_by_its_step_a_known_number_or_names_of_numbers(
    record: dict[str, Any], log: bool, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"t.{suffix}"
    other = {"x": 1, "z": 3}
    if suffix == "jsonl":
        file.write_text(json.dumps(record) + "\n" + json.dumps(other) + "\n")
    elif suffix == "json":
        file.write_text(json.dumps([other, record]))
    elif suffix == "csv":
        flat = record.get("metrics", record)
        file.write_text(f"{','.join(flat)}\n{','.join(map(str, flat.values()))}\n")
    else:
        file.write_bytes(b"PAR1")
    assert may_be_log(file, NameTable({"entropy": "mine"})) is (log or suffix == "parquet")


def test_what_no_table_can_be_read_of_may_be_a_log_and_is_named_later(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{")
    assert may_be_log(tmp_path / "t.json", NameTable({}))
    (tmp_path / "t.json").write_text("[1, 2]")
    assert not may_be_log(tmp_path / "t.json", NameTable({}))


def test_a_table_is_known_as_a_log_by_its_first_fifty_records(tmp_path: Path) -> None:
    for place, log in ((50, True), (51, False)):
        rows = [{"x": n} for n in range(place - 1)] + [{"reward": 1}]
        file = write_lines(tmp_path / f"{place}.jsonl", rows)
        assert may_be_log(file, NameTable({})) is log
