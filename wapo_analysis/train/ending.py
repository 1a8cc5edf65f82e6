"""How a run ends early: between two steps, where its state is whole, or before it has begun."""

import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from wapo_analysis.errors import UserError
from wapo_analysis.store.files import MANIFEST
from wapo_analysis.store.lock import written_by_another
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.rollout import NonFiniteLogits

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
class Ended:
    """How a run ended."""

    status: str = "failed"


@contextmanager
def closed_as_it_ended(
    closes: Sequence[Callable[[str], None]], config: TrainConfig
) -> Iterator[Ended]:
    """A block that trains; after it each of ``closes`` is told the status of the run.

    Raises
    ------
    UserError
        If the GPU has no memory for a step, naming what to change.
    """
    ended = Ended()
    try:
        yield ended
    except KeyboardInterrupt:
        ended.status = "interrupted"
        raise
    except NonFiniteLogits:
        ended.status = "diverged"
        raise
    except torch.OutOfMemoryError as error:
        ended.status = "out_of_memory"
        raise _out_of_memory(config) from error
    finally:
        for close in closes:
            close(ended.status)


def _out_of_memory(config: TrainConfig) -> UserError:
    size = config.microbatch_size or "as many as fit by estimate"
    at_once = config.sample_batch_size or "all"
    return UserError(
        f"the GPU has no memory for a step: set microbatch_size (now {size}) or sample_batch_size "
        f"(now {at_once}) lower, or gradient_checkpointing to true (now "
        f"{str(config.gradient_checkpointing).lower()})"
    )


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
