"""Entropy over the steps: of all tokens, by sign of the advantage, and what pushes it."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from wapo_taxonomy import CLASS_CODES, CLASSES, NONE

from wapo_analysis.plots.frames import (
    class_frame,
    keep_labels,
    labels_of,
    step_frame,
    with_empty_classes,
)
from wapo_analysis.plots.panels import (
    AxesArray,
    class_legend,
    class_table,
    corner,
    figure_height,
    fit_steps,
    label_legend,
    label_lines,
    label_panels,
    log_y,
    mark_missing,
    note,
    replicate_line,
    share_y_if_close,
    stack,
    step_axis,
)
from wapo_analysis.plots.registry import figure
from wapo_analysis.plots.style import (
    CLASS_COLORS,
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
    """Mean entropy per run and step, with the level the run began at.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, entropy, start`` (nats); start is the level the run began at, the
        one its diagnosis judges by.
    """
    frame = step_frame(runs, ("entropy",))
    known = frame.dropna(subset="entropy").groupby("run")
    levels = {
        run: Series(part["step"].to_numpy(), part["entropy"].to_numpy()).level
        for run, part in known
    }
    return keep_labels(frame.assign(start=frame["run"].map(levels)), runs)


@figure(
    Need("steps", "entropy"),
    title="Does entropy leave the range it began in?",
    caption="Look for the step where a line crosses a dotted line, half or twice its own "
    "beginning: upwards is an explosion, downwards without a rising reward a collapse.",
    group="entropy",
    prepare=prepare_entropy,
)
def plot_entropy(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Mean entropy over the steps; dotted: half and twice the label's own beginning.

    The axis is logarithmic once the values span more than a factor of eight, so that a collapse
    shows as clearly as an explosion.

    Returns axes of shape (1,).
    """
    figure = figure or new_figure(4.2)
    axes: AxesArray = figure.subplots(1, 1, squeeze=False)[0]
    ax: Axes = axes[0]
    _beginning_bands(ax, frame)
    label_lines(ax, frame, "entropy")
    mark_missing(ax, frame, "entropy")
    span = frame["entropy"]
    if span.min() > 0 and span.max() > _LOG_FROM * span.min():
        log_y(ax, span)
    ax.set_ylabel(axis_label("steps", "entropy", "mean entropy"))
    fit_steps(axes, frame["step"])
    step_axis(axes)
    label_legend(figure, ax)
    return axes


def _beginning_bands(ax: Axes, frame: pd.DataFrame) -> None:
    """Dotted lines at half and twice the mean beginning of each label, named at the first."""
    styles = label_styles(labels_of(frame))
    starts = frame.groupby("label", sort=False)["start"].mean().dropna()
    place = ax.get_yaxis_transform()
    for number, (label, start) in enumerate(starts.items()):
        color = styles[str(label)].color
        for bound, text in (
            (start * BAND, "twice the\nbeginning"),
            (start / BAND, "half the\nbeginning"),
        ):
            ax.axhline(bound, color=color, linestyle=":", linewidth=1.1)
            if number == 0:
                ax.text(1.005, bound, text, transform=place, va="center", fontsize=8.5)


def prepare_entropy_by_sign(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean entropy (nats) of tokens with A > 0 and with A < 0 per run and step."""
    return keep_labels(step_frame(runs, ("entropy_pos", "entropy_neg")), runs)


@figure(
    Need("steps", "entropy_pos") | Need("steps", "entropy_neg"),
    title="Is it the rewarded or the punished tokens whose entropy moves?",
    caption="Look for the two lines parting: punished tokens that stay uncertain while "
    "rewarded ones settle are the ones negative updates keep flat.",
    group="entropy",
    prepare=prepare_entropy_by_sign,
)
def plot_entropy_by_sign(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Entropy of rewarded and of punished tokens over the steps, one panel per label.

    Returns axes of shape (1, labels).
    """
    labels = labels_of(frame)
    figure = figure or new_figure(figure_height(len(labels), 1, 3.0))
    axes = label_panels(figure, labels)
    for ax, label in zip(axes[0], labels, strict=True):
        rows = frame[frame["label"] == label]
        for sign, column in ((1, "entropy_pos"), (-1, "entropy_neg")):
            replicate_line(ax, rows, column, color=SIGN_COLORS[sign])
            if rows[column].isna().all():
                corner(ax, f"no tokens with {SIGN_NAMES[sign]} here", lower_right=sign < 0)
    axes[0, 0].set_ylabel(axis_label("steps", "entropy", "mean entropy"))
    axes[0, 0].set_ylim(bottom=0)
    fit_steps(axes, frame["step"])
    step_axis(axes[-1])
    handles = [
        Line2D([], [], color=SIGN_COLORS[sign], label=f"tokens with {SIGN_NAMES[sign]}")
        for sign in (1, -1)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return axes


def prepare_entropy_flow(runs: Sequence[Run]) -> pd.DataFrame:
    """Predicted push on the entropy and measured change of it, per class and step.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, cls, predicted, measured``: predicted is the sum of the
        first-order dH of the class's own updates (nats per unit learning rate); measured is the
        class's part of the mean change of entropy after the whole update, so that the parts of all
        classes add up to that mean (nats per re-scored token).
    """
    frame = class_frame(runs, ("pred_dentropy_sum", "dentropy_sum", "rescored"))
    frame = with_empty_classes(frame, "pred_dentropy_sum")
    scored = frame.groupby(["run", "step"])["rescored"].transform("sum")
    # A class without a re-scored token adds nothing to the mean of a step that has some.
    change = frame["dentropy_sum"].mask(frame["rescored"].fillna(0) == 0, 0.0)
    flow = frame[["label", "seed", "run", "step", "cls"]].assign(
        predicted=frame["pred_dentropy_sum"], measured=change / scored.where(scored > 0)
    )
    return keep_labels(flow, runs)


@figure(
    Need("classes", "pred_dentropy_sum"),
    title="Which class pushes entropy up, which down?",
    caption="Look for the colours that outweigh the others: above zero their updates flatten "
    "the policy, below zero they sharpen it (black: net; lower row: what was measured).",
    group="entropy",
    prepare=prepare_entropy_flow,
)
def plot_entropy_flow(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Predicted push per class, stacked, with the net; below, each class's measured part.

    Returns axes of shape (1 or 2, labels); the second row is there if anything was re-scored.
    """
    labels = labels_of(frame)
    rows = 2 if frame["measured"].notna().any() else 1
    figure = figure or new_figure(figure_height(len(labels), rows, 2.7))
    axes = label_panels(figure, labels, rows, share_y=False)
    for column, label in enumerate(labels):
        part = frame[frame["label"] == label]
        _predicted_flow(axes[0, column], part)
        if rows > 1:
            _measured_change(axes[1, column], part)
    share_y_if_close(axes[0])
    if rows > 1:
        share_y_if_close(axes[1])
        axes[1, 0].set_ylabel("measured dH, part of the mean\n(nats per re-scored token)")
    axes[0, 0].set_ylabel("predicted dH, sum over tokens\n(nats per unit learning rate)")
    fit_steps(axes, frame["step"])
    step_axis(axes[-1])
    class_legend(figure, (*CLASSES, NONE), [Line2D([], [], color=INK, label="net")])
    return axes


def _predicted_flow(ax: Axes, part: pd.DataFrame) -> None:
    table = class_table(part, "predicted").reindex(columns=CLASSES)
    if not table.fillna(0.0).any(axis=None):
        blind = table.isna().all(axis=None)
        why = "the source gives no\ncollision statistics" if blind else "no gradient at all"
        note(ax, f"not available here:\n{why}")
        return
    stack(ax, table.fillna(0.0))
    net = table.sum(axis=1, min_count=1)
    dot: dict[str, Any] = {"marker": "o", "markersize": 5} if len(net) == 1 else {}
    ax.plot(net.index, net, color="white", linewidth=3.0)
    ax.plot(net.index, net, color=INK, linewidth=1.4, **dot)
    ax.axhline(0, color=INK, linewidth=0.6)


def _measured_change(ax: Axes, part: pd.DataFrame) -> None:
    if part["measured"].isna().all():
        note(ax, "not available here:\nno token was re-scored\nafter its update")
        return
    table = class_table(part, "measured").dropna(how="all")
    for name in (*CLASSES, NONE):
        rows = part[(part["cls"] == CLASS_CODES[name]) & part["measured"].notna()]
        replicate_line(ax, rows, "measured", color=CLASS_COLORS[name], linewidth=1.3)
    net = table.sum(axis=1)
    ax.plot(net.index, net, color=INK, linewidth=1.4, marker="o", markersize=3)
    ax.axhline(0, color=INK, linewidth=0.6)
