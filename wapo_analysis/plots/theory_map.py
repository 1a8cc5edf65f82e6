"""Map of the taxonomy: the entropy change of one update over p of the token and S of the policy."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
import wapo_taxonomy as tax
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wapo_analysis.plots.panels import AxesArray
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK, INK, MUTED, new_figure
from wapo_analysis.store import Run
from wapo_analysis.table import Array

VOCABULARY = 100
_GRID = 241
_FLAT = 0.02
_LOGIT_TICKS = (0.01, 0.1, 0.5, 0.9)


def _rest(prob: Array, collision: Array) -> tuple[Array, Array, Array]:
    """Sums over the other tokens of a policy with given p and S: one rival, a uniform tail.

    The other V - 1 tokens are a rival of probability r and V - 2 equal ones; r solves
    r^2 + (1 - p - r)^2 / (V - 2) = S - p^2, which covers every S that p allows.

    Returns
    -------
    tuple of ndarray
        Sum of p_v^2, sum of p_v^2 ln p_v (nats), and the entropy H (nats); NaN where no policy has
        these p and S.
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

    Parameters
    ----------
    runs : sequence of Run
        Not used.

    Returns
    -------
    DataFrame
        ``prob, collision, dentropy``: a grid, even in log odds; dentropy is first-order, in nats
        per unit step with A > 0 (negate it for A < 0), NaN where no policy of a hundred tokens has
        this p and S.
    """
    odds = np.linspace(-4.9, 2.9, _GRID)
    axis = 1 / (1 + np.exp(-odds))
    prob, collision = np.meshgrid(axis, axis)
    rest, rest_logp, entropy = _rest(prob, collision)
    change = tax.dentropy(1.0, prob, 1 - prob, np.log(prob), entropy, rest, rest_logp)
    flat = {"prob": prob, "collision": collision, "dentropy": change}
    return pd.DataFrame({name: values.ravel() for name, values in flat.items()})


def plot_theory_map(frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
    """Map of the entropy change, left for a reward, right for a punishment.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`prepare_theory_map`.
    figure : Figure, optional
        Empty figure to draw into.

    Returns
    -------
    ndarray of Axes, shape (2,)
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
