"""``wapo figures``."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from typer import Argument, Option

from wapo_analysis.cli import (
    ChosenRun,
    MapOption,
    console_error,
    log_settings,
    open_runs,
    say,
)
from wapo_analysis.errors import UserError, counted

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    import pandas as pd

    from wapo_analysis.store import Run

    _Pool: TypeAlias = ProcessPoolExecutor


ImageFormat = Literal["png", "svg", "pdf"]


def figures(
    runs: Annotated[
        list[Path] | None,
        Argument(
            help="Run folders, folders of runs, or any trainer's logs; none: theory.",
            metavar="RUN",
        ),
    ] = None,
    only: Annotated[
        str | None, Option(help="Names of figures, comma-separated.  [default: all]")
    ] = None,
    format: Annotated[ImageFormat, Option("--format", "-f", help="Image format.")] = "png",
    out: Annotated[Path, Option(help="Folder for the images.")] = Path("figures-out"),
    show_list: Annotated[bool, Option("--list", help="List all figures and stop.")] = False,
    map: MapOption = None,
    chosen: ChosenRun = None,
) -> None:
    """Draw figures of one run or of several side by side.

    Example:

        wapo figures runs/demo --only entropy,entropy_flow --format pdf --out paper
    """
    if show_list:
        from wapo_analysis.plots import FIGURES

        for name, spec in FIGURES.items():
            say(f"{name:20} {spec.caption}")
        return
    names = None if only is None else [n.strip() for n in only.split(",") if n.strip()]
    if names is not None:
        from wapo_analysis.plots import get_figure

        if not names:
            raise UserError("--only names no figure; wapo figures --list shows them")
        for name in names:
            get_figure(name)
    given = runs or []
    ready = all(path.exists() for path in given)
    with _helpers(names, given) if ready else nullcontext() as pool:
        written = _write(
            open_runs(given, log_settings(given, map, chosen)), out, format, names, pool
        )
    say(f"{counted(written, 'figure')} in {out}")


def write_figures(
    runs: "list[Run]", out: Path, format: ImageFormat, names: list[str] | None
) -> int:
    """Draw the named figures, or all that these runs can feed; returns how many."""
    with _helpers(names, runs) as pool:
        return _write(runs, out, format, names, pool)


@contextmanager
def _helpers(names: list[str] | None, runs: Sequence[object]) -> "Iterator[_Pool | None]":
    """Processes that draw beside this one where that pays; they load while this one does."""
    from concurrent.futures.process import BrokenProcessPool

    from wapo_analysis.train.jobs import Workers

    many = 2 if runs else 0
    pays = many if names is None else len(names) // _WORTH_A_PROCESS
    helpers = min((os.cpu_count() or 1) - 1, pays)
    if helpers <= 0:
        yield None
        return
    pool = Workers(helpers)
    try:
        with suppress(BrokenProcessPool, OSError):  # no more processes by a limit
            for _ in range(helpers):
                pool.submit(_load)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _load() -> None:
    """First job of a helper: import what drawing needs."""
    import wapo_analysis.plots  # noqa: F401

    gc.freeze()


def _write(
    runs: "list[Run]",
    out: Path,
    format: ImageFormat,
    names: list[str] | None,
    pool: "_Pool | None",
) -> int:
    from wapo_analysis.plots import FIGURES, unavailable

    feasible, left = list[str](), dict[str, list[str]]()
    for name in names or FIGURES:
        reason = unavailable(FIGURES[name], runs)
        if reason is None:
            feasible.append(name)
        elif names is not None or runs:
            left.setdefault(reason, []).append(name)
    for reason, those in left.items():
        console_error(f"figures left out because {reason}: {', '.join(those)}")
    if feasible:
        out.mkdir(parents=True, exist_ok=True)
        _draw_all(feasible, runs, out, format, pool)
    elif names is not None:
        raise UserError("none of the figures could be drawn")
    return len(feasible)


def _draw_all(
    names: list[str], runs: "list[Run]", out: Path, format: ImageFormat, pool: "_Pool | None"
) -> None:
    """Draw here from the front and, where there are helpers, elsewhere from the end."""
    from concurrent.futures.process import BrokenProcessPool

    from wapo_analysis.plots import prepare_marks, render, save_figure

    marks = prepare_marks(runs)
    gc.freeze()  # else every collection while drawing walks through all that was imported
    paths = [run.path for run in runs]
    elsewhere = {}
    for name in names[::-1]:
        if pool is None:
            break
        try:
            elsewhere[name] = pool.submit(_draw_elsewhere, name, paths, marks, out, format)
        except (BrokenProcessPool, OSError):
            break
    for name in names:
        if name not in elsewhere or elsewhere[name].cancel():
            save_figure(render(name, runs, marks), out / f"{name}.{format}", format)
    for name, future in elsewhere.items():
        try:
            if not future.cancelled():
                future.result()
        except BrokenProcessPool:  # a helper that was killed leaves its figures to us
            save_figure(render(name, runs, marks), out / f"{name}.{format}", format)


def _draw_elsewhere(
    name: str, paths: list[Path], marks: "pd.DataFrame", out: Path, format: ImageFormat
) -> None:
    """Draw one figure in a process that opens the runs for itself, once."""
    from wapo_analysis.plots import render, save_figure
    from wapo_analysis.store import open_run

    for path in paths:
        if path not in _opened:
            _opened[path] = open_run(path)
    figure = render(name, [_opened[path] for path in paths], marks)
    save_figure(figure, out / f"{name}.{format}", format)


_opened: "dict[Path, Run]" = {}
#: Figures that take longer than starting a process to draw them in.
_WORTH_A_PROCESS = 10
