"""What an import holds until it writes: parts of a bounded size, records that have no step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run, sink
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import filled_records
from wapo_analysis.importers.sink import Sink, StepTotals
from wapo_analysis.schema import ROLLOUTS
from wapo_analysis.store import RunWriter, open_run


def fresh(folder: Path) -> Sink:
    writer = RunWriter(folder / "run", {"source": "import"})
    return Sink(writer, ImportReport("table", "t"), NameTable({}), 1.0)


def parts(folder: Path, table: str) -> list[int]:
    """Rows of each file of a table."""
    files = sorted((folder / "run" / table).iterdir())
    return sorted((pq.ParquetFile(file).metadata.num_rows for file in files), reverse=True)


# ---- parts


@pytest.mark.parametrize(("frames", "rows"), [([1] * 10, [4, 4, 2]), ([3, 3, 0, 1], [6, 1])])
def test_token_rows_of_a_step_are_written_as_soon_as_there_are_enough(
    frames: list[int], rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "CHUNK_ROWS", 4)
    held = fresh(tmp_path)
    for count in frames:
        held.add_tokens(pd.DataFrame({"step": [1] * count, "logp": -0.5, "advantage": 1.0}))
    held.finish()
    held.writer.close("finished")
    assert parts(tmp_path, "tokens") == rows
    assert open_run(tmp_path / "run").classes["tokens"].sum() == held.report.token_rows == sum(rows)


@pytest.mark.parametrize(("limit", "text"), [("CHUNK_ROWS", None), ("CHUNK_TEXT", "c")])
def test_rollouts_are_written_as_soon_as_there_are_enough_of_them_or_of_their_text(
    limit: str, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, limit, 4)
    held = fresh(tmp_path)
    for rollout in range(10):
        held.add_rollout({"step": 1, "rollout": rollout, "reward": 0.5, "completion": text})
    held.finish()
    held.writer.close("finished")
    assert parts(tmp_path, "rollouts") == [4, 4, 2]
    assert open_run(tmp_path / "run").rollouts["rollout"].tolist() == list(range(10))
    assert held.report.rollouts == 10


def test_rows_of_many_steps_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "CHUNK_ROWS", 4)
    held = fresh(tmp_path)
    for step in range(12):
        row = pd.DataFrame({"step": [step], "rollout": 0, "reward": 0.5})
        held.write_records(filled_records(ROLLOUTS, row, held.report), step)
    held.finish()
    held.writer.close("finished")
    assert parts(tmp_path, "rollouts") == [5, 5, 2]


def test_a_step_that_comes_again_and_again_keeps_all_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "CHUNK_ROWS", 3)
    rows = [{"step": step, "logp": -0.5, "advantage": 1.0, "position": n}
            for n in range(5) for step in (1, 2)]  # fmt: skip
    held = fresh(tmp_path)
    for row in rows:
        held.add_tokens(pd.DataFrame([row]))
    held.finish()
    held.writer.close("finished")
    found = open_run(tmp_path / "run").tokens(derived=False)
    assert sorted(zip(found["step"], found["position"], strict=True)) == [
        (step, n) for step in (1, 2) for n in range(5)
    ]


# ---- what tokens and rollouts say about a step


def test_a_statistic_that_some_tokens_lack_is_the_mean_of_the_others() -> None:
    totals = StepTotals()
    frame = pd.DataFrame({"advantage": [1.0, 1.0, -1.0], "entropy": [0.5, np.nan, 1.5]})
    totals.add_tokens(3, frame)
    totals.add_tokens(3, pd.DataFrame({"advantage": [1.0], "entropy": [np.nan]}))
    columns = totals.columns()[3]
    assert (columns["entropy"], columns["tokens"]) == (1.0, 4)
    assert "clip_low" not in columns
    assert totals.columns() == {3: columns}


@pytest.mark.parametrize("group", [None, [None] * 4, ["x"] * 4])
def test_rollouts_of_no_group_tell_no_share_of_groups(group: list[Any] | None) -> None:
    frame = pd.DataFrame({"step": 1, "reward": [1.0, 1.0, 0.0, 0.0]})
    totals = StepTotals()
    totals.add_rollouts(frame if group is None else frame.assign(group=group))
    columns = totals.columns()[1]
    assert (columns["reward"], columns["pass_rate"]) == (0.5, 0.5)
    assert "groups_all_right" not in columns
    grouped = StepTotals()
    grouped.add_rollouts(frame.assign(group=[0, 0, 1, 1]))
    assert grouped.columns()[1]["groups_all_right"] == 0.5


def test_rollouts_of_a_step_add_up_over_the_blocks_they_come_in(tmp_path: Path) -> None:
    frame = pd.DataFrame({"step": [2, 1, 2, 1], "reward": [1.0, 0.0, 0.0, 0.0], "group": 0,
                          "length": [4, 6, 8, 10],
                          "finish_reason": ["length", "stop", None, "length"]})  # fmt: skip
    totals = StepTotals()
    for part in (frame[:1], frame[1:]):
        totals.add_rollouts(part)
    totals.add_tokens(2, pd.DataFrame({"advantage": [1.0, 1.0], "entropy": 0.25}))
    found = totals.columns()
    assert sorted(found) == [1, 2]
    one, two = found[1], found[2]
    assert (one["reward"], one["length"], one["truncated"]) == (0.0, 8.0, 0.5)
    assert (two["reward"], two["length"], two["truncated"]) == (0.5, 6.0, 1.0)
    assert "tokens" not in one, "completions do not count them"
    assert (two["tokens"], two["entropy"]) == (2, 0.25)


def test_what_the_log_says_of_a_step_goes_before_what_its_rows_add_up_to(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "prompt": "p", "completion": c, "reward": r} for c, r in (("a", 1.0), ("b", 0))
    ]
    rows += [{"step": 1, "reward": 0.75}, {"step": 2, "reward": None, "entropy": "x"}]
    steps, report = read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert steps["reward"].tolist()[0] == 0.75
    assert steps["pass_rate"].tolist()[0] == 0.5
    assert report.steps == 1


# ---- records without a step


def stepless(folder: Path, count: int, **more: list[int]) -> tuple[pd.DataFrame, ImportReport]:
    rows = [{"reward": n / 8} | {name: values[n] for name, values in more.items()}
            for n in range(count)]  # fmt: skip
    return read(write_lines(folder / "t.jsonl", rows), folder / "out")


@pytest.mark.parametrize(("count", "kept"), [(4, 4), (6, 4)])
def test_of_more_records_without_a_step_than_are_held_the_first_are_read_and_told(
    count: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "MAX_STEPLESS", 4)
    steps, report = stepless(tmp_path, count)
    assert steps["reward"].to_dict() == {n + 1: n / 8 for n in range(kept)}
    said = [f"of {count} records without a step the first 4 are read"] if kept < count else []
    counted = f"no record has a step, so the {count} records are counted from 1"
    assert report.events == [*said, counted]
    assert not report.broken_lines


def test_epochs_count_records_that_have_no_step(tmp_path: Path) -> None:
    steps, report = stepless(tmp_path, 3, epoch=[3, 5, 7], seen=[1, 2, 3])
    assert steps["reward"].to_dict() == {3: 0, 5: 0.125, 7: 0.25}
    assert report.events == ["no record has a step: epoch is read as the step"]


def test_a_number_that_may_count_the_steps_is_not_taken_unasked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--map step=my_count takes my_count \(3, 5, 7, "):
        stepless(tmp_path, 3, my_count=[3, 5, 7])


def test_records_without_a_step_and_without_a_known_number_are_no_log(tmp_path: Path) -> None:
    rows = [{"epoch": n, "speed": 5} for n in range(4)]
    with pytest.raises(UserError, match="--map step=epoch takes epoch"):
        read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    with pytest.raises(UserError, match=r"its 4 records have no step \(numbers: speed\)"):
        read(write_lines(tmp_path / "u.jsonl", [{"speed": 5}] * 4), tmp_path / "out")
    with pytest.raises(UserError, match="its 2 records have no step and no number"):
        read(write_lines(tmp_path / "u.jsonl", [{"a": "x"}] * 2), tmp_path / "out")


def test_one_record_without_a_step_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its record has no step"):
        stepless(tmp_path, 1)
    steps, report = read(
        write_lines(tmp_path / "t.jsonl", [{"reward": 1}, {"step": 4, "reward": 0.5}]),
        tmp_path / "out",
    )
    assert steps["reward"].to_dict() == {4: 0.5}
    assert report.broken == ["t.jsonl:1: no step"]


# ---- which step


def test_beside_records_that_count_steps_w_and_b_s_own_counts_calls(tmp_path: Path) -> None:
    rows = [{"_step": 0, "speed": 1}, {"_step": 1, "global_step": 10, "reward": 0.5},
            {"_step": 2, "entropy": 0.25}, {"_step": 3, "global_step": 20, "reward": 1.0},
            {"_step": 4, "entropy": 0.125}, {"_step": 5, "kl": 0.5}]  # fmt: skip
    steps, _ = read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert steps["entropy"].dropna().to_dict() == {10: 0.25, 20: 0.125}
    assert steps["table/speed"].dropna().to_dict() == {0: 1}


def test_steps_of_w_and_b_alone_are_the_steps(tmp_path: Path) -> None:
    rows = [{"_step": n, "reward": n / 8} for n in (0, 3, 5)]
    steps, _ = read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert steps["reward"].to_dict() == {0: 0, 3: 0.375, 5: 0.625}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (([1, 2, 3, 4], [3, 4, 5, 6]), "steps 3 to 4 were logged again after a resume"),
        (([2, 3, 4, 1], [3, 4, 5, 6]), "steps 3 to 4 were logged again after a resume"),
        (([1, 2, 3, 4], [1, 2, 3]), None),
    ],
)
def test_files_of_a_folder_are_told_apart_by_their_first_and_last_steps(
    files: tuple[list[int], ...], told: str | None, tmp_path: Path
) -> None:
    for name, steps in zip("ab", files, strict=True):
        rows = [{"step": step, "reward": step / 8 + (name == "b")} for step in steps]
        write_lines(tmp_path / "logs" / f"{name}.jsonl", rows)
    if told is None:
        with pytest.raises(UserError, match="2 files of .* hold different numbers"):
            read(tmp_path / "logs", tmp_path / "out")
        return
    _, report = read(tmp_path / "logs", tmp_path / "out")
    assert told in report.events[0]


def test_a_column_without_any_number_feeds_no_figure(tmp_path: Path) -> None:
    entropy = {3: 0.5}
    rows = [{"step": n, "reward": n / 8, "entropy": entropy.get(n, np.nan), "grad_norm": "nan"}
            for n in range(1, 6)]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = import_run(tmp_path / "t.jsonl", tmp_path / "out")
    assert "no 'grad_norm' in its steps table" in " ".join(report.cannot_feed.values())
    assert "'entropy' in its steps table" not in " ".join(report.cannot_feed.values())
