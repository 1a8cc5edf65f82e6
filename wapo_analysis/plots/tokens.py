"""Single tokens: which ones own the gradient, where they stand, what their covariance foretells."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from wapo_taxonomy import CLASSES, rule_dentropy_sign

from wapo_analysis.plots import after, changes, each_label, figure, joined, largest
from wapo_analysis.plots.frames import RUN_KEYS, keep_labels, labels_of, mean_over_runs, token_frame
from wapo_analysis.plots.panels import (
    AxesArray,
    class_legend,
    filled_parts,
    label_legend,
    label_lines,
    label_parts,
    label_row,
    name_panel,
    note,
    step_axis,
)
from wapo_analysis.plots.style import (
    CLASS_COLORS,
    CLASS_INK,
    INK,
    drawable,
    label_styles,
    new_figure,
)
from wapo_analysis.store import Need, Run

#: Quantile of the token entropy from which arXiv 2506.01939 calls a token a forking one.
FORKING = 0.8
_STEPS = 40
_TOP = 6
_POSITIONS = 20
_ENTROPY_BINS = 40


def prepare_rule_breaks(runs: Sequence[Run]) -> pd.DataFrame:
    """How often, and for how much of the entropy change, the rule's sign is wrong.

    Only tokens with a non-zero predicted dH count. Steps are at most forty evenly spaced ones.
    Returns ``label, seed, run, step, tokens, weight``: share of the tokens, and share of the summed
    absolute first-order dH, whose sign is not the one of the token's class.
    """
    rows = token_frame(runs, ("cls", "pred_dentropy"), max_steps=_STEPS)
    moved = rows[np.isfinite(rows["pred_dentropy"].astype(float)) & (rows["pred_dentropy"] != 0)]
    moved = moved[moved["cls"].isin(range(4))]
    effect = moved["pred_dentropy"].to_numpy(dtype=np.float64)
    expected = np.asarray(rule_dentropy_sign(moved["cls"].to_numpy(dtype=np.int64)))
    wrong = np.sign(effect) != expected
    size = np.abs(effect)
    table = moved[[*RUN_KEYS, "step"]].assign(tokens=wrong, size=size, bad=size * wrong)
    cells = table.groupby([*RUN_KEYS, "step"], dropna=False, sort=False)
    sums = cells[["size", "bad"]].sum()
    shares = pd.DataFrame({"tokens": cells["tokens"].mean(), "weight": sums["bad"] / sums["size"]})
    return keep_labels(shares.reset_index(), runs)


def _says_rule_breaks(frame: pd.DataFrame) -> str:
    means = frame.groupby("label", sort=False)[["tokens", "weight"]].mean().dropna()
    return after(
        "The class tells the wrong direction",
        joined(
            f"{label} for {row.tokens:.1%} of the tokens, {row.weight:.1%} of the predicted |dH|"
            for label, row in means.iterrows()
        ),
    )


@figure(
    Need("tokens", "pred_dentropy"),
    title="How often is the class's entropy rule wrong?",
    caption="Look for a large right panel: many wrong tokens matter little while their share "
    "of the entropy change stays small.",
    group="classes",
    over_steps=True,
)
def plot_rule_breaks(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Share of tokens and share of the entropy change that break the rule, over the steps.

    Returns axes of shape (2,).
    """
    figure = figure or new_figure(3.6)
    axes: AxesArray = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = {"tokens": "share of the tokens", "weight": "share of the predicted |dH|"}
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        label_lines(ax, frame, column)
        ax.set_title(title)
    axes[0].set_ylabel("exact dH against the rule")
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    step_axis(axes, frame["step"])
    label_legend(figure, axes[0])
    return axes


def prepare_covariance(runs: Sequence[Run]) -> pd.DataFrame:
    """Covariance of log-probability and advantage over the tokens of a step.

    Returns ``label, seed, run, step, covariance`` (nats): mean of (A - mean A)(logp - mean logp);
    ``top``, the part of the summed absolute products that the largest 2% of the tokens hold.
    """
    rows = token_frame(runs, ("advantage", "logp"), max_steps=_STEPS)
    values = rows[["advantage", "logp"]].astype("float64")
    rows = rows.assign(**values)[np.isfinite(values.to_numpy()).all(axis=1)]
    keys = ["label", "seed", "run", "step"]
    means = rows.groupby(["run", "step"])[["advantage", "logp"]].transform("mean")
    product = (rows["advantage"] - means["advantage"]) * (rows["logp"] - means["logp"])
    grouped = rows.assign(product=product).groupby(keys, dropna=False, sort=False)
    products = grouped["product"]
    columns = {"covariance": products.mean(), "top": products.apply(_top_share)}
    table = pd.DataFrame(columns)
    return keep_labels(table.reset_index(), runs)


def _top_share(values: pd.Series) -> float:
    size = np.sort(values.abs().to_numpy())[::-1]
    total = float(size.sum())
    return float(size[: max(1, len(size) // 50)].sum()) / total if total > 0 else float("nan")


def _says_covariance(frame: pd.DataFrame) -> str:
    return after("Covariance of logp and A, nats", changes(frame, "covariance", ".2g"))


@figure(
    Need("tokens", "logp"),
    Need("tokens", "advantage"),
    title="Does the covariance of log-probability and advantage foretell a fall of entropy?",
    caption="Look at the sign on the left: above zero likely tokens are rewarded and entropy "
    "falls, below zero it rises; the right panel says whether few tokens make it. Covariance over "
    "the tokens of a step, mean of (A - mean A)(logp - mean logp) (arXiv 2505.22617).",
    group="entropy",
    over_steps=True,
)
def plot_covariance(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Covariance over the steps, and what the top 2% of the tokens hold; axes of shape (2,)."""
    figure = figure or new_figure(3.8)
    axes: AxesArray = figure.subplots(1, 2, sharex=True)
    label_lines(axes[0], frame, "covariance")
    axes[0].axhline(0, color=INK, linewidth=0.6)
    axes[0].set_ylabel("covariance (nats)")
    axes[0].set_title("above 0: entropy falls", fontsize=10)
    label_lines(axes[1], frame, "top")
    axes[1].set_ylabel("share of the sum of |products|")
    axes[1].set_title("held by the largest 2% of the tokens", fontsize=10)
    axes[1].set_ylim(0, 1.02)
    step_axis(axes, frame["step"])
    label_legend(figure, axes[0])
    return axes


def prepare_entropy_percentiles(runs: Sequence[Run]) -> pd.DataFrame:
    """Distribution of the token entropy, and what the most uncertain fifth of the tokens holds.

    Returns ``label, seed, run, edge`` (lower edge of a bin, nats) ``, share`` of the tokens in it,
    and per run ``threshold`` (80th percentile of the entropy, nats) and the shares ``held_entropy``
    and ``held_gradient`` of the tokens above it in the summed entropy and gradient norm (NaN where
    the norm is unknown).
    """
    rows = token_frame(runs, ("entropy", "grad_norm"))
    values = rows[["entropy", "grad_norm"]].astype("float64")
    rows = rows.assign(**values)[np.isfinite(values["entropy"])]
    top = float(rows["entropy"].max()) if len(rows) else 1.0
    edges = np.linspace(0, max(top, 1e-6), _ENTROPY_BINS + 1)
    parts = []
    for keys, part in rows.groupby(["label", "seed", "run"], dropna=False, sort=False):
        entropy, grad = part["entropy"], part["grad_norm"]
        threshold = entropy.quantile(FORKING)
        above = entropy > threshold
        counts = np.histogram(entropy, edges)[0]
        parts.append(
            pd.DataFrame({"edge": edges[:-1], "share": counts / len(part)}).assign(
                **dict(zip(("label", "seed", "run"), keys, strict=True)),
                threshold=threshold,
                held_entropy=entropy[above].sum() / max(entropy.sum(), 1e-300),
                held_gradient=grad[above].sum() / grad.sum() if grad.sum() > 0 else np.nan,
            )
        )
    order = ["label", "seed", "run", "edge", "share", "threshold", "held_entropy", "held_gradient"]
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=order)
    return keep_labels(frame[order], runs)


def _says_entropy_percentiles(frame: pd.DataFrame) -> str:
    held = ["threshold", "held_entropy", "held_gradient"]
    told = []
    for label, row in frame.groupby("label", sort=False)[held].mean().iterrows():
        if np.isfinite(row.threshold):
            grad = f", {row.held_gradient:.0%} of the gradient" * bool(row.held_gradient >= 0)
            told.append(f"{label} {row.held_entropy:.0%} of the entropy{grad}")
    return after("The most uncertain fifth of the tokens holds", joined(told))


@figure(
    Need("tokens", "entropy"),
    title="Do a few uncertain tokens carry the learning?",
    caption="Look at what lies right of the dashed line, the 80th percentile of the token entropy: "
    "those forking tokens are where the text could go elsewhere (arXiv 2506.01939, which trains on "
    "them alone).",
    group="entropy",
)
def plot_entropy_percentiles(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Histogram of the token entropy, logarithmic, with its 80th percentile.

    Returns axes of shape (labels,).
    """
    labels, figure, axes = label_row(frame, figure, 3.0, columns=3)
    means, styles = mean_over_runs(frame, ("edge",)), label_styles(labels)
    lacks = "not available here:\nno token entropy"
    for ax, label, part in filled_parts(axes, means, labels, "edge", lacks):
        edges = part["edge"].to_numpy()
        edges = np.append(edges, 2 * edges[-1] - edges[-2])
        ax.stairs(part["share"], edges, fill=True, color=styles[label].color, alpha=0.8)
        line = float(part["threshold"].iloc[0])
        ax.axvline(line, color=INK, linestyle="--", linewidth=1.2)
        ax.annotate(
            f" above {line:.2g} nats: 20% of the tokens ", (line, 0.98), va="top", fontsize=8.5,
            ha="right" if 2 * line > edges[-1] else "left", xycoords=ax.get_xaxis_transform(),
        )  # fmt: skip
        ax.set_xlabel("entropy of the token (nats)")
    if frame["share"].gt(0).any():
        axes[0].set_yscale("log")
    axes[0].set_ylabel("share of the tokens")
    return axes


def prepare_top_tokens(runs: Sequence[Run]) -> pd.DataFrame:
    """Tokens of the vocabulary that own most of the gradient of each class.

    Returns ``label, seed, run, cls, text`` (quoted, escaped) ``, share`` of the summed gradient
    norm of the class over the token rows read, ``mass`` (that sum) of the token; the six largest of
    each label and class.
    """
    rows = token_frame(runs, ("token_id", "cls", "grad_norm"))
    sizes = rows["grad_norm"].astype("float64")
    rows = rows.assign(grad_norm=sizes)[(sizes > 0) & rows["cls"].isin(range(4))]
    texts = {place: run.vocab for place, run in enumerate(runs)}
    names = [
        f"'{drawable(texts[run].get(token, f'[{token}]'))}'"
        for run, token in zip(rows["run"], rows["token_id"].astype(int), strict=True)
    ]
    table = (
        rows.assign(text=names)
        .groupby(["label", "cls", "text"], sort=False)
        .agg(seed=("seed", "first"), run=("run", "first"), mass=("grad_norm", "sum"))
        .reset_index()
    )  # fmt: skip
    table["share"] = table["mass"] / table.groupby(["label", "cls"])["mass"].transform("sum")
    top = table.sort_values("share", ascending=False).groupby(["label", "cls"]).head(_TOP)
    order = ["label", "seed", "run", "cls", "text", "share", "mass"]
    return keep_labels(top[order].sort_values("run", kind="stable", ignore_index=True), runs)


@each_label("share")
def _says_top_tokens(label: str, rows: pd.DataFrame) -> str:
    top = largest(rows, "mass")
    return (
        f"{label}: {top['text']} holds {top['share']:.0%} of the gradient of "
        f"{CLASSES[int(top['cls'])]}"
    )


@figure(
    Need("tokens", "grad_norm"),
    Need("tokens", "token_id"),
    title="Which tokens own the gradient of each class?",
    caption="Look for one bar that outgrows its class: that token of the vocabulary takes the "
    "update. Share of the summed gradient norm |dL/dz| of the class, over the token rows read.",
    group="classes",
)
def plot_top_tokens(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the top tokens, labels down, classes across; axes of shape (labels, 4)."""
    labels = labels_of(frame)
    figure = figure or new_figure(1.0 + 1.9 * max(len(labels), 1))
    axes: AxesArray = figure.subplots(max(len(labels), 1), 4, sharex=True, squeeze=False)
    for row, label, part in label_parts(axes, frame, labels):
        for code, ax in enumerate(row):
            _token_bars(ax, part[part["cls"] == code], CLASS_COLORS[CLASSES[code]])
        name_panel(row[0], label, 10, beside=True)
    for code, name in enumerate(CLASSES):
        axes[0, code].set_title(name, color=CLASS_INK[name])
        axes[-1, code].set_xlabel("share of its gradient")
    return axes


def _token_bars(ax: Axes, part: pd.DataFrame, color: str) -> None:
    ax.grid(visible=False, axis="y")
    if part.empty:
        ax.set_yticks([])
        note(ax, "no gradient")
        return
    ax.barh(range(len(part)), part["share"], color=color)
    ax.set_yticks(range(len(part)), labels=list(part["text"]), fontsize=9)
    ax.set_ylim(_TOP - 0.4, -0.6)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def prepare_position_profile(runs: Sequence[Run]) -> pd.DataFrame:
    """Gradient by the place of the token in its completion, per class.

    Returns ``label, seed, run, cls, place`` (lower edge of twenty equal parts of the longest
    completion, in tokens) ``, width`` of such a part, ``share`` of the run's summed gradient norm,
    ``tokens`` the share of its tokens at that place.
    """
    rows = token_frame(runs, ("position", "cls", "grad_norm"))
    sizes = rows["grad_norm"].astype("float64")
    rows = rows.assign(grad_norm=sizes)[np.isfinite(sizes)]
    longest = int(rows["position"].max()) + 1 if len(rows) else 1
    width = -(-longest // _POSITIONS)
    rows = rows.assign(place=rows["position"].astype(int) // width * width)
    total = rows.groupby("run")["grad_norm"].sum()
    keys = ["label", "seed", "run", "cls", "place"]
    table = rows.groupby(keys, dropna=False, sort=False)["grad_norm"].agg(["sum", "size"])
    table = table.reset_index()
    whole = table["run"].map(total)
    count = table["run"].map(rows.groupby("run").size())
    table = table.assign(share=table["sum"] / whole.where(whole > 0), tokens=table["size"] / count)
    return keep_labels(table.assign(width=width)[[*keys, "width", "share", "tokens"]], runs)


@each_label("share")
def _says_position_profile(label: str, rows: pd.DataFrame) -> str:
    by_place = rows.groupby("place")[["share", "tokens"]].sum() / rows["run"].nunique()
    ahead = by_place["share"] - by_place["tokens"]
    place = int(ahead.index.to_numpy()[int(np.argmax(ahead.to_numpy()))])
    last = place + rows["width"].iloc[0] - 1
    where = f"positions {place:g} to {last:g}" if last > place else f"position {place:g}"
    return (
        f"{label}: {by_place['share'][place]:.0%} of the gradient is at {where}, with "
        f"{by_place['tokens'][place]:.0%} of the tokens"
    )


@figure(
    Need("tokens", "grad_norm"),
    title="Where in the completion does the gradient sit?",
    caption="Look for bars above the black line: there the gradient is more than the share of the "
    "tokens. Share of the summed gradient norm |dL/dz| by place in the completion; line: share of "
    "the tokens at that place.",
    group="classes",
)
def plot_position_profile(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Stacked bars of the gradient share by position and class; axes of shape (labels,)."""
    labels, figure, axes = label_row(frame, figure, 3.0, columns=3)
    means = mean_over_runs(frame, ("cls", "place"), ("share", "tokens"))
    width = float(means["width"].max()) if means["width"].notna().any() else 1.0
    places = np.arange(0, means["place"].max() + 1, width)
    lacks = "not available here:\nno gradient norm"
    for ax, _, part in filled_parts(axes, means, labels, "share", lacks):
        base = np.zeros(len(places))
        for code, name in enumerate(CLASSES):
            rows = part[part["cls"] == code].set_index("place")["share"]
            sizes = rows.reindex(places).fillna(0).to_numpy()
            top, edges = base + sizes, [*places, places[-1] + width]
            ax.stairs(top, edges, baseline=base, fill=True, color=CLASS_COLORS[name], linewidth=0)
            base = top
        tokens = part.groupby("place")["tokens"].sum().reindex(places).fillna(0)
        ax.stairs(tokens, [*places, places[-1] + width], color=INK, linewidth=1.2)
        ax.set_xlabel("position in the completion (tokens)")
    axes[0].set_ylabel("share")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    class_legend(figure, CLASSES)
    return axes
