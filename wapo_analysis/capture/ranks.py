"""Recording from several processes into one run folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wapo_analysis.errors import UserError
from wapo_analysis.store import RunWriter


class PartWriter(RunWriter):
    """Writer of a process that is not the first: parts of tables and nothing else.

    Parameters are those of `RunWriter`; the manifest is ignored and nothing is rewound.
    """

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], resume_after: int | None = None
    ) -> None:
        self.path = path
        try:
            for name in ("tokens", "classes", "rollouts"):
                (path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write run folder {path}: {error.strerror}") from error

    def update_manifest(self, **changes: Any) -> None:
        """Leave the manifest to rank 0."""

    def append_step(self, row: Mapping[str, float]) -> None:
        """Leave the step log to rank 0."""

    def missing_vocab(self, ids: Iterable[int]) -> list[int]:
        """Leave the vocabulary to rank 0."""
        return []

    def close(self, status: str) -> None:
        """Nothing is open."""
