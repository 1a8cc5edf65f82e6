"""Commands that train: ``wapo train`` and ``wapo demo``."""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wapo_analysis.cli.common import DataOption, EvalDataOption, console_error, progress, say
from wapo_analysis.errors import UserError

if TYPE_CHECKING:
    from wapo_analysis.train.config import TrainConfig
    from wapo_analysis.train.distributed import World

Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(train)


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
    task: Annotated[
        str | None, Option(help="What to train on; wapo tasks lists them.  [default: chain-sum]")
    ] = None,
    data: DataOption = None,
    eval_data: EvalDataOption = None,
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
    max_new_tokens: Annotated[
        int | None, Option(help="Longest completion.  [default: the task's own]")
    ] = None,
    temperature: Annotated[float | None, Option(help="Softmax temperature.")] = None,
    optimizer: Annotated[str | None, Option(help="adamw or sgd.")] = None,
    probe_every: Annotated[
        int | None,
        Option(help="Take one update of every n-th step apart by class; 0 never."),
    ] = None,
    probe_rows: Annotated[int | None, Option(help="Rollouts that a probe scores.")] = None,
    eval_every: Annotated[
        int | None, Option(help="Steps between evaluations on held-out prompts; 0 never.")
    ] = None,
    lora_rank: Annotated[int | None, Option(help="Train low-rank adapters of this rank.")] = None,
    microbatch_size: Annotated[
        int | None, Option(help="Rollouts per forward pass; smaller takes less memory.")
    ] = None,
    token_fraction: Annotated[
        float | None, Option(help="Share of rollouts whose token rows are written.")
    ] = None,
    log_to: Annotated[
        str | None, Option(help="Copy the step log to tensorboard, wandb or both.")
    ] = None,
    device: Annotated[str | None, Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[
        int | None, Option(min=1, help="CPU threads.  [default: torch's own]")
    ] = None,
    other: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="Any setting of docs/training.md; repeatable."),
    ] = None,
    config: Annotated[
        Path | None, Option(help="TOML file of settings; options given here win over it.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Train a policy and watch every token of it.

    Every setting of docs/training.md can stand in the TOML file or after --set. Examples:

        wapo train --objective wapo --steps 100 --out runs/wapo
        wapo train --include-bins neg_peak --epochs 2 --minibatches 2 --out runs/explode
        wapo train --probe-every 5 --out runs/mine
        wapo train --task gsm8k --data train.jsonl --model smollm2 --out runs/words
        wapo train --model smollm2 --set dtype=bfloat16 --set lora_rank=16 --out runs/lora
        wapo train --out runs/wapo --steps 200 --resume

    Several processes: torchrun --nproc-per-node 2 -m wapo_analysis train ...
    """
    given = {
        "objective": objective,
        "task": task,
        "data": data,
        "eval_data": eval_data,
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
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "optimizer": optimizer,
        "probe_every": probe_every,
        "probe_rows": probe_rows,
        "eval_every": eval_every,
        "lora_rank": lora_rank,
        "microbatch_size": microbatch_size,
        "token_fraction": token_fraction,
        "log_to": log_to,
        "device": device,
    }
    changes = _assigned(other or [])
    changes |= {name: value for name, value in given.items() if value is not None}
    with _told_once():
        settings = _settings(config, changes, out if resume else None)
        folder = out or Path("runs") / f"{settings.objective}-{settings.seed}"
        settings.load_task()  # what is wrong with the data shows before the model is loaded
        _train(settings, folder, resume, threads)


def _train(settings: "TrainConfig", folder: Path, resume: bool, threads: int | None) -> None:
    """Train, alone or with the processes a launcher has started, and say how it ended."""
    from wapo_analysis.train.distributed import ProcessFailed
    from wapo_analysis.train.launched import joined_processes
    from wapo_analysis.train.rollout import NonFiniteLogits

    first = True
    try:
        with joined_processes(settings.device) as world:
            first = world.first
            _train_with_bar(settings, folder, resume, threads, world)
    except NonFiniteLogits as error:
        if first:
            console_error(f"stopped: {error}; the run up to here is in {folder}")
        raise typer.Exit(1) from error
    except ProcessFailed as error:
        console_error(f"stopped: {error}; the run up to here is in {folder}")
        raise typer.Exit(1) from error
    if first:
        say(f"run: {folder}")
        say(f"next: wapo diagnose {folder}   |   wapo report {folder}")


@contextmanager
def _told_once() -> Iterator[None]:
    """Leave what all processes of a run would say of an error to the first of them."""
    from wapo_analysis.train.launched import launched

    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        if launched()[0] == 0:
            raise
        raise typer.Exit(2 if isinstance(error, UserError) else 130) from error


def _assigned(pairs: list[str]) -> dict[str, Any]:
    """Settings from NAME=VALUE texts: numbers, booleans and lists as in TOML, else plain text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UserError(f"--set takes NAME=VALUE, got {pair!r}")
        try:
            found[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name.strip()] = value.strip()
    return found


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
    settings: "TrainConfig", folder: Path, resume: bool, threads: int | None, world: "World"
) -> None:
    from wapo_analysis.train.loop import train as run_training

    run = partial(run_training, settings, folder, resume=resume, threads=threads, world=world)
    if not world.first:
        run()
        return
    name = f"{settings.shown_label} seed {settings.seed}"
    with progress() as bar:

        def shown(row: dict[str, float]) -> None:
            # The bar appears with the first step, so that a refused run prints one line only.
            if not bar.task_ids:
                bar.console.print(_capture_line(folder), highlight=False, soft_wrap=True)
                bar.add_task(name, total=settings.steps, now="")
            now = f"reward {row['reward']:.2f}  entropy {row['entropy']:.2f} nats"
            bar.update(bar.task_ids[0], completed=int(row["step"]), now=now)

        run(progress=shown)


def _capture_line(folder: Path) -> str:
    """Say how statistics are taken and by which rule, from the run's manifest."""
    from wapo_analysis.store import read_manifest

    capture = read_manifest(folder)["capture"]
    return f"capture: {capture['mode']} ({capture['rule']})"
