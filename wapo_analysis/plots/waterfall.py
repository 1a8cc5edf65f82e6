"""The entropy change of the probed updates, taken apart until the parts make up the whole."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from wapo_taxonomy import CLASSES

from wapo_analysis.plots.frames import keep_labels, labels_of, run_label
from wapo_analysis.plots.panels import AxesArray, figure_height, label_panels, note
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.probes import closure, part_name, window
from wapo_analysis.schema import INTERACTION, MOMENTUM, UPDATE, WEIGHT_DECAY
from wapo_analysis.store import Run

_COLORS = {
    MOMENTUM: "#8A8A8A",
    WEIGHT_DECAY: "#B9B9B9",
    INTERACTION: "#5E5E5E",
    UPDATE: INK,
}
_COLUMNS = [
    "label", "seed", "run", "part", "dentropy", "predicted", "probes", "first", "last",
]  # fmt: skip


def prepare_waterfall(
    runs: Sequence[Run], first: int | None = None, last: int | None = None
) -> pd.DataFrame:
    """Sums over the probed updates of a window, per part of the update.

    Parameters
    ----------
    runs : sequence of Run
        Opened runs.
    first, last : int, optional
        First and last step of the window; by default all probed steps.

    Returns
    -------
    DataFrame
        One row per run and part (class codes, momentum, weight decay, interaction, update):
        ``dentropy`` and ``predicted`` in nats, ``probes`` in the window, its ``first`` and ``last``
        probed step. The parts add up to the update.
    """
    parts = []
    for place, run in enumerate(runs):
        rows = window(run.probes, first, last)
        if rows.empty:
            continue
        keys = {"label": run_label(run), "seed": run.manifest.get("seed"), "run": place}
        steps = rows["step"]
        span = {"probes": steps.nunique(), "first": steps.min(), "last": steps.max()}
        parts.append(closure(rows).reset_index().assign(**keys, **span)[_COLUMNS])
    if not parts:
        return keep_labels(pd.DataFrame(columns=_COLUMNS), runs)
    return keep_labels(pd.concat(parts, ignore_index=True), runs)


def plot_waterfall(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars that begin where the one before ends; the last one is what was measured.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`prepare_waterfall`.
    figure : Figure, optional
        Empty figure to draw into.

    Returns
    -------
    ndarray of Axes, shape (1, labels)
    """
    labels = labels_of(frame)
    columns = 2
    figure = figure or new_figure(figure_height(len(labels), 1, 3.6, columns))
    axes = label_panels(figure, labels, share_x=False, share_y=False, columns=columns)
    for ax, label in zip(axes[0], labels, strict=True):
        part = frame[frame["label"] == label].dropna(subset="part")
        if part.empty:
            note(ax, "no probed update\n(recorded with probe_every)")
        else:
            _panel(ax, part)
    axes[0, 0].set_ylabel("dH of all tokens, summed over\nthe probed updates (nats)")
    handles = [Line2D([], [], color=INK, marker="_", markersize=12, linestyle="none")]
    figure.legend(handles, ["predicted from the tokens' own updates"], loc="outside lower center")
    return axes


def _panel(ax: Axes, part: pd.DataFrame) -> None:
    means = part.groupby("part")[["dentropy", "predicted"]].mean()
    codes = [int(code) for code in means.index.to_numpy()]
    effect = dict(zip(codes, means["dentropy"].to_list(), strict=True))
    predicted = dict(zip(codes, means["predicted"].to_list(), strict=True))
    # Weight decay only if there is any; all other parts always, zero being an answer.
    shown = [code for code in effect if code != WEIGHT_DECAY or effect[code]]
    order = [code for code in shown if code != UPDATE] + [UPDATE]
    names = [part_name(code) if code != UPDATE else "measured" for code in order]
    base = 0.0
    for place, code in enumerate(order):
        size = effect[code]
        bottom = 0.0 if code == UPDATE else base
        ax.bar(place, size, bottom=bottom, color=_color(code), width=0.7)
        if code < len(CLASSES) and np.isfinite(predicted[code]):
            ax.plot(place, bottom + predicted[code], "_", color=INK, markersize=16)
        if code != UPDATE:
            base += size
            ax.plot([place + 0.35, place + 0.65], [base, base], color=MUTED, linewidth=0.8)
        _number(ax, place, bottom + size, size)
    ax.axhline(0, color=INK, linewidth=0.6)
    low, high = ax.dataLim.intervaly
    ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    ax.set_xticks(range(len(order)), labels=names, rotation=35, ha="right", fontsize=8.5)
    ax.grid(visible=False, axis="x")
    for code, tick in zip(order, ax.get_xticklabels(), strict=True):
        tick.set_color(CLASS_INK[CLASSES[code]] if code < len(CLASSES) else INK)
    ax.set_title(_span(part), loc="right", fontsize=8.5, fontweight="normal", color=MUTED)


def _number(ax: Axes, place: int, end: float, size: float) -> None:
    """Write the size of a bar beyond its end."""
    away = 2 if size >= 0 else -2
    ax.annotate(
        f"{size:+.2g}" if size else "0",
        (place, end),
        xytext=(0, away),
        textcoords="offset points",
        ha="center",
        va="bottom" if size >= 0 else "top",
        fontsize=8.5,
    )


def _color(code: int) -> str:
    return _COLORS[code] if code in _COLORS else CLASS_COLORS[CLASSES[code]]


def _span(part: pd.DataFrame) -> str:
    runs, probes = part["run"].nunique(), int(part.groupby("run")["probes"].first().sum())
    steps = f"steps {int(part['first'].min())}-{int(part['last'].max())}"
    return f"{probes} probes, {steps}" + (f", mean of {runs} runs" if runs > 1 else "")
