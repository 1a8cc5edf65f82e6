"""The terminal view of a run: header, reward and entropy, classes, verdict. Run in, rich out."""

from collections.abc import Sequence
from time import time

import numpy as np
import wapo_taxonomy as tax
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from wapo_analysis.diagnose import VERDICT_WORDS, Diagnosis
from wapo_analysis.diagnose.band import Band, entropy_band
from wapo_analysis.diagnose.context import Context
from wapo_analysis.errors import printable
from wapo_analysis.store import Run
from wapo_analysis.store.lock import DEAD, ago
from wapo_analysis.watch.chart import Rule, bar, line_chart

LAST_STEPS = 10
CLASS_STYLES = {
    "pos_peak": "#0072B2",
    "pos_valley": "#56B4E9",
    "neg_peak": "#D55E00",
    "neg_valley": "#F0B040",
}
SEVERITY_STYLES = {"critical": "bold red", "warning": "yellow", "info": "dim"}
_LABELS = 22
_MAX_FINDINGS = 4


def render(
    run: Run,
    diagnosis: Diagnosis,
    *,
    width: int,
    written: float | None = None,
    notes: Sequence[str] = (),
    height: int = 7,
    brief: bool = False,
) -> RenderableType:
    """Build the view of a run as it is now.

    Parameters
    ----------
    run : Run
    diagnosis : Diagnosis
        Of the same run.
    width : int
        Columns of the terminal.
    written : float, optional
        Time of the last write, seconds since 1970.
    notes : sequence of str
        One line each, shown at the end.
    height : int
        Rows of each chart.
    brief : bool
        One row for each finding, so that the number of rows stays the same.
    """
    context = Context(run)
    inner = max(width - 4, 40)
    parts: list[RenderableType] = [
        _header(run, written),
        *_reward(context, inner - _LABELS, height),
        *_entropy(context, inner - _LABELS, height),
        *_classes(context, inner),
        *_verdict(diagnosis, brief),
        *(Text(printable(note), "yellow") for note in notes[-3:]),
    ]
    return Panel(Group(*parts), title=Text(f"wapo watch {printable(run.name)}"), title_align="left")


def one_line(run: Run, diagnosis: Diagnosis) -> str:
    """Build the state of a run in one plain line, for logs."""
    context = Context(run)
    steps = context.step_numbers
    shown = [f"step {int(steps[-1])}" if len(steps) else "no step yet"]
    for column, unit in (("reward", ""), ("entropy", " nats")):
        series = context.series(column)
        if len(series):
            shown.append(f"{column} {series.values[-1]:.3g}{unit}")
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
    return text.append(f"  {printable(run.objective)}", "dim")


def _reward(context: Context, width: int, height: int) -> list[RenderableType]:
    series = context.series("reward")
    if not len(series):
        return [Text("\nreward: not recorded", "dim")]
    title = Text(f"\nreward {series.values[-1]:.3g}", "bold")
    title.append(f"  baseline {series.level:.3g}", "dim")
    rules = (Rule(series.level, "dim", "baseline"),)
    chart = line_chart(series.smooth, width=width, height=height, style="green", rules=rules)
    return [title, *chart]


def _entropy(context: Context, width: int, height: int) -> list[RenderableType]:
    series, band = context.series("entropy"), entropy_band(context)
    if band is None:
        return [Text("\nentropy: not recorded", "dim")]
    title = Text(f"\nentropy {series.values[-1]:.3g} nats", "bold")
    title.append(
        f"  baseline {band.level:.3g}; warns outside {max(band.low, 0):.3g} .. {band.high:.3g}",
        "dim",
    )
    chart = line_chart(
        series.smooth,
        width=width,
        height=height,
        style="cyan",
        rules=_band_rules(band),
        safe=(band.low, band.high),
    )
    return [title, *chart]


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
        return [Text(f"\nclasses: {why}", "dim")]
    columns = ["tokens", "grad_mass", "pred_dentropy_sum"]
    sums = recent.astype({"cls": str}).groupby("cls")[columns].sum(min_count=1)
    by_class = sums.reindex(tax.CLASSES).fillna(0.0).to_numpy(np.float64)
    whole = by_class.sum(axis=0)
    size = max((width - 44) // 2, 6)
    table = Table.grid(padding=(0, 1))
    table.add_row("", "tokens", "", "gradient", "", "predicted dH", style="dim")
    for name, (tokens, mass, flow) in zip(tax.CLASSES, by_class.tolist(), strict=True):
        style = CLASS_STYLES[name]
        cells: list[Text] = [Text(f"{name:<10}", style)]
        for value, total in ((tokens, whole[0]), (mass, whole[1])):
            share = value / total if total > 0 else 0.0
            cells += [Text(f"{share:4.0%}"), bar(share, size, style)]
        table.add_row(*cells, f"{flow:+.2g}" if context.has_flow else "n/a")
    window = f"steps {int(last[0])} to {int(last[-1])}"
    return [Text(f"\nclasses, {window}", "bold"), table]


def _verdict(diagnosis: Diagnosis, brief: bool) -> list[RenderableType]:
    calm = diagnosis.verdict in ("healthy", "insufficient_data")
    title = Text("\nverdict: ", "bold")
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
    for finding in diagnosis.findings[:_MAX_FINDINGS]:
        line = Text(no_wrap=brief, overflow="ellipsis" if brief else None)
        line.append(f"{finding.severity} {finding.name}", SEVERITY_STYLES[finding.severity])
        line.append(f" at step {finding.step}: {printable(str(finding.advice))}", "default")
        lines.append(line)
    more = len(diagnosis.findings) - _MAX_FINDINGS
    if more > 0:
        lines.append(Text(f"{more} more: wapo diagnose", "dim"))
    return lines
