"""Prediction against what happened: where probability goes, and what moved the entropy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from wapo_taxonomy import CLASSES

from wapo_analysis.plots import each_label, figure, largest_key
from wapo_analysis.plots.frames import keep_labels, keyed, labels_of
from wapo_analysis.plots.panels import (
    AxesArray,
    filled_parts,
    label_parts,
    label_row,
    name_panel,
    note,
    pair_legend,
)
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.probes import agreement, closure, part_name, three_numbers
from wapo_analysis.schema import INTERACTION, MOMENTUM, UPDATE, WEIGHT_DECAY
from wapo_analysis.store import Need, Run

_KINDS = ("counterfactual", "measured")
_KEYS = ["label", "seed", "run", "step", "cls", "predicted", *_KINDS, "verdict"]
_RIGHT = [f"{kind}_sign_agreement" for kind in _KINDS]
_DECADES = 3
_COLORS = {MOMENTUM: "#8A8A8A", WEIGHT_DECAY: "#B9B9B9", INTERACTION: "#5E5E5E", UPDATE: INK}
_PARTS = ["label", "seed", "run", "part", "dentropy", "probes", "first", "last"]


#: Where probability can go; together they hold all of it, so their changes add up to 0.
GOERS = ("sampled", "top other", "rest of top K", "tail")
_ROW = ["step", "minibatch", "rank", "rollout", "position"]
_FLOW = ["label", "seed", "run", "cls", "goer", "predicted", "measured", "tokens"]


def prepare_mass_flow(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean change of probability per class, predicted and measured, in four parts of all tokens.

    For the sampled token y and any other v the first-order change is (taxonomy/README.md)

        dp_y = k p_y (1 - 2 p_y + S),   dp_v = k p_v (S - p_y - p_v),   k = eta c / T^2

    with the coefficient c of the token and S = sum of p^2. The step eta of the logits is not known;
    one number for all classes and parts is fitted to the measured changes (least squares). Returns
    ``label, seed, run, cls, goer, predicted, measured, tokens``: means over the ``tokens``
    positions of a class that were scored again, in probability.
    """
    parts = []
    for place, run in enumerate(runs):
        rows = _positions(run)
        if len(rows):
            parts.append(_by_class(rows).assign(run=place))
    return keep_labels(keyed(parts, runs, _FLOW[3:])[_FLOW], runs)


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


@each_label()
def _says_mass_flow(label: str, rows: pd.DataFrame) -> str:
    """Of the class that moves most probability: a token's mean, and what moves against it."""
    means = rows.groupby(["cls", "goer"], sort=False)["measured"].mean().unstack()
    counts = rows[rows["goer"] == GOERS[0]].groupby("cls", sort=False)["tokens"].sum()
    means = means.reindex(columns=list(GOERS)).dropna(subset="sampled")
    known: dict[Any, Any] = means.to_dict("index")
    if not known:
        return ""
    cls = max(known, key=lambda name: abs(known[name]["sampled"]) * counts[name])
    own = known[cls]["sampled"]
    to = max(GOERS[1:], key=lambda goer: -known[cls][goer] * np.sign(own))
    verbs = ("loses", "gains") if own < 0 else ("gains", "loses")
    return (
        f"{label}: a {cls} token {verbs[0]} {abs(own):.2g} of probability, the {to} "
        f"{verbs[1]} {abs(known[cls][to]):.2g} (mean of {counts[cls]:,})"
    )


@figure(
    Need("topk", "logp_after"),
    title="Where does the probability go?",
    caption="Look at each class: what the sampled token loses or gains (top bar), and which other "
    "tokens pay or get it. Pale bars are the taxonomy's first-order prediction, one step size "
    "fitted for all classes; they differ from the full ones where other tokens' updates moved "
    "this one, or where one step size does not fit all.",
    group="shift",
)
def plot_mass_flow(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Predicted and measured change of probability per class and part of the vocabulary.

    Returns axes of shape (labels, classes).
    """
    labels = labels_of(frame)
    figure = figure or new_figure(1.0 + 2.3 * max(len(labels), 1))
    axes: AxesArray = figure.subplots(max(len(labels), 1), len(CLASSES), squeeze=False, sharey=True)
    for row, label, part in label_parts(axes, frame, labels):
        for cls, ax in zip(CLASSES, row, strict=True):
            _goer_bars(ax, part[part["cls"] == cls], cls)
        name_panel(row[0], label, 10, beside=True)
    for ax in axes[-1]:
        ax.set_xlabel("mean change of p")
    pair_legend(figure, "predicted (first order, one step size)", "measured")
    return axes


def _goer_bars(ax: Axes, rows: pd.DataFrame, cls: str) -> None:
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
    tokens = int(rows.loc[rows["goer"] == GOERS[0], "tokens"].sum())
    ax.annotate(
        f"{tokens:,} tokens", (0.98, 0.02), xycoords="axes fraction",
        ha="right", fontsize=8, color=MUTED,
    )  # fmt: skip


def prepare_calibration(runs: Sequence[Run]) -> pd.DataFrame:
    """Prediction, counterfactual and measurement of every probed update, per class.

    Returns one row per run, probed update and class with tokens: ``predicted``, ``counterfactual``
    (the class's share of the step applied alone) and ``measured`` (whole update), mean change of
    the entropy of the class's own tokens in nats; ``verdict``; and per label and class the shares
    ``counterfactual_sign_agreement, measured_sign_agreement`` of the updates in which the
    prediction had the right sign.
    """
    parts = []
    for place, run in enumerate(runs):
        if not run.probes.empty:
            table = three_numbers(run.probes).rename(columns={"tokens_of": "cls"})
            parts.append(table[table["cls"].isin(range(len(CLASSES)))].assign(run=place))
    frame = keyed(parts, runs, _KEYS[3:])[_KEYS]
    rows = [_with_agreement(part) for _, part in frame.groupby(["label", "cls"], sort=False)]
    full = pd.concat(rows, ignore_index=True) if rows else frame.reindex(columns=[*_KEYS, *_RIGHT])
    return keep_labels(full, runs)


def _with_agreement(part: pd.DataFrame) -> pd.DataFrame:
    predicted = part["predicted"].to_numpy(np.float64)
    right = [agreement(predicted, part[k].to_numpy(np.float64))["sign_agreement"] for k in _KINDS]
    return part.assign(**dict(zip(_RIGHT, right, strict=True)))


@each_label()
def _says_calibration(label: str, rows: pd.DataFrame) -> str:
    found = agreement(rows["predicted"].to_numpy(float), rows["measured"].to_numpy(float))
    if np.isfinite(found["sign_agreement"]):
        return (
            f"{label}: predicted dH has the sign of the measured one in "
            f"{found['sign_agreement']:.0%} of {found['pairs']:.0f} cases"
        )
    return ""


@figure(
    Need("probes", "counterfactual_dentropy"),
    title="Is the taxonomy's prediction right?",
    caption="Look at the bars: how often the predicted sign of dH was right, for the class's "
    "share of the step applied alone and for the whole update; at half the prediction is worth a "
    "coin. On the right every probed update: in the shaded quarters the sign is right.",
    group="shift",
)
def plot_calibration(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """How often the sign was right per class, and prediction against measurement.

    Returns axes of shape (labels, 2).
    """
    labels = labels_of(frame)
    figure = figure or new_figure(1.2 + 2.7 * max(len(labels), 1))
    axes: AxesArray = figure.subplots(max(len(labels), 1), 2, squeeze=False)
    for row, label, part in label_parts(axes, frame, labels):
        _right_bars(row[0], part)
        _scatter(row[1], part)
        name_panel(row[0], label)
    axes[-1, 0].set_xlabel("updates with the predicted sign of dH")
    axes[-1, 1].set_xlabel("predicted dH of the class (nats)")
    coin = Line2D([], [], color=INK, linewidth=1, linestyle=":", label="a coin")
    pair_legend(figure, "the class's share of the step alone", "the whole update", coin)
    return axes


def _right_bars(ax: Axes, part: pd.DataFrame) -> None:
    known = part.dropna(subset="cls").groupby("cls")[_RIGHT].first()
    counts = part.dropna(subset="cls").groupby("cls").size()
    for code, name in enumerate(CLASSES):
        place, color = len(CLASSES) - 1 - code, CLASS_COLORS[name]
        alone, whole = known.reindex([code]).to_numpy(np.float64)[0]
        if not np.isfinite(alone) and not np.isfinite(whole):
            ax.annotate(" no gradient", (0, place), va="center", fontsize=8.5, color=MUTED)
            continue
        ax.barh(place + 0.2, alone, 0.36, facecolor="white", edgecolor=color, linewidth=1.5)
        ax.barh(place - 0.2, whole, 0.36, color=color)
        ax.annotate(
            f" {whole:.0%} of {counts[code]}", (whole, place - 0.2), va="center", fontsize=8.5
        )
    ax.axvline(0.5, color=INK, linewidth=1, linestyle=":")
    ax.set(xlim=(0, 1.22), ylim=(-0.6, len(CLASSES) - 0.4))
    ax.set_xticks([0, 0.5, 1], labels=["0%", "50%", "100%"])
    ax.set_yticks(range(len(CLASSES)), labels=list(CLASSES)[::-1])
    for tick, name in zip(ax.get_yticklabels(), list(CLASSES)[::-1], strict=True):
        tick.set_color(CLASS_INK[name])
    ax.grid(visible=False)


def _scatter(ax: Axes, part: pd.DataFrame) -> None:
    ax.set_ylabel("measured (nats)")
    values = part[["predicted", "measured"]].to_numpy(dtype=np.float64)
    biggest = float(np.nanmax(np.abs(values), initial=0.0))
    if biggest == 0.0:
        note(ax, "no probed update\n(recorded with probe_every)" if part["cls"].isna().all()
             else "nothing moved")  # fmt: skip
        return
    _axes_around_zero(ax, biggest)
    for side in (1, -1):
        ax.fill_between([0, side * 2 * biggest], 0, side * 2 * biggest, color="#EDF5EC", zorder=0)
    for code, name in enumerate(CLASSES):
        rows = part[part["cls"] == code]
        ax.plot(rows["predicted"], rows["measured"], "o", color=CLASS_COLORS[name], markersize=4)


def _axes_around_zero(ax: Axes, biggest: float) -> None:
    """Logarithmic away from zero on both sides, alike on both axes."""
    top = float(np.ceil(np.log10(biggest)))
    ticks = [-(10.0 ** (top - 1)), 0.0, 10.0 ** (top - 1)]
    for axis in (ax.xaxis, ax.yaxis):
        name = axis.axis_name
        getattr(ax, f"set_{name}scale")("symlog", linthresh=10.0 ** (top - _DECADES), linscale=0.5)
        getattr(ax, f"set_{name}lim")(-2 * biggest, 2 * biggest)
        axis.set_ticks(ticks, labels=[f"{tick:.0e}" if tick else "0" for tick in ticks])
        axis.set_ticks([], minor=True)
    ax.axhline(0, color=MUTED, linewidth=0.6)
    ax.axvline(0, color=MUTED, linewidth=0.6)


def prepare_waterfall(runs: Sequence[Run]) -> pd.DataFrame:
    """Sums over the probed updates, per part of the update.

    Returns one row per run and part (class codes, momentum, weight decay, interaction, update):
    ``dentropy`` in nats, the number of ``probes``, ``first`` and ``last`` probed step. The parts
    add up to the update.
    """
    parts = []
    for place, run in enumerate(runs):
        rows = run.probes
        if not rows.empty:
            steps = rows["step"]
            span = {"probes": steps.nunique(), "first": steps.min(), "last": steps.max()}
            parts.append(closure(rows).reset_index().assign(run=place, **span))
    return keep_labels(keyed(parts, runs, _PARTS[3:])[_PARTS], runs)


@each_label("part")
def _says_waterfall(label: str, rows: pd.DataFrame) -> str:
    means = rows.groupby("part")["dentropy"].mean()
    parts = means.drop(UPDATE).dropna()
    if len(parts):
        code = largest_key(parts)
        return f"{label}: {part_name(code)} {parts[code]:+.2g} nats of {means[UPDATE]:+.2g}"
    return ""


@figure(
    Need("probes", "counterfactual_dentropy"),
    title="What made up the change of the entropy?",
    caption="Look for the longest bar: it is the class, or the momentum of earlier batches, that "
    "moved the entropy; read from top to bottom, the parts add up to the measured change.",
    group="entropy",
)
def plot_waterfall(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars that begin where the one above ends; the last one is what was measured.

    Returns axes of shape (labels,).
    """
    labels, figure, axes = label_row(frame, figure, 3.2, share_x=False, share_y=False, columns=2)
    lacks = "no probed update\n(recorded with probe_every)"
    for ax, _, part in filled_parts(axes, frame, labels, "part", lacks):
        _bars(ax, part)
    return axes


def _bars(ax: Axes, part: pd.DataFrame) -> None:
    effect = part.groupby("part")["dentropy"].mean()
    # Weight decay only if there is any; all other parts always, zero being an answer.
    shown = [int(code) for code in effect.index if code != WEIGHT_DECAY or effect[code]]
    order = [code for code in shown if code != UPDATE] + [UPDATE]
    base = 0.0
    for place, code in enumerate(order):
        size = float(effect[code])
        start = 0.0 if code == UPDATE else base
        color = _COLORS[code] if code in _COLORS else CLASS_COLORS[CLASSES[code]]
        ax.barh(-place, size, 0.7, left=start, color=color)
        base = start + size
        if code != UPDATE:
            ax.plot([base, base], [-place - 0.35, -place - 0.65], color=MUTED, linewidth=0.8)
        ax.annotate(
            f"{size:+.2g}" if size else "0", (max(start, base), -place), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    ax.axvline(0, color=INK, linewidth=0.6)
    low, high = ax.dataLim.intervalx
    ax.set_xlim(low - 0.04 * (high - low), high + 0.22 * (high - low))
    ax.locator_params(axis="x", nbins=6)
    names = [part_name(code) if code != UPDATE else "measured" for code in order]
    ax.set_yticks([-place for place in range(len(order))], labels=names)
    ax.grid(visible=False, axis="y")
    for code, tick in zip(order, ax.get_yticklabels(), strict=True):
        tick.set_color(CLASS_INK[CLASSES[code]] if code < len(CLASSES) else INK)
    each = part.groupby("run")["probes"].first().astype(int)
    probes = " to ".join(map(str, sorted({each.min(), each.max()})))
    runs = f", mean of {len(each)} runs" if len(each) > 1 else ""
    steps = f"steps {int(part['first'].min())} to {int(part['last'].max())}"
    ax.set_xlabel(f"dH of all tokens (nats){runs}\nsum over {probes} probed updates, {steps}")
