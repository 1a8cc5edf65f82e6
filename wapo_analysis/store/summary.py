"""Totals per step and class straight from the token rows, a row group at a time.

Only seven columns are read and only sums are kept, so memory does not grow with the run. The class
is computed from the stored statistics exactly as :func:`wapo_analysis.derive.derived_columns` does.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from errno import ENOENT
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import wapo_taxonomy as tax

from wapo_analysis.derive import CLASS_ORDER, UPDATE_STATISTICS, class_names, update_columns
from wapo_analysis.errors import UserError, first_line, unknown_name
from wapo_analysis.store.files import MANIFEST
from wapo_analysis.store.parquet import named, open_part, verify
from wapo_analysis.store.parts import list_parts, settled
from wapo_analysis.table import Array

Engine = Literal["auto", "pyarrow", "duckdb"]
_ENGINES = ("auto", "pyarrow", "duckdb")
#: Class codes from -1 on, shifted to begin at 0.
_CODES = len(CLASS_ORDER)
# Rows at a time: a dozen float64 columns of it stay in the second-level cache, and each is below
# the size (128 KiB) from which glibc maps memory anew.
_BLOCK = 1 << 13
_DUCKDB_CPUS = 4

#: A file, and the steps to take from it (None: all).
Source = tuple[Path, frozenset[int] | None]


def class_summary(
    source: str | Path | Iterable[str | Path],
    temperature: float = 1.0,
    engine: Engine = "auto",
    by: Sequence[str] = ("step", "cls"),
) -> pd.DataFrame:
    """Tokens, entropy, predicted entropy change and gradient mass by step and class.

    The same as, and several times faster than, ``Run.tokens().groupby(["step", "cls"])`` with sums
    and means of its derived columns. Returns the keys in order, ``tokens``, ``entropy`` (mean,
    nats), ``pred_dentropy_sum`` (first-order dH of a unit step, nats) and ``grad_mass`` (sum of
    |dL/dz|). A statistic that is missing is left out of its sum; where it is missing on every token
    the sum is NaN. Raises UserError on an unknown engine or key, DuckDB asked for and absent, no
    files, or a broken file.

    Parameters
    ----------
    source : path, or iterable of paths
        Run folder, folder of token parts, or Parquet files with the columns of ``tokens``.
    temperature : float
        Softmax temperature of the recorded statistics.
    engine : {"auto", "pyarrow", "duckdb"}
        What reads and adds up. auto takes DuckDB where it is installed and has four CPUs or more
        to spread over; on one, pyarrow with numpy takes three quarters of its time.
    by : sequence of str
        ``step``, ``cls`` or both.
    """
    if engine not in _ENGINES:
        raise unknown_name("engine", engine, _ENGINES)
    if not by or not set(by) <= {"step", "cls"}:
        raise UserError(f"by must be 'step', 'cls' or both, got {list(by)}")
    installed = find_spec("duckdb") is not None
    if engine == "duckdb" and not installed:
        raise UserError("engine 'duckdb' needs DuckDB: pip install 'wapo-analysis[fast]'")
    paths = [source] if isinstance(source, str | Path) else list(source)
    chosen = installed and _cpus() >= _DUCKDB_CPUS if engine == "auto" else engine == "duckdb"
    return settled(partial(_summary, [Path(path) for path in paths], temperature, chosen, by))


def _cpus() -> int:
    """CPUs this process may use."""
    may = getattr(os, "sched_getaffinity", None)
    return len(may(0)) if may is not None else os.cpu_count() or 1


def _summary(
    paths: Sequence[Path], temperature: float, duckdb: bool, by: Sequence[str]
) -> pd.DataFrame:
    sources = [source for path in paths for source in _sources(path)]
    if not sources:
        raise UserError(f"no token rows in {', '.join(map(str, paths)) or 'no files'}")
    # Rows that two files hold are rare (a crash during a merge); they are left to the exact reader.
    overlap = any(steps is not None for _, steps in sources)
    if duckdb and not overlap:
        cells = _by_duckdb([path for path, _ in sources], temperature)
        if cells is not None:
            return _table(cells, by)
    return _table(_by_arrow(sources, temperature), by)


def _sources(path: Path) -> Iterator[Source]:
    """Files behind a path, and which of their steps no file before them has given."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"no token rows at {path}; give a run folder or Parquet files")
        yield path, None
        return
    folder = path / "tokens" if (path / MANIFEST).exists() else path
    known: set[tuple[int, int]] = set()
    for part in list_parts(folder):
        steps = part.steps()
        new = frozenset(step for step in steps if (step, part.rank) not in known)
        known.update((step, part.rank) for step in new)
        if new:
            yield part.path, None if len(new) == len(steps) else new


# ---- pyarrow decodes, numpy adds up --------------------------------------------------------------


def _by_arrow(sources: Sequence[Source], temperature: float) -> pd.DataFrame:
    """Sums by step and class code of all files."""
    sums: dict[int, Array] = {}
    for path, steps in sources:
        with named(path), open_part(path) as file:
            for number in range(file.num_row_groups):
                for step, cells in _group_sums(file, number, steps, temperature):
                    sums[step] = sums[step] + cells if step in sums else cells
    rows = [
        (step, code - 1, *cells[:, code])
        for step, cells in sorted(sums.items())
        for code in range(_CODES)
        if cells[0, code]
    ]
    return pd.DataFrame(rows, columns=["step", "cls", *_SUMS])


_SUMS = ("tokens", "entropy", "entropy_known", "pred", "pred_known", "mass", "mass_known")


def _group_sums(
    file: pq.ParquetFile, number: int, steps: frozenset[int] | None, temperature: float
) -> Iterator[tuple[int, Array]]:
    """Sums of each step of a row group, shape (sums, codes), block by block."""
    step = _only_step(file, number)
    if step is not None and steps is not None and step not in steps:
        return
    columns = [*UPDATE_STATISTICS, *(["step"] if step is None else [])]
    table = file.read_row_group(number, columns=columns)
    given = {name: _numpy(table[name]) for name in columns}
    for start in range(0, len(table), _BLOCK):
        block = {name: values[start : start + _BLOCK] for name, values in given.items()}
        if step is not None:
            yield step, _block_sums(block, temperature)
            continue
        for one in np.unique(block["step"]).tolist():
            if steps is None or one in steps:
                mine = block["step"] == one
                yield one, _block_sums({n: v[mine] for n, v in block.items()}, temperature)


def _only_step(file: pq.ParquetFile, number: int) -> int | None:
    """Step of a row group that holds but one, told by its statistics."""
    group = file.metadata.row_group(number)
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == "step":
            found = column.statistics
            if found is not None and found.has_min_max and found.min == found.max:
                return int(found.min) if isinstance(found.min, int) else None
    return None


def _numpy(column: pa.ChunkedArray) -> Array:
    """Values of a column, null as NaN; ValueError if they are no numbers."""
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise ValueError(f"a column holds {column.type} where numbers are needed")
    return np.asarray(column.to_numpy())


def _block_sums(block: dict[str, Array], temperature: float) -> Array:
    """Sums by class code, shape (sums, codes); every column has shape (rows,)."""
    update = update_columns(block, temperature)
    code = update["cls"] + 1
    counts = np.bincount(code, minlength=_CODES)
    sums = [counts]
    entropy = block["entropy"].astype(np.float64)
    for values in (entropy, update["pred_dentropy"], update["grad_norm"]):
        known, counted = values, counts
        missing = np.isnan(values)
        if missing.any():
            known = np.where(missing, 0.0, values)
            counted = np.bincount(code[~missing], minlength=_CODES)
        sums += [np.bincount(code, known, _CODES), counted]
    return np.stack(sums)


# ---- DuckDB --------------------------------------------------------------------------------------

# q = 1 - p keeps its digits: near p = 1 it is the series of -(exp(l) - 1), whose next term is below
# 1e-14 of it, and from l = -1/1000 on the difference is exact to 1e-13. Sums skip null but not NaN:
# one NaN shows in a sum, that of the advantages included, and pyarrow's reader takes over.
_QUERY = """
with stored as (
  select step, advantage as a, logp::double as l, entropy::double as h,
    collision_rest::double as r, collision_logp_rest::double as lr, coef::double as c,
    exp(logp::double) as p
  from read_parquet($files)
), given as (
  select *, if(l > -0.001, -l * (1 + l * (0.5 + l * (1 / 6 + l * (1 / 24)))), 1 - p) as q
  from stored
), coded as (
  select step, a, h,
    if(a = 0, 4::utinyint,
      (a < 0)::utinyint * 2::utinyint + (p * q < r * $border)::utinyint) as cls,
    c * (lr + r * h - p * q * (l + h)) as pred,
    abs(c) * sqrt(q * q + r) as mass
  from given
)
select step, coalesce(cls::integer, -1) as cls, count(*)::double as tokens,
  sum(h) as entropy, count(h)::double as entropy_known,
  sum(pred) / $squared as pred, sum(mass) / $temperature as mass, sum(a) as advantage
from coded group by step, cls order by step, cls
"""


def _by_duckdb(files: Sequence[Path], temperature: float) -> pd.DataFrame | None:
    """Sums by step and class code of all files, in one query; None if a value is NaN."""
    import duckdb

    given = {
        "files": [str(file) for file in files],
        "border": 1 - tax.TIE_TOLERANCE,
        "temperature": float(temperature),
        "squared": float(temperature) ** 2,
    }
    for file in files:
        verify(file)  # DuckDB does not
    try:
        with duckdb.connect() as connection:
            found = connection.execute(_QUERY, given).fetchnumpy()
    except duckdb.Error as error:
        missing = [file for file in files if not file.exists()]
        if missing:
            raise FileNotFoundError(ENOENT, "no such file", str(missing[0])) from error
        raise UserError(f"DuckDB cannot read the token rows ({first_line(error)})") from error
    sums = {name: np.ma.asarray(values) for name, values in found.items()}
    if any(np.isnan(values.compressed()).any() for values in sums.values()):
        return None
    known = {f"{name}_known": ~np.ma.getmaskarray(sums[name]) for name in ("pred", "mass")}
    filled = {name: values.filled(0) for name, values in sums.items()}
    return pd.DataFrame({**filled, **{name: held.astype(float) for name, held in known.items()}})


def _table(cells: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The table that is returned, from sums and counts by step and class code."""
    grouped: Any = cells
    if len(set(by)) == 1:
        grouped = cells.groupby(by[0])[list(_SUMS)].sum().reset_index()
    keys = {"step": lambda steps: steps.astype("int64"), "cls": class_names}
    table = pd.DataFrame(
        {
            **{key: keys[key](grouped[key]) for key in by},
            "tokens": grouped["tokens"].astype("int64"),
            "entropy": grouped["entropy"] / grouped["entropy_known"].replace(0, np.nan),
            "pred_dentropy_sum": grouped["pred"].where(grouped["pred_known"] > 0),
            "grad_mass": grouped["mass"].where(grouped["mass_known"] > 0),
        }
    )
    return table.sort_values(list(by), ignore_index=True)
