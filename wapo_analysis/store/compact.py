"""Merging a run by hand: ``wapo compact``."""

from dataclasses import dataclass
from pathlib import Path
from time import time

from wapo_analysis.errors import UserError
from wapo_analysis.store.files import PART_TABLES, STEP_LOG
from wapo_analysis.store.manifest import read_manifest
from wapo_analysis.store.merge import replace_files
from wapo_analysis.store.parts import list_parts

_ALIVE_SECONDS = 60.0


@dataclass(frozen=True)
class Compacted:
    """Files of the tables of a run and their bytes, before and after."""

    files_before: int
    bytes_before: int
    files_after: int
    bytes_after: int


def compact(run: Path, force: bool = False) -> Compacted:
    """Merge all parts of a run: one file for each table and rank.

    Parameters
    ----------
    run : Path
        Run folder, finished or crashed.
    force : bool
        Also merge a run that may still be written.

    Raises
    ------
    UserError
        If it is no run, may still be written, holds a broken part, or the disk is full; no row is
        lost then.
    """
    manifest = read_manifest(run)
    if manifest.status == "running" and not force and _fresh(run):
        raise UserError(
            f"{run} is being written: its log changed in the last minute; wait for its end, or "
            "give --force if its process is gone"
        )
    files, size = _measure(run)
    try:
        for name in PART_TABLES:
            _compact_table(run / name)
    except OSError as error:
        raise UserError(f"cannot compact {run}: {error.strerror or error}") from error
    return Compacted(files, size, *_measure(run))


def _compact_table(folder: Path) -> None:
    for unfinished in folder.glob(".*.parquet.*"):  # what a killed writer left beside
        unfinished.unlink(missing_ok=True)
    files = list_parts(folder)
    for rank in sorted({part.rank for part in files}):
        mine = [part for part in files if part.rank == rank]
        if len(mine) > 1:
            replace_files(folder, mine)


def _fresh(run: Path) -> bool:
    log = run / STEP_LOG
    return log.exists() and time() - log.stat().st_mtime < _ALIVE_SECONDS


def _measure(run: Path) -> tuple[int, int]:
    sizes = [part.path.stat().st_size for name in PART_TABLES for part in list_parts(run / name)]
    return len(sizes), sum(sizes)
