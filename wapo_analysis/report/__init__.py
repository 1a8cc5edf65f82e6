"""One self-contained HTML page from runs; the same page, without data, is what `wapo board` serves.

Charts are data drawn by Bokeh's own JavaScript, which comes with its wheel and is written into the
page: nothing is loaded from a network. Every text of a model, a data set or a manifest reaches the
page as data and is set as text; a content policy lets no script run but the page's own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from base64 import b64encode
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jinja2
from markupsafe import Markup

from wapo_analysis import __version__
from wapo_analysis.diagnose import diagnose
from wapo_analysis.errors import UserError
from wapo_analysis.report.data import Json, comparison_data, place, run_data
from wapo_analysis.report.steps import block, chosen_steps, step_data
from wapo_analysis.settings import setting_labels
from wapo_analysis.store import Run, write_atomic
from wapo_analysis.store.manifest import OPENED_WITH

HERE = Path(__file__).parent / "page"
#: The page's own code, in the order the modules build on each other.
MODULES = ("unpack", "words", "dom", "model", "charts", "step", "tokens", "story", "runs", "main")
#: Token rows that a page carries by default: about a megabyte.
ROWS = 60_000
_GENERATOR = b'content="wapo-analysis'
#: Steps whose rollouts are carried where a run has no token rows.
MORE_STEPS = 40


def build_report(runs: Sequence[Run], out: Path | None = None, rows: int = ROWS) -> str:
    """Build the page and, if asked, write it.

    Returns the page. The same runs give the same page. Raises UserError if there are no runs, a run
    is broken, or the file cannot be written or is no page. ``out``: HTML file; its folder is made.
    Written whole or not at all. ``rows``: token rows the page may carry, over all runs. Steps that
    the findings name come first; the page says how many recorded steps it holds.
    """
    if not runs:
        raise UserError("a report needs at least one run")
    if out is not None:
        _check_page(out)
    settings = setting_labels(runs)
    told, blocks, notes = [], [], []
    for run, setting in zip(runs, settings, strict=True):
        data = run_data(run, diagnose(run)) | {"setting": setting}
        steps = _steps(run, data, rows // len(runs))
        blocks += [(f"block-{data['id']}-{step}", _text(run, step)) for step in steps]
        notes.append(_held(run, steps))
        told.append(data)
    data = {"live": False, "runs": told, "comparison": comparison_data(runs)}
    page = render(
        data,
        title=", ".join(run.name for run in runs[:4]),
        blocks=blocks,
        note=_note([note for note in notes if note]),
        commands=commands(runs),
        plain=" ".join(f"{one['name']}: {one['sentence']}" for one in told),
    )
    if out is not None:
        _write(out, page)
    return page


def _steps(run: Run, data: Json, rows: int) -> list[int]:
    """Steps that the page carries whole: those the findings name, then evenly spread."""
    named = [data["onset"], data["first_warning"], *(f["step"] for f in data["findings"])]
    pointed = [one["step"] for f in data["findings"] for one in f["rollouts"]]
    wanted = [int(step) for step in [*pointed, *named] if step is not None]
    if run.token_steps():
        return chosen_steps(run, wanted, rows)
    recorded = sorted({int(step) for step in run.rollouts["step"]}) if len(run.rollouts) else []
    stride = -(-len(recorded) // MORE_STEPS) or 1
    return sorted({*recorded[::stride], *(step for step in wanted if step in recorded)})


def _text(run: Run, step: int) -> str:
    return b64encode(block(step_data(run, step))).decode()


def _note(held: list[str]) -> str:
    if not held:
        return ""
    more = f" and of {len(held) - 2} more runs" if len(held) > 2 else ""
    return (
        f"This page holds tokens and rollouts of {', '.join(held[:2])}{more}; wapo board shows all."
    )


def _held(run: Run, steps: Sequence[int]) -> str:
    recorded = len(run.token_steps()) or run.rollouts["step"].nunique()
    if len(steps) >= recorded:
        return ""
    return f"{len(steps)} of {recorded} recorded steps of {run.name}"


def render(
    data: Json,
    *,
    title: str,
    blocks: Iterable[tuple[str, str]] = (),
    note: str = "",
    commands: Sequence[str] = (),
    plain: str = "",
) -> str:
    """Render the page around its data.

    Parameters
    ----------
    data : dict
        What the page's code starts from: ``live``, ``runs``, ``comparison``.
    title, note, plain : str
        Title; what the page leaves out; the verdict for readers without JavaScript.
    blocks : iterable of (id, text)
        Steps as base64 blocks.
    commands : sequence of str
        Shown at the bottom.
    """
    scripts = [_harmless(script) for script in (*_bokeh(), bundle())]
    told = _harmless_json(data)
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    asked = "'self'" if data["live"] else "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"font-src data:; base-uri 'none'; form-action 'none'; connect-src {asked}"
    )
    safe = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return safe.get_template("page.html").render(
        title=title,
        version=__version__,
        policy=Markup(policy),
        css=Markup((HERE / "page.css").read_text("utf-8")),
        data=Markup(told),
        blocks=[(name, Markup(text)) for name, text in blocks],
        scripts=[Markup(script) for script in scripts],
        note=note,
        commands=commands,
        plain=plain,
    )


@cache
def bundle() -> str:
    """The page's modules as one script: imports and exports are taken out, order is kept."""
    parts = []
    for name in MODULES:
        code = (HERE / f"{name}.mjs").read_text("utf-8")
        code = re.sub(r'(?ms)^import .*?from "\./\w+\.mjs";\n', "", code)
        code = re.sub(r"(?m)^export \{.*\};\n", "", code)
        parts.append(re.sub(r"(?m)^export ", "", code))
    return '(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n"


@cache
def _bokeh() -> tuple[str, ...]:
    """Bokeh's JavaScript, read from its installed wheel without importing it."""
    spec = find_spec("bokeh")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the page draws with Bokeh, which is not installed: pip install bokeh")
    folder = Path(spec.submodule_search_locations[0]) / "server" / "static" / "js"
    try:
        return tuple((folder / f"{n}.min.js").read_text("utf-8") for n in ("bokeh", "bokeh-api"))
    except OSError as error:
        raise UserError(f"Bokeh's JavaScript cannot be read: {error}") from error


def _harmless(script: str) -> str:
    """The script without the one text that would end its element."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--").strip()


def _harmless_json(data: Json) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").encode("utf-8", "backslashreplace").decode()


def _sha256(script: str) -> str:
    return b64encode(hashlib.sha256(script.encode()).digest()).decode()


def commands(runs: Sequence[Run]) -> list[str]:
    """Commands that go on from here."""
    options = [run.manifest.get(OPENED_WITH) or [] for run in runs]
    places = shlex.join([*(place(run) for run in runs), *max(options, key=len)])
    board = [f"wapo board {places}"] if all(place(run) == str(run.path) for run in runs) else []
    return [f"wapo diagnose {places}", *board, f"wapo figures {places}"]


def _check_page(out: Path) -> None:
    """Refuse to write over what is no page of ours, such as the very log that the page is of."""
    try:
        head = b"" if not out.exists() else b"?"
        if out.is_file():
            with out.open("rb") as stream:
                head = stream.read(1024)
    except OSError as error:
        raise UserError(f"cannot write report {out}: {error.strerror}") from error
    if head and _GENERATOR not in head:
        raise UserError(f"{out} exists and is no page of wapo; choose another --out or delete it")


def _write(out: Path, page: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write report {out}: {error.strerror}") from error
