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
    source = run.manifest.get("source")
    findings = [replace(f, advice=in_names_of(source, f.advice)) for f in found]
    critical = {f.name: f for f in findings if f.severity == "critical"}
    verdict = next((name for name in GRAVEST_FIRST if name in critical), None)
    main = critical[verdict] if verdict else None
    known = max(len(context.series(name)) for name in ("entropy", "reward"))
    fallback: Verdict = "healthy" if known >= MIN_STEPS else "insufficient_data"
    drivers, note = _drivers(context, main)
    if not context.has_flow:
        skipped.append(Skipped("drivers", ("classes.pred_dentropy_sum",)))
    warned = [f.warned if f.warned is not None else f.step for f in findings if _warns(f)]
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


def _way(context: Context) -> int:
    """Direction the entropy took over the run: 1, -1, or 0 if it is unknown or did not move."""
    entropy = context.series("entropy")
    return int(np.sign(entropy.end - entropy.level)) if len(entropy) else 0


def _warns(finding: Finding) -> bool:
    return finding.severity != "info"


def _rank(finding: Finding) -> tuple[int, int, str]:
    return -SEVERITIES.index(finding.severity), finding.step, finding.name


def _calm_sentence(context: Context, verdict: Verdict, findings: list[Finding]) -> str:
    """What happened where nothing critical did."""
    steps = len(context.step_numbers)
    if verdict == "insufficient_data":
        return (
            f"Only {steps} {'step' if steps == 1 else 'steps'}; a verdict needs at least "
            f"{MIN_STEPS} with entropy or reward."
        )
    entropy, reward = context.series("entropy"), context.reward
    parts = [
        f"entropy went from {entropy.level:.3g} to {entropy.end:.3g} nats" if len(entropy) else "",
        reward.words() if reward is not None else "",
    ]
    said = "; ".join(part for part in parts if part)
    warnings = sum(_warns(f) for f in findings)
    noted = f" {warnings} {'warning' if warnings == 1 else 'warnings'} below." if warnings else ""
    return f"{said[:1].upper()}{said[1:]} over {steps} steps; no collapse seen.{noted}"
