"""``wapo compare``."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from wapo_analysis.cli import (
    ChosenRun,
    FormatOption,
    MapOption,
    RunsArgument,
    log_settings,
    open_runs,
    show,
)
from wapo_analysis.cli.figures import write_figures


def compare(
    runs: RunsArgument,
    format: FormatOption = "text",
    out: Annotated[
        Path | None, Option(help="Also write figures and report here.  [default: not written]")
    ] = None,
    map: MapOption = None,
    chosen: ChosenRun = None,
) -> None:
    """Compare settings side by side, with intervals over seeds.

    Runs of one label whose settings agree count as seeds of one setting. Of the first two settings
    it also says at which step reward, entropy and the predicted dH of the classes part, and which
    classes are behind it. Example:

        wapo compare runs/demo
    """
    from wapo_analysis.compare import compare as compare_runs

    opened = open_runs(runs, log_settings(runs, map, chosen))
    show(compare_runs(opened), format)
    if out is not None:
        from wapo_analysis.report import build_report

        write_figures(opened, out / "figures", "png", None)
        build_report(opened, out / "report.html")
        echo(f"report: {out / 'report.html'}", err=format == "json")
