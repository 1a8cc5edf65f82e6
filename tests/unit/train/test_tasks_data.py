"""Data files of tasks: every bad row counted and named, clear refusal, a split that stays."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks import Problem, get_task
from wapo_analysis.train.tasks.base import FileTask, load_file_task
from wapo_analysis.train.tasks.data_files import (
    DataRefused,
    DataReport,
    is_held_out,
    read_rows,
    split,
)
from wapo_analysis.train.tasks.hotpotqa import HotpotQA


def row(n: int, **changes: Any) -> dict[str, Any]:
    """A sound row of HotpotQA form, which needs no optional package."""
    sound = {"question": f"Who is {n}?", "answer": f"man {n}", "context": [["T", [f"man {n}."]]]}
    return {**sound, **changes}


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(file)


def load(data: str, **settings: Any) -> FileTask:
    return load_file_task(HotpotQA(), data, **settings)


def test_forms_of_a_file_give_the_same_problems(tmp_path: Path) -> None:
    rows = [row(n) for n in range(30)]
    lines = write(tmp_path / "a.jsonl", rows)
    misnamed = write(tmp_path / "lines.json", rows)
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps(rows, indent=1))
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + Path(lines).read_bytes().replace(b"\n", b"\r\n"))
    columns = tmp_path / "a.parquet"
    hub = [{**r, "context": {"title": ["T"], "sentences": [r["context"][0][1]]}} for r in rows]
    pd.DataFrame(hub).to_parquet(columns)
    prompts = [p.prompt for p in load(lines).train]
    assert len(prompts) == len(set(prompts)) > 20
    for other in (misnamed, whole, marked, columns):
        assert [p.prompt for p in load(str(other)).train] == prompts
    assert {p.source.split()[0] for p in load(lines).train} == {"line"}
    assert {p.source.split()[0] for p in load(str(columns)).train} == {"row"}


def test_bad_rows_are_counted_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = [row(n) for n in range(200)]
    bad: dict[int, tuple[Any, str]] = {
        4: ('{"question": "cut', "broken JSON (Unterminated string starting at)"),
        7: ("[1, 2]", "not a JSON object but list"),
        20: (row(1, question=None), "no 'question'"),
        21: (row(1, question=" \n"), "'question' is empty"),
        30: (row(1, answer=7), "'answer' is int, not text"),
        31: (row(1, answer="\ud800"), "'answer' is not valid Unicode"),
        40: (row(1, context=[]), "'context' is empty"),
        50: (row(2, answer="other"), "asks what line 3 asks and answers otherwise"),
    }
    for line, (content, _) in bad.items():
        rows[line - 1] = content
    rows += ["", row(150), row(1000)]  # a blank line is no row; a repeated one is used once
    data = write(tmp_path / "b.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        task = load(data)
    report = task.reports[0]
    assert report.skipped == tuple(f"line {n}: {reason}" for n, (_, reason) in bad.items())
    assert report.repeated == ("line 202 (as line 151)",)
    assert (report.rows, report.used) == (202, 193)
    assert len(task.train) + len(task.held_out) == 193
    assert task.train[-1].source == "line 203"
    assert [r.message for r in caplog.records] == task.report_lines()
    (line,) = task.report_lines()
    assert line.startswith(f"hotpotqa: 8 of 202 rows of {data} skipped: line 4: broken JSON")
    assert "and 3 more; and 1 repeated row of" in line
    assert task.data_record()["skipped"] == list(report.skipped)
    assert task.data_record()["skipped_rows"] == 8


@pytest.mark.parametrize(("bad", "refused"), [(5, False), (6, True)])
def test_more_than_one_bad_row_in_twenty_is_refused(
    tmp_path: Path, bad: int, refused: bool
) -> None:
    rows = [row(n) for n in range(100 - bad)] + [{"question": "?"}] * bad
    data = write(tmp_path / "c.jsonl", rows)
    if not refused:
        assert len(load(data).reports[0].skipped) == bad
        return
    with pytest.raises(DataRefused, match=r"6 of 100 rows of .* more than 5%: line 95: no 'answ"):
        load(data)


def test_a_file_of_another_form_is_refused_with_its_fields(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"problem": str(n), "solution": "1"} for n in range(9)])
    with pytest.raises(
        UserError,
        match=r"9 of 9 .* no 'question' and 4 more \(fields found: problem, solution\)$",
    ):
        load(data)


def test_repeated_rows_do_not_count_as_bad(tmp_path: Path) -> None:
    task = load(write(tmp_path / "e.jsonl", [row(1)] * 9 + [row(2)]))
    assert len(task.reports[0].repeated) == 8
    assert len(task.train) == len(task.held_out) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", None, "no data file at"),
        ("x.csv", b"a,b", r"unknown suffix '.csv'; allowed: a file \(.jsonl"),
        ("x.jsonl", b"\n \n", "holds no row"),
        ("x.json", b"[1,", "is not valid JSON"),
        ("x.json", b"[]", "holds no row"),
        ("x.json", b'{"a":\n1}', "must hold a list of rows"),
        ("x.json", b"3", "must hold a list of rows"),
        ("x.parquet", b"PAR1 no", "is not valid Parquet"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / name))


def test_what_is_no_file_and_no_hub_name() -> None:
    for name in ("a b", "a/b/c", "a:b:c:d", ""):
        with pytest.raises(UserError, match="no data at"):
            read_rows(name)


def test_deep_nesting_and_odd_bytes_are_broken_rows(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(b"[" * 100_000 + b'\n{"a": "\xff"}\n{"a": 1}\n')
    source = read_rows(str(file))
    assert [r.values for r in source.rows] == [None, None, {"a": 1}]
    assert all("broken JSON" in r.reason for r in source.rows[:2])


@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_user_error(tmp_path_factory: Any, data: bytes) -> None:
    file = tmp_path_factory.mktemp("bytes") / "g.jsonl"
    file.write_bytes(data)
    text = data.removeprefix(b"\xef\xbb\xbf")
    lines = sum(1 for line in text.split(b"\n") if line.strip())
    if lines:
        assert len(read_rows(str(file)).rows) == lines
    else:
        with pytest.raises(UserError, match="holds no row"):
            read_rows(str(file))


def test_a_question_keeps_its_side_when_the_file_grows_or_turns(tmp_path: Path) -> None:
    small = load(write(tmp_path / "s.jsonl", [row(n) for n in range(300)]), eval_fraction=0.2)
    large = load(
        write(tmp_path / "l.jsonl", [row(n) for n in range(599, -1, -1)]), eval_fraction=0.2
    )
    held, trained = ({p.prompt for p in side} for side in (large.held_out, large.train))
    assert {p.prompt for p in small.held_out} <= held
    assert {p.prompt for p in small.train} <= trained
    assert not held & trained
    assert 80 < len(held) < 160
    assert large.held_out_problems(5) == large.held_out[:5]
    assert len(large.held_out_problems(10_000)) == len(held)


@given(st.sets(st.text(alphabet="abc", max_size=4), min_size=1), st.floats(0, 0.99))
def test_split_keeps_everything_and_leaves_no_side_empty(
    questions: set[str], fraction: float
) -> None:
    pairs = [(q, Problem(f"{q}{i}", "")) for q in sorted(questions) for i in range(2)]
    train, held = split(pairs, fraction)
    assert sorted(p.prompt for p in train + held) == sorted(p.prompt for _, p in pairs)
    assert train
    assert {p.prompt[:-1] for p in train}.isdisjoint(p.prompt[:-1] for p in held)
    assert bool(held) == (fraction > 0 and len(questions) > 1)
    if len(held) > 2 and len(train) > 2:
        assert all(is_held_out(p.prompt[:-1], fraction) for p in held)


def test_nothing_held_out_is_an_error_only_when_asked_for(tmp_path: Path) -> None:
    task = load(write(tmp_path / "n.jsonl", [row(n) for n in range(9)]), eval_fraction=0.0)
    assert len(task.train) == 9
    with pytest.raises(UserError, match="no problem is held out; raise eval_fraction"):
        task.held_out_problems(3)


def test_an_evaluation_file_takes_its_questions_out_of_training(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", [row(n) for n in range(40)])
    test = write(tmp_path / "v.jsonl", [row(n) for n in range(30, 60)])
    task = load(train, eval_data=test)
    assert (len(task.train), len(task.held_out), task.overlap) == (30, 30, 10)
    assert {p.prompt for p in task.train}.isdisjoint(p.prompt for p in task.held_out)
    assert task.report_lines() == ["hotpotqa: 10 training rows left out: eval_data asks the same"]
    assert task.data_record()["eval"]["file"] == test
    with pytest.raises(UserError, match="every question of .* is also in"):
        load(train, eval_data=train)


def test_draws_are_distinct_repeatable_and_go_round_a_short_file(tmp_path: Path) -> None:
    task = load(write(tmp_path / "r.jsonl", [row(n) for n in range(50)]), eval_fraction=0.0)

    def draw(n: int, seed: int) -> list[str]:
        return [p.source for p in task.problems(np.random.default_rng(seed), n)]

    assert draw(16, 1) == draw(16, 1) != draw(16, 2)
    assert len(set(draw(50, 3))) == 50
    counts = np.unique(draw(120, 4), return_counts=True)[1]
    assert set(counts.tolist()) == {2, 3}
    assert draw(0, 1) == []
    with pytest.raises(UserError, match="0 or more, got -1"):
        draw(-1, 0)


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    data = write(tmp_path / "h.jsonl", [row(n) for n in range(20)])
    first = get_task("hotpotqa", data)
    assert get_task("hotpotqa", data) is first
    assert get_task("hotpotqa-f1", data) is not first
    write(Path(data), [row(n) for n in range(21)])
    again = get_task("hotpotqa", data)
    assert again.data_record()["rows"] == 21
    assert again.data_record()["sha256"] != first.data_record()["sha256"]


def test_report_line_is_empty_when_everything_is_used() -> None:
    assert DataReport("t", "f", "0", 3).to_line() == ""


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("chain-sum", {"data": "x"}, "task chain-sum takes no data, got 'x'"),
        ("hotpotqa", {}, "task hotpotqa needs data: rows with question, answer, context"),
        ("own:reward", {}, "task own:reward needs data: rows with prompt"),
        ("two-hop", {"eval_data": "x"}, "takes no eval_data"),
        ("hotpotqa", {"data": "x", "eval_fraction": 1.0}, r"eval_fraction must be in \[0, 1\)"),
        ("reasoning-gym:NAME", {"data": "seed"}, "key=value"),
        ("FILE.py:FUNCTION", {"data": "x"}, "unknown task"),
        ("hotpot", {}, "unknown task 'hotpot'; allowed: chain-sum, two-hop, gsm8k, math, hotpotqa"),
    ],
)
def test_settings_that_do_not_fit_the_task(
    name: str, settings: dict[str, Any], message: str
) -> None:
    if name.startswith("reasoning-gym"):
        pytest.importorskip("reasoning_gym", reason="needs the extra [reasoning-gym]")
    with pytest.raises(UserError, match=message):
        get_task(name, **settings)


def test_embedded_held_out_problems_come_from_a_stream_of_their_own() -> None:
    for name in ("chain-sum", "two-hop"):
        task = get_task(name)
        held = task.held_out_problems(64)
        assert held == task.held_out_problems(64)
        assert held[:10] == task.held_out_problems(10)
        for step in range(1, 50):
            drawn = task.problems(np.random.default_rng([0, step, 1]), 64)
            assert drawn != held
        assert task.data_record() == {}


FOLDER = """
import sys
from wapo_analysis.train.tasks import get_task
folder = sys.argv[1]
task = get_task("hotpotqa", folder, eval_data=folder + "::test")
print(len(task.train), len(task.held_out), task.train[0].source)
print(task.data_record()["sha256"])
try:
    get_task("hotpotqa", folder + "::nope")
except ValueError as error:
    print(error)
"""


def test_a_folder_is_read_by_datasets_with_its_splits(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra [data]")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [row(n, context={"title": ["T"], "sentences": [[f"man {n}."]]}) for n in range(12)]
    write(folder / "train.jsonl", rows[:9])
    write(folder / "test.jsonl", rows[9:])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = [
        subprocess.run(
            [sys.executable, "-c", FOLDER, str(folder)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        for _ in range(2)
    ]
    assert done[0].returncode == 0, done[0].stderr
    counts, digest, error = done[0].stdout.splitlines()
    assert counts == "9 3 row 1"
    assert len(digest) == 64
    assert error.startswith(f"cannot load data set {folder}::nope: Unknown split")
    assert done[1].stdout == done[0].stdout, "the digest of the rows must not change"
