"""``wapo report``."""

from pathlib import Path
from typing import Annotated

import typer

from wapo_analysis.cli.common import RunsArgument, open_runs, say

Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(report)


def report(
    runs: RunsArgument,
    out: Annotated[
        Path | None, Option(help="HTML file.  [default: report.html in the first RUN]")
    ] = None,
) -> None:
    """Write one HTML page: verdict, table, figures, completions.

    Example:

        wapo report runs/grpo-0 runs/wapo-0 --out report.html
    """
    from wapo_analysis.report.build import build_report

    target = out or runs[0] / "report.html"
    build_report(open_runs(runs), target)
    say(f"report: {target}")
