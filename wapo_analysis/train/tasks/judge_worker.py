"""The grading process: mathematics and reasoning-gym, away from the process that trains.

Scorers work on whatever a policy writes. They may hang inside a big-number power, run out of memory
or evaluate text, none of which a signal or an exception handler in the training process can stop.
So they run here, one JSON request a line on standard input, one JSON reply a line on standard
output. The kernel ends this process when a request takes more than its processor time; see
:class:`wapo_analysis.train.tasks.judge.Judge` for the other end.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Final

MEMORY_BYTES: Final = 4 << 30
DEFAULTS: Final = {"seed": 0, "size": 10_000}
"""Settings of a reasoning-gym data set where the package would draw a seed or stop at 500."""

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


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    return _parse(text)


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return list(parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None))


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
        return {"error": f"unknown setting {wrong[0]!r}; allowed: {', '.join(known)}"}
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


def main() -> None:
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


if __name__ == "__main__":
    main()
