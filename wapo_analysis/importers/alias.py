"""What an alias is; the table of them is :mod:`wapo_analysis.importers.names`."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

UNVERIFIED: Final = "unverified"
#: Step columns of one reward function; NAME is the function's.
PER_FUNCTION: Final = ("rewards/NAME/mean", "rewards/NAME/std")


@dataclass(frozen=True)
class Alias:
    """Names that one trainer gives to one column."""

    #: "tokens", "steps" or "rollouts".
    table: str
    #: Column of ours, or one of `PER_FUNCTION`.
    column: str
    #: Who writes it; "any" for names in common use.
    trainer: str
    #: In the order they are tried, without a leading ``train/``. ``*`` stands for anything: the
    #: mean of all names that fit is taken. ``NAME`` is a reward function's name, ``DATASET`` one of
    #: held-out problems (in a log that also has ``eval/step``). ``1 - x`` is the complement.
    names: tuple[str, ...]
    #: Where the name can be read in that trainer's source, or "unverified".
    source: str

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """Each name as an expression for a whole name without ``train/``."""
        found = []
        for name in self.names:
            text = re.escape(name.removeprefix("1 - ")).replace(r"\*", ".+")
            text = text.replace("DATASET", r"(?!step$|.*-(?:truncated_ratio|pass@\d+)$)[^/]+")
            found.append(re.compile(text.replace("NAME", "(?P<function>[^/]+)"), re.IGNORECASE))
        return tuple(found)


def rows(table: str, trainer: str, source: str, **columns: str) -> list[Alias]:
    """One alias a column; names that stand in for each other are parted by a bar."""
    return [
        Alias(table, column, trainer, tuple(n.strip() for n in names.split("|")), source)
        for column, names in columns.items()
    ]


def functions(trainer: str, mean: str, std: str | None, source: str) -> list[Alias]:
    """Mean and standard deviation of one reward function."""
    given = zip(PER_FUNCTION, (mean, std), strict=True)
    return [Alias("steps", column, trainer, (n,), source) for column, n in given if n]
