"""The terminal view of a run: verdict and advice, then curves and classes. Run in, rich out.

Line charts and bars are made of characters. One holds 2 x 4 braille dots, so a chart of w x h
characters has 2w x 4h dots.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from time import time

import numpy as np
import wapo_taxonomy as tax
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from wapo_analysis.diagnose import VERDICT_WORDS, Diagnosis
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.entropy import Band, entropy_band
from wapo_analysis.errors import printable
from wapo_analysis.results import short
from wapo_analysis.series import Series
from wapo_analysis.store import Run
from wapo_analysis.store.lock import DEAD, ago
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


def resampled(values: Array, count: int) -> Array:
    """A series as ``count`` values: means of many steps, or straight lines between few."""
    if len(values) < count:
        return np.interp(np.linspace(0, len(values) - 1, count), np.arange(len(values)), values)
    edges = np.linspace(0, len(values), count + 1).astype(int)
    return np.asarray(np.add.reduceat(values, edges[:-1]) / np.diff(edges))


def line_chart(
    values: Array,
    *,
    width: int,
    height: int,
    style: str,
    rules: Sequence[Rule] = (),
    safe: tuple[float, float] = (-np.inf, np.inf),
) -> list[Text]:
    """Draw n finite values, shape (n,), with levels across them, as ``height`` rows of text.

    ``width`` and ``height`` are characters of the plotting area; labels stand to its right. A rule
    that lies far outside the data is left out, so that it does not flatten them. Outside ``safe``
    the line is bold red.
    """
    drawn = resampled(np.asarray(values, np.float64), 2 * width)
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
    return short(high) if row == 0 else short(low) if row == height - 1 else ""


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


LAST_STEPS = 10
CLASS_STYLES = {
    "pos_peak": "#0072B2",
    "pos_valley": "#56B4E9",
    "neg_peak": "#D55E00",
    "neg_valley": "#F0B040",
}
SEVERITY_STYLES = {"critical": "bold red", "warning": "yellow", "info": "dim"}
KEYS = "?  what the terms mean     q  leave (the run goes on)"
#: What ``?`` shows.
TERMS = (
    ("reward, entropy", "mean over the tokens or rollouts of a step; entropy in nats"),
    ("smoothed", "rolling median over a twentieth of the run, as diagnose judges it"),
    ("baseline", "median of the first steps of this run"),
    ("warns", "beyond this there is a finding; beyond explosion or collapse it is critical"),
    ("peak, valley", "a token more, or less, likely than the draw expects: p >= or < sum of p^2"),
    ("pos, neg", "the sign of the advantage of its rollout"),
    ("gradient", "share of the sum of |dL/dz| over the logits z"),
    ("predicted dH", "first-order change of entropy, nats per unit learning rate"),
)
_LABELS = 22
#: Fewest and most rows of a chart.
_CHART_ROWS = (2, 10)
_USUAL_ROWS = 7
_MAX_FINDINGS = 4


def render(
    run: Run,
    diagnosis: Diagnosis,
    *,
    width: int,
    rows: int | None = None,
    written: float | None = None,
    notes: Sequence[str] = (),
    keys: bool = False,
    explain: bool = False,
) -> RenderableType:
    """Build the view of a run as it is now.

    Verdict and the whole first advice come first; curves, classes and further findings follow as
    far as there is room.

    Parameters
    ----------
    diagnosis : Diagnosis
        Of the same run.
    width : int
        Columns of the terminal.
    rows : int, optional
        Rows of the terminal; None is as many as it takes.
    written : float, optional
        Time of the last write, seconds since 1970.
    notes : sequence of str
        One line each, shown at the end.
    keys : bool
        Say which keys there are.
    explain : bool
        Show what the terms mean in place of the curves.
    """
    inner = max(width - 4, 40)
    context = Context(run)
    first: list[RenderableType] = [_header(run, written), *_verdict(diagnosis)]
    last: list[RenderableType] = [Text(printable(note), "yellow") for note in notes[-3:]]
    last += [Text(KEYS, "dim", no_wrap=True, overflow="ellipsis")] if keys else []
    if explain:
        parts = [*first, *_terms(), *last]
    else:
        used = _rows_of([*first, *last], inner) + 2
        free = None if rows is None else max(rows - used - 1, 0)  # a row for the prompt below
        parts = [*first, *_more(context, diagnosis, inner, free), *last]
    return Panel(Group(*parts), title=Text(f"wapo watch {printable(run.name)}"), title_align="left")


def _rows_of(parts: Sequence[RenderableType], width: int) -> int:
    console = Console(width=width, file=io.StringIO())
    return len(console.render_lines(Group(*parts)))


def _more(
    context: Context, diagnosis: Diagnosis, width: int, free: int | None
) -> list[RenderableType]:
    """Curves, classes and further findings, in this order, as far as the rows go."""
    found = {"entropy": _entropy(context), "reward": _reward(context)}
    curves = [curve for curve in found.values() if curve is not None]
    absent = [Text(f"{name}: not recorded", "dim") for name in found if found[name] is None]
    rest: list[list[RenderableType]] = [
        [*absent],
        _classes(context, width),
        _findings(diagnosis, brief=free is not None),
    ]
    if free is None:
        return [
            *(part for curve in curves for part in curve.drawn(width - _LABELS, _USUAL_ROWS)),
            *(line for part in rest for line in part),
        ]
    least = _CHART_ROWS[0] + 2
    shown = curves[: free // least]
    free -= least * len(shown)
    kept: list[RenderableType] = []
    for part in rest:
        if (size := _rows_of(part, width)) <= free:
            kept += part
            free -= size
    grown = free // len(shown) if shown else 0
    height = min(_CHART_ROWS[0] + grown, _CHART_ROWS[1])
    return [*(line for curve in shown for line in curve.drawn(width - _LABELS, height)), *kept]


def _terms() -> list[RenderableType]:
    table = Table.grid(padding=(0, 2))
    for name, text in TERMS:
        table.add_row(Text(name, "bold"), text)
    return [Text(), table]


def one_line(run: Run, diagnosis: Diagnosis) -> str:
    """Build the state of a run in one plain line, for logs; values smoothed as in the view."""
    context = Context(run)
    steps = context.step_numbers
    shown = [f"step {int(steps[-1])}" if len(steps) else "no step yet"]
    values = []
    for column, unit in (("reward", ""), ("entropy", " nats")):
        series = context.series(column)
        if len(series):
            values.append(f"{column} {short(series.smooth[-1])}{unit}")
    shown += [f"{', '.join(values)} (smoothed)"] if values else []
    shown += [VERDICT_WORDS[diagnosis.verdict], *([DEAD] if run.status == DEAD else [])]
    return f"{printable(run.name)}: {', '.join(shown)}"


def _header(run: Run, written: float | None) -> Text:
    status = printable(run.status)
    steps = run.steps
    total = run.manifest.planned_steps or run.manifest.config.get("steps")
    done = int(steps["step"].iloc[-1]) if len(steps) else 0
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(status, "green" if status in ("running", "finished") else "bold red")
    text.append(f"  step {done}" + (f" of {total}" if isinstance(total, int) else ""))
    seconds = steps["seconds"].tail(LAST_STEPS).astype(float).mean() if len(steps) else np.nan
    if np.isfinite(seconds):
        text.append(f"  {seconds:.3g} s a step")
    if status in ("running", DEAD) and written is not None:
        text.append(f"  last written {ago(time() - written)} ago")
    known = run.manifest.objective.get("name")
    return text.append(f"  {printable(run.objective)}", "dim") if known else text


@dataclass(frozen=True)
class _Curve:
    """A column over the steps: its title, and what its chart shows."""

    title: Text
    series: Series
    style: str
    rules: tuple[Rule, ...]
    safe: tuple[float, float] = (-np.inf, np.inf)

    def drawn(self, width: int, height: int) -> list[RenderableType]:
        """Title, chart and step axis: ``height`` + 2 rows."""
        chart = line_chart(
            self.series.smooth, width=width, height=height, style=self.style, rules=self.rules,
            safe=self.safe,
        )  # fmt: skip
        first, last = (f"{int(self.series.steps[end])}" for end in (0, -1))
        axis = Text(f"step {first}{last.rjust(max(width - 5 - len(first), 1))}", "dim")
        return [self.title, *chart, axis]


def _reward(context: Context) -> _Curve | None:
    series = context.series("reward")
    if not len(series):
        return None
    title = Text(f"reward {short(series.smooth[-1])}", "bold", no_wrap=True, overflow="ellipsis")
    title.append(f" (smoothed)  baseline {short(series.level)}", "dim")
    return _Curve(title, series, "green", (Rule(series.level, "dim", "baseline"),))


def _entropy(context: Context) -> _Curve | None:
    series, band = context.series("entropy"), entropy_band(context)
    if band is None:
        return None
    title = Text(f"entropy {series.smooth[-1]:.3g} nats", "bold", no_wrap=True, overflow="ellipsis")
    title.append(
        f" (smoothed)  baseline {band.level:.3g}; warns outside {max(band.low, 0):.3g} .. "
        f"{band.high:.3g}",
        "dim",
    )
    return _Curve(title, series, "cyan", _band_rules(band), (band.low, band.high))


def _band_rules(band: Band) -> tuple[Rule, ...]:
    levels = (
        Rule(band.level, "dim", "baseline"),
        Rule(band.lowest, "red", "collapse"),
        Rule(band.highest, "red", "explosion"),
        Rule(band.low, "yellow", "warns"),
        Rule(band.high, "yellow", "warns"),
    )
    return tuple(rule for rule in levels if rule.value > 0)


def _classes(context: Context, width: int) -> list[RenderableType]:
    """Shares of tokens and of gradient mass, and the predicted dH, over the last steps."""
    totals = context.run.classes
    last = np.sort(totals["step"].unique())[-LAST_STEPS:]
    recent = totals[totals["step"].isin(last) & totals["cls"].isin(tax.CLASSES)]
    if recent.empty:
        names = totals.loc[totals["step"].isin(last), "cls"]
        idle = len(names) and names.eq(tax.NONE).all()
        why = "every advantage is zero" if idle else "no token statistics were recorded"
        return [Text(f"classes: {why}", "dim")]
    columns = ["tokens", "grad_mass", "pred_dentropy_sum"]
    sums = recent.astype({"cls": str}).groupby("cls")[columns].sum(min_count=1)
    by_class = sums.reindex(tax.CLASSES).fillna(0.0).to_numpy(np.float64)
    whole = by_class.sum(axis=0)
    size = max((width - 44) // 2, 6)
    table = Table.grid(padding=(0, 1))
    table.add_row("", "tokens", "", "gradient", "", "predicted dH", style="dim")
    for name, (tokens, mass, predicted) in zip(tax.CLASSES, by_class.tolist(), strict=True):
        style = CLASS_STYLES[name]
        cells: list[Text] = [Text(f"{name:<10}", style)]
        for value, total in ((tokens, whole[0]), (mass, whole[1])):
            share = value / total if total > 0 else 0.0
            cells += [Text(f"{share:4.0%}"), bar(share, size, style)]
        table.add_row(*cells, f"{predicted:+.2g}" if context.has_prediction else "n/a")
    window = f"steps {int(last[0])} to {int(last[-1])}"
    return [Text(f"classes, {window}", "bold"), table]


def _verdict(diagnosis: Diagnosis) -> list[RenderableType]:
    """Verdict, since when, driven by what, and the whole first advice with its command."""
    calm = diagnosis.verdict in ("healthy", "insufficient_data")
    title = Text("verdict: ", "bold")
    title.append(VERDICT_WORDS[diagnosis.verdict], "bold green" if calm else "bold red")
    if diagnosis.onset_step is not None:
        title.append(f" since step {diagnosis.onset_step}")
    if diagnosis.drivers:
        driver = diagnosis.drivers[0]
        title.append("  driver: ")
        title.append(driver.cls, CLASS_STYLES.get(driver.cls, ""))
        title.append(f" ({driver.share:.0%} of the predicted dH)")
    lines: list[RenderableType] = [title, Text(printable(diagnosis.sentence))]
    if diagnosis.culprits:
        lines.append(Text(printable(diagnosis.culprits.words())))
    if diagnosis.findings:
        lines += _advice(diagnosis)
    return lines


def _advice(diagnosis: Diagnosis) -> list[RenderableType]:
    finding = diagnosis.findings[0]
    line = Text()
    if diagnosis.onset_step is None:  # else the verdict has said it
        line.append(f"{finding.severity} {finding.name}", SEVERITY_STYLES[finding.severity])
        line.append(f" at step {finding.step}. ")
    line.append("do: ", "bold").append(printable(finding.advice.text))
    steps = [
        Text(printable(f"{number}. {step.text}"))
        for number, step in enumerate(finding.advice.steps, start=1)
    ]
    test = [Text(f"test it: {printable(diagnosis.command)}")] if diagnosis.command else []
    return [line, *steps, *test]


def _findings(diagnosis: Diagnosis, brief: bool) -> list[RenderableType]:
    """The findings after the first, a row each if ``brief``."""
    lines: list[RenderableType] = []
    for finding in diagnosis.findings[1:_MAX_FINDINGS]:
        line = Text(no_wrap=brief, overflow="ellipsis" if brief else None)
        line.append(f"{finding.severity} {finding.name}", SEVERITY_STYLES[finding.severity])
        line.append(f" at step {finding.step}: {printable(str(finding.advice))}", "default")
        lines.append(line)
    more = len(diagnosis.findings) - _MAX_FINDINGS
    if more > 0:
        lines.append(Text(f"{more} more: wapo diagnose", "dim"))
    return lines
