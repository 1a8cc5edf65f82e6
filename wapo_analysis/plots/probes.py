"""Probed updates: prediction against what happened, and what made up the entropy change."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from wapo_taxonomy import CLASSES

from wapo_analysis.plots.frames import keep_labels, labels_of, run_label
from wapo_analysis.plots.panels import AxesArray, corner, figure_height, label_panels, note
from wapo_analysis.plots.registry import figure
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.probes import agreement, closure, part_name, three_numbers, window
from wapo_analysis.schema import INTERACTION, MOMENTUM, UPDATE, WEIGHT_DECAY
from wapo_analysis.store import Need, Run

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


@figure(
    Need("probes", "counterfactual_dentropy"),
    title="Is the taxonomy's prediction right?",
    caption="Look for points near the dashed line: open ones off it are moved by other tokens "
    "of the same class, filled ones by the other classes and by momentum.",
    group="shift",
    prepare=prepare_calibration,
)
def plot_calibration(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Prediction (across) against what happened (up), one point per probed update.

    Returns axes of shape (labels, 4).
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


@figure(
    Need("probes", "counterfactual_dentropy"),
    title="What made up the change of the entropy?",
    caption="Look for the longest bar: it is the class, or the momentum of earlier batches, "
    "that moved the entropy; the parts add up to the measured change.",
    group="entropy",
    prepare=prepare_waterfall,
)
def plot_waterfall(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars that begin where the one before ends; the last one is what was measured.

    Returns axes of shape (1, labels).
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
            _bars(ax, part)
    axes[0, 0].set_ylabel("dH of all tokens, summed over\nthe probed updates (nats)")
    handles = [Line2D([], [], color=INK, marker="_", markersize=12, linestyle="none")]
    figure.legend(handles, ["predicted from the tokens' own updates"], loc="outside lower center")
    return axes


def _bars(ax: Axes, part: pd.DataFrame) -> None:
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
