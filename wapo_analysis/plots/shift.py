"""Predicted against measured change of each token's probability and of its entropy.

The prediction is the first-order effect of the token's own update in an isolated softmax, per unit
learning rate. The measurement is what the whole optimizer step did, other tokens included. One
factor per label, the least-squares slope through the origin over all its tokens, brings the two to
one scale; it is stated, as is how often the sign was right.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from wapo_taxonomy import CLASSES

from wapo_analysis.plots import each_label, figure
from wapo_analysis.plots.frames import keep_labels, labels_of, token_frame
from wapo_analysis.plots.panels import (
    AxesArray,
    label_parts,
    label_row,
    name_panel,
    note,
    pair_legend,
)
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, SIGN_COLORS, new_figure
from wapo_analysis.probes import agreement
from wapo_analysis.schema import axis_label
from wapo_analysis.store import Need, Run

_SHIFTS = {
    "prob": ("pred_dprob", "dprob", "mean change of p"),
    "entropy": ("pred_dentropy", "dentropy", "mean change of the entropy"),
}
_COLUMNS = (
    "label", "seed", "run", "cls", "tokens", "predicted", "measured", "factor",
    "rank_correlation", "sign_agreement",
)  # fmt: skip
_LOOK = (
    "Look for a filled bar (measured) on the other side of zero than the outline (predicted): "
    "other tokens moved that class through shared parameters."
)
_FEW = 8
_ADVANTAGES = (-np.inf, -1.0, 0.0, 1.0, np.inf)
_POSITIVE = 2  # intervals from here on are of A > 0
_ADVANTAGE_NAMES = ("A <= -1", "-1 < A < 0", "0 < A <= 1", "A > 1")


def prepare_prob_shift(runs: Sequence[Run]) -> pd.DataFrame:
    """Predicted and measured change of p per label and class.

    Returns one row per label and class: ``tokens``, the mean ``measured`` change, the mean
    ``predicted`` change (times ``factor``), ``rank_correlation`` (Spearman) and ``sign_agreement``
    (share of the moved tokens that moved the predicted way).
    """
    return _prepare(runs, "prob")


def prepare_entropy_shift(runs: Sequence[Run]) -> pd.DataFrame:
    """Predicted and measured change of H in nats, as :func:`prepare_prob_shift` does for p."""
    return _prepare(runs, "entropy")


@each_label("sign_agreement")
def _says(label: str, rows: pd.DataFrame) -> str:
    """In which class the prediction had the right sign most often, and in which least."""
    ranked = rows[rows["tokens"] >= _FEW].sort_values("sign_agreement", ascending=False)
    ends = ranked.iloc[[0, -1]].drop_duplicates("cls") if len(ranked) else ranked
    parts = [
        f"{row['sign_agreement']:.0%} of the {CLASSES[int(row['cls'])]} tokens"
        for _, row in ends.iterrows()
    ]
    return f"{label}: sign right for {', '.join(parts)}" if parts else ""


_says_prob_shift = _says_entropy_shift = _says


@figure(
    Need("tokens", "dprob"),
    title="Did the tokens' probabilities move as predicted?",
    caption=_LOOK,
    group="shift",
)
def plot_prob_shift(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Mean change of p per class, predicted beside measured; axes of shape (labels,)."""
    return _plot(frame, "prob", figure)


@figure(
    Need("tokens", "dentropy"),
    title="Did the tokens' entropy move as predicted?",
    caption=_LOOK,
    group="shift",
)
def plot_entropy_shift(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Mean change of H per class, predicted beside measured; axes of shape (labels,)."""
    return _plot(frame, "entropy", figure)


def _prepare(runs: Sequence[Run], kind: str) -> pd.DataFrame:
    predicted, measured, _ = _SHIFTS[kind]
    tokens = token_frame(runs, ("cls", predicted, measured), rescored=True)
    tokens = tokens.rename(columns={predicted: "predicted", measured: "measured"})
    values = tokens[["predicted", "measured"]].astype("float64")
    usable = tokens["cls"].isin(range(4)) & np.isfinite(values.to_numpy()).all(axis=1)
    tokens = tokens.assign(**values)[usable]
    rows = []
    for _, part in tokens.groupby("label", sort=False):
        factor = _factor(part["predicted"], part["measured"])
        rows += [_class_row(mine, factor) for _, mine in part.groupby("cls")]
    return keep_labels(pd.DataFrame(rows, columns=list(_COLUMNS)), runs)


def _factor(predicted: pd.Series, measured: pd.Series) -> float:
    """Slope through the origin; NaN if nothing was predicted to move."""
    size = float((predicted**2).sum())
    return float((predicted * measured).sum()) / size if size > 0 else float("nan")


def _class_row(rows: pd.DataFrame, factor: float) -> dict[str, object]:
    """Numbers of the tokens of one label and class."""
    found = agreement(rows["predicted"].to_numpy(), rows["measured"].to_numpy())
    first = rows.iloc[0]
    return {
        **{name: first[name] for name in ("label", "seed", "run", "cls")},
        "tokens": len(rows),
        "predicted": rows["predicted"].mean() * (factor if np.isfinite(factor) else 1.0),
        "measured": rows["measured"].mean(),
        "factor": factor,
        "rank_correlation": found["rank_correlation"],
        "sign_agreement": found["sign_agreement"],
    }


def _plot(frame: pd.DataFrame, kind: str, figure: Figure | None) -> AxesArray:
    labels, figure, axes = label_row(frame, figure, 3.4, share_x=False, share_y=False, columns=2)
    for ax, _, rows in label_parts(axes, frame, labels):
        part = rows[rows["tokens"] >= _FEW]
        _class_axis(ax, rows)
        if part.empty:
            note(ax, "no re-scored token\nof any class")
            continue
        for _, row in part.iterrows():
            _pair(ax, row)
        factor = part["factor"].iloc[0]
        scale = f"prediction x {factor:.3g}" if np.isfinite(factor) else "nothing predicted"
        ax.set_xlabel(scale, fontsize=8.5, color=MUTED)
    axes[0].set_ylabel(axis_label("tokens", _SHIFTS[kind][1], _SHIFTS[kind][2]))
    pair_legend(figure, "predicted from the token's own update", "measured after the whole update")
    return axes


def _class_axis(ax: Axes, part: pd.DataFrame) -> None:
    """Classes across, with how often the sign was right below their names."""
    right = part.dropna(subset="cls").set_index("cls")["sign_agreement"]
    texts = []
    for code, name in enumerate(CLASSES):
        share = right.get(code, np.nan)
        texts.append(f"{name}\n{share:.0%} right" if np.isfinite(share) else f"{name}\n-")
    ax.set_xticks(range(len(CLASSES)), labels=texts, fontsize=8.5)
    for tick, name in zip(ax.get_xticklabels(), CLASSES, strict=True):
        tick.set_color(CLASS_INK[name])
    ax.set_xlim(-0.6, len(CLASSES) - 0.4)
    ax.grid(visible=False, axis="x")
    ax.axhline(0, color=INK, linewidth=0.8)


def _pair(ax: Axes, row: pd.Series) -> None:
    """Outline of the prediction, filled bar of the measurement."""
    place, color = float(row["cls"]), CLASS_COLORS[CLASSES[int(row["cls"])]]
    ax.bar(place - 0.19, row["predicted"], 0.34, facecolor="white", edgecolor=color, linewidth=1.6)
    ax.bar(place + 0.19, row["measured"], 0.34, color=color)


def prepare_decile_shift(runs: Sequence[Run]) -> pd.DataFrame:
    """Measured change of p in tenths of p, per interval of the advantage.

    Returns ``label, seed, run, advantage`` (place of the interval) ``, decile`` (0..9) ``, tokens``
    and the quartiles ``low, median, high`` of the measured change of p; cells of fewer than eight
    tokens are left out.
    """
    rows = token_frame(runs, ("advantage", "prob", "dprob"), rescored=True)
    values = rows[["advantage", "prob", "dprob"]].astype("float64")
    usable = np.isfinite(values.to_numpy()).all(axis=1) & (values["advantage"] != 0).to_numpy()
    rows = rows.assign(**values)[usable]
    edge = np.searchsorted(_ADVANTAGES, rows["advantage"], side="left") - 1
    decile = np.clip((rows["prob"] * 10).astype(int), 0, 9)
    cells = rows.assign(advantage=edge, decile=decile).groupby(
        ["label", "advantage", "decile"], sort=False
    )
    table = cells.agg(
        seed=("seed", "first"), run=("run", "first"), tokens=("dprob", "size"),
        low=("dprob", lambda x: x.quantile(0.25)), median=("dprob", "median"),
        high=("dprob", lambda x: x.quantile(0.75)),
    ).reset_index()  # fmt: skip
    order = ["label", "seed", "run", "advantage", "decile", "tokens", "low", "median", "high"]
    return keep_labels(table.loc[table["tokens"] >= _FEW, order], runs)


@each_label("median")
def _says_decile_shift(label: str, rows: pd.DataFrame) -> str:
    against = np.sign(rows["median"]) == np.where(rows["advantage"] < _POSITIVE, 1, -1)
    return f"{label}: {against.sum()} of {len(rows)} groups of tokens move against their advantage"


@figure(
    Need("tokens", "dprob"),
    title="Which probabilities does an update move, and which way?",
    caption="Look for dots on the wrong side of zero, above it on the left and below it on the "
    "right: other tokens carried them there. Dots: median, bars: quartiles "
    "of the change of p over one update, by tenth of p and advantage (arXiv 2505.12929).",
    group="shift",
)
def plot_decile_shift(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Change of p against the tenth of p; labels down, intervals of the advantage across.

    Returns axes of shape (labels, 4).
    """
    labels = labels_of(frame)
    figure = figure or new_figure(1.2 + 2.2 * max(len(labels), 1))
    axes: AxesArray = figure.subplots(
        max(len(labels), 1), len(_ADVANTAGE_NAMES), sharex=True, sharey="row", squeeze=False
    )
    for row, label, part in label_parts(axes, frame, labels):
        for place, ax in enumerate(row):
            _deciles(
                ax, part[part["advantage"] == place], SIGN_COLORS[-1 if place < _POSITIVE else 1]
            )
        name_panel(row[0], f"{label}\nchange of p", 9, beside=True)
    for ax, name in zip(axes[0], _ADVANTAGE_NAMES, strict=True):
        ax.set_title(name)
    for ax in axes[-1]:
        ax.set_xlabel("p before the update")
        ax.set_xlim(0, 1)
    return axes


def _deciles(ax: Axes, part: pd.DataFrame, color: str) -> None:
    ax.axhline(0, color=INK, linewidth=0.6)
    if part.empty:
        note(ax, "too few re-scored\ntokens here")
        return
    place = (part["decile"] + 0.5) / 10
    spread = np.array([part["median"] - part["low"], part["high"] - part["median"]])
    ax.errorbar(place, part["median"], spread, color=color, fmt="o", markersize=4.5, elinewidth=1.4)
