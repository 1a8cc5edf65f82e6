"""What several commands share: arguments, opening runs, error lines."""

import json
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wapo_analysis.errors import UserError, printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from wapo_analysis.importers.run import ImportSettings
    from wapo_analysis.results import Result
    from wapo_analysis.store import Run

RunsArgument = Annotated[
    list[Path],
    typer.Argument(help="Run folders, folders of runs, or any trainer's logs.", metavar="RUN"),
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Of a log: ours=theirs, what it calls a column of ours; repeatable.  "
        "[default: by name]"
    ),
]
ChosenRun = Annotated[
    str | None,
    typer.Option(
        "--run", help="Of a log that holds several runs: which one.  [default: the only one]"
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")]
DataOption = Annotated[
    str | None,
    typer.Option(help="Data of the task: file, folder, hub name, or settings.  [default: none]"),
]
EvalDataOption = Annotated[
    str | None, typer.Option(help="Held-out problems.  [default: a part of --data]")
]
Format = Literal["text", "json", "markdown"]


def say(text: str) -> None:
    """Print a result on stdout; what a run's texts hold beyond lines and tabs is shown escaped."""
    typer.echo(printable(text, keep="\n\t"))


def show(result: "Result", format: Format) -> None:
    """Print a result on stdout; as JSON, that and nothing else."""
    if format == "json":
        typer.echo(json.dumps(result.to_dict(), indent=1, allow_nan=False))
    else:
        say(result.to_markdown() if format == "markdown" else result.to_text())


def console_error(text: str) -> None:
    """One error line on stderr; where that cannot be written, nothing."""
    with suppress(OSError):
        typer.echo(f"wapo: {printable(text)}", err=True)


def next_commands(*commands: tuple[str | Path, ...]) -> str:
    """Line of commands that go on from here, each ready to be pasted."""
    return "next: " + "   |   ".join(shlex.join(map(str, one)) for one in commands)


def drop_output() -> None:
    """Keep the interpreter from complaining at its exit about output that nobody takes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_settings(
    paths: list[Path], map: list[str] | None, chosen: str | None = None
) -> "ImportSettings | None":
    """What logs among the paths do not say about themselves; None if nothing was said here either.

    Raises
    ------
    UserError
        If something was said and none of the paths is a log.
    """
    if not map and chosen is None:
        return None
    if all(holds_runs(path) for path in paths):
        raise UserError("--map and --run are for logs; a run folder needs neither")
    from wapo_analysis.importers import parse_mapping
    from wapo_analysis.importers.run import ImportSettings

    return ImportSettings(mapping=parse_mapping(map or []), run=chosen)


def of_log(log: "ImportSettings | None") -> tuple[str, ...]:
    """The options that say the same of a log on the next command."""
    if log is None:
        return ()
    given = [f"{ours}={theirs}" for ours, theirs in log.mapping.items()]
    chosen = () if log.run is None else ("--run", log.run)
    return (*(word for pair in given for word in ("--map", pair)), *chosen)


def open_runs(paths: list[Path], log: "ImportSettings | None" = None) -> "list[Run]":
    """Open every run at or below the given folders, each once, in the order given.

    What holds no run is read as what another trainer wrote (``log`` says what it does not), and how
    it was read is said on stderr.
    """
    from wapo_analysis.store import find_runs, open_run

    runs: dict[Path, Run] = {}
    for path in dict.fromkeys(paths):
        if holds_runs(path):
            runs |= {folder: open_run(folder) for folder in find_runs(path) if folder not in runs}
        else:
            runs[path] = open_foreign(path, log)
    return list(runs.values())


def open_one(path: Path, log: "ImportSettings | None" = None) -> "Run":
    """Open the one run at or below a path, or of a log; several are an error that lists them."""
    opened = open_runs([path], log)
    if len(opened) > 1:
        names = ", ".join(str(run.path) for run in opened[:6])
        raise UserError(f"{path} holds {len(opened)} runs; name one, such as {names}")
    return opened[0]


def holds_runs(path: Path) -> bool:
    """Whether a path is a run, also one that lost its manifest, or holds runs, or is not there."""
    if not path.is_dir():
        return not path.exists()
    from wapo_analysis.store import STEP_LOG, run_folders

    return (path / STEP_LOG).exists() or bool(run_folders(path))


def open_foreign(path: Path, log: "ImportSettings | None" = None) -> "Run":
    """Open somebody's log as a run, and say on stderr how it was read."""
    from wapo_analysis.importers import account, open_source

    run = open_source(path, log)
    for line in account(run):
        console_error(line)
    return run


def check_new(out: Path) -> None:
    """Refuse an output folder that already holds files.

    Raises
    ------
    UserError
        If it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out or delete it")


def progress() -> "Progress":
    """Progress display on stderr; a bar's field ``now`` says where it stands."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
        console=Console(stderr=True),
        expand=False,
    )
