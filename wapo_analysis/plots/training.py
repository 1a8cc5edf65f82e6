"""Curves every training run has: reward, gradient norm, health of the samples."""

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from wapo_analysis.plots import after, changes, each_label, ends, figure, joined
from wapo_analysis.plots.frames import keep_labels, run_labels, step_frame
from wapo_analysis.plots.panels import (
    AxesArray,
    filled_parts,
    label_legend,
    label_lines,
    label_row,
    log_y,
    mark_missing,
    step_axis,
)
from wapo_analysis.plots.style import INK, label_styles, new_figure
from wapo_analysis.schema import axis_label
from wapo_analysis.store import Need, Run

HEALTH = {
    "length": "completion length",
    "truncated": "completions cut at the limit",
    "repetition": "repeated 4-grams",
    "clip_low": "tokens stopped by the lower clip",
    "clip_high": "tokens stopped by the upper clip",
    "zero_signal": "groups without a signal",
}

_ANY_HEALTH = reduce(or_, (Need("steps", name) for name in HEALTH if name != "zero_signal"))

HELD_OUT = "eval/pass@1"


def prepare_reward(runs: Sequence[Run]) -> pd.DataFrame:
    """Reward and pass rate per run and step, and the pass rate on held-out prompts.

    Returns ``label, seed, run, step, reward, pass_rate, eval/pass@1``; an evaluation before
    training stands at step 0.
    """
    frame = step_frame(runs, ("reward", "pass_rate", HELD_OUT))
    before = [
        {"label": label, "seed": run.seed, "run": place, "step": 0, HELD_OUT: value}
        for place, (label, run) in enumerate(zip(run_labels(runs), runs, strict=True))
        if (value := run.manifest.get("eval_before", {}).get(HELD_OUT)) is not None
    ]
    if before:
        frame = pd.concat([frame, pd.DataFrame(before)], ignore_index=True)
    return keep_labels(frame.sort_values(["run", "step"], ignore_index=True), runs)


def _says_reward(frame: pd.DataFrame) -> str:
    column = "reward" if frame["reward"].notna().any() else "pass_rate"
    return after(f"Mean {column.replace('_', ' ')}", changes(frame, column))


@figure(
    Need("steps", "reward") | Need("steps", "pass_rate"),
    title="Does the policy learn?",
    caption="Look for a curve that rises and stays up; a fall after a rise is a collapse.",
    group="training",
    over_steps=True,
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
    step_axis(axes, frame["step"])
    label_legend(figure, axes[0])
    return axes


def prepare_gradient_norm(runs: Sequence[Run]) -> pd.DataFrame:
    """Gradient norm per run and step: ``label, seed, run, step, grad_norm``."""
    return keep_labels(step_frame(runs, ("grad_norm",)), runs)


def _says_gradient_norm(frame: pd.DataFrame) -> str:
    return after("Gradient norm", changes(frame, "grad_norm", ".2g"))


@figure(
    Need("steps", "grad_norm"),
    title="Does the gradient fade or flare up?",
    caption="Look for spikes and crosses (not finite) before a collapse, and for a norm that "
    "fades because nothing is left to learn.",
    group="training",
    over_steps=True,
)
def plot_gradient_norm(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Gradient norm before clipping over the steps, logarithmic. Returns axes of shape (1,)."""
    figure = figure or new_figure(4.0)
    axes: AxesArray = figure.subplots(1, 1, squeeze=False)[0]
    label_lines(axes[0], frame, "grad_norm", positive=True)
    mark_missing(axes[0], frame, "grad_norm")
    log_y(axes[0], frame["grad_norm"])
    axes[0].set_ylabel(axis_label("steps", "grad_norm", "gradient norm before clipping"))
    step_axis(axes, frame["step"])
    label_legend(figure, axes[0])
    return axes


def prepare_lengths(runs: Sequence[Run]) -> pd.DataFrame:
    """Health of the samples per run and step.

    Returns ``label, seed, run, step, length`` (tokens) ``, truncated, repetition, clip_low,
    clip_high, zero_signal`` (shares); zero_signal is the share of groups that are all wrong or all
    right.
    """
    flat = ("groups_all_wrong", "groups_all_right")
    frame = step_frame(runs, ("length", "truncated", "repetition", "clip_low", "clip_high", *flat))
    frame["zero_signal"] = frame[flat[0]] + frame[flat[1]]
    return keep_labels(frame.drop(columns=list(flat)), runs)


@each_label()
def _says_lengths(label: str, rows: pd.DataFrame) -> str:
    """What moved most of the shares, and the length."""
    moved = {name: ends(rows, name).get(label) for name in HEALTH if name != "length"}
    known = {name: pair for name, pair in moved.items() if pair is not None}
    length = ends(rows, "length").get(label)
    parts = [] if length is None else [f"length {length[0]:.0f} to {length[1]:.0f} tokens"]
    if known:
        name = max(known, key=lambda key: abs(known[key][1] - known[key][0]))
        parts.append(f"{HEALTH[name]} {known[name][0]:.0%} to {known[name][1]:.0%}")
    return f"{label} {', '.join(parts)}" if parts else ""


@figure(
    _ANY_HEALTH,
    title="Are the samples healthy?",
    caption="Look for length, truncation or repetition running away, for clipping on one "
    "side, and for groups that give no signal.",
    group="training",
    over_steps=True,
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
    step_axis(axes, frame["step"])
    label_legend(figure, axes[0, 0])
    return axes


KL = {
    "kl_old": "to the policy that sampled (k3)",
    "kl_ref": "to the reference model",
    "engine_kl": "of the sampling engine to the trainer",
}


def prepare_kl_per_token(runs: Sequence[Run]) -> pd.DataFrame:
    """KL per token in nats: ``label, seed, run, step, kl_old, kl_ref, engine_kl``."""
    return keep_labels(step_frame(runs, KL), runs)


def _says_kl_per_token(frame: pd.DataFrame) -> str:
    column = next((name for name in KL if frame[name].notna().any()), "kl_old")
    return after(f"KL {KL[column]}, nats per token", changes(frame, column, ".2g"))


@figure(
    reduce(or_, (Need("steps", name) for name in KL)),
    title="How far does the policy move per token?",
    caption="Look for a line that climbs by decades: updates leave the region in which the samples "
    "say anything. KL to the sampling policy is the mean of r - ln r - 1 with r = p / p_old (k3, "
    "Schulman 2020, joschu.net/blog/kl-approx.html); the others are as the trainer logs them.",
    group="training",
    over_steps=True,
)
def plot_kl_per_token(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """KL per token over the steps, logarithmic, one panel per kind of KL that is there.

    Returns axes of shape (kinds,).
    """
    kinds = [name for name in KL if frame[name].notna().any()] or ["kl_old"]
    figure = figure or new_figure(4.0)
    axes: AxesArray = figure.subplots(1, len(kinds), sharex=True, squeeze=False)[0]
    for ax, kind in zip(axes, kinds, strict=True):
        label_lines(ax, frame, kind, positive=True)
        log_y(ax, frame[kind])
        ax.set_title(f"KL {KL[kind]}", fontsize=10)
    axes[0].set_ylabel("KL per token (nats)")
    step_axis(axes, frame["step"])
    label_legend(figure, axes[0])
    return axes


def prepare_reward_and_entropy(runs: Sequence[Run]) -> pd.DataFrame:
    """Reward and entropy of every step, and the law R = b - a exp(H) fitted to each run's label.

    Returns ``label, seed, run, step, reward, entropy`` (nats) and per label ``a, b`` of the least
    squares fit and ``r2``, the share of the variance of the reward that it explains; NaN where the
    entropy does not vary.
    """
    frame = step_frame(runs, ("reward", "entropy")).dropna(subset=["reward", "entropy"])
    parts = [rows.assign(**fit_law(rows)) for _, rows in frame.groupby("label", sort=False)]
    columns = [*frame.columns, "a", "b", "r2"]
    return keep_labels(pd.concat(parts) if parts else frame.reindex(columns=columns), runs)


def fit_law(rows: pd.DataFrame) -> dict[str, float]:
    """Least squares fit of R = b - a exp(H) (arXiv 2505.22617) and its R squared."""
    x, y = np.exp(rows["entropy"].to_numpy()), rows["reward"].to_numpy()
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"a": float("nan"), "b": float("nan"), "r2": float("nan")}
    slope, b = np.polyfit(x, y, 1)
    r2 = 1 - np.sum((y - slope * x - b) ** 2) / np.sum((y - y.mean()) ** 2)
    return {"a": float(-slope), "b": float(b), "r2": float(r2)}


def _says_reward_and_entropy(frame: pd.DataFrame) -> str:
    fits = frame.groupby("label", sort=False)[["a", "b", "r2"]].first().dropna()
    return joined(
        f"{label}: R = {row.b:.2f} {'-' if row.a >= 0 else '+'} {abs(row.a):.2f} exp(H) explains "
        f"{row.r2:.0%} of the variance"
        for label, row in fits.iterrows()
    )


@figure(
    Need("steps", "reward"),
    Need("steps", "entropy"),
    title="Is reward paid for with entropy?",
    caption="Look whether the points follow the line: then reward is bought with entropy, and what "
    "the line reaches at H = 0 is all that is left to gain; points that leave it have another "
    "cause. Line: R = b - a exp(H), least squares (arXiv 2505.22617, which fits validation scores; "
    "here it is the reward of the batch). Points grow darker from the first step to the last.",
    group="training",
)
def plot_reward_and_entropy(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Reward against entropy, one point per step, with the fitted law; axes of shape (labels,)."""
    labels, figure, axes = label_row(frame, figure, 3.4)
    styles = label_styles(labels)
    lacks = "not available here:\nreward or entropy"
    for ax, label, rows in filled_parts(axes, frame, labels, ["reward", "entropy"], lacks):
        age: Any = rows["step"].rank(pct=True).to_numpy()
        color = styles[label].color
        ax.scatter(rows["entropy"], rows["reward"], s=14, color=color, alpha=0.15 + 0.75 * age)
        first = rows.iloc[0]
        if np.isfinite(first["a"]):
            x = np.linspace(rows["entropy"].min(), rows["entropy"].max(), 60)
            ax.plot(x, first["b"] - first["a"] * np.exp(x), color=INK, linewidth=1.4)
    for ax in axes:
        ax.set_xlabel("mean entropy (nats)")
    axes[0].set_ylabel("mean reward of the batch")
    return axes
