"""Detectors, one file a family, register here; and the condition that lasts, which many share.

A function of any file of this folder that registers itself is a detector.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from wapo_analysis.diagnose.advice import Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.result import Finding, Number, Severity, Skipped
from wapo_analysis.errors import UserError
from wapo_analysis.results import percent, short
from wapo_analysis.series import Series, episodes
from wapo_analysis.store import Need
from wapo_analysis.table import Array

#: Steps with a number below which nothing but broken numbers is judged.
MIN_STEPS = 8

FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
#: Whether a check's own fault ends the diagnosis; tests set it, users get the other checks.
FAULTS_RAISE = False

log = logging.getLogger(__name__)
Find = Callable[[Context], list[Finding]]


@dataclass(frozen=True, slots=True)
class Detector:
    """One check.

    Attributes
    ----------
    name : str
        What it looks for.
    find : callable
        Context to findings.
    needs : tuple of Need
        What it reads, all of it.
    min_steps : int
        Steps that each needed step column must cover.
    """

    name: str
    find: Find
    needs: tuple[Need, ...]
    min_steps: int

    def missing(self, context: Context) -> tuple[str, ...]:
        """Needs without which it cannot judge this run."""
        return tuple(str(need) for need in self.needs if context.run.lacks(need))

    def run(self, context: Context) -> list[Finding]:
        """Findings, none if the run is too short to judge."""
        if any(self._short(context, need) for need in self.needs):
            return []
        return self.find(context)

    def _short(self, context: Context, need: Need) -> bool:
        alone = need.table == "steps" and not need.others and "*" not in need.column
        return alone and len(context.series(need.column)) < self.min_steps


DETECTORS: list[Detector] = []


def detector(name: str, *needs: Need, min_steps: int = MIN_STEPS) -> Callable[[Find], Find]:
    """Make a function a detector, which every diagnosis of a run with its data then calls."""

    def add(find: Find) -> Find:
        DETECTORS.append(Detector(name, find, needs, min_steps))
        return find

    return add


def run_detectors(context: Context) -> tuple[list[Finding], list[Skipped]]:
    """Run every detector that has its data; name those that have not, or that fail."""
    findings: list[Finding] = []
    skipped: list[Skipped] = []
    for check in DETECTORS:
        missing = check.missing(context)
        try:
            findings += [] if missing else check.run(context)
        except UserError:
            raise
        except FAULTS as error:
            if FAULTS_RAISE:
                raise
            missing = (f"a repair of the check ({type(error).__name__}: {error})",)
            log.warning("the check %r failed (%s); all others were made", check.name, error)
        if missing:
            skipped.append(Skipped(check.name, missing))
    return findings, skipped


LEVEL_SIGMAS = 6.0
MOST_RISE = 0.5


def lasting(series: Series, mask: Array) -> int | None:
    """Index at which a condition that lasts to the end of the series began, None if none does.

    ``series``: the series; its ``persist`` says how many steps count as lasting; ``mask`` (n,): the
    condition per step.
    """
    found = episodes(mask, series.persist)
    return found[-1][0] if found and found[-1][1] == len(series) else None


def risen(series: Series, least: float, absolute: float) -> int | None:
    """Index from which a share is above its own baseline, or high in itself, to the end.

    Parameters
    ----------
    series : Series
        A share in [0, 1].
    least : float
        Rise above the baseline that counts; six times the noise if that is more, half at most: a
        jump is noise to itself.
    absolute : float
        Level that counts wherever it began, if it is more than twice the rise that counts.
    """
    rise = max(least, min(LEVEL_SIGMAS * series.smooth_noise, MOST_RISE))
    return lasting(series, series.smooth >= min(series.level + rise, max(absolute, 2 * rise)))


def level_finding(
    series: Series,
    begin: int | None,
    *,
    name: str,
    severity: Severity,
    what: str,
    advice: Advice,
    reference: str,
    share: bool = True,
    evidence: Mapping[str, Number] | None = None,
) -> list[Finding]:
    """One finding on a level that lasts to the end; none if it never began.

    Parameters
    ----------
    series : Series
        What is judged.
    begin : int or None
        Index it began at.
    what : str
        Beginning of the sentence, up to "from step".
    share : bool
        Show the level in percent.
    evidence : mapping, optional
        Numbers beside ``start`` and ``end``.
    """
    if begin is None:
        return []
    step, shown = series.step(begin), percent if share else short
    return [
        Finding(
            name=name,
            severity=severity,
            step=step,
            message=f"{what} from step {step} on ({shown(series.level)} at first, "
            f"{shown(series.end)} at the end).",
            evidence={"start": series.level, "end": series.end, **(evidence or {})},
            advice=advice,
            reference=reference,
        )
    ]


for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")
