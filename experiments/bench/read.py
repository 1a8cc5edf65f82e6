"""The class summary over many token rows, ours against pandas.

Large temporaries are mapped anew, as in the process of somebody who asks once; a full bench adds,
with a key that ends in _kept, what the second call costs in a process that keeps freed memory.
"""

import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.bench.data import token_columns
from experiments.bench.errors import GateError
from experiments.bench.harness import Measures, Work, interleave, keep_memory, map_memory
from experiments.bench.memory import summary_peaks
from experiments.bench.options import Options
from experiments.bench.reference import pandas_summary, sql_summary
from wapo_analysis.derive import class_codes
from wapo_analysis.schema import TOKENS
from wapo_analysis.store import RunWriter
from wapo_analysis.store.parquet import verify
from wapo_analysis.store.summary import Engine, class_summary
from wapo_analysis.table import Records

_STEP_ROWS = 32_768
_QUICK_ROWS = 1_000_000
_COLUMNS = ("tokens", "entropy", "pred_dentropy_sum", "grad_mass")


def measure(options: Options) -> Measures:
    """Time of the summary by step and class; in a full bench also its peak memory."""
    rows = min(options.rows, _QUICK_ROWS) if options.quick else options.rows
    steps = max(1, rows // _STEP_ROWS)
    note = f"{steps * _STEP_ROWS / 1e6:.1f} M rows"
    with tempfile.TemporaryDirectory() as folder:
        options.say(f"read: writing {note}")
        tokens = write_rows(Path(folder) / "run", steps)
        files = sorted(tokens.glob("*.parquet"))
        check(files)
        options.say("read: class summary, ours and pandas'")
        map_memory()
        try:
            found = _ratios(files, options, note)
        finally:
            keep_memory()
        if options.quick:
            return found
        kept = _ratios(files, options, note)
        found |= {f"{key}_kept": measure for key, measure in kept.items()}
        return found | summary_peaks(tokens, options)


def _ratios(files: list[Path], options: Options, note: str) -> Measures:
    times = interleave(_variants(files), options.rounds_or(3, 3))
    found = {"summary_time_vs_pandas": times.ratio("pyarrow", "pandas", note)}
    if "duckdb" in times.seconds:
        found["summary_time_vs_pandas_duckdb"] = times.ratio("duckdb", "pandas", note)
        found["summary_duckdb_vs_sql"] = times.ratio("duckdb", "sql", note)
        found["summary_verify_vs_sql"] = times.ratio("verify", "sql", note)
    return found


def write_rows(run: Path, steps: int) -> Path:
    """Write a run and return its token folder; eight steps repeat under new numbers."""
    writer = RunWriter(run, {})
    templates = [token_columns(_STEP_ROWS, step) for step in range(1, min(steps, 8) + 1)]
    for step in range(1, steps + 1):
        columns = templates[step % len(templates)]
        columns["step"] = np.full(_STEP_ROWS, step)
        writer.write_part(Records.build(TOKENS, columns), step)
    writer.close("finished")
    return run / "tokens"


def _variants(files: list[Path]) -> dict[str, Work]:
    variants: dict[str, Work] = {"pandas": lambda: pandas_summary(files, 1.0)}
    for engine in _engines():
        variants[engine] = partial(class_summary, files, 1.0, engine)
    if "duckdb" in variants:
        variants |= {"sql": partial(sql_summary, files), "verify": partial(_verify, files)}
    return variants


def _verify(files: list[Path]) -> None:
    """Check the checksums of all files, and nothing else."""
    for file in files:
        verify(file)


def _engines() -> list[Engine]:
    """Engines that can run here."""
    return ["pyarrow", "duckdb"] if find_spec("duckdb") is not None else ["pyarrow"]


def check(files: list[Path]) -> None:
    """Compare the summaries of the first files, all engines against pandas.

    Raises
    ------
    GateError
        If a number differs by more than 1e-9 of the column's greatest.
    """
    some = files[:4]
    expected = pandas_summary(some, 1.0).sort_values(["step", "cls"])
    for engine in _engines():
        found = class_summary(some, 1.0, engine)
        found = found.assign(cls=class_codes(found["cls"])).sort_values(["step", "cls"])
        for column in ("step", "cls", *_COLUMNS):
            if not _equal(found[column], expected[column]):
                raise GateError(f"summary by {engine} is not timed, column {column} differs")


def _equal(found: pd.Series, expected: pd.Series) -> bool:
    a, b = found.to_numpy(np.float64), expected.to_numpy(np.float64)
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max()))
