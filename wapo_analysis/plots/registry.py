"""Figures register here, each beside its code.

A figure is a pair: ``prepare_x(runs) -> frame`` takes opened runs and returns a small tidy frame;
``plot_x(frame, figure=None) -> axes`` draws that frame into a new or an empty matplotlib figure and
returns the array of its axes. The decorator :func:`figure` on ``plot_x`` is all that adds one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.plots.marks import draw_marks, prepare_marks
from wapo_analysis.plots.panels import AxesArray
from wapo_analysis.plots.style import theme, wrapped
from wapo_analysis.store import Need, Run

Prepare = Callable[[Sequence[Run]], pd.DataFrame]
Says = Callable[[pd.DataFrame], str]
P = TypeVar("P", bound="Plot")

GROUPS: Mapping[str, str] = {
    "training": "Training",
    "entropy": "Entropy",
    "classes": "Classes of updates",
    "shift": "Predicted and measured shift",
    "policy": "Probabilities and the gradient",
    "theory": "Theory, for comparison",
}
"""Groups of figures in reading order, with their headings."""


class Plot(Protocol):
    """Frame to axes."""

    __name__: str

    def __call__(self, frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
        """Draw and return the axes."""


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """One figure.

    Attributes
    ----------
    name : str
        Name on the command line and of the file.
    title : str
        The question it answers.
    caption : str
        What to look for; of a quantity of a paper also its definition and source.
    group : str
        A name in ``GROUPS``.
    needs : tuple of Need
        What a run must have, all of it. Empty: no run needed.
    prepare, plot : callable
        Runs to tidy frame, and frame to axes.
    says : callable, optional
        Frame to the answer in one sentence with its number, printed above the figure instead of
        the question; an empty text where the frame holds none.
    over_steps : bool
        The x axis is the step: baseline and onset are marked.
    """

    name: str
    title: str
    caption: str
    group: str
    needs: tuple[Need, ...]
    prepare: Prepare
    plot: Plot
    says: Says | None = None
    over_steps: bool = False


FIGURES: dict[str, FigureSpec] = {}
"""Every figure by name; group by group once the package is imported."""


def figure(
    *needs: Need,
    title: str,
    caption: str,
    group: str,
    prepare: Prepare,
    says: Says | None = None,
    over_steps: bool = False,
) -> Callable[[P], P]:
    """Make ``plot_x`` the figure ``x``, with what :class:`FigureSpec` says of it."""

    def add(plot: P) -> P:
        name = plot.__name__.removeprefix("plot_")
        FIGURES[name] = FigureSpec(
            name=name, title=title, caption=caption, group=group,
            needs=needs, prepare=prepare, plot=plot, says=says, over_steps=over_steps,
        )  # fmt: skip
        return plot

    return add


def sort_figures() -> None:
    """Put the figures in the order of their groups, keeping the order of their modules within."""
    order = list(GROUPS)
    for spec in sorted(FIGURES.values(), key=lambda spec: order.index(spec.group)):
        FIGURES[spec.name] = FIGURES.pop(spec.name)


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

    The reason is one clause without a full stop.
    """
    if not spec.needs:
        return None
    if not runs:
        return "it needs at least one run"
    first: str | None = None
    for run in runs:
        lacks = [reason for need in spec.needs if (reason := run.lacks(need)) is not None]
        if not lacks:
            return None
        first = first or lacks[0]
    return first


def render(name: str, runs: Sequence[Run] = (), marks: pd.DataFrame | None = None) -> Figure:
    """Make a figure; pyplot does not know it and no global setting changes.

    Parameters
    ----------
    name : str
        A name in ``FIGURES``.
    runs : sequence of Run
        Opened runs; theory figures need none. Runs of one setting are replicates.
    marks : DataFrame, optional
        Baselines and onsets of the runs, of :func:`wapo_analysis.plots.marks.prepare_marks`, where
        they are known; else every run is diagnosed.

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
        frame = spec.prepare(runs)
        axes = spec.plot(frame)
        if spec.over_steps:
            draw_marks(axes.flat, prepare_marks(runs) if marks is None else marks)
        drawn: Figure = axes.flat[0].figure
        answer = spec.says(frame) if spec.says is not None else ""
        drawn.suptitle(wrapped(answer or spec.title), x=0.01, ha="left")
    return drawn
