"""Between recorder and disk: a thread, a bound on what waits for it, the vocabulary."""

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from wapo_analysis.errors import UserError
from wapo_analysis.record.step import StepJob
from wapo_analysis.store import PartWriter
from wapo_analysis.table import Array

log = logging.getLogger(__name__)

Job = Callable[[], None]
Texts = Callable[[list[int]], list[str]]

#: Token rows that may wait for the disk; a row takes up to 100 bytes.
QUEUE_ROWS = 1 << 21
#: Rows that may wait to be summed up, in units of the rows that may wait for the disk.
_UNSUMMED = 4
_LEAST_SHARE = 1 / 64


class StepWriter:
    """Writes steps in a thread of its own, in order; nothing here waits but `drain` and `close`.

    While more than ``queue_rows`` token rows would wait for the disk, each step writes half the
    share of rollouts of the one before it, in the end none; once no more than half as many wait,
    twice the share. Which rollouts those are is decided before anything is built, so a step costs
    the caller microseconds. Class totals, rollouts and the line of a step always wait their turn
    and are exact. Only a caller that is faster than class totals can be summed up, until four times
    ``queue_rows`` are in memory, is held up: it sums up its step itself.

    Parameters
    ----------
    on_error : callable
        Called once, in the thread, with the error that ended the writing; a bound method, of whose
        object no reference is kept.
    queue_rows : int
        Token rows that may wait.
    synchronous : bool
        Write in the caller's thread; the files are the same.
    beside : callable or None
        Called with the number of every step that is in the log, in the writer's thread.
    """

    def __init__(
        self,
        writer: PartWriter,
        on_error: Callable[[BaseException], None],
        queue_rows: int,
        synchronous: bool,
        beside: Callable[[int], None] | None,
    ) -> None:
        self._writer, self._queue_rows, self._beside = writer, queue_rows, beside
        self._thread = WriterThread(partial(_tell, weakref.WeakMethod(on_error)), synchronous)
        self._vocabulary = Vocabulary(writer.named())
        self._texts: Texts | None = None
        # Token ids of passes that came from a device: found by the thread, named by the caller.
        self._arrived: deque[Array] = deque()
        self._carried = 0.0
        self._share, self._thinned = 1.0, 0
        self._counted = threading.Lock()
        self._waiting, self._finished = 0, False
        # A process that ends without close still writes the steps it has finished.
        weakref.finalize(self, self._thread.close)

    def put(self, job: StepJob, texts: Texts | None = None) -> None:
        """Take a step.

        ``texts``: token ids to their texts. A tokenizer is not safe to use from two threads, so
        names are made by the caller: now for tokens on the host, with a later step or at the end
        for those on their way from a device.

        Raises
        ------
        UserError
            After `finish`.
        """
        if self._finished:
            raise UserError(f"step {job.step} came after close(), so it is not recorded")
        self._choose(job)
        if texts is not None and job.share > 0:
            self._texts = texts
            for tokens in (*job.passes, *job.tops):
                if tokens.token_ids is not None:
                    self.name(tokens.token_ids, texts)
            self._name_arrived()
        held, wanted = self._thread.held, round(job.share * job.rows)
        if held and held + job.rows > _UNSUMMED * self._queue_rows:
            self._condense(job)
        with self._counted:
            self._waiting += wanted
        self._thread.put(partial(self._write, job, wanted), job.rows)

    def name(self, ids: Array, texts: Texts) -> None:
        """Add token ids, those that are new, to the vocabulary of the run."""
        new = self._vocabulary.new(ids)
        if new:
            found = texts(new)
            if len(found) != len(new):
                raise UserError(f"texts gave {len(found)} texts for {len(new)} token ids")
            named = dict(zip(new, found, strict=True))
            self._thread.put(partial(self._writer.add_vocab, named))

    def note(self, **changes: Any) -> None:
        """Change manifest entries."""
        self._thread.put(partial(self._writer.update_manifest, **changes))

    def drain(self) -> None:
        """Wait until all that was given is on disk."""
        self._thread.drain()

    def abandon(self) -> None:
        """Drop what has not been begun and take nothing more."""
        self._thread.abandon()

    def finish(self) -> None:
        """Write all that was given, the names that were missing, and end the thread."""
        self.drain()
        self._finished = True
        self._name_arrived()
        if self._thinned:
            self.note(thinned_steps=self._thinned)
        self._thread.close()

    def _choose(self, job: StepJob) -> None:
        """Halve the share of rollouts that is written while too many rows wait, else double it."""
        if job.share <= 0:
            return
        rows, waiting = job.share * job.rows, self._waiting
        if waiting and waiting + self._share * rows > self._queue_rows:
            self._share = self._share / 2 if self._share > _LEAST_SHARE else 0.0
        elif waiting + 2 * self._share * rows <= self._queue_rows / 2 or not waiting:
            self._share = min(1.0, max(2 * self._share, _LEAST_SHARE))
        if self._share == 1:
            return
        job.share *= self._share
        self._thinned += 1
        if self._thinned == 1:
            log.warning(
                "%s is written more slowly than steps come; token rows are sampled down for now "
                "(column token_fraction), class totals stay exact",
                self._writer.path,
            )

    def _write(self, job: StepJob, wanted: int) -> None:
        """Write a step and merge parts if it is time; the merging counts for the next step."""
        started = time.thread_time()
        self._condense(job)
        for records in job.records():
            self._writer.write_part(records, job.step, job.rank)
        with self._counted:
            self._waiting -= wanted
        spent = time.thread_time() - started
        # The step line comes last: a step that is in the log has all its parts.
        self._writer.append_step({**job.row, "seconds_writer": self._carried + spent})
        if self._beside is not None:
            self._beside(job.step)
        self._writer.merge(job.rank)
        self._carried = time.thread_time() - started - spent

    def _condense(self, job: StepJob) -> None:
        """Sum a step up, and keep the token ids that have come from a device."""
        if job.share > 0:
            given = (*job.passes, *job.tops)
            waited = [tokens for tokens in given if tokens.token_ids is None]
            self._arrived += [np.unique(p.columns(0, 0)["token_id"]) for p in waited]
        job.condense()

    def _name_arrived(self) -> None:
        while self._arrived and self._texts is not None:
            self.name(self._arrived.popleft(), self._texts)


class Vocabulary:
    """Which token ids have been named; a look takes a nanosecond per id.

    ``named``: ids that have a text already.
    """

    def __init__(self, named: list[int]) -> None:
        self._named = np.zeros(0, bool)
        self.new(np.array(named, np.int64))

    def new(self, ids: Array) -> list[int]:
        """Ids among these that were never asked for before, each once, in order."""
        given = ids[ids >= 0]
        if not len(given):
            return []
        missing = int(given.max()) + 1 - len(self._named)
        if missing > 0:
            self._named = np.pad(self._named, (0, missing))
        fresh = np.unique(given[~self._named[given]])
        self._named[fresh] = True
        return [int(token) for token in fresh]


def _tell(
    listener: "weakref.WeakMethod[Callable[[BaseException], None]]", error: BaseException
) -> None:
    method = listener()
    if method is not None:
        method(error)


class WriterThread:
    """Runs jobs one after the other in a thread of its own.

    The thread starts with the first job and is a daemon: a killed process leaves whole files, and a
    process that ends without `close` is not held up by it. In a forked child there is no such
    thread; jobs given there are dropped, they are the parent's to do. ``on_error``: called once, in
    the thread, with the first exception of a job; what is left is dropped; ``synchronous``: Run
    every job at once in the thread that gives it.
    """

    def __init__(
        self, on_error: Callable[[BaseException], None], synchronous: bool = False
    ) -> None:
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
        except BaseException as error:
            self.abandon()
            if self._synchronous and not isinstance(error, Exception):
                raise
            # In a thread of its own sys.exit, too, would end no more than the writing, unheard.
            self._on_error(error)
