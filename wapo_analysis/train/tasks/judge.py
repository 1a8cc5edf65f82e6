"""The grading process: mathematics and reasoning-gym, away from the process that trains.

Scorers work on whatever a policy writes. They may hang inside a big-number power, run out of memory
or evaluate text, none of which a signal or an exception handler in the training process can stop.
So they run in a process of their own, `work`: one JSON request a line on standard input, one JSON
reply a line on standard output. The kernel ends it when a request takes more than its processor
time. `Judge` is the training process's end.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Final

from wapo_analysis.errors import UserError, unknown_name

log = logging.getLogger(__name__)

#: Processor time that one completion may take to grade.
SECONDS: Final = 5
#: Processor time that loading a scorer may take.
START_SECONDS: Final = 120
#: Clock time that is waited, in multiples of the processor time; for a machine that is busy.
_WAITING: Final = 12


def require(package: str, extra: str, needed_by: str) -> None:
    """Check that an optional package is installed, without loading it.

    Raises UserError if it is not; the message says how to get it.
    """
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise UserError(f"{needed_by} needs {name}: pip install 'wapo-analysis[{extra}]'")


class Judge:
    """A grading process, started when first asked and again after it was ended.

    Safe to use from several threads, and after a fork: the child starts a process of its own.
    ``name``: whom it grades for; begins the error lines. ``setup``: request that begins every
    process, e.g. ``{"do": "math_ready"}``. ``failures``: completions that could not be graded, in
    time or at all, and so earned nothing.
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

        Raises UserError if the process cannot be started or its scorer not loaded.
        """
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            self._running()
            return self.started

    def ask(self, seconds: int = SECONDS, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Returns the reply; its ``error`` tells of an exception or of a process that ended. Raises
        UserError if the process cannot be started.

        Parameters
        ----------
        seconds : int
            Processor time the reply may take; the process is ended after it.
        **request
            ``do`` and what it needs, plain values only.
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
        [sys.executable, "-P", "-c", f"from {__name__} import work; work()"],
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


#: Most memory of the grading process.
MEMORY_BYTES: Final = 4 << 30
#: Settings of a reasoning-gym data set where the package would draw a seed or stop at 500.
DEFAULTS: Final = {"seed": 0, "size": 10_000}

_gym: dict[str, Any] = {}


def math_ready(request: dict[str, Any]) -> dict[str, Any]:
    """Load math-verify, so that a broken installation shows before training begins."""
    import math_verify  # noqa: F401

    return {"version": version("math-verify")}


def math_equal(request: dict[str, Any]) -> dict[str, Any]:
    """Whether ``text`` equals ``answer`` as mathematics, by math-verify."""
    from math_verify import verify

    gold, found = _parsed(request["answer"]), _parse(request["text"])
    # Its own timeouts work by signals and cannot end a computation inside C: the kernel can.
    return {"score": float(bool(gold and found and verify(gold, found, timeout_seconds=None)))}


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return list(parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None))


_parsed = lru_cache(maxsize=4096)(_parse)


def gym_names(request: dict[str, Any]) -> dict[str, Any]:
    """Names of all data sets of reasoning-gym."""
    return {"names": sorted(_datasets())}


def gym_make(request: dict[str, Any]) -> dict[str, Any]:
    """Build the data set that later requests are about."""
    name, config = request["name"], dict(request["config"])
    if name not in _datasets():
        return {"unknown": sorted(_datasets())}
    make, settings = _datasets()[name]
    known = [f.name for f in fields(settings)]
    if wrong := [key for key in config if key not in known]:
        return {"error": str(unknown_name("setting", wrong[0], known))}
    config = {key: value for key, value in DEFAULTS.items() if key in known} | config
    chosen = settings(**config)
    if hasattr(chosen, "validate"):
        chosen.validate()
    _gym["dataset"] = make(config=chosen)
    return {"config": config, "size": len(_gym["dataset"]), "version": version("reasoning-gym")}


def gym_item(request: dict[str, Any]) -> dict[str, Any]:
    """Question and answer of one entry; the answer is None where only the scorer knows."""
    entry = _entry(request["index"])
    return {"question": entry["question"], "answer": entry["answer"]}


def gym_score(request: dict[str, Any]) -> dict[str, Any]:
    """Score an answer with the data set's own scorer."""
    entry = _entry(request["index"])
    return {"score": float(_gym["dataset"].score_answer(request["text"], entry))}


@lru_cache(maxsize=4096)
def _entry(index: int) -> dict[str, Any]:
    return dict(_gym["dataset"][index])


@cache
def _datasets() -> dict[str, Any]:
    import reasoning_gym  # noqa: F401
    from reasoning_gym.factory import DATASETS

    return dict(DATASETS)


REQUESTS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    function.__name__: function
    for function in (math_ready, math_equal, gym_names, gym_make, gym_item, gym_score)
}


def answer(line: str) -> str:
    """Reply to one request; what goes wrong becomes the reply's ``error``, in one line."""
    request = json.loads(line)
    try:
        _limit_time(request["seconds"])
        return json.dumps(REQUESTS[request["do"]](request))
    except (Exception, SystemExit) as error:
        told = str(error).strip().splitlines()
        name = type(error).__name__
        return json.dumps({"error": f"{name}: {told[0]}" if told else name})


def _limit_time(seconds: int) -> None:
    """Let the kernel end this process after so many more seconds of processor time."""
    try:
        import resource
    except ImportError:  # no such limits on this system; the other end watches the clock as well
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, hard))


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def work() -> None:
    """Reply to requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    _limit_memory()
    # Whatever a scorer prints must not run into the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for line in sys.stdin:
        replies.write(answer(line) + "\n")
        replies.flush()
