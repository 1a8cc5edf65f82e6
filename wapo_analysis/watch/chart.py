"""Line charts and bars in characters: numbers in, rich text out.

A character holds 2 x 4 braille dots, so a chart of w x h characters has 2w x 4h dots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from wapo_analysis.table import Array

_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLOCKS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Rule:
    """A level drawn across a chart: value, style, and its label at the right."""

    value: float
    style: str
    label: str


def bucket_means(values: Array, buckets: int) -> Array:
    """Means of equal stretches of a series, shape (min(n, buckets),)."""
    if len(values) <= buckets:
        return values
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    sums = np.add.reduceat(values, edges[:-1])
    return np.asarray(sums / np.diff(edges))


def line_chart(
    values: Array,
    *,
    width: int,
    height: int,
    style: str,
    rules: Sequence[Rule] = (),
    safe: tuple[float, float] = (-np.inf, np.inf),
) -> list[Text]:
    """Draw a series with levels across it.

    Parameters
    ----------
    values : ndarray, shape (n,), n >= 1
        Finite values.
    width, height : int
        Size of the plotting area in characters; labels stand to its right.
    style : str
        Style of the line.
    rules : sequence of Rule
        Levels; one that lies far outside the data is left out, so that it does not flatten them.
    safe : tuple of float
        Where the line keeps its style; outside it is bold red.

    Returns
    -------
    list of Text, length height
    """
    drawn = _columns(np.asarray(values, np.float64), 2 * width)
    low, high = _limits(drawn, rules)
    rows = 4 * height - 1

    def dot(value: float) -> int:
        return int(round((high - value) / (high - low) * rows))

    cells = np.zeros((height, width), np.int64)
    hot = np.zeros((height, width), bool)
    top, bottom = dot(min(safe[1], high)), dot(max(safe[0], low))
    before = dot(float(drawn[0]))
    for x, value in enumerate(drawn):
        here = dot(float(value))
        for y in range(min(before, here), max(before, here) + 1):
            cells[y // 4, x // 2] |= _DOTS[y % 4][x % 2]
            hot[y // 4, x // 2] |= not top <= y <= bottom
        before = here
    lines = {dot(r.value) // 4: r for r in rules if low <= r.value <= high}
    return [
        _chart_row(cells[row], hot[row], style, lines.get(row), _edge(row, height, low, high))
        for row in range(height)
    ]


def _columns(values: Array, count: int) -> Array:
    """One value per column of dots: means of many steps, or straight lines between few."""
    if len(values) >= count:
        return bucket_means(values, count)
    return np.interp(np.linspace(0, len(values) - 1, count), np.arange(len(values)), values)


def _limits(drawn: Array, rules: Sequence[Rule]) -> tuple[float, float]:
    """Range of the data, widened to the levels that lie within its own height of it."""
    low, high = float(drawn.min()), float(drawn.max())
    reach = max(high - low, 0.25 * abs(high), 1e-9)
    near = [r.value for r in rules if low - reach <= r.value <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    return (low, high) if high > low else (low - 0.5 * reach, high + 0.5 * reach)


def _edge(row: int, height: int, low: float, high: float) -> str:
    if high - low < 1e-8:  # one value, which its level or title says
        return ""
    return f"{high:.3g}" if row == 0 else f"{low:.3g}" if row == height - 1 else ""


def _chart_row(dots: Array, hot: Array, style: str, rule: Rule | None, edge: str) -> Text:
    row = Text(no_wrap=True)
    for bits, beyond in zip(dots.tolist(), hot.tolist(), strict=True):
        if bits:
            row.append(chr(_BRAILLE + bits), "bold red" if beyond else style)
        else:
            row.append("┈" if rule else " ", rule.style if rule else "")
    label = " ".join(part for part in (rule.label if rule else "", edge) if part)
    return row.append(f" {label}", rule.style if rule else "dim")


def bar(share: float, width: int, style: str) -> Text:
    """Bar of a share in [0, 1]; a width of ``width`` characters is the whole."""
    eighths = int(round(min(max(share, 0.0), 1.0) * width * 8))
    full, rest = divmod(eighths, 8)
    text = "█" * full + (_BLOCKS[rest] if rest else "")
    return Text(text.ljust(width), style, no_wrap=True)
