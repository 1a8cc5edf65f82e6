"""Many parts into one file, without a moment in which rows are missing; ``wapo compact``.

The merged file is written atomically (temporary file, fsync, rename); only then are its parts
deleted. After a crash in between both are there, and readers take each step of each rank once.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

import pyarrow as pa

from wapo_analysis.errors import UserError
from wapo_analysis.schema import TABLES, TOKENS, Table
from wapo_analysis.store.files import PART_TABLES, STEP_LOG, renamed_when_whole, sync_folder
from wapo_analysis.store.lock import LOCK, RunLock
from wapo_analysis.store.manifest import read_manifest
from wapo_analysis.store.parquet import (
    arrow_type,
    current_names,
    named,
    open_part,
    parquet_writer,
    seal,
)
from wapo_analysis.store.parts import (
    STEPS_KEY,
    PartFile,
    Rows,
    joined,
    list_parts,
    merged_name,
    read_steps,
)

_ALIVE_SECONDS = 60.0
#: A row group holds whole steps: one, or as many as it takes to have this many rows.
GROUP_ROWS = 1 << 14


def merge_parts(folder: Path, rank: int, at_least: int) -> bool:
    """Merge the loose parts of one rank of a table, if there are enough.

    Returns whether a merged file was written. Raises UserError on a broken part; nothing is deleted
    then.

    Parameters
    ----------
    folder : Path
        Folder of the table.
    rank : int
        Process whose parts are merged.
    at_least : int
        Fewer parts are left as they are.
    """
    files = [part for part in list_parts(folder) if part.rank == rank]
    held = {step for part in files if part.merged for step in part.steps()}
    fresh = []
    for part in files:
        if part.merged:
            continue
        if part.first in held:  # a crash came between the rename and this
            part.path.unlink(missing_ok=True)
        else:
            fresh.append(part)
    return len(fresh) >= max(at_least, 2) and replace_files(folder, fresh)


def replace_files(folder: Path, sources: Sequence[PartFile], last: int | None = None) -> bool:
    """Write the rows of some files of one rank as one merged file, then delete those files.

    Returns whether a file was written; not if there are no rows.

    Parameters
    ----------
    folder : Path
        Folder of the table.
    sources : sequence of PartFile
        Files of one rank; of two that hold a step the first gives it.
    last : int, optional
        Leave out the steps after this one.
    """
    place: dict[int, PartFile] = {}
    rows: dict[int, int] = {}
    for source in sources:
        for step, count in _counts(source).items():
            if last is None or step <= last:
                place.setdefault(step, source)
                rows.setdefault(step, count)
    if not place:
        for source in sources:
            source.path.unlink(missing_ok=True)
        return False
    span = min(place), max(place), sources[0].rank
    target = folder / merged_name(*span)
    there = PartFile(*span, target)
    if there not in sources and target.exists():  # it may hold more steps than these
        return replace_files(folder, [there, *sources], last)
    written = sum(rows.values()) > 0
    if written:
        _write(place, rows, target)
    for source in sources:
        if source.path != target:
            source.path.unlink(missing_ok=True)
    return written


def _counts(source: PartFile) -> dict[int, int]:
    """Rows of each step of a file."""
    if source.merged:
        return {step: rows for group in source.groups() for step, rows in group.items()}
    with open_part(source.path) as file:
        return {source.first: file.metadata.num_rows}


def _grouped(rows: Mapping[int, int]) -> Iterator[list[int]]:
    """Steps of each row group to be; what has no rows of its own goes with its neighbours."""
    held: list[int] = []
    left = sum(rows.values())
    for step in sorted(rows):
        held.append(step)
        left -= rows[step]
        if left and sum(rows[s] for s in held) >= GROUP_ROWS:
            yield held
            held = []
    yield held


def _write(place: Mapping[int, PartFile], rows: Mapping[int, int], target: Path) -> None:
    """Write a merged file, a row group at a time, so that memory holds one of them."""
    schemas = []
    declared = TABLES.get(target.parent.name, TOKENS)
    for source in dict.fromkeys(place.values()):
        with open_part(source.path) as file:
            schemas.append(_schema(file.schema_arrow, declared))
    with named(target.parent):
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    _write_groups(target, rows, schema, lambda group: _rows_of(group, place, schema))
    sync_folder(target.parent)  # before anything is deleted


def write_merged(folder: Path, tables: Mapping[int, pa.Table], rank: int) -> None:
    """Write the rows of several steps, by step and all of one schema, as one merged file."""
    rows = {step: len(table) for step, table in tables.items()}
    schema = next(iter(tables.values())).schema
    target = folder / merged_name(min(tables), max(tables), rank)
    _write_groups(
        target, rows, schema, lambda group: pa.concat_tables([tables[step] for step in group])
    )


def _write_groups(
    target: Path,
    rows: Mapping[int, int],
    schema: pa.Schema,
    rows_of: Callable[[Sequence[int]], pa.Table],
) -> None:
    groups = list(_grouped(rows))
    described = [[(step, rows[step]) for step in group] for group in groups]
    with renamed_when_whole(target) as stream:
        with parquet_writer(stream, schema) as writer:
            for group in groups:
                table = rows_of(group)
                writer.write_table(table, row_group_size=len(table))
            writer.add_key_value_metadata({STEPS_KEY: json.dumps(described).encode()})
        seal(stream)


def _schema(found: pa.Schema, declared: Table) -> pa.Schema:
    """Schema of a file with declared columns in their types."""
    named_now = zip(current_names(found.names, declared), found, strict=True)
    return pa.schema(
        (name, arrow_type(declared[name]) if name in declared else field.type)
        for name, field in named_now
    )


def _rows_of(steps: Sequence[int], place: Mapping[int, PartFile], schema: pa.Schema) -> pa.Table:
    """Rows of some steps in order, each from its file, under one schema."""
    found: dict[int, Rows] = {}
    for source in dict.fromkeys(place[step] for step in steps):
        wanted = {step for step in steps if place[step] == source}
        found |= read_steps(source, wanted)
    table = pa.concat_tables(
        [table.replace_schema_metadata(None) for table in joined(found[s] for s in steps)],
        promote_options="permissive",
    )
    for field in schema:
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)


# ---- wapo compact --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compacted:
    """Files of the tables of a run and their bytes, before and after."""

    files_before: int
    bytes_before: int
    files_after: int
    bytes_after: int


def compact(run: Path, take_over: bool = False) -> Compacted:
    """Merge all parts of a run: one file for each table and rank.

    Raises UserError if it is no run, is being written, holds a broken part, or the disk is full; no
    row is lost then. ``run``: Run folder, finished or crashed; ``take_over``: also a run that
    another process seems to write; that one stops recording if it lives.
    """
    ended = read_manifest(run).status != "running"
    if not (ended or take_over or (run / LOCK).exists()) and _fresh(run):
        raise UserError(f"{run} is being written: its log changed in the last minute; wait for it")
    try:
        files, size = _measure(run)
        lock = RunLock(run, take_over)
        try:
            for name in PART_TABLES:
                _compact_table(run / name)
        finally:
            lock.release(ended)
        return Compacted(files, size, *_measure(run))
    except OSError as error:
        raise UserError(f"cannot compact {run}: {error.strerror or error}") from error


def _compact_table(folder: Path) -> None:
    for unfinished in folder.glob(".*.parquet.*"):  # what a killed writer left beside
        unfinished.unlink(missing_ok=True)
    files = list_parts(folder)
    for rank in sorted({part.rank for part in files}):
        mine = [part for part in files if part.rank == rank]
        if len(mine) > 1:
            replace_files(folder, mine)


def _fresh(run: Path) -> bool:
    """Whether a log changed just now that no lock speaks of: version 0.1 wrote none."""
    log = run / STEP_LOG
    return log.exists() and time() - log.stat().st_mtime < _ALIVE_SECONDS


def _measure(run: Path) -> tuple[int, int]:
    sizes = [part.path.stat().st_size for name in PART_TABLES for part in list_parts(run / name)]
    return len(sizes), sum(sizes)
