"""Commands that train: ``wapo train`` and ``wapo demo``."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wapo_analysis.cli.common import check_new, console_error

if TYPE_CHECKING:
    from rich.progress import Progress

    from wapo_analysis.train.config import TrainConfig

Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(train)
    app.command()(demo)


def _bins(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


def train(
    objective: Annotated[
        str | None,
        Option(help="grpo, dr_grpo, dapo, dr_dapo, dr_dapo_seq, gspo, raft, raft++ or wapo."),
    ] = None,
    out: Annotated[
        Path | None, Option(help="Run folder.  [default: runs/<objective>-<seed>]")
    ] = None,
    task: Annotated[str | None, Option(help="Embedded task: chain-sum or two-hop.")] = None,
    model: Annotated[
        str | None, Option(help="base (shipped), a model folder, a hub name, or a .gguf file.")
    ] = None,
    include_bins: Annotated[
        str | None,
        Option(help="Train on these classes only, e.g. neg_peak or pos_peak,pos_valley."),
    ] = None,
    exclude_bins: Annotated[str | None, Option(help="Leave these classes out.")] = None,
    steps: Annotated[int | None, Option(help="Batches of rollouts.")] = None,
    seed: Annotated[int | None, Option(help="Decides prompts and sampling.")] = None,
    lr: Annotated[float | None, Option(help="Learning rate.")] = None,
    epochs: Annotated[int | None, Option(help="Passes over each batch.")] = None,
    minibatches: Annotated[int | None, Option(help="Updates per pass.")] = None,
    prompts: Annotated[int | None, Option(help="Prompts per batch.")] = None,
    rollouts: Annotated[int | None, Option(help="Completions per prompt.")] = None,
    temperature: Annotated[float | None, Option(help="Softmax temperature.")] = None,
    optimizer: Annotated[str | None, Option(help="adamw or sgd.")] = None,
    probe_every: Annotated[
        int | None,
        Option(help="Take one update of every n-th step apart by class; 0 never."),
    ] = None,
    probe_rows: Annotated[int | None, Option(help="Rollouts that a probe scores.")] = None,
    device: Annotated[str | None, Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[
        int | None, Option(min=1, help="CPU threads.  [default: torch's own]")
    ] = None,
    config: Annotated[
        Path | None, Option(help="TOML file of settings; options given here win over it.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Train a policy and watch every token of it.

    Every setting of docs/training.md can stand in the TOML file. Examples:

        wapo train --objective wapo --steps 100 --out runs/wapo
        wapo train --include-bins neg_peak --epochs 2 --minibatches 2 --out runs/explode
        wapo train --probe-every 5 --out runs/mine
        wapo train --out runs/wapo --steps 200 --resume
    """
    from wapo_analysis.train.rollout import NonFiniteLogits

    given = {
        "objective": objective,
        "task": task,
        "model": model,
        "include_bins": _bins(include_bins),
        "exclude_bins": _bins(exclude_bins),
        "steps": steps,
        "seed": seed,
        "lr": lr,
        "epochs": epochs,
        "minibatches": minibatches,
        "prompts_per_step": prompts,
        "rollouts_per_prompt": rollouts,
        "temperature": temperature,
        "optimizer": optimizer,
        "probe_every": probe_every,
        "probe_rows": probe_rows,
        "device": device,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    settings = _settings(config, changes, out if resume else None)
    folder = out or Path("runs") / f"{settings.objective}-{settings.seed}"
    try:
        _train_with_bar(settings, folder, resume, threads)
    except NonFiniteLogits as error:
        console_error(f"stopped: {error}; the run up to here is in {folder}")
        raise typer.Exit(1) from error
    typer.echo(f"run: {folder}")
    typer.echo(f"next: wapo diagnose {folder}   |   wapo report {folder}")


def _settings(config: Path | None, changes: dict[str, Any], resumed: Path | None) -> "TrainConfig":
    """Settings from the resumed run or the file, with the options given on top."""
    from wapo_analysis.store import read_manifest
    from wapo_analysis.train.config import TrainConfig

    if resumed is not None:
        base = TrainConfig.from_dict(read_manifest(resumed).get("config", {}))
    else:
        base = TrainConfig.from_toml(config) if config is not None else TrainConfig()
    return TrainConfig.from_dict(changes, base)


def _train_with_bar(
    settings: "TrainConfig", folder: Path, resume: bool, threads: int | None
) -> None:
    from wapo_analysis.train.loop import train as run_training

    name = f"{settings.shown_label} seed {settings.seed}"
    with _progress() as bar:

        def shown(row: dict[str, float]) -> None:
            # The bar appears with the first step, so that a refused run prints one line only.
            if not bar.task_ids:
                bar.add_task(name, total=settings.steps, now="")
            now = f"reward {row['reward']:.2f}  entropy {row['entropy']:.2f} nats"
            bar.update(bar.task_ids[0], completed=int(row["step"]), now=now)

        run_training(settings, folder, resume=resume, progress=shown, threads=threads)


def _progress() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
        console=Console(stderr=True),
        expand=False,
    )


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
    """Train GRPO and WAPO from one base policy on the same prompts, then compare and report.

    Three minutes on two CPU cores, no network, no GPU needed (used if present).
    """
    from wapo_analysis.cli.demo import run_demo

    started = perf_counter()
    if smoke:
        steps, seeds = 6, 1
    if force and (out / "demo.json").exists():
        from shutil import rmtree

        rmtree(out)
    check_new(out)
    run_demo(out, steps=steps, seeds=seeds, task=task, device=device)
    typer.echo(f"wall time: {perf_counter() - started:.0f} s")


def progress_over(names: Sequence[str], steps: int) -> "Progress":
    """Progress display with one bar for each named run."""
    bar = _progress()
    for name in names:
        bar.add_task(name, total=steps, now="")
    return bar
