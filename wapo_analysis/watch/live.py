"""The watching loop: poll, judge, show, notify, until the run ends."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from select import select
from threading import Thread
from time import monotonic, sleep
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from wapo_analysis.diagnose import SEVERITIES, Diagnosis, Finding, diagnose
from wapo_analysis.errors import UserError, printable, unknown_name
from wapo_analysis.store import MANIFEST, Run, find_run
from wapo_analysis.store.tail import Tail
from wapo_analysis.watch.view import one_line, render

log = logging.getLogger(__name__)
#: Seconds after which a post is given up, however slowly its answer trickles in.
TIMEOUT = 5.0


class _NoRedirect(HTTPRedirectHandler):
    """A webhook that moves is an error: a finding is not sent where the user did not say."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _post(url: str, body: bytes) -> None:
    opener: OpenerDirector = build_opener(_NoRedirect)
    request = Request(url, body, {"Content-Type": "application/json"}, method="POST")
    with opener.open(request, timeout=TIMEOUT) as answer:
        answer.read(1024)


@dataclass
class Notifier:
    """Posts new findings of a run as JSON.

    Raises UserError on an address that cannot be posted to, a negative cool-down, or an unknown
    severity.

    Parameters
    ----------
    url : str
        Where to, http or https.
    cooldown : float
        Seconds between two posts. Findings that come up meanwhile wait, the worst goes first.
    least : {"info", "warning", "critical"}
        Least severity that is posted.
    send : callable
        Posts bytes to a URL.
    clock : callable
        Seconds that never go back.
    """

    url: str
    cooldown: float = 300.0
    least: str = "warning"
    send: Callable[[str, bytes], None] = _post
    clock: Callable[[], float] = monotonic
    failure: str | None = None
    _posted: set[tuple[str, str]] = field(default_factory=set)
    _last: float | None = None
    _post: Thread | None = None

    def __post_init__(self) -> None:
        _check_address(self.url)
        if not self.cooldown >= 0:
            raise UserError(f"cooldown must be 0 or more seconds, got {self.cooldown}")
        if self.least not in SEVERITIES:
            raise unknown_name("severity", self.least, SEVERITIES)

    def offer(self, diagnosis: Diagnosis) -> Finding | None:
        """Post the worst finding that was not posted yet, unless the cool-down lasts.

        Returns what was posted. A post that failed is tried again after the cool-down; ``failure``
        holds the reason until one succeeds.
        """
        now = self.clock()
        if self._post is not None and self._post.is_alive():
            return None
        if self._last is not None and now - self._last < self.cooldown:
            return None
        allowed = SEVERITIES[SEVERITIES.index(self.least) :]
        waiting = [f for f in diagnosis.findings if f.severity in allowed and self._new(f)]
        if not waiting:
            return None
        self._last = now
        # In a thread, as an address or an answer may take any time, and the watch goes on.
        self.failure = f"webhook failed: no answer within {TIMEOUT:g} s; tried again later"
        self._post = Thread(target=self._send, args=(diagnosis, waiting[0]), daemon=True)
        self._post.start()
        self._post.join(TIMEOUT)
        return None if self._new(waiting[0]) else waiting[0]

    def _send(self, diagnosis: Diagnosis, finding: Finding) -> None:
        try:
            self.send(self.url, payload(diagnosis, finding))
        except Exception as error:  # address, protocol and answer have exceptions of their own
            told = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, HTTPException):
                told = f"no answer of HTTP ({told})"
            self.failure = f"webhook failed: {told[:200]}; tried again later"
            log.debug("post to %s failed", self.url, exc_info=True)
            if isinstance(error, HTTPError):
                error.close()
            return
        self.failure = None
        self._posted.add(_key(finding))

    def _new(self, finding: Finding) -> bool:
        return _key(finding) not in self._posted


def _check_address(url: str) -> None:
    """Refuse what no post could go to, before the watch begins."""
    told = f"webhook must be an http or https address, got {url!r}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        printed = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not host or not printed:
            raise UserError(told)
        host.encode("idna")  # as the connection will: labels of 1 to 63 characters
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{told} ({error})") from error
    if parts.username is not None:
        raise UserError(f"webhook must be an address without user and password, got {url!r}")


def _key(finding: Finding) -> tuple[str, str]:
    """What makes a finding the same one: its onset may move a little as steps come in."""
    return finding.name, finding.severity


def payload(diagnosis: Diagnosis, finding: Finding) -> bytes:
    """JSON of one finding; ``text`` and ``content`` are what chat services show."""
    said = (
        f"{diagnosis.run}: {finding.severity} {finding.name} at step {finding.step}. "
        f"{finding.message} {finding.advice}"
    )
    body = {
        "text": said,
        "content": said[:2000],
        "run": diagnosis.run,
        "verdict": diagnosis.verdict,
        "onset_step": diagnosis.onset_step,
        "finding": finding.to_dict(),
    }
    return json.dumps(body, allow_nan=False).encode()


class Followed(Protocol):
    """What is watched: a run folder (`Tail`), or a log of another trainer."""

    notes: list[str]

    def poll(self) -> bool:
        """Read what is new; returns whether anything was."""

    def run(self) -> Run:
        """Return the run as it was at the last poll."""

    def last_written(self) -> float | None:
        """Time of the last change, seconds since 1970."""


class Watcher:
    """A run that is followed, its diagnosis, and where findings go."""

    def __init__(self, tail: Followed, notifier: Notifier | None = None) -> None:
        self.tail, self.notifier = tail, notifier
        self.run: Run | None = None
        self.diagnosis: Diagnosis | None = None

    def refresh(self) -> bool:
        """Read what is new, judge and notify; returns whether anything changed."""
        changed = self.tail.poll() or self.run is None
        if changed:
            self.run = self.tail.run()
            self.diagnosis = diagnose(self.run)
        if self.notifier is not None and self.diagnosis is not None:
            self.notifier.offer(self.diagnosis)
        return changed

    @property
    def ended(self) -> bool:
        """The run is no longer being written."""
        return self.run is not None and self.run.manifest.status != "running"

    def view(
        self, width: int, height: int | None = None, *, keys: bool = False, explain: bool = False
    ) -> RenderableType:
        """Return the view of the last refresh; it fits ``height`` rows if that is given."""
        assert self.run is not None
        assert self.diagnosis is not None
        failure = self.notifier.failure if self.notifier is not None else None
        return render(
            self.run,
            self.diagnosis,
            width=width,
            rows=height,
            written=self.tail.last_written(),
            notes=[*self.tail.notes, *([failure] if failure else [])],
            keys=keys,
            explain=explain,
        )

    def line(self) -> str:
        """Return the state of the last refresh in one line."""
        assert self.run is not None
        assert self.diagnosis is not None
        failure = self.notifier.failure if self.notifier is not None else None
        return one_line(self.run, self.diagnosis) + (f", {printable(failure)}" if failure else "")


def watch(
    path: Path,
    console: Console,
    *,
    interval: float = 2.0,
    once: bool = False,
    wait: bool = False,
    notifier: Notifier | None = None,
    tail: Followed | None = None,
) -> Diagnosis:
    """Watch a run until it ends; on a terminal as a live view, else one line per change.

    Returns the last one. Raises UserError if there is no run (without ``wait``), or several, or the
    interval is not positive.

    Parameters
    ----------
    path : Path
        Run folder, or a folder that holds one run.
    console : rich.console.Console
        Where to show it.
    interval : float
        Seconds between two polls, > 0.
    once : bool
        Show the run as it is now and return.
    wait : bool
        Wait for a run that is not there yet.
    notifier : Notifier, optional
        Gets every diagnosis.
    tail : Followed, optional
        Follow this in place of the run folder at ``path``.
    """
    if not interval > 0:
        raise UserError(f"interval must be positive, got {interval}")
    if wait and tail is None:
        _wait_for(path, console, interval)
    watcher = Watcher(tail or Tail(find_run(path)), notifier)
    watcher.refresh()
    if once:
        console.print(watcher.view(console.width))
    elif console.is_terminal:
        _watch_live(watcher, console, interval)
    else:
        _watch_lines(watcher, console, interval)
    assert watcher.diagnosis is not None
    return watcher.diagnosis


def _wait_for(path: Path, console: Console, interval: float) -> None:
    def there() -> bool:
        return (path / MANIFEST).exists() or any(path.glob(f"*/{MANIFEST}"))

    if there():
        return
    with console.status(Text(f"waiting for a run at {path}")):
        while not there():
            sleep(interval)


def _watch_live(watcher: Watcher, console: Console, interval: float) -> None:
    explain = False
    with _key_presses() as pressed:

        def view() -> RenderableType:
            return watcher.view(
                console.width, console.height, keys=pressed is not None, explain=explain
            )

        with Live(view(), console=console, screen=False, auto_refresh=False) as live:
            while not watcher.ended:
                if pressed is None:
                    sleep(interval)
                key = pressed(interval) if pressed is not None else ""
                if key == "q":
                    return
                if key == "?":
                    explain = not explain
                else:
                    watcher.refresh()
                live.update(view(), refresh=True)


@contextmanager
def _key_presses() -> Iterator[Callable[[float], str] | None]:
    """A function that waits some seconds for a key and returns it, or ""; None without keys.

    The terminal is put back as it was, however the watching ends.
    """
    try:
        import termios
        import tty
    except ImportError:  # no POSIX
        yield None
        return
    if sys.stdin is None or not sys.stdin.isatty():
        yield None
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> str:
        ready, _, _ = select([terminal], [], [], seconds)
        return os.read(terminal, 1).decode("ascii", "replace") if ready else ""

    tty.setcbreak(terminal)
    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _watch_lines(watcher: Watcher, console: Console, interval: float) -> None:
    shown = ""
    while True:
        if (told := watcher.line()) != shown:
            console.print(told, markup=False, highlight=False, soft_wrap=True)
        shown = told
        if watcher.ended:
            return
        sleep(interval)
        watcher.refresh()
