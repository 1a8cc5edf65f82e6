"""``wapo report``."""

from pathlib import Path
from typing import Annotated

from typer import Option

from wapo_analysis.cli import (
    ChosenRun,
    MapOption,
    RunsArgument,
    holds_runs,
    log_settings,
    open_runs,
    say,
)


def report(
    runs: RunsArgument,
    out: Annotated[
        Path | None, Option(help="HTML file.  [default: report.html in the first RUN, else here]")
    ] = None,
    rows: Annotated[
        int, Option(help="Token rows the page may carry; steps the findings name first.", min=0)
    ] = 60_000,
    map: MapOption = None,
    chosen: ChosenRun = None,
) -> None:
    """Write one HTML page: verdict, charts, rollouts, tokens.

    It works from disk, without a network; wapo board serves the same page live.

    Example:

        wapo report runs/grpo-0 runs/wapo-0 --out report.html
    """
    from wapo_analysis.report import build_report

    own = holds_runs(runs[0])
    target = out or (runs[0] / "report.html" if own else Path(f"{runs[0].resolve().stem}.html"))
    build_report(open_runs(runs, log_settings(runs, map, chosen)), target, rows=rows)
    say(f"report: {target}")
