r"""Where does each objective hold, and where does it fail? A map over learning rate and updates.

Trains every objective at every learning rate, number of passes and seed, on both embedded tasks,
and reads off each finished run's own reward whether it kept what it had learned. Resumable; stops
starting new runs when the minutes are over; seeds come one after the other, so that whatever is
finished covers the whole map. About three hours on one slow core.

    python experiments/stability_map.py --out runs/stability --minutes 180
    python experiments/stability_map.py --out runs/stability --part again
    python experiments/stability_map.py --out runs/stability --doc docs/stability.md

The last line trains nothing: it writes the page and its picture from the results so far.
"""

import argparse
import json
import math
import os
import random
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from time import monotonic, process_time
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from scipy.stats import beta

from wapo_analysis import TrainConfig, open_run
from wapo_analysis.plots.style import new_figure, save_figure

STEPS = 40
BASE = TrainConfig(
    steps=STEPS, prompts_per_step=8, checkpoint_every=0, token_every=0, rescore_every=0,
    eval_every=STEPS // 2, eval_prompts=128, eval_samples=1,
)  # fmt: skip
TASKS = ("chain-sum", "two-hop")
EPOCHS = (1, 4)
LRS = (5e-5, 1e-4, 2e-4)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {},
    "dapo": {},
    "gspo": {},
    "raft++": {},
    "wapo": {},
    "wapo, clip 0.2": {"objective": "wapo", "clip_eps": 0.2},
}
SWITCHES: dict[str, dict[str, Any]] = {
    "wapo, mean per rollout": {"objective": "wapo", "loss_mean_level": "seq"},
    "wapo, no ratio": {"objective": "wapo", "use_importance_sampling": False},
    "wapo, sgd": {"objective": "wapo", "optimizer": "sgd"},
    "grpo, sgd": {"objective": "grpo", "optimizer": "sgd"},
    "grpo, positives only": {"objective": "grpo", "mask_negative_advantages": True},
}
"""Parts of WAPO changed one at a time: what makes it fail, or hold?"""
SGD_SCALE = 1200.0
"""Learning rate of SGD per learning rate of AdamW: GRPO's first update then has the same norm."""
SEEDS = 5
AGAIN_SEED = 100
"""First seed of the cells that are trained again to see whether the map repeats itself."""
EDGE = 5
"""Steps (of 64 rollouts) over which the best and the last reward are averaged."""
LOST = 0.1
"""A loss of true reward that the noise of five steps (0.03) does not explain."""


@dataclass(frozen=True)
class Cell:
    """One square of the map."""

    task: str
    name: str
    epochs: int
    lr: float

    def config(self, seed: int) -> TrainConfig:
        """Settings of one of its runs."""
        settings = {"objective": self.name, **(OBJECTIVES | SWITCHES)[self.name]}
        lr = self.lr * (SGD_SCALE if settings.get("optimizer") == "sgd" else 1.0)
        return replace(
            BASE, task=self.task, epochs=self.epochs, lr=lr, seed=seed, label=self.name, **settings
        )


@dataclass(frozen=True)
class Job:
    """A run that is to be trained."""

    cell: Cell
    seed: int
    folder: Path

    @property
    def key(self) -> tuple[str, str, int, float, int]:
        """What it is known by in the results."""
        cell = self.cell
        return cell.task, cell.name, cell.epochs, cell.lr, self.seed


def cells(names: Iterable[str]) -> list[Cell]:
    """Every square of the map for these objectives."""
    return [
        Cell(task, name, epochs, lr)
        for epochs in EPOCHS
        for lr in LRS
        for name in names
        for task in TASKS
    ]


def part(name: str) -> list[tuple[Cell, int]]:
    """Runs of a part of the map: seed after seed, so that it is even wherever it stops."""
    if name == "again":
        chosen = random.Random(0).sample(cells(OBJECTIVES), 10)
        return [(cell, AGAIN_SEED + k) for k in range(SEEDS) for cell in chosen]
    squares = cells(OBJECTIVES)
    if name == "switches":
        squares = [c for c in cells(SWITCHES) if c.task == "chain-sum" and c.lr > LRS[0]]
    return [(cell, seed) for seed in range(SEEDS) for cell in squares]


# ---- training -----------------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, Any]:
    """What became of a finished run, from its step log and its class totals.

    ``failed``: it ends at least ``LOST`` below its best five steps, and at least half of what it
    had gained is gone; or its numbers broke; or it ends ``LOST`` below where it began.
    """
    run = open_run(folder)
    steps = run.steps
    reward, entropy = steps["reward"], steps["entropy"]
    start, end = float(reward.head(3).mean()), float(reward.tail(EDGE).mean())
    best = max(start, float(reward.rolling(EDGE).mean().max()))
    broken = run.manifest.status != "finished" or len(steps) < STEPS
    lost = best - end >= max(LOST, (best - start) / 2) or start - end >= LOST
    pushes = run.classes.groupby("cls", observed=True)["pred_dentropy_sum"].sum()
    drivers = pushes[pushes > 0] if entropy.tail(EDGE).mean() > entropy.head(3).mean() else -pushes
    held_out = steps["eval/reward"].dropna()
    return {
        "failed": bool(broken or lost), "start": start, "best": best, "end": end,
        "entropy_start": float(entropy.head(3).mean()),
        "entropy_end": float(entropy.tail(EDGE).mean()),
        "held_out": float(held_out.max()) if len(held_out) else math.nan,
        "held_out_end": float(held_out.iloc[-1]) if len(held_out) else math.nan,
        "driver": str(drivers.idxmax()) if len(drivers) and drivers.max() > 0 else "none",
    }  # fmt: skip


def train_one(job: Job) -> dict[str, Any]:
    """Train a run in this process, keep its outcome and delete its folder."""
    from wapo_analysis.train.loop import train
    from wapo_analysis.train.rollout import NonFiniteLogits

    shutil.rmtree(job.folder, ignore_errors=True)
    started = process_time()
    try:
        train(job.cell.config(job.seed), job.folder, threads=1)
    except NonFiniteLogits:
        pass  # the run is closed as diverged, and counts as failed
    result = {
        **asdict(job.cell), "seed": job.seed, **outcome(job.folder),
        "cpu_seconds": process_time() - started,
    }  # fmt: skip
    shutil.rmtree(job.folder)
    return result


def read_results(out: Path) -> pd.DataFrame:
    """Results so far, a row a run; empty before the first."""
    log = out / "results.jsonl"
    return pd.read_json(log, lines=True) if log.exists() else pd.DataFrame()


def _done(results: pd.DataFrame) -> set[tuple[str, str, int, float, int]]:
    if results.empty:
        return set()
    columns = ["task", "name", "epochs", "lr", "seed"]
    return set(results[columns].itertuples(index=False, name=None))


def _end_with_the_parent() -> None:
    """A worker whose parent was ended trains on for nobody."""

    def wait_for_it() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    Thread(target=wait_for_it, daemon=True).start()


def train_part(name: str, out: Path, minutes: float, workers: int) -> None:
    """Train what is not done yet of a part, until its minutes are over."""
    out.mkdir(parents=True, exist_ok=True)
    done = _done(read_results(out))
    jobs = [Job(cell, seed, out / f"run-{n}") for n, (cell, seed) in enumerate(part(name))]
    todo = [job for job in jobs if job.key not in done]
    print(f"{name}: {len(jobs) - len(todo)} of {len(jobs)} runs done", flush=True)
    ends, waiting = monotonic() + 60 * minutes, set[Future[dict[str, Any]]]()
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), _end_with_the_parent) as pool,
        (out / "results.jsonl").open("a", encoding="utf-8") as log,
    ):
        while waiting or (todo and monotonic() < ends):
            while todo and len(waiting) < workers and monotonic() < ends:
                waiting.add(pool.submit(train_one, todo.pop(0)))
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                result = future.result()
                log.write(json.dumps(result) + "\n")
                log.flush()
                print(json.dumps(result), flush=True)


# ---- the page -----------------------------------------------------------------------------------


def interval(failed: int, runs: int) -> tuple[float, float]:
    """95% interval of a share (Jeffreys)."""
    low, high = beta.ppf([0.025, 0.975], failed + 0.5, runs - failed + 0.5)
    return (0.0 if failed == 0 else float(low), 1.0 if failed == runs else float(high))


def told(failed: int, runs: int) -> str:
    """A share with its interval, for a table."""
    if not runs:
        return "not run"
    low, high = interval(failed, runs)
    return f"{failed}/{runs} ({low:.0%} to {high:.0%})"


def draw(results: pd.DataFrame, to: Path) -> None:
    """Share of failed runs: a panel an objective, a square per task, updates and learning rate."""
    figure = new_figure(height=5.6, width=11.0)
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    rows = pd.MultiIndex.from_product([TASKS, EPOCHS], names=["task", "epochs"])
    for axis, name in zip(axes.flat, OBJECTIVES, strict=False):
        mine = results[(results["name"] == name) & (results["seed"] < SEEDS)]
        failed = mine.pivot_table(index=["task", "epochs"], columns="lr", values="failed",
                                  aggfunc=["mean", "sum", "count"])  # fmt: skip
        share, bad, runs = (
            failed[what].reindex(index=rows, columns=list(LRS)) for what in ("mean", "sum", "count")
        )
        sns.heatmap(
            share, ax=axis, vmin=0, vmax=1, cmap="rocket_r", cbar=False, linewidths=1, fmt="",
            annot=np.vectorize(_square)(bad.fillna(0), runs.fillna(0)), annot_kws={"size": 8},
            xticklabels=[f"{lr:g}" for lr in LRS],
            yticklabels=[f"{task}, {epochs * 4} updates" for task, epochs in rows],
        )  # fmt: skip
        axis.set(xlabel="learning rate", ylabel="")
        axis.set_title(f"{name}: {int(mine.failed.sum())} of {len(mine)} failed", fontsize=10)
    for axis in axes.flat[len(OBJECTIVES) :]:
        axis.set_visible(False)
    save_figure(figure, to)


def _square(failed: float, runs: float) -> str:
    if not runs:
        return ""
    low, high = interval(int(failed), int(runs))
    return f"{failed:.0f}/{runs:.0f}\n{low:.0%}\u2013{high:.0%}"


def cells_table(results: pd.DataFrame, names: Iterable[str]) -> str:
    """Failed runs of every objective per updates and learning rate, both tasks together."""
    header = ["objective", *(f"{n * 4} updates, lr {lr:g}" for n in EPOCHS for lr in LRS), "all"]
    lines = []
    for name in names:
        mine = results[results["name"] == name]
        cells = [mine[(mine.epochs == n) & (mine.lr == lr)] for n in EPOCHS for lr in LRS]
        lines.append([name, *(told(int(c.failed.sum()), len(c)) for c in (*cells, mine))])
    return markdown(header, lines)


def best_table(results: pd.DataFrame) -> str:
    """The setting at which each objective reaches its best held-out reward, per task."""
    lines = []
    for task in TASKS:
        for name in OBJECTIVES:
            mine = results[(results["name"] == name) & (results.task == task)]
            by_cell = mine.groupby(["epochs", "lr"])["held_out"].agg(["mean", "sem", "count"])
            if by_cell.empty:
                continue
            epochs, lr = by_cell["mean"].idxmax()
            best = by_cell.loc[(epochs, lr)]
            lines.append([
                task, name, f"{best['mean']:.3f} +- {best['sem']:.3f}",
                f"{int(epochs) * 4} updates, lr {lr:g}", int(best["count"]),
            ])  # fmt: skip
    return markdown(["task", "objective", "best held-out reward", "at", "seeds"], lines)


def drivers_table(results: pd.DataFrame) -> str:
    """Of the failed runs: how entropy went, and the class that pushed it most."""
    failed = results[results.failed].assign(
        entropy=np.where(results[results.failed].eval("entropy_end > entropy_start"), "up", "down")
    )
    lines = [
        [name, way, len(rows),
         ", ".join(f"{cls} {n}" for cls, n in rows.driver.value_counts().items())]
        for (name, way), rows in failed.groupby(["name", "entropy"], sort=False)
    ]  # fmt: skip
    return markdown(["objective", "entropy went", "failed runs", "driven most by"], lines)


def again_table(results: pd.DataFrame) -> str:
    """Ten random cells with five fresh seeds each, against the interval of the first five."""
    lines = []
    for cell in random.Random(0).sample(cells(OBJECTIVES), 10):
        mine = results
        for column, value in asdict(cell).items():
            mine = mine[mine[column] == value]
        first, again = mine[mine.seed < SEEDS], mine[mine.seed >= AGAIN_SEED]
        if first.empty or again.empty:
            continue
        low, high = interval(int(first.failed.sum()), len(first))
        inside = low <= again.failed.mean() <= high
        lines.append([
            f"{cell.name}, {cell.task}, {cell.epochs * 4} updates, lr {cell.lr:g}",
            told(int(first.failed.sum()), len(first)),
            f"{int(again.failed.sum())}/{len(again)}", "inside" if inside else "outside",
        ])  # fmt: skip
    return markdown(["cell", "map", "fresh seeds", "share is"], lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def numbers(results: pd.DataFrame) -> str:
    """Everything of the page that is made from the results."""
    first = results[results.seed < SEEDS]
    main, switched = (first[first["name"].isin(names)] for names in (OBJECTIVES, SWITCHES))
    alone = results.cpu_seconds.sum() / 60
    same = first[(first.task == TASKS[0]) & (first.lr > LRS[0])]
    parts = [
        f"{len(main)} runs of the map, {len(switched)} with one part of the objective switched, "
        f"{len(results) - len(first)} again with fresh seeds; {alone:.0f} minutes of one core.",
        "### Failed runs, both tasks", cells_table(main, OBJECTIVES),
        "### Best held-out reward that each objective reaches", best_table(main),
        "### What drove the failed runs", drivers_table(main),
    ]  # fmt: skip
    if len(switched):
        names = ("grpo", "wapo", *SWITCHES)
        parts += ["### One part switched, chain-sum", cells_table(same, names)]
    if len(results) > len(first):
        parts += ["### Ten cells again", again_table(results)]
    return "\n\n".join(parts)


BEGIN, END = "<!-- numbers -->", "<!-- end of numbers -->"


def write_page(results: pd.DataFrame, doc: Path) -> None:
    """Put the numbers between the two marks of the page, and its picture into the gallery."""
    before, _, rest = doc.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    doc.write_text(f"{before}{BEGIN}\n{numbers(results)}\n{END}{after}", encoding="utf-8")
    draw(results, doc.parent.parent / "figures" / "gallery" / "stability_map.png")


def main() -> None:
    """Train a part of the map, or write its page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--part", choices=("map", "switches", "again"), default="map")
    parser.add_argument("--minutes", type=float, default=180.0, help="no run begins after these")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--doc", type=Path, help="write this page instead of training")
    options = parser.parse_args()
    if options.doc:
        results = read_results(options.out)
        known = set() if results.empty else set(results["name"])
        missing = ", ".join(name for name in OBJECTIVES if name not in known)
        if missing or not options.doc.is_file():
            parser.error(
                f"{options.out} has no run of {missing}" if missing else f"no page at {options.doc}"
            )
        write_page(results, options.doc)
    else:
        train_part(options.part, options.out, options.minutes, options.workers)


if __name__ == "__main__":
    main()
