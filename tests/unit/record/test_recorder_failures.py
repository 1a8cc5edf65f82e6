"""The recorder where the disk is slow, full or gone, and processes end in every way."""

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.recorder_passes import ROWS, record, stuck, tokens
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.record.tokens import TokenPass
from wapo_analysis.record.writer import WriterThread
from wapo_analysis.store import open_run

ROOT = Path(__file__).parents[3]

# ---- a disk that is slow, full, or gone ---------------------------------------------------------


def test_a_disk_that_keeps_up_thins_nothing_and_nothing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    record(recorder, range(1, 4))
    recorder.close("finished")
    assert not caplog.records
    assert set(open_run(tmp_path / "r").steps["token_fraction"]) == {1.0}


def test_a_slow_disk_thins_rows_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"}, queue_rows=5 * ROWS)
    with stuck(recorder):
        started = time.perf_counter()
        record(recorder, range(1, 21), passes=1)
        assert time.perf_counter() - started < 10, "training does not wait"
        assert recorder._steps._waiting <= 6 * ROWS  # the queue, and what one step's halves sum to
        assert recorder._steps._thread.held <= 4 * 5 * ROWS
    record(recorder, range(21, 22), passes=1)
    recorder.close("finished")
    assert recorder.failure is None
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == list(range(1, 22))
    assert run.classes.groupby("step").tokens.sum().tolist() == [ROWS] * 21
    assert len(run.rollouts) == 42
    share = run.steps.token_fraction
    assert (share[:5] == 1).all()
    falling = [*0.5 ** np.arange(1, 7)]
    assert share[5:11].tolist() == falling
    assert set(np.log2(share[share > 0])) <= set(range(-6, 1))
    rows = run.tokens().groupby("step").size().reindex(run.steps.step, fill_value=0)
    assert (rows[:5] == ROWS).all()
    assert rows.sum() < 10 * ROWS
    assert (rows.to_numpy() <= np.where(share > 0, ROWS, 0)).all()
    exact = Recorder(tmp_path / "exact", {"name": "r"}, synchronous=True)
    record(exact, range(1, 22), passes=1)
    exact.close("finished")
    assert open_run(tmp_path / "exact").classes.equals(run.classes)
    assert run.manifest["thinned_steps"] == int((share < 1).sum())
    assert sum("sampled down" in r.message for r in caplog.records) == 1


def test_shares_fall_and_rise_by_halves_and_the_training_thread_goes_on(tmp_path: Path) -> None:
    many, per_rollout = 1 << 15, 64
    at = torch.arange(many)
    given = {"group": at // 1024, "rollout": at // per_rollout, "position": at % per_rollout}
    measured = {n: torch.full((many,), -0.1) for n in ("advantage", "logp", "entropy", "coef")}
    recorder = Recorder(tmp_path / "r", {"name": "r"}, queue_rows=2 * many)

    def finish(step: int) -> float:
        recorder.watch_pass(TokenPass(token_id=at % 7, **given, **measured))
        started = time.thread_time()
        recorder.finish_step(step)
        return time.thread_time() - started

    with stuck(recorder):
        spent = [finish(step) for step in range(1, 8)]
    assert sorted(spent)[-2] < 0.01, "once a thread may be started"
    for step in range(8, 14):
        recorder.flush()
        finish(step)
    recorder.close("finished")
    run = open_run(tmp_path / "r")
    shares = [1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1]
    assert run.steps["token_fraction"].tolist() == shares
    assert (run.classes.groupby("step")["tokens"].sum() == many).all()
    written = run.tokens(derived=False).groupby("step").size() / many
    np.testing.assert_allclose(written, shares, atol=0.06)


@pytest.mark.parametrize(
    ("waiting", "share", "next_share"),
    [
        (0, 1 / 4, 1 / 2), (45, 1 / 4, 1 / 2), (46, 1 / 4, 1 / 4), (0, 1.0, 1.0),
        (95, 1 / 2, 1 / 2), (96, 1 / 2, 1 / 4), (90, 1.0, 1.0), (91, 1.0, 1 / 2),
        (100, 1 / 64, 0.0), (0, 0.0, 1 / 64), (50, 0.0, 1 / 64), (51, 0.0, 0.0),
    ],
)  # fmt: skip
def test_the_share_follows_the_rows_that_wait(
    tmp_path: Path, waiting: int, share: float, next_share: float
) -> None:
    """Of a queue of 100 rows: halved where 10 more would not fit, doubled below half of it."""
    recorder = Recorder(tmp_path / "r", {"name": "r"}, queue_rows=100)
    steps = recorder._steps
    steps._waiting, steps._share = waiting, share
    job = SimpleNamespace(share=0.5, rows=20)
    steps._choose(job)  # type: ignore[arg-type]
    assert steps._share == next_share
    assert job.share == 0.5 * next_share
    assert steps._thinned == (next_share < 1)
    recorder.close()


@pytest.mark.parametrize(("queue", "own"), [(ROWS, [5, 6]), (ROWS // 5, [2, 3, 4, 5, 6])])
def test_a_caller_sums_a_step_up_itself_only_where_four_queues_of_rows_wait(
    tmp_path: Path, queue: int, own: list[int]
) -> None:
    recorder, here = Recorder(tmp_path / "r", {"name": "r"}, queue_rows=queue), []
    steps = recorder._steps
    condense = steps._condense

    def seen(job: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            here.append(job.step)
        condense(job)

    steps._condense = seen  # type: ignore[method-assign]
    with stuck(recorder):
        record(recorder, range(1, 7), passes=1)
    recorder.close("finished")
    assert here == own
    assert open_run(tmp_path / "r").classes.groupby("step").tokens.sum().tolist() == [ROWS] * 6


def test_a_step_larger_than_the_queue_is_written_whole_if_nothing_waits(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"}, queue_rows=10)
    for step in (1, 2):
        record(recorder, range(step, step + 1))
        recorder.flush()
    recorder.close("finished")
    assert len(open_run(tmp_path / "r").tokens()) == 2 * 2 * ROWS


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_full_disk_ends_the_recording_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    written = iter(range(after))

    def fsync(_: int) -> None:
        if next(written, None) is None:
            raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr("wapo_analysis.store.files.os.fsync", fsync)
        record(recorder, range(1, 6))
        recorder.close("finished")
    assert recorder.failure == "OSError: [Errno 28] No space left on device"
    assert [r.message for r in caplog.records] == [
        f"recording to {tmp_path / 'r'} stopped ({recorder.failure}); training goes on"
    ]
    run = open_run(tmp_path / "r")
    assert len(run.steps) < 5
    assert set(run.steps.step) <= set(run.classes.step)
    recorder.watch_pass(tokens(1))
    recorder.close("finished")
    assert not [p for p in (tmp_path / "r").rglob(".*") if p.is_file()], "no half files"


def test_a_failure_in_the_training_thread_drops_what_waits(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    with stuck(recorder):
        record(recorder, range(1, 4))
        recorder.finish_step(4, rollouts={"reward": [1.0], "no such": [1]})
        assert recorder.failure is not None
        assert "no such" in recorder.failure
    recorder.close("finished")
    assert open_run(tmp_path / "r").manifest["status"] == "recording_failed"


def watched(path: Path, finish: dict[str, Any], **watch: Any) -> Recorder:
    """A recorder of one small step, closed."""
    recorder = Recorder(path, {"name": "r"}, synchronous=True)
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    ids, logp = torch.ones(2, 3).long(), logits.log_softmax(-1)[..., 1]
    given = {"groups": torch.tensor([0, 0]), "logits": logits, **watch}
    recorder.watch(logp, ids, torch.ones(2, 3), torch.tensor([1.0, -1.0]), **given)
    logp.sum().backward()
    recorder.finish_step(**{"step": 1, "reward": [1.0, 0.0], **finish})
    recorder.close()
    return recorder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr": "fast"}, "step column 'lr' must be a number, got 'fast'"),
        ({"lr": [1.0, 2.0]}, "step column 'lr' must be a number"),
        ({"step": -1}, "a step must be 0 to 2147483647, got -1"),
        ({"step": 2**40}, "a step must be 0 to 2147483647"),
    ],
)
def test_what_would_make_the_run_unreadable_is_refused(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    recorder = watched(tmp_path / "r", given)
    assert said in str(recorder.failure)
    assert open_run(tmp_path / "r").manifest["status"] == "recording_failed"


def test_groups_that_no_column_can_hold_are_refused_and_never_merged(tmp_path: Path) -> None:
    recorder = watched(tmp_path / "r", {}, groups=torch.tensor([0, 2**32]))
    assert "groups must be numbers below 2^31, got [0, 4294967296]" in str(recorder.failure)


def test_texts_with_half_a_character_and_kept_flags_as_numbers_are_recorded(tmp_path: Path) -> None:
    half = "a\ud83d"
    given = {
        "prompts": [half] * 2,
        "completions": ["b", half],
        "texts": lambda ids: [half] * len(ids),
    }
    recorder = watched(tmp_path / "r", given, kept=torch.tensor([[1.0, 0, 1], [1, 1, 1]]))
    assert recorder.failure is None
    run = open_run(tmp_path / "r")
    assert run.rollouts["completion"].tolist() == ["b", "a\\ud83d"]
    assert run.vocab[1] == "a\\ud83d"
    assert run.tokens()["kept"].tolist() == [True, False, True, True, True, True]


def test_a_step_after_the_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = watched(tmp_path / "r", {})
    recorder.finish_step(2)
    recorder.finish_step(3)
    assert caplog.text.count("step 2 came after close(), so it is not recorded") == 1
    assert "step 3" not in caplog.text
    run = open_run(tmp_path / "r")
    assert (run.steps["step"].tolist(), run.manifest["status"]) == ([1], "finished")


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    recorder.fail(RuntimeError("\nno kernel\nregistered at ..."))
    recorder.close()
    assert recorder.failure == "RuntimeError: no kernel"


@pytest.mark.parametrize(
    ("fails", "said"), [(lambda: [][0], "list index out of range"), (lambda: sys.exit(3), "3")]
)
def test_jobs_end_with_the_first_error(fails: Any, said: str) -> None:
    done: list[Any] = []
    thread = WriterThread(lambda error: done.append(str(error)))
    go = threading.Event()
    thread.put(lambda: done.append(go.wait(10)))
    thread.put(fails, rows=5)
    thread.put(lambda: done.append("never"), rows=7)
    assert thread.held == 12
    go.set()
    thread.drain()
    thread.put(lambda: done.append("never"))
    thread.close()
    assert done == [True, said]
    assert thread.held == 0


# ---- processes that end in every way ------------------------------------------------------------

CHILD = """
import os, signal, sys, time, random
from pathlib import Path
from tests.support.recorder_passes import record
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.record.tokens import TokenPass
from wapo_analysis.store import writer
import itertools

out, mode = Path(sys.argv[1]), sys.argv[2]
writer.MERGE_STEPS = 3
if mode == "kill":
    random.seed(3)
    for number in range(6):
        child = os.fork()
        if child == 0:
            record(Recorder(out / str(number), {"name": "r"}), itertools.count(1), passes=1)
        log, wanted = out / str(number) / "steps.jsonl", random.randint(1, 7)
        while not log.exists() or log.read_bytes().count(b"\\n") < wanted:
            time.sleep(0.001)
        time.sleep(0.03 * random.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
else:
    recorder = Recorder(out / "forgotten", {"name": "r"})
    record(recorder, range(1, 30), passes=1)
    recorder = Recorder(out / "forked", {"name": "r"})
    record(recorder, range(1, 4), passes=1)
    child = os.fork()
    if child == 0:
        record(recorder, range(50, 53), passes=1)
        recorder.flush()
        recorder.close("failed")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert '"running"' in (out / "forked" / "manifest.json").read_text()
    record(recorder, range(4, 6), passes=1)
    recorder.close("finished")
"""


def in_a_process(out: Path, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(out), mode],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'taxonomy'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.slow
def test_a_killed_run_opens_and_is_resumed(tmp_path: Path) -> None:
    in_a_process(tmp_path, "kill")
    merged = 0
    for path in sorted(tmp_path.iterdir()):
        run = open_run(path)
        steps = run.steps.step.tolist()
        assert steps == list(range(1, len(steps) + 1))
        # A step in the log has all its parts; at most one more has begun.
        for found in (
            run.tokens().groupby("step").size(),
            run.classes.groupby("step").tokens.sum(),
        ):
            assert set(found.index) - set(steps) <= {len(steps) + 1}
            assert (found.loc[steps] == ROWS).all()
        assert set(steps) <= set(run.rollouts.step)
        merged += len(list((path / "tokens").glob("merged-*")))
        last = len(steps) // 2
        recorder = Recorder(path, run.manifest, resume_after=last)
        record(recorder, range(last + 1, last + 3), passes=1)
        recorder.close("finished")
        again = open_run(path)
        assert again.steps.step.tolist() == list(range(1, last + 3))
        assert again.tokens().groupby("step").size().tolist() == [ROWS] * (last + 2)
    assert merged > 0, "some were killed after a merge"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process left: a run it never closed, and one it forked in the middle of."""
    out = tmp_path_factory.mktemp("ended")
    in_a_process(out, "forget, fork")
    return out


def test_a_process_that_forgets_to_close_has_written_every_finished_step(ended: Path) -> None:
    run = open_run(ended / "forgotten")
    assert run.steps.step.tolist() == list(range(1, 30))
    assert len(run.tokens()) == 29 * ROWS
    assert run.manifest["status"] == "running"


def test_a_forked_child_writes_nothing_and_does_not_hang(ended: Path) -> None:
    run = open_run(ended / "forked")
    assert run.steps.step.tolist() == [1, 2, 3, 4, 5]
    assert run.manifest["status"] == "finished"


@pytest.mark.parametrize(("away", "refused"), [(0.09, False), (0.11, True)])
def test_logits_may_be_as_far_from_the_loss_as_half_precision_is(
    away: float, refused: bool, tmp_path: Path
) -> None:
    ids, mask = torch.tensor([[1, 2, 0]]), torch.ones(1, 3)
    logits = torch.linspace(-1, 1, 12).view(1, 3, 4)
    logp = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    with Recorder(tmp_path / "r") as recorder:
        told = (logp + away).requires_grad_()
        recorder.watch(told, ids, mask, torch.ones(1), None, logits=logits)
        assert ("logits and logp disagree by 0.11" in (recorder.failure or "")) is refused
