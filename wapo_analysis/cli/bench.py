"""``wapo bench``: the performance goals, measured on the user's machine."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wapo_analysis.errors import UserError

Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(bench)


def bench(
    quick: Annotated[
        bool, Option("--quick", help="Headline numbers only, under a minute.")
    ] = False,
    format: Annotated[
        Literal["text", "json"], Option("--format", "-f", help="Output format.")
    ] = "text",
    out: Annotated[Path | None, Option(help="Also write the results to this JSON file.")] = None,
    doc: Annotated[Path | None, Option(help="Also write them as a Markdown page.")] = None,
    only: Annotated[str | None, Option(help="Areas, comma-separated, e.g. stats,memory.")] = None,
    threads: Annotated[int, Option(help="CPU threads of torch.", min=1)] = 1,
    rounds: Annotated[
        int | None, Option(help="Rounds of every ratio; by default each area's own.", min=1)
    ] = None,
    rows: Annotated[int, Option(help="Token rows of the class summary.", min=1)] = 20_000_000,
    model: Annotated[
        str | None,
        Option(
            help="Also measure errors on a rollout of this model: a .gguf file, folder or name."
        ),
    ] = None,
    logits: Annotated[
        Path | None, Option(help="Also measure errors on recorded logits (.npz: logits, targets).")
    ] = None,
    gpu_results: Annotated[
        Path | None, Option(help="Results of experiments/gpu_bench.py, for the page.")
    ] = None,
    results: Annotated[
        Path | None, Option(help="Measure nothing; show the results in this JSON file.")
    ] = None,
) -> None:
    """Measure how fast, small and exact capture is, against its goals.

    Ratios of programs run side by side; see docs/performance.md. Progress goes to stderr. Exits
    with code 1 if a program gave wrong numbers and was not timed. Examples:

        wapo bench --quick

        wapo bench --out results.json --doc performance.md
    """
    from wapo_analysis.bench.options import Options
    from wapo_analysis.bench.run import load, run_bench, save

    gpu = None if gpu_results is None else load(gpu_results)
    if results is not None:
        found = load(results)
    else:
        options = Options(
            quick=quick, rounds=rounds, rows=rows, model=model, logits=logits, say=_progress
        )
        areas = [area.strip() for area in (only or "").split(",") if area.strip()]
        found = run_bench(options, areas, threads, _command())
    if out is not None:
        save(found, out)
    if doc is not None:
        _write_page(found, gpu, doc)
    if format == "json":
        typer.echo(json.dumps(found, indent=1))
    else:
        _print_table(found)
    if found["failures"]:
        raise typer.Exit(1)


def _progress(line: str) -> None:
    typer.echo(line, err=True)


def _command() -> str:
    """What was typed, without the places of files, which mean nothing elsewhere."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return shlex.join(["wapo", *words])


def _write_page(results: dict[str, Any], gpu: dict[str, Any] | None, file: Path) -> None:
    from wapo_analysis.bench.page import to_markdown

    try:
        file.write_text(to_markdown(results, gpu), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def _print_table(results: dict[str, Any]) -> None:
    """Goals that were measured, and what was not."""
    from rich.console import Console
    from rich.table import Table

    from wapo_analysis.bench.page import HEADER, table

    shown = Table(title="Performance goals", title_justify="left")
    for number, name in enumerate(HEADER):
        shown.add_column(name, justify="left" if number in (0, 1, 6) else "right")
    goals = [goal for goal in results["goals"] if goal["measured"] is not None]
    for row in table(goals):
        shown.add_row(*row)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(shown)
    facts = results["machine"]
    typer.echo(
        f"{facts['cpu']}, {facts['threads']} thread(s), load {facts['load']}, torch "
        f"{facts['torch']}; {results['seconds']:.0f} s"
    )
    for area, why in results["failures"].items():
        typer.echo(f"{area} gave no numbers: {why}")
