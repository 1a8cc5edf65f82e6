"""Figures: every one is ``prepare_x(runs) -> small frame`` and ``plot_x(frame) -> axes``.

``FIGURES`` lists them, ``render`` makes one, ``save_figure`` writes it. Nothing here shows a
window, keeps pyplot state or imports torch.
"""

from wapo_analysis.plots.catalogue import FIGURES, FigureSpec
from wapo_analysis.plots.registry import get_figure, render, unavailable
from wapo_analysis.plots.style import (
    CLASS_COLORS,
    FORMATS,
    SIGN_COLORS,
    encode_figure,
    label_styles,
    save_figure,
)

__all__ = [
    "CLASS_COLORS",
    "FIGURES",
    "FORMATS",
    "SIGN_COLORS",
    "FigureSpec",
    "encode_figure",
    "get_figure",
    "label_styles",
    "render",
    "save_figure",
    "unavailable",
]
