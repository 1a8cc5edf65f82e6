"""Where on the probability scale the gradient sits, and how far the policy has moved."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from wapo_analysis.plots.frames import (
    class_frame,
    keep_labels,
    labels_of,
    mean_over_runs,
    token_frame,
)
from wapo_analysis.plots.panels import (
    AxesArray,
    corner,
    figure_height,
    label_panels,
    note,
    share_y_if_close,
)
from wapo_analysis.plots.registry import figure
from wapo_analysis.plots.style import INK, MUTED, SIGN_COLORS, SIGN_NAMES, new_figure, sign_map
from wapo_analysis.schema import PAPER_EDGES, PROB_EDGES
from wapo_analysis.store import Need, Run

_NOT_BY_TOKEN = ("gspo", "raft")
_CELLS = 45


def clip_range(objective: Mapping[str, Any]) -> tuple[float, float]:
    """Range of the importance ratio of a token outside which the objective can clip.

    Parameters
    ----------
    objective : mapping
        ``objective`` entry of a manifest: ``name``, and ``bounds`` (low, high) as the built-in
        trainer writes them, or ``clip_eps`` as other sources give it.

    Returns
    -------
    tuple of float
        (low, high); NaN where there is no such bound (gspo clips the ratio of whole sequences, wapo
        has no lower bound) or the manifest does not give it.
    """
    if objective.get("name") in _NOT_BY_TOKEN or objective.get("use_importance_sampling") is False:
        return float("nan"), float("nan")
    eps, bounds = objective.get("clip_eps"), objective.get("bounds")
    if isinstance(bounds, list | tuple) and len(bounds) == 2:
        low, high = (_number(bound) for bound in bounds)
    else:
        low, high = 1 - _number(eps), 1 + _number(eps)
    return low if low > 0 else float("nan"), high if np.isfinite(high) else float("nan")


def prepare_train_vs_behaviour(runs: Sequence[Run]) -> pd.DataFrame:
    """Both probabilities of every token read, with the sign and the clip range.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, sign, train, behaviour`` (probabilities) ``, low, high`` (clip
        range of the ratio, NaN where there is none).
    """
    rows = token_frame(runs, ("sign", "prob", "logp_old"))
    bounds = [clip_range(run.manifest.get("objective", {})) for run in runs]
    behaviour = np.exp(rows["logp_old"].astype("float64"))
    rows = rows.assign(
        train=rows["prob"].astype("float64"),
        behaviour=behaviour,
        low=rows["run"].map({place: low for place, (low, _) in enumerate(bounds)}),
        high=rows["run"].map({place: high for place, (_, high) in enumerate(bounds)}),
    ).drop(columns=["prob", "logp_old"])
    return keep_labels(rows.dropna(subset=["train", "behaviour"]), runs)


@figure(
    Need("tokens", "logp_old"),
    title="How far is the trained policy from the one that sampled?",
    caption="Look for mass away from the diagonal: tokens beyond the dashed lines have an "
    "importance ratio that the objective can clip.",
    group="policy",
    prepare=prepare_train_vs_behaviour,
)
def plot_train_vs_behaviour(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Token counts over the two probabilities, one panel per label and sign.

    Returns axes of shape (labels, 2); A > 0 and A < 0.
    """
    labels = labels_of(frame)
    columns = min(4, 2 * max(len(labels), 1))
    rows = -(-2 * max(len(labels), 1) // columns)
    figure = figure or new_figure(1.0 + rows * (2.55 if columns == 4 else 5.0))
    grid: AxesArray = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = grid.reshape(-1, 2)
    for label, pair in zip(labels, axes, strict=False):
        part = frame[frame["label"] == label]
        for ax, sign in zip(pair, (1, -1), strict=True):
            _panel(ax, part[part["sign"] == sign], sign)
            ax.set_title(f"{label}, {SIGN_NAMES[sign]}", fontsize=10)
    for pair in axes[len(labels) :]:
        for ax in pair:
            ax.set_axis_off()
    for ax in grid[-1]:
        ax.set_xlabel("p of behaviour policy")
    for ax in grid[:, 0]:
        ax.set_ylabel("p of trained policy")
    figure.legend(handles=_LINES, loc="outside lower center", ncols=3)
    return axes[: max(len(labels), 1)]


_LINES = [
    Patch(color=MUTED, label="darker: more tokens (logarithmic)"),
    Line2D([], [], color=INK, linewidth=0.9, label="both policies agree"),
    Line2D([], [], color=MUTED, linewidth=1, linestyle="--", label="bounds of the clip"),
]


def _panel(ax: Axes, part: pd.DataFrame, sign: int) -> None:
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    ax.set_yticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    ax.grid(visible=False)
    if part.empty:
        note(ax, "no recorded token\nof this sign")
        return
    ax.hexbin(
        part["behaviour"], part["train"], gridsize=_CELLS, extent=(0, 1, 0, 1),
        bins="log", mincnt=1, cmap=sign_map(sign), linewidths=0, rasterized=True,
    )  # fmt: skip
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.9)
    low, high = part["low"].iloc[0], part["high"].iloc[0]
    for bound in (low, high):
        if np.isfinite(bound) and bound > 0:
            ax.plot([0, min(1, 1 / bound)], [0, min(bound, 1)], "--", color=MUTED, linewidth=1)
    corner(ax, _outside(part, low, high), lower_right=True)


def _outside(part: pd.DataFrame, low: float, high: float) -> str:
    """Sentence with the shares of tokens beyond the clip range; empty bounds are never passed."""
    ratio = part["train"] / part["behaviour"]
    sides = []
    if np.isfinite(low):
        sides.append(f"{(ratio < low).mean():.1%} below {low:g}")
    if np.isfinite(high):
        sides.append(f"{(ratio > high).mean():.1%} above {high:g}")
    return "\n".join(["ratio:", *sides]) if sides else "no clip on single tokens"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


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


@figure(
    Need("classes", "grad_mass"),
    title="At which probabilities does the gradient sit?",
    caption="Look for the tallest bar: it names the probability and the sign that own the "
    "update, and the black tick shows what the (1 - p) proxy says.",
    group="policy",
    prepare=prepare_bin_mass,
)
def plot_bin_mass(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the exact mass with the proxy as a tick; paper's bins above, fine ones below.

    Returns axes of shape (2, labels).
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


@figure(
    Need("classes", "coef_sum"),
    title="How hard is a single token pushed?",
    caption="Look for bars that grow towards small probabilities: there one token weighs more "
    "than its share (coef is the official w x ratio x A with clipping and normaliser in it).",
    group="policy",
    prepare=prepare_token_strength,
)
def plot_token_strength(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the mean coefficient; paper's bins above, fine ones below.

    Returns axes of shape (2, labels).
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
