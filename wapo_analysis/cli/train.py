"""The command that trains: ``wapo train``."""

import inspect
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wapo_analysis.cli.common import console_error, progress, say
from wapo_analysis.declare import Declared, declared_settings, settings_table
from wapo_analysis.errors import UserError
from wapo_analysis.train.config import TrainConfig

if TYPE_CHECKING:
    from wapo_analysis.train.distributed import World

MAX_THREADS = 1024
Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(with_settings(train))


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the settings that have one, before its own.

    They are read from the declarations of `TrainConfig` and passed by the setting's name, None if
    not given: the file or the continued run then decides.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    declared = [each for each in declared_settings(TrainConfig).values() if each.option]
    parameters = [
        *(_parameter(each) for each in declared),
        *(each.replace(kind=each.KEYWORD_ONLY) for each in own if each.kind != each.VAR_KEYWORD),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


_TYPES = {"int": int, "float": float, "bool": bool}


def _parameter(declared: Declared) -> inspect.Parameter:
    words = declared.limit.words if declared.limit is not None else ()
    allowed = f"{declared.limit.allowed}; " if words and declared.limit is not None else ""
    text = f"{declared.doc}  [{allowed}default: {declared.shown_default}]"
    kind = _TYPES.get(declared.kind.partition(" ")[0], str)
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, Option(declared.option, help=text)],
    )


def train(
    out: Annotated[
        Path | None, Option(help="Run folder.  [default: runs/<objective>-<seed>]")
    ] = None,
    threads: Annotated[
        int | None, Option(min=1, max=MAX_THREADS, help="CPU threads.  [default: torch's own]")
    ] = None,
    other: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="Any setting; repeatable.  [default: none]"),
    ] = None,
    config: Annotated[
        Path | None,
        Option(help="TOML file of settings; options given here win over it.  [default: none]"),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
    settings: Annotated[
        bool, Option("--settings", help="Print every setting with its default and limits.")
    ] = False,
    **given: Any,
) -> None:
    """Train a policy and watch every token of it.

    Every setting (--settings lists them) can stand in the TOML file or after --set. Examples:

        wapo train --objective wapo --steps 100 --out runs/wapo
        wapo train --include-bins neg_peak --epochs 2 --minibatches 2 --out runs/explode
        wapo train --probe-every 5 --out runs/mine
        wapo train --task gsm8k --data train.jsonl --model smollm2 --out runs/words
        wapo train --model smollm2 --set dtype=bfloat16 --set lora_rank=16 --out runs/lora
        wapo train --out runs/wapo --steps 200 --resume

    Several processes: torchrun --nproc-per-node 2 -m wapo_analysis train ...
    """
    if settings:
        typer.echo(settings_table(TrainConfig))
        return
    changes = assigned(other or []) | as_settings(given)
    with _told_once():
        chosen = _chosen(config, changes, out if resume else None)
        folder = out or Path("runs") / f"{chosen.objective}-{chosen.seed}"
        chosen.load_task()  # what is wrong with the data shows before the model is loaded
        _train(chosen, folder, resume, threads)


def as_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the options that were given; lists are comma-separated there."""
    declared = declared_settings(TrainConfig)
    return {
        name: _listed(value) if declared[name].kind.startswith("tuple") else value
        for name, value in given.items()
        if value is not None
    }


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _train(settings: TrainConfig, folder: Path, resume: bool, threads: int | None) -> None:
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


def assigned(pairs: list[str]) -> dict[str, Any]:
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


def _chosen(config: Path | None, changes: dict[str, Any], resumed: Path | None) -> TrainConfig:
    """Settings from the resumed run or the file, with the options given on top."""
    from wapo_analysis.store import read_manifest

    if resumed is not None:
        base = TrainConfig.from_dict(read_manifest(resumed).get("config", {}))
    else:
        base = TrainConfig.from_toml(config) if config is not None else TrainConfig()
    return TrainConfig.from_dict(changes, base)


def _train_with_bar(
    settings: TrainConfig, folder: Path, resume: bool, threads: int | None, world: "World"
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
