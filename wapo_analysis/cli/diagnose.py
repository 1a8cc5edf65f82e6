"""``wapo diagnose``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wapo_analysis.cli.common import Format, RunArgument, open_runs, say, show
from wapo_analysis.errors import UserError

if TYPE_CHECKING:
    from wapo_analysis.diagnose import Diagnosis
    from wapo_analysis.store import Run


Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(diagnose)


def diagnose(
    run: RunArgument,
    format: Annotated[Format, Option("--format", "-f", help="Output format.")] = "text",
    fail_on: Annotated[
        Literal["warning", "critical"] | None,
        Option(help="Exit with code 1 if a finding is at least this severe.  [default: never]"),
    ] = None,
    step: Annotated[
        int | None,
        Option(
            help="Explain one step: the tokens, rollouts and prompts behind it.  [default: the run]"
        ),
    ] = None,
    top: Annotated[int, Option(help="Rows of each table, with --step.", min=1)] = 10,
) -> None:
    """Say what happened to a run, since when, and what drives it.

    Entropy is judged both ways against the run's own baseline. Examples:

        wapo diagnose runs/mine --format json --fail-on critical

        wapo diagnose runs/mine --step 41 --top 5
    """
    from wapo_analysis.diagnose import diagnose as diagnose_run

    (opened,) = open_runs([run]) if (run / "manifest.json").exists() else _only(run)
    if step is not None:
        from wapo_analysis.attribute import attribute_step

        if fail_on is not None:
            raise UserError("--fail-on judges the whole run; it cannot be combined with --step")
        show(attribute_step(opened, step, top), format)
        return
    found = diagnose_run(opened)
    show(found, format)
    if format == "text" and (found.culprits or found.drivers):
        say(f"\nnext: {_next_commands(opened, found)}")
    if fail_on is not None and found.reaches(fail_on):
        raise typer.Exit(1)


def _next_commands(run: "Run", found: "Diagnosis") -> str:
    """Commands that go on from a diagnosis: its tokens, what leaving the class out would do."""
    commands = [f"wapo report {run.path}"]
    if not run.probes.empty and found.drivers:
        commands.insert(0, f"wapo whatif {run.path} --exclude-bins {found.drivers[0].cls}")
    if found.culprits:
        commands.insert(0, f"wapo diagnose {run.path} --step {found.culprits.steps[0]}")
    return "   |   ".join(commands)


def _only(path: Path) -> "list[Run]":
    """Open the one run at or below a path; several are an error that lists them."""
    opened = open_runs([path])
    if len(opened) > 1:
        names = ", ".join(str(run.path) for run in opened[:6])
        raise UserError(f"{path} holds {len(opened)} runs; name one of: {names}")
    return opened
