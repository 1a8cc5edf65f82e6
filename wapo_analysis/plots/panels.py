"""Panels: their grid, their axes, and remarks written into them."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from wapo_analysis.plots.style import INK, MUTED

AxesArray: TypeAlias = np.ndarray[Any, Any]
"""Array of matplotlib axes."""

MAX_COLUMNS = 4
_OWN_SCALE_FROM = 8.0
_PLAIN_BELOW = 300.0
_NOTHING = 1e-6


def label_panels(
    figure: Figure,
    labels: Sequence[str],
    rows: int = 1,
    *,
    share_x: bool = True,
    share_y: bool = True,
    columns: int = MAX_COLUMNS,
) -> AxesArray:
    """One column of panels per label, titled with it; labels beyond the last column wrap.

    Parameters
    ----------
    figure : Figure
        Empty figure.
    labels : sequence of str
        Column titles.
    rows : int
        Quantities, one panel each per label.
    share_x : bool
        All panels share their x axis.
    share_y : bool
        Panels of one quantity share their y axis.
    columns : int
        Most columns side by side.

    Returns
    -------
    ndarray of Axes, shape (rows, labels)
    """
    blocks = -(-len(labels) // columns)
    columns = -(-len(labels) // blocks)
    grid = figure.add_gridspec(blocks * rows, columns)
    axes: AxesArray = np.empty((rows, len(labels)), dtype=object)
    for place, label in enumerate(labels):
        block, column = divmod(place, columns)
        for row in range(rows):
            axes[row, place] = figure.add_subplot(
                grid[block * rows + row, column],
                sharex=axes[0, 0] if share_x else None,
                sharey=axes[row, 0] if share_y else None,
            )
            if column and share_y:
                axes[row, place].tick_params(which="both", labelleft=False)
            if row < rows - 1 and share_x:
                axes[row, place].tick_params(labelbottom=False)
        axes[0, place].set_title(label)
    return axes


def figure_height(labels: int, rows: int, panel: float = 2.6, columns: int = MAX_COLUMNS) -> float:
    """Height in inches of a figure laid out by :func:`label_panels`, legend included."""
    blocks = -(-max(labels, 1) // columns)
    return 1.0 + blocks * rows * panel


def share_y_if_close(row: AxesArray) -> None:
    """One y range for all panels of a row, unless a panel would be flat in it; then each says so.

    Parameters
    ----------
    row : ndarray of Axes
        Panels of one quantity with linear axes of their own.
    """
    drawn = [ax for ax in row if ax.lines or ax.collections or ax.patches]
    limits = [np.abs(ax.get_ylim()).max() for ax in drawn]
    if len(limits) < 2:
        return
    if max(limits) > _OWN_SCALE_FROM * min(limits):
        for ax in drawn:
            ax.annotate("own scale", (1, 1.02), xycoords="axes fraction", ha="right", fontsize=8.5)
        return
    low, high = min(ax.get_ylim()[0] for ax in drawn), max(ax.get_ylim()[1] for ax in drawn)
    for ax in drawn:
        ax.set_ylim(low, high)


def step_axis(axes: Iterable[Axes]) -> None:
    """Label the step axis of the given panels; a single step gets room on both sides."""
    for ax in axes:
        ax.set_xlabel("optimizer step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def fit_steps(axes: AxesArray, steps: Iterable[float]) -> None:
    """Step axis from the first to the last step, without the usual margin."""
    every = [float(step) for step in steps if np.isfinite(step)]
    if not every:
        return
    low, high = min(every), max(every)
    pad = 0.0 if high > low else 1.0
    for ax in axes.flat:
        ax.set_xlim(low - pad, high + pad)


def log_y(ax: Axes, values: Iterable[float]) -> None:
    """Logarithmic y axis if there is anything above 0; plain numbers where decades are few."""
    shown = np.array([value for value in values if np.isfinite(value) and value > 0])
    if not shown.size:
        return
    ax.set_yscale("log")
    # Rounding leaves masses of 1e-23 that would squeeze everything else into one line.
    ax.set_ylim(bottom=max(ax.get_ylim()[0], shown.max() * _NOTHING))
    if shown.max() < _PLAIN_BELOW * shown.min():
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def note(ax: Axes, text: str) -> None:
    """Write a remark in the middle of a panel that has nothing to show."""
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=MUTED, fontsize=10
    )


def corner(ax: Axes, text: str, lower_right: bool = False) -> None:
    """Write small text into the upper left corner of a panel, readable over what is drawn."""
    x, y = (0.97, 0.03) if lower_right else (0.03, 0.97)
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    side = {"ha": "right", "va": "bottom"} if lower_right else {"ha": "left", "va": "top"}
    style: dict[str, Any] = {**side, "fontsize": 8.5, "color": INK, "zorder": 6}
    ax.text(x, y, text, transform=ax.transAxes, bbox=ground, **style)
