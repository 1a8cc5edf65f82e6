"""The four classes over the steps, and bins of p by sign: how many tokens, how much gradient."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import wapo_taxonomy as tax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from wapo_analysis.plots import each_label, ends, figure, largest, largest_key
from wapo_analysis.plots.frames import (
    class_frame,
    class_table,
    keep_labels,
    mean_over_runs,
    with_empty_classes,
)
from wapo_analysis.plots.panels import (
    ZERO,
    AxesArray,
    class_legend,
    class_text,
    filled_parts,
    label_figure,
    label_parts,
    label_row,
    log_y,
    note,
    replicate_line,
    sign_legend,
    stack,
    step_axis,
)
from wapo_analysis.plots.style import (
    CLASS_COLORS,
    INK,
    MUTED,
    SIGN_COLORS,
    SIGN_NAMES,
    SIGNS,
)
from wapo_analysis.schema import PAPER_EDGES, PROB_EDGES
from wapo_analysis.store import Need, Run


def prepare_class_share(runs: Sequence[Run]) -> pd.DataFrame:
    """Share of the tokens in each class per run and step.

    Returns ``label, seed, run, step, cls, share``: shares of one run and step add up to one; cls is
    the class code of wapo_taxonomy, 4 for zero advantage and -1 for a missing statistic.
    """
    frame = class_frame(runs, ("tokens",))
    shares = _with_share(with_empty_classes(frame, "tokens"), "tokens").drop(columns="tokens")
    return keep_labels(shares, runs)


@each_label()
def _says_class_share(label: str, rows: pd.DataFrame) -> str:
    """The class whose share of the tokens changed most."""
    pairs = {code: ends(rows[rows["cls"] == code], "share").get(label) for code in tax.CLASS_NAMES}
    known = {code: pair for code, pair in pairs.items() if pair is not None}
    if known:
        code = max(known, key=lambda key: abs(known[key][1] - known[key][0]))
        first, last = known[code]
        return f"{label}: {class_text(code)} {first:.0%} to {last:.0%} of the tokens"
    return ""


@figure(
    Need("classes", "tokens"),
    title="Which classes are the tokens in?",
    caption="Look for a class that grows at the cost of the others; grey tokens had no "
    "advantage and taught nothing.",
    group="classes",
    over_steps=True,
)
def plot_class_share(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Stacked shares of the classes over the steps, one panel per label.

    Returns axes of shape (1, labels).
    """
    labels, figure, axes = label_figure(frame, figure, 3.0)
    for ax, _, part in label_parts(axes[0], frame, labels):
        stack(ax, class_table(part, "share"))
        if part["share"].isna().all():
            note(ax, "not available here:\nno class totals")
        ax.set_ylim(0, 1)
    axes[0, 0].set_ylabel("share of the tokens")
    step_axis(axes, frame["step"])
    seen = {tax.CLASS_NAMES[int(code)] for code in frame.loc[frame["share"] > 0, "cls"]}
    class_legend(figure, [name for name in CLASS_COLORS if name in seen])
    return axes


def prepare_gradient_mass(runs: Sequence[Run]) -> pd.DataFrame:
    """Exact gradient mass of each class per run and step, and its share.

    Returns ``label, seed, run, step, cls, grad_mass, share, tokens, all_tokens``; grad_mass is the
    sum of the L2 norms of dL/dz over the class's tokens, NaN where the source gives no collision
    statistic; all_tokens counts those of the step, whatever their class.
    """
    frame = with_empty_classes(class_frame(runs, ("grad_mass", "tokens")), "grad_mass")
    every = frame.groupby(["run", "step"])["tokens"].transform("sum")
    frame = frame.assign(tokens=frame["tokens"].fillna(0), all_tokens=every)
    return keep_labels(_with_share(frame[frame["cls"].isin(range(4))], "grad_mass"), runs)


@each_label("grad_mass")
def _says_gradient_mass(label: str, rows: pd.DataFrame) -> str:
    """The class with most of the gradient, beside its part of the tokens, over the whole run."""
    sums = rows.groupby("cls")[["grad_mass", "tokens", "all_tokens"]].sum()
    code, mass = largest_key(sums["grad_mass"]), sums["grad_mass"].sum()
    if not mass:
        return ""
    return (
        f"{label}: {tax.CLASS_NAMES[code]} is "
        f"{sums['tokens'][code] / sums['all_tokens'][code]:.1%} of the tokens and "
        f"{sums['grad_mass'][code] / mass:.0%} of the gradient"
    )


@figure(
    Need("classes", "grad_mass"),
    title="Which class holds the gradient?",
    caption="Look for a class whose share of the gradient (above) exceeds its share of the "
    "tokens, and whether the mass (below) fades as training goes on.",
    group="classes",
    over_steps=True,
)
def plot_gradient_mass(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Share of the gradient mass per class, stacked; below, the mass itself, logarithmic.

    A class without any mass has no line.

    Returns axes of shape (2, labels).
    """
    labels, figure, axes = label_figure(frame, figure, 2.5, 2)
    for column, _, part in label_parts(axes.T, frame, labels):
        if not (part["grad_mass"] > 0).any():
            blind = part["grad_mass"].isna().all()
            why = "the source gives no\ncollision statistics" if blind else "no gradient at all"
            for ax in column:
                note(ax, f"not available here:\n{why}")
            continue
        stack(column[0], class_table(part, "share"))
        for code, name in enumerate(tax.CLASSES):
            rows = part[part["cls"] == code]
            if (rows["grad_mass"] > 0).any():
                color = CLASS_COLORS[name]
                replicate_line(column[1], rows, "grad_mass", positive=True, color=color)
    axes[0, 0].set_ylim(0, 1)
    log_y(axes[1, 0], frame["grad_mass"])
    axes[0, 0].set_ylabel("share of gradient mass")
    axes[1, 0].set_ylabel("gradient mass,\nsum of |dL/dz|")
    step_axis(axes, frame["step"])
    zeros = [Line2D([], [], color=MUTED, marker="v", markersize=4, ls="", label=ZERO)]
    class_legend(figure, tax.CLASSES, zeros * bool((frame["grad_mass"] == 0).any()))
    return axes


def _with_share(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Add ``share``, the part of the sum over the classes of the run and step."""
    total = frame.groupby(["run", "step"])[column].transform("sum")
    return frame.assign(share=frame[column] / total.where(total > 0))


def bin_names(edges: Sequence[float]) -> list[str]:
    """Text of every bin between the edges, such as ``.1-.25``."""
    texts = [f"{edge:g}".replace("0.", ".") for edge in edges]
    return [f"{low}-{high}" for low, high in zip(texts, texts[1:], strict=False)]


def prepare_bin_mass(runs: Sequence[Run]) -> pd.DataFrame:
    """Gradient mass per bin of p and sign over all steps, exact and by the official proxy.

    Returns ``label, seed, run, sign, prob_bin, exact, proxy``: shares of the run's whole exact mass
    in the paper's five bins of p. The proxy is the sum of |coef| (1 - p) instead of |dL/dz|; it may
    add up to less than one.
    """
    frame = _paper_bins(runs, ("grad_mass", "grad_mass_proxy"))
    total = frame.groupby("run")["grad_mass"].transform("sum")
    total = total.where(total > 0)
    shares = frame.assign(exact=frame["grad_mass"] / total, proxy=frame["grad_mass_proxy"] / total)
    return keep_labels(shares.drop(columns=["grad_mass", "grad_mass_proxy"]), runs)


@each_label("exact")
def _says_bin_mass(label: str, rows: pd.DataFrame) -> str:
    top = largest(mean_over_runs(rows, ("sign", "prob_bin"), ("exact",)), "exact")
    return (
        f"{label}: {top['exact']:.0%} of the gradient is on tokens with "
        f"{SIGN_NAMES[int(top['sign'])]}, p in {bin_names(PAPER_EDGES)[int(top['prob_bin'])]}"
    )


@figure(
    Need("classes", "grad_mass"),
    title="At which probabilities does the gradient sit?",
    caption="Look for the longest bar: it names the probability and the sign that own the update, "
    "and the black tick shows what the (1 - p) proxy of the published code says. Bins are those of "
    "arXiv 2606.16154.",
    group="policy",
)
def plot_bin_mass(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the exact mass, A > 0 upwards, A < 0 downwards, the proxy as a tick.

    Returns axes of shape (labels,).
    """
    labels, figure, axes = _bin_panels(frame, figure, 3.4)
    means = mean_over_runs(frame, ("sign", "prob_bin"), ("exact", "proxy"))
    for ax, _, part in label_parts(axes, means, labels):
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

    Returns ``label, seed, run, sign, prob_bin, strength``: mean of coef = -dL/dlogp over the tokens
    of the bin. The official token strength is w * ratio * A; coef is that with clipping, gates and
    the outer normaliser included, so clipped tokens count as 0.
    """
    frame = _paper_bins(runs, ("coef_sum", "tokens"))
    frame["strength"] = frame["coef_sum"] / frame["tokens"].where(frame["tokens"] > 0)
    return keep_labels(frame.drop(columns=["coef_sum", "tokens"]), runs)


@each_label("strength")
def _says_token_strength(label: str, rows: pd.DataFrame) -> str:
    """Strongest bin against the weakest that is moved at all."""
    means = mean_over_runs(rows, ("sign", "prob_bin"))
    means = means[means["strength"] != 0]
    if means.empty:
        return ""
    size, top = means["strength"].abs(), largest(means, "strength")
    return (
        f"{label}: strongest at p in {bin_names(PAPER_EDGES)[int(top['prob_bin'])]}, "
        f"{SIGN_NAMES[int(top['sign'])]}, {size.max() / size.min():.2g} times the weakest"
    )


@figure(
    Need("classes", "coef_sum"),
    title="How strong is the update of a single token?",
    caption="Look for bars that grow towards small probabilities: there one token weighs more "
    "than its share (coef is the official w x ratio x A with clipping and normaliser in it).",
    group="policy",
)
def plot_token_strength(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the mean coefficient in the paper's bins of p; axes of shape (labels,)."""
    labels, figure, axes = _bin_panels(frame, figure, 3.0)
    means, lacks = mean_over_runs(frame, ("sign", "prob_bin")), "'coef' was not recorded"
    parts = filled_parts(axes, means, labels, "strength", f"not available here:\n{lacks}")
    for ax, _, part in parts:
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


def _bin_panels(
    frame: pd.DataFrame, figure: Figure | None, panel: float
) -> tuple[list[str], Figure, AxesArray]:
    """:func:`label_row` with the paper's bins of p across."""
    labels, figure, axes = label_row(frame, figure, panel, columns=3)
    names = bin_names(PAPER_EDGES)
    for ax in axes:
        ax.set_xticks(range(len(names)), labels=names, fontsize=9)
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.grid(visible=False, axis="x")
        ax.set_xlabel("p of the sampled token")
    return labels, figure, axes
