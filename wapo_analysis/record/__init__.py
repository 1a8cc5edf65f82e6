"""Recording: token passes in, a run folder out; any trainer feeds it.

Here is the one guard: what watches a training may fail, the training may not.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from numbers import Integral
from pathlib import Path
from threading import get_ident
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from torch._compile import _disable_dynamo

from wapo_analysis.errors import UserError
from wapo_analysis.store.files import MOST_STEPS

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


class Guarded:
    """Watches a training: its first failure is told and ends the watching, never the training.

    ``failure``: why watching stopped; ``seconds``: time that guarded work took of the training
    thread.
    """

    failure: str | None = None
    seconds = 0.0
    _inside: int | None = None  # the thread that is within `guard`

    def fail(self, error: BaseException) -> None:
        """Watch no more; the first error is told."""
        if self.failure is None:
            first, *_ = [*str(error).strip().splitlines(), ""]
            self.failure = f"{type(error).__name__}: {first}"
            with suppress(Exception):  # a log handler of the training may raise
                self.failed(error)

    def failed(self, error: BaseException) -> None:
        """Let go of what is held, and tell the user."""

    # A compiled training step calls it as it stands; traced, it would end the training. The public
    # torch.compiler.disable loads the compiler when it decorates (800 modules, over a second for
    # every user); this one, with which torch decorates its own optimizers, at the first call.
    @_disable_dynamo
    def guard(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an action, unless watching has failed; None if it has, or fails now."""
        if self.failure is not None:
            return None
        if self._inside == (thread := get_ident()):  # guarded and timed already
            return action(*args, **kwargs)
        self._inside, started = thread, perf_counter()
        try:
            return action(*args, **kwargs)
        except Exception as error:
            self.fail(error)
            return None
        finally:
            self._inside = None
            self.seconds += perf_counter() - started


class Alone(Guarded):
    """Records in the process and the object it was made in; a fork or a copy of it records nothing.

    ``path``: folder that it records to, None if nothing is recorded; ``original``: of a copy, the
    folder of the one it is a copy of.
    """

    original: str | None = None

    def __init__(self, path: Path | None) -> None:
        self.path, self._process = path, os.getpid()

    def guard(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an action, unless recording has failed or there is no path; else None."""
        if self.failure is None and (self.forked or self.original is not None):
            what = "a fork of the process" if self.forked else "a copy of the recorder"
            self.fail(UserError(f"this is {what} that records, which alone writes"))
        return None if self.path is None else super().guard(action, *args, **kwargs)

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that records."""
        return self.path is not None and os.getpid() != self._process

    def __reduce__(self) -> Any:
        original = self.original if self.path is None else str(self.path)
        return type(self), (None,), {"original": original}


def guarded(method: F) -> F:
    """Let no failure of a method reach the training that is being watched."""

    @wraps(method)
    def wrapper(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        return self.guard(method, self, *args, **kwargs)

    return cast(F, wrapper)


def on_schedule(step: int, every: int) -> bool:
    """Steps 1, 1 + every, ... so that the first step always counts."""
    return every > 0 and (step - 1) % every == 0


class Steps:
    """Numbers of finished steps, each larger than the one before.

    ``last``: the last one; 0 before the first.
    """

    def __init__(self, resume_after: int | None) -> None:
        self.last = resume_after or 0
        self._begun, self._told = resume_after is not None, False

    def next(self, step: int) -> int:
        """Number of a step that was called ``step``: that, or counted on if it was there already.

        Rows of a step that comes twice would take the place of those that it had. Raises UserError
        on a number that no run folder can hold.
        """
        with suppress(TypeError, ValueError):
            step = int(step)
        if not isinstance(step, int) or not 0 <= step < MOST_STEPS:
            raise UserError(f"a step must be 0 to {MOST_STEPS - 1}, got {step!r}")
        if self._begun and step <= self.last:
            if not self._told:
                log.warning(
                    "step %d came after step %d, but steps must count up: recorded as step %d, "
                    "and so on", step, self.last, self.last + 1,
                )  # fmt: skip
            step, self._told = self.last + 1, True
        self._begun, self.last = True, step
        return step


def check_schedule(rank: int, token_fraction: float, *every: int) -> None:
    """Refuse a rank below 0, a share out of (0, 1] and steps between two that are below 0.

    Raises UserError naming what is allowed.
    """
    if not isinstance(rank, Integral) or rank < 0:
        raise UserError(f"rank must be 0 or a whole number above it, got {rank!r}")
    if min(every) < 0:
        names = "token_every, rescore_every and probe_every"
        raise UserError(f"{names} must be 0 (never) or positive")
    if not 0 < token_fraction <= 1:
        raise UserError(f"token_fraction must be in (0, 1], got {token_fraction}")


class Closing:
    """Ends with its with-block; ``close`` hears how the training in it ended."""

    def close(self, status: str = "finished") -> None:
        """End; may be called twice. ``status``: how the training ended, for the manifest."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(ended_by(kind))


def ended_by(kind: type[BaseException] | None) -> str:
    """Status of a run whose training ended with an exception, or without one."""
    interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
    return "finished" if kind is None else "interrupted" if interrupted else "failed"


def close_at_exit(close: Callable[[str], object]) -> Callable[[], None]:
    """Call ``close`` with the status of the training when the program ends, if nobody did before.

    Returns what takes that back.
    """

    def end() -> None:
        # What nobody caught has ended the program; a prompt remembers errors that it survived.
        close(ended_by(None if hasattr(sys, "ps1") else getattr(sys, "last_type", None)))

    atexit.register(end)
    return partial(atexit.unregister, end)
