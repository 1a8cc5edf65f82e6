"""One self-contained HTML page from runs: verdict, table, figures, completions, provenance.

The page loads nothing: styles are inline, figures are inline SVG, there is no script. Every text
that comes from a model, a data set or a manifest is escaped by the template engine.
"""

from collections.abc import Sequence
from pathlib import Path

import jinja2
import wapo_taxonomy as tax

from wapo_analysis.compare import compare
from wapo_analysis.errors import UserError
from wapo_analysis.plots import CLASS_COLORS
from wapo_analysis.report import content
from wapo_analysis.report.figures import draw_figures
from wapo_analysis.report.samples import visible
from wapo_analysis.store import Run, write_atomic
from wapo_analysis.version import __version__


def build_report(runs: Sequence[Run], out: Path | None = None, title: str | None = None) -> str:
    """Build the page and, if asked, write it.

    Parameters
    ----------
    runs : sequence of Run
        Opened runs; those that share a label are seeds of one setting.
    out : Path, optional
        HTML file; its folder is made. Written whole or not at all.
    title : str, optional
        Heading; by default what is compared.

    Returns
    -------
    str
        The page. The same runs give the same page.

    Raises
    ------
    UserError
        If there are no runs, a run is broken, or the file cannot be written.
    """
    comparison = compare(runs)
    header, *rows = comparison.rows()
    cards = content.verdict_cards(comparison)
    figures = draw_figures(runs, content.key_figure(comparison))
    page = _environment().get_template("template.html").render(
        title=title or comparison.title,
        version=__version__,
        cards=cards,
        header=header,
        rows=rows,
        notes=content.table_notes(comparison),
        figures=figures,
        findings=content.finding_lists(comparison),
        samples=content.sample_lists(runs),
        effects=tax.EFFECTS.values(),
        colors=CLASS_COLORS,
        provenance=[content.provenance(run) for run in runs],
        commands=content.commands(runs),
    )  # fmt: skip
    if out is not None:
        _write(out, page)
    return page


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rgba": _rgba, "visible": visible, "headline": content.headline}
    return environment


def _rgba(color: str, alpha: float) -> str:
    """CSS colour of a ``#rrggbb`` one at an opacity."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:.2f})"


def _write(out: Path, page: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page.encode())
    except OSError as error:
        raise UserError(f"cannot write report {out}: {error.strerror}") from error
