"""wapo watch: incremental reading, the band, the view, the webhook, and the command."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.builders import write_fake_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.diagnose import Diagnosis, Finding, diagnose
from wapo_analysis.diagnose.context import Context
from wapo_analysis.errors import UserError
from wapo_analysis.store import RunWriter, open_run
from wapo_analysis.store.tail import Tail
from wapo_analysis.watch import Notifier, watch
from wapo_analysis.watch.band import entropy_band
from wapo_analysis.watch.chart import Rule, bar, bucket_means, line_chart
from wapo_analysis.watch.live import Watcher
from wapo_analysis.watch.view import one_line, render


def shown(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    text = console.export_text()
    console.file.close()
    return text


def view(path: Path, width: int = 100) -> str:
    run = open_run(path)
    return shown(render(run, diagnose(run), width=width), width)


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
    return Slow(write_fake_run(tmp_path / "source", steps=30), tmp_path / "run")


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


# ---- the band -----------------------------------------------------------------------------------


def entropy_run(path: Path, values: np.ndarray[Any, Any], reward: bool) -> Path:
    writer = RunWriter(path, {"name": "r"})
    for step, value in enumerate(values, start=1):
        writer.append_step({"step": step, "entropy": value} | ({"reward": 0.3} if reward else {}))
    writer.close("finished")
    return path


@pytest.mark.parametrize("reward", [True, False])
@pytest.mark.parametrize("level", [0.02, 0.4, 3.0])
def test_the_band_is_where_diagnose_begins_to_warn(
    tmp_path: Path, level: float, reward: bool
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01 * level, 60)
    flat = open_run(entropy_run(tmp_path / "flat", level + noise, reward))
    band = entropy_band(Context(flat))
    assert band is not None
    assert band.lowest < band.low < band.level < band.high <= band.highest

    def names(end: float) -> set[str]:
        values = level + noise
        values[40:] += end - level
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        run = open_run(entropy_run(path, values, reward))
        return {f.name for f in diagnose(run).findings}

    near, beyond = 0.03, 0.12
    assert not names(band.high * (1 - near)) & {"entropy_rise", "entropy_explosion"}
    assert names(band.high * (1 + beyond)) & {"entropy_rise", "entropy_explosion"}
    assert "entropy_explosion" in names(band.highest * (1 + beyond))
    assert not names(band.low * (1 + beyond)) & {"entropy_fall", "entropy_collapse"}
    assert names(band.low * (1 - beyond)) & {"entropy_fall", "entropy_collapse"}
    assert "entropy_collapse" in names(band.lowest * (1 - 0.5))


def test_no_entropy_no_band(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "r", steps=10, missing=["entropy"]))
    assert entropy_band(Context(run)) is None
    assert "entropy: not recorded" in view(run.path)


# ---- the view -----------------------------------------------------------------------------------


def test_the_view_says_what_diagnose_says(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "bad", steps=60, drift="explosion")
    text = " ".join(view(path).replace("│", " ").split())
    found = diagnose(open_run(path))
    assert f"verdict: entropy explosion since step {found.onset_step}" in text
    assert f"driver: {found.drivers[0].cls} ({found.drivers[0].share:.0%} of the push)" in text
    assert found.sentence in text
    assert found.findings[0].advice in text
    assert "step 60 of 60" in text


def test_class_bars_are_the_shares_of_the_last_steps(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "r", steps=25, drift="noise")
    totals = open_run(path).classes
    totals = totals[(totals.step > 15) & totals.cls.isin(range(4))]
    text = view(path)
    assert "classes, steps 16 to 25" in text
    for code, name in enumerate(("pos_peak", "pos_valley", "neg_peak", "neg_valley")):
        row = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
        mine = totals[totals.cls == code]
        for column in ("tokens", "grad_mass"):
            assert f"{mine[column].sum() / totals[column].sum():.0%}" in row
        assert f"{mine.pred_dentropy_sum.sum():+.2g}" in row


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (["collision_rest"], "no token statistics"),
        (["collision_logp_rest"], "n/a"),
        (["reward"], "reward: not recorded"),
    ],
)
def test_what_a_source_lacks_is_said(tmp_path: Path, missing: list[str], expected: str) -> None:
    assert expected in view(write_fake_run(tmp_path / "r", steps=12, missing=missing))


def test_zero_advantages_have_no_class(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "r", steps=12, drift="stalled")
    assert "every advantage is zero" in view(path)


def test_texts_of_a_run_cannot_style_the_terminal(tmp_path: Path) -> None:
    name = "[red]x[/] \x1b[2J"
    path = write_fake_run(tmp_path / "r", steps=12, manifest={"name": name})
    text = view(path)
    assert "[red]x[/]" in text
    assert "\x1b[2J" not in text
    run = open_run(path)
    assert "\x1b" not in one_line(run, diagnose(run))


@pytest.mark.parametrize("width", [20, 80, 200])
def test_every_row_fits_the_terminal(tmp_path: Path, width: int) -> None:
    path = write_fake_run(tmp_path / "r", steps=30, drift="collapse")
    assert max(map(len, view(path, width).splitlines())) <= max(width, 44)


def test_a_chart_shows_level_line_and_alarm() -> None:
    values = np.r_[np.full(20, 1.0), np.full(20, 3.0)]
    rows = line_chart(
        values,
        width=20,
        height=4,
        style="cyan",
        rules=(Rule(1.0, "dim", "beginning"), Rule(2.0, "yellow", "warns"), Rule(99.0, "red", "x")),
        safe=(0.0, 2.0),
    )
    assert len(rows) == 4
    plain = [row.plain for row in rows]
    assert plain[0].endswith(" 3")
    assert plain[3].endswith("beginning 1")
    assert sum("warns" in row for row in plain) == 1
    assert not any("x" in row for row in plain), "a far level does not flatten the data"
    top, bottom = plain[0][:20].strip(" ┈"), plain[3][:20].strip(" ┈")
    assert 9 <= len(top) <= 12
    assert 9 <= len(bottom) <= 12
    assert any("red" in str(span.style) for span in rows[0].spans)
    assert not any("red" in str(span.style) for span in rows[3].spans)


def test_charts_of_one_value_and_of_very_many() -> None:
    for values in (np.array([0.0]), np.zeros(7), np.linspace(-1, 1, 5001)):
        rows = line_chart(values, width=30, height=3, style="")
        assert all(len(row.plain) >= 30 for row in rows)
        assert any(ord(c) > 0x2800 for row in rows for c in row.plain)
    assert bucket_means(np.arange(10.0), 5).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_bars_are_exact_to_an_eighth() -> None:
    assert bar(0.5, 8, "").plain == "████    "
    assert bar(1 / 64, 8, "").plain == "▏       "
    assert (bar(0.0, 4, "").plain, bar(2.0, 4, "").plain) == ("    ", "████")


# ---- the webhook --------------------------------------------------------------------------------


def finding(name: str, severity: Any = "critical") -> Finding:
    return Finding(
        name=name,
        severity=severity,
        step=7,
        message="It happened.",
        evidence={"ratio": float("inf"), "share": 0.5},
        advice="Do this.",
        reference="there",
    )


def diagnosis(*findings: Finding) -> Diagnosis:
    return Diagnosis(
        run="mine",
        verdict="healthy",
        onset_step=None,
        first_warning_step=None,
        drivers=(),
        findings=findings,
        skipped=(),
        sentence="",
    )


class Post:
    """Takes the place of the network and of the clock."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.now = 0.0
        self.error: Exception | None = None

    def __call__(self, url: str, body: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(json.loads(body))

    def clock(self) -> float:
        return self.now

    def notifier(self, **given: Any) -> Notifier:
        return Notifier("https://x.example/h", send=self, clock=self.clock, **given)


def test_a_finding_is_posted_once_and_others_after_the_cooldown() -> None:
    post = Post()
    notifier = post.notifier(cooldown=60)
    both = diagnosis(finding("a"), finding("b", "warning"), finding("c", "info"))
    for now in (0, 1, 59, 60, 61, 500):
        post.now = now
        notifier.offer(both)
    assert [sent["finding"]["name"] for sent in post.sent] == ["a", "b"]
    post.now = 1000
    notifier.offer(diagnosis(finding("b", "critical")))
    assert post.sent[-1]["finding"]["severity"] == "critical", "worse than before is news"


def test_the_payload_is_json_with_the_finding() -> None:
    post = Post()
    assert post.notifier().offer(diagnosis(finding("a"))) is not None
    (sent,) = post.sent
    assert sent["run"] == "mine"
    assert sent["finding"]["evidence"] == {"ratio": None, "share": 0.5}
    assert "critical a at step 7. It happened. Do this." in sent["text"]


def test_a_failed_post_is_told_and_tried_again() -> None:
    post = Post()
    notifier = post.notifier(cooldown=10)
    post.error = TimeoutError()
    assert notifier.offer(diagnosis(finding("a"))) is None
    assert notifier.failure == "webhook failed: TimeoutError; tried again later"
    post.error, post.now = None, 11
    assert notifier.offer(diagnosis(finding("a"))) is not None
    assert notifier.failure is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "file:///etc/passwd"}, "http or https"),
        ({"url": "https://"}, "http or https"),
        ({"url": "https://x", "cooldown": -1.0}, "cooldown must be 0 or more"),
        ({"url": "https://x", "cooldown": float("nan")}, "cooldown must be 0 or more"),
        ({"url": "https://x", "least": "loud"}, "unknown severity 'loud'"),
    ],
)
def test_bad_webhook_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Notifier(**given)


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            answers = {"/ok": 204, "/moved": 302, "/full": 500}
            self.send_response(answers[self.path])
            self.send_header("Location", "/ok")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", received
    http.shutdown()
    thread.join()
    http.server_close()


def test_real_posts(server: tuple[str, list[bytes]]) -> None:
    address, received = server
    assert Notifier(f"{address}/ok").offer(diagnosis(finding("a"))) is not None
    assert json.loads(received[0])["finding"]["name"] == "a"
    for path in ("/moved", "/full"):
        notifier = Notifier(f"{address}{path}")
        assert notifier.offer(diagnosis(finding("a"))) is None
        assert notifier.failure is not None
    assert len(received) == 3, "a redirect is not followed"


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
