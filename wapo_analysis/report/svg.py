"""A figure as inline SVG: ids of its own, no metadata, the page's paper as background."""

import re
from xml.etree import ElementTree

from markupsafe import Markup

_ID_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_LONG_DECIMAL = re.compile(r"(\d\.\d\d)\d+")
_ROUNDED = ("d", "x", "y", "points", "transform")
_PAPER = re.compile(r"#ffffff\b")


def inline_svg(content: bytes, prefix: str, label: str) -> Markup:
    """Make an SVG file ready to stand beside others in one HTML page.

    Parameters
    ----------
    content : bytes
        SVG file as matplotlib writes it.
    prefix : str
        Put before every id, so that ids of several figures never meet.
    label : str
        What the figure shows, for readers who do not see it.

    Returns
    -------
    Markup
        ``<svg>`` element without declaration, namespaces, metadata or size; white becomes the CSS
        variable ``--paper``, coordinates keep two decimals.
    """
    root = ElementTree.fromstring(content)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(name): _attribute(_local(name), value, prefix)
            for name, value in element.attrib.items()
        }
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("metadata", "style")]:
            parent.remove(child)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label, "class": "figure"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704


def _local(name: str) -> str:
    """Name without its namespace; HTML knows ``svg`` and takes ``href`` for ``xlink:href``."""
    return name.rpartition("}")[2]


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    if name in _ROUNDED:
        return _LONG_DECIMAL.sub(r"\1", " ".join(value.split()))
    value = _ID_REFERENCE.sub(rf"url(#{prefix}-\1)", value)
    return _PAPER.sub("var(--paper)", value) if name == "style" else value
