"""The command line: ``wapo``, and what its commands share. They import what they need in a run.

Exit codes: 0 done; 1 a finding at or above --fail-on, or a failed proof; 2 a user's mistake, told
in one line; 3 the training went to its end, but its record or last checkpoint could not be written
(disk full, folder gone); 130 interrupted.
"""

import gc
import json
import os
import re
import shlex
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from inspect import cleandoc
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

from wapo_analysis import __version__
from wapo_analysis.errors import UserError, closest, printable

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
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="Output format.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads.  [default: torch's own]")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-run", help="Run code that the run's manifest names; read it first.")
]
FoldersArgument = Annotated[
    list[Path] | None,
    typer.Argument(help="Folders that hold runs.  [default: runs]", metavar="FOLDER"),
]


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
    paths: list[Path], map: list[str] | None, chosen: str | None
) -> "ImportSettings | None":
    """What logs among the paths do not say about themselves; None if nothing was said here either.

    Raises UserError if something was said and none of the paths is a log.
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
    return () if log is None else log.options()


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
    if not holds_runs(path):
        return open_foreign(path, log)
    from wapo_analysis.store import find_run, open_run

    return open_run(find_run(path))


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


def verbatim_examples(doc: str) -> str:
    """Docstring as help text whose indented blocks keep their lines."""
    paragraphs = cleandoc(doc).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if p.startswith("    ") else p for p in paragraphs)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"wapo-analysis {__version__}")
        raise typer.Exit


#: In the order of the help; each is the function of its name in the module of its name.
COMMANDS = (
    "demo", "train", "fork", "eval", "compare", "diagnose", "figures", "report", "board", "mcp",
    "schema", "whatif", "watch", "verify", "import", "bench", "check", "audit", "compact", "tasks",
)  # fmt: skip


def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Attach the global options."""


class _Interrupted(Exception):
    """Ctrl-C in a command; typer would end with its code and say nothing."""


class _Command(TyperCommand):
    """A command whose flags show their default as its other options do: off."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        for option in self.params:
            if isinstance(option, TyperOption) and option.is_flag and option.help:
                told = "[default: " in option.help
                option.help += "" if told else "  [default: off]"

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


@cache
def application(command: str | None = None) -> typer.Typer:
    """The application with all commands, or with one: only its module is loaded then."""
    app = typer.Typer(
        name="wapo",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # markup would eat [default: ...]; plain help also starts faster
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Which tokens bent the curve? Train, watch and diagnose RLVR runs token by token.\n\n"
        "Start with wapo demo: a run that explodes beside GRPO and WAPO, three minutes on a "
        "laptop.",
    )
    app.callback()(root)
    for name in COMMANDS:
        if command in (None, name):
            word = "import_" if name == "import" else name  # which Python keeps for itself
            app.command(name, cls=_Command)(
                getattr(import_module(f"wapo_analysis.cli.{word}"), word)
            )
    for registered in app.registered_commands:
        registered.help = verbatim_examples(registered.callback.__doc__ or "")
    return app


def main() -> None:
    """Entry point of the ``wapo`` command."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal without UTF-8 shows ? for the rest
        sys.stdout.reconfigure(errors="replace")
    code = run(sys.argv[1:])
    gc.freeze()  # the interpreter ends without a last look through everything that was imported
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; every user error becomes one line."""
    known = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        result = application(known)(arguments, prog_name="wapo", standalone_mode=False)
    except UserError as error:
        console_error(str(error))
        return 2
    except (KeyboardInterrupt, _Interrupted, typer.Abort):
        console_error("interrupted")
        return 130
    except BrokenPipeError:
        drop_output()  # the reader (head, less) has seen enough
        return 0
    except OSError as error:
        drop_output()
        place = error.filename or "the output"
        console_error(f"cannot read or write {place}: {error.strerror or error}")
        return 2
    except Exception as error:
        return _usage_error(error)
    return result if isinstance(result, int) else 0


def _usage_error(error: Exception) -> int:
    """Print a wrong option as one line; anything that is no usage error is raised again.

    Usage errors are recognized by their method: some versions of typer carry their own click.
    """
    told = getattr(error, "format_message", None)
    if told is None:
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(told())
    else:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "wapo"
        console_error(f"{_with_closest(told())} (see {command} --help)")
    return 2


def _with_closest(told: str) -> str:
    """Usage error on one line; a choice that is not allowed names the closest one."""
    text = " ".join(told.split()).replace("Value error, ", "")
    text = re.sub(r" ?\(Possible options: (.+?)\)", r". Did you mean \1?", text)
    choice = re.search(r"'([^']*)' is not one of (.+)\.$", text)
    close = choice and closest(choice[1], re.findall(r"'([^']*)'", choice[2]))
    return f"{text} Did you mean {close!r}?" if close else text
