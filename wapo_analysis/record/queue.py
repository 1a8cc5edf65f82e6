"""Work that leaves the training thread: jobs in order, one thread, nobody waits but at the end."""

import os
import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class WriterThread:
    """Runs jobs one after the other in a thread of its own.

    The thread starts with the first job and is a daemon: a killed process leaves whole files, and a
    process that ends without `close` is not held up by it. In a forked child there is no such
    thread; jobs given there are dropped, they are the parent's to do.

    Parameters
    ----------
    on_error : callable
        Called once, in the thread, with the first exception of a job; what is left is dropped.
    synchronous : bool
        Run every job at once in the thread that gives it.
    """

    def __init__(self, on_error: Callable[[Exception], None], synchronous: bool = False) -> None:
        self._on_error, self._synchronous = on_error, synchronous
        self._jobs: deque[tuple[Job, int]] = deque()
        self._changed = threading.Condition()
        self._held = 0
        self._busy = self._ended = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def held(self) -> int:
        """Token rows of the jobs that wait or are being done."""
        return self._held

    def put(self, job: Job, rows: int = 0) -> None:
        """Add a job that keeps a number of token rows in memory until it is done."""
        if self._ended or self._forked():
            return
        if self._synchronous:
            self._do(job)
            return
        with self._changed:
            self._jobs.append((job, rows))
            self._held += rows
            self._changed.notify_all()
        if self._thread is None:
            self._start()

    def drain(self) -> None:
        """Wait until every job so far is done."""
        if self._forked():
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._busy)

    def abandon(self) -> None:
        """Drop what has not been begun and take nothing more."""
        if self._forked():
            return
        with self._changed:
            self._ended = True
            self._held -= sum(rows for _, rows in self._jobs)
            self._jobs.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Finish every job and end the thread; may be called twice."""
        self.drain()
        self.abandon()

    def _forked(self) -> bool:
        return os.getpid() != self._process

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="wapo-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no new threads at the end of the interpreter, or by a limit
            self._synchronous = True
            jobs, self._held = list(self._jobs), 0
            self._jobs.clear()
            for job, _ in jobs:
                self._do(job)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._jobs or self._ended)
                    if not self._jobs:
                        return
                    job, rows = self._jobs.popleft()
                    self._busy = True
                try:
                    self._do(job)
                finally:
                    del job  # frees its rows before the next job is waited for
                    with self._changed:
                        self._busy = False
                        self._held -= rows
                        self._changed.notify_all()
        finally:
            self.abandon()

    def _do(self, job: Job) -> None:
        try:
            job()
        except Exception as error:
            self.abandon()
            self._on_error(error)
