"""What several records of one step mean: a run that went on, two runs, ranks that take turns."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.repeats import Repeats
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.steplog import StepLog

LOG = Path("logs/train.jsonl")


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
    found = Repeats.of(np.array([*steps, 99, 99]), np.arange(len(steps) + 2.0))
    assert found is not None
    assert (found.jumps, found.alternates) == (jumps, alternates)


def of_files(*files: list[int], names: str = "abcdefghi") -> tuple[list[str], dict[int, float]]:
    """What is said of several files with a record a step, each reward another, and the rewards."""
    log, count = StepLog(ImportReport("table", "logs")), 0
    for name, steps in zip(names, files, strict=False):
        file = Path(f"logs/{name}.jsonl")
        for step in steps:
            log.add({"reward": count}, step, "table", (file, step))
            count += 1
        log.end_of_file(file, min(steps), max(steps))
    rows = log.finish(NameTable({}))
    return log.report.events, {step: row["reward"] for step, row in rows.items()}


def test_of_files_that_meet_at_one_step_it_is_logged_twice() -> None:
    events, rewards = of_files([1, 2, 3, 4], [4, 5, 6])
    assert rewards == {1: 0, 2: 1, 3: 2, 4: 3.5, 5: 5, 6: 6}
    assert events == ["steps 4 have several records each (ranks or micro-batches): averaged"]


def test_files_that_share_two_steps_are_of_a_run_that_went_on_unless_both_begin_alike() -> None:
    events, rewards = of_files([1, 2, 3, 4], [3, 4, 5])
    assert rewards == {1: 0, 2: 1, 3: 4, 4: 5, 5: 6}
    assert events == ["steps 3 to 4 were logged again after a resume: the later run is read"]
    with pytest.raises(UserError, match="2 files of logs hold different numbers for the same"):
        of_files([3, 4, 5], [3, 4])


LATER = "logged again .* the later run is read"
AVERAGED = "have several records each"


@pytest.mark.parametrize(
    ("files", "told", "step", "reward"),
    [
        pytest.param([[1, 2, 1, 2], [3, 4, 3, 4]], AVERAGED, 1, 1, id="two files take turns"),
        pytest.param([[1, 2, 1, 2], [3, 4, 3, 4], [5]], LATER, 1, 2, id="three, two returns"),
        pytest.param([[1, 2, 3, 4], [3, 4, 5], [3]], LATER, 3, 7, id="a file of one step"),
        pytest.param([[6, 7, 8], [1, 2, 3, 4], [3, 4, 5]], LATER, 3, 7, id="the last part first"),
    ],
)
def test_a_log_that_goes_back_less_often_than_there_are_files_went_on(
    files: list[list[int]], told: str, step: int, reward: float
) -> None:
    events, rewards = of_files(*files)
    assert re.search(told, events[0])
    assert rewards[step] == reward


def test_of_many_runs_in_a_folder_eight_are_named() -> None:
    names = ", ".join(f"{name}.jsonl" for name in "abcdefgh")
    with pytest.raises(UserError, match=f"8 runs; name one of them: {names}$"):
        of_files(*[[1, 2, 3]] * 8)
    with pytest.raises(UserError, match=f"9 runs; name one of them: {names} and 1 more$"):
        of_files(*[[1, 2, 3]] * 9)
    with pytest.raises(UserError, match=r"3 runs; name one of them: a\.jsonl, b\.jsonl, c\.jsonl"):
        of_files([1, 2, 3, 4], [1, 2, 3, 4], [3, 4, 5, 6])


@pytest.mark.parametrize(
    ("ranks", "names", "told"),
    [
        ((None, None), "a", "by a later start"),
        ((0, 0), "a", "by a later start"),
        ((0, 1), "a", AVERAGED),
        ((None, None), ("log", "rank1"), AVERAGED),
        ((None, None), ("worker_0", "log"), AVERAGED),
    ],
)
def test_records_of_ranks_are_no_later_start(
    ranks: tuple[int | None, int | None], names: Any, told: str
) -> None:
    log = StepLog(ImportReport("table", "logs"))
    for n, rank in enumerate(ranks):
        file = Path(f"logs/{names[min(n, len(names) - 1)]}.jsonl")
        for step in range(1, 5):
            more = {} if rank is None else {"rank": rank}
            log.add({"reward": n + step, **more}, step, "table", (file, step))
        if len(names) > 1 or n == 1:
            log.end_of_file(file, 1 + n * (len(names) > 1), 4)
    log.finish(NameTable({}))
    assert told in log.report.events[0]


def repeated(**columns: list[tuple[int, float]]) -> tuple[list[str], dict[int, dict[str, Any]]]:
    """One file with some numbers, each as its steps and values."""
    log = StepLog(ImportReport("table", "logs"))
    for name, pairs in columns.items():
        for step, value in pairs:
            log.number(name, step, value, "table")
    log.end_of_file(LOG, 1, 8)
    return log.report.events, log.finish(NameTable({}))


ON = [*range(1, 7), *range(4, 9)]
"""Steps of a run that went on from step 3."""


def test_the_name_that_comes_again_most_tells_a_resume_and_the_first_step_a_later_start() -> None:
    resumed = [(step, n) for n, step in enumerate(ON)]
    events, rows = repeated(reward=resumed, speed=[(2, 1), (2, 3)])
    assert events == ["steps 2, 4 to 6 were logged again after a resume: the later run is read"]
    assert rows[4]["reward"] == 6
    again = [(step, n) for n, step in enumerate([1, 2, 3, 4, 1, 2, 3, 4])]
    events, _ = repeated(speed=[(3, 8), (4, 8), (3, 9), (4, 9)], reward=again)
    assert events == ["steps 1 to 4 were logged again by a later start: the later run is read"]


def test_a_number_that_is_not_finite_differs_from_one_that_is() -> None:
    nan = float("nan")
    for values, differing in (([0, nan, nan], []), ([0, nan, 1], [2]), ([0, 1, nan], [2])):
        found = Repeats.of(np.array([1, 2, 2]), np.array(values))
        assert found is not None
        assert found.differing.tolist() == differing
    found = Repeats.of(np.array([1, 2, 3, 1]), np.arange(4.0))
    assert found is not None
    assert (found.jumps, found.back.tolist()) == (1, [1])


def test_equal_numbers_stay_to_the_last_digit_and_of_an_epoch_the_last_is_kept() -> None:
    events, rows = repeated(reward=[(1, 0.1)] * 3, speed=[(1, 1), (1, 2), (1, 3)])
    assert rows[1] == {"reward": 0.1, "table/speed": 2}
    assert AVERAGED in events[0]
    events, rows = repeated(reward=[(1, 0.1)] * 2, epoch=[(1, 0.25), (1, 0.5)])
    assert rows[1] == {"reward": 0.1, "table/epoch": 0.5}
    assert events == []


def test_three_updates_of_the_one_batch_there_is_are_at_its_step() -> None:
    log = StepLog(ImportReport("table", "logs"))
    for n in range(3):
        log.add({"train/loss": 10 - n}, n, "table", (LOG, n), step_key="train/step")
    alone = log.finish(NameTable({}))
    assert {step: row["loss"] for step, row in alone.items()} == {0: 10, 1: 9, 2: 8}
    log.add({"rollout/raw_reward": 0.5}, 0, "table", (LOG, 3), step_key="rollout/step")
    rows = log.finish(NameTable({}))
    assert {step: row["loss"] for step, row in rows.items()} == {0: 9}
    assert "train/step counts updates, 3 a batch: they are at the step of their batch" in (
        log.report.events
    )


def test_the_last_update_and_the_last_batch_of_any_name_tell_how_many_there_are() -> None:
    log = StepLog(ImportReport("table", "logs"))
    for name, last in (("rollout/a", 2), ("rollout/b", 4), ("rollout/c", 1)):
        log.add({name: 0.5}, last - 1, "table", (LOG, 1), step_key="rollout/step")
    for name, last in (("train/x", 4), ("train/loss", 8), ("train/y", 2)):
        for n in range(last):
            log.add({name: n}, n, "table", (LOG, n), step_key="train/step")
    rows = log.finish(NameTable({}))
    assert {step: row["loss"] for step, row in rows.items()} == {0: 0.5, 1: 2.5, 2: 4.5, 3: 6.5}
    assert any("counts updates, 2 a batch" in text for text in log.report.events)


def test_each_step_is_compared_with_itself() -> None:
    nan = float("nan")
    steps = np.array([1, 1, 2, 2, 3, 3])
    found = Repeats.of(steps, np.array([0.1, 0.1, 0.2, 0.2, nan, nan]))
    assert found is not None
    assert found.differing.tolist() == []
    found = Repeats.of(steps, np.array([0.1, 0.1, 0.2, 0.1, nan, 0.1]))
    assert found is not None
    assert found.differing.tolist() == [2, 3]
