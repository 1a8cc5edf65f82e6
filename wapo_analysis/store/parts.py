"""Files of a table of parts: their names, what is in them, reading them while they change.

``part-<step>-<rank>.parquet`` holds one step of one process;
``merged-<first>-<last>-<rank>.parquet`` whole steps in order, and in its schema metadata the steps
and rows of each row group. A crash between writing a merged file and deleting its parts leaves
both, with the same rows; so rows are known by (step, rank), and one file gives them.
"""

import json
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError

STEPS_KEY = b"wapo_steps"
_LISTINGS = 20

T = TypeVar("T")
Key = tuple[int, int]
"""Step and rank."""


@dataclass(frozen=True, order=True)
class PartFile:
    """One file of a table.

    Attributes
    ----------
    first, last : int
        Steps it spans; the same number for a part.
    rank : int
        Process that wrote it.
    path : Path
    """

    first: int
    last: int
    rank: int
    path: Path

    @property
    def merged(self) -> bool:
        """Whether it holds several steps."""
        return self.path.name.startswith("merged-")

    def groups(self) -> list[dict[int, int]]:
        """Steps of each row group, with their rows; of a part only the step is known (-1 rows).

        Raises
        ------
        FileNotFoundError
            If it has been merged into another file meanwhile.
        UserError
            If it is broken.
        """
        if not self.merged:
            return [{self.first: -1}]
        return _merged_groups(self.path, self.path.stat().st_mtime_ns)

    def steps(self) -> list[int]:
        """Every step it holds; raises as `groups`."""
        return [step for group in self.groups() for step in group]


def part_name(step: int, rank: int) -> str:
    """Name of the part of one step."""
    return f"part-{step:08d}-{rank}.parquet"


def merged_name(first: int, last: int, rank: int) -> str:
    """Name of a merged file."""
    return f"merged-{first:08d}-{last:08d}-{rank}.parquet"


def list_parts(folder: Path) -> list[PartFile]:
    """Files of a table, merged ones first, then by step and rank."""
    files = []
    for path in folder.glob("*.parquet"):
        kind, *numbers = path.stem.split("-")
        if kind == "part" and len(numbers) == 2:
            files.append(PartFile(int(numbers[0]), int(numbers[0]), int(numbers[1]), path))
        elif kind == "merged" and len(numbers) == 3:
            files.append(PartFile(int(numbers[0]), int(numbers[1]), int(numbers[2]), path))
    return sorted(files, key=lambda part: (not part.merged, part))


def open_part(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises
    ------
    FileNotFoundError
        If it is not there (any more).
    UserError
        If it is broken; the message names it.
    """
    with _named(path):
        return pq.ParquetFile(path)


def read_part(
    path: Path, columns: list[str] | None = None, groups: list[int] | None = None
) -> pa.Table:
    """Read a Parquet file, or some of its row groups; raises as `open_part`."""
    with _named(path), pq.ParquetFile(path) as file:
        if groups is None:
            return file.read(columns=columns)
        return file.read_row_groups(groups, columns=columns)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what pyarrow says of a broken file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is broken or truncated ({str(error).splitlines()[0]}); "
            "move it away to read the other parts"
        ) from error


@lru_cache(maxsize=4096)
def _merged_groups(path: Path, mtime_ns: int) -> list[dict[int, int]]:
    with open_part(path) as file:
        written = (file.schema_arrow.metadata or {}).get(STEPS_KEY)
    if written is None:
        raise UserError(f"{path} does not say which steps it holds; move it away")
    return [dict(group) for group in json.loads(written)]


def listed_keys(folder: Path) -> set[Key]:
    """Step and rank of everything a table holds.

    Raises
    ------
    UserError
        On a broken merged file.
    """
    return settled(
        lambda: {(step, part.rank) for part in list_parts(folder) for step in part.steps()}
    )


def settled(look: Callable[[], T]) -> T:
    """Do what lists and opens files; again when one vanishes in between, merged into another."""
    for _ in range(_LISTINGS - 1):
        with suppress(FileNotFoundError):
            return look()
    return look()


def read_rows(
    folder: Path,
    wanted: Callable[[int], bool] | None = None,
    columns: list[str] | None = None,
    have: Iterable[Key] = (),
    broken: dict[str, UserError] | None = None,
) -> dict[Key, pa.Table]:
    """Read the rows of a table by step and rank, each once.

    Parameters
    ----------
    folder : Path
        Folder of the table; a missing one is an empty table.
    wanted : callable, optional
        Whether a step is to be read; row groups of other steps are not.
    columns : list of str, optional
        Only these columns, ``step`` among them.
    have : iterable of (int, int)
        Keys that need not be read.
    broken : dict, optional
        Names of files not to open. Broken files are added instead of raised.

    Returns
    -------
    dict of (step, rank) to pyarrow.Table
        In the order of the keys.

    Raises
    ------
    UserError
        On a broken file, unless ``broken`` is given.
    """
    found: dict[Key, pa.Table] = {}
    known = set(have)

    def look() -> None:
        for part in list_parts(folder):
            if broken is not None and part.path.name in broken:
                continue
            try:
                steps = [s for s in part.steps() if wanted is None or wanted(s)]
                new = {step for step in steps if (step, part.rank) not in known}
                rows = read_steps(part, new, columns)
            except UserError as error:
                if broken is None:
                    raise
                broken[part.path.name] = error
                continue
            found.update({(step, part.rank): table for step, table in rows.items()})
            known.update(found)

    # What was read before a file vanished is kept, so every new listing has less to do.
    settled(look)
    return dict(sorted(found.items()))


def read_steps(
    part: PartFile, steps: Container[int], columns: list[str] | None = None
) -> dict[int, pa.Table]:
    """Rows of one file by step; row groups without any of the steps are not read."""
    groups = part.groups()
    needed = [n for n, group in enumerate(groups) if any(step in steps for step in group)]
    if not needed:
        return {}
    if not part.merged:
        return {part.first: read_part(part.path, columns)}
    table = read_part(part.path, columns, needed)
    found, start = {}, 0
    for number in needed:
        for step, rows in groups[number].items():
            if step in steps:
                found[step] = table.slice(start, rows)
            start += rows
    return found
