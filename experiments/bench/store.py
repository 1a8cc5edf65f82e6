"""Bytes and speed of the token records against compressed npz and JSON lines."""

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from experiments.bench.data import token_columns, token_records
from experiments.bench.harness import Measure, Measures, Work, interleave
from experiments.bench.options import Options
from experiments.bench.reference import jsonl_bytes, npz_bytes, official_plots
from wapo_analysis.derive import class_totals, derive
from wapo_analysis.record.step import StepJob
from wapo_analysis.schema import TOKENS
from wapo_analysis.store import RunWriter
from wapo_analysis.table import Array, Records

_ROWS = 32_768
_TOTAL_ROWS = 1 << 20


def measure(options: Options) -> Measures:
    """Size and speed of writing one step of 32768 tokens, to disk and fsynced on our side."""
    options.say(f"store: one step of {_ROWS} tokens as parquet, npz, JSON lines")
    records = token_records(_ROWS)
    stored = _stored(records)
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder) / "run", {})
        times = interleave(
            {
                "ours": lambda: writer.write_part(records, 1),
                "npz": lambda: npz_bytes(stored),
                "jsonl": lambda: jsonl_bytes(stored),
            },
            options.rounds_or(5, 15),
        )
        size = sum(f.stat().st_size for f in (Path(folder) / "run" / "tokens").iterdir())
        note = f"{_ROWS} tokens, all columns but the scores after the update"
        found = {
            "store_bytes_per_token": Measure(size / _ROWS, note=note),
            "npz_bytes_per_token": Measure(len(npz_bytes(stored)) / _ROWS, note=note),
            "jsonl_bytes_per_token": Measure(len(jsonl_bytes(stored)) / _ROWS, note=note),
            "store_rows_per_s": Measure(_ROWS / times.best("ours"), note="best round"),
            "store_rows_per_s_vs_npz": times.ratio("npz", "ours", note),
            "store_rows_per_s_vs_jsonl": times.ratio("jsonl", "ours", note),
        }
        found |= _totals(options)
        if not options.quick:
            found |= _commit(writer, records, options)
        writer.close("finished")
    return found


def _totals(options: Options) -> Measures:
    """Class totals of a step in blocks of rows, as the writer makes them, against all at once."""
    options.say(f"store: class totals of {_TOTAL_ROWS} rows in blocks and at once")
    rows = token_records(_TOTAL_ROWS)
    tokens = Records(TOKENS, {column.name: rows[column.name] for column in TOKENS.stored})

    def job() -> None:
        StepJob({"step": 1}, [], [tokens], frozenset(), []).condense()

    times = interleave(
        {"blocks": job, "whole": lambda: class_totals(derive(tokens, 1.0))},
        options.rounds_or(3, 9),
    )
    note = f"{_TOTAL_ROWS} rows"
    per_row = [1e9 * seconds / _TOTAL_ROWS for seconds in times.seconds["blocks"]]
    return {
        "totals_blocks_vs_whole": times.ratio("blocks", "whole", note),
        "totals_ns_per_row": Measure(median(per_row), min(per_row), max(per_row), note),
    }


def _stored(records: Records) -> dict[str, Array]:
    """Columns as an npz or JSON lines would hold them: the measured ones, in their own widths."""
    later = {column.name for column in TOKENS if column.kind == "later"}
    return {name: values for name, values in records.columns.items() if name not in later}


def _commit(writer: RunWriter, records: Records, options: Options) -> Measures:
    """Wall time until a step is safe on disk, over that of eight figures a step."""
    options.say("store: commit against eight figures")
    columns = token_columns(_ROWS)
    times = interleave(
        {
            "commit": lambda: writer.write_part(records, 2),
            "figures": lambda: official_plots(columns),
        },
        options.rounds_or(3, 5),
        clock=_wall_clock,
    )
    return {"commit_vs_official_plots": times.ratio("commit", "figures", "wall time, with fsync")}


def _wall_clock(work: Work) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started
