"""Ctrl-C and SIGTERM end a run between two steps, where its state is whole."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

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
