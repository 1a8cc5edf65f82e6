"""wapo watch: incremental reading of a run that is being written, the loop, and the command."""

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.builders import write_fake_run
from tests.support.terminal import shown
from wapo_analysis.cli import run as wapo
from wapo_analysis.diagnose import diagnose
from wapo_analysis.store import RunWriter, open_run
from wapo_analysis.store.tail import Tail
from wapo_analysis.watch import watch
from wapo_analysis.watch.live import Watcher, _key_presses

# ---- following a run that is being written ------------------------------------------------------


class Slow:
    """Writes a finished run again, piece by piece, as a trainer would."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.lines = (source / "steps.jsonl").read_text().splitlines(keepends=True)
        for name in ("classes", "probes", "tokens", "rollouts"):
            (target / name).mkdir(parents=True)
        self.manifest("running")

    def manifest(self, status: str) -> None:
        content = json.loads((self.source / "manifest.json").read_text())
        (self.target / "manifest.json").write_text(json.dumps(content | {"status": status}))

    def parts(self, *steps: int) -> None:
        for step in steps:
            for part in (self.source / "classes").glob(f"part-{step:08d}-*"):
                shutil.copy(part, self.target / "classes")

    def log(self, text: str) -> None:
        with (self.target / "steps.jsonl").open("a") as stream:
            stream.write(text)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.parts(step)
            self.log(self.lines[step - 1])


@pytest.fixture
def slow(tmp_path: Path) -> Slow:
    return Slow(write_fake_run(tmp_path / "source", steps=30, loose=True), tmp_path / "run")


def test_a_followed_run_equals_the_opened_one_at_every_moment(slow: Slow) -> None:
    tail = Tail(slow.target)
    for last in (1, 2, 9, 30):
        done = int(tail.run().steps.step.max()) if last > 1 else 0
        slow.steps(done + 1, last)
        assert tail.poll()
        followed, opened = tail.run(), open_run(slow.target)
        assert followed.steps.equals(opened.steps)
        assert followed.classes.equals(opened.classes)
        assert diagnose(followed).to_dict() == diagnose(opened).to_dict()
        assert not tail.poll(), "nothing new"


def test_only_what_was_added_is_read(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    from wapo_analysis.store import parts as module

    opened: list[str] = []
    read = module.read_part
    monkeypatch.setattr(module, "read_part", lambda p, *a: opened.append(p.name) or read(p, *a))
    tail = Tail(slow.target)
    for last in range(1, 31):
        slow.steps(last, last)
        tail.poll()
    assert tail.bytes_read == (slow.target / "steps.jsonl").stat().st_size
    assert sorted(opened) == sorted(p.name for p in (slow.target / "classes").iterdir())


def test_half_a_line_waits_for_its_end(slow: Slow) -> None:
    tail = Tail(slow.target)
    slow.steps(1, 2)
    slow.parts(3)
    slow.log(slow.lines[2][:25])
    tail.poll()
    assert tail.run().steps.step.tolist() == [1, 2]
    assert set(tail.run().classes.step) == {1, 2}, "a step without its line is not shown"
    slow.log(slow.lines[2][25:])
    assert tail.poll()
    assert tail.run().steps.step.tolist() == [1, 2, 3]
    assert tail.notes == []


def test_half_a_character_is_no_error(slow: Slow) -> None:
    tail = Tail(slow.target)
    whole = b'{"step": 1, "x/note": "\xc3\xa9"}\n'
    log = slow.target / "steps.jsonl"
    log.write_bytes(whole[:-4])
    tail.poll()
    with log.open("ab") as stream:
        stream.write(whole[-4:])
    tail.poll()
    assert tail.run().steps["x/note"].tolist() == ["é"]


def test_broken_lines_and_parts_are_named_and_left_out(slow: Slow) -> None:
    slow.steps(1, 3)
    part = next((slow.target / "classes").glob("part-00000002-*"))
    part.write_bytes(part.read_bytes()[:30])
    slow.log("nonsense\n[1]\n")
    slow.steps(4, 5)
    tail = Tail(slow.target)
    tail.poll()
    assert tail.run().steps.step.tolist() == [1, 2, 3, 4, 5]
    assert set(tail.run().classes.step) == {1, 3, 4, 5}
    assert [note[:6] for note in tail.notes[:2]] == ["line 4", "line 5"]
    assert part.name in tail.notes[2]


def test_a_log_cut_short_in_place_is_read_anew(slow: Slow) -> None:
    tail, log = Tail(slow.target), slow.target / "steps.jsonl"
    slow.steps(1, 10)
    tail.poll()
    inode, kept = log.stat().st_ino, "".join(slow.lines[:3]).encode()
    with log.open("r+b") as stream:
        stream.truncate(len(kept))
    assert log.stat().st_ino == inode
    assert tail.poll()
    assert tail.run().steps.step.tolist() == [1, 2, 3]
    assert set(tail.run().classes.step) == {1, 2, 3}
    slow.log(slow.lines[3])
    assert tail.poll()
    assert tail.run().steps.step.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("more", [0, 3])
def test_a_log_that_another_file_has_taken_the_place_of_is_read_anew(slow: Slow, more: int) -> None:
    """A run that went back and has come as far as before, or further, between two looks."""
    tail, log = Tail(slow.target), slow.target / "steps.jsonl"
    slow.steps(1, 6)
    tail.poll()
    slow.log("nonsense\n")
    tail.poll()
    assert len(tail.notes) == 1
    beside = log.with_name("beside")
    beside.write_text("".join(slow.lines[2 : 9 + more]))
    assert beside.stat().st_size >= log.stat().st_size
    beside.replace(log)
    assert tail.poll()
    assert tail.run().steps.step.tolist() == list(range(3, 10 + more))
    assert tail.notes == []
    read = tail.bytes_read
    assert not tail.poll()
    assert tail.bytes_read == read


def test_a_resumed_run_starts_over(slow: Slow) -> None:
    tail = Tail(slow.target)
    slow.steps(1, 10)
    tail.poll()
    writer = RunWriter(slow.target, open_run(slow.target).manifest, resume_after=4)
    assert tail.poll()
    assert tail.run().steps.step.tolist() == [1, 2, 3, 4]
    assert set(tail.run().classes.step) == {1, 2, 3, 4}
    slow.steps(5, 6)
    tail.poll()
    assert tail.run().classes.equals(open_run(slow.target).classes)
    writer.close("finished")
    assert tail.poll()
    assert tail.run().manifest["status"] == "finished"


def test_a_run_without_any_step_is_shown(slow: Slow) -> None:
    tail = Tail(slow.target)
    watcher = Watcher(tail)
    assert watcher.refresh()
    assert "reward: not recorded" in shown(watcher.view(80))
    assert "no step yet" in watcher.line()


# ---- the loop and the command -------------------------------------------------------------------


def test_watching_goes_on_until_the_run_ends(
    slow: Slow, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from wapo_analysis.watch import live

    slow.steps(1, 1)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        slow.steps(len(naps) + 1, len(naps) + 1)
        if len(naps) == 9:
            slow.manifest("failed")

    monkeypatch.setattr(live, "sleep", sleep)
    for terminal in (False, True):
        console = Console(force_terminal=terminal, width=100, height=40)
        naps.clear()
        slow.manifest("running")
        (slow.target / "steps.jsonl").write_text(slow.lines[0])
        watch(slow.target, console, interval=0.25)
        assert naps == [0.25] * 9
        out = capfd.readouterr().out
        assert "step 10" in out
        if not terminal:
            assert out.count("\n") == 10


def test_waiting_for_a_run_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from wapo_analysis.watch import live

    path = tmp_path / "later"
    monkeypatch.setattr(live, "sleep", lambda _: write_fake_run(path, steps=3))
    assert wapo(["watch", str(path), "--wait", "--once"]) == 0
    assert "step 3 of 3" in capfd.readouterr().out


def test_once_prints_a_snapshot_of_the_one_run_below(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_fake_run(tmp_path / "runs" / "a", steps=12)
    assert wapo(["watch", str(tmp_path / "runs"), "--once"]) == 0
    assert "wapo watch a" in capfd.readouterr().out
    write_fake_run(tmp_path / "runs" / "b", steps=3)
    assert wapo(["watch", str(tmp_path / "runs"), "--once"]) == 2
    assert "holds 2 runs; name one of:" in capfd.readouterr().err


def test_once_posts_to_a_webhook_that_fails_and_still_shows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_fake_run(tmp_path / "bad", steps=60, drift="explosion")
    arguments = ["watch", str(path), "--once", "--webhook", "http://127.0.0.1:9/x"]
    assert wapo(arguments) == 0
    out = capfd.readouterr().out
    assert "entropy explosion" in out
    assert "webhook failed" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--interval", "0"], "interval must be positive, got 0"),
        (["--webhook", "ftp://x/y"], "webhook must be an http or https address"),
        (["--webhook", "http://x", "--cooldown", "-3"], "cooldown must be 0 or more"),
        (["--notify-on", "loud"], "'loud' is not one of"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_fake_run(tmp_path / "r", steps=3)
    assert wapo(["watch", str(path), "--once", *options]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_missing_run_is_one_line_without_wait(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert wapo(["watch", str(tmp_path / "absent")]) == 2
    assert "no run folder at" in capfd.readouterr().err


def test_ctrl_c_is_how_one_stops(
    slow: Slow, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from wapo_analysis.watch import live

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "sleep", interrupt)
    assert wapo(["watch", str(slow.target)]) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_whose_process_died_is_shown_as_probably_dead(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import os, sys; from pathlib import Path; from wapo_analysis.store import RunWriter\n"
        "writer = RunWriter(Path(sys.argv[1]), {'name': 'r'})\n"
        "writer.append_step({'step': 1, 'reward': 0.5}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")]).returncode == 9
    tail = Tail(tmp_path / "r")
    watcher = Watcher(tail)
    watcher.refresh()
    assert "probably dead  step 1" in shown(watcher.view(80))
    assert watcher.line() == "r: step 1, reward 0.5 (smoothed), insufficient data, probably dead"
    assert not watcher.ended, "a queue may start it again"
    assert wapo(["diagnose", str(tmp_path / "r")]) == 0
    assert "its process ended without ending the run" in capfd.readouterr().out


def test_keys_are_read_one_by_one_and_the_terminal_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keyboard, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    with open(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with _key_presses() as pressed:
            assert pressed is not None
            assert pressed(0.0) == ""
            os.write(keyboard, b"?q")
            assert [pressed(5.0), pressed(5.0), pressed(0.0)] == ["?", "q", ""]
        assert termios.tcgetattr(terminal) == before
    os.close(keyboard)


def test_without_a_terminal_there_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with _key_presses() as pressed:
            assert pressed is None
