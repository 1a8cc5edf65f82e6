"""The watching loop: poll, judge, show, notify, until the run ends."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from time import sleep
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from wapo_analysis.diagnose import Diagnosis, diagnose
from wapo_analysis.errors import UserError, printable
from wapo_analysis.store import MANIFEST, Run, find_runs
from wapo_analysis.store.tail import Tail
from wapo_analysis.watch.notify import Notifier
from wapo_analysis.watch.view import one_line, render


def find_run(path: Path) -> Path:
    """Folder of the one run at or below a path.

    Raises
    ------
    UserError
        If there is none, or several.
    """
    found = find_runs(path)
    if len(found) > 1:
        names = ", ".join(str(run) for run in found[:6])
        raise UserError(f"{path} holds {len(found)} runs; name one of: {names}")
    return found[0]


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
    """A run that is followed, its diagnosis, and where findings go.

    Parameters
    ----------
    tail : Followed
    notifier : Notifier, optional
    """

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

    Returns
    -------
    Diagnosis
        The last one.

    Raises
    ------
    UserError
        If there is no run (without ``wait``), or several, or the interval is not positive.
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
