"""Writing a run folder."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.schema import STEPS
from wapo_analysis.store.files import (
    FULL_BITS,
    MANIFEST,
    MANTISSA_BITS,
    PART_TABLES,
    STEP_LOG,
    VOCAB,
    arrow_table,
    parquet_bytes,
    read_vocab,
    step_lines,
    write_atomic,
)
from wapo_analysis.store.manifest import Manifest, write_manifest
from wapo_analysis.store.merge import merge_parts, replace_files
from wapo_analysis.store.parts import list_parts, part_name
from wapo_analysis.table import Records

log = logging.getLogger(__name__)

MERGE_STEPS = 64
"""Steps between two merges of a run that is being written."""


class RunWriter:
    """Writes one run folder.

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

    Raises
    ------
    UserError
        If the folder already holds a run and ``resume_after`` is None, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        resume_after: int | None = None,
        store_bits: int = MANTISSA_BITS,
    ) -> None:
        self._set_up(path, store_bits)
        if resume_after is None and (path / MANIFEST).exists():
            raise UserError(
                f"{path} already holds a run; choose another folder, continue it with --resume, "
                "or delete it"
            )
        try:
            for name in PART_TABLES:
                (path / name).mkdir(parents=True, exist_ok=True)
            if resume_after is not None:
                _rewind(path, resume_after)
            self.manifest = Manifest.of(manifest)
            self.update_manifest(status="running")
        except OSError as error:
            raise UserError(f"cannot write run folder {path}: {error.strerror}") from error
        self._steps = (path / STEP_LOG).open("a", encoding="utf-8")
        self._vocab: dict[int, str] = read_vocab(path)

    def _set_up(self, path: Path, store_bits: int) -> None:
        """Check and keep what writers of every rank need."""
        if not 7 <= store_bits <= FULL_BITS:
            raise UserError(f"store_bits must be 7 to {FULL_BITS}, got {store_bits}")
        self.path, self._bits = path, store_bits
        self._loose = 0
        self._merges = True

    def update_manifest(self, **changes: Any) -> None:
        """Change manifest entries and write the manifest anew."""
        self.manifest = self.manifest.changed(changes)
        write_manifest(self.path, self.manifest)

    def append_step(self, row: Mapping[str, float]) -> None:
        """Append one line to the step log and flush it; non-finite numbers become null."""
        unknown = [name for name in row if name not in STEPS and "/" not in name]
        if unknown:
            raise unknown_name("step column", unknown[0], STEPS.names)
        clean = {name: _json_number(value) for name, value in row.items()}
        self._steps.write(json.dumps(clean) + "\n")
        self._steps.flush()

    def write_part(self, records: Records, step: int, rank: int = 0) -> None:
        """Write one whole part of a table for one step and rank."""
        file = self.path / records.table.name / part_name(step, rank)
        write_atomic(file, parquet_bytes(arrow_table(records, self._bits)))

    def merge(self, rank: int = 0) -> None:
        """Merge the parts of a rank once a step of it is whole, every `MERGE_STEPS` calls.

        A failure (a full disk, a broken part) leaves the parts as they are, says so once, and no
        more is merged.
        """
        self._loose += 1
        if self._loose < MERGE_STEPS or not self._merges:
            return
        self._loose = 0
        try:
            for name in PART_TABLES:
                merge_parts(self.path / name, rank, MERGE_STEPS)
        except Exception as error:
            self._merges = False
            log.warning("parts of %s stay unmerged (%s); wapo compact can try", self.path, error)

    def add_vocab(self, texts: Mapping[int, str]) -> None:
        """Add token id -> text entries; rewritten only when something is new."""
        if all(token in self._vocab for token in texts):
            return
        self._vocab.update(texts)
        ids = sorted(self._vocab)
        table = pa.table(
            {"token_id": pa.array(ids, pa.int32()), "text": [self._vocab[i] for i in ids]}
        )
        write_atomic(self.path / VOCAB, parquet_bytes(table))

    def named(self) -> list[int]:
        """Token ids that have a text."""
        return list(self._vocab)

    def close(self, status: str) -> None:
        """Close the step log and note how the run ended."""
        if not self._steps.closed:
            self._steps.close()
            self.update_manifest(status=status)


def _json_number(value: float) -> float | int | None:
    number = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(number, float) and not np.isfinite(number) else number


def _rewind(path: Path, last: int) -> None:
    """Drop steps and parts after ``last``, and a half-written last line."""
    log = path / STEP_LOG
    if log.exists():
        kept = [line for line, row in step_lines(log) if row["step"] <= last]
        write_atomic(log, "".join(f"{line}\n" for line in kept).encode())
    for name in PART_TABLES:
        for part in list_parts(path / name):
            if part.first > last:
                part.path.unlink(missing_ok=True)
            elif part.last > last:
                replace_files(path / name, [part], last)
