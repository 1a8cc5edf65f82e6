"""Several runs trained at once, a process each."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

from wapo_analysis.errors import UserError
from wapo_analysis.store import STEP_LOG
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train
from wapo_analysis.workers import Workers

_POLL_SECONDS = 0.3


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
    try:
        # One thread each: small models gain nothing from more, and the runs share the cores.
        train(job.config, job.out, threads=1)
    except KeyboardInterrupt:
        os._exit(130)  # else the next job begins, which may be on its way already
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None
