"""The demo: a run that explodes, GRPO and WAPO beside it, the verdict, the page."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

from typer import Option, echo

from wapo_analysis.cli import console_error, next_commands, progress, say, show
from wapo_analysis.cli.figures import write_figures
from wapo_analysis.errors import UserError

if TYPE_CHECKING:
    from wapo_analysis.train.config import TrainConfig
    from wapo_analysis.train.jobs import Job

OBJECTIVES = ("grpo", "wapo")
#: Class that the run which explodes trains on alone: likely tokens, punished.
EXPLODES = "neg_peak"
#: Lines about the progress where it goes to no terminal.
_LINES = 12


def demo(
    out: Annotated[Path, Option(help="Folder for the runs, figures and report.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, Option(help="Steps of each run.", min=1)] = 40,
    seeds: Annotated[int, Option(help="Runs of GRPO and of WAPO each.", min=1)] = 3,
    task: Annotated[str, Option(help="Embedded task: chain-sum or two-hop.")] = "chain-sum",
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto",
    smoke: Annotated[bool, Option("--smoke", help="Six steps, one seed: does it work?")] = False,
    force: Annotated[bool, Option("--force", help="Delete an old demo in --out first.")] = False,
) -> None:
    """Watch a run explode beside healthy ones, and read why.

    One run trains on punished likely tokens (neg_peak) alone, GRPO and WAPO on all and on rewarded
    ones, from one base policy on the same prompts. Under three minutes on two CPU cores, no
    network, no GPU needed (used if present).
    """
    from wapo_analysis.store.files import check_new

    started = perf_counter()
    if smoke:
        steps, seeds = 6, 1
    if force and (out / "demo.json").exists():
        from shutil import rmtree

        rmtree(out)
    check_new(out)
    run_demo(out, steps=steps, seeds=seeds, task=task, device=device)
    echo(f"wall time: {perf_counter() - started:.0f} s")


def demo_jobs(out: Path, base: "TrainConfig", seeds: int) -> "list[Job]":
    """The run that explodes, then one job per seed and objective, which finish together."""
    from wapo_analysis.train.jobs import Job

    harsh = replace(base, include_bins=(EXPLODES,), epochs=2, minibatches=2)
    return [
        Job(harsh, out / f"{EXPLODES}-0"),
        *(
            Job(replace(base, objective=objective, seed=seed), out / f"{objective}-{seed}")
            for seed in range(seeds)
            for objective in OBJECTIVES
        ),
    ]


def run_demo(out: Path, *, steps: int, seeds: int, task: str, device: str) -> None:
    """Train, compare, draw and report. Raises UserError if a run failed; the others are kept."""
    from wapo_analysis.train.config import TrainConfig
    from wapo_analysis.train.jobs import train_all
    from wapo_analysis.train.models import pick_device

    base = TrainConfig(
        task=task, steps=steps, device=device, lr=5e-5, checkpoint_every=0, probe_every=10
    )
    # One process per core on a CPU; on a GPU the runs take turns.
    workers = 1 if pick_device(device).type == "cuda" else None
    jobs = demo_jobs(out, base, seeds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps({"steps": steps, "seeds": seeds, "task": task}))
    names = [f"{j.config.shown_label} seed {j.config.seed}" for j in jobs]
    with _shown(names, steps) as shown:
        failures = train_all(jobs, workers, shown)
    for job, failure in zip(jobs, failures, strict=True):
        if failure is not None:
            console_error(f"{job.out}: {failure}")
    if any(failures):
        raise UserError(f"{sum(f is not None for f in failures)} of {len(jobs)} runs failed")
    _conclude(out, [job.out for job in jobs])


@contextmanager
def _shown(names: Sequence[str], steps: int) -> Iterator[Callable[[Sequence[int]], None]]:
    """Show finished steps of every run and the time that is left: bars, or lines off a terminal."""
    total = steps * len(names)
    if not sys.stderr.isatty():
        yield _lines(total)
        return
    with progress() as bar:
        for name in ("all runs", *names):
            bar.add_task(name, total=total if name == "all runs" else steps, now="")

        def moved(done: Sequence[int]) -> None:
            for task_id, count in zip(bar.task_ids, (sum(done), *done), strict=True):
                bar.update(task_id, completed=count)

        yield moved


def _lines(total: int) -> Callable[[Sequence[int]], None]:
    started, written = perf_counter(), 0

    def moved(done: Sequence[int]) -> None:
        nonlocal written
        if (count := sum(done)) * _LINES // total <= written:
            return
        written = count * _LINES // total
        left = (perf_counter() - started) * (total - count) / count
        echo(f"{count} of {total} steps, about {left:.0f} s left", err=True)

    return moved


def _conclude(out: Path, folders: Sequence[Path]) -> None:
    """Comparison, verdict on the run that explodes, figures and page; that run came first."""
    from wapo_analysis.compare import compare
    from wapo_analysis.diagnose import diagnose
    from wapo_analysis.plots import get_figure
    from wapo_analysis.report import build_report
    from wapo_analysis.store import open_run

    runs = [open_run(folder) for folder in (*folders[1:], folders[0])]
    show(compare(runs), "text")
    gradient = get_figure("gradient_mass")
    say(f"\n{gradient.answer(gradient.prepare(runs[:-1]))}")
    found = diagnose(runs[-1])
    say(f"\n{found.title}\n  {found.sentence}")
    if found.culprits is not None:
        say(f"  {found.culprits.words()}")
    write_figures(runs, out / "figures", "png", None)
    report = out / "report.html"
    build_report(runs, report)
    say(f"\nreport: {report}")
    say(next_commands(("wapo", "diagnose", folders[0]), ("wapo", "board", out)))
