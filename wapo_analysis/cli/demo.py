"""The demo: GRPO and WAPO from one base policy, on the same prompts, over several seeds."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from wapo_analysis.cli.common import check_new, console_error, progress_over, show
from wapo_analysis.cli.figures import write_figures
from wapo_analysis.errors import UserError

if TYPE_CHECKING:
    from wapo_analysis.train.config import TrainConfig
    from wapo_analysis.train.parallel import Job

Option = typer.Option
OBJECTIVES = ("grpo", "wapo")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(demo)


def demo(
    out: Annotated[Path, Option(help="Folder for the runs, figures and report.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, Option(help="Steps of each run.", min=1)] = 120,
    seeds: Annotated[int, Option(help="Runs per objective.", min=1)] = 3,
    task: Annotated[str, Option(help="Embedded task: chain-sum or two-hop.")] = "chain-sum",
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto",
    smoke: Annotated[bool, Option("--smoke", help="Six steps, one seed: does it work?")] = False,
    force: Annotated[bool, Option("--force", help="Delete an old demo in --out first.")] = False,
) -> None:
    """Train GRPO and WAPO side by side, then compare and report.

    Three minutes on two CPU cores, no network, no GPU needed (used if present).
    """
    started = perf_counter()
    if smoke:
        steps, seeds = 6, 1
    if force and (out / "demo.json").exists():
        from shutil import rmtree

        rmtree(out)
    check_new(out)
    run_demo(out, steps=steps, seeds=seeds, task=task, device=device)
    typer.echo(f"wall time: {perf_counter() - started:.0f} s")


def demo_jobs(out: Path, base: "TrainConfig", seeds: int) -> "list[Job]":
    """One job per seed and objective; objectives alternate so that they finish together."""
    from wapo_analysis.train.parallel import Job

    return [
        Job(replace(base, objective=objective, seed=seed), out / f"{objective}-{seed}")
        for seed in range(seeds)
        for objective in OBJECTIVES
    ]


def run_demo(out: Path, *, steps: int, seeds: int, task: str, device: str) -> None:
    """Train, compare, draw and report.

    Raises
    ------
    UserError
        If a run failed; the others are kept.
    """
    from wapo_analysis.train.config import TrainConfig
    from wapo_analysis.train.models import pick_device
    from wapo_analysis.train.parallel import train_all

    base = TrainConfig(
        task=task, steps=steps, device=device, lr=5e-5, checkpoint_every=0, probe_every=10
    )
    jobs = demo_jobs(out, base, seeds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps({"steps": steps, "seeds": seeds, "task": task}))
    # One process per core on a CPU; on a GPU the runs take turns.
    workers = 1 if pick_device(device).type == "cuda" else None
    names = [f"{j.config.shown_label} seed {j.config.seed}" for j in jobs]
    with progress_over(names, steps) as bar:

        def shown(done: Sequence[int]) -> None:
            for task_id, count in enumerate(done):
                bar.update(bar.task_ids[task_id], completed=count)

        failures = train_all(jobs, workers, shown)
    for job, failure in zip(jobs, failures, strict=True):
        if failure is not None:
            console_error(f"{job.out}: {failure}")
    if any(failures):
        raise UserError(f"{sum(f is not None for f in failures)} of {len(jobs)} runs failed")
    _conclude(out, [job.out for job in jobs])


def _conclude(out: Path, folders: Sequence[Path]) -> None:
    """Verdict table, figures and report of finished runs."""
    from wapo_analysis.compare import compare
    from wapo_analysis.report.build import build_report
    from wapo_analysis.store import open_run

    runs = [open_run(folder) for folder in folders]
    show(compare(runs), "text")
    write_figures(runs, out / "figures", "png", None)
    report = out / "report.html"
    build_report(runs, report)
    typer.echo(f"report: {report}")
