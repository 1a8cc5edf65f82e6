"""The command that trains: ``wapo train``."""

import inspect
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option, echo

from wapo_analysis.cli import (
    ThreadsOption,
    console_error,
    drop_output,
    next_commands,
    progress,
    say,
)
from wapo_analysis.declare import Declared, assigned, declared_settings, settings_table
from wapo_analysis.errors import UserError, printable
from wapo_analysis.train.config import TrainConfig

if TYPE_CHECKING:
    from rich.progress import Progress

#: A run that is not on a terminal prints about so many lines, a long one one of so many steps.
LINES, STEPS_A_LINE = 20, 10
Row = dict[str, float]


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


@with_settings
def train(
    out: Annotated[
        Path | None, Option(help="Run folder.  [default: runs/<objective>-<seed>]")
    ] = None,
    threads: ThreadsOption = None,
    other: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="Any setting; repeatable.  [default: none]"),
    ] = None,
    config: Annotated[
        Path | None,
        Option(help="TOML file of settings; options given here win over it.  [default: none]"),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
    checkpoint: Annotated[
        int | None,
        Option(min=1, help="Step of the checkpoint to resume from.  [default: the last]"),
    ] = None,
    take_over: Annotated[
        bool,
        Option(
            "--take-over", help="With --resume: also if another process still seems to write it."
        ),
    ] = False,
    trust_run: Annotated[
        bool,
        Option("--trust-run", help="With --resume: run code that the manifest names; read it."),
    ] = False,
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
        wapo train --model smollm2 --precision bf16-mixed --set lora_rank=16 --out runs/lora
        wapo train --out runs/wapo --steps 200 --resume

    Several processes, with TRL: torchrun --nproc-per-node 2 -m wapo_analysis train ...
    """
    if settings:
        echo(settings_table(TrainConfig))
        return
    if checkpoint is not None and not resume:
        raise UserError("--checkpoint says where to --resume from; give both")
    changes = assigned(other or []) | as_settings(given)
    with _told_once(), _only_data(resume and not trust_run):
        chosen = _chosen(config, changes, out if resume else None, trust_run)
        folder = out or Path("runs") / f"{chosen.objective}-{chosen.seed}"
        chosen.load_task()  # what is wrong with the data shows before the model is loaded
        options = {"resume": resume, "checkpoint": checkpoint, "take_over": take_over}
        _train(chosen, folder, threads=threads, **options)


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


def _train(settings: TrainConfig, folder: Path, **options: Any) -> None:
    """Train, alone or with the processes a launcher has started, and say how it ended."""
    from wapo_analysis.engines import ProcessFailed, launched
    from wapo_analysis.train.rollout import NonFiniteLogits

    rank, processes = launched()
    if processes > 1 and settings.engine != "trl":
        if options["resume"]:
            raise UserError("a run of the built-in trainer goes on in one process, not in several")
        settings = replace(settings, engine="trl")
    run, steps = _on_engine(settings)
    name = f"{settings.shown_label} seed {settings.seed}"
    try:
        if rank:
            run(settings, folder, **options)
            return
        if settings.engine == "trl":
            say(f"engine: TRL's GRPOTrainer, {processes} process{'es' * (processes > 1)}")
        with shown_progress(name, steps, folder) as shown:
            run(settings, folder, progress=shown, **options)
    except (NonFiniteLogits, ProcessFailed) as error:
        if rank == 0 or isinstance(error, ProcessFailed):
            console_error(f"stopped: {error}; the run up to here is in {folder}")
        raise Exit(1) from error
    except KeyboardInterrupt as error:
        from wapo_analysis.train.checkpoint import checkpoints

        if rank or not checkpoints(folder):
            raise
        again = shlex.join(["wapo", "train", "--out", str(folder), "--resume"])
        console_error(f"interrupted; it goes on with {again}")
        raise Exit(130) from error
    _ended(folder)


def _on_engine(settings: TrainConfig) -> tuple[Callable[..., Any], int]:
    """What trains, and the number of its last step."""
    if settings.engine == "trl":
        from wapo_analysis.engines import updates_per_batch
        from wapo_analysis.engines.trl import train_with_trl

        return train_with_trl, settings.steps * updates_per_batch(settings)
    from wapo_analysis.train.loop import train as built_in

    return built_in, settings.steps


def _ended(folder: Path) -> None:
    """Name the run; exit with 3 if the training is done but record or checkpoint is not on disk."""
    from wapo_analysis.store import read_manifest

    try:
        status = read_manifest(folder).status
    except UserError as error:
        status = f"gone ({error})"
    if status != "finished":
        console_error(f"the training is done, but the run in {folder} is not whole: {status}")
        raise Exit(3)
    try:
        say(f"run: {folder}")
        say(next_commands(("wapo", "diagnose", folder), ("wapo", "report", folder)))
    except OSError:
        drop_output()  # what counts is on disk


def _only_data(on: bool) -> AbstractContextManager[None]:
    """A block that loads only data of a run that is continued; a new run loads torch later."""
    if not on:
        return nullcontext()
    from wapo_analysis.train.checkpoint import only_data

    return only_data()


@contextmanager
def _told_once() -> Iterator[None]:
    """Leave what all processes of a run would say of an error to the first of them."""
    from wapo_analysis.engines import launched

    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        if launched()[0] == 0:
            raise
        raise Exit(2 if isinstance(error, UserError) else 130) from error


def _chosen(
    config: Path | None, changes: dict[str, Any], resumed: Path | None, trust: bool
) -> TrainConfig:
    """Settings from the resumed run or the file, with the options given on top."""
    if resumed is not None:
        from wapo_analysis.train.checkpoint import settings_of

        return settings_of(resumed, changes, trust)
    base = TrainConfig.from_toml(config) if config is not None else TrainConfig()
    return TrainConfig.from_dict(changes, base)


@contextmanager
def shown_progress(
    name: str, steps: int, folder: Path | None = None, err: bool = False
) -> Iterator[Callable[[Row], None]]:
    """Show the rows of steps as they come: a bar on a terminal, else lines on stdout.

    Where they can no longer be written (a log on a full disk, a pipe that nobody reads) one line
    says so and the training goes on.

    Parameters
    ----------
    steps : int
        Its last step.
    folder : Path, optional
        Run folder; how it takes its statistics is said with the first step, so that a refused run
        prints one line only.
    err : bool
        Lines go to stderr.
    """
    begun = silent = False
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    with progress() if terminal else nullcontext() as bar:
        show = step_lines(steps, err) if bar is None else _bar(bar, name, steps)

        def shown(row: Row) -> None:
            nonlocal begun, silent
            if silent:
                return
            try:
                if not begun and folder is not None:
                    echo(printable(_capture_line(folder)), err=True)
                show(row)
            except OSError as error:
                silent = True
                console_error(f"progress is no longer shown: {error.strerror}; training goes on")
            begun = True

        yield shown
    if not begun:
        say(f"nothing to do: step {steps} is done; --steps N trains on")


def _bar(bar: "Progress", name: str, steps: int) -> Callable[[Row], None]:
    def moved(row: Row) -> None:
        if not bar.task_ids:
            bar.add_task(printable(name), total=steps, now="")
        bar.update(bar.task_ids[0], completed=int(row["step"]), now=_now(row))

    return moved


def step_lines(steps: int, err: bool = False) -> Callable[[Row], None]:
    """One line of every n-th step, of the first and of the last."""
    started, every, last = perf_counter(), max(1, min(STEPS_A_LINE, steps // LINES)), 0

    def printed(row: Row) -> None:
        nonlocal last
        step = int(row["step"])
        if not last or step == steps or step % every == 0:
            spent = perf_counter() - started
            echo(f"step {step}/{steps}  {_now(row)}  {spent:.0f} s", err=err)
            sys.stdout.flush()
        last = step

    return printed


def _now(row: Row) -> str:
    return f"reward {row['reward']:.2f}  entropy {row['entropy']:.2f} nats"


def _capture_line(folder: Path) -> str:
    """Say how statistics are taken and by which rule, from the run's manifest."""
    from wapo_analysis.store import read_manifest

    capture = read_manifest(folder)["capture"]
    return f"capture: {capture['mode']} ({capture['rule']})"
