"""Where probability goes when a token is updated: to the top, to the rest, to the tail."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from wapo_taxonomy import CLASSES

from wapo_analysis.plots.frames import keep_labels, keyed, labels_of
from wapo_analysis.plots.panels import AxesArray, note
from wapo_analysis.plots.registry import figure
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.plots.titles import joined
from wapo_analysis.store import Need, Run

GOERS = ("sampled", "top other", "rest of top K", "tail")
"""Where probability can go; together they hold all of it, so their changes add up to 0."""
_ROW = ["step", "minibatch", "rank", "rollout", "position"]
_COLUMNS = ["label", "seed", "run", "cls", "goer", "predicted", "measured", "tokens"]


def prepare_mass_flow(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean change of probability per class, predicted and measured, in four parts of all tokens.

    For the sampled token y and any other v the first-order change is (taxonomy/README.md)

        dp_y = k p_y (1 - 2 p_y + S),   dp_v = k p_v (S - p_y - p_v),   k = eta c / T^2

    with the coefficient c of the token and S = sum of p^2. The step eta of the logits is not known;
    one number for all classes and parts is fitted to the measured changes (least squares).

    Returns
    -------
    DataFrame
        ``label, seed, run, cls, goer, predicted, measured, tokens``: means over the ``tokens``
        positions of a class that were scored again, in probability.
    """
    parts = []
    for place, run in enumerate(runs):
        rows = _positions(run)
        if len(rows):
            parts.append(_by_class(rows).assign(run=place))
    return keep_labels(keyed(parts, runs, _COLUMNS[3:])[_COLUMNS], runs)


def _positions(run: Run) -> pd.DataFrame:
    """One row a position with its four changes: ``predicted GOER`` and ``measured GOER``."""
    top = run.topk()
    top = top[top["logp_after"].notna()]
    if top.empty:
        return pd.DataFrame()
    own = run.tokens(sorted(set(top["step"])))
    own = own[own["cls"].isin(CLASSES) & own["coef"].notna() & own["logp_after"].notna()]
    both = top.merge(own[[*_ROW, "token_id", "prob", "collision", "coef", "cls", "dprob"]],
                     on=_ROW, suffixes=("", "_own"))  # fmt: skip
    if both.empty:
        return pd.DataFrame()
    k = both["coef"] / run.temperature**2
    others = both[both["token_id"] != both["token_id_own"]].assign(
        predicted=k * both["prob"] * (both["collision"] - both["prob_own"] - both["prob"]),
        measured=both["prob_after"] - both["prob"],
    )
    others = others.sort_values([*_ROW, "place"])
    first = ~others.duplicated(_ROW)
    rows = both.drop_duplicates(_ROW).set_index(_ROW)[
        ["cls", "prob_own", "collision", "coef", "dprob"]
    ]
    p, scale = rows["prob_own"], rows["coef"] / run.temperature**2
    found = {
        "predicted sampled": scale * p * (1 - 2 * p + rows["collision"]),
        "measured sampled": rows["dprob"],
    }
    for goer, part in (("top other", others[first]), ("rest of top K", others[~first])):
        sums = part.groupby(_ROW)[["predicted", "measured"]].sum().reindex(rows.index, fill_value=0)
        for kind in ("predicted", "measured"):
            found[f"{kind} {goer}"] = sums[kind]
    for kind in ("predicted", "measured"):
        known = [found[f"{kind} {goer}"] for goer in GOERS[:3]]
        found[f"{kind} tail"] = -(known[0] + known[1] + known[2])
    return pd.DataFrame({"cls": rows["cls"].astype(str), **found}).reset_index(drop=True)


def _by_class(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the positions of each class; predictions times the one step that fits them all."""
    means = rows.groupby("cls").mean()
    tokens = rows.groupby("cls").size()
    kinds = ("predicted", "measured")
    table = pd.concat(
        [
            pd.DataFrame({kind: means[f"{kind} {goer}"] for kind in kinds}).assign(
                goer=goer, tokens=tokens
            )
            for goer in GOERS
        ]
    ).reset_index()
    predicted, measured, weight = (
        table[name].to_numpy(np.float64) for name in ("predicted", "measured", "tokens")
    )
    size = float(np.sum(weight * predicted**2))
    step = float(np.sum(weight * predicted * measured)) / size if size > 0 else float("nan")
    return table.assign(predicted=predicted * step)


def _says_mass_flow(frame: pd.DataFrame) -> str:
    """Of the class that moves most probability: a token's mean, and what moves against it."""
    told = []
    for label, rows in frame.groupby("label", sort=False):
        moves = {
            str(cls): {goer: _mean(part[part["goer"] == goer]) for goer in GOERS}
            for cls, part in rows.groupby("cls", sort=False)
        }
        counts = rows.groupby("cls", sort=False)["tokens"].first()
        known = {cls: move for cls, move in moves.items() if np.isfinite(move["sampled"])}
        if not known:
            continue
        cls = max(known, key=lambda name: abs(known[name]["sampled"]) * counts[name])
        own = known[cls]["sampled"]
        to = max(GOERS[1:], key=lambda goer: -known[cls][goer] * np.sign(own))
        verbs = ("loses", "gains") if own < 0 else ("gains", "loses")
        told.append(
            f"{label}: a {cls} token {verbs[0]} {abs(own):.2g} of probability, the {to} "
            f"{verbs[1]} {abs(known[cls][to]):.2g} (mean of {counts[cls]:,})"
        )
    return joined(told)


def _mean(rows: pd.DataFrame) -> float:
    return float(rows["measured"].mean()) if len(rows) else float("nan")


@figure(
    Need("topk", "logp_after"),
    title="Where does the probability go?",
    caption="Look at each class: what the sampled token loses or gains (top bar), and which other "
    "tokens pay or get it. Pale bars are the taxonomy's first-order prediction, one step size "
    "fitted for all classes; they differ from the full ones where other tokens' updates moved "
    "this one, or where one step size does not fit all.",
    group="shift",
    prepare=prepare_mass_flow,
    says=_says_mass_flow,
)
def plot_mass_flow(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Predicted and measured change of probability per class and part of the vocabulary.

    Returns axes of shape (labels, classes).
    """
    labels = labels_of(frame)
    figure = figure or new_figure(1.0 + 2.3 * max(len(labels), 1))
    axes: AxesArray = figure.subplots(max(len(labels), 1), len(CLASSES), squeeze=False, sharey=True)
    for label, row in zip(labels, axes, strict=False):
        part = frame[frame["label"] == label]
        for cls, ax in zip(CLASSES, row, strict=True):
            _bars(ax, part[part["cls"] == cls], cls)
        row[0].set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("mean change of p")
    handles = [
        Patch(facecolor="white", edgecolor=MUTED, label="predicted (first order, one step size)"),
        Patch(color=MUTED, label="measured"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return axes


def _bars(ax: Axes, rows: pd.DataFrame, cls: str) -> None:
    ax.set_title(cls, color=CLASS_INK[cls])
    places = np.arange(len(GOERS))[::-1]
    ax.set_yticks(places, labels=list(GOERS))
    ax.set_ylim(-0.6, len(GOERS) - 0.4)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.grid(visible=False, axis="y")
    means = rows.groupby("goer")[["predicted", "measured"]].mean().reindex(list(GOERS))
    if rows.empty or means["measured"].isna().all():
        note(ax, "no token")
        return
    color = CLASS_COLORS[cls]
    ax.barh(places + 0.19, means["predicted"], 0.34, facecolor="white", edgecolor=color, lw=1.3)
    ax.barh(places - 0.19, means["measured"], 0.34, color=color)
    biggest = float(np.nanmax(np.abs(means.to_numpy())))
    ax.set_xlim(-1.15 * biggest, 1.15 * biggest) if biggest else None
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    ax.annotate(
        f"{int(rows['tokens'].sum()):,} tokens", (0.98, 0.02), xycoords="axes fraction",
        ha="right", fontsize=8, color=MUTED,
    )  # fmt: skip
