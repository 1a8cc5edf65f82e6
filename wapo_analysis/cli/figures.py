"""``wapo figures``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wapo_analysis.cli.common import console_error, open_runs, say
from wapo_analysis.errors import UserError, unknown_name

if TYPE_CHECKING:
    from wapo_analysis.store import Run


Option = typer.Option


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(figures)


ImageFormat = Literal["png", "svg", "pdf"]


def figures(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders; none draws the theory figures.", metavar="[RUN...]"),
    ] = None,
    only: Annotated[
        str | None, Option(help="Names of figures, comma-separated.  [default: all]")
    ] = None,
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
            say(f"{name:20} {spec.caption}")
        return
    names = None if only is None else [n.strip() for n in only.split(",") if n.strip()]
    for name in names or []:
        if name not in FIGURES:
            raise unknown_name("figure", name, FIGURES)
    written = write_figures(open_runs(runs or []), out, format, names)
    say(f"{written} figures in {out}")


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
