"""Sphinx: the documentation site, from the pages of this folder and the docstrings (make docs)."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "taxonomy")]

from wapo_analysis import __version__  # noqa: E402

project = "wapo-analysis"
author = copyright = "the wapo-analysis contributors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
highlight_language = "default"  # Python where it is Python, else plain; never a warning
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks are shown as they stand; the slow tests execute them

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpy docstrings say types, with shapes and units
napoleon_google_docstring = False

html_theme = "furo"
html_title = f"wapo-analysis {release}"
html_theme_options = {"navigation_with_keys": True}

COPIES = {
    "../README.md": "index.md",
    "../taxonomy/README.md": "from_repo/taxonomy.md",
    "../figures/README.md": "from_repo/figures.md",
    "../CONTRIBUTING.md": "from_repo/contributing.md",
    "../CHANGELOG.md": "from_repo/changelog.md",
}
"""Pages that lie elsewhere in the repository, to their place on the site."""


def place_links(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn links to pages elsewhere in the repository to their place on the site.

    What is no page of the site (a script, the licence) loses its link and keeps its text.
    """
    if page == "index":
        source[0] = placed_anywhere(source[0])
    if page.startswith(("from_repo/", "notebooks/")):  # notebooks are JSON, and have no such links
        return

    def placed(found: re.Match[str]) -> str:
        text, target = found.groups()
        if target in COPIES:
            return f"[{text}](/{COPIES[target]})"
        return found[0] if target.endswith((".png", ".svg")) else text

    source[0] = re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#]*)[^)]*\)", placed, source[0])


def placed_anywhere(index: str) -> str:
    """Contents with every page in them: one that has no place yet comes last."""
    new = [page.stem for page in sorted(Path(__file__).parent.glob("*.md"))]
    lines = index.splitlines()
    missing = [name for name in new if name != "index" and name not in lines]
    return index.rstrip().removesuffix("```") + "\n".join([*missing, "```", ""])


def keep_bars(
    app: Sphinx, kind: str, name: str, what: object, options: object, lines: list[str]
) -> None:
    """Show |x| in a docstring as it stands; reStructuredText takes it for a substitution."""
    lines[:] = [re.sub(r"(?<![`\\])\|([\w/]+)\|", r"\|\1\|", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Add the above to the build."""
    app.connect("source-read", place_links)
    app.connect("autodoc-process-docstring", keep_bars)
