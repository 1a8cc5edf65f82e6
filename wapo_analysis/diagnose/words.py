"""Diagnoses as plain text and Markdown."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wapo_analysis.diagnose.result import Culprits, Diagnosis, Driver, Finding, Number

VERDICT_WORDS = {
    "healthy": "healthy",
    "entropy_explosion": "entropy explosion",
    "entropy_collapse": "entropy collapse",
    "reward_collapse": "reward collapse",
    "stalled": "stalled",
    "diverged": "diverged",
    "insufficient_data": "insufficient data",
}


_SPREAD = 0.03
"""Share below which no rollout is worth naming."""


def short(value: "Number") -> str:
    """Three significant digits, in plain notation where that is short."""
    if value is None:
        return "n/a"
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def percent(share: float) -> str:
    """Share as whole percent."""
    return f"{share:.0%}"


def as_text(diagnosis: "Diagnosis") -> str:
    """Plain text for a terminal: verdict, drivers, findings, what was skipped."""
    lines = [f"{diagnosis.run}: {VERDICT_WORDS[diagnosis.verdict]}", f"  {diagnosis.sentence}"]
    if diagnosis.onset_step is not None:
        first = diagnosis.first_warning_step
        noticed = f"; first warning at step {first}" if first is not None else ""
        lines.append(f"  onset at step {diagnosis.onset_step}{noticed}")
    if diagnosis.drivers:
        lines += ["", "  entropy flow by class (predicted, nats per unit learning rate)"]
        lines += [f"    {_driver_row(driver)}" for driver in diagnosis.drivers]
        lines += [f"    {net_words(diagnosis.drivers)}"]
    if diagnosis.culprits:
        lines += ["", f"  {culprit_words(diagnosis.culprits)}"]
    for finding in diagnosis.findings:
        lines += ["", *(f"  {line}" for line in _finding_lines(finding))]
    if diagnosis.skipped:
        lines += ["", "  not available here:"]
        lines += [f"    {s.name}: needs {', '.join(s.missing)}" for s in diagnosis.skipped]
    return "\n".join(lines)


def net_words(drivers: "tuple[Driver, ...]") -> str:
    """What the classes add up to, and that it is a local law."""
    net = sum(driver.predicted_dentropy for driver in drivers)
    return (
        f"{'sum':<11}{net:>+11.3g}  first order, each position for itself; shared parameters can "
        "turn it"
    )


def culprit_words(culprits: "Culprits") -> str:
    """One sentence with tokens, rollouts and their shares."""
    several = len(culprits.steps) > 1
    tokens = ", ".join(f"{text!r} {percent(share)}" for text, share in culprits.tokens)
    rollouts = ", ".join(
        f"{number}{f' of step {step}' if several else ''} {percent(share)}"
        for step, number, share in culprits.rollouts
    )
    parts = [f"tokens {tokens}"] if tokens else []
    if rollouts:
        top = culprits.rollouts[0][2]
        spread = f"spread over many rollouts, none above {top:.1%}"
        parts.append(spread if top < _SPREAD else f"rollouts {rollouts}")
    when = f"step{'s' if several else ''} {', '.join(map(str, culprits.steps))}"
    return f"The {culprits.cls} push at {when}: {'; '.join(parts) or 'unknown tokens'}."


def _driver_row(driver: "Driver") -> str:
    alone = driver.counterfactual_dentropy
    measured = "" if alone is None else f"  alone {alone:+.3g} nats"
    return (
        f"{driver.cls:<11}{driver.predicted_dentropy:>+11.3g}  {driver.share:>+5.0%} "
        f"of the push{measured}"
    )


def _finding_lines(finding: "Finding") -> list[str]:
    numbers = ", ".join(f"{key} {short(value)}" for key, value in finding.evidence.items())
    return [
        f"[{finding.severity}] {finding.name} at step {finding.step}",
        f"  {finding.message}",
        f"  evidence: {numbers}",
        f"  do: {finding.advice}",
        f"  see: {finding.reference}",
    ]


def as_markdown(diagnosis: "Diagnosis") -> str:
    """Markdown with the same content as :func:`as_text`; texts of the run are escaped."""
    lines = [
        f"## {_escaped(diagnosis.run)}: {VERDICT_WORDS[diagnosis.verdict]}",
        "",
        _escaped(diagnosis.sentence),
    ]
    if diagnosis.drivers:
        lines += [
            "",
            "| class | predicted entropy flow | applied alone (nats) | share of the push |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| {d.cls} | {d.predicted_dentropy:+.3g} | {short(d.counterfactual_dentropy)} "
            f"| {percent(d.share)} |"
            for d in diagnosis.drivers
        ]
    if diagnosis.culprits:
        lines += ["", _escaped(culprit_words(diagnosis.culprits))]
    for finding in diagnosis.findings:
        numbers = ", ".join(f"{key} {short(value)}" for key, value in finding.evidence.items())
        lines += [
            "",
            f"- **{finding.severity}: {finding.name}** at step {finding.step}. "
            f"{_escaped(finding.message)} {_escaped(finding.advice)} "
            f"({_escaped(numbers)}; {finding.reference})",
        ]
    if diagnosis.skipped:
        lines += ["", "Not available here:", ""]
        lines += [f"- {s.name}: needs {', '.join(s.missing)}" for s in diagnosis.skipped]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no table cells, no emphasis."""
    for mark in "\\`*<>|#[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")
