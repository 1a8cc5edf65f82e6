"""Panels and the marks the figures share: grids, axes, remarks, replicate lines, class stacks."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from wapo_taxonomy import CLASS_NAMES, CLASSES, NONE, UNKNOWN

from wapo_analysis.plots.frames import labels_of
from wapo_analysis.plots.style import (
    BAND_ALPHA,
    CLASS_COLORS,
    INK,
    LEGEND_SIZE,
    MUTED,
    SIGN_COLORS,
    SIGN_NAMES,
    SIGNS,
    WIDTH,
    inches,
    label_styles,
    new_figure,
    wrapped,
)

#: Array of matplotlib axes.
AxesArray: TypeAlias = np.ndarray[Any, Any]

MAX_COLUMNS = 4
#: Name of the step axis, before the number of updates is known.
STEP_LABEL = "rollout step"
_OWN_SCALE_FROM = 8.0
_PLAIN_BELOW = 300.0
_NOTHING = 1e-6


def label_figure(
    frame: pd.DataFrame,
    figure: Figure | None,
    panel: float,
    rows: int = 1,
    *,
    share_x: bool = True,
    share_y: bool = True,
    columns: int = MAX_COLUMNS,
) -> tuple[list[str], Figure, AxesArray]:
    """One column of panels per label, titled with it; labels beyond the last column wrap.

    Returns labels, the figure, and its axes, an array of shape (rows, labels).

    Parameters
    ----------
    frame : DataFrame
        With the column ``label``.
    figure : Figure, optional
        Empty; None makes one.
    panel : float
        Height of a panel, inches.
    rows : int
        Quantities, one panel each per label.
    share_x : bool
        All panels share their x axis.
    share_y : bool
        Panels of one quantity share their y axis.
    columns : int
        Most columns side by side.
    """
    labels = labels_of(frame)
    blocks = -(-max(len(labels), 1) // columns)
    figure = figure or new_figure(1.0 + blocks * rows * panel)
    columns = -(-len(labels) // blocks)
    grid = figure.add_gridspec(blocks * rows, max(columns, 1))
    axes: AxesArray = np.empty((rows, len(labels)), dtype=object)
    for place, label in enumerate(labels):
        block, column = divmod(place, columns)
        for row in range(rows):
            axes[row, place] = figure.add_subplot(
                grid[block * rows + row, column],
                sharex=axes[0, 0] if share_x else None,
                sharey=axes[row, 0] if share_y else None,
                label=label,
            )
            if column and share_y:
                axes[row, place].tick_params(which="both", labelleft=False)
            if row < rows - 1 and share_x:
                axes[row, place].tick_params(labelbottom=False)
        name_panel(axes[0, place], label)
    return labels, figure, axes


def name_panel(ax: Axes, text: str, size: float = 10.5, beside: bool = False) -> None:
    """Title of a panel, or what stands ``beside`` it, in lines that do not leave the panel."""
    # Measured before the layout, which makes panels somewhat larger.
    room = 1.15 * (ax.bbox.height if beside else ax.bbox.width) / ax.figure.dpi
    weight = "normal" if beside else "bold"
    lines = "\n".join(wrapped(line, room, size, weight) for line in text.split("\n"))
    (ax.set_ylabel if beside else ax.set_title)(lines, fontsize=size)


def label_row(
    frame: pd.DataFrame, figure: Figure | None, panel: float, **layout: Any
) -> tuple[list[str], Figure, AxesArray]:
    """:func:`label_figure` with one panel for each label; axes of shape (labels,)."""
    labels, figure, axes = label_figure(frame, figure, panel, **layout)
    row: AxesArray = axes[0]
    return labels, figure, row


def label_parts(
    axes: Iterable[Any], frame: pd.DataFrame, labels: Sequence[str]
) -> Iterator[tuple[Any, str, pd.DataFrame]]:
    """For each label its panel or panels, its name and its rows."""
    for ax, label in zip(axes, labels, strict=False):
        yield ax, label, frame[frame["label"] == label]


def filled_parts(
    axes: AxesArray, frame: pd.DataFrame, labels: Sequence[str], known: str | list[str], lacks: str
) -> Iterator[tuple[Axes, str, pd.DataFrame]]:
    """As `label_parts`, of rows that have ``known``; a panel without any says what it lacks."""
    for ax, label, rows in label_parts(axes, frame, labels):
        part = rows.dropna(subset=known)
        if part.empty:
            note(ax, lacks)
        else:
            yield ax, label, part


def share_y_if_close(row: AxesArray) -> None:
    """One y range for all panels of a row, unless a panel would be flat in it; then each says so.

    ``row``: panels of one quantity with linear axes of their own.
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


def step_axis(axes: AxesArray, steps: Iterable[float]) -> None:
    """Step axis from the first to the last step, named below the last row of panels.

    A single step gets room on both sides.
    """
    for ax in axes if axes.ndim == 1 else axes[-1]:
        ax.set_xlabel(STEP_LABEL)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
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


def replicate_line(
    ax: Axes,
    frame: pd.DataFrame,
    column: str,
    label: str | None = None,
    positive: bool = False,
    **style: Any,
) -> None:
    """Draw the mean over runs against the step, with a band from the lowest to the highest run.

    Points without neighbours get a marker, so a single step is seen. A column without any number
    draws nothing but says so in the legend.

    Parameters
    ----------
    frame : DataFrame
        Rows of one label with ``run``, ``step`` and the column.
    label : str, optional
        Legend text; the number of runs is added.
    positive : bool
        For a logarithmic axis: where the mean is 0 a triangle stands on the lower edge.
    style : keyword arguments
        For ``Axes.plot``.
    """
    table = frame.dropna(subset="step").pivot(index="step", columns="run", values=column)
    table = table.astype("float64")
    steps, mean = table.index.to_numpy(), table.mean(axis=1).to_numpy(copy=True)
    if positive:
        _mark_zeros(ax, steps[mean == 0], style.get("color", INK))
        mean[~(mean > 0)] = np.nan
    if not np.isfinite(mean).any():
        ax.plot([], [], label=label and f"{label}: {_empty(positive)}", **style)
        return
    runs = int(table.notna().any().sum())
    text = f"{label} (mean of {runs} runs)" if label and runs > 1 else label
    alone = isolated(mean)
    dots = {"marker": "o", "markersize": 3.5, "markevery": alone} if alone else {}
    ax.plot(steps, mean, label=text, **{**dots, **style})
    if runs > 1:
        low, high = table.min(axis=1), table.max(axis=1)
        low = low.where(low > 0) if positive else low
        ax.fill_between(steps, low, high, color=style.get("color"), alpha=BAND_ALPHA, linewidth=0)


def _mark_zeros(ax: Axes, steps: np.ndarray[Any, Any], color: str) -> None:
    """Zeros have no place on a logarithmic axis: triangles on its lower edge stand for them."""
    if len(steps):
        known = any(line.get_label() == ZERO for line in ax.lines)
        ax.plot(
            steps, np.zeros(len(steps)), "v", color=color, markersize=4, alpha=0.8, clip_on=False,
            transform=ax.get_xaxis_transform(), zorder=3, label="_nolegend_" if known else ZERO,
        )  # fmt: skip


ZERO = "exactly 0"


def _empty(positive: bool) -> str:
    return "no value above 0" if positive else "not available here"


def isolated(values: np.ndarray[Any, Any]) -> list[int]:
    """Places of the finite values that have no finite neighbour."""
    fine = np.isfinite(values)
    before, after = np.r_[False, fine[:-1]], np.r_[fine[1:], False]
    return [int(place) for place in np.flatnonzero(fine & ~before & ~after)]


def label_lines(ax: Axes, frame: pd.DataFrame, column: str, positive: bool = False) -> None:
    """One replicate line per label of a step frame, in the label's own style."""
    styles = label_styles(labels_of(frame))
    for label, rows in frame.groupby("label", sort=False):
        name = str(label)
        replicate_line(ax, rows, column, name, positive, **styles[name].line)
    if not any(len(np.atleast_1d(drawn.get_xdata())) for drawn in ax.lines):
        note(ax, f"{_empty(positive)}:\n'{column.replace('_', ' ')}'")


def mark_missing(ax: Axes, frame: pd.DataFrame, column: str) -> None:
    """Put a cross on the step axis where a run has some numbers of a column but not this one."""
    known = frame.groupby("run")[column].transform("count") > 0
    steps = sorted(set(frame.loc[known & frame[column].isna(), "step"]))
    if not steps:
        return
    ax.plot(
        steps,
        [0.02] * len(steps),
        "x",
        color=INK,
        markersize=4.5,
        transform=ax.get_xaxis_transform(),
        label="not a finite number",
        clip_on=False,
    )


def stack(ax: Axes, table: pd.DataFrame) -> None:
    """Stack the classes over the steps, positive values upwards, negative ones downwards.

    ``table``: index step, one column per class name; NaN leaves a gap.
    """
    names = [name for name in CLASS_COLORS if name in table and table[name].notna().any()]
    steps = table.index.to_numpy(dtype=np.float64)
    for side in (1.0, -1.0):
        base = np.zeros(len(steps))
        for name in names:
            part = np.maximum(side * table[name].to_numpy(dtype=np.float64), 0.0) * side
            top = base + np.nan_to_num(part)
            if np.any(top != base):
                _slab(ax, steps, base, np.where(np.isnan(part), np.nan, top), CLASS_COLORS[name])
            base = top


def _slab(
    ax: Axes,
    steps: np.ndarray[Any, Any],
    base: np.ndarray[Any, Any],
    top: np.ndarray[Any, Any],
    color: str,
) -> None:
    """One layer of a stack: an area, or a bar where there is but one step."""
    if len(steps) > 1:
        ax.fill_between(steps, base, top, color=color, linewidth=0)
    else:
        ax.bar(steps, top - base, bottom=base, color=color, width=0.6)


def pair_legend(figure: Figure, predicted: str, measured: str, *extra: Line2D) -> None:
    """Legend of outlined bars beside filled ones, below the panels."""
    outline = Patch(facecolor="white", edgecolor=MUTED, label=predicted)
    handles = [outline, Patch(color=MUTED, label=measured), *extra]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def class_legend(
    figure: Figure, names: Iterable[str] = CLASSES, extra: Sequence[Artist] = ()
) -> None:
    """Legend of class colours below the panels."""
    patches = [Patch(color=CLASS_COLORS[name], label=_LEGEND.get(name, name)) for name in names]
    handles = [*patches, *extra]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7))


_LEGEND = {NONE: "none (A = 0)", UNKNOWN: "unknown (statistic missing)"}


def class_text(code: int) -> str:
    """Name of a class in legends and titles."""
    name = CLASS_NAMES[code]
    return _LEGEND.get(name, name)


def label_legend(figure: Figure, ax: Axes) -> None:
    """Legend of the lines of one panel below all panels."""
    handles: list[Artist] = list(ax.get_legend_handles_labels()[0])
    if ax.collections:
        handles.append(Patch(color=MUTED, alpha=BAND_ALPHA, label="from lowest to highest run"))
    if handles:
        texts = [wrapped(str(h.get_label()), WIDTH - 1, LEGEND_SIZE, "normal") for h in handles]
        columns = _fitting_columns(texts, min(len(handles), MAX_COLUMNS))
        figure.legend(handles, texts, loc="outside lower center", ncols=columns)


def _fitting_columns(texts: Sequence[str], most: int) -> int:
    """As many columns of a legend as fit the width of a figure."""
    beside = 5 * LEGEND_SIZE / 72  # a line, and the gaps beside it
    sizes = [beside + max(inches(line, LEGEND_SIZE) for line in t.split("\n")) for t in texts]
    for count in range(most, 1, -1):
        if sum(max(part) for part in np.array_split(sizes, count)) <= WIDTH - 0.2:
            return count
    return 1


def sign_legend(figure: Figure, *extra: Line2D) -> None:
    """Legend of the colours of the sign of the advantage below the panels."""
    patches = [Patch(color=SIGN_COLORS[s], label=f"tokens with {SIGN_NAMES[s]}") for s in SIGNS]
    figure.legend(handles=[*patches, *extra], loc="outside lower center", ncols=3)
