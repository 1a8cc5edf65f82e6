"""The command line: ``wapo``. Commands import what they need when they run.

Exit codes: 0 done; 1 a finding at or above --fail-on, or a failed proof; 2 a user's mistake, told
in one line; 130 interrupted.
"""

import os
import sys
from importlib import import_module

import click
import typer

from wapo_analysis.cli.common import console_error
from wapo_analysis.errors import UserError
from wapo_analysis.version import __version__

app = typer.Typer(
    name="wapo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Which tokens bent the curve? Train, watch and diagnose RLVR runs token by token.\n\n"
    "Start with [bold]wapo demo[/]: GRPO and WAPO side by side in three minutes on a laptop.",
)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"wapo-analysis {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Attach the global options."""


for _module in ("training", "reading", "checking"):
    import_module(f"wapo_analysis.cli.{_module}").register(app)


def main() -> None:
    """Entry point of the ``wapo`` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; every user error becomes one line."""
    try:
        result = app(arguments, standalone_mode=False)
    except UserError as error:
        console_error(str(error))
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        console_error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0
