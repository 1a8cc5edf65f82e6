"""How a run ends early: between two steps, where its state is whole, or before it has begun."""

import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from wapo_analysis.errors import UserError
from wapo_analysis.store.files import MANIFEST
from wapo_analysis.store.lock import written_by_another

log = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Whether somebody asked the run to stop."""

    asked: bool = False


@contextmanager
def stop_between_steps(announce: bool = True) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one interrupts at once.

    Only in the main thread, and only signals nobody else handles; elsewhere they stay as they are.

    Parameters
    ----------
    announce : bool
        Say so in the log.
    """
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        if announce:
            log.warning(
                "%s: the run stops after this step; once more stops it at once",
                signal.Signals(number).name,
            )

    held = {}
    if threading.current_thread() is threading.main_thread():
        ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        held = {
            number: plain for number, plain in ours.items() if signal.getsignal(number) == plain
        }
    for number in held:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, plain in held.items():
            signal.signal(number, plain)


@dataclass
class Begun:
    """Whether a run has finished a step."""

    yes: bool = False


@contextmanager
def nothing_left_if_refused(run: Path | None) -> Iterator[Begun]:
    """Take away what was written of a new run that a mistake ends before its first step.

    So the corrected command can have the same folder. What else lies in it stays.
    """
    begun = Begun()
    fresh = run is not None and not (run / MANIFEST).exists()
    before = set(run.iterdir()) if run is not None and run.is_dir() else None
    try:
        yield begun
    except UserError:
        mine = run is not None and fresh and not begun.yes and not written_by_another(run)
        if run is not None and mine and run.is_dir():
            for path in set(run.iterdir()) - (before or set()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if before is None:
                run.rmdir()
        raise
