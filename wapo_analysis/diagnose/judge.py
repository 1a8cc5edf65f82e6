"""The verdict on a run: the gravest critical finding, its onset, and the classes that drive it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from wapo_analysis.diagnose.advice import in_names_of
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.culprits import find_culprits
from wapo_analysis.diagnose.detectors import run_detectors
from wapo_analysis.diagnose.detectors.forecast import EARLY, TREND_WINDOW
from wapo_analysis.diagnose.detectors.registry import MIN_STEPS
from wapo_analysis.diagnose.drivers import entropy_drivers
from wapo_analysis.diagnose.result import (
    SEVERITIES,
    Culprits,
    Diagnosis,
    Driver,
    Finding,
    Skipped,
    Verdict,
)
from wapo_analysis.store import Run

GRAVEST_FIRST: tuple[Verdict, ...] = (
    "diverged",
    "entropy_explosion",
    "entropy_collapse",
    "reward_collapse",
    "stalled",
)
SAID_BY = {
    "stalled": {
        "zero_signal", "zero_signal_too_hard", "zero_signal_too_easy", "gradient_vanishes",
        "plateau", "reward_function_silent", "one_reward_takes_over",
    },
    "diverged": {"gradient_grows", "gradient_spikes", "plateau"},
    "reward_collapse": {
        "plateau", "stalled", "gradient_vanishes",
        "zero_signal", "zero_signal_too_hard", "zero_signal_too_easy",
    },
    "entropy_collapse": {"plateau", "entropy_arrival", "early_warning"},
    "entropy_explosion": {"plateau", "entropy_arrival", "early_warning"},
    "truncation_drift": {"length_drift"},
}  # fmt: skip
"""Finding to those that say the same once more, as its cause or its effect, and are left out."""
AGAINST = (
    "All classes pushed the entropy {}, yet it {}: momentum, shared parameters or the size of the "
    "steps outweighed the law of the first order (probe_every tells which)."
)
DIRECTION = {"entropy_explosion": 1, "entropy_collapse": -1}


def diagnose(run: Run) -> Diagnosis:
    """Judge a run, finished or still being written, against its own beginning.

    Parameters
    ----------
    run : Run
        An open run. Any column may be missing: what cannot be judged is listed as skipped.

    Returns
    -------
    Diagnosis
        Verdict, onset, drivers (first-order entropy flow in nats per unit learning rate, formula in
        taxonomy/README.md), findings and skipped checks. Cost is linear in the number of steps.

    Raises
    ------
    UserError
        If a file of the run is broken; the message names it.

    Notes
    -----
    The verdict is the gravest critical finding, in the order diverged, entropy_explosion,
    entropy_collapse, reward_collapse, stalled. With fewer than ``MIN_STEPS`` steps of entropy and
    of reward, and nothing critical, it is insufficient_data.
    """
    context = Context(run)
    found, skipped = run_detectors(context)
    source = run.manifest.source
    findings = _said_once([replace(f, advice=in_names_of(source, f.advice)) for f in found])
    critical = {f.name: f for f in findings if f.severity == "critical"}
    verdict = next((name for name in GRAVEST_FIRST if name in critical), None)
    main = critical[verdict] if verdict else None
    known = max(len(context.series(name)) for name in ("entropy", "reward"))
    fallback: Verdict = "healthy" if known >= MIN_STEPS else "insufficient_data"
    drivers, note = _drivers(context, main)
    if not context.has_flow:
        skipped.append(Skipped("drivers", ("classes.pred_dentropy_sum",)))
    warned = [f.warned if f.warned is not None else f.step for f in found if _warns(f)]
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
    )


def _drivers(context: Context, main: Finding | None) -> tuple[tuple[Driver, ...], str]:
    """Drivers over the departure that led to the verdict, else over the whole run, and a remark.

    Where no class pushes the way the entropy went, they are ranked by the push they do have.
    """
    first, last, way = None, None, _way(context)
    if main is not None and main.name != "stalled":
        first, last = main.step, main.step if main.name == "diverged" else main.until
        way = DIRECTION.get(main.name, way)
    drivers = entropy_drivers(context, first, last, way)
    if drivers or not (drivers := entropy_drivers(context, first, last, 0)) or main is None:
        return drivers, ""
    return drivers, " " + AGAINST.format(*(("down", "rose") if way > 0 else ("up", "fell")))


def _culprits(
    context: Context, drivers: Sequence[Driver], main: Finding | None, findings: Sequence[Finding]
) -> Culprits | None:
    """What pushed before the verdict, or, while there is none, before an early warning."""
    if main is not None:
        if main.name in ("stalled", "diverged") or not drivers:
            return None
        last = main.step if main.until is None else main.until
        way = int(np.sign(drivers[0].predicted_dentropy))
        return find_culprits(context.run, main.name, drivers[0].cls, main.step, last, way)
    early = next((f for f in findings if f.name == EARLY), None)
    if early is None or "class" not in early.evidence or not early.evidence["flow_agrees"]:
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
    """How many records, and how many steps they cover where these are more."""
    numbers = context.step_numbers
    records = len(numbers)
    steps = int(numbers[-1] - numbers[0]) + 1 if records else 0
    spacing = int(np.median(np.diff(numbers))) if records > 1 else 1
    if steps > records and spacing > 1:
        return f"{records} records covering {steps - 1 + spacing} steps"
    return f"{records} {'step' if records == 1 else 'steps'}"


def _calm_sentence(context: Context, verdict: Verdict, findings: list[Finding]) -> str:
    """What happened where nothing critical did."""
    span = _span(context)
    if verdict == "insufficient_data":
        return f"Only {span}; a verdict needs at least {MIN_STEPS} with entropy or reward."
    entropy, reward = context.series("entropy"), context.reward
    parts = [
        f"entropy went from {entropy.level:.3g} to {entropy.end:.3g} nats" if len(entropy) else "",
        reward.words() if reward is not None else "",
    ]
    said = "; ".join(part for part in parts if part)
    warnings = sum(_warns(f) for f in findings)
    noted = f" {warnings} {'warning' if warnings == 1 else 'warnings'} below." if warnings else ""
    return f"{said[:1].upper()}{said[1:]} over {span}; no collapse seen.{noted}"
