"""What a bench is asked to do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


def _silent(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings all areas share.

    Attributes
    ----------
    quick : bool
        Fewer sizes and rounds: the headline numbers in under a minute.
    scale : float
        Multiplies rows of the stats and head areas, in (0, 1]; tests halve the sizes.
    rounds : int or None
        Rounds of a ratio; None takes the area's own.
    rows : int
        Token rows of the class summary.
    model : str or None
        Model whose rollout supplies real rows for the errors.
    logits : Path or None
        Recorded logits for the errors, see `experiments.bench.data.load_rows`.
    say : callable
        Gets one line of progress at a time.
    """

    quick: bool = False
    scale: float = 1.0
    rounds: int | None = None
    rows: int = 20_000_000
    model: str | None = None
    logits: Path | None = None
    say: Callable[[str], None] = field(default=_silent, repr=False)

    def rounds_or(self, quick: int, full: int) -> int:
        """Rounds asked for, else the area's own for a quick or a full bench."""
        if self.rounds is not None:
            return self.rounds
        return quick if self.quick else full

    def size(self, rows: int) -> int:
        """Rows of a case after scaling."""
        return max(1, int(rows * self.scale))
