"""Work beside this process; several runs trained at once, a process each."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

from wapo_analysis.errors import UserError
from wapo_analysis.store import STEP_LOG
from wapo_analysis.train.config import TrainConfig

T = TypeVar("T")

_POLL_SECONDS = 0.3


class Workers(ProcessPoolExecutor):
    """Fresh processes that Ctrl-C does not reach: the one that began them says what they do then.

    They are spawned: a forked copy of a process that has used threads or CUDA can hang.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count, mp_context=get_context("spawn"))

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """As the base class; what this begins has Ctrl-C blocked from its first moment."""
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


@dataclass(frozen=True)
class Job:
    """One run to train: its settings and its folder."""

    config: TrainConfig
    out: Path

    def done_steps(self) -> int:
        """Steps in the run's log so far."""
        log = self.out / STEP_LOG
        return log.read_bytes().count(b"\n") if log.exists() else 0


def train_all(
    jobs: Sequence[Job],
    workers: int | None = None,
    progress: Callable[[Sequence[int]], None] | None = None,
) -> list[str | None]:
    """Train every job; one that fails does not stop the others.

    Returns what went wrong with each job, None if nothing did. Raises UserError if two jobs share a
    folder, and KeyboardInterrupt on Ctrl-C, after the runs in progress have ended with their step.

    Parameters
    ----------
    jobs : sequence of Job
        Distinct, unused folders.
    workers : int, optional
        Processes; None takes one per core, at most one per job.
    progress : callable, optional
        Called a few times a second with the finished steps of each job.
    """
    if len({job.out for job in jobs}) < len(jobs):
        raise UserError("two of the runs have the same folder")
    count = min(workers or os.cpu_count() or 1, len(jobs))
    with Workers(count) as pool:
        futures = [pool.submit(_train_one, job) for job in jobs]
        try:
            waiting: set[Future[str | None]] = set(futures)
            while waiting:
                _, waiting = wait(waiting, timeout=_POLL_SECONDS)
                if progress is not None:
                    progress([job.done_steps() for job in jobs])
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            for worker in active_children():
                worker.terminate()  # a run ends after its step
            raise
        return [_outcome(future) for future in futures]


def _outcome(future: "Future[str | None]") -> str | None:
    """What a job returned; a worker that was killed takes its whole pool with it."""
    try:
        return future.result()
    except BrokenProcessPool:
        return "its worker process was killed, by the system's memory limit perhaps"


def _train_one(job: Job) -> str | None:
    """Train one run in this process; returns the reason if it failed."""
    from wapo_analysis.train.loop import train

    try:
        # One thread each: small models gain nothing from more, and the runs share the cores.
        train(job.config, job.out, threads=1)
    except KeyboardInterrupt:
        os._exit(130)  # else the next job begins, which may be on its way already
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None
