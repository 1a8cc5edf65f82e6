"""What every recorder can do, here without doing it; and the guard around what one does."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, cast

from torch import Tensor

from wapo_analysis.record.tokens import TokenPass
from wapo_analysis.table import Records

Texts = Callable[[list[int]], list[str]]
RowOf = Callable[[Records], Mapping[str, float]]
F = TypeVar("F", bound=Callable[..., None])


class NullRecorder:
    """Records nothing; what a trainer holds when nobody watches."""

    path: Path | None = None
    failure: str | None = None
    seconds = 0.0

    def wants_rescore(self, step: int) -> bool:
        """Whether tokens of this step are to be scored again after the update."""
        return False

    def wants_probe(self, step: int) -> bool:
        """Whether an update of this step is to be taken apart."""
        return False

    def watch(self, tokens: TokenPass, logp: Tensor) -> None:
        """Take the tokens of one gradient pass, before its backward pass."""

    def add_probe(self, rows: Records) -> None:
        """Take the rows of one probed update."""

    def end_step(
        self,
        row: Mapping[str, float],
        rollouts: Mapping[str, Sequence[Any]],
        texts: Texts | None = None,
        row_of: RowOf | None = None,
    ) -> None:
        """Finish a step: class totals, rows and the step line are written."""

    def name_tokens(self, ids: Iterable[int], texts: Texts) -> None:
        """Add token ids and their texts to the vocabulary of the run."""

    def note(self, **changes: Any) -> None:
        """Change manifest entries."""

    def flush(self) -> None:
        """Wait until every finished step is on disk."""

    def close(self, status: str) -> None:
        """End the run."""

    def fail(self, error: Exception) -> None:
        """Stop recording for good; training goes on."""


def guarded(method: F) -> F:
    """Let no failure of recording reach the training that is being watched."""

    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.failure is not None and method.__name__ != "close":
            return
        started = perf_counter()
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.fail(error)
        finally:
            self.seconds += perf_counter() - started

    return cast(F, wrapper)


def on_schedule(step: int, every: int) -> bool:
    """Steps 1, 1 + every, ... so that the first step always counts."""
    return every > 0 and (step - 1) % every == 0
