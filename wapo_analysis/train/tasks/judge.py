"""The training process's end of the grading process, see ``judge_worker``."""

import json
import logging
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Final

from wapo_analysis.errors import UserError

log = logging.getLogger(__name__)

SECONDS: Final = 5
"""Processor time that one completion may take to grade."""
START_SECONDS: Final = 120
"""Processor time that loading a scorer may take."""
_WAITING: Final = 12
"""Clock time that is waited, in multiples of the processor time; for a machine that is busy."""


def require(package: str, extra: str, needed_by: str) -> None:
    """Check that an optional package is installed, without loading it.

    Raises
    ------
    UserError
        If it is not; the message says how to get it.
    """
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise UserError(f"{needed_by} needs {name}: pip install 'wapo-analysis[{extra}]'")


class Judge:
    """A grading process, started when first asked and again after it was ended.

    Safe to use from several threads, and after a fork: the child starts a process of its own.

    Parameters
    ----------
    name : str
        Whom it grades for; begins the error lines.
    setup : dict
        Request that begins every process, e.g. ``{"do": "math_ready"}``.

    Attributes
    ----------
    failures : int
        Completions that could not be graded, in time or at all, and so earned nothing.
    """

    def __init__(self, name: str, setup: dict[str, Any]) -> None:
        self.name, self.setup = name, setup
        self.failures = 0
        self.started: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Reply to the setup; starts the process if there is none.

        Raises
        ------
        UserError
            If the process cannot be started or its scorer not loaded.
        """
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            self._running()
            return self.started

    def ask(self, seconds: int = SECONDS, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Parameters
        ----------
        seconds : int
            Processor time the reply may take; the process is ended after it.
        **request
            ``do`` and what it needs, plain values only.

        Returns
        -------
        dict
            The reply; its ``error`` tells of an exception or of a process that ended.

        Raises
        ------
        UserError
            If the process cannot be started.
        """
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            return self._exchange(self._running(), {**request, "seconds": seconds})

    def score(self, **request: Any) -> float:
        """Ask for a score in [0, 1]; a completion that cannot be graded earns 0 and is counted."""
        reply = self.ask(**request)
        score = reply.get("score")
        if isinstance(score, float) and 0.0 <= score <= 1.0:
            return score
        self.failures += 1
        level = logging.WARNING if self.failures == 1 else logging.DEBUG
        log.log(level, "%s: a completion that cannot be graded earns 0: %s", self.name, reply)
        return 0.0

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._process = _spawn()
        weakref.finalize(self, _end, self._process, self._owner)
        reply = self._exchange(self._process, {**self.setup, "seconds": START_SECONDS})
        if "error" in reply or self._process is None:
            self._end()
            raise UserError(f"{self.name}: {reply['error']}")
        self.started = reply
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            _end(self._process, self._owner)
        self._process = None

    def _exchange(self, process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(_WAITING * request["seconds"], process.kill)
        watch.daemon = True
        watch.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        except BaseException:  # interrupted: the reply would be taken for that of the next request
            self._end()
            raise
        finally:
            watch.cancel()
        if line.endswith("\n"):
            return dict(json.loads(line))
        self._end()
        return {"error": f"ended without a reply, or after {request['seconds']} s of computing"}


def _spawn() -> "subprocess.Popen[str]":
    """Start the grading process with this one's import path, fixed hashing and one thread."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "wapo_analysis.train.tasks.judge_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        encoding="ascii",
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[str]", owner: int) -> None:
    """End a grading process and close its pipes; not from a fork, whose parent still uses it."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not sent yet is of no use to a dead process
                pipe.close()
