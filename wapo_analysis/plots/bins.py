"""Where on the probability scale the gradient sits: bins of p by sign of the advantage."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from wapo_analysis.plots.frames import class_frame, keep_labels, labels_of, mean_over_runs
from wapo_analysis.plots.panels import AxesArray, figure_height, label_panels, note, sign_legend
from wapo_analysis.plots.registry import figure
from wapo_analysis.plots.style import INK, SIGN_COLORS, SIGN_NAMES, SIGNS, new_figure
from wapo_analysis.plots.titles import joined, largest
from wapo_analysis.schema import PAPER_EDGES, PROB_EDGES
from wapo_analysis.store import Need, Run


def bin_names(edges: Sequence[float]) -> list[str]:
    """Text of every bin between the edges, such as ``.1-.25``."""
    texts = [f"{edge:g}".replace("0.", ".") for edge in edges]
    return [f"{low}-{high}" for low, high in zip(texts, texts[1:], strict=False)]


def prepare_bin_mass(runs: Sequence[Run]) -> pd.DataFrame:
    """Gradient mass per bin of p and sign over all steps, exact and by the official proxy.

    Returns
    -------
    DataFrame
        ``label, seed, run, sign, prob_bin, exact, proxy``: shares of the run's whole exact mass in
        the paper's five bins of p. The proxy is the sum of |coef| (1 - p) instead of |dL/dz|; it
        may add up to less than one.
    """
    frame = _paper_bins(runs, ("grad_mass", "grad_mass_proxy"))
    total = frame.groupby("run")["grad_mass"].transform("sum")
    total = total.where(total > 0)
    shares = frame.assign(exact=frame["grad_mass"] / total, proxy=frame["grad_mass_proxy"] / total)
    return keep_labels(shares.drop(columns=["grad_mass", "grad_mass_proxy"]), runs)


def _says_bin_mass(frame: pd.DataFrame) -> str:
    names, told = bin_names(PAPER_EDGES), []
    means = mean_over_runs(frame, ("sign", "prob_bin")).dropna(subset="exact")
    for label, rows in means.groupby("label", sort=False):
        top = largest(rows, "exact")
        told.append(
            f"{label}: {top['exact']:.0%} of the gradient is on tokens with "
            f"{SIGN_NAMES[int(top['sign'])]}, p in {names[int(top['prob_bin'])]}"
        )
    return joined(told)


@figure(
    Need("classes", "grad_mass"),
    title="At which probabilities does the gradient sit?",
    caption="Look for the longest bar: it names the probability and the sign that own the update, "
    "and the black tick shows what the (1 - p) proxy of the published code says. Bins are those of "
    "arXiv 2606.16154.",
    group="policy",
    prepare=prepare_bin_mass,
    says=_says_bin_mass,
)
def plot_bin_mass(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the exact mass, A > 0 upwards, A < 0 downwards, the proxy as a tick.

    Returns axes of shape (labels,).
    """
    labels = labels_of(frame)
    figure = figure or new_figure(figure_height(len(labels), 1, 3.4))
    axes = _bin_panels(figure, labels)
    means = mean_over_runs(frame, ("sign", "prob_bin"))
    for ax, label in zip(axes, labels, strict=True):
        part = means[means["label"] == label]
        if not part["exact"].notna().any():
            note(ax, "nothing had a gradient,\nor the norm is unknown")
            continue
        for sign in SIGNS:
            rows = part[(part["sign"] == sign) & (part["exact"] > 0)]
            _mirrored(ax, rows["prob_bin"], sign * rows["exact"], sign)
            ticks = part[(part["sign"] == sign) & (part["proxy"] > 0)]
            if len(ticks):
                ax.plot(ticks["prob_bin"], sign * ticks["proxy"], "_", color=INK, ms=16, mew=1.4)
    top = means.groupby("sign")["exact"].max().reindex(list(SIGNS)).fillna(0)
    room = 0.12 * float(top.sum()) or 1.0
    axes[0].set_ylim(-top[-1] - room, top[1] + room)
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0%}"))
    axes[0].set_ylabel("share of the gradient mass")
    proxy = Line2D([], [], color=INK, marker="_", ms=11, ls="", label="proxy (1 - p)")
    sign_legend(figure, proxy)
    return axes


def _mirrored(ax: Axes, places: pd.Series, sizes: pd.Series, sign: int) -> None:
    """Bars of one sign with their share beyond the end of each; tiny ones go without."""
    ax.bar(places, sizes, 0.7, color=SIGN_COLORS[sign])
    ax.axhline(0, color=INK, linewidth=0.6)
    for place, size in zip(places, sizes, strict=True):
        if abs(size) >= 0.005:
            ax.annotate(
                f"{abs(size):.0%}", (place, size), xytext=(0, 3 * sign),
                textcoords="offset points", ha="center", va="bottom" if sign > 0 else "top",
                fontsize=8.5,
            )  # fmt: skip


def prepare_token_strength(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean coefficient of a token per bin of p and sign over all steps.

    Returns
    -------
    DataFrame
        ``label, seed, run, sign, prob_bin, strength``: mean of coef = -dL/dlogp over the tokens of
        the bin. The official token strength is w * ratio * A; coef is that with clipping, gates
        and the outer normaliser included, so clipped tokens count as 0.
    """
    frame = _paper_bins(runs, ("coef_sum", "tokens"))
    frame["strength"] = frame["coef_sum"] / frame["tokens"].where(frame["tokens"] > 0)
    return keep_labels(frame.drop(columns=["coef_sum", "tokens"]), runs)


def _says_token_strength(frame: pd.DataFrame) -> str:
    """Strongest bin against the weakest that is moved at all."""
    names, told = bin_names(PAPER_EDGES), []
    means = mean_over_runs(frame, ("sign", "prob_bin")).dropna(subset="strength")
    for label, rows in means[means["strength"] != 0].groupby("label", sort=False):
        size, top = rows["strength"].abs(), largest(rows, "strength")
        told.append(
            f"{label}: strongest at p in {names[int(top['prob_bin'])]}, "
            f"{SIGN_NAMES[int(top['sign'])]}, {size.max() / size.min():.2g} times the weakest"
        )
    return joined(told)


@figure(
    Need("classes", "coef_sum"),
    title="How strong is the update of a single token?",
    caption="Look for bars that grow towards small probabilities: there one token weighs more "
    "than its share (coef is the official w x ratio x A with clipping and normaliser in it).",
    group="policy",
    prepare=prepare_token_strength,
    says=_says_token_strength,
)
def plot_token_strength(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the mean coefficient in the paper's bins of p; axes of shape (labels,)."""
    labels = labels_of(frame)
    figure = figure or new_figure(figure_height(len(labels), 1, 3.0))
    axes = _bin_panels(figure, labels)
    means = mean_over_runs(frame, ("sign", "prob_bin"))
    for ax, label in zip(axes, labels, strict=True):
        part = means[means["label"] == label]
        if not part["strength"].notna().any():
            note(ax, "not available here:\n'coef' was not recorded")
            continue
        for sign in SIGNS:
            rows = part[part["sign"] == sign]
            ax.bar(rows["prob_bin"], rows["strength"], 0.7, color=SIGN_COLORS[sign])
        ax.axhline(0, color=INK, linewidth=0.6)
    axes[0].set_ylabel("mean coefficient,\n-dL/dlogp")
    sign_legend(figure)
    return axes


def _paper_bins(runs: Sequence[Run], columns: Sequence[str]) -> pd.DataFrame:
    """Sums over all steps of tokens with A > 0 and A < 0 in the paper's five bins of p."""
    frame = class_frame(runs, columns, ("sign", "prob_bin"))
    signed = frame[frame["sign"].isin(SIGNS) & (frame["prob_bin"] >= 0)]
    merge = np.searchsorted(PAPER_EDGES, PROB_EDGES[:-1], side="right") - 1
    coarse = signed.assign(prob_bin=signed["prob_bin"].astype(int).map(dict(enumerate(merge))))
    keys = ["label", "run", "sign", "prob_bin"]
    grouped = coarse.groupby(keys, sort=False)
    sums = grouped[list(columns)].sum(min_count=1).assign(seed=grouped["seed"].first())
    return sums.reset_index()[["label", "seed", "run", "sign", "prob_bin", *columns]]


def _bin_panels(figure: Figure, labels: Sequence[str]) -> AxesArray:
    """One panel per label with the paper's bins of p across."""
    axes: AxesArray = label_panels(figure, labels)[0]
    names = bin_names(PAPER_EDGES)
    for ax in axes:
        ax.set_xticks(range(len(names)), labels=names, fontsize=9)
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.grid(visible=False, axis="x")
        ax.set_xlabel("p of the sampled token")
    return axes
