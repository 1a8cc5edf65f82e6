"""Commands that read runs: compare, diagnose, figures, report, schema."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wapo_analysis.cli.common import (
    Format,
    RunArgument,
    RunsArgument,
    console_error,
    open_runs,
)
from wapo_analysis.errors import UserError, unknown_name

if TYPE_CHECKING:
    from wapo_analysis.compare import Comparison
    from wapo_analysis.diagnose import Diagnosis
    from wapo_analysis.store import Run

Option = typer.Option
ImageFormat = Literal["png", "svg", "pdf"]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (compare, diagnose, figures, report, schema):
        app.command()(command)


def compare(
    runs: RunsArgument,
    format: Annotated[Format, Option("--format", "-f", help="Output format.")] = "text",
    out: Annotated[Path | None, Option(help="Also write figures and report here.")] = None,
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
        typer.echo(json.dumps(comparison.to_dict(), indent=1))
    elif format == "markdown":
        typer.echo(comparison.to_markdown())
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


def diagnose(
    run: RunArgument,
    format: Annotated[Format, Option("--format", "-f", help="Output format.")] = "text",
    fail_on: Annotated[
        Literal["warning", "critical"] | None,
        Option(help="Exit with code 1 if a finding is at least this severe."),
    ] = None,
    step: Annotated[
        int | None,
        Option(help="Explain this one step: the tokens, rollouts and prompts behind its update."),
    ] = None,
    top: Annotated[int, Option(help="Rows of each table, with --step.", min=1)] = 10,
) -> None:
    """Say what happened to a run, since when, and which class of updates drives it.

    Entropy is judged both ways against the run's own beginning. Examples:

        wapo diagnose runs/mine --format json --fail-on critical

        wapo diagnose runs/mine --step 41 --top 5
    """
    from wapo_analysis.diagnose import SEVERITIES
    from wapo_analysis.diagnose import diagnose as diagnose_run

    (opened,) = open_runs([run]) if (run / "manifest.json").exists() else _only(run)
    if step is not None:
        from wapo_analysis.cli.attributing import print_step

        if fail_on is not None:
            raise UserError("--fail-on judges the whole run; it cannot stand beside --step")
        print_step(opened, step, top, format)
        return
    found = diagnose_run(opened)
    if format == "json":
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        typer.echo(found.to_markdown() if format == "markdown" else found.to_text())
        if format == "text" and (found.culprits or found.drivers):
            typer.echo(f"\nnext: {_next_commands(opened, found)}")
    if fail_on is not None and found.worst_severity is not None:
        if SEVERITIES.index(found.worst_severity) >= SEVERITIES.index(fail_on):
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


def figures(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders; none draws the theory figures.", metavar="[RUN...]"),
    ] = None,
    only: Annotated[str | None, Option(help="Names of figures, comma-separated.")] = None,
    format: Annotated[ImageFormat, Option("--format", "-f", help="Image format.")] = "png",
    out: Annotated[Path, Option(help="Folder for the images.")] = Path("figures-out"),
    show_list: Annotated[bool, Option("--list", help="List all figures and stop.")] = False,
) -> None:
    """Draw figures of one run or of several side by side.

    Example:

        wapo figures runs/demo --only entropy,entropy_flow --format pdf --out paper
    """
    from wapo_analysis.plots import FIGURES

    if show_list:
        for name, spec in FIGURES.items():
            typer.echo(f"{name:20} {spec.caption}")
        return
    names = None if only is None else [n.strip() for n in only.split(",") if n.strip()]
    for name in names or []:
        if name not in FIGURES:
            raise unknown_name("figure", name, FIGURES)
    written = write_figures(open_runs(runs or []), out, format, names)
    typer.echo(f"{written} figures in {out}")


def write_figures(
    runs: "list[Run]", out: Path, format: ImageFormat, names: list[str] | None
) -> int:
    """Draw the named figures, or all that these runs can feed; returns how many."""
    from wapo_analysis.plots import FIGURES, render, save_figure, unavailable

    written = 0
    for name in names or FIGURES:
        reason = unavailable(FIGURES[name], runs)
        if reason is not None:
            if names is not None or runs:
                console_error(f"figure {name} left out: {reason}")
            continue
        out.mkdir(parents=True, exist_ok=True)
        save_figure(render(name, runs), out / f"{name}.{format}", format)
        written += 1
    if names is not None and not written:
        raise UserError("none of the figures could be drawn")
    return written


def report(
    runs: RunsArgument,
    out: Annotated[
        Path | None, Option(help="HTML file.  [default: report.html in the first RUN]")
    ] = None,
) -> None:
    """Write one self-contained HTML page: verdict, table, figures, sample completions.

    Example:

        wapo report runs/grpo-0 runs/wapo-0 --out report.html
    """
    from wapo_analysis.report.build import build_report

    target = out or runs[0] / "report.html"
    build_report(open_runs(runs), target)
    typer.echo(f"report: {target}")


def schema(
    format: Annotated[Format, Option("--format", "-f", help="Output format.")] = "text",
) -> None:
    """Show every table of a run, with columns, units and meaning."""
    from dataclasses import asdict

    from wapo_analysis.schema import TABLES

    if format == "json":
        typer.echo(json.dumps({name: asdict(table) for name, table in TABLES.items()}, indent=1))
        return
    for table in TABLES.values():
        if format == "markdown":
            typer.echo(f"## {table.name}\n\nOne row is {table.row}.\n")
            typer.echo("| column | type | unit | kind | meaning |\n|---|---|---|---|---|")
            for c in table:
                meaning = c.doc.replace("|", "\\|")
                typer.echo(f"| `{c.name}` | {c.dtype} | {c.unit} | {c.kind} | {meaning} |")
            typer.echo("")
        else:
            typer.echo(f"{table.name}: one row is {table.row}")
            for c in table:
                typer.echo(f"  {c.name:20} {c.dtype:8} {c.unit:12} {c.kind:9} {c.doc}")
            typer.echo("")
