"""Files of a table of parts: their names, what is in them, reading them while they change.

``part-<step>-<rank>.parquet`` holds one step of one process;
``merged-<first>-<last>-<rank>.parquet`` whole steps in order, and in its schema metadata the steps
and rows of each row group. A crash between writing a merged file and deleting its parts leaves
both, with the same rows; so rows are known by (step, rank), and one file gives them.
"""

import logging
import os
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from wapo_analysis.errors import UserError
from wapo_analysis.schema import TABLES, TOKENS, Column, Table
from wapo_analysis.store.files import VOCAB, parse_json
from wapo_analysis.store.parquet import fitted, named, open_part, read_part
from wapo_analysis.table import Array

log = logging.getLogger(__name__)

STEPS_KEY = b"wapo_steps"
_LISTINGS = 20
#: Rows of a step that are read at a time.
_BLOCK = 1 << 16
_NAME = re.compile(
    r"(?:part-(?P<first>[0-9]{8,10})|merged-(?P<begin>[0-9]{8,10})-(?P<last>[0-9]{8,10}))"
    r"-(?P<rank>[0-9]{1,5})\.parquet"
)
_VOCABULARY = Table(
    "vocab",
    "a token id",
    (
        Column("token_id", "int32", "1", "key", "token id", required=True),
        Column("text", "str", "text", "measured", "its text", required=True),
    ),
)

T = TypeVar("T")
#: Step and rank.
Key = tuple[int, int]


class Rows(NamedTuple):
    """Rows of one step in a table that holds other steps too; see `joined`."""

    table: pa.Table
    start: int
    size: int


@dataclass(frozen=True, order=True)
class PartFile:
    """One file of a table."""

    #: Steps it spans; the same number for a part.
    first: int
    last: int
    #: Process that wrote it.
    rank: int
    path: Path

    @property
    def merged(self) -> bool:
        """Whether it holds several steps."""
        return self.path.name.startswith("merged-")

    def groups(self) -> list[dict[int, int]]:
        """Steps of each row group, with their rows; of a part only the step is known (-1 rows).

        Raises FileNotFoundError if it has been merged into another file meanwhile; UserError if it
        is broken.
        """
        if not self.merged:
            return [{self.first: -1}]
        with named(self.path):
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
    """Files of a table, merged ones first, then by step and rank; a missing folder is empty.

    Raises UserError if the folder cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from error
    files = []
    for name in names:
        found = _NAME.fullmatch(name)
        if found is not None:
            first = int(found["first"] or found["begin"])
            last = int(found["last"] or first)
            files.append(PartFile(first, last, int(found["rank"]), folder / name))
        elif name.endswith(".parquet"):
            _tell_stray(folder / name)
    return sorted(files, key=lambda part: (not part.merged, part))


@lru_cache(maxsize=256)
def _tell_stray(path: Path) -> None:
    """Say once of a file, such as a copy, that it is not read."""
    log.warning("%s is not named as a part of a table; left out", path)


@lru_cache(maxsize=4096)
def _merged_groups(path: Path, mtime_ns: int) -> list[dict[int, int]]:
    with named(path), open_part(path) as file:
        written = (file.metadata.metadata or {}).get(STEPS_KEY)
        if written is None:
            raise UserError(f"{path} does not say which steps it holds; move it away")
        groups = [_steps_of(group) for group in parse_json(written.decode())]
        rows = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
        if [sum(group.values()) for group in groups] != rows:
            raise ValueError(f"{STEPS_KEY.decode()} and its row groups differ")
        return groups


def _steps_of(group: Any) -> dict[int, int]:
    """Steps of a row group and their rows, in order."""
    held: dict[int, int] = dict(group)
    numbers = [*held, *held.values()]
    if len(held) != len(group) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{STEPS_KEY.decode()} has no list of steps and rows")
    return held


def listed_keys(folder: Path) -> set[Key]:
    """Step and rank of everything a table holds. Raises UserError on a broken merged file."""
    return settled(
        lambda: {(step, part.rank) for part in list_parts(folder) for step in part.steps()}
    )


def settled(look: Callable[[], T]) -> T:
    """Do what lists and opens files; again when one vanishes in between, merged into another.

    Raises UserError if one is listed again and again but is not there: a link to nothing.
    """
    for _ in range(_LISTINGS):
        try:
            return look()
        except FileNotFoundError as error:
            missing = error.filename
    raise UserError(f"{missing} is listed but cannot be opened; move it away")


def read_rows(
    folder: Path,
    wanted: Callable[[int], bool] | None = None,
    columns: list[str] | None = None,
    have: Iterable[Key] = (),
    broken: dict[str, UserError] | None = None,
) -> dict[Key, Rows]:
    """Read the rows of a table by step and rank, each once.

    In the order of the keys. Raises UserError on a broken file, unless ``broken`` is given.

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
    """
    found: dict[Key, Rows] = {}
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
            found.update({(step, part.rank): held for step, held in rows.items()})
            known.update(found)

    # What was read before a file vanished is kept, so every new listing has less to do.
    settled(look)
    return dict(sorted(found.items()))


def joined(rows: Iterable[Rows]) -> list[pa.Table]:
    """Tables with the given rows in their order; neighbours in one table are one slice of it.

    A slice for each step takes longer than to read the file, where steps have few rows.
    """
    spans: list[Rows] = []
    for table, start, size in rows:
        last = spans[-1] if spans else None
        if last is not None and last.table is table and last.start + last.size == start:
            spans[-1] = Rows(table, last.start, last.size + size)
        else:
            spans.append(Rows(table, start, size))
    return [table.slice(start, size) for table, start, size in spans]


def read_steps(
    part: PartFile, steps: Container[int], columns: list[str] | None = None
) -> dict[int, Rows]:
    """Rows of one file by step; row groups without any of the steps are not read.

    Raises FileNotFoundError if it has been merged into another file meanwhile; UserError if it is
    broken, or holds other columns or steps than it should.
    """
    groups = part.groups()
    needed = [n for n, group in enumerate(groups) if any(step in steps for step in group)]
    if not needed:
        return {}
    with named(part.path):
        table = read_part(part.path, columns, needed if part.merged else None)
        table = fitted(table, TABLES.get(part.path.parent.name, TOKENS), columns)
        held = [item for n in needed for item in groups[n].items()]
        held = held if part.merged else [(part.first, len(table))]
        if "step" in table.schema.names:
            expected = np.repeat(*np.array(held, np.int64).T)
            if not np.array_equal(table["step"].to_numpy(), expected):
                raise ValueError("its rows are of other steps than it says")
    found, start = {}, 0
    for step, rows in held:
        if step in steps:
            found[step] = Rows(table, start, rows)
        start += rows
    return found


def scan_step(
    folder: Path,
    step: int,
    columns: Sequence[str],
    keep: Callable[[dict[str, Array]], dict[str, Array]],
) -> dict[str, Array]:
    """What is kept of the rows of one step, read a block at a time.

    Raises UserError on a broken file.

    Parameters
    ----------
    folder : Path
        Folder of the token table.
    columns : sequence of str
        Columns that are read; one of numbers that a file lacks is NaN, null is NaN.
    keep : callable
        From the columns of a block, shape (rows,) each, to those that are kept of it.
    """

    def whole(values: list[Array]) -> Array:
        return values[0] if len(values) == 1 else np.concatenate(values)

    def look() -> dict[str, Array]:
        parts: list[dict[str, Array]] = []
        known: set[int] = set()
        for part in list_parts(folder):
            groups = [n for n, group in enumerate(part.groups()) if step in group]
            if groups and part.rank not in known:
                known.add(part.rank)
                parts.append(_kept(part, step, columns, groups, keep))
        # Column by column, so that no more than one is there twice.
        names = list(parts[0]) if parts else []
        return {name: whole([part.pop(name) for part in parts]) for name in names}

    return settled(look)


def _kept(
    part: PartFile,
    step: int,
    columns: Sequence[str],
    groups: list[int],
    keep: Callable[[dict[str, Array]], dict[str, Array]],
) -> dict[str, Array]:
    """What `scan_step` keeps of one file, in arrays made once: small ones would stay mapped."""
    kept: dict[str, Array] = {}
    size = 0
    with named(part.path), open_part(part.path) as file:
        held = groups if part.merged else list(range(file.num_row_groups))
        rows = sum(file.metadata.row_group(n).num_rows for n in held)
        asked = ["step", *columns]
        for batch in file.iter_batches(_BLOCK, held, asked, use_threads=False):
            table = fitted(pa.Table.from_batches([batch]), TABLES[part.path.parent.name], asked)
            mine = table["step"].to_numpy() == step
            if not part.merged and not mine.all():
                raise ValueError("its rows are of other steps than it says")
            table = table if mine.all() else table.filter(pa.array(mine))
            given = {n: np.asarray(table[n].to_numpy()) for n in table.schema.names}
            found = keep({n: given.get(n, np.full(len(table), np.nan)) for n in columns})
            for name, values in found.items():
                if name not in kept:
                    kept[name] = np.empty(rows, values.dtype)
                kept[name][size : size + len(values)] = values
            size += len(next(iter(found.values())))
    return {name: values[:size] for name, values in kept.items()}


def read_vocab(path: Path) -> dict[int, str]:
    """Token id to text of the ids a run has seen; empty if none were written.

    Raises UserError if the file is broken.
    """
    file = path / VOCAB
    try:
        with named(file):
            table = fitted(read_part(file), _VOCABULARY)
            return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    except FileNotFoundError:
        return {}
