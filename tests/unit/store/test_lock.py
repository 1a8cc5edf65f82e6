"""One writer per run: a second one is refused, a dead one is replaced, a loser notices."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.schema import CLASSES
from wapo_analysis.store import PartWriter, RunWriter, open_run
from wapo_analysis.store import lock as module
from wapo_analysis.store.files import STEP_LOG, step_line
from wapo_analysis.store.lock import (
    LOCK,
    Owner,
    RunLock,
    RunLost,
    _last_step,
    ago,
    written_by_another,
)
from wapo_analysis.store.merge import compact
from wapo_analysis.table import Records

WRITER = """
import sys, time
from pathlib import Path
from wapo_analysis.store import RunWriter
writer = RunWriter(Path(sys.argv[1]), {})
for step in (1, 2, 3):
    writer.append_step({"step": step})
print("written", flush=True)
time.sleep(60)
"""


ONE = {"group": [0], "rollout": [0], "reward": [1.0]}


def classes(step: int) -> Records:
    keys = {name: np.zeros(1) for name in ("rank", "sign", "regime", "prob_bin", "tokens")}
    return Records.build(CLASSES, {"step": np.full(1, step), **keys})


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """Another process that writes the run ``r``."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "r")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        yield process
        process.kill()


def aged(run: Path, seconds: float, **changes: Any) -> None:
    """Change what the lock of a run says, and make its last heartbeat older."""
    file = run / LOCK
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    then = time.time() - seconds
    os.utime(file, (then, then))


def test_a_second_writer_is_refused_in_one_line(tmp_path: Path, other: Any) -> None:
    told = (
        rf"r is being written by pid {other.pid} on {socket.gethostname()}, last step 3 \d s ago; "
        r"--take-over \(take_over=True\) if that process is gone"
    )
    before = (tmp_path / "r" / "steps.jsonl").read_bytes()
    with pytest.raises(UserError, match=told):
        RunWriter(tmp_path / "r", {}, resume_after=1)
    with pytest.raises(UserError, match=told):
        compact(tmp_path / "r")
    assert (tmp_path / "r" / "steps.jsonl").read_bytes() == before
    assert open_run(tmp_path / "r").status == "running"


def test_a_killed_writer_shows_as_probably_dead_and_is_replaced_without_asking(
    tmp_path: Path, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other.send_signal(signal.SIGKILL)
    # Not waited for: it is a zombie, which runs no more.
    for _ in range(500):
        if open_run(tmp_path / "r").status == "probably dead":
            break
        time.sleep(0.01)
    assert repr(open_run(tmp_path / "r")) == "Run('r', unknown, 3 steps, probably dead)"
    with caplog.at_level(logging.WARNING):
        writer = RunWriter(tmp_path / "r", {}, resume_after=2)
    assert f"taken over from pid {other.pid} on {socket.gethostname()}" in caplog.text
    assert "that process is gone" in caplog.text
    assert open_run(tmp_path / "r").status == "running"
    writer.close("finished")
    assert not (tmp_path / "r" / LOCK).exists()
    assert open_run(tmp_path / "r").steps.step.tolist() == [1, 2]


def test_the_loser_of_a_take_over_stops_recording_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Recorder(tmp_path / "r", {}, synchronous=True)
    for step in (1, 2, 3):
        first.finish_step(step, rollouts=ONE)
    second = Recorder(tmp_path / "r", {}, resume_after=2, take_over=True, synchronous=True)
    second.finish_step(3, rollouts=ONE | {"reward": [0.5]})
    first.finish_step(4, rollouts=ONE)
    first.note(name="loser")
    first.close("finished")
    assert first.lost
    assert first.failure is not None
    assert "another process has taken over" in first.failure
    assert "training goes on" in caplog.text
    run = open_run(tmp_path / "r")
    assert (run.status, run.name) == ("running", "r")
    second.close("finished")
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == [1, 2, 3]
    assert run.rollouts.reward.tolist() == [1.0, 1.0, 0.5]
    assert (run.status, run.manifest.step_lines) == ("finished", 3)
    assert not second.lost


@pytest.mark.parametrize("name", ["", LOCK, "steps.jsonl"])
def test_what_was_moved_away_is_not_called_taken_over(name: str, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {}, synchronous=True)
    (tmp_path / "r" / name).rename(tmp_path / "moved")
    if name == "steps.jsonl":
        (tmp_path / "moved").unlink()
    recorder.finish_step(1, rollouts=ONE)
    recorder.close()
    assert recorder.failure is not None
    assert "deleted while" in recorder.failure
    assert str(tmp_path / "r") in recorder.failure
    assert "another process" not in recorder.failure


@pytest.mark.parametrize("rank", [-1, "a", None])
def test_a_rank_is_a_number(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank must be 0 or a whole number above it, got"):
        Recorder(tmp_path / "r", {}, rank=rank)
    assert not (tmp_path / "r").exists()


def test_later_ranks_notice_as_well(tmp_path: Path) -> None:
    first = RunWriter(tmp_path / "r", {})
    second = PartWriter(tmp_path / "r", {})
    second.write_part(classes(1), 1, rank=1)
    taken = RunWriter(tmp_path / "r", {}, resume_after=0, take_over=True)
    with pytest.raises(RunLost):
        second.write_part(classes(2), 2, rank=1)
    with pytest.raises(RunLost):
        first.write_part(classes(2), 2)
    taken.close("finished")


def test_a_later_rank_may_end_after_the_first(tmp_path: Path) -> None:
    first, second = RunWriter(tmp_path / "r", {}), PartWriter(tmp_path / "r", {})
    second.write_part(classes(1), 1, rank=1)
    first.close("finished")
    second.write_part(classes(2), 2, rank=1)
    assert sorted(set(open_run(tmp_path / "r").classes.step)) == [1, 2]


@pytest.mark.parametrize(
    ("silence", "changes", "free"),
    [
        (0, {}, False),
        (10_000, {}, False),  # stopped with SIGSTOP, say: the process is there
        (0, {"born": 1}, True),  # another process has its number now
        (0, {"pid": 2**22 + 1, "born": 0}, True),
        (0, {"pid": 10**30}, True),
        (0, {"pid": 0}, True),
        (60, {"place": "another machine", "host": "node7"}, False),
        (200, {"place": "another machine", "host": "node7"}, True),
        (60, {"token": None, "host": None, "pid": "x"}, False),  # unreadable: by its age
        (200, {"token": None, "host": None, "pid": "x"}, True),
    ],
)
def test_who_counts_as_gone(
    tmp_path: Path, silence: float, changes: dict[str, Any], free: bool
) -> None:
    writer = RunWriter(tmp_path / "r", {})
    writer.append_step({"step": 1})
    aged(tmp_path / "r", silence, **changes)
    assert open_run(tmp_path / "r").status == ("probably dead" if free else "running")
    if free:
        RunWriter(tmp_path / "r", {}, resume_after=1).close("finished")
        assert writer.lost
    else:
        with pytest.raises(UserError, match="is being written by"):
            RunWriter(tmp_path / "r", {}, resume_after=1)


@pytest.mark.parametrize("content", [b"", b"\x00" * 512, b"[" * 4000, b"{}", b"1" * 100_000])
def test_a_damaged_lock_is_judged_by_its_age(tmp_path: Path, content: bytes) -> None:
    RunWriter(tmp_path / "r", {}).close("finished")
    (tmp_path / "r" / LOCK).write_bytes(content)
    with pytest.raises(UserError, match="is being written by a process on an unknown host"):
        RunWriter(tmp_path / "r", {}, resume_after=0)
    then = time.time() - 1000
    os.utime(tmp_path / "r" / LOCK, (then, then))
    RunWriter(tmp_path / "r", {}, resume_after=0).close("finished")


def test_whoever_may_read_the_run_may_read_who_writes_it(tmp_path: Path) -> None:
    own = os.umask(0o022)
    try:
        writer = RunWriter(tmp_path / "r", {})
        assert (tmp_path / "r" / LOCK).stat().st_mode & 0o777 == 0o644
        writer.close("finished")
    finally:
        os.umask(own)


def test_a_writer_that_is_dropped_lets_go(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "r", {})
    writer.append_step({"step": 1})
    del writer
    assert open_run(tmp_path / "r").status == "probably dead"
    RunWriter(tmp_path / "r", {}, resume_after=1).close("finished")


def test_a_refused_resume_gives_the_run_back(tmp_path: Path) -> None:
    RunWriter(tmp_path / "r", {}).close("finished")
    (tmp_path / "r" / "steps.jsonl").write_text("no step\nno step\n")
    with pytest.raises(UserError, match=r"steps\.jsonl: line 1"):
        RunWriter(tmp_path / "r", {}, resume_after=0)
    (tmp_path / "r" / "steps.jsonl").write_text("")
    RunWriter(tmp_path / "r", {}, resume_after=0).close("finished")


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(module, "_HEARTS", module._Hearts())
    writer = RunWriter(tmp_path / "r", {})
    file = tmp_path / "r" / LOCK
    aged(tmp_path / "r", 500)
    for _ in range(500):
        if time.time() - file.stat().st_mtime < 100:
            break
        time.sleep(0.01)
    owner = Owner.of(tmp_path / "r")
    assert owner is not None
    assert owner.pid == os.getpid()
    assert file.stat().st_size == 512
    writer.close("finished")


def test_a_forked_child_leaves_the_run_to_its_parent(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "r", {})
    child = os.fork()
    if child == 0:
        writer._lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    writer.append_step({"step": 1})
    assert open_run(tmp_path / "r").status == "running"
    writer.close("finished")
    assert open_run(tmp_path / "r").status == "finished"


@pytest.mark.skipif(not Path("/proc/uptime").exists(), reason="needs /proc")
def test_a_process_is_told_from_a_later_one_of_its_number_by_when_it_began() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    before = float(Path("/proc/uptime").read_text().split()[0])
    with subprocess.Popen(["sleep", "60"]) as process:
        after = float(Path("/proc/uptime").read_text().split()[0])
        born = module._born(process.pid)
        assert before - 0.1 <= born / ticks <= after + 0.1
        assert module._runs(process.pid, born)
        assert module._runs(process.pid, 0), "unknown when"
        assert not module._runs(process.pid, born - 1), "another one had this number"
        process.kill()
    assert not module._runs(process.pid, born)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3, "0 s"), (0.4, "0 s"), (119.4, "119 s"), (120, "2 min"), (7199, "120 min"),
        (7200, "2.0 h"), (5400 * 3, "4.5 h"),
    ],
)  # fmt: skip
def test_a_time_span_has_the_unit_that_fits(seconds: float, said: str) -> None:
    assert ago(seconds) == said


def test_the_last_step_of_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    lines = b"".join(step_line({"step": step, "reward": 0.5}) for step in range(1, 3001))
    assert len(lines) > 1 << 17
    (tmp_path / STEP_LOG).write_bytes(lines + b'{"step": 3001, "rew')
    assert re.fullmatch(", last step 3000 [0-9] s ago", _last_step(tmp_path))
    (tmp_path / STEP_LOG).write_bytes(b'{"step": 1')
    assert _last_step(tmp_path) == "", "before the first step"


def test_a_run_is_another_s_while_it_has_a_writer_that_is_not_this_process(tmp_path: Path) -> None:
    assert not written_by_another(tmp_path), "nobody writes it"
    lock = RunLock(tmp_path)
    assert not written_by_another(tmp_path)
    for change in ({"pid": os.getpid() + 1}, {"place": "elsewhere"}):
        entries = {**json.loads((tmp_path / LOCK).read_text()), **change}
        other = tmp_path / "-".join(change)
        other.mkdir()
        (other / LOCK).write_text(json.dumps(entries))
        assert written_by_another(other), change
    lock.release()
    assert not (tmp_path / LOCK).exists()
