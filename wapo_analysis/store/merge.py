"""Many parts into one file, without a moment in which rows are missing.

The merged file is written beside, fsynced and renamed; only then are its parts deleted. After a
crash in between both are there, and readers take each step of each rank once.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.store.files import encoding, renamed_when_whole
from wapo_analysis.store.parts import (
    STEPS_KEY,
    PartFile,
    list_parts,
    merged_name,
    open_part,
    read_steps,
)

GROUP_ROWS = 1 << 14
"""A row group holds whole steps: one, or as many as it takes to have this many rows."""


def merge_parts(folder: Path, rank: int, at_least: int) -> bool:
    """Merge the loose parts of one rank of a table, if there are enough.

    Parameters
    ----------
    folder : Path
        Folder of the table.
    rank : int
        Process whose parts are merged.
    at_least : int
        Fewer parts are left as they are.

    Returns
    -------
    bool
        Whether a merged file was written.

    Raises
    ------
    UserError
        On a broken part; nothing is deleted then.
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

    Parameters
    ----------
    folder : Path
        Folder of the table.
    sources : sequence of PartFile
        Files of one rank; of two that hold a step the first gives it.
    last : int, optional
        Leave out the steps after this one.

    Returns
    -------
    bool
        Whether a file was written; not if there are no rows.
    """
    place: dict[int, PartFile] = {}
    rows: dict[int, int] = {}
    for source in sources:
        for step, count in _counts(source).items():
            if last is None or step <= last:
                place.setdefault(step, source)
                rows.setdefault(step, count)
    target = folder / merged_name(min(place, default=0), max(place, default=0), sources[0].rank)
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
    for source in dict.fromkeys(place.values()):
        with open_part(source.path) as file:
            schemas.append(file.schema_arrow.remove_metadata())
    schema = pa.unify_schemas(schemas, promote_options="permissive")
    groups = list(_grouped(rows))
    described = [[(step, rows[step]) for step in group] for group in groups]
    metadata = {STEPS_KEY: json.dumps(described).encode()}
    with renamed_when_whole(target) as stream:
        with pq.ParquetWriter(stream, schema.with_metadata(metadata), **encoding(schema)) as writer:
            for group in groups:
                table = _rows_of(group, place, schema)
                writer.write_table(table, row_group_size=len(table))
    _sync_folder(target.parent)


def _rows_of(steps: Sequence[int], place: Mapping[int, PartFile], schema: pa.Schema) -> pa.Table:
    """Rows of some steps in order, each from its file, under one schema."""
    found: dict[int, pa.Table] = {}
    for source in dict.fromkeys(place[step] for step in steps):
        wanted = {step for step in steps if place[step] == source}
        found |= read_steps(source, wanted)
    table = pa.concat_tables(
        [found[step].replace_schema_metadata(None) for step in steps],
        promote_options="permissive",
    )
    for field in schema:
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut before anything is deleted; where it can be."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
