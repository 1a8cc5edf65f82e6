"""Figures: every one is ``prepare_x(runs) -> small frame`` and ``plot_x(frame) -> axes``.

``FIGURES`` lists them, ``render`` makes one, ``save_figure`` writes it. ``prepare_x`` takes opened
runs and returns a small tidy frame; ``plot_x(frame, figure=None)`` draws that frame into a new or
an empty matplotlib figure and returns the array of its axes. The decorator :func:`figure` on
``plot_x`` in any file here is all that adds one. Nothing here shows a window, keeps pyplot state or
imports torch.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.plots.frames import keyed
from wapo_analysis.plots.panels import STEP_LABEL, AxesArray
from wapo_analysis.plots.style import (
    CLASS_COLORS,
    FORMATS,
    INK,
    MUTED,
    SIGN_COLORS,
    encode_figure,
    label_styles,
    save_figure,
    theme,
    wrapped,
)
from wapo_analysis.series import Series
from wapo_analysis.store import Need, Run

__all__ = [
    "CLASS_COLORS",
    "FIGURES",
    "FORMATS",
    "GROUPS",
    "SIGN_COLORS",
    "FigureSpec",
    "encode_figure",
    "get_figure",
    "label_styles",
    "render",
    "save_figure",
    "unavailable",
]

_COLUMNS = ("first", "baseline", "onset", "updates")
_SHADE = "#EFEFEF"
_GROUND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}


def prepare_marks(runs: Sequence[Run]) -> pd.DataFrame:
    """Baseline and onset of every run, and how many optimizer updates one of its steps has.

    Returns ``label, seed, run``, ``first`` and ``baseline`` (first and last step of the baseline of
    the entropy, NaN without entropy), ``onset`` (of the verdict, NaN if healthy), ``updates``
    (median).
    """
    from wapo_analysis.diagnose import diagnose

    parts = []
    for place, run in enumerate(runs):
        onset, steps = diagnose(run).onset_step, run.steps["step"].to_numpy()
        if not len(steps):
            continue
        known = run.steps[["step", "entropy"]].dropna()
        entropy = Series(known["step"].to_numpy(), known["entropy"].to_numpy(np.float64))
        row = {
            "run": place,
            "first": steps[0],
            "baseline": entropy.step(min(entropy.few, len(entropy)) - 1)
            if len(entropy)
            else np.nan,
            "onset": np.nan if onset is None else onset,
            "updates": pd.Series(run.column("updates")).median(),
        }
        parts.append(pd.DataFrame([row]))
    return keyed(parts, runs, _COLUMNS)


def step_label(marks: pd.DataFrame) -> str:
    """Name of the step axis, with the updates of a step where all runs agree on them."""
    counts = set(marks["updates"].dropna())
    if len(counts) != 1:
        return STEP_LABEL
    count = float(counts.pop())
    return f"{STEP_LABEL} ({count:g} update{'' if count == 1 else 's'})"


def draw_marks(axes: Iterable[Axes], marks: pd.DataFrame) -> None:
    """Shade the baseline and draw a line at the onset; one that is off the axis is left out.

    A panel of one label shows the marks of that label, any other those of all.
    """
    styles, named = label_styles(list(marks["label"])), step_label(marks)
    written: set[str] = set()
    shaded = False
    for ax in axes:
        own = str(ax.get_label())
        mine = marks[marks["label"] == own] if own in styles else marks
        low, high = ax.get_xlim()
        # A panel without numbers has no steps; a mark would stretch its axis to nothing.
        if mine["baseline"].notna().any() and mine["first"].min() <= high:
            _shade_baseline(ax, mine["first"].min(), mine["baseline"].max(), not shaded)
            shaded = True
            ax.set_xlim(low, high)
        for label, onset in mine.groupby("label", sort=False)["onset"].min().dropna().items():
            if low <= onset <= high:
                color = INK if own in styles or len(styles) == 1 else styles[str(label)].color
                ax.axvline(onset, color=color, linestyle=(0, (1, 1.5)), linewidth=1.6, zorder=1.5)
                if str(label) not in written:
                    _write(ax, onset, f"onset {onset:g}", color)
                    written.add(str(label))
        if ax.get_xlabel() == STEP_LABEL:
            ax.set_xlabel(named)


def _shade_baseline(ax: Axes, first: float, last: float, named: bool) -> None:
    """Grey behind the baseline, and a bar on the step axis where areas hide it."""
    ax.axvspan(first - 1, last, color=_SHADE, zorder=0)
    edge = ax.get_xaxis_transform()
    ax.plot([first, last], [0, 0], color=MUTED, linewidth=4, transform=edge, zorder=4)
    if named:
        ax.annotate(
            "baseline", (first, 0), xycoords=edge, xytext=(2, 4), textcoords="offset points",
            fontsize=8.5, color=MUTED, zorder=6, bbox=_GROUND,
        )  # fmt: skip


def _write(ax: Axes, step: float, text: str, color: str) -> None:
    """Small text beside a vertical line, at the top of the panel and inside it."""
    low, high = ax.get_xlim()
    right = step > low + 0.8 * (high - low)
    ax.annotate(
        text, (step, 1), xycoords=ax.get_xaxis_transform(),
        xytext=(-3 if right else 3, -2), textcoords="offset points",
        ha="right" if right else "left", va="top", fontsize=8.5, color=color, zorder=6,
        bbox=_GROUND,
    )  # fmt: skip


_MOST = 3


def joined(parts: Iterable[str]) -> str:
    """Clauses of several labels as one title; of more than three labels the first ones."""
    every = list(parts)
    more = [f"and {len(every) - _MOST} more"] if len(every) > _MOST else []
    return "; ".join([*every[:_MOST], *more])


def ends(frame: pd.DataFrame, column: str) -> dict[str, tuple[float, float]]:
    """Where a step column began and where it ended, mean over the runs of each label.

    Labels without a number are left out. Beginning and end are those that a diagnosis uses.
    """
    found: dict[str, tuple[float, float]] = {}
    for label, rows in frame.groupby("label", sort=False):
        known = rows.dropna(subset=["step", column])
        pairs = [
            (series.level, series.end)
            for _, part in known.groupby("run")
            if len(series := Series(part["step"].to_numpy(), part[column].to_numpy()))
        ]
        if pairs:
            first, last = np.mean(pairs, axis=0)
            found[str(label)] = (float(first), float(last))
    return found


def changes(frame: pd.DataFrame, column: str, digits: str = ".2f") -> str:
    """``GRPO 0.48 to 0.73; WAPO 0.47 to 0.81``: every label from its baseline to its end."""
    pairs = ends(frame, column).items()
    return joined(f"{label} {a:{digits}} to {b:{digits}}" for label, (a, b) in pairs)


def each_label(known: str | None = None) -> "Callable[[Callable[[str, pd.DataFrame], str]], Says]":
    """Make a function of the rows of one label, those with ``known``, one of a whole frame."""

    def over_all(tell: Callable[[str, pd.DataFrame], str]) -> Says:
        def says(frame: pd.DataFrame) -> str:
            rows = frame if known is None else frame.dropna(subset=known)
            told = (tell(str(label), part) for label, part in rows.groupby("label", sort=False))
            return joined(text for text in told if text)

        return says

    return over_all


def after(what: str, text: str) -> str:
    """``what: text``, or nothing where there is nothing to tell."""
    return f"{what}: {text}" if text else ""


def largest(rows: pd.DataFrame, column: str) -> pd.Series:
    """Row in which a column without NaN is largest in size."""
    return rows.iloc[int(np.argmax(rows[column].abs().to_numpy(np.float64)))]


def largest_key(values: pd.Series) -> int:
    """Integer key of the value that is largest in size."""
    return int(values.index.to_numpy()[int(np.argmax(values.abs().to_numpy(np.float64)))])


Prepare = Callable[[Sequence[Run]], pd.DataFrame]
Says = Callable[[pd.DataFrame], str]
P = TypeVar("P", bound="Plot")

#: Groups of figures in reading order, with their headings.
GROUPS: Mapping[str, str] = {
    "training": "Training",
    "entropy": "Entropy",
    "classes": "Classes of updates",
    "shift": "Predicted and measured shift",
    "policy": "Probabilities and the gradient",
    "theory": "Theory, for comparison",
}


class Plot(Protocol):
    """Frame to axes."""

    __name__: str

    def __call__(self, frame: pd.DataFrame, figure: Figure | None = None) -> AxesArray:
        """Draw and return the axes."""


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """One figure.

    Attributes
    ----------
    name : str
        Name on the command line and of the file.
    title : str
        The question it answers.
    caption : str
        What to look for; of a quantity of a paper also its definition and source.
    group : str
        A name in ``GROUPS``.
    needs : tuple of Need
        What a run must have, all of it. Empty: no run needed.
    prepare, plot : callable
        Runs to tidy frame, and frame to axes.
    says : callable, optional
        Frame to the answer in one sentence with its number, printed above the figure instead of
        the question; an empty text where the frame holds none.
    over_steps : bool
        The x axis is the step: baseline and onset are marked.
    """

    name: str
    title: str
    caption: str
    group: str
    needs: tuple[Need, ...]
    prepare: Prepare
    plot: Plot
    says: Says | None = None
    over_steps: bool = False

    def answer(self, frame: pd.DataFrame) -> str:
        """The answer in one sentence; empty where the frame holds none."""
        return self.says(frame) if self.says is not None else ""


#: Every figure by name; group by group once the package is imported.
FIGURES: dict[str, FigureSpec] = {}


def figure(
    *needs: Need, title: str, caption: str, group: str, over_steps: bool = False
) -> Callable[[P], P]:
    """Make ``plot_x`` the figure ``x``, with what :class:`FigureSpec` says of it.

    Its ``prepare_x`` and, if there is one, its ``_says_x`` stand before it in the same module.
    """

    def add(plot: P) -> P:
        name = plot.__name__.removeprefix("plot_")
        beside = vars(sys.modules[plot.__module__])
        FIGURES[name] = FigureSpec(
            name=name, title=title, caption=caption, group=group, needs=needs, plot=plot,
            prepare=beside[f"prepare_{name}"], says=beside.get(f"_says_{name}"),
            over_steps=over_steps,
        )  # fmt: skip
        return plot

    return add


def get_figure(name: str) -> FigureSpec:
    """Specification of a figure. Raises UserError if there is no figure of that name."""
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    return FIGURES[name]


def unavailable(spec: FigureSpec, runs: Sequence[Run]) -> str | None:
    """Why a figure cannot be drawn from these runs, or None if at least one of them can feed it.

    The reason is one clause without a full stop.
    """
    if not spec.needs:
        return None
    if not runs:
        return "it needs at least one run"
    first: str | None = None
    for run in runs:
        lacks = [reason for need in spec.needs if (reason := run.lacks(need)) is not None]
        if not lacks:
            return None
        first = first or lacks[0]
    return first


def render(name: str, runs: Sequence[Run] = (), marks: pd.DataFrame | None = None) -> Figure:
    """Make a figure; pyplot does not know it and no global setting changes.

    Raises UserError if the name is unknown or no run can feed the figure.

    Parameters
    ----------
    name : str
        A name in ``FIGURES``.
    runs : sequence of Run
        Opened runs; theory figures need none. Runs of one setting are replicates.
    marks : DataFrame, optional
        Baselines and onsets of the runs, of :func:`prepare_marks`, where they are
        known; else every run is diagnosed.
    """
    spec = get_figure(name)
    reason = unavailable(spec, runs)
    if reason is not None:
        raise UserError(f"figure {name!r} cannot be drawn: {reason}")
    with mpl.rc_context(theme()):
        frame = spec.prepare(runs)
        axes = spec.plot(frame)
        if spec.over_steps:
            draw_marks(axes.flat, prepare_marks(runs) if marks is None else marks)
        drawn: Figure = axes.flat[0].figure
        drawn.suptitle(wrapped(spec.answer(frame) or spec.title), x=0.01, ha="left")
    return drawn


for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")
# In the order of their groups, within one in that of their modules.
for _spec in sorted(FIGURES.values(), key=lambda spec: list(GROUPS).index(spec.group)):
    FIGURES[_spec.name] = FIGURES.pop(_spec.name)
