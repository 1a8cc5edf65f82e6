"""Writing a run folder."""

import logging
import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.schema import STEPS
from wapo_analysis.store.files import (
    MANIFEST,
    PART_TABLES,
    STEP_LOG,
    VOCAB,
    step_line,
    step_lines,
    sync_folder,
    write_atomic,
)
from wapo_analysis.store.lock import Owner, RunLock, RunLost
from wapo_analysis.store.manifest import Manifest, write_manifest
from wapo_analysis.store.merge import merge_parts, replace_files, write_merged
from wapo_analysis.store.parquet import (
    FULL_BITS,
    MANTISSA_BITS,
    arrow_table,
    parquet_bytes,
    texts_array,
)
from wapo_analysis.store.parts import list_parts, part_name, read_vocab
from wapo_analysis.table import Records

log = logging.getLogger(__name__)

#: What is older than this outlasts a loss of power.
SYNC_SECONDS = 10.0
#: Steps between two merges of a run that is being written.
MERGE_STEPS = 32
#: Steps from which on a run that ends merges what is left: to open a file takes longest.
LAST_STEPS = 8


class PartWriter:
    """Writes the parts of a process that is not the first, and nothing else.

    Raises UserError if the folder cannot be written.

    Parameters
    ----------
    path : Path
        Folder; made if absent.
    manifest, resume_after, take_over
        Ignored: manifest, step log and vocabulary are the first process's to write.
    store_bits : int
        Mantissa bits that float32 columns keep, 7..23; 23 keeps all.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        resume_after: int | None = None,
        store_bits: int = MANTISSA_BITS,
        take_over: bool = False,
    ) -> None:
        if not 7 <= store_bits <= FULL_BITS:
            raise UserError(f"store_bits must be 7 to {FULL_BITS}, got {store_bits}")
        self.path, self._bits = path, store_bits
        self._loose, self._rank = 0, 0
        self._merges = True
        self._first: str | None = None
        try:
            for name in PART_TABLES:
                (path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write run folder {path}: {error.strerror}") from error

    @property
    def lost(self) -> bool:
        """Whether another process has taken the run over."""
        try:
            self.check()
        except RunLost:
            return True
        return False

    def check(self) -> None:
        """Raise `RunLost` if the first process has lost the run."""
        owner = Owner.of(self.path)
        if owner is None or not owner.token:  # the first process has ended, or is just beginning
            return
        if self._first is None:
            self._first = owner.token
        elif owner.token != self._first:
            raise RunLost(f"another process has taken over {self.path}")

    def write_part(self, records: Records, step: int, rank: int = 0) -> None:
        """Write one whole part of a table for one step and rank."""
        self.check()
        file = self.path / records.table.name / part_name(step, rank)
        write_atomic(file, *parquet_bytes(arrow_table(records, self._bits)))

    def write_steps(self, records: Mapping[int, Records], rank: int = 0) -> None:
        """Write the rows of some steps of a table, by step, as one file."""
        if len(records) == 1:
            for step, rows in records.items():
                self.write_part(rows, step, rank)
            return
        self.check()
        tables = {step: arrow_table(rows, self._bits) for step, rows in records.items()}
        folder = self.path / next(iter(records.values())).table.name
        write_merged(folder, tables, rank)

    def merge(self, rank: int = 0) -> None:
        """Merge the parts of a rank once a step of it is whole, every `MERGE_STEPS` calls.

        A failure (a full disk, a broken part) leaves the parts as they are, says so once, and no
        more is merged.
        """
        self._loose, self._rank = self._loose + 1, rank
        if self._loose >= MERGE_STEPS and self._merges:
            self._merge(MERGE_STEPS)

    def _merge(self, at_least: int) -> None:
        self._loose = 0
        self.check()
        try:
            for name in PART_TABLES:
                merge_parts(self.path / name, self._rank, at_least)
        except Exception as error:
            self._merges = False
            log.warning("parts of %s stay unmerged (%s); wapo compact can try", self.path, error)

    def sync(self) -> None:
        """Make what was written outlast a loss of power: a line of the log after its parts."""
        for name in PART_TABLES:
            sync_folder(self.path / name)

    def update_manifest(self, **changes: Any) -> None:
        """Leave the manifest to rank 0."""

    def append_step(self, row: Mapping[str, float]) -> None:
        """Leave the step log to rank 0."""

    def named(self) -> list[int]:
        """Leave the vocabulary to rank 0."""
        return []

    def add_vocab(self, texts: Mapping[int, str]) -> None:
        """Leave the vocabulary to rank 0."""

    def close(self, status: str) -> None:
        """Merge the parts that are left, if they are many."""
        if self._loose >= LAST_STEPS and self._merges and not self.lost:
            self._merge(LAST_STEPS)


class RunWriter(PartWriter):
    """Writes one run folder, which is this process's until `close`.

    Raises UserError if another process writes the run, the folder already holds a run and
    ``resume_after`` is None, or it cannot be written. Later, `RunLost` once another process has
    taken it over.

    Parameters
    ----------
    path : Path
        Folder; made if absent.
    manifest : mapping
        Description of the run, see `Manifest`.
    resume_after : int, optional
        Continue an existing run after this step: later steps and parts are dropped.
    store_bits : int
        Mantissa bits that float32 columns keep, 7..23; 23 keeps all.
    take_over : bool
        Take the run from a process that still writes it; that one notices and stops recording.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        resume_after: int | None = None,
        store_bits: int = MANTISSA_BITS,
        take_over: bool = False,
    ) -> None:
        described = Manifest.of(manifest)
        if resume_after is None:
            _refuse_run(path)
        super().__init__(path, manifest, resume_after, store_bits)
        try:
            self._lock = RunLock(path, take_over)
            try:
                self._begin(described, resume_after)
            except BaseException:
                self._lock.release(ended=resume_after is None)
                raise
        except OSError as error:
            raise UserError(f"cannot write run folder {path}: {error.strerror}") from error

    def _begin(self, manifest: Manifest, resume_after: int | None) -> None:
        if resume_after is None:
            _refuse_run(self.path)
            self._lines = 0
        else:
            self._lines = _rewind(self.path, resume_after)
        self.manifest = manifest
        self.update_manifest(status="running", step_lines=None)
        self._steps = (self.path / STEP_LOG).open("ab")
        self._synced = monotonic()
        weakref.finalize(self, self._steps.close)
        self._vocab: dict[int, str] = read_vocab(self.path)

    def check(self) -> None:
        """Raise `RunLost` if another process has taken the run over."""
        self._lock.check()

    def update_manifest(self, **changes: Any) -> None:
        """Change manifest entries and write the manifest anew."""
        self.check()
        self.manifest = self.manifest.changed(changes)
        write_manifest(self.path, self.manifest)

    def append_step(self, row: Mapping[str, float]) -> None:
        """Append one line to the step log and flush it; non-finite numbers become null."""
        unknown = [name for name in row if "/" not in name and name not in STEPS]
        if unknown:
            said = str(unknown_name("step column", unknown[0], STEPS.names))
            own = f"{unknown[0]!r} (one of your own has a slash, as 'loop/{unknown[0]}')"
            raise UserError(said.replace(f"{unknown[0]!r}", own, 1))
        self.check()
        if not os.fstat(self._steps.fileno()).st_nlink:
            raise UserError(f"{self.path / STEP_LOG} was deleted while it was being written")
        self._steps.write(step_line(row))
        self._steps.flush()
        self._lines += 1
        if monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make what was written outlast a loss of power: a line of the log after its parts."""
        super().sync()
        os.fsync(self._steps.fileno())
        sync_folder(self.path)
        self._synced = monotonic()

    def add_vocab(self, texts: Mapping[int, str]) -> None:
        """Add token id -> text entries; rewritten only when something is new."""
        if all(token in self._vocab for token in texts):
            return
        self.check()
        self._vocab.update(texts)
        ids = sorted(self._vocab)
        texts = texts_array([self._vocab[i] for i in ids])
        table = pa.table({"token_id": pa.array(ids, pa.int32()), "text": texts})
        write_atomic(self.path / VOCAB, *parquet_bytes(table))

    def named(self) -> list[int]:
        """Token ids that have a text."""
        return list(self._vocab)

    def close(self, status: str) -> None:
        """Close the step log, note how the run ended, and give it back."""
        if self._steps.closed:
            return
        noted = False
        try:
            super().close(status)
            with self._steps:
                self.sync()
            if not self.lost:
                self.update_manifest(status=status, step_lines=self._lines)
                sync_folder(self.path)
                noted = True
        finally:
            self._lock.release(ended=noted)


def _refuse_run(path: Path) -> None:
    if (path / MANIFEST).exists():
        raise UserError(
            f"{path} already holds a run; choose another folder, continue it with --resume, "
            "or delete it"
        )


def copy_steps(source: Path, target: Path, last: int) -> None:
    """Copy the steps of a run up to ``last`` into a new folder; the manifest is not copied.

    Parts are linked where the file system can: they are never written again in place. Raises
    UserError if the folder cannot be written.
    """
    try:
        for name in PART_TABLES:
            (target / name).mkdir(parents=True, exist_ok=True)
            for part in list_parts(source / name):
                if part.first <= last:
                    _link(part.path, target / name / part.path.name)
        for name in (STEP_LOG, VOCAB):
            if (source / name).exists():
                shutil.copyfile(source / name, target / name)
        _rewind(target, last)
    except OSError as error:
        raise UserError(f"cannot write run folder {target}: {error.strerror}") from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _rewind(path: Path, last: int) -> int:
    """Drop steps and parts after ``last``, and a half-written last line; returns the lines left."""
    log, kept = path / STEP_LOG, []
    if log.exists():
        kept = [row for row in step_lines(log) if row["step"] <= last]
        write_atomic(log, b"".join(step_line(row) for row in kept))
    for name in PART_TABLES:
        for part in list_parts(path / name):
            if part.first > last:
                part.path.unlink(missing_ok=True)
            elif part.last > last:
                replace_files(path / name, [part], last)
    return len(kept)
