"""Curves every training run has: reward, gradient norm, health of the samples."""

from collections.abc import Sequence
from functools import reduce
from operator import or_

import pandas as pd
from matplotlib.figure import Figure

from wapo_analysis.plots.frames import keep_labels, run_label, step_frame
from wapo_analysis.plots.panels import (
    AxesArray,
    fit_steps,
    label_legend,
    label_lines,
    log_y,
    mark_missing,
    step_axis,
)
from wapo_analysis.plots.registry import figure
from wapo_analysis.plots.style import new_figure
from wapo_analysis.schema import axis_label
from wapo_analysis.store import Need, Run

HEALTH = {
    "length": "completion length",
    "truncated": "share of completions cut at the limit",
    "repetition": "share of repeated 4-grams",
    "clip_low": "share stopped by the lower clip",
    "clip_high": "share stopped by the upper clip",
    "zero_signal": "share of groups without a signal",
}

_ANY_HEALTH = reduce(or_, (Need("steps", name) for name in HEALTH if name != "zero_signal"))

HELD_OUT = "eval/pass@1"


def prepare_reward(runs: Sequence[Run]) -> pd.DataFrame:
    """Reward and pass rate per run and step, and the pass rate on held-out prompts.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, reward, pass_rate, eval/pass@1``; an evaluation before training
        stands at step 0.
    """
    frame = step_frame(runs, ("reward", "pass_rate", HELD_OUT))
    before = [
        {"label": run_label(run), "seed": run.seed, "run": place, "step": 0, HELD_OUT: value}
        for place, run in enumerate(runs)
        if (value := run.manifest.get("eval_before", {}).get(HELD_OUT)) is not None
    ]
    if before:
        frame = pd.concat([frame, pd.DataFrame(before)], ignore_index=True)
    return keep_labels(frame.sort_values(["run", "step"], ignore_index=True), runs)


@figure(
    Need("steps", "reward") | Need("steps", "pass_rate"),
    title="Does the policy learn?",
    caption="Look for a curve that rises and stays up; a fall after a rise is a collapse.",
    group="training",
    prepare=prepare_reward,
)
def plot_reward(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Mean reward over the steps; beside it the pass rate where it is another number.

    Runs that were evaluated on held-out prompts have one more panel.

    Returns axes of shape (1,) to (3,).
    """
    trained, evaluated = frame[frame["step"] > 0], frame.dropna(subset=HELD_OUT)
    gap = (frame["reward"] - frame["pass_rate"]).abs()
    same = not (gap > 1e-9).any()
    columns = ["reward"] if same and frame["reward"].notna().any() else ["reward", "pass_rate"]
    figure = figure or new_figure(4.0)
    panels = len(columns) + (not evaluated.empty)
    axes: AxesArray = figure.subplots(1, panels, sharex=True, squeeze=False)[0]
    if not evaluated.empty:
        label_lines(axes[-1], evaluated, HELD_OUT)
        axes[-1].set_ylabel("pass@1 on held-out prompts")
        axes[-1].set_ylim(-0.02, 1.02)
    for ax, column in zip(axes[: len(columns)], columns, strict=True):
        label_lines(ax, trained, column)
        mark_missing(ax, trained, column)
        ax.set_ylabel(axis_label("steps", column, f"mean {column.replace('_', ' ')} of the batch"))
        if frame[column].between(0, 1).any() and not (frame[column].abs() > 1).any():
            ax.set_ylim(-0.02, 1.02)
    fit_steps(axes, frame["step"])
    step_axis(axes)
    label_legend(figure, axes[0])
    return axes


def prepare_gradient_norm(runs: Sequence[Run]) -> pd.DataFrame:
    """Gradient norm per run and step: ``label, seed, run, step, grad_norm``."""
    return keep_labels(step_frame(runs, ("grad_norm",)), runs)


@figure(
    Need("steps", "grad_norm"),
    title="Does the gradient fade or flare up?",
    caption="Look for spikes and crosses (not finite) before a collapse, and for a norm that "
    "fades because nothing is left to learn.",
    group="training",
    prepare=prepare_gradient_norm,
)
def plot_gradient_norm(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Gradient norm before clipping over the steps, logarithmic.

    Returns axes of shape (1,).
    """
    figure = figure or new_figure(4.0)
    axes: AxesArray = figure.subplots(1, 1, squeeze=False)[0]
    # A norm of exactly 0 (no signal in the batch) has no place on a logarithmic axis.
    label_lines(axes[0], frame, "grad_norm", positive=True)
    mark_missing(axes[0], frame, "grad_norm")
    log_y(axes[0], frame["grad_norm"])
    axes[0].set_ylabel(axis_label("steps", "grad_norm", "gradient norm before clipping"))
    fit_steps(axes, frame["step"])
    step_axis(axes)
    label_legend(figure, axes[0])
    return axes


def prepare_lengths(runs: Sequence[Run]) -> pd.DataFrame:
    """Health of the samples per run and step.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, length`` (tokens) ``, truncated, repetition, clip_low, clip_high,
        zero_signal`` (shares); zero_signal is the share of groups that are all wrong or all right.
    """
    flat = ("groups_all_wrong", "groups_all_right")
    frame = step_frame(runs, ("length", "truncated", "repetition", "clip_low", "clip_high", *flat))
    frame["zero_signal"] = frame[flat[0]] + frame[flat[1]]
    return keep_labels(frame.drop(columns=list(flat)), runs)


@figure(
    _ANY_HEALTH,
    title="Are the samples healthy?",
    caption="Look for length, truncation or repetition running away, for clipping on one "
    "side, and for groups that give no signal.",
    group="training",
    prepare=prepare_lengths,
)
def plot_lengths(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Length, truncation, repetition, clipping and signal-free groups over the steps.

    Returns axes of shape (2, 3).
    """
    figure = figure or new_figure(5.6)
    axes: AxesArray = figure.subplots(2, 3, sharex=True)
    for ax, (column, text) in zip(axes.flat, HEALTH.items(), strict=True):
        label_lines(ax, frame, column)
        ax.set_title(text, fontsize=9.5, fontweight="normal")
        ax.set_ylabel("tokens" if column == "length" else "share")
        ax.set_ylim(bottom=0)
    fit_steps(axes, frame["step"])
    step_axis(axes[1])
    label_legend(figure, axes[0, 0])
    return axes
