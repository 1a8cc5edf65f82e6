"""Entropy over the steps: of all tokens, by sign of the advantage, and what moves it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from wapo_taxonomy import CLASS_NAMES, CLASSES, NONE

from wapo_analysis.plots import after, each_label, ends, figure, joined, largest_key
from wapo_analysis.plots.frames import (
    class_frame,
    class_table,
    keep_labels,
    labels_of,
    step_frame,
    with_empty_classes,
)
from wapo_analysis.plots.panels import (
    AxesArray,
    class_legend,
    corner,
    label_figure,
    label_legend,
    label_lines,
    label_parts,
    log_y,
    mark_missing,
    note,
    replicate_line,
    share_y_if_close,
    stack,
    step_axis,
)
from wapo_analysis.plots.style import (
    INK,
    SIGN_COLORS,
    SIGN_NAMES,
    label_styles,
    new_figure,
)
from wapo_analysis.schema import axis_label
from wapo_analysis.series import Series
from wapo_analysis.store import Need, Run

BAND = 2.0
_LOG_FROM = 8.0


def prepare_entropy(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean entropy per run and step, with the level of the baseline.

    Returns ``label, seed, run, step, entropy, start`` (nats); start is the baseline, the one its
    diagnosis judges by.
    """
    frame = step_frame(runs, ("entropy",))
    known = frame.dropna(subset="entropy").groupby("run")
    levels = {
        run: Series(part["step"].to_numpy(), part["entropy"].to_numpy()).level
        for run, part in known
    }
    return keep_labels(frame.assign(start=frame["run"].map(levels)), runs)


def _says_entropy(frame: pd.DataFrame) -> str:
    pairs = ends(frame, "entropy").items()
    return after(
        "Mean entropy",
        joined(
            f"{label} {a:.2f} to {b:.2f} nats" + (f" ({_times(b / a)})" if a > 0 else "")
            for label, (a, b) in pairs
        ),
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio >= BAND else f"{ratio - 1:+.0%}"


@figure(
    Need("steps", "entropy"),
    title="Does entropy leave the range of its baseline?",
    caption="Look for the step where a line crosses a dotted line, half or twice its own "
    "baseline: upwards is an explosion, downwards without a rising reward a collapse.",
    group="entropy",
    over_steps=True,
)
def plot_entropy(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Mean entropy over the steps; dotted: half and twice the label's own baseline.

    The axis is logarithmic once the values span more than a factor of eight, so that a collapse
    shows as clearly as an explosion.

    Returns axes of shape (1,).
    """
    figure = figure or new_figure(4.2)
    axes: AxesArray = figure.subplots(1, 1, squeeze=False)[0]
    ax: Axes = axes[0]
    _baseline_bands(ax, frame)
    span = frame["entropy"][frame["entropy"] > 0]
    wide = len(span) > 0 and span.max() > _LOG_FROM * span.min()
    label_lines(ax, frame, "entropy", positive=wide)
    mark_missing(ax, frame, "entropy")
    if wide:
        log_y(ax, span)
    ax.set_ylabel(axis_label("steps", "entropy", "mean entropy"))
    step_axis(axes, frame["step"])
    label_legend(figure, ax)
    return axes


def _baseline_bands(ax: Axes, frame: pd.DataFrame) -> None:
    """Dotted lines at half and twice the mean baseline of each label, named at the first."""
    styles = label_styles(labels_of(frame))
    starts = frame.groupby("label", sort=False)["start"].mean().dropna()
    place = ax.get_yaxis_transform()
    for number, (label, start) in enumerate(starts.items()):
        color = styles[str(label)].color
        for bound, text in (
            (start * BAND, "twice the\nbaseline"),
            (start / BAND, "half the\nbaseline"),
        ):
            ax.axhline(bound, color=color, linestyle=":", linewidth=1.1)
            if number == 0:
                ax.text(1.005, bound, text, transform=place, va="center", fontsize=8.5)


def prepare_entropy_by_sign(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean entropy (nats) of tokens with A > 0 and with A < 0 per run and step."""
    return keep_labels(step_frame(runs, ("entropy_pos", "entropy_neg")), runs)


@each_label()
def _says_entropy_by_sign(label: str, rows: pd.DataFrame) -> str:
    pairs = {sign: ends(rows, name).get(label) for sign, name in _BY_SIGN.items()}
    known = [f"{SIGN_NAMES[s]} {p[0]:.2f} to {p[1]:.2f}" for s, p in pairs.items() if p]
    return f"{label}: {', '.join(known)} nats" if known else ""


_BY_SIGN = {1: "entropy_pos", -1: "entropy_neg"}


@figure(
    Need("steps", "entropy_pos") | Need("steps", "entropy_neg"),
    title="Is it the rewarded or the punished tokens whose entropy moves?",
    caption="Look for the two lines parting: punished tokens that stay uncertain while "
    "rewarded ones settle are the ones negative updates keep flat.",
    group="entropy",
    over_steps=True,
)
def plot_entropy_by_sign(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Entropy of rewarded and of punished tokens over the steps, one panel per label.

    Returns axes of shape (1, labels).
    """
    labels, figure, axes = label_figure(frame, figure, 3.0)
    for ax, _, rows in label_parts(axes[0], frame, labels):
        for sign, column in _BY_SIGN.items():
            replicate_line(ax, rows, column, color=SIGN_COLORS[sign])
            if rows[column].isna().all():
                corner(ax, f"no tokens with {SIGN_NAMES[sign]} here", lower_right=sign < 0)
    axes[0, 0].set_ylabel(axis_label("steps", "entropy", "mean entropy"))
    axes[0, 0].set_ylim(bottom=0)
    step_axis(axes, frame["step"])
    handles = [
        Line2D([], [], color=SIGN_COLORS[sign], label=f"tokens with {SIGN_NAMES[sign]}")
        for sign in _BY_SIGN
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return axes


def prepare_entropy_flow(runs: Sequence[Run]) -> pd.DataFrame:
    """Predicted and measured change of the entropy, per class and step, both per token.

    The first-order prediction is per unit learning rate of the logits. What that rate was is fitted
    at every step with re-scored tokens, as probes do it: the factor that brings the predicted
    change of p of the cells of the class table to the measured one, by least squares through the
    origin. In between it is interpolated. Returns ``label, seed, run, step, cls, predicted,
    measured, scale``: parts of the mean change of the entropy over the tokens of the step, which
    add up over the classes (nats per token). ``scale`` is that factor; where no step of a run was
    re-scored it is NaN and ``predicted`` stays in nats per token and unit learning rate.
    """
    sums = ("tokens", "pred_dentropy_sum", "dentropy_sum", "rescored")
    frame = with_empty_classes(class_frame(runs, sums), "pred_dentropy_sum")
    totals = frame.groupby(["run", "step"])[["tokens", "rescored"]].transform("sum")
    # A class without a re-scored token adds nothing to the mean of a step that has some.
    change = frame["dentropy_sum"].mask(frame["rescored"].fillna(0) == 0, 0.0)
    scale = _scales(runs, frame)
    changes = frame[["label", "seed", "run", "step", "cls"]].assign(
        predicted=frame["pred_dentropy_sum"] / totals["tokens"] * scale.fillna(1.0),
        measured=change / totals["rescored"].where(totals["rescored"] > 0),
        scale=scale,
    )
    return keep_labels(changes, runs)


def _scales(runs: Sequence[Run], frame: pd.DataFrame) -> pd.Series:
    """Fitted learning rate of the logits for every row of a frame with run and step."""
    cells = class_frame(
        runs, ("tokens", "rescored", "pred_dprob_sum", "dprob_sum"), ("step", "cls", "prob_bin")
    )
    x, y = cells["pred_dprob_sum"] / cells["tokens"], cells["dprob_sum"] / cells["rescored"]
    cells = cells.assign(xy=x * y * cells["rescored"], xx=x * x * cells["rescored"])
    known = cells[np.isfinite(cells["xy"]) & (cells["rescored"] > 0)]
    sums = known.groupby(["run", "step"])[["xy", "xx"]].sum()
    fitted = (sums["xy"] / sums["xx"].where(sums["xx"] > 0)).dropna()
    fitted = fitted[fitted > 0]  # a prediction keeps its own sign
    scale = pd.Series(np.nan, index=frame.index)
    for run, rows in frame.groupby("run"):
        if run in fitted.index.get_level_values("run"):
            mine = fitted.loc[run]
            scale[rows.index] = np.interp(rows["step"].astype(float), mine.index, mine)
    return scale


@each_label()
def _says_entropy_flow(label: str, rows: pd.DataFrame) -> str:
    """The class that predicts most, and how often the predicted sum had the measured sign."""
    sums = rows.groupby("cls")["predicted"].sum(min_count=1).dropna()
    way = np.sign(sums.sum())
    toward = sums[np.sign(sums) == way]
    if toward.empty or not way:
        return ""
    code = largest_key(toward)
    share = float(toward.abs().max() / toward.abs().sum())
    return (
        f"{label}: {CLASS_NAMES[code]} is {share:.0%} of the predicted "
        f"{'rise' if way > 0 else 'fall'}{_sign_right(rows)}"
    )


def _sign_right(rows: pd.DataFrame) -> str:
    sums = rows.groupby(["run", "step"])[["predicted", "measured"]].sum(min_count=1).dropna()
    sums = sums[(sums != 0).all(axis=1)]
    if sums.empty:
        return ""
    right = (np.sign(sums["predicted"]) == np.sign(sums["measured"])).sum()
    return f", sign right at {right} of {len(sums)} re-scored steps"


@figure(
    Need("classes", "pred_dentropy_sum"),
    title="Which class moves entropy up, which down?",
    caption="Look for the colour that outweighs the others: above zero its updates raise the "
    "entropy, below zero they lower it (black: sum). The lower row, in the same unit, is what the "
    "whole update did to the tokens of each class.",
    group="entropy",
    over_steps=True,
)
def plot_entropy_flow(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Predicted dH per class, stacked, with the sum; below, each class's measured part.

    Returns axes of shape (1 or 2, labels); the second row is there if anything was re-scored.
    """
    rows = 2 if frame["measured"].notna().any() else 1
    labels, figure, axes = label_figure(frame, figure, 2.7, rows, share_y=False)
    for column, _, part in label_parts(axes.T, frame, labels):
        _predicted_flow(column[0], part)
        if rows > 1:
            _measured_change(column[1], part)
    share_y_if_close(axes.ravel())
    if rows > 1:
        axes[1, 0].set_ylabel("measured dH\n(nats per token)")
    scaled = frame["scale"].notna().any()
    unit = "nats per token" if scaled else "nats per token\nand unit learning rate"
    axes[0, 0].set_ylabel(f"predicted dH\n({unit})")
    step_axis(axes, frame["step"])
    class_legend(figure, (*CLASSES, NONE), [Line2D([], [], color=INK, label="sum")])
    return axes


def _predicted_flow(ax: Axes, part: pd.DataFrame) -> None:
    table = class_table(part, "predicted").reindex(columns=CLASSES)
    if not table.fillna(0.0).any(axis=None):
        blind = table.isna().all(axis=None)
        why = "the source gives no\ncollision statistics" if blind else "no gradient at all"
        note(ax, f"not available here:\n{why}")
        return
    stack(ax, table.fillna(0.0))
    _sum_line(ax, table.sum(axis=1, min_count=1))


def _measured_change(ax: Axes, part: pd.DataFrame) -> None:
    if part["measured"].isna().all():
        note(ax, "not available here:\nno token was re-scored\nafter its update")
        return
    table = class_table(part, "measured").dropna(how="all")
    stack(ax, table.fillna(0.0))
    _sum_line(ax, table.sum(axis=1))


def _sum_line(ax: Axes, total: pd.Series) -> None:
    dot: dict[str, Any] = {"marker": "o", "markersize": 5} if len(total) == 1 else {}
    ax.plot(total.index, total, color="white", linewidth=3.0)
    ax.plot(total.index, total, color=INK, linewidth=1.4, **dot)
    ax.axhline(0, color=INK, linewidth=0.6)
