"""The recorder beside training: packing, order, back-pressure, failures, killed processes."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wapo_analysis.capture import recorder as module
from wapo_analysis.capture.queue import WriterThread
from wapo_analysis.capture.recorder import Recorder, TokenPass
from wapo_analysis.capture.token_pass import DevicePass, HostPass
from wapo_analysis.store import Run, open_run

ROOT = Path(__file__).parents[2]
ROWS = 60
ROLLOUTS = {"group": [0, 0], "rollout": [0, 1], "reward": [1.0, 0.0], "completion": ["a", "b"]}


def tokens(seed: int, rows: int = ROWS, minibatch: int = 0) -> TokenPass:
    """A pass of random statistics; its own generator, so no global state is used."""
    g = torch.Generator().manual_seed(seed)
    prob = torch.rand(rows, generator=g) * 0.98 + 0.01
    rest = (1 - prob) ** 2 * torch.rand(rows, generator=g)
    rollout = torch.arange(rows) % 20
    return TokenPass(
        group=rollout // 4,
        rollout=rollout,
        position=torch.arange(rows) // 20,
        token_id=torch.randint(500, (rows,), generator=g),
        advantage=(rollout % 3 - 1).float(),
        logp=prob.log(),
        logp_old=prob.log() + 0.01,
        entropy=1 - prob,
        collision_rest=rest,
        collision_logp_rest=-rest,
        clipped=torch.rand(rows, generator=g) < 0.2,
        kept=torch.rand(rows, generator=g) < 0.9,
        top1=prob > 0.5,
        coef=torch.randn(rows, generator=g),
        minibatch=minibatch,
    )


def record(recorder: Recorder, steps: Iterator[int] | range, passes: int = 2) -> None:
    for step in steps:
        for number in range(passes):
            recorder.watch(tokens(10 * step + number, minibatch=number))
        recorder.end_step({"step": step, "reward": step / 10}, ROLLOUTS, spell)


def spell(ids: list[int]) -> list[str]:
    return [f"<{i}>" for i in ids]


def without_times(run: Run) -> Any:
    return run.steps.drop(columns=[c for c in run.steps if c.startswith("seconds")])


@contextmanager
def stuck(recorder: Recorder) -> Iterator[None]:
    """A disk that does not answer within the block."""
    go, real = threading.Event(), recorder._writer.write_part

    def write_part(*given: Any) -> None:
        assert go.wait(60)
        real(*given)

    recorder._writer.write_part = write_part  # type: ignore[method-assign]
    try:
        yield
    finally:
        go.set()


# ---- the way to the host ------------------------------------------------------------------------


def test_a_packed_pass_has_the_bits_of_the_plain_one() -> None:
    given = tokens(1)
    given.entropy = given.entropy.to(torch.bfloat16)  # type: ignore[union-attr]
    given.coef = given.coef.double()  # type: ignore[union-attr]
    given.group = torch.full_like(given.group, -1)
    given.rollout = given.rollout.flip(0)[::1]
    given.logp_after, given.kept = torch.full((ROWS,), torch.nan), None
    plain, packed = HostPass(given).columns(7, 3), DevicePass(given).columns(7, 3)
    assert set(plain) == set(packed)
    for name, values in plain.items():
        wanted = values.astype(packed[name].dtype)
        assert wanted.tobytes() == packed[name].tobytes(), name
    assert packed["kept"].all()
    assert (packed["step"] == 7).all()


def test_a_pass_on_the_host_is_not_copied() -> None:
    given = tokens(1)
    assert np.shares_memory(HostPass(given).columns(1, 0)["logp"], given.logp.numpy())


def test_a_packed_pass_takes_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    real = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a, **k: copies.append(1) or real(*a, **k))
    DevicePass(tokens(1))
    assert len(copies) == 1


# ---- same files, another thread -----------------------------------------------------------------


def test_the_thread_writes_the_same_bytes_as_the_caller_would(tmp_path: Path) -> None:
    for name, synchronous in (("caller", True), ("thread", False)):
        recorder = Recorder(
            tmp_path / name, {"name": "r"}, token_fraction=0.6, synchronous=synchronous
        )
        record(recorder, range(1, 9))
        recorder.close("finished")
        assert recorder.failure is None
    here, there = tmp_path / "caller", tmp_path / "thread"
    files = sorted(f.relative_to(here) for f in here.rglob("*.parquet"))
    assert len(files) == 8 * 3 + 1
    assert files == sorted(f.relative_to(there) for f in there.rglob("*.parquet"))
    for file in files:
        assert (here / file).read_bytes() == (there / file).read_bytes(), file
    assert without_times(open_run(here)).equals(without_times(open_run(there)))


def test_what_a_step_holds(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"}, token_every=2, token_fraction=0.5)
    record(recorder, range(1, 4))
    recorder.flush()
    run = open_run(tmp_path / "r")
    assert run.classes.tokens.sum() == 3 * 2 * ROWS, "written before the end"
    assert run.token_steps() == [1, 3]
    assert 0 < len(run.tokens()) < 2 * 2 * ROWS
    assert run.steps.token_fraction.tolist() == [0.5, 0.0, 0.5]
    assert (run.steps.seconds_writer > 0).all()
    assert set(run.tokens().token_id) <= set(run.vocab)
    assert run.vocab[int(run.tokens().token_id[0])] == f"<{run.tokens().token_id[0]}>"
    recorder.close("finished")


def test_settling_early_changes_no_file(tmp_path: Path) -> None:
    for name in ("early", "late"):
        recorder = Recorder(tmp_path / name, {"name": "r"})
        recorder.watch(tokens(1))
        if name == "early":
            recorder.settle(1, spell)
            assert recorder.tokens is not None
            assert np.isfinite(recorder.tokens["grad_norm"]).all()
        recorder.watch(tokens(2, minibatch=1))
        recorder.end_step({"step": 1}, ROLLOUTS, spell)
        recorder.close("finished")
    early, late = open_run(tmp_path / "early"), open_run(tmp_path / "late")
    assert early.tokens().equals(late.tokens())
    assert early.classes.equals(late.classes)
    assert early.vocab == late.vocab


def test_columns_from_the_tokens_are_computed_in_the_thread(tmp_path: Path) -> None:
    seen: list[str] = []

    def row_of(records: Any) -> dict[str, float]:
        seen.append(threading.current_thread().name)
        return {"entropy": float(records["entropy"].mean())}

    with_thread = Recorder(tmp_path / "r", {"name": "r"})
    with_thread.watch(tokens(1))
    with_thread.end_step({"step": 1, "entropy": 9.0, "reward": 0.5}, {}, None, row_of)
    with_thread.end_step({"step": 2, "entropy": 9.0}, {}, None, row_of)
    with_thread.close("finished")
    steps = open_run(tmp_path / "r").steps
    assert steps.entropy.tolist() == pytest.approx([float(tokens(1).entropy.mean()), 9.0])
    assert steps.reward[0] == 0.5
    assert seen == ["wapo-writer"]


def test_tokens_that_come_from_a_device_are_named_by_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "on_host", DevicePass)
    threads: list[str] = []

    def named(ids: list[int]) -> list[str]:
        threads.append(threading.current_thread().name)
        return spell(ids)

    recorder = Recorder(tmp_path / "r", {"name": "r"})
    for step in range(1, 4):
        recorder.watch(tokens(step))
        recorder.end_step({"step": step}, {}, named)
        recorder.flush()
    recorder.close("finished")
    assert len(threads) == 3
    assert set(threads) == {threading.current_thread().name}
    run = open_run(tmp_path / "r")
    assert set(run.tokens().token_id) == set(run.vocab)


def test_threads_and_random_state_of_torch_are_left_alone(tmp_path: Path) -> None:
    before, count = torch.get_rng_state(), torch.get_num_threads()
    recorder = Recorder(tmp_path / "r", {"name": "r"}, token_fraction=0.5)
    record(recorder, range(1, 5))
    recorder.close("finished")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == count


def test_arrays_the_caller_writes_again_are_copied(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    reward = np.array([1.0, 0.5], np.float32)
    with stuck(recorder):
        recorder.end_step({"step": 1}, {"group": [0, 0], "rollout": [0, 1], "reward": reward})
        reward[:] = 7
    recorder.close("finished")
    assert open_run(tmp_path / "r").rollouts.reward.tolist() == [1.0, 0.5]


# ---- a disk that is slow, full, or gone ---------------------------------------------------------


def test_a_slow_disk_thins_rows_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"}, queue_rows=5 * ROWS)
    with stuck(recorder):
        started = time.perf_counter()
        record(recorder, range(1, 21), passes=1)
        assert time.perf_counter() - started < 10, "training does not wait"
        assert recorder._steps._thread.held <= 5 * ROWS
    record(recorder, range(21, 22), passes=1)
    recorder.close("finished")
    assert recorder.failure is None
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == list(range(1, 22))
    assert run.classes.groupby("step").tokens.sum().tolist() == [ROWS] * 21
    assert len(run.rollouts) == 42
    share = run.steps.token_fraction
    assert (share[:5] == 1).all()
    assert share[5] < 1
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
    recorder.watch(tokens(1))
    recorder.close("finished")
    assert not [p for p in (tmp_path / "r").rglob(".*") if p.is_file()], "no half files"


def test_a_failure_in_the_training_thread_drops_what_waits(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    with stuck(recorder):
        record(recorder, range(1, 4))
        recorder.end_step({"step": 4}, {"reward": [1.0], "no such": [1]})
        assert recorder.failure is not None
        assert "no such" in recorder.failure
    recorder.close("finished")
    assert open_run(tmp_path / "r").manifest["status"] == "recording_failed"


def test_jobs_end_with_the_first_error() -> None:
    done: list[Any] = []
    thread = WriterThread(lambda error: done.append(str(error)))
    go = threading.Event()
    thread.put(lambda: done.append(go.wait(10)))
    thread.put(lambda: [][0], rows=5)
    thread.put(lambda: done.append("never"), rows=7)
    assert thread.held == 12
    go.set()
    thread.drain()
    thread.put(lambda: done.append("never"))
    thread.close()
    assert done == [True, "list index out of range"]
    assert thread.held == 0


# ---- processes that end in every way ------------------------------------------------------------

CHILD = """
import os, signal, sys, time, random
from pathlib import Path
from tests.unit.test_recorder import record
from wapo_analysis.capture.recorder import Recorder
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
elif mode == "forget":
    recorder = Recorder(out / "r", {"name": "r"})
    record(recorder, range(1, 30), passes=1)
else:
    recorder = Recorder(out / "r", {"name": "r"})
    record(recorder, range(1, 4), passes=1)
    child = os.fork()
    if child == 0:
        record(recorder, range(50, 53), passes=1)
        recorder.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
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


def test_a_process_that_forgets_to_close_has_written_every_finished_step(tmp_path: Path) -> None:
    in_a_process(tmp_path, "forget")
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == list(range(1, 30))
    assert len(run.tokens()) == 29 * ROWS
    assert run.manifest["status"] == "running"


def test_a_forked_child_writes_nothing_and_does_not_hang(tmp_path: Path) -> None:
    in_a_process(tmp_path, "fork")
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == [1, 2, 3, 4, 5]
    assert run.manifest["status"] == "finished"
