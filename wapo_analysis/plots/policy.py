"""How far the policy has moved from the one that sampled: probabilities, ratios, the clip."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from wapo_analysis.plots import after, figure, joined
from wapo_analysis.plots.frames import (
    keep_labels,
    labels_of,
    mean_over_runs,
    token_frame,
)
from wapo_analysis.plots.panels import (
    AxesArray,
    corner,
    filled_parts,
    label_legend,
    label_lines,
    label_parts,
    label_row,
    name_panel,
    note,
    sign_legend,
    step_axis,
)
from wapo_analysis.plots.style import (
    INK,
    MUTED,
    SIGN_COLORS,
    SIGN_NAMES,
    SIGNS,
    new_figure,
    sign_map,
)
from wapo_analysis.store import Need, Run

_NOT_BY_TOKEN = ("gspo", "raft")
_CELLS = 45
_RATIO_BINS = np.linspace(-1.5, 1.5, 61)
_UP_CLIPPED_STEPS = 40


def clip_range(objective: Mapping[str, Any]) -> tuple[float, float]:
    """Range of the importance ratio of a token outside which the objective can clip.

    Returns (low, high); NaN where there is no such bound (gspo clips the ratio of whole sequences,
    wapo has no lower bound) or the manifest does not give it. ``objective``: ``objective`` entry of
    a manifest: ``name``, and ``bounds`` (low, high) as the built-in trainer writes them, or
    ``clip_eps`` as other sources give it.
    """
    if objective.get("name") in _NOT_BY_TOKEN or objective.get("use_importance_sampling") is False:
        return float("nan"), float("nan")
    eps, bounds = objective.get("clip_eps"), objective.get("bounds")
    if isinstance(bounds, list | tuple) and len(bounds) == 2:
        low, high = (_number(bound) for bound in bounds)
    else:
        low, high = 1 - _number(eps), 1 + _number(eps)
    return low if low > 0 else float("nan"), high if np.isfinite(high) else float("nan")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _with_bounds(frame: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """Add the clip range of each run: ``low`` and ``high``, NaN where there is none."""
    bounds = dict(enumerate(clip_range(run.manifest.objective) for run in runs))
    return frame.assign(
        low=frame["run"].map({place: low for place, (low, _) in bounds.items()}),
        high=frame["run"].map({place: high for place, (_, high) in bounds.items()}),
    )


def prepare_train_vs_behaviour(runs: Sequence[Run]) -> pd.DataFrame:
    """Both probabilities of every token read, with the sign and the clip range.

    Returns ``label, seed, run, step, sign, train, behaviour`` (probabilities) ``, low, high`` (clip
    range of the ratio, NaN where there is none).
    """
    rows = token_frame(runs, ("sign", "prob", "logp_old"))
    behaviour = np.exp(rows["logp_old"].astype("float64"))
    rows = rows.assign(train=rows["prob"].astype("float64"), behaviour=behaviour)
    rows = _with_bounds(rows.drop(columns=["prob", "logp_old"]), runs)
    return keep_labels(rows.dropna(subset=["train", "behaviour"]), runs)


def _says_train_vs_behaviour(frame: pd.DataFrame) -> str:
    ratio = frame["train"] / frame["behaviour"]
    out = ((ratio < frame["low"]) | (ratio > frame["high"])).where(ratio.notna())
    bound = frame[["low", "high"]].notna().any(axis=1)
    shares = out[bound].astype(float).groupby(frame["label"][bound], sort=False).mean().dropna()
    return after(
        "Tokens beyond the bounds of the clip",
        joined(f"{label} {share:.1%}" for label, share in shares.items()),
    )


@figure(
    Need("tokens", "logp_old"),
    title="How far is the trained policy from the one that sampled?",
    caption="Look for mass away from the diagonal: tokens beyond the dashed lines have an "
    "importance ratio that the objective can clip.",
    group="policy",
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
    for pair, label, part in label_parts(axes, frame, labels):
        for ax, sign in zip(pair, SIGNS, strict=True):
            _density(ax, part[part["sign"] == sign], sign)
            name_panel(ax, f"{label}, {SIGN_NAMES[sign]}", 10)
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


def _density(ax: Axes, part: pd.DataFrame, sign: int) -> None:
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
    return "\n".join(["ratio:", *sides]) if sides else "no clip range of tokens known"


def prepare_ratio_histogram(runs: Sequence[Run]) -> pd.DataFrame:
    """Importance ratio of the tokens read, in bins of its logarithm, per sign of the advantage.

    Returns ``label, seed, run, sign, bin`` (place between the edges), ``share`` of the run's
    tokens, ``low, high`` (clip range), ``below, above``: shares of the run's tokens of that sign
    that the clip can stop (A < 0 below ``low``, A > 0 above ``high``). Ratios beyond the outer
    edges are in the outer bins.
    """
    rows = token_frame(runs, ("sign", "logp", "logp_old"))
    gap = (rows["logp"] - rows["logp_old"]).astype("float64")
    rows = _with_bounds(rows.assign(gap=gap), runs)
    rows = rows[np.isfinite(rows["gap"]) & rows["sign"].isin(SIGNS)]
    ratio = np.exp(rows["gap"].clip(-50, 50))
    last = len(_RATIO_BINS) - 2
    rows = rows.assign(
        bin=np.clip(np.searchsorted(_RATIO_BINS, rows["gap"], side="right") - 1, 0, last),
        below=(ratio < rows["low"]) & (rows["sign"] < 0),
        above=(ratio > rows["high"]) & (rows["sign"] > 0),
    )
    every = rows.groupby("run").size()
    keys = ["label", "seed", "run", "sign"]
    bins = rows.groupby([*keys, "bin"], dropna=False, sort=False).agg(
        share=("bin", "size"), low=("low", "first"), high=("high", "first")
    )
    sides = rows.groupby(keys, dropna=False, sort=False)[["below", "above"]].sum()
    table = bins.reset_index().merge(sides.reset_index(), on=keys)
    total = table["run"].map(every)
    shares = {name: table[name] / total for name in ("share", "below", "above")}
    return keep_labels(table.assign(**shares), runs)


def _says_ratio_histogram(frame: pd.DataFrame) -> str:
    runs = frame.groupby(["label", "run", "sign"], sort=False)[["below", "above"]].first()
    told = []
    for label, rows in runs.groupby("label", sort=False):
        count = rows.index.get_level_values("run").nunique()
        below, above = (rows[name].sum() / max(count, 1) for name in ("below", "above"))
        told.append(f"{label} {below:.1%} below with A < 0, {above:.1%} above with A > 0")
    return after("Tokens the clip can stop", joined(told))


@figure(
    Need("tokens", "logp_old"),
    title="How much of the batch is beyond the clip?",
    caption="Look for mass outside the dashed bounds: of it the clip stops tokens with A < 0 on "
    "the left and with A > 0 on the right. Ratio r = p / p_old, policy being updated over the one "
    "that sampled; the outer bars hold everything beyond them.",
    group="policy",
)
def plot_ratio_histogram(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Shares of tokens over the ratio, both axes logarithmic, clip bounds dashed.

    Returns axes of shape (labels,).
    """
    labels, figure, axes = label_row(frame, figure, 3.2)
    means = mean_over_runs(frame, ("sign", "bin"), ("share",))
    lacks = "not available here:\nno logp_old"
    for ax, _, part in filled_parts(axes, means, labels, "bin", lacks):
        for sign in SIGNS:
            rows = part[part["sign"] == sign].set_index("bin")["share"]
            heights = rows.reindex(range(len(_RATIO_BINS) - 1)).to_numpy()
            ax.stairs(np.nan_to_num(heights), np.exp(_RATIO_BINS), color=SIGN_COLORS[sign])
        for side, bound in zip(("right", "left"), part[["low", "high"]].iloc[0], strict=True):
            if not _RATIO_BINS[0] < np.log(bound) < _RATIO_BINS[-1]:  # nor where there is none
                continue
            ax.axvline(bound, color=MUTED, linestyle="--", linewidth=1)
            ax.annotate(f" {bound:g} ", (bound, 0.99), xycoords=ax.get_xaxis_transform(),
                        fontsize=8.5, ha=side, va="top")  # fmt: skip
    ticks = (0.25, 0.5, 1, 2, 4)
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="ratio p / p_old")
        ax.set_xlim(*np.exp(_RATIO_BINS[[0, -1]]))
        ax.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel("share of the tokens")
    sign_legend(figure)
    return axes


def prepare_up_clipped(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean p of the tokens above the upper bound of the clip, per run and step with token rows.

    Returns ``label, seed, run, step, up_clipped, everyone`` (probabilities) ``, share``: mean p of
    the tokens with A > 0 and a ratio above the upper bound, of all tokens with A > 0, and the share
    of the latter that the former are. No row where there is no such bound.
    """
    columns = ("sign", "prob", "logp", "logp_old")
    rows = _with_bounds(token_frame(runs, columns, max_steps=_UP_CLIPPED_STEPS), runs)
    rows = rows[(rows["sign"] > 0) & rows["logp_old"].notna() & rows["high"].notna()]
    over = np.exp((rows["logp"] - rows["logp_old"]).astype("float64")) > rows["high"]
    rows = rows.assign(over=over, up_clipped=rows["prob"].where(over))
    table = rows.groupby(["label", "seed", "run", "step"], dropna=False, sort=False).agg(
        up_clipped=("up_clipped", "mean"), everyone=("prob", "mean"), share=("over", "mean")
    )
    return keep_labels(table.reset_index(), runs)


def _says_up_clipped(frame: pd.DataFrame) -> str:
    means = frame.groupby("label", sort=False)[["up_clipped", "everyone"]].mean().dropna()
    return after(
        "Mean p of tokens beyond the upper clip",
        joined(
            f"{label} {row.up_clipped:.2f} (all with A > 0: {row.everyone:.2f})"
            for label, row in means.iterrows()
        ),
    )


@figure(
    Need("tokens", "logp_old"),
    title="Whom does the upper clip stop?",
    caption="Look for a left line far below the right one: the upper clip stops unlikely tokens "
    "from rising, which a higher bound would allow (clip-higher, arXiv 2503.14476). Mean p, under "
    "the policy being updated, of tokens with A > 0 and ratio above the upper bound; on the right "
    "of all tokens with A > 0.",
    group="policy",
    over_steps=True,
)
def plot_up_clipped(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Mean p of up-clipped tokens and of all with A > 0 over the steps; axes of shape (2,)."""
    figure = figure or new_figure(3.6)
    axes: AxesArray = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = {"up_clipped": "beyond the upper clip", "everyone": "all tokens with A > 0"}
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        label_lines(ax, frame, column)
        ax.set_title(title)
    axes[0].set_ylabel("mean p (probability)")
    axes[0].set_ylim(0, 1.02)
    step_axis(axes, frame["step"])
    label_legend(figure, axes[1])
    return axes
