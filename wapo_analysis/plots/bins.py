"""Where on the probability scale the gradient sits: bins of p by sign of the advantage."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from wapo_analysis.plots.frames import class_frame, keep_labels, labels_of, mean_over_runs
from wapo_analysis.plots.panels import (
    AxesArray,
    figure_height,
    label_panels,
    note,
    share_y_if_close,
)
from wapo_analysis.plots.style import INK, SIGN_COLORS, SIGN_NAMES, new_figure
from wapo_analysis.schema import PAPER_EDGES, PROB_EDGES
from wapo_analysis.store import Run

_SIGNS = (1, -1)
_KEYS = ("scale", "sign", "prob_bin")
_BAR = 0.4
_COLUMNS = 3
EDGES = {"paper": PAPER_EDGES, "fine": PROB_EDGES}


def bin_names(edges: Sequence[float]) -> list[str]:
    """Text of every bin between the edges, such as ``.1-.25``."""
    texts = [f"{edge:g}".replace("0.", ".") for edge in edges]
    return [f"{low}-{high}" for low, high in zip(texts, texts[1:], strict=False)]


def prepare_bin_mass(runs: Sequence[Run]) -> pd.DataFrame:
    """Gradient mass per bin of p and sign over all steps, exact and by the official proxy.

    Returns
    -------
    DataFrame
        ``label, seed, run, scale, sign, prob_bin, exact, proxy``: shares of the run's whole exact
        mass; scale is "paper" (five bins) or "fine" (the bins of the schema). The proxy is the sum
        of |coef| (1 - p) instead of |dL/dz|; it may add up to less than one.
    """
    frame = _both_scales(class_frame(runs, ("grad_mass", "grad_mass_proxy"), _BY))
    total = frame.groupby(["run", "scale"])["grad_mass"].transform("sum")
    total = total.where(total > 0)
    shares = frame.assign(exact=frame["grad_mass"] / total, proxy=frame["grad_mass_proxy"] / total)
    return keep_labels(shares.drop(columns=["grad_mass", "grad_mass_proxy"]), runs)


def plot_bin_mass(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the exact mass with the proxy as a tick; paper's bins above, fine ones below.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`prepare_bin_mass`.
    figure : Figure, optional
        Empty figure to draw into.

    Returns
    -------
    ndarray of Axes, shape (2, labels)
    """
    labels = labels_of(frame)
    figure = figure or new_figure(figure_height(len(labels), 2, 2.7, _COLUMNS))
    axes = _bin_panels(figure, labels)
    means = mean_over_runs(frame, _KEYS)
    for column, label in enumerate(labels):
        for ax, scale in zip(axes[:, column], EDGES, strict=True):
            part = means[(means["label"] == label) & (means["scale"] == scale)]
            _bars(ax, part, "exact", scale, "nothing had a gradient,\nor the norm is unknown")
            for sign in _SIGNS:
                rows = part[(part["sign"] == sign) & (part["proxy"] > 0)]
                place = rows["prob_bin"] - sign * _BAR / 2
                if len(rows):
                    ax.plot(place, rows["proxy"], "_", color=INK, ms=11)
    for row in axes:
        share_y_if_close(row)
        row[0].set_ylabel("share of\ngradient mass")
    _sign_legend(figure, Line2D([], [], color=INK, marker="_", ms=11, ls="", label="proxy (1 - p)"))
    return axes


def prepare_token_strength(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean coefficient of a token per bin of p and sign over all steps.

    Returns
    -------
    DataFrame
        ``label, seed, run, scale, sign, prob_bin, strength``: mean of coef = -dL/dlogp over the
        tokens of the bin. The official token strength is w * ratio * A; coef is that with
        clipping, gates and the outer normaliser included, so clipped tokens count as 0.
    """
    frame = _both_scales(class_frame(runs, ("coef_sum", "tokens"), _BY))
    frame["strength"] = frame["coef_sum"] / frame["tokens"].where(frame["tokens"] > 0)
    return keep_labels(frame.drop(columns=["coef_sum", "tokens"]), runs)


def plot_token_strength(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the mean coefficient; paper's bins above, fine ones below.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`prepare_token_strength`.
    figure : Figure, optional
        Empty figure to draw into.

    Returns
    -------
    ndarray of Axes, shape (2, labels)
    """
    labels = labels_of(frame)
    figure = figure or new_figure(figure_height(len(labels), 2, 2.7, _COLUMNS))
    axes = _bin_panels(figure, labels)
    means = mean_over_runs(frame, _KEYS)
    for column, label in enumerate(labels):
        for ax, scale in zip(axes[:, column], EDGES, strict=True):
            part = means[(means["label"] == label) & (means["scale"] == scale)]
            _bars(ax, part, "strength", scale, "not available here:\n'coef' was not recorded")
            ax.axhline(0, color=INK, linewidth=0.6)
    for row in axes:
        share_y_if_close(row)
        row[0].set_ylabel("mean coefficient,\n-dL/dlogp")
    _sign_legend(figure)
    return axes


_BY = ("sign", "prob_bin")


def _both_scales(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of A > 0 and A < 0 in the fine bins and again, summed, in the paper's."""
    signed = frame[frame["sign"].isin(_SIGNS)]
    merge = np.searchsorted(PAPER_EDGES, PROB_EDGES[:-1], side="right") - 1
    coarse = signed.assign(prob_bin=signed["prob_bin"].astype(int).map(dict(enumerate(merge))))
    keys = ["label", "run", *_BY]
    seeds = coarse.groupby(keys, sort=False)["seed"].first()
    numbers = coarse.drop(columns="seed").groupby(keys, sort=False).sum(min_count=1)
    paper = numbers.assign(seed=seeds).reset_index()
    both = pd.concat([paper.assign(scale="paper"), signed.assign(scale="fine")], ignore_index=True)
    return both[["label", "seed", "run", *_KEYS, *numbers.columns]]


def _bin_panels(figure: Figure, labels: Sequence[str]) -> AxesArray:
    """Two rows of panels, labels across: the paper's bins above, the fine ones below."""
    axes = label_panels(figure, labels, 2, share_x=False, share_y=False, columns=_COLUMNS)
    for row, edges in zip(axes, EDGES.values(), strict=True):
        names = bin_names(edges)
        for ax in row:
            ax.set_xticks(range(len(names)), labels=names, rotation=45, ha="right", fontsize=8)
            ax.set_xlim(-0.6, len(names) - 0.4)
            ax.grid(visible=False, axis="x")
    for ax in axes[1]:
        ax.set_xlabel("p of the sampled token")
    return axes


def _bars(ax: Axes, part: pd.DataFrame, column: str, scale: str, why: str) -> None:
    if not part[column].notna().any():
        note(ax, why)
        return
    for sign in _SIGNS:
        rows = part[part["sign"] == sign]
        ax.bar(rows["prob_bin"] - sign * _BAR / 2, rows[column], _BAR, color=SIGN_COLORS[sign])


def _sign_legend(figure: Figure, *extra: Line2D) -> None:
    patches = [Patch(color=SIGN_COLORS[s], label=f"tokens with {SIGN_NAMES[s]}") for s in _SIGNS]
    figure.legend(handles=[*patches, *extra], loc="outside lower center", ncols=3)
