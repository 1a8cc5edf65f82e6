"""Recording from several processes into one run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wapo_analysis.errors import UserError
from wapo_analysis.store import PART_TABLES, RunWriter
from wapo_analysis.store.files import MANTISSA_BITS


class PartWriter(RunWriter):
    """Writer of a process that is not the first: parts of tables and nothing else.

    Parameters are those of `RunWriter`; the manifest is ignored and nothing is rewound.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        resume_after: int | None = None,
        store_bits: int = MANTISSA_BITS,
    ) -> None:
        self._set_up(path, store_bits)
        try:
            for name in PART_TABLES:
                (path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write run folder {path}: {error.strerror}") from error

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
        """Nothing is open."""
