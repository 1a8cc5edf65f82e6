"""The writing thread: order, what it costs, which tokens still need a name."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.recorder_passes import record, spell, tokens
from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.record.writer import Vocabulary, WriterThread
from wapo_analysis.store import open_run


def test_a_step_says_what_writing_took_and_the_next_one_what_merging_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that ticks at every look: one tick to write, one to merge after the line."""
    ticks = iter(range(1000))
    clock = SimpleNamespace(thread_time=lambda: float(next(ticks)))
    monkeypatch.setattr("wapo_analysis.record.writer.time", clock)
    with Recorder(tmp_path / "r", {"name": "r"}, synchronous=True) as recorder:
        record(recorder, range(1, 4), passes=1)
    assert open_run(tmp_path / "r").steps["seconds_writer"].tolist() == [1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("named", "asked", "new"),
    [
        ([], [[]], [[]]), ([], [[3, 1, 3]], [[1, 3]]), ([3], [[3, 1, 3]], [[1]]),
        ([], [[-1, 0, -1]], [[0]]), ([], [[-1]], [[]]), ([0, 2], [[2, 1, 0, 5]], [[1, 5]]),
        ([], [[7, 7], [7, 8], [6, 8]], [[7], [8], [6]]), ([9], [[9], [10]], [[], [10]]),
    ],
)  # fmt: skip
def test_a_token_is_named_once(
    named: list[int], asked: list[list[int]], new: list[list[int]]
) -> None:
    vocabulary = Vocabulary(named)
    assert [vocabulary.new(np.array(ids, np.int64)) for ids in asked] == new


def test_jobs_run_in_order_in_one_thread_and_hold_their_rows_until_done() -> None:
    done: list[Any] = []
    go = threading.Event()
    thread = WriterThread(lambda error: done.append(error))
    assert (thread.held, thread._thread) == (0, None), "no job, no thread"
    thread.put(lambda: done.append(go.wait(10)), rows=3)
    for number in range(3):
        thread.put(lambda n=number: done.append((n, threading.current_thread().name)), rows=2)
    assert thread.held == 9
    go.set()
    thread.drain()
    assert done == [True, *((number, "wapo-writer") for number in range(3))]
    assert thread.held == 0
    thread.close()
    thread.close()
    thread.put(lambda: done.append("late"))
    assert len(done) == 4


def test_a_thread_of_another_process_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    thread = WriterThread(lambda error: None)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    thread.put(lambda: done.append(1), rows=5)
    thread.drain()
    thread.close()
    assert (done, thread.held) == ([], 0)


def test_where_no_thread_starts_the_caller_does_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        thread = WriterThread(lambda error: None)
        thread.put(lambda: done.append(1), rows=5)
    thread.put(lambda: done.append(2), rows=5)
    thread.drain()
    assert (done, thread.held) == ([1, 2], 0)


def test_tokens_without_a_row_need_no_name_and_a_late_step_is_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"}, token_every=2, synchronous=True, topk=0)
    record(recorder, [1, 2], passes=1)
    steps = recorder._steps
    recorder.close()
    assert set(open_run(tmp_path / "r").vocab) == set(tokens(10).token_id.tolist())
    job: Any = SimpleNamespace(step=3)
    with pytest.raises(UserError, match=r"step 3 came after close\(\), so it is not recorded"):
        steps.put(job, spell)


@pytest.mark.parametrize(
    ("rank", "step", "watched", "named"),
    [(0, 1, True, True), (0, 2, True, False), (1, 1, True, False), (0, 1, False, False)],
)
def test_settling_names_tokens_of_the_first_process_on_schedule(
    rank: int, step: int, watched: bool, named: bool, tmp_path: Path
) -> None:
    asked: list[int] = []

    def texts(ids: list[int]) -> list[str]:
        asked.extend(ids)
        return spell(ids)

    recorder = Recorder(tmp_path / "r", {"name": "r"}, token_every=2, rank=rank, synchronous=True)
    if watched:
        recorder.watch_pass(tokens(3))
    assert (recorder.settle(step, texts) is not None) is watched
    assert asked == (sorted(set(tokens(3).token_id.tolist())) if named else [])
    recorder.settle(step)
    recorder.close()
    assert recorder.failure is None


def test_a_step_without_rows_changes_no_share(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"}, queue_rows=100)
    steps = recorder._steps
    job: Any = SimpleNamespace(share=0.0, rows=20)
    for waiting, share in ((1000, 1.0), (0, 0.25)):
        steps._waiting, steps._share = waiting, share
        steps._choose(job)
        assert (steps._share, steps._thinned, job.share) == (share, 0, 0.0)
    steps._waiting = 0
    recorder.close()


def test_a_step_takes_the_time_since_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"}, synchronous=True)
    now = [107.0]
    monkeypatch.setattr("wapo_analysis.record.recorder.perf_counter", lambda: now[0])
    recorder._since, recorder._captured, recorder.seconds = 100.0, 3.0, 5.0
    assert recorder._times() == {"seconds": 7.0, "seconds_capture": 2.0}
    now[0], recorder.seconds = 110.0, 6.0
    assert recorder._times() == {"seconds": 3.0, "seconds_capture": 1.0}
    recorder.close()
