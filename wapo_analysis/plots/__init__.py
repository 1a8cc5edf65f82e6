"""Figures: every one is ``prepare_x(runs) -> small frame`` and ``plot_x(frame) -> axes``.

``FIGURES`` lists them, ``render`` makes one, ``save_figure`` writes it. A function of any file here
that registers itself is one. Nothing here shows a window, keeps pyplot state or imports torch.
"""

from importlib import import_module
from pkgutil import iter_modules

from wapo_analysis.plots.registry import (
    FIGURES,
    GROUPS,
    FigureSpec,
    get_figure,
    render,
    sort_figures,
    unavailable,
)
from wapo_analysis.plots.style import (
    CLASS_COLORS,
    FORMATS,
    SIGN_COLORS,
    encode_figure,
    label_styles,
    save_figure,
)

for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")
sort_figures()

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
