"""How good the taxonomy's prediction is: probed updates, prediction against what happened."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from wapo_taxonomy import CLASSES

from wapo_analysis.plots.frames import keep_labels, labels_of, run_label
from wapo_analysis.plots.panels import AxesArray, corner, note
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.probes import agreement, three_numbers
from wapo_analysis.store import Run

_KINDS = ("counterfactual", "measured")
_KEYS = ["label", "seed", "run", "step", "cls", "predicted", *_KINDS, "verdict"]
_NUMBERS = [f"{kind}_{what}" for kind in _KINDS for what in ("rank_correlation", "sign_agreement")]
_DECADES = 4


def prepare_calibration(runs: Sequence[Run]) -> pd.DataFrame:
    """Prediction, counterfactual and measurement of every probed update, per class.

    Returns
    -------
    DataFrame
        One row per run, probed update and class with tokens: ``predicted``, ``counterfactual``
        (the class's share of the step applied alone) and ``measured`` (whole update), mean change
        of the entropy of the class's own tokens in nats; ``verdict``; and per label and class
        Spearman correlation and sign agreement of the prediction with either,
        ``counterfactual_rank_correlation`` and so on.
    """
    parts = []
    for place, run in enumerate(runs):
        if run.probes.empty:
            continue
        table = three_numbers(run.probes).rename(columns={"tokens_of": "cls"})
        own = table[table["cls"].isin(range(len(CLASSES)))]
        keys = {"label": run_label(run), "seed": run.manifest.get("seed"), "run": place}
        parts.append(own.assign(**keys)[_KEYS])
    if not parts:
        return keep_labels(pd.DataFrame(columns=[*_KEYS, *_NUMBERS]), runs)
    frame = pd.concat(parts, ignore_index=True)
    rows = [_with_agreement(part) for _, part in frame.groupby(["label", "cls"], sort=False)]
    return keep_labels(pd.concat(rows, ignore_index=True), runs)


def _with_agreement(part: pd.DataFrame) -> pd.DataFrame:
    predicted = part["predicted"].to_numpy(np.float64)
    numbers = {}
    for kind in _KINDS:
        found = agreement(predicted, part[kind].to_numpy(np.float64))
        for what in ("rank_correlation", "sign_agreement"):
            numbers[f"{kind}_{what}"] = found[what]
    return part.assign(**numbers)


def plot_calibration(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Prediction (across) against what happened (up), one point per probed update.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`prepare_calibration`.
    figure : Figure, optional
        Empty figure to draw into.

    Returns
    -------
    ndarray of Axes, shape (labels, 4)
    """
    labels = labels_of(frame)
    figure = figure or new_figure(1.3 + 2.6 * max(len(labels), 1))
    axes: AxesArray = figure.subplots(max(len(labels), 1), len(CLASSES), squeeze=False)
    for label, row in zip(labels, axes, strict=False):
        part = frame[frame["label"] == label]
        for code, ax in enumerate(row):
            _panel(ax, part[part["cls"] == code], CLASS_COLORS[CLASSES[code]])
        row[0].set_ylabel(f"{textwrap.fill(label, 26)}\nmean dH of the class (nats)")
    for code, name in enumerate(CLASSES):
        axes[0, code].set_title(name, color=CLASS_INK[name])
        axes[-1, code].set_xlabel("predicted dH (nats)")
    _legend(figure)
    return axes


def _panel(ax: Axes, part: pd.DataFrame, color: str) -> None:
    if part.empty:
        note(ax, "no probed token\nof this class")
        return
    values = part[["predicted", *_KINDS]].to_numpy(dtype=np.float64)
    biggest = float(np.nanmax(np.abs(values), initial=0.0))
    if biggest == 0.0:
        note(ax, "nothing moved\nthis class")
        return
    _axes_around_zero(ax, biggest)
    ends = np.array([-biggest, biggest])
    ax.plot(ends, ends, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    ax.plot(part["predicted"], part["counterfactual"], "o", color=color, mfc="white", markersize=5)
    ax.plot(part["predicted"], part["measured"], "o", color=color, markersize=3.5, alpha=0.85)
    first = part.iloc[0]
    corner(
        ax,
        f"alone: {_agrees(first, 'counterfactual')}\nwhole: {_agrees(first, 'measured')}",
    )


def _agrees(row: pd.Series, kind: str) -> str:
    right, rank = row[f"{kind}_sign_agreement"], row[f"{kind}_rank_correlation"]
    if not np.isfinite(right):
        return "no gradient here"
    return f"sign {right:.0%}" + (f", rank {rank:.2f}" if np.isfinite(rank) else "")


def _axes_around_zero(ax: Axes, biggest: float) -> None:
    """Logarithmic away from zero on both sides, alike on both axes, with headroom for the text."""
    top = float(np.ceil(np.log10(biggest)))
    small = 10.0 ** (top - _DECADES)
    ticks = [-(10.0 ** (top - 1)), 0.0, 10.0 ** (top - 1)]
    for axis in (ax.xaxis, ax.yaxis):
        getattr(ax, f"set_{axis.axis_name}scale")("symlog", linthresh=small, linscale=0.5)
        getattr(ax, f"set_{axis.axis_name}lim")(-2 * biggest, 2 * biggest)
        axis.set_ticks(ticks, labels=[_tick(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    ax.set_ylim(top=100 * biggest)
    ax.axhline(0, color=MUTED, linewidth=0.6)
    ax.axvline(0, color=MUTED, linewidth=0.6)


def _tick(value: float) -> str:
    return "0" if value == 0 else f"{'-' if value < 0 else ''}1e{round(np.log10(abs(value)))}"


def _legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=MUTED, marker="o", mfc="white", markersize=5, linestyle="none"),
        Line2D([], [], color=MUTED, marker="o", markersize=3.5, linestyle="none"),
        Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 2))),
    ]
    texts = ["the class's share of the step alone", "the whole update", "as predicted"]
    figure.legend(handles, texts, loc="outside lower center", ncols=3)
