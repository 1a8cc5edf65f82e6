"""The four classes over the steps: how many tokens, how much gradient, where the rule is wrong."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import wapo_taxonomy as tax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wapo_analysis.plots.frames import (
    RUN_KEYS,
    class_frame,
    class_table,
    keep_labels,
    token_frame,
    with_empty_classes,
)
from wapo_analysis.plots.panels import (
    ZERO,
    AxesArray,
    class_legend,
    class_text,
    label_figure,
    label_legend,
    label_lines,
    label_parts,
    log_y,
    note,
    replicate_line,
    stack,
    step_axis,
)
from wapo_analysis.plots.registry import after, ends, figure, joined, largest_key
from wapo_analysis.plots.style import CLASS_COLORS, MUTED, new_figure
from wapo_analysis.store import Need, Run

_RULE_STEPS = 40


def prepare_class_share(runs: Sequence[Run]) -> pd.DataFrame:
    """Share of the tokens in each class per run and step.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, cls, share``: shares of one run and step add up to one; cls is
        the class code of wapo_taxonomy, 4 for zero advantage and -1 for a missing statistic.
    """
    frame = class_frame(runs, ("tokens",))
    shares = _with_share(with_empty_classes(frame, "tokens"), "tokens").drop(columns="tokens")
    return keep_labels(shares, runs)


def _says_class_share(frame: pd.DataFrame) -> str:
    """The class whose share of the tokens changed most."""
    told = []
    for label, rows in frame.groupby("label", sort=False):
        pairs = {
            code: ends(rows[rows["cls"] == code], "share").get(str(label))
            for code in tax.CLASS_NAMES
        }
        known = {code: pair for code, pair in pairs.items() if pair is not None}
        if known:
            code = max(known, key=lambda key: abs(known[key][1] - known[key][0]))
            first, last = known[code]
            told.append(f"{label}: {class_text(code)} {first:.0%} to {last:.0%} of the tokens")
    return joined(told)


@figure(
    Need("classes", "tokens"),
    title="Which classes are the tokens in?",
    caption="Look for a class that grows at the cost of the others; grey tokens had no "
    "advantage and taught nothing.",
    group="classes",
    over_steps=True,
)
def plot_class_share(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Stacked shares of the classes over the steps, one panel per label.

    Returns axes of shape (1, labels).
    """
    labels, figure, axes = label_figure(frame, figure, 3.0)
    for ax, _, part in label_parts(axes[0], frame, labels):
        stack(ax, class_table(part, "share"))
        if part["share"].isna().all():
            note(ax, "not available here:\nno class totals")
        ax.set_ylim(0, 1)
    axes[0, 0].set_ylabel("share of the tokens")
    step_axis(axes, frame["step"])
    class_legend(figure, _present(frame))
    return axes


def prepare_gradient_mass(runs: Sequence[Run]) -> pd.DataFrame:
    """Exact gradient mass of each class per run and step, and its share.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, cls, grad_mass, share, tokens, all_tokens``; grad_mass is the sum
        of the L2 norms of dL/dz over the class's tokens, NaN where the source gives no collision
        statistic; all_tokens counts those of the step, whatever their class.
    """
    frame = with_empty_classes(class_frame(runs, ("grad_mass", "tokens")), "grad_mass")
    every = frame.groupby(["run", "step"])["tokens"].transform("sum")
    frame = frame.assign(tokens=frame["tokens"].fillna(0), all_tokens=every)
    return keep_labels(_with_share(frame[frame["cls"].isin(range(4))], "grad_mass"), runs)


def _says_gradient_mass(frame: pd.DataFrame) -> str:
    """The class with most of the gradient, beside its part of the tokens, over the whole run."""
    told = []
    for label, rows in frame.dropna(subset="share").groupby("label", sort=False):
        sums = rows.groupby("cls")[["grad_mass", "tokens", "all_tokens"]].sum()
        code = largest_key(sums["grad_mass"])
        told.append(
            f"{label}: {tax.CLASS_NAMES[code]} is "
            f"{sums['tokens'][code] / sums['all_tokens'][code]:.1%} of the tokens and "
            f"{sums['grad_mass'][code] / sums['grad_mass'].sum():.0%} of the gradient"
        )
    return joined(told)


@figure(
    Need("classes", "grad_mass"),
    title="Which class holds the gradient?",
    caption="Look for a class whose share of the gradient (above) exceeds its share of the "
    "tokens, and whether the mass (below) fades as training goes on.",
    group="classes",
    over_steps=True,
)
def plot_gradient_mass(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Share of the gradient mass per class, stacked; below, the mass itself, logarithmic.

    A class without any mass has no line.

    Returns axes of shape (2, labels).
    """
    labels, figure, axes = label_figure(frame, figure, 2.5, 2)
    for column, _, part in label_parts(axes.T, frame, labels):
        if not (part["grad_mass"] > 0).any():
            blind = part["grad_mass"].isna().all()
            why = "the source gives no\ncollision statistics" if blind else "no gradient at all"
            for ax in column:
                note(ax, f"not available here:\n{why}")
            continue
        stack(column[0], class_table(part, "share"))
        for code, name in enumerate(tax.CLASSES):
            rows = part[part["cls"] == code]
            if (rows["grad_mass"] > 0).any():
                color = CLASS_COLORS[name]
                replicate_line(column[1], rows, "grad_mass", positive=True, color=color)
    axes[0, 0].set_ylim(0, 1)
    log_y(axes[1, 0], frame["grad_mass"])
    axes[0, 0].set_ylabel("share of gradient mass")
    axes[1, 0].set_ylabel("gradient mass,\nsum of |dL/dz|")
    step_axis(axes, frame["step"])
    zeros = [Line2D([], [], color=MUTED, marker="v", markersize=4, ls="", label=ZERO)]
    class_legend(figure, tax.CLASSES, zeros * bool((frame["grad_mass"] == 0).any()))
    return axes


def prepare_rule_breaks(runs: Sequence[Run]) -> pd.DataFrame:
    """How often, and for how much of the entropy change, the rule's sign is wrong.

    Only tokens with a non-zero predicted dH count. Steps are at most forty evenly spaced ones.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, tokens, weight``: share of the tokens, and share of the summed
        absolute first-order dH, whose sign is not the one of the token's class.
    """
    rows = token_frame(runs, ("cls", "pred_dentropy"), max_steps=_RULE_STEPS)
    moved = rows[np.isfinite(rows["pred_dentropy"].astype(float)) & (rows["pred_dentropy"] != 0)]
    moved = moved[moved["cls"].isin(range(4))]
    effect = moved["pred_dentropy"].to_numpy(dtype=np.float64)
    expected = np.asarray(tax.rule_dentropy_sign(moved["cls"].to_numpy(dtype=np.int64)))
    wrong = np.sign(effect) != expected
    size = np.abs(effect)
    table = moved[[*RUN_KEYS, "step"]].assign(one=1.0, wrong=wrong, size=size, bad=size * wrong)
    keys = ["label", "run", "step"]
    sums = table.groupby(keys, sort=False)[["one", "wrong", "size", "bad"]].sum().reset_index()
    seeds = {place: run.seed for place, run in enumerate(runs)}
    shares = pd.DataFrame(
        {
            "label": sums["label"],
            "seed": sums["run"].map(seeds),
            "run": sums["run"],
            "step": sums["step"],
            "tokens": sums["wrong"] / sums["one"],
            "weight": sums["bad"] / sums["size"],
        }
    )
    return keep_labels(shares, runs)


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
    for ax, column, title in (
        (axes[0], "tokens", "share of the tokens"),
        (axes[1], "weight", "share of the predicted |dH|"),
    ):
        label_lines(ax, frame, column)
        ax.set_title(title)
    axes[0].set_ylabel("exact dH against the rule")
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    step_axis(axes, frame["step"])
    label_legend(figure, axes[0])
    return axes


def _with_share(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Add ``share``, the part of the sum over the classes of the run and step."""
    total = frame.groupby(["run", "step"])[column].transform("sum")
    return frame.assign(share=frame[column] / total.where(total > 0))


def _present(frame: pd.DataFrame) -> list[str]:
    """Names of the classes with a non-zero share somewhere, in legend order."""
    seen = {tax.CLASS_NAMES[int(code)] for code in frame.loc[frame["share"] > 0, "cls"]}
    return [name for name in CLASS_COLORS if name in seen]
