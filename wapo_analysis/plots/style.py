"""One look for every figure: colours, line styles, theme, file formats.

Hue tells the sign of the advantage (blue positive, orange negative), depth tells the regime (dark
peak, light valley). The colours are those of Okabe and Ito, safe for the common forms of colour
blindness; objectives use purple and green, which no class uses.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.textpath import text_to_path
from wapo_taxonomy import CLASSES, NONE, UNKNOWN

from wapo_analysis.errors import printable, unknown_name

CLASS_COLORS: Mapping[str, str] = {
    "pos_peak": "#0072B2",
    "pos_valley": "#56B4E9",
    "neg_peak": "#D55E00",
    "neg_valley": "#F0B040",
    NONE: "#9A9A9A",
    UNKNOWN: "#D5D5D5",
}
#: Class colours dark enough for text on white.
CLASS_INK: Mapping[str, str] = {
    **CLASS_COLORS,
    "pos_valley": "#1F7FB8",
    "neg_peak": "#B84F00",
    "neg_valley": "#8F5F00",
}
SIGN_COLORS: Mapping[int, str] = {
    1: CLASS_COLORS["pos_peak"],
    -1: CLASS_COLORS["neg_peak"],
    0: CLASS_COLORS[NONE],
}
SIGNS = (1, -1)
SIGN_NAMES: Mapping[int, str] = {1: "A > 0", -1: "A < 0", 0: "A = 0"}
INK = "#222222"
MUTED = "#6A6A6A"
BAND_ALPHA = 0.18
FORMATS = ("png", "svg", "pdf")
WIDTH = 10.0
LEGEND_SIZE = 9.5
_FEWEST = 8  # characters of a line, however narrow the room
_WIDE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "PingFang SC",
               "Microsoft YaHei", "Arial Unicode MS")  # fmt: skip
PNG_DPI = 120
_POINTS = 72  # matplotlib lays vector files out in points

_Dash = str | tuple[int, tuple[float, ...]]
_SOLID: _Dash = "-"
_DASHED: _Dash = (0, (5, 1.5))
_DOTTED: _Dash = (0, (1.2, 1.2))
_DASH_DOT: _Dash = (0, (6, 1.5, 1.2, 1.5))
_DASHES = (_SOLID, _DASHED, _DOTTED, _DASH_DOT)

_OBJECTIVES: Mapping[str, tuple[str, _Dash]] = {
    "grpo": ("#7B3294", _SOLID),
    "wapo": ("#008837", _DASHED),
    "dr_grpo": ("#C2639A", _DASH_DOT),
    "dapo": ("#8C510A", _DASHED),
    "dr_dapo": ("#B8860B", _DOTTED),
    "dr_dapo_seq": ("#5F5F1F", _DASH_DOT),
    "gspo": ("#332288", _DOTTED),
    "raft": ("#44AA99", _SOLID),
    "raft++": ("#117777", _DASH_DOT),
}
_SPARE = ("#444444", "#A0522D", "#6A5ACD", "#2F6F6F", "#8B0A50", "#556B2F")

_SAVE_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wapo",
    "pdf.fonttype": 42,
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}
_METADATA: Mapping[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": "wapo-analysis"},
    "pdf": {"CreationDate": None, "Creator": "wapo-analysis"},
}


#: A tenth larger than the default level 6, in three quarters of its time.
_PNG: Mapping[str, int] = {"compress_level": 3}


@dataclass(frozen=True)
class LineStyle:
    """Colour and dash pattern of one label, the same in every figure."""

    color: str
    dash: _Dash

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments for ``Axes.plot``."""
        return {"color": self.color, "linestyle": self.dash}


def label_styles(labels: Sequence[str]) -> dict[str, LineStyle]:
    """Colour and dash of every label, detected from the label's own words.

    A label that names a class ("GRPO neg_peak only") takes the colour of the class, one that begins
    with an objective takes the objective's. Labels that would look alike get another dash. Returns
    in the order of first appearance. ``labels``: legend texts; repeated ones count once.
    """
    styles: dict[str, LineStyle] = {}
    for label in dict.fromkeys(labels):
        color, dash = _words_style(label, len(styles))
        choices = [dash, *(other for other in _DASHES if other != dash)]
        taken = list(styles.values())
        free = [LineStyle(color, choice) for choice in choices]
        styles[label] = next((s for s in free if s not in taken), free[0])
    return styles


def _words_style(label: str, place: int) -> tuple[str, _Dash]:
    """Style that the words of a label ask for, else a spare colour by its place in the list."""
    words = label.lower().replace("-", "_").split()
    named = [name for name in CLASSES if any(name in word for word in words)]
    if len(named) == 1:
        return CLASS_COLORS[named[0]], _SOLID
    if words and words[0] in _OBJECTIVES:
        return _OBJECTIVES[words[0]]
    return _SPARE[place % len(_SPARE)], _SOLID


# seaborn's style "ticks"; importing seaborn for it takes as long as ten figures.
_TICKS: Mapping[str, Any] = {
    "axes.spines.left": True,
    "axes.spines.bottom": True,
    "grid.linestyle": "-",
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
    "text.color": ".15",
    "xtick.bottom": True,
    "xtick.direction": "out",
    "xtick.top": False,
    "ytick.direction": "out",
    "ytick.left": True,
    "ytick.right": False,
}


def theme() -> dict[Any, Any]:
    """Matplotlib settings of every figure, to be used in ``matplotlib.rc_context``."""
    return {
        **_TICKS,
        "font.family": ["sans-serif"],
        "font.sans-serif": [*_fonts()[0], "Arial", "Helvetica", "sans-serif"],
        "font.size": 10,
        "text.parse_math": False,  # a dollar sign in a label is a dollar sign
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.7,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "legend.fontsize": LEGEND_SIZE,
        "lines.linewidth": 1.8,
        "figure.titlesize": 12.5,
        "figure.titleweight": "bold",
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "hatch.linewidth": 0.6,
    }


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Fonts in the order of use, and the characters they have; the first comes with matplotlib."""
    names = {entry.name for entry in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in names)]
    files = [fontManager.findfont(FontProperties(family=name)) for name in fonts]
    return fonts, frozenset().union(*(get_font(file).get_charmap() for file in files))


def drawable(text: str) -> str:
    """Text of a run as a figure can draw it: what no font has or nobody may see is escaped."""
    known = _fonts()[1]
    return "".join(
        char if ord(char) in known else char.encode("ascii", "backslashreplace").decode()
        for char in printable(text)
    )


def inches(text: str, size: float, weight: str = "normal") -> float:
    """Width of a text, kerning left out; ``size`` in points."""
    return sum(_advance(char, weight) for char in text) * size / _POINTS


@cache
def _advance(char: str, weight: str) -> float:
    """Width of a character at one point."""
    font = FontProperties(family=_fonts()[0], size=1, weight=weight)
    width: float = text_to_path.get_text_width_height_descent(char, font, False)[0]
    return width


def wrapped(text: str, room: float = WIDTH - 0.2, size: float = 12.5, weight: str = "bold") -> str:
    """Text in lines that fit into ``room`` inches; by default a title across a figure."""
    text = re.sub(" ([<>=]) ", "\u00a0\\1\u00a0", text)  # a comparison stays in one line
    lines, signs = [text], int(1.3 * len(text) * room / max(inches(text, size, weight), room))
    while signs >= _FEWEST and any(inches(line, size, weight) > room for line in lines):
        lines = textwrap.wrap(text, signs, break_on_hyphens=False)
        signs -= 1
    return "\n".join(lines).replace("\u00a0", " ")


class _Drawn(Figure):
    """A figure that a notebook shows by itself, though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        return encode_figure(self, "png")


def new_figure(height: float) -> Figure:
    """Empty figure in constrained layout, inches; not known to pyplot, so nothing leaks."""
    return _Drawn(figsize=(WIDTH, height), layout="constrained")


def sign_map(sign: int) -> Colormap:
    """Colour map from a pale to a dark shade of the colour of a sign of the advantage."""
    color = np.array(to_rgb(SIGN_COLORS[sign]))
    shades = [0.3 * color + 0.7, color, 0.45 * color]
    return LinearSegmentedColormap.from_list("blend", [tuple(shade) for shade in shades])


def encode_figure(figure: Figure, format: str) -> bytes:
    """File content of a figure; the same figure gives the same bytes.

    Raises UserError if the format is another one. ``format``: SVG keeps its text as text.
    """
    if format not in FORMATS:
        raise unknown_name("figure format", format, FORMATS)
    sink = io.BytesIO()
    with mpl.rc_context(_SAVE_RC), _laid_out(figure, PNG_DPI if format == "png" else _POINTS):
        options: dict[str, Any] = {"pil_kwargs": _PNG} if format == "png" else {}
        figure.savefig(sink, format=format, dpi=PNG_DPI, metadata=_METADATA[format], **options)
    return sink.getvalue()


@contextmanager
def _laid_out(figure: Figure, dpi: float) -> Iterator[None]:
    """Lay the panels out once; ``savefig`` would draw everything an extra time to do so."""
    engine, before = figure.get_layout_engine(), figure.dpi
    if engine is None or not figure.axes:
        yield
        return
    figure.dpi = dpi
    engine.execute(figure)
    figure.set_layout_engine(None)
    try:
        yield
    finally:
        figure.set_layout_engine(engine)
        figure.dpi = before


def save_figure(figure: Figure, path: Path, format: str | None = None) -> Path:
    """Write a figure to a file, making its folder.

    Returns the path. Raises UserError if the format is unknown. ``format``: by default the suffix
    of the path.
    """
    content = encode_figure(figure, path.suffix.lstrip(".") if format is None else format)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
