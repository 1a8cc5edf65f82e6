"""The command line: ``wapo``. Commands import what they need when they run.

Exit codes: 0 done; 1 a finding at or above --fail-on, or a failed proof; 2 a user's mistake, told
in one line; 3 the training went to its end, but its record or last checkpoint could not be written
(disk full, folder gone); 130 interrupted.
"""

import gc
import re
import sys
from functools import cache
from importlib import import_module
from inspect import cleandoc
from io import TextIOWrapper

import typer

from wapo_analysis import __version__
from wapo_analysis.cli.common import console_error, drop_output
from wapo_analysis.errors import UserError, closest


def verbatim_examples(doc: str) -> str:
    """Docstring as help text whose indented blocks keep their lines."""
    paragraphs = cleandoc(doc).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if p.startswith("    ") else p for p in paragraphs)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"wapo-analysis {__version__}")
        raise typer.Exit


_MODULES = (
    "demo",
    "train",
    "fork",
    "eval",
    "compare",
    "diagnose",
    "figures",
    "report",
    "board",
    "mcp",
    "schema",
    "whatif",
    "watch",
    "verify",
    "import_",
    "bench",
    "check",
    "audit",
    "compact",
    "tasks",
)
COMMANDS = tuple(module.rstrip("_") for module in _MODULES)


def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Attach the global options."""


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
    for module in _MODULES:
        if command in (None, module.rstrip("_")):
            import_module(f"wapo_analysis.cli.{module}").register(app)
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
    except (KeyboardInterrupt, typer.Abort):
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
