"""Figures by name: whether a run can feed one, and making it."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.plots.catalogue import FIGURES, FigureSpec
from wapo_analysis.plots.frames import finite, rescored_steps
from wapo_analysis.plots.style import theme
from wapo_analysis.store import Run


def get_figure(name: str) -> FigureSpec:
    """Specification of a figure.

    Raises
    ------
    UserError
        If there is no figure of that name.
    """
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    return FIGURES[name]


def unavailable(spec: FigureSpec, runs: Sequence[Run]) -> str | None:
    """Why a figure cannot be drawn from these runs, or None if at least one of them can feed it.

    Parameters
    ----------
    spec : FigureSpec
        The figure.
    runs : sequence of Run
        Opened runs.

    Returns
    -------
    str or None
        One clause without a full stop.
    """
    if not spec.needs:
        return None
    if not runs:
        return "it needs at least one run"
    reasons = [_first_lack(spec, run) for run in runs]
    return None if None in reasons else reasons[0]


def render(name: str, runs: Sequence[Run] = ()) -> Figure:
    """Make a figure; pyplot does not know it and no global setting changes.

    Parameters
    ----------
    name : str
        A name in ``FIGURES``.
    runs : sequence of Run
        Opened runs; theory figures need none. Runs of one label are replicates.

    Returns
    -------
    Figure

    Raises
    ------
    UserError
        If the name is unknown or no run can feed the figure.
    """
    spec = get_figure(name)
    reason = unavailable(spec, runs)
    if reason is not None:
        raise UserError(f"figure {name!r} cannot be drawn: {reason}")
    with mpl.rc_context(theme()):
        axes = spec.plot(spec.prepare(runs))
        figure: Figure = axes.flat[0].figure
        figure.suptitle(spec.title, x=0.01, ha="left")
    return figure


def _first_lack(spec: FigureSpec, run: Run) -> str | None:
    """First need of the figure that a run does not meet, as a clause."""
    for need in spec.needs:
        reasons = [_lack(run, *choice.split(".")) for choice in need.split("|")]
        if None not in reasons:
            return reasons[0]
    return None


def _lack(run: Run, table: str, column: str) -> str | None:
    """Why a run cannot give a column of a table, or None if it can."""
    if table == "tokens":
        return _token_lack(run, column)
    if table == "probes" and run.probes.empty:
        return f"{run.name} has no probes (recorded with probe_every)"
    frame: pd.DataFrame = getattr(run, table)
    if frame.empty:
        return f"{run.name} has no {'steps' if table == 'steps' else 'class totals'} yet"
    has = column in frame and finite(frame[column]).notna().any()
    return None if has else f"{run.name} has no {column!r} in its {table} table"


def _token_lack(run: Run, column: str) -> str | None:
    steps = run.token_steps()
    if not steps:
        return f"{run.name} has no token rows (recorded with token_every or token_fraction 0)"
    if column in ("dprob", "dentropy"):
        steps = rescored_steps(run)
        if not steps:
            return f"{run.name} has no token that was re-scored after its update"
    # One whole statistic is there or not; the ends of the run tell.
    rows = run.tokens({steps[0], steps[-1]})
    known = np.isfinite(rows[column].to_numpy(dtype=np.float64)).any()
    return None if known else f"{run.name} has no {column!r} in its tokens table"
