"""``wapo compare``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wapo_analysis.cli.common import Format, RunsArgument, open_runs, say
from wapo_analysis.cli.figures import write_figures

if TYPE_CHECKING:
    from wapo_analysis.compare import Comparison


Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(compare)


def compare(
    runs: RunsArgument,
    format: Annotated[Format, Option("--format", "-f", help="Output format.")] = "text",
    out: Annotated[
        Path | None, Option(help="Also write figures and report here.  [default: not written]")
    ] = None,
) -> None:
    """Compare settings side by side, with intervals over seeds.

    Runs that share a label count as seeds of one setting. Of the first two settings it also says
    at which step reward, entropy and class flows part, and which classes are behind it. Example:

        wapo compare runs/demo
    """
    from wapo_analysis.compare import compare as compare_runs

    opened = open_runs(runs)
    comparison = compare_runs(opened)
    if format == "json":
        say(json.dumps(comparison.to_dict(), indent=1))
    elif format == "markdown":
        say(comparison.to_markdown())
    else:
        print_comparison(comparison)
    if out is not None:
        from wapo_analysis.report.build import build_report

        write_figures(opened, out / "figures", "png", None)
        build_report(opened, out / "report.html")
        typer.echo(f"report: {out / 'report.html'}", err=format == "json")


def print_comparison(comparison: "Comparison") -> None:
    """Print the verdict table: one row per quantity, one column per setting."""
    from rich.console import Console
    from rich.table import Table

    header, *rows = comparison.rows()
    table = Table(title=comparison.title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    for sentence in comparison.sentences():
        console.print(sentence, markup=False, highlight=False)
