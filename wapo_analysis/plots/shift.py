"""Predicted against measured change of each token's probability and of its entropy.

The prediction is the first-order effect of the token's own update in an isolated softmax, per unit
learning rate. The measurement is what the whole optimizer step did, other tokens included. One
factor per label, the least-squares slope through the origin over all its tokens, brings the two to
one scale; it is stated, as are rank correlation and sign agreement per class.
"""

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from wapo_taxonomy import CLASSES

from wapo_analysis.plots.frames import keep_labels, labels_of, token_frame
from wapo_analysis.plots.panels import AxesArray, corner, note
from wapo_analysis.plots.registry import figure
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.schema import axis_label
from wapo_analysis.store import Need, Run

Axis = Literal["logit", "linear"]

_SHIFTS = {
    "prob": ("pred_dprob", "dprob", "change of p"),
    "entropy": ("pred_dentropy", "dentropy", "change of the entropy"),
}
_COLUMNS = (
    "label", "seed", "run", "cls", "prob", "tokens", "low", "median", "high", "predicted",
    "factor", "rank_correlation", "sign_agreement", "class_tokens",
)  # fmt: skip
_NEAR_ONE = 1e-6
_SMALLEST_BIN = 8
_TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


def prepare_prob_shift(runs: Sequence[Run]) -> pd.DataFrame:
    """Predicted and measured change of p, in bins of p, per label and class.

    Returns
    -------
    DataFrame
        One row per label, class and bin: ``prob`` (median p), ``tokens``, the quartiles ``low,
        median, high`` of the measured change, ``predicted`` (median prediction times ``factor``),
        and per class ``rank_correlation`` (Spearman), ``sign_agreement`` (share of the moved
        tokens that moved the predicted way), ``class_tokens``.
    """
    return _prepare(runs, "prob")


def prepare_entropy_shift(runs: Sequence[Run]) -> pd.DataFrame:
    """Predicted and measured change of H in nats, as :func:`prepare_prob_shift` does for p."""
    return _prepare(runs, "entropy")


@figure(
    Need("tokens", "dprob"),
    title="Did the tokens' probabilities move as predicted?",
    caption="Look for dots (measured) along the line (predicted), on axes that are logarithmic "
    "away from zero; a gap is the work of other tokens through shared parameters.",
    group="shift",
    prepare=prepare_prob_shift,
)
def plot_prob_shift(
    frame: pd.DataFrame, figure: Figure | None = None, axis: Axis = "logit"
) -> AxesArray:
    """Change of p against p: labels down, classes across.

    Parameters
    ----------
    axis : {"logit", "linear"}
        Scale of p; logit shows the near-certain tokens.

    Returns axes of shape (labels, 4).
    """
    return _plot(frame, "prob", figure, axis)


@figure(
    Need("tokens", "dentropy"),
    title="Did the tokens' entropy move as predicted?",
    caption="Look for dots (measured) on the side of zero where the line (predicted) is; a "
    "gap is the work of other tokens through shared parameters.",
    group="shift",
    prepare=prepare_entropy_shift,
)
def plot_entropy_shift(
    frame: pd.DataFrame, figure: Figure | None = None, axis: Axis = "logit"
) -> AxesArray:
    """Change of the entropy against p; parameters and result as in :func:`plot_prob_shift`."""
    return _plot(frame, "entropy", figure, axis)


def _prepare(runs: Sequence[Run], kind: str) -> pd.DataFrame:
    predicted, measured, _ = _SHIFTS[kind]
    tokens = token_frame(runs, ("prob", "cls", predicted, measured), rescored=True)
    tokens = tokens.rename(columns={predicted: "predicted", measured: "measured"})
    values = tokens[["prob", "predicted", "measured"]].astype("float64")
    usable = tokens["cls"].isin(range(4)) & np.isfinite(values.to_numpy()).all(axis=1)
    tokens = tokens.assign(**values)[usable]
    parts = []
    for _, rows in tokens.groupby("label", sort=False):
        scaled = rows.assign(factor=_factor(rows["predicted"], rows["measured"]))
        parts += [_class_bins(part) for _, part in scaled.groupby("cls")]
    if not parts:
        return keep_labels(pd.DataFrame(columns=list(_COLUMNS)), runs)
    return keep_labels(pd.concat(parts, ignore_index=True), runs)


def _factor(predicted: pd.Series, measured: pd.Series) -> float:
    """Slope through the origin; NaN if nothing was predicted to move."""
    size = float((predicted**2).sum())
    return float((predicted * measured).sum()) / size if size > 0 else float("nan")


def _class_bins(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one label and class in bins of p one unit of log odds wide."""
    prob = rows["prob"].clip(_NEAR_ONE, 1 - _NEAR_ONE)
    place = np.floor(np.log(prob / (1 - prob)) + 0.5)
    factor = float(rows["factor"].iloc[0])
    bins = rows.assign(place=place, prob=prob, scaled=rows["predicted"] * factor).groupby("place")
    table = pd.DataFrame(
        {
            "prob": bins["prob"].median(),
            "tokens": bins.size(),
            "low": bins["measured"].quantile(0.25),
            "median": bins["measured"].median(),
            "high": bins["measured"].quantile(0.75),
            "predicted": bins["scaled"].median(),
        }
    ).reset_index(drop=True)
    # Too few tokens make no quartiles; a class without a full bin keeps its numbers, unplotted.
    few = table["tokens"] < _SMALLEST_BIN
    table.loc[few, ["low", "median", "high", "predicted"]] = np.nan
    first = rows.iloc[0]
    keys = {name: first[name] for name in ("label", "seed", "run", "cls")}
    full = table.assign(**keys, factor=factor, **_agreement(rows))
    return pd.DataFrame(full, columns=list(_COLUMNS))


def _agreement(rows: pd.DataFrame) -> dict[str, float]:
    """Spearman correlation and sign agreement over the tokens that were predicted to move."""
    moved = rows[(rows["predicted"] != 0) & (rows["measured"] != 0)]
    ranks = moved[["predicted", "measured"]].rank()
    flat = len(moved) < 3 or ranks.nunique().min() < 2
    same = np.sign(moved["predicted"]) == np.sign(moved["measured"])
    return {
        "rank_correlation": float("nan") if flat else float(np.corrcoef(ranks.T)[0, 1]),
        "sign_agreement": float(same.mean()) if len(moved) else float("nan"),
        "class_tokens": len(rows),
    }


def _plot(frame: pd.DataFrame, kind: str, figure: Figure | None, axis: Axis) -> AxesArray:
    labels = labels_of(frame)
    figure = figure or new_figure(1.1 + 2.5 * max(len(labels), 1))
    axes: AxesArray = figure.subplots(
        max(len(labels), 1), len(CLASSES), sharex=True, sharey="row", squeeze=False
    )
    column = _SHIFTS[kind][1]
    for label, row in zip(labels, axes, strict=False):
        part = frame[frame["label"] == label]
        for code, ax in enumerate(row):
            _panel(ax, part[part["cls"] == code], CLASS_COLORS[CLASSES[code]])
        _scale(row, part)
        factor = part["factor"].iloc[0] if len(part) else float("nan")
        scale = f"prediction x {factor:.3g}" if np.isfinite(factor) else "nothing predicted"
        what = axis_label("tokens", column, _SHIFTS[kind][2])
        row[0].set_ylabel(f"{textwrap.fill(label, 26)}\n({scale})\n{what}", fontsize=9)
    for ax, name in zip(axes[0], CLASSES, strict=True):
        ax.set_title(name, color=CLASS_INK[name])
    _probability_axis(axes, axis)
    _legend(figure)
    return axes


def _panel(ax: Axes, part: pd.DataFrame, color: str) -> None:
    ax.axhline(0, color=INK, linewidth=0.6)
    if part.empty:
        note(ax, "no re-scored token\nof this class")
        return
    first, part = part.iloc[0], part.dropna(subset="median")
    if part.empty:
        note(ax, f"only {int(first['class_tokens'])} re-scored\ntokens of this class")
        return
    spread = np.array([part["median"] - part["low"], part["high"] - part["median"]])
    ax.errorbar(
        part["prob"], part["median"], spread, color=color, fmt="o", markersize=4.5, elinewidth=1.2
    )
    style: dict[str, Any] = {"color": INK, "linewidth": 1.3, "marker": "_", "markersize": 7}
    ax.plot(part["prob"], part["predicted"], **style)
    if np.isfinite(first["sign_agreement"]):
        text = (
            f"rank corr. {first['rank_correlation']:.2f}\nsign right {first['sign_agreement']:.0%}"
        )
    else:
        text = "no gradient here:\nmoved by other tokens"
    corner(ax, f"{text}\n{int(first['class_tokens']):,} tokens")


def _scale(row: AxesArray, part: pd.DataFrame) -> None:
    """Symmetric logarithmic axis over two decades, linear within, with headroom for the text."""
    values = np.abs(part[["low", "median", "high", "predicted"]].to_numpy(dtype=np.float64))
    biggest = float(np.nanmax(values, initial=0.0))
    if biggest == 0.0:
        return
    decade = float(np.floor(np.log10(biggest)))
    ticks = [0.0, *(side * 10.0**power for power in (decade - 1, decade) for side in (1, -1))]
    row[0].set_yscale("symlog", linthresh=10.0 ** (decade - 1), linscale=0.7)
    row[0].set_ylim(-1.3 * biggest, 12.0 * biggest)
    row[0].set_yticks(sorted(ticks), labels=[f"{tick:g}" for tick in sorted(ticks)])
    row[0].set_yticks([], minor=True)


def _probability_axis(axes: AxesArray, axis: Axis) -> None:
    for ax in axes[-1]:
        ax.set_xlabel("p before the update")
        if axis == "logit":
            ax.set_xscale("logit")
            low, high = ax.get_xlim()
            ticks = [tick for tick in _TICKS if low <= tick <= high] or [0.5]
            texts = [f"{tick:g}" for tick in ticks]
            ax.set_xticks(ticks, labels=texts, fontsize=8, rotation=45, ha="right")
            ax.set_xticks([], minor=True)


def _legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=MUTED, marker="o", markersize=4.5, linestyle="none"),
        Line2D([], [], color=INK, linewidth=1.3),
    ]
    texts = [
        "measured: median and quartiles in bins of p",
        "predicted from the token's own update, scaled by one factor per row",
    ]
    figure.legend(handles, texts, loc="outside lower center", ncols=2)
