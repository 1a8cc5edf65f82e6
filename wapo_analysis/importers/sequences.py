"""One record per completion, with aligned lists, to one row per token; numbers for names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

_HELD = 512


@dataclass
class Codes:
    """Numbers for groups and rollouts that a source names by text, from 0 within each step.

    Numbers pass through. The texts of the ``_HELD`` steps seen last are remembered.
    """

    _known: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)

    def code(self, name: str, step: int, value: Any) -> Any:
        """Number of a value; None stays None."""
        if value is None or isinstance(value, int | float | np.number):
            return value
        texts = self._of(name, step)
        return texts.setdefault(str(value), len(texts))

    def next(self, name: str, step: int) -> int:
        """Number of the next thing of a step that has no name."""
        texts = self._of(name, step)
        return texts.setdefault(f"#{len(texts)}", len(texts))

    def apply(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows with ``group`` and ``rollout`` as numbers, ``step`` given."""
        for name in ("group", "rollout"):
            if name in frame and pd.to_numeric(frame[name], errors="coerce").isna().any():
                pairs = zip(frame["step"], frame[name], strict=True)
                codes = [self.code(name, s, None if pd.isna(v) else v) for s, v in pairs]
                frame = frame.assign(**{name: pd.Series(codes, index=frame.index, dtype="float64")})
        return frame

    def _of(self, name: str, step: int) -> dict[str, int]:
        key = (name, step)
        if key not in self._known and len(self._known) >= _HELD:
            self._known.pop(next(iter(self._known)))
        return self._known.setdefault(key, {})


def sequence_rows(values: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of one completion: lists are columns, single values are repeated.

    Parameters
    ----------
    values : mapping
        Columns of the ``tokens`` table (and ``loss_mask``) to lists of one length, or to values.

    Returns
    -------
    DataFrame
        Rows of the loss mask; ``position`` counts them from 0 unless it is given.

    Raises
    ------
    ValueError
        If the lists differ in length.
    """
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    lengths = {name: len(value) for name, value in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists of different length {lengths}")
    rows = next(iter(lengths.values()), 1)
    frame = pd.DataFrame({name: [v] * rows for name, v in values.items() if name not in lists})
    for name, value in lists.items():
        frame[name] = value
    if "loss_mask" in frame:
        inside = frame["loss_mask"].fillna(0).astype(bool)
        frame = frame[inside].drop(columns="loss_mask").reset_index(drop=True)
    if "position" not in frame:
        frame["position"] = np.arange(len(frame))
    return frame
