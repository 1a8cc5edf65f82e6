"""From a run to a verdict, the classes that drive it, and findings with advice.

>>> from wapo_analysis import open_run
>>> from wapo_analysis.diagnose import diagnose
>>> print(diagnose(open_run("runs/demo/grpo-0")).to_text())  # doctest: +SKIP
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from wapo_analysis.diagnose.advice import Advice, Situation, fork_command
from wapo_analysis.diagnose.context import Context, entropy_drivers
from wapo_analysis.diagnose.detectors import DETECTORS, MIN_STEPS, Detector, run_detectors
from wapo_analysis.diagnose.detectors.forecast import EARLY, TREND_WINDOW
from wapo_analysis.diagnose.detectors.reward import find_confirmed_loss
from wapo_analysis.diagnose.detectors.update import LARGE_STEPS
from wapo_analysis.diagnose.result import (
    SEVERITIES,
    VERDICT_WORDS,
    Culprits,
    Diagnosis,
    Driver,
    Finding,
    Skipped,
    Verdict,
)
from wapo_analysis.diagnose.samples import find_culprits
from wapo_analysis.errors import counted
from wapo_analysis.store import Run

__all__ = [
    "DETECTORS",
    "SEVERITIES",
    "VERDICT_WORDS",
    "Advice",
    "Culprits",
    "Detector",
    "Diagnosis",
    "Driver",
    "Finding",
    "Skipped",
    "diagnose",
]


MOST_SEVERE_FIRST: tuple[Verdict, ...] = (
    "diverged",
    "entropy_explosion",
    "entropy_collapse",
    "reward_collapse",
    "reward_without_answer",
    "stalled",
)
#: Finding to those that say the same once more, as its cause or its effect, and are left out.
SAID_BY = {
    "stalled": {
        "advantages_vanish", "zero_signal", "zero_signal_too_hard", "zero_signal_too_easy",
        "gradient_vanishes", "plateau", "reward_function_silent", "one_reward_takes_over",
        "reward_silent",
    },
    "diverged": {"gradient_grows", "gradient_spikes", "plateau"},
    "reward_collapse": {
        "plateau", "stalled", "gradient_vanishes", "advantages_vanish",
        "zero_signal", "zero_signal_too_hard", "zero_signal_too_easy",
    },
    "entropy_collapse": {"plateau", "entropy_arrival", "early_warning"},
    "entropy_explosion": {"plateau", "entropy_arrival", "early_warning"},
    "truncation_drift": {"length_drift"},
}  # fmt: skip
AGAINST = (
    "All classes predict a {} of the entropy (first-order), yet it {}: momentum, shared parameters "
    "or the size of the steps outweigh it (probes tell which: probe_every)."
)
DIRECTION = {"entropy_explosion": 1, "entropy_collapse": -1}


def diagnose(run: Run) -> Diagnosis:
    """Judge a run, finished or still being written, against its own baseline.

    Parameters
    ----------
    run : Run
        An open run. Any column may be missing: what cannot be judged is listed as skipped.

    Returns
    -------
    Diagnosis
        Verdict, onset, drivers (predicted dH in nats per unit learning rate, formula in
        taxonomy/README.md), findings with advice, and skipped checks. Cost is linear in the steps.

    Raises
    ------
    UserError
        If a file of the run is broken; the message names it.

    Notes
    -----
    The verdict is the most severe critical finding, in the order diverged, entropy_explosion,
    entropy_collapse, reward_collapse, reward_without_answer, stalled. With fewer than ``MIN_STEPS``
    steps of entropy and of reward, and nothing critical, it is insufficient_data.
    """
    context = Context(run)
    found, skipped = run_detectors(context)
    found = find_confirmed_loss(context, found)
    findings = _said_once(found)
    critical = {f.name: f for f in findings if f.severity == "critical"}
    verdict = next((name for name in MOST_SEVERE_FIRST if name in critical), None)
    main = critical[verdict] if verdict else None
    known = max(len(context.series(name)) for name in ("entropy", "reward"))
    fallback: Verdict = "healthy" if known >= MIN_STEPS else "insufficient_data"
    drivers, note = _drivers(context, main)
    if not context.has_prediction:
        skipped.append(Skipped("drivers", ("classes.pred_dentropy_sum",)))
    warned = [f.warned if f.warned is not None else f.step for f in found if _warns(f)]
    reward = context.reward
    findings, main, command = _advised(context, found, findings, main, drivers)
    return Diagnosis(
        run=run.name,
        verdict=verdict or fallback,
        onset_step=main.step if main else None,
        first_warning_step=min(warned, default=None),
        drivers=drivers,
        culprits=_culprits(context, drivers, main, findings),
        findings=tuple(sorted(findings, key=lambda f: (f is not main, *_rank(f)))),
        skipped=tuple(skipped),
        sentence=(main.message if main else _calm_sentence(context, fallback, findings)) + note,
        best_step=reward.best_step if reward is not None else None,
        best_checkpoint=_best_checkpoint(context, main),
        best_words=_best_words(context, main),
        command=command,
    )


def _best_words(context: Context, main: Finding | None) -> str:
    """When the reward was best, and which checkpoint earned most; empty without a reward."""
    reward, saved = context.reward, _best_checkpoint(context, main)
    if reward is None:
        return ""
    said = f"The reward was best at step {reward.best_step} ({reward.best:.2f})."
    if saved is not None:
        return f"{said} Best checkpoint: {saved} (reward {context.earned_by(saved):.2f})."
    if main is not None and context.best_checkpoint() is not None:
        return f"{said} No checkpoint is from before step {main.step}."
    return said


def _best_checkpoint(context: Context, main: Finding | None) -> int | None:
    """Step of the checkpoint that earned most, of those from before the failure."""
    return context.best_checkpoint(None if main is None else main.step)


def _advised(
    context: Context,
    found: Sequence[Finding],
    findings: Sequence[Finding],
    main: Finding | None,
    drivers: Sequence[Driver],
) -> tuple[list[Finding], Finding | None, str | None]:
    """Findings with what applies of their advice, and the command that tests the first remedy."""
    situation = _situation(context, found, main, drivers)
    told: list[Finding] = []
    command = None
    for finding in findings:
        advice = situation.told(finding.advice, remark=not _warns(finding))
        if finding is main:
            advice, command = _to_test(context, advice, finding)
        told.append(replace(finding, advice=advice))
    again = next((f for f in told if main is not None and f.name == main.name), None)
    return told, again, command


def _situation(
    context: Context, found: Sequence[Finding], main: Finding | None, drivers: Sequence[Driver]
) -> Situation:
    """The run's situation; its steps are too large if a finding or the drivers say so."""
    way = DIRECTION.get(main.name, 0) if main is not None else 0
    against = way * sum(driver.predicted_dentropy for driver in drivers) < 0
    large = against or any(finding.name in {*LARGE_STEPS, "diverged"} for finding in found)
    facts = context.situation.facts | ({"large_steps"} if large else set())
    return replace(context.situation, facts=facts)


def _to_test(context: Context, advice: Advice, main: Finding) -> tuple[Advice, str | None]:
    """Advice of the verdict, and the command that tests it or else where to go back to."""
    if main.name == "stalled":
        return advice, None
    run, command = context.run, None
    if run.manifest.source == "built-in":
        remedy = next((step.change for step in advice.steps if step.change), {})
        at = context.checkpoint_before(main.step) or 0  # without one it repeats the run from 0
        command = fork_command(str(run.path), at, remedy, run.manifest.config)
    if command is not None:
        return advice, command
    back = context.situation.told(context.go_back(main.step))
    return replace(advice, steps=(back, *advice.steps)), None


def _drivers(context: Context, main: Finding | None) -> tuple[tuple[Driver, ...], str]:
    """Drivers over the departure that led to the verdict, else over the whole run, and a remark.

    Where no class predicts the way the entropy went, they are ranked by what they do predict.
    """
    first, last, way = None, None, _way(context)
    if main is not None and main.name != "stalled":
        first, last = main.step, main.step if main.name == "diverged" else main.until
        way = DIRECTION.get(main.name, way)
    drivers = entropy_drivers(context, first, last, way)
    if drivers or not (drivers := entropy_drivers(context, first, last, 0)) or main is None:
        return drivers, ""
    return drivers, " " + AGAINST.format(*(("fall", "rose") if way == 1 else ("rise", "fell")))


def _culprits(
    context: Context, drivers: Sequence[Driver], main: Finding | None, findings: Sequence[Finding]
) -> Culprits | None:
    """What stands behind the verdict, or, while there is none, before an early warning."""
    if main is not None:
        if main.name in ("stalled", "diverged") or not drivers:
            return None
        last = main.step if main.until is None else main.until
        way = int(np.sign(drivers[0].predicted_dentropy))
        return find_culprits(context.run, main.name, drivers[0].cls, main.step, last, way)
    early = next((f for f in findings if f.name == EARLY), None)
    if early is None or "class" not in early.evidence or not early.evidence["prediction_agrees"]:
        return None
    way = 1 if early.evidence["direction"] == "up" else -1
    cls, first = str(early.evidence["class"]), early.step - TREND_WINDOW + 1
    return find_culprits(context.run, early.name, cls, first, early.step, way)


def _said_once(findings: Sequence[Finding]) -> list[Finding]:
    """Findings without those that another one says already: one cause is told once."""
    names = {finding.name for finding in findings}
    said = set().union(*(SAID_BY.get(name, ()) for name in names))
    return [finding for finding in findings if finding.name not in said]


def _way(context: Context) -> int:
    """Direction the entropy took over the run: 1, -1, or 0 if it is unknown or did not move."""
    entropy = context.series("entropy")
    return int(np.sign(entropy.end - entropy.level)) if len(entropy) else 0


def _warns(finding: Finding) -> bool:
    return finding.severity != "info"


def _rank(finding: Finding) -> tuple[int, int, str]:
    return -SEVERITIES.index(finding.severity), finding.step, finding.name


def _span(context: Context) -> str:
    """How many records, and from which step to which where these are further apart."""
    numbers = context.step_numbers
    records = len(numbers)
    if records > 1 and np.median(np.diff(numbers)) >= 2:
        return f"{records} records from step {numbers[0]} to {numbers[-1]}"
    return counted(records, "step")


def _calm_sentence(context: Context, verdict: Verdict, findings: list[Finding]) -> str:
    """What happened where nothing critical did."""
    span = _span(context)
    if verdict == "insufficient_data":
        if not len(context.series("entropy")) and context.reward is None:
            return f"None of {span} has entropy or reward; a verdict needs at least {MIN_STEPS}."
        return f"Only {span}; a verdict needs at least {MIN_STEPS} with entropy or reward."
    entropy, reward = context.series("entropy"), context.reward
    parts = [
        f"entropy went from {entropy.level:.3g} to {entropy.end:.3g} nats" if len(entropy) else "",
        reward.words() if reward is not None else "",
    ]
    said = "; ".join(part for part in parts if part)
    warnings = sum(_warns(f) for f in findings)
    noted = f" {counted(warnings, 'warning')} below." if warnings else ""
    return f"{said[:1].upper()}{said[1:]} over {span}; no collapse seen.{noted}"
