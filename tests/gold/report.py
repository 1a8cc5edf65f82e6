"""Checking the objectives against a folder of golden vectors of the official WAPO code.

Every pair ``X.json`` + ``X.npz`` is a case: it is recomputed from logits and rewards in float64
and float32, in parity mode, through the functions that training uses. ``advantages.json`` and
``hazards.json`` are checked if present; subfolders are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.gold.checks import (
    ItemResult,
    check_advantage_row,
    check_case,
    check_hazard,
)
from tests.gold.folders import (
    ADVANTAGES_FILE,
    HAZARDS_FILE,
    case_paths,
    read_case,
    rows_of,
)
from wapo_analysis.errors import UserError

__all__ = ["GoldReport", "ItemResult", "WorstError", "check_folder"]


@dataclass(frozen=True, slots=True)
class WorstError:
    """Largest error of one quantity over all items, and where it occurred."""

    quantity: str
    precision: str
    error: float
    limit: float
    item: str


@dataclass(frozen=True, slots=True)
class GoldReport:
    """Outcome of `check_folder`."""

    folder: Path
    groups: Mapping[str, tuple[ItemResult, ...]]
    """``cases``, ``advantage rows``, ``hazards`` -> results; a kind without a file is absent."""

    @property
    def passed(self) -> bool:
        """Everything in the folder agrees."""
        return all(item.passed for items in self.groups.values() for item in items)

    @property
    def counts(self) -> str:
        """For example ``38/38 cases, 72/72 advantage rows, 16/16 hazards``."""
        return ", ".join(
            f"{sum(item.passed for item in items)}/{len(items)} {kind}"
            for kind, items in self.groups.items()
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """One line per failed check, with the item it belongs to."""
        return tuple(
            f"{item.name}: {line}"
            for items in self.groups.values()
            for item in items
            for line in item.failures
        )

    @property
    def worst(self) -> tuple[WorstError, ...]:
        """Largest error per quantity and precision, in order of first appearance."""
        found: dict[tuple[str, str], WorstError] = {}
        for items in self.groups.values():
            for item in items:
                for c in item.checks:
                    known = found.get((c.quantity, c.precision))
                    if known is None or not c.error <= known.error:
                        found[c.quantity, c.precision] = WorstError(
                            c.quantity, c.precision, c.error, c.limit, item.name
                        )
        return tuple(found.values())

    def to_text(self) -> str:
        """Pass counts, the worst error of each quantity beside its limit, and every failure."""
        lines = [f"golden folder {self.folder}: {self.counts}", ""]
        header = ("quantity", "precision", "worst error", "limit", "where")
        table = [header] + [
            (
                w.quantity,
                w.precision,
                f"{w.error:.1e}",
                f"{w.limit:g}" if w.limit else "exact",
                w.item,
            )
            for w in self.worst
        ]
        widths = [max(len(row[column]) for row in table) for column in range(len(header) - 1)]
        for row in table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[-1]]))
        failures = [f"FAILED {line}" for line in self.failures]
        return "\n".join([*lines, *([""] if failures else []), *failures])


def _checked(name: str, check: Callable[[], ItemResult]) -> ItemResult:
    """Name the item in the error of a file whose content cannot be replayed."""
    try:
        return check()
    except UserError as error:
        raise UserError(f"golden item {name}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"golden item {name} cannot be replayed: {type(error).__name__}: {error}"
        ) from error


def _items(folder: Path) -> Iterator[tuple[str, str, Callable[[], ItemResult]]]:
    """Kind, name and check of everything in the folder; files are read as they come up."""
    for path in case_paths(folder):
        yield "cases", path.stem, partial(check_case, read_case(path))
    if (folder / ADVANTAGES_FILE).is_file():
        for index, row in enumerate(rows_of(folder / ADVANTAGES_FILE)):
            name = f"{ADVANTAGES_FILE} row {index}"
            yield "advantage rows", name, partial(check_advantage_row, index, row)
    if (folder / HAZARDS_FILE).is_file():
        for index, row in enumerate(rows_of(folder / HAZARDS_FILE)):
            yield "hazards", f"{HAZARDS_FILE} row {index}", partial(check_hazard, row)


def check_folder(folder: str | Path, progress: Callable[[str], None] | None = None) -> GoldReport:
    """Check every case, advantage row and hazard of a folder in the golden format.

    Parameters
    ----------
    folder : path
        Folder with ``*.json`` + ``*.npz`` pairs of any names, ``advantages.json``,
        ``hazards.json``; each kind is optional.
    progress : callable, optional
        Called with the name of each item before it is checked.

    Returns
    -------
    GoldReport
        Pass counts, worst error per quantity, failures.

    Raises
    ------
    UserError
        If the folder is missing or empty, or a file is unreadable; the message names the file.
    """
    groups: dict[str, list[ItemResult]] = {}
    for kind, name, check in _items(Path(folder)):
        if progress is not None:
            progress(name)
        groups.setdefault(kind, []).append(_checked(name, check))
    return GoldReport(Path(folder), {kind: tuple(items) for kind, items in groups.items()})
