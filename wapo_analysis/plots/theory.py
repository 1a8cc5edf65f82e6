"""Figures of the taxonomy itself, from the formulas alone: no run is needed.

Everything is an update of one isolated softmax at temperature 1.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import wapo_taxonomy as tax
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from wapo_analysis.plots import figure
from wapo_analysis.plots.panels import AxesArray
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.store import Run
from wapo_analysis.table import Array

# A policy with one favourite, two rivals and a tail: both regimes are well inside.
EXAMPLE = (0.50, 0.22, 0.12, 0.07, 0.04, 0.03, 0.02)
_SAMPLED = {"peak": 0, "valley": 3}
_STEP = 0.25

_UPDATES = 150
_RATE = 0.15


def prepare_theory_vocabulary(runs: Sequence[Run] = ()) -> pd.DataFrame:
    """Policy of seven tokens before and after one update of each class.

    Returns ``cls, token, sampled, prob, dprob, dentropy``: one row per class and token; dprob is
    the first-order change at a step of a quarter, dentropy (nats) that of the whole policy.
    """
    probs = np.array(EXAMPLE)
    parts = []
    for name in tax.CLASSES:
        sign, regime = name.split("_")
        token = _SAMPLED[regime]
        effect = tax.predict(probs, token, _STEP if sign == "pos" else -_STEP)
        parts.append(
            pd.DataFrame(
                {
                    "cls": name,
                    "token": np.arange(len(probs)),
                    "sampled": np.arange(len(probs)) == token,
                    "prob": probs,
                    "dprob": effect.dprob,
                    "dentropy": float(effect.dentropy),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


@figure(
    title="What does one update do to every token?",
    caption="Look below: a rewarded peak or a punished valley feeds the favourite, a rewarded "
    "valley or a punished peak feeds the rest.",
    group="theory",
)
def plot_theory_vocabulary(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """The policy as bars and every token's change below it, one column per class.

    Returns axes of shape (2, 4).
    """
    figure = figure or new_figure(5.0)
    axes: AxesArray = figure.subplots(2, 4, sharex=True, sharey="row")
    for column, name in zip(axes.T, tax.CLASSES, strict=True):
        part = frame[frame["cls"] == name]
        color = CLASS_COLORS[name]
        shades = [color if sampled else "#C4C4C4" for sampled in part["sampled"]]
        column[0].bar(part["token"], part["prob"], color=shades)
        column[0].axhline((part["prob"] ** 2).sum(), color=INK, linestyle="--", linewidth=1)
        column[1].bar(part["token"], part["dprob"], color=shades)
        column[1].axhline(0, color=INK, linewidth=0.6)
        chosen = part[part["sampled"]].iloc[0]
        _sampled_text(column[0], chosen, CLASS_INK[name])
        way = "rises" if chosen["dentropy"] > 0 else "falls"
        column[0].set_title(f"{name}:\nentropy {way}", color=CLASS_INK[name])
        column[0].set_ylim(0, 0.58)
        column[1].set_xlabel("token")
        column[1].set_xticks([])
    axes[0, 0].set_ylabel("probability before")
    axes[1, 0].set_ylabel("change of probability")
    handles = [
        Patch(color="#C4C4C4", label="other tokens"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1, label="S: peak above, valley below"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return axes


def _sampled_text(ax: Axes, token: pd.Series, color: str) -> None:
    """Write "sampled" on top of the token's bar, upright where the bar has neighbours above."""
    first = token["token"] == 0
    ax.text(
        token["token"] - (0.4 if first else 0), token["prob"] + 0.01, "sampled", color=color,
        fontweight="bold", fontsize=9, va="bottom",
        ha="left" if first else "center", rotation=0 if first else 90,
    )  # fmt: skip


def prepare_theory_classes(runs: Sequence[Run] = ()) -> pd.DataFrame:
    """One policy under many updates, for each of the four classes.

    Returns ``cls, update, entropy, prob, force, inside``, the state after each update. entropy
    (nats) is that of a policy that only ever gets the expected update of the class, whichever
    tokens are in it by then. prob and force (length of the next move of the logits per unit step)
    are those of one fixed token that starts in the class and is updated again and again; inside
    tells whether it still is in the class.
    """
    start = np.log(np.array(EXAMPLE))
    parts = []
    for name in tax.CLASSES:
        sign, regime = name.split("_")
        class_path = tax.simulate_class(start, name, lr=_RATE, steps=_UPDATES)
        coef = 1.0 if sign == "pos" else -1.0
        path = tax.simulate(start, _SAMPLED[regime], coef, _RATE, _UPDATES)
        columns = {
            "cls": name,
            "update": np.arange(_UPDATES + 1),
            "entropy": class_path.entropy,
            "prob": path.prob_sampled,
            "force": path.move_norm / _RATE,
            "inside": path.regime == path.regime[0],
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


_PANELS = {
    "entropy": ("only this class is updated", "entropy (nats)"),
    "prob": ("one token, updated again and again", "p of the token (probability)"),
    "force": ("force that is left on it", "move of the logits per unit step"),
}


@figure(
    title="Where do many updates of one class lead?",
    caption="Look at the right panel: the force on a rewarded token dies out as it wins, "
    "the one on a punished token stays.",
    group="theory",
)
def plot_theory_classes(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Entropy of the policy, p of one token and the force on it against the number of updates.

    Lines are dotted once the token has left the class it began in.

    Returns axes of shape (3,).
    """
    figure = figure or new_figure(4.0)
    axes: AxesArray = figure.subplots(1, 3, sharex=True)
    tops = frame[list(_PANELS)].max()
    for ax, (column, (title, text)) in zip(axes, _PANELS.items(), strict=True):
        for name, rows in frame.groupby("cls", sort=False):
            inside = rows[column].where(rows["inside"] | (column == "entropy"))
            color = CLASS_COLORS[str(name)]
            ax.plot(rows["update"], inside, color=color, label=str(name))
            if column != "entropy":
                ax.plot(rows["update"], rows[column], color=color, linestyle=":", linewidth=1.3)
        ax.set(xlabel="number of updates", ylabel=text, ylim=(0, 1.07 * float(tops[column])))
        ax.set_title(title, fontsize=10)
        ax.set_xlim(0, frame["update"].max())
    most = np.log(len(EXAMPLE))
    axes[0].axhline(most, color=MUTED, linestyle=":", linewidth=1)
    axes[0].text(frame["update"].max(), most, "uniform", ha="right", va="bottom", color=MUTED)
    handles, texts = axes[0].get_legend_handles_labels()
    left = Line2D([], [], color=INK, linestyle=":", linewidth=1.3)
    figure.legend(
        [*handles, left], [*texts, "has left its class"], loc="outside lower center", ncols=5
    )
    return axes


VOCABULARY = 100
_GRID = 241
_FLAT = 0.02
_LOGIT_TICKS = (0.01, 0.1, 0.5, 0.9)


def _rest(prob: Array, collision: Array) -> tuple[Array, Array, Array]:
    """Sums over the other tokens of a policy with given p and S: one rival, a uniform tail.

    The other V - 1 tokens are a rival of probability r and V - 2 equal ones; r solves r^2 + (1 - p
    - r)^2 / (V - 2) = S - p^2, which covers every S that p allows. Returns sum of p_v^2, sum of
    p_v^2 ln p_v (nats), and the entropy H (nats); NaN where no policy has these p and S.
    """
    tail, complement, wanted = VOCABULARY - 2, 1 - prob, collision - prob**2
    inside = (tail + 1) * wanted - complement**2
    with np.errstate(invalid="ignore", divide="ignore"):
        rival = (complement + np.sqrt(tail * inside)) / (tail + 1)
        rival = np.where(rival <= complement, rival, np.nan)
        each = (complement - rival) / tail
        log_each = np.log(np.maximum(each, np.finfo(float).tiny))
        squares_logp = rival**2 * np.log(rival) + tail * each**2 * log_each
        entropy = -(prob * np.log(prob) + rival * np.log(rival) + tail * each * log_each)
    return np.where(np.isnan(rival), np.nan, wanted), squares_logp, entropy


def prepare_theory_map(runs: Sequence[Run] = ()) -> pd.DataFrame:
    """Entropy change of one update over p of the token and S of the policy.

    Returns ``prob, collision, dentropy``: a grid, even in log odds; dentropy is first-order, in
    nats per unit step with A > 0 (negate it for A < 0), NaN where no policy of a hundred tokens has
    this p and S.
    """
    odds = np.linspace(-4.9, 2.9, _GRID)
    axis = 1 / (1 + np.exp(-odds))
    prob, collision = np.meshgrid(axis, axis)
    rest, rest_logp, entropy = _rest(prob, collision)
    change = tax.dentropy(1.0, prob, 1 - prob, np.log(prob), entropy, rest, rest_logp)
    flat = {"prob": prob, "collision": collision, "dentropy": change}
    return pd.DataFrame({name: values.ravel() for name, values in flat.items()})


@figure(
    title="Where does an update raise entropy, where lower it?",
    caption="Look at the dashed border p = S: the colour changes beside it, so the class tells "
    "the direction of the entropy everywhere but in the thin strip between the lines.",
    group="theory",
)
def plot_theory_map(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Map of the entropy change, left for a reward, right for a punishment.

    Returns axes of shape (2,).
    """
    figure = figure or new_figure(5.0)
    axes: AxesArray = figure.subplots(1, 2, sharex=True, sharey=True)
    table = frame.pivot(index="collision", columns="prob", values="dentropy")
    biggest = float(np.nanmax(np.abs(table.to_numpy())))
    norm = SymLogNorm(_FLAT, vmin=-biggest, vmax=biggest)
    for ax, sign, name in ((axes[0], 1, "pos"), (axes[1], -1, "neg")):
        mesh = ax.pcolormesh(
            table.columns,
            table.index,
            sign * table,
            norm=norm,
            cmap=_entropy_map(),
            rasterized=True,
        )
        ax.contour(table.columns, table.index, table, [0.0], colors=INK, linewidths=1.2)
        ax.plot(table.columns, table.columns, "--", color=INK, linewidth=1.2)
        _map_axis(ax, f"A {'>' if sign > 0 else '<'} 0: the token is pushed {_WAY[sign]}")
        _map_text(ax, f"{name}_valley", (0.1, 0.3), (0.05, 0.62))
        _map_text(ax, f"{name}_peak", (0.3, 0.16), (0.66, 0.06))
        ax.text(
            0.55,
            0.93,
            "no policy has\nthese p and S",
            transform=ax.transAxes,
            color=MUTED,
            va="top",
        )
    axes[0].set_ylabel("S = sum of p², of the whole policy")
    bar = figure.colorbar(mesh, ax=list(axes), shrink=0.9, extend="neither")
    bar.set_label("dH per unit step (nats)\nbelow 0 sharpens, above 0 flattens")
    figure.legend(handles=_BORDERS, loc="outside lower center", ncols=2)
    return axes


_WAY = {1: "up", -1: "down"}
_BORDERS = [
    Line2D([], [], color=INK, linestyle="--", label="p = S: border of peak (right) and valley"),
    Line2D([], [], color=INK, label="exact dH = 0: between the two lines the rule is wrong"),
]


def _entropy_map() -> Colormap:
    """Teal where entropy falls, brown where it rises: no colour of a class."""
    import seaborn as sns  # half a second, and nothing else needs it

    colors: Colormap = sns.diverging_palette(190, 40, s=85, l=45, as_cmap=True)
    return colors


def _map_axis(ax: Axes, title: str) -> None:
    ax.set(xscale="logit", yscale="logit", xlabel="p of the sampled token")
    ax.set_title(title)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(_LOGIT_TICKS, labels=[f"{tick:g}" for tick in _LOGIT_TICKS])
        axis.set_ticks([], minor=True)
    ax.grid(visible=False)


def _map_text(ax: Axes, name: str, at: tuple[float, float], text: tuple[float, float]) -> None:
    """Name of a class beside its region, with a line to a point (p, S) inside it."""
    ground = {"facecolor": "white", "edgecolor": CLASS_COLORS[name], "linewidth": 1.5, "pad": 3.5}
    way = "falls" if tax.EFFECTS[name].entropy < 0 else "rises"
    ax.annotate(
        f"{name}:\nentropy {way}", at, text, xycoords="data", textcoords="axes fraction",
        color=CLASS_INK[name], fontweight="bold", fontsize=9.5, bbox=ground,
        arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.9},
    )  # fmt: skip
