"""Probability under the policy being updated against that under the policy that sampled."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from wapo_analysis.plots.frames import keep_labels, labels_of, token_frame
from wapo_analysis.plots.panels import AxesArray, corner, note
from wapo_analysis.plots.style import INK, MUTED, SIGN_NAMES, new_figure, sign_map
from wapo_analysis.store import Run

_NOT_BY_TOKEN = ("gspo", "raft")
_CELLS = 45


def clip_range(objective: Mapping[str, Any]) -> tuple[float, float]:
    """Range of the importance ratio of a token outside which the objective can clip.

    Parameters
    ----------
    objective : mapping
        ``objective`` entry of a manifest: ``name``, and ``bounds`` (low, high) as the built-in
        trainer writes them, or ``clip_eps`` as other sources give it.

    Returns
    -------
    tuple of float
        (low, high); NaN where there is no such bound (gspo clips the ratio of whole sequences, wapo
        has no lower bound) or the manifest does not give it.
    """
    if objective.get("name") in _NOT_BY_TOKEN or objective.get("use_importance_sampling") is False:
        return float("nan"), float("nan")
    eps, bounds = objective.get("clip_eps"), objective.get("bounds")
    if isinstance(bounds, list | tuple) and len(bounds) == 2:
        low, high = (_number(bound) for bound in bounds)
    else:
        low, high = 1 - _number(eps), 1 + _number(eps)
    return low if low > 0 else float("nan"), high if np.isfinite(high) else float("nan")


def prepare_train_vs_behaviour(runs: Sequence[Run]) -> pd.DataFrame:
    """Both probabilities of every token read, with the sign and the clip range.

    Returns
    -------
    DataFrame
        ``label, seed, run, step, sign, train, behaviour`` (probabilities) ``, low, high`` (clip
        range of the ratio, NaN where there is none).
    """
    rows = token_frame(runs, ("sign", "prob", "logp_old"))
    bounds = [clip_range(run.manifest.get("objective", {})) for run in runs]
    behaviour = np.exp(rows["logp_old"].astype("float64"))
    rows = rows.assign(
        train=rows["prob"].astype("float64"),
        behaviour=behaviour,
        low=rows["run"].map({place: low for place, (low, _) in enumerate(bounds)}),
        high=rows["run"].map({place: high for place, (_, high) in enumerate(bounds)}),
    ).drop(columns=["prob", "logp_old"])
    return keep_labels(rows.dropna(subset=["train", "behaviour"]), runs)


def plot_train_vs_behaviour(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Token counts over the two probabilities, one panel per label and sign.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`prepare_train_vs_behaviour`.
    figure : Figure, optional
        Empty figure to draw into.

    Returns
    -------
    ndarray of Axes, shape (labels, 2); A > 0 and A < 0
    """
    labels = labels_of(frame)
    columns = min(4, 2 * max(len(labels), 1))
    rows = -(-2 * max(len(labels), 1) // columns)
    figure = figure or new_figure(1.0 + rows * (2.55 if columns == 4 else 5.0))
    grid: AxesArray = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = grid.reshape(-1, 2)
    for label, pair in zip(labels, axes, strict=False):
        part = frame[frame["label"] == label]
        for ax, sign in zip(pair, (1, -1), strict=True):
            _panel(ax, part[part["sign"] == sign], sign)
            ax.set_title(f"{label}, {SIGN_NAMES[sign]}", fontsize=10)
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


def _panel(ax: Axes, part: pd.DataFrame, sign: int) -> None:
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
    return "\n".join(["ratio:", *sides]) if sides else "no clip on single tokens"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
