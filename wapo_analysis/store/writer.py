"""Writing a run folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.schema import SCHEMA_VERSION, STEPS
from wapo_analysis.store.files import (
    MANIFEST,
    PART_TABLES,
    STEP_LOG,
    VOCAB,
    arrow_table,
    parquet_bytes,
    part_step,
    read_vocab,
    step_lines,
    write_atomic,
)
from wapo_analysis.table import Records


class RunWriter:
    """Writes one run folder.

    Parameters
    ----------
    path : Path
        Folder; made if absent.
    manifest : mapping
        Description of the run (JSON values); schema version is added.
    resume_after : int, optional
        Continue an existing run after this step: later steps and parts are dropped.

    Raises
    ------
    UserError
        If the folder already holds a run and ``resume_after`` is None, or cannot be written.
    """

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], resume_after: int | None = None
    ) -> None:
        self.path = path
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
            self.manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **manifest}
            self.update_manifest(status="running")
        except OSError as error:
            raise UserError(f"cannot write run folder {path}: {error.strerror}") from error
        self._steps = (path / STEP_LOG).open("a", encoding="utf-8")
        self._vocab: dict[int, str] = read_vocab(path)

    def update_manifest(self, **changes: Any) -> None:
        """Change manifest entries and write the manifest anew."""
        self.manifest.update(changes)
        text = json.dumps(self.manifest, indent=1, sort_keys=False, default=str)
        write_atomic(self.path / MANIFEST, text.encode())

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
        name = f"part-{step:08d}-{rank}.parquet"
        write_atomic(self.path / records.table.name / name, parquet_bytes(arrow_table(records)))

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

    def missing_vocab(self, ids: Iterable[int]) -> list[int]:
        """Token ids that have no text yet."""
        return [token for token in ids if token not in self._vocab]

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
        for part in (path / name).glob("part-*.parquet"):
            if part_step(part) > last:
                part.unlink()
