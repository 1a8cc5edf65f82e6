"""``wapo whatif``, and what ``wapo diagnose --step`` prints."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from wapo_analysis.cli.common import Format, RunArgument, say

if TYPE_CHECKING:
    from wapo_analysis.attribute import WhatIf
    from wapo_analysis.store import Run

Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(whatif)


def whatif(
    run: RunArgument,
    exclude_bins: Annotated[
        str, Option(help="Classes to take out, e.g. neg_peak or pos_valley,neg (comma-separated).")
    ],
    format: Annotated[Format, Option("--format", "-f", help="Output format.")] = "text",
) -> None:
    """Estimate how entropy would have gone without some classes.

    From recorded probes alone, so it takes seconds; the run must have been trained with
    --probe-every. docs/attribution.md says what it rests on and how it compares with real re-runs.
    Example:

        wapo train --probe-every 5 --out runs/mine

        wapo whatif runs/mine --exclude-bins neg_peak
    """
    from wapo_analysis.attribute import what_if
    from wapo_analysis.store import open_run

    names = [name.strip() for name in exclude_bins.split(",") if name.strip()]
    found = what_if(open_run(run), names)
    if format == "json":
        say(json.dumps(found.to_dict(), indent=1))
    else:
        say("\n".join(_lines(found, format == "markdown")))


def _lines(found: "WhatIf", markdown: bool) -> list[str]:
    """Sentences and a short table of the path."""
    rows = [["step", "recorded", "estimated", "90% band"]]
    count = len(found.path)
    for place in sorted({round(i * (count - 1) / 9) for i in range(10)}):
        row = found.path.iloc[place]
        numbers = [f"{row[name]:.3f}" for name in ("recorded", "estimated")]
        rows.append([str(int(row["step"])), *numbers, f"{row['low']:.3f} to {row['high']:.3f}"])
    if markdown:
        table = [f"| {' | '.join(row)} |" for row in [rows[0], ["---:"] * 4, *rows[1:]]]
        return [f"### {found.run}", "", *(f"- {s}" for s in found.sentences()), "", *table]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        "  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
    ]
    return [found.run, *(f"  {s}" for s in found.sentences()), "", *table]


def print_step(run: "Run", step: int, top: int, format: Format) -> None:
    """Print which tokens, rollouts and prompts hold a step's update."""
    from wapo_analysis.attribute import attribute_step
    from wapo_analysis.attribute.words import to_markdown, to_text

    found = attribute_step(run, step, top)
    if format == "json":
        say(json.dumps(found.to_dict(), indent=1))
    else:
        say(to_markdown(found) if format == "markdown" else to_text(found))
