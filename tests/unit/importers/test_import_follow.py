"""Any trainer's log where a run is wanted: opened through a cache, followed as it grows."""

import json
import os
import re
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.support.builders import write_fake_run
from tests.support.import_sources import write_lines, write_verl
from wapo_analysis import importers
from wapo_analysis.cli import run
from wapo_analysis.errors import UserError
from wapo_analysis.importers import SourceTail, open_source
from wapo_analysis.watch.live import watch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WAPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def log(path: Path, steps: int, first: int = 1) -> Path:
    rows = [{"step": s, "reward": 0.5 + s / 1000, "entropy": 0.4} for s in range(first, steps + 1)]
    if first == 1:
        return write_lines(path, rows)
    with path.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_a_source_is_read_again_only_if_it_has_changed(tmp_path: Path, cache: Path) -> None:
    source = log(tmp_path / "train.jsonl", 9)
    first = open_source(source)
    assert (first.name, len(first.steps)) == ("train", 9)
    written = (first.path / "manifest.json").stat().st_mtime_ns
    assert open_source(source).path == first.path
    assert (first.path / "manifest.json").stat().st_mtime_ns == written
    log(source, 12, first=10)
    second = open_source(source)
    assert len(second.steps) == 12
    assert second.path.parent == first.path.parent
    assert not first.path.exists(), "one state of a source is kept"
    (entry,) = cache.iterdir()
    assert entry == second.path.parent


def test_several_may_open_one_source_at_once(tmp_path: Path, cache: Path) -> None:
    source, together = log(tmp_path / "train.jsonl", 200), threading.Barrier(6)

    def opened(_: int) -> int:
        together.wait()
        return len(open_source(source).steps)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(opened, range(6))) == [200] * 6
    (entry,) = cache.iterdir()
    assert len(list(entry.iterdir())) == 1, "what the slower ones wrote is gone"


@pytest.mark.parametrize("days", [0, 40])
def test_what_a_killed_import_left_is_dropped_once_nobody_can_be_writing_it(
    days: int, tmp_path: Path
) -> None:
    source = log(tmp_path / "train.jsonl", 9)
    left = open_source(source).path.parent / ".half-written"
    left.mkdir()
    os.utime(left, (time.time() - days * 86_400,) * 2)
    log(source, 12, first=10)
    open_source(source)
    assert left.exists() is (days == 0)


def test_sources_nobody_looked_at_for_long_are_dropped(tmp_path: Path, cache: Path) -> None:
    old = open_source(log(tmp_path / "old.jsonl", 3)).path.parent
    os.utime(old, (0, 0))
    open_source(log(tmp_path / "new.jsonl", 3))
    assert not old.exists()


def test_the_cache_drops_nothing_of_yours_and_keeps_a_source_for_a_month(
    tmp_path: Path, cache: Path
) -> None:
    """Also where $WAPO_CACHE is a folder that holds other things."""
    thesis = cache / "thesis"
    thesis.mkdir(parents=True)
    (cache / "notes.txt").write_text("mine")
    lately = open_source(log(tmp_path / "lately.jsonl", 3)).path.parent
    for path in (thesis, cache / "notes.txt"):
        os.utime(path, (0, 0))
    then = time.time() - 29 * 86400
    os.utime(lately, (then, then))
    open_source(log(tmp_path / "new.jsonl", 3))
    assert thesis.is_dir()
    assert (cache / "notes.txt").read_text() == "mine"
    assert lately.is_dir()


def test_a_cache_that_cannot_be_written_is_made_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WAPO_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(importers.tempfile, "gettempdir", lambda: str(tmp_path))
    assert len(open_source(log(tmp_path / "m.jsonl", 3)).steps) == 3


def test_every_reading_command_takes_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = log(tmp_path / "train.jsonl", 20)
    verl = write_verl(tmp_path / "v") / "run.jsonl"
    monkeypatch.chdir(tmp_path)
    assert run(["diagnose", str(source)]) == 0
    said = capfd.readouterr()
    assert said.out.startswith("train: healthy")
    assert "wapo: table: 20 steps from 1 file of" in said.err
    assert run(["diagnose", str(source), str(verl), "--format", "json"]) == 0
    assert [one["run"] for one in json.loads(capfd.readouterr().out)] == ["train", "run"]
    assert run(["diagnose", str(source), "--format", "json"]) == 0
    assert json.loads(capfd.readouterr().out)["run"] == "train"
    assert run(["diagnose", str(source), str(verl), "--step", "3"]) == 2
    ours = write_fake_run(tmp_path / "ours", steps=10)
    assert run(["compare", str(source), str(ours)]) == 0
    assert run(["figures", str(source), "--only", "training", "--out", "f"]) in (0, 2)
    assert run(["report", str(source)]) == 0
    assert (tmp_path / "train.html").exists()
    assert run(["watch", str(source), "--once"]) == 0
    assert "reward" in capfd.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "train.html",
        "train.jsonl",
    ]


def test_what_is_neither_a_run_nor_a_log_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("words\n")
    write_fake_run(tmp_path / "run", steps=3)
    (tmp_path / "run" / "manifest.json").unlink()
    for path, said in (("notes.txt", "looked for trainer states"), ("none", "no run folder at"),
                       ("run", "is not a run: it has no manifest.json")):  # fmt: skip
        assert run(["diagnose", str(tmp_path / path)]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line


def test_a_log_that_takes_long_to_read_is_read_again_after_five_times_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, real = [100.0], importers.open_source
    monkeypatch.setattr(importers, "monotonic", lambda: now[0])

    def slowly(*given: object) -> object:
        now[0] += 2.0
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(importers, "open_source", slowly)
    tail = SourceTail(log(tmp_path / "train.jsonl", 9))
    assert tail.poll()
    log(tmp_path / "train.jsonl", 12, first=10)
    now[0] += 9.9
    assert not tail.poll()
    now[0] += 0.2
    assert tail.poll()
    assert len(tail.run().steps) == 12


def test_a_log_is_followed_while_its_job_writes(tmp_path: Path) -> None:
    source = log(tmp_path / "train.jsonl", 10)
    tail = SourceTail(source)
    assert tail.poll()
    assert (len(tail.run().steps), tail.run().status) == (10, "running")
    assert not tail.poll()
    log(source, 15, first=11)
    tail._next = 0.0
    assert tail.poll()
    assert len(tail.run().steps) == 15
    with source.open("a") as stream:
        stream.write('{"step": 16, "rew')
    tail._next = 0.0
    assert tail.poll()
    assert len(tail.run().steps) == 15
    assert any("unfinished last line" in note for note in tail.notes)
    source.write_text("")
    tail._next = 0.0
    assert not tail.poll(), "what was read stays while the log is being replaced"
    assert len(tail.run().steps) == 15
    assert "is empty" in tail.notes[0]


def test_an_old_log_is_shown_and_the_watch_ends(tmp_path: Path) -> None:
    source = log(tmp_path / "train.jsonl", 10)
    os.utime(source, (time.time() - 7200,) * 2)
    console = Console(file=StringIO(), width=100)
    found = watch(source, console, interval=0.01, tail=SourceTail(source))
    assert found.run == "train"
    with pytest.raises(UserError, match="nothing at"):
        SourceTail(tmp_path / "none.log").poll()


def test_a_watch_sees_what_a_job_adds(tmp_path: Path) -> None:
    source = log(tmp_path / "train.jsonl", 10)
    out, tail = StringIO(), SourceTail(source)
    watching = threading.Thread(
        target=lambda: watch(source, Console(file=out, width=200), interval=0.01, tail=tail),
        daemon=True,
    )
    watching.start()
    for last in (12, 14):
        log(source, last, first=last - 1)
        until = time.monotonic() + 60
        while f"step {last}," not in out.getvalue() and time.monotonic() < until:
            time.sleep(0.02)
        assert f"step {last}," in out.getvalue()
    tail._live = False
    log(source, 15, first=15)
    watching.join(timeout=60)
    assert not watching.is_alive()


# ---- what a log does not say about itself -------------------------------------------------------


def strange(path: Path) -> Path:
    """A log of two runs under names nobody knows, the entropy with its sign turned."""
    rows = ["run,when,score,minus_h"]
    for name, pace in (("calm", 1000.0), ("dying", 15.0)):
        rows += [f"{name},{s},{0.2 + s / 500},{-0.9 * np.exp(-s / pace) - 0.01}" for s in range(90)]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_every_command_that_reads_a_log_takes_what_it_does_not_say(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = str(strange(tmp_path / "odd.csv"))
    assert run(["diagnose", log]) == 2
    assert "choose one with --run NAME: calm, dying" in capfd.readouterr().err
    said = ["--map", "step=when", "--map", "reward=score", "--map", "entropy=-minus_h"]
    for chosen, end in (("calm", "0.83"), ("dying", "0.01")):
        assert run(["diagnose", log, "--run", chosen, *said]) == 0
        printed = capfd.readouterr().out
        assert printed.startswith(f"odd {chosen}: ")
        assert re.search(rf"Entropy went from 0\.\d+ to {end}\d* nats", printed)
    page, figures = str(tmp_path / "page.html"), str(tmp_path / "figures")
    for command in (
        ["report", log, "--out", page],
        ["figures", log, "--only", "entropy", "--out", figures],
        ["watch", log, "--once"],
        ["compare", log],
        ["audit", log],
    ):
        assert run([*command, "--run", "calm", *said]) == 0, command
    assert (tmp_path / "figures" / "entropy.png").exists()
    offered = [
        unescape(line) for line in re.findall("<code>(wapo .*?)</code>", Path(page).read_text())
    ]
    assert len(offered) == 2
    for line in offered:
        out = ["--only", "entropy", "--out", figures] * ("figures" in line)
        assert run([*shlex.split(line)[1:], *out]) == 0, line


def test_what_is_said_of_a_log_is_refused_of_a_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = write_fake_run(tmp_path / "run")
    assert run(["diagnose", str(own), "--map", "reward=score"]) == 2
    assert "--map and --run are for logs" in capfd.readouterr().err
