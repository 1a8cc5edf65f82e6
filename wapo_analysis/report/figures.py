"""The figures of a page: drawn as inline SVG, grouped, with the reason for those left out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from wapo_analysis.plots import FIGURES, GROUPS, FigureSpec, encode_figure, render, unavailable
from wapo_analysis.report.svg import inline_svg
from wapo_analysis.store import Run


@dataclass(frozen=True)
class Drawing:
    """One figure on the page."""

    name: str
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Figures:
    """All figures of a page.

    Attributes
    ----------
    key : Drawing or None
        The picture of the first screen.
    groups : dict of str to list of Drawing
        Heading to the other figures.
    left_out : list of (title, reason)
        Figures these runs cannot feed.
    """

    key: Drawing | None = None
    groups: dict[str, list[Drawing]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def draw_figures(runs: Sequence[Run], key: str) -> Figures:
    """Draw every figure that these runs can feed.

    Parameters
    ----------
    runs : sequence of Run
        Opened runs.
    key : str
        Name of the figure for the first screen.
    """
    drawn: dict[str, Drawing] = {}
    left_out = []
    for name, spec in FIGURES.items():
        reason = unavailable(spec, runs)
        if reason is None:
            drawn[name] = _draw(spec, runs)
        else:
            left_out.append((spec.title, reason))
    first = drawn.pop(key, None)
    groups = {
        head: [drawing for name, drawing in drawn.items() if FIGURES[name].group == group]
        for group, head in GROUPS.items()
    }
    return Figures(first, {head: many for head, many in groups.items() if many}, left_out)


def _draw(spec: FigureSpec, runs: Sequence[Run]) -> Drawing:
    content = encode_figure(render(spec.name, runs), "svg")
    svg = inline_svg(content, prefix=spec.name, label=f"{spec.title} {spec.caption}")
    return Drawing(spec.name, spec.title, spec.caption, svg)
