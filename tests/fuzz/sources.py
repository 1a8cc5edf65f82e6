"""Whole inputs of every kind that a reader or a command takes, small, made once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tests.support import import_sources as made
from tests.support.builders import write_fake_run
from wapo_analysis.store.merge import compact

DATA = Path(__file__).parents[1] / "data"
STEPS = 4


def _table(folder: Path, name: str) -> None:
    table = pa.table(made.token_columns(24, STEPS))
    file = folder / name
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    elif file.suffix == ".jsonl":
        made.write_lines(file, table.to_pylist())
    elif file.suffix == ".json":
        file.write_text(json.dumps(table.to_pylist()))
    else:
        mark = "\t" if file.suffix == ".tsv" else ","
        pyarrow.csv.write_csv(table, file, pyarrow.csv.WriteOptions(delimiter=mark))


def _lists(folder: Path) -> None:
    """One rollout a row, its tokens in lists."""
    rows = [
        {"step": 1 + i // 2, "rollout": i % 2, "advantage": 1.0 - i % 2,
         "logp": [-0.5, -0.1, -2.0], "entropy": [0.4, 0.2, 1.0], "token_id": [3, 4, 5]}
        for i in range(2 * STEPS)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "l.parquet")


def _steps_csv(folder: Path) -> None:
    lines = ["step,reward,entropy,grad_norm", *(f"{s},0.{s},1.{s},0.5" for s in range(1, 30))]
    (folder / "s.csv").write_text("\n".join(lines) + "\n")


def _rollouts(folder: Path) -> None:
    rows = [{"step": s, "prompt": f"p{i}", "completion": f"c{s}", "reward": float(i % 2)}
            for s in range(1, STEPS + 1) for i in range(3)]  # fmt: skip
    made.write_lines(folder / "r.jsonl", rows)


def _settings(folder: Path) -> None:
    (folder / "train.toml").write_text(
        'objective = "grpo"\nsteps = 2\nprompts_per_step = 2\nrollouts_per_prompt = 2\nlr = 1e-4\n'
        'minibatches = 1\nmax_new_tokens = 6\ninclude_bins = ["neg_peak"]\ndevice = "cpu"\n'
    )


def _run(folder: Path) -> None:
    write_fake_run(folder / "r", steps=6, seed=1, loose=True)


def _merged(folder: Path) -> None:
    _run(folder)
    compact(folder / "r")


SOURCES: dict[str, Callable[[Path], object]] = {
    "official": lambda folder: shutil.copytree(DATA / "official_run", folder, dirs_exist_ok=True),
    "prime-rl exports": lambda folder: made.write_prime_exports(folder, 2, 1),
    "prime-rl traces": lambda folder: made.write_prime_monitor(folder, 2),
    "verl": lambda folder: made.write_verl(folder, STEPS),
    "verl with uid": lambda folder: made.write_verl(folder, 2, uid=True),
    "trl": lambda folder: made.write_trl(folder, STEPS),
    "csv": lambda folder: _table(folder, "t.csv"),
    "tsv": lambda folder: _table(folder, "t.tsv"),
    "json": lambda folder: _table(folder, "t.json"),
    "jsonl": lambda folder: _table(folder, "t.jsonl"),
    "parquet": lambda folder: _table(folder, "t.parquet"),
    "lists": _lists,
    "steps": _steps_csv,
    "rollouts": _rollouts,
}
"""What ``wapo import`` reads."""
OTHERS: dict[str, Callable[[Path], object]] = {
    "run": _run,
    "merged run": _merged,
    "settings": _settings,
    "tasks": lambda folder: shutil.copytree(DATA / "tasks", folder, dirs_exist_ok=True),
}


def make_all(folder: Path) -> dict[str, Path]:
    """Make every kind of input below a folder."""
    places = {}
    for kind, make in (SOURCES | OTHERS).items():
        places[kind] = folder / kind
        places[kind].mkdir(parents=True)
        make(places[kind])
    return places
