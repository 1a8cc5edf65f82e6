"""Where on the probability scale the gradient sits: bins of p by sign of the advantage."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from wapo_taxonomy import CLASSES

from wapo_analysis.plots.frames import class_frame, keep_labels, keyed, labels_of, mean_over_runs
from wapo_analysis.plots.panels import (
    AxesArray,
    label_parts,
    label_row,
    note,
    pair_legend,
    sign_legend,
)
from wapo_analysis.plots.registry import figure, joined, largest
from wapo_analysis.plots.style import (
    CLASS_COLORS,
    CLASS_INK,
    INK,
    MUTED,
    SIGN_COLORS,
    SIGN_NAMES,
    SIGNS,
    new_figure,
)
from wapo_analysis.schema import PAPER_EDGES, PROB_EDGES
from wapo_analysis.store import Need, Run


def bin_names(edges: Sequence[float]) -> list[str]:
    """Text of every bin between the edges, such as ``.1-.25``."""
    texts = [f"{edge:g}".replace("0.", ".") for edge in edges]
    return [f"{low}-{high}" for low, high in zip(texts, texts[1:], strict=False)]


def prepare_bin_mass(runs: Sequence[Run]) -> pd.DataFrame:
    """Gradient mass per bin of p and sign over all steps, exact and by the official proxy.

    Returns
    -------
    DataFrame
        ``label, seed, run, sign, prob_bin, exact, proxy``: shares of the run's whole exact mass in
        the paper's five bins of p. The proxy is the sum of |coef| (1 - p) instead of |dL/dz|; it
        may add up to less than one.
    """
    frame = _paper_bins(runs, ("grad_mass", "grad_mass_proxy"))
    total = frame.groupby("run")["grad_mass"].transform("sum")
    total = total.where(total > 0)
    shares = frame.assign(exact=frame["grad_mass"] / total, proxy=frame["grad_mass_proxy"] / total)
    return keep_labels(shares.drop(columns=["grad_mass", "grad_mass_proxy"]), runs)


def _says_bin_mass(frame: pd.DataFrame) -> str:
    names, told = bin_names(PAPER_EDGES), []
    means = mean_over_runs(frame, ("sign", "prob_bin")).dropna(subset="exact")
    for label, rows in means.groupby("label", sort=False):
        top = largest(rows, "exact")
        told.append(
            f"{label}: {top['exact']:.0%} of the gradient is on tokens with "
            f"{SIGN_NAMES[int(top['sign'])]}, p in {names[int(top['prob_bin'])]}"
        )
    return joined(told)


@figure(
    Need("classes", "grad_mass"),
    title="At which probabilities does the gradient sit?",
    caption="Look for the longest bar: it names the probability and the sign that own the update, "
    "and the black tick shows what the (1 - p) proxy of the published code says. Bins are those of "
    "arXiv 2606.16154.",
    group="policy",
)
def plot_bin_mass(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the exact mass, A > 0 upwards, A < 0 downwards, the proxy as a tick.

    Returns axes of shape (labels,).
    """
    figure, axes, parts = _bin_panels(frame, figure, 3.4)
    for ax, _, part in parts:
        if not part["exact"].notna().any():
            note(ax, "nothing had a gradient,\nor the norm is unknown")
            continue
        for sign in SIGNS:
            rows = part[(part["sign"] == sign) & (part["exact"] > 0)]
            _mirrored(ax, rows["prob_bin"], sign * rows["exact"], sign)
            ticks = part[(part["sign"] == sign) & (part["proxy"] > 0)]
            if len(ticks):
                ax.plot(ticks["prob_bin"], sign * ticks["proxy"], "_", color=INK, ms=16, mew=1.4)
    means = mean_over_runs(frame, ("sign", "prob_bin"))
    top = means.groupby("sign")["exact"].max().reindex(list(SIGNS)).fillna(0)
    room = 0.12 * float(top.sum()) or 1.0
    axes[0].set_ylim(-top[-1] - room, top[1] + room)
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0%}"))
    axes[0].set_ylabel("share of the gradient mass")
    proxy = Line2D([], [], color=INK, marker="_", ms=11, ls="", label="proxy (1 - p)")
    sign_legend(figure, proxy)
    return axes


def _mirrored(ax: Axes, places: pd.Series, sizes: pd.Series, sign: int) -> None:
    """Bars of one sign with their share beyond the end of each; tiny ones go without."""
    ax.bar(places, sizes, 0.7, color=SIGN_COLORS[sign])
    ax.axhline(0, color=INK, linewidth=0.6)
    for place, size in zip(places, sizes, strict=True):
        if abs(size) >= 0.005:
            ax.annotate(
                f"{abs(size):.0%}", (place, size), xytext=(0, 3 * sign),
                textcoords="offset points", ha="center", va="bottom" if sign > 0 else "top",
                fontsize=8.5,
            )  # fmt: skip


def prepare_token_strength(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean coefficient of a token per bin of p and sign over all steps.

    Returns
    -------
    DataFrame
        ``label, seed, run, sign, prob_bin, strength``: mean of coef = -dL/dlogp over the tokens of
        the bin. The official token strength is w * ratio * A; coef is that with clipping, gates
        and the outer normaliser included, so clipped tokens count as 0.
    """
    frame = _paper_bins(runs, ("coef_sum", "tokens"))
    frame["strength"] = frame["coef_sum"] / frame["tokens"].where(frame["tokens"] > 0)
    return keep_labels(frame.drop(columns=["coef_sum", "tokens"]), runs)


def _says_token_strength(frame: pd.DataFrame) -> str:
    """Strongest bin against the weakest that is moved at all."""
    names, told = bin_names(PAPER_EDGES), []
    means = mean_over_runs(frame, ("sign", "prob_bin")).dropna(subset="strength")
    for label, rows in means[means["strength"] != 0].groupby("label", sort=False):
        size, top = rows["strength"].abs(), largest(rows, "strength")
        told.append(
            f"{label}: strongest at p in {names[int(top['prob_bin'])]}, "
            f"{SIGN_NAMES[int(top['sign'])]}, {size.max() / size.min():.2g} times the weakest"
        )
    return joined(told)


@figure(
    Need("classes", "coef_sum"),
    title="How strong is the update of a single token?",
    caption="Look for bars that grow towards small probabilities: there one token weighs more "
    "than its share (coef is the official w x ratio x A with clipping and normaliser in it).",
    group="policy",
)
def plot_token_strength(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Bars of the mean coefficient in the paper's bins of p; axes of shape (labels,)."""
    figure, axes, parts = _bin_panels(frame, figure, 3.0)
    for ax, _, part in parts:
        if not part["strength"].notna().any():
            note(ax, "not available here:\n'coef' was not recorded")
            continue
        for sign in SIGNS:
            rows = part[part["sign"] == sign]
            ax.bar(rows["prob_bin"], rows["strength"], 0.7, color=SIGN_COLORS[sign])
        ax.axhline(0, color=INK, linewidth=0.6)
    axes[0].set_ylabel("mean coefficient,\n-dL/dlogp")
    sign_legend(figure)
    return axes


def _paper_bins(runs: Sequence[Run], columns: Sequence[str]) -> pd.DataFrame:
    """Sums over all steps of tokens with A > 0 and A < 0 in the paper's five bins of p."""
    frame = class_frame(runs, columns, ("sign", "prob_bin"))
    signed = frame[frame["sign"].isin(SIGNS) & (frame["prob_bin"] >= 0)]
    merge = np.searchsorted(PAPER_EDGES, PROB_EDGES[:-1], side="right") - 1
    coarse = signed.assign(prob_bin=signed["prob_bin"].astype(int).map(dict(enumerate(merge))))
    keys = ["label", "run", "sign", "prob_bin"]
    grouped = coarse.groupby(keys, sort=False)
    sums = grouped[list(columns)].sum(min_count=1).assign(seed=grouped["seed"].first())
    return sums.reset_index()[["label", "seed", "run", "sign", "prob_bin", *columns]]


def _bin_panels(
    frame: pd.DataFrame, figure: Figure | None, panel: float
) -> tuple[Figure, AxesArray, Iterable[tuple[Axes, str, pd.DataFrame]]]:
    """One panel per label with the paper's bins of p across, and means over runs for each."""
    labels, figure, axes = label_row(frame, figure, panel)
    names = bin_names(PAPER_EDGES)
    for ax in axes:
        ax.set_xticks(range(len(names)), labels=names, fontsize=9)
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.grid(visible=False, axis="x")
        ax.set_xlabel("p of the sampled token")
    return figure, axes, label_parts(axes, mean_over_runs(frame, ("sign", "prob_bin")), labels)


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
            _bars(ax, part[part["cls"] == cls], cls)
        row[0].set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("mean change of p")
    pair_legend(figure, "predicted (first order, one step size)", "measured")
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
