"""Figures of the taxonomy itself, from the formulas alone: no run is needed.

Everything is an update of one isolated softmax at temperature 1.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import wapo_taxonomy as tax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from wapo_analysis.plots.panels import AxesArray
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.store import Run

# A policy with one favourite, two rivals and a tail: both regimes are well inside.
EXAMPLE = (0.50, 0.22, 0.12, 0.07, 0.04, 0.03, 0.02)
_SAMPLED = {"peak": 0, "valley": 3}
_STEP = 0.25

_UPDATES = 150
_RATE = 0.15


def prepare_theory_vocabulary(runs: Sequence[Run] = ()) -> pd.DataFrame:
    """Policy of seven tokens before and after one update of each class.

    Parameters
    ----------
    runs : sequence of Run
        Not used.

    Returns
    -------
    DataFrame
        ``cls, token, sampled, prob, dprob, dentropy``: one row per class and token; dprob is the
        first-order change at a step of a quarter, dentropy (nats) that of the whole policy.
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


def plot_theory_vocabulary(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """The policy as bars and every token's change below it, one column per class.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`prepare_theory_vocabulary`.
    figure : Figure, optional
        Empty figure to draw into.

    Returns
    -------
    ndarray of Axes, shape (2, 4)
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

    Parameters
    ----------
    runs : sequence of Run
        Not used.

    Returns
    -------
    DataFrame
        ``cls, update, entropy, prob, force, inside``, the state after each update. entropy (nats)
        is that of a policy that only ever gets the expected update of the class, whichever tokens
        are in it by then. prob and force (length of the next move of the logits per unit step) are
        those of one fixed token that starts in the class and is updated again and again; inside
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
    "force": ("how hard it is still pushed", "move of the logits per unit step"),
}


def plot_theory_classes(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Entropy of the policy, p of one token and the force on it against the number of updates.

    Lines are dotted once the token has left the class it began in.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`prepare_theory_classes`.
    figure : Figure, optional
        Empty figure to draw into.

    Returns
    -------
    ndarray of Axes, shape (3,)
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
