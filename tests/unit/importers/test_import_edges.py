"""Both sides of what an import decides by a number: sources just below, at and above it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.import_sources import write_lines, write_prime_monitor, write_trl, write_verl
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.shapes import json_rows
from wapo_analysis.importers.steplog import StepLog, _Repeats
from wapo_analysis.store import open_run

LOG = Path("logs/train.jsonl")


# ---- several records of one step


@pytest.mark.parametrize(
    ("steps", "jumps", "alternates"),
    [
        ([1, 2, 1, 2], 1, False),
        ([1, 2, 1, 2, 3, 4, 3, 4], 2, True),
        ([1, 2, 1, 2, 3, 4, 3, 4, 5, 6], 2, True),
        ([1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 7], 2, False),
        ([1, 2, 3, 1, 2, 3, 4, 5, 4, 5], 2, True),
        ([1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6], 2, False),
        ([3, 2, 1], 0, False),
    ],
)
def test_ranks_take_turns_where_two_steps_a_time_and_most_of_all_come_again(
    steps: list[int], jumps: int, alternates: bool
) -> None:
    found = _Repeats.of(np.array([*steps, 99, 99]), np.arange(len(steps) + 2.0))
    assert found is not None
    assert (found.jumps, found.alternates) == (jumps, alternates)


def of_files(*files: list[int], **more: Any) -> tuple[StepLog, dict[int, dict[str, Any]]]:
    """The log of several files with a record a step, each number another."""
    log, count = StepLog(ImportReport("table", "logs")), 0
    for n, steps in enumerate(files):
        for step in steps:
            log.add({"reward": count, **more}, step, "table", (Path(f"logs/{n}.jsonl"), step))
            count += 1
        log.end_of_file(Path(f"logs/{n}.jsonl"), min(steps), max(steps))
    return log, log.finish(NameTable({}))


def test_of_files_that_meet_at_one_step_it_is_logged_twice() -> None:
    log, rows = of_files([1, 2, 3, 4], [4, 5, 6])
    assert {step: row["reward"] for step, row in rows.items()} == {
        1: 0,
        2: 1,
        3: 2,
        4: 3.5,
        5: 5,
        6: 6,
    }
    assert log.report.events == [
        "steps 4 have several records each (ranks or micro-batches): averaged"
    ]


def test_files_that_share_two_steps_are_of_a_run_that_went_on_unless_both_begin_alike() -> None:
    log, rows = of_files([1, 2, 3, 4], [3, 4, 5])
    rewards = {step: row["reward"] for step, row in rows.items()}
    assert rewards == {1: 0, 2: 1, 3: 4, 4: 5, 5: 6}
    assert log.report.events == [
        "steps 3 to 4 were logged again after a resume: the later run is read"
    ]
    with pytest.raises(UserError, match="2 files of logs hold different numbers for the same"):
        of_files([3, 4, 5], [3, 4])


# ---- what is said


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"a": 1}], r"its record has no step \(numbers: a\)"),
        ([{"a": 1}, {"b": 2}], r"its 2 records have no step \(numbers: a, b\)"),
        ([{"a": "x"}, {"b": "y"}], "its 2 records have no step and no number"),
    ],
)
def test_records_without_a_step_are_counted_and_their_numbers_named(
    rows: list[dict[str, Any]], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")


@pytest.mark.parametrize(
    ("each", "told"), [(3, "holds 2 runs, a row or two of each"), (4, r"holds 2 runs; choose one")]
)
def test_a_table_of_a_few_rows_a_run_and_no_step_is_a_summary(
    each: int, told: str, tmp_path: Path
) -> None:
    rows = [{"run": name, "reward": 0.1 * n} for name in ("first", "second") for n in range(each)]
    with pytest.raises(UserError, match=told):
        read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")


def test_two_tools_in_one_folder_are_named_by_the_first_file_of_each(tmp_path: Path) -> None:
    write_trl(tmp_path / "logs" / "a")
    write_verl(tmp_path / "logs" / "b")
    told = r"mixes formats: trainer_state\.json is trl, 1\.jsonl is verl; name one of the two"
    with pytest.raises(UserError, match=told):
        read(tmp_path / "logs", tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "alarm"), [((), False), (("rejected",), True), (("rejected", "margins"), True)]
)
def test_rewards_of_chosen_and_rejected_answers_are_of_no_policy(
    more: tuple[str, ...], alarm: bool, tmp_path: Path
) -> None:
    names = [f"rewards/{name}" for name in ("chosen", *more)]
    rows = [{"step": step, "loss": 0.5, **dict.fromkeys(names, 0.1 * step)} for step in range(1, 9)]
    _, report = read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert any("preference objective" in text for text in report.alarms) is alarm


# ---- records in other shapes


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ({"1": {"a": 2}, "2": {"a": 3}}, [{"step": 1, "a": 2}, {"step": 2, "a": 3}]),
        ({"1": {"a": 2}, "2": 3}, None),
        ({"1": {"a": 2}, "x": {"a": 3}}, None),
    ],
)
def test_records_by_number_are_all_of_them(
    value: dict[str, Any], rows: list[dict[str, Any]] | None
) -> None:
    assert json_rows(value) == (rows or [value])


def test_a_completion_of_prime_rl_is_as_long_as_what_was_sampled(tmp_path: Path) -> None:
    write_prime_monitor(tmp_path / "runs", steps=2)
    read(tmp_path / "runs", tmp_path / "out")
    assert open_run(tmp_path / "out").rollouts["length"].tolist() == [5] * 8
