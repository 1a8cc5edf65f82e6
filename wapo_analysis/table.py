"""A table in memory: equal-length 1-D numpy arrays under the names the schema declares."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.schema import Table

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Records:
    """Rows of one declared table, column by column; never changed in place.

    ``table``: declaration the columns follow; ``columns`` (rows,): values; use :meth:`build` to
    coerce and validate.
    """

    table: Table
    columns: Mapping[str, Array]

    @classmethod
    def build(cls, table: Table, columns: Mapping[str, Any]) -> "Records":
        """Coerce to the declared dtypes, fill absent optional columns, check names and lengths.

        Raises UserError on an unknown column, a missing required one, or unequal lengths.
        """
        unknown = [name for name in columns if name not in table]
        if unknown:
            raise unknown_name(f"column of table {table.name!r}", unknown[0], table.names)
        missing = [name for name in table.required if name not in columns]
        if missing:
            raise UserError(f"table {table.name!r} needs column {missing[0]!r}, which is missing")
        lengths = {name: np.shape(values) for name, values in columns.items()}
        shapes = set(lengths.values())
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            raise UserError(f"columns of table {table.name!r} differ in shape: {lengths}")
        rows = next(iter(shapes))[0] if shapes else 0
        built = {
            column.name: _coerce(columns.get(column.name), column.dtype, rows)
            for column in table
            if column.kind != "derived" or column.name in columns
        }
        return cls(table, built)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def select(self, rows: Array) -> "Records":
        """Rows picked by a boolean mask or an index array."""
        return Records(self.table, {name: values[rows] for name, values in self.columns.items()})

    def with_columns(self, columns: Mapping[str, Array]) -> "Records":
        """Same rows with columns added or replaced."""
        return Records(self.table, {**self.columns, **columns})

    def to_frame(self) -> pd.DataFrame:
        """Return the same columns as a data frame."""
        return pd.DataFrame(dict(self.columns))

    @staticmethod
    def concat(parts: Iterable["Records"]) -> "Records":
        """Stack the rows of tables of one kind; at least one part is needed."""
        many = list(parts)
        names = many[0].columns
        return Records(
            many[0].table, {name: _stack([p.columns[name] for p in many]) for name in names}
        )


def _stack(arrays: list[Array]) -> Array:
    stacked = np.concatenate([np.ma.getdata(values) for values in arrays])
    if not any(isinstance(values, np.ma.MaskedArray) for values in arrays):
        return stacked
    mask = np.concatenate([np.ma.getmaskarray(values) for values in arrays])
    return np.ma.masked_array(stacked, mask=mask)


def _coerce(values: Any, dtype: str, rows: int) -> Array:
    """Give values the declared dtype; absent ones become NaN, None, or False for flags."""
    if dtype == "str":
        return np.asarray([None] * rows if values is None else values, dtype=object)
    if values is not None:
        # A masked entry of an integer or a flag is missing; floats have NaN for that.
        given = values if isinstance(values, np.ma.MaskedArray) else np.asarray(values)
        return given.astype(dtype, copy=False)
    if dtype.startswith("float"):
        return np.full(rows, np.nan, dtype=dtype)
    return np.zeros(rows, dtype=dtype)
