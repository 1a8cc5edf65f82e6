"""How the costs grow: with vocabulary, tokens of a step, rows of a run, steps and ranks.

    python -m experiments.bench.scaling --doc docs/scaling.md

CPU seconds on one thread, the sizes take turns, least of the rounds. The exponent is the slope of
log time over log size: 1 is "twice the size, twice the time". About four minutes; ``--quick``
takes a quarter of it and smaller sizes.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from experiments.bench.data import rlvr_rows, token_columns, token_pass
from experiments.bench.harness import Work, interleave, keep_memory, machine
from experiments.bench.read import write_rows
from wapo_analysis import Recorder, open_run
from wapo_analysis.record.tokens import TokenPass
from wapo_analysis.schema import TOKENS
from wapo_analysis.stats import token_stats
from wapo_analysis.store import RunWriter
from wapo_analysis.table import Records

ROWS, RANK_ROWS, RANK_STEPS = 64, 4_096, 4
RANKS, TOKENS_PER_RANK, STEPS = 64, 4_000_000, 1_000
"""The job that the page estimates."""


@dataclass(frozen=True)
class Growth:
    """A cost at several sizes.

    Attributes
    ----------
    what, unit : str
        The cost in words, and what a size counts.
    seconds : dict of int to float
        Least CPU seconds by size.
    """

    what: str
    unit: str
    seconds: Mapping[int, float]

    @property
    def exponent(self) -> float:
        """Slope of log time over log size, by least squares."""
        sizes, times = (np.log(list(part)) for part in (self.seconds, self.seconds.values()))
        return float(np.polyfit(sizes, times, 1)[0])

    @property
    def per_unit(self) -> float:
        """Seconds for one more, between the two largest sizes."""
        (small, little), (large, much) = list(self.seconds.items())[-2:]
        return (much - little) / (large - small)

    def row(self) -> str:
        """Line of the table."""
        places = " · ".join(
            f"{n:,}: {float(f'{1e3 * t:.3g}'):,.9g}" for n, t in self.seconds.items()
        )
        return f"| {self.what} | {self.unit} | {places} | {self.exponent:.2f} |"


def grown(what: str, unit: str, works: Mapping[int, Work], rounds: int) -> Growth:
    """Time a piece of work at several sizes."""
    times = interleave({str(size): work for size, work in works.items()}, rounds)
    return Growth(what, unit, {size: times.best(str(size)) for size in works})


def statistics(sizes: Sequence[int], rounds: int) -> Growth:
    """Token statistics of some rows over vocabularies."""
    works = {}
    for size in sizes:
        rows = rlvr_rows(ROWS, size)
        works[size] = partial(token_stats, rows.logits, rows.targets)
    return grown(f"statistics of {ROWS} tokens", "tokens of the vocabulary", works, rounds)


def recording(sizes: Sequence[int], folder: Path, rounds: int, every: int) -> Growth:
    """Recording a step of N tokens, the writer's work included: every row, or the totals alone."""
    works = {}
    for size in sizes:
        tokens = token_pass(size)
        (folder / f"{every}-{size}").mkdir()
        works[size] = partial(_record, tokens, folder / f"{every}-{size}", every)
    what = "recording a step, every row" if every else "recording a step, class totals alone"
    return grown(what, "tokens of the step", works, rounds)


def _record(tokens: TokenPass, folder: Path, every: int) -> None:
    """Write one step into a new run below a folder."""
    out = folder / f"run-{len(list(folder.iterdir()))}"
    with Recorder(out, token_every=every, synchronous=True, topk=0) as recorder:
        recorder.watch_pass(tokens)
        recorder.finish_step(1, reward=0.5)


def summaries(steps: Sequence[int], folder: Path, rounds: int) -> tuple[Growth, float]:
    """Class summary of all rows of runs that grow, and bytes of a row."""
    works: dict[int, Work] = {}
    for count in steps:
        run = folder / f"run-{count}"
        tokens = write_rows(run, count)
        works[count * 32_768] = _fresh(run, lambda found: found.summary())
    size = sum(file.stat().st_size for file in tokens.glob("*.parquet"))
    return grown("class summary", "rows of the run", works, rounds), size / max(works)


def diagnoses(sizes: Sequence[int], folder: Path, rounds: int) -> Growth:
    """Diagnosis of a run of N steps."""
    works = {}
    for size in sizes:
        writer, draw = RunWriter(folder / f"steps-{size}", {}), np.random.default_rng(0)
        for step in range(1, size + 1):
            row = {"reward": 0.3 + 0.4 * step / size, "entropy": 0.6 - 0.2 * step / size}
            noisy = {name: value + float(draw.normal(0, 0.02)) for name, value in row.items()}
            writer.append_step({"step": step, **noisy, "grad_norm": 0.4, "length": 80.0})
        writer.close("finished")
        works[size] = _fresh(folder / f"steps-{size}", lambda found: found.diagnose())
    return grown("diagnosis", "steps of the run", works, rounds)


def ranks(sizes: Sequence[int], folder: Path, rounds: int) -> Growth:
    """Class summary of a run that N processes wrote, of each as many rows."""
    works = {}
    for size in sizes:
        writer = RunWriter(folder / f"ranks-{size}", {})
        columns = token_columns(RANK_ROWS)
        for step in range(1, RANK_STEPS + 1):
            for rank in range(size):
                columns |= {"step": np.full(RANK_ROWS, step), "rank": np.full(RANK_ROWS, rank)}
                writer.write_part(Records.build(TOKENS, columns), step, rank)
        writer.close("finished")
        works[size] = _fresh(folder / f"ranks-{size}", lambda found: found.summary())
    what = f"class summary, {RANK_ROWS * RANK_STEPS:,} rows a process"
    return grown(what, "processes", works, rounds)


def _fresh(run: Path, ask: Callable[..., object]) -> Work:
    return lambda: ask(open_run(run))


PAGE = Path(__file__).with_suffix(".md")


def page(found: Mapping[str, Growth], bytes_per_row: float, command: str, machine: str) -> str:
    """The page in Markdown."""
    tokens, everything, share = TOKENS_PER_RANK, RANKS * TOKENS_PER_RANK, 1 / 64
    full = found["rows"].per_unit * tokens
    totals = found["totals"].per_unit * tokens
    read, disk = found["summary"].per_unit * everything, bytes_per_row * everything / 1e9
    return PAGE.read_text(encoding="utf-8").format(
        command=command, machine=machine, ranks=RANKS, tokens=f"{tokens / 1e6:g}", steps=STEPS,
        rows="\n".join(growth.row() for growth in found.values()),
        full=full, totals=totals, some=totals + share * (full - totals),
        disk=disk, little=disk * share, disk_all=disk * STEPS, little_all=disk * share * STEPS,
        read=read, read_some=read * share,
    )  # fmt: skip


def measure(folder: Path, quick: bool) -> tuple[dict[str, Growth], float]:
    """All growths, and the bytes of a stored row."""
    cut, rounds = (2, 2) if quick else (0, 5)

    def sizes(*all_sizes: int) -> Sequence[int]:
        return all_sizes[: len(all_sizes) - cut]

    found = {"vocabulary": statistics(sizes(2_048, 8_192, 32_768, 131_072), rounds)}
    found["rows"] = recording(sizes(16_384, 65_536, 262_144, 1_048_576), folder, rounds, 1)
    found["totals"] = recording(sizes(16_384, 65_536, 262_144, 1_048_576), folder, rounds, 0)
    found["summary"], bytes_per_row = summaries(sizes(8, 32, 128, 256), folder, rounds)
    found["ranks"] = ranks(sizes(1, 4, 16, 64), folder, rounds)
    found["steps"] = diagnoses(sizes(200, 1_000, 5_000, 20_000), folder, rounds)
    return found, bytes_per_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--doc", type=Path, help="also write the page here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        found, bytes_per_row = measure(Path(folder), options.quick)
    command = "python -m experiments.bench.scaling --doc docs/scaling.md"
    text = page(found, bytes_per_row, command, str(machine()["cpu"]))
    if options.doc is not None:
        options.doc.write_text(text, encoding="utf-8")
    print("\n".join(growth.row() for growth in found.values()))
    print(f"{bytes_per_row:.1f} bytes a row")


if __name__ == "__main__":
    main()
