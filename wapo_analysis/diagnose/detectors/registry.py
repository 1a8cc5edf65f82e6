"""Detectors register here, each beside its code, with what it reads."""

from collections.abc import Callable
from dataclasses import dataclass

from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.result import Finding, Skipped
from wapo_analysis.store import Need

MIN_STEPS = 8
"""Steps with a number below which nothing but broken numbers is judged."""

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
    """Run every detector that has its data; name those that have not."""
    findings: list[Finding] = []
    skipped: list[Skipped] = []
    for check in DETECTORS:
        missing = check.missing(context)
        if missing:
            skipped.append(Skipped(check.name, missing))
        else:
            findings += check.run(context)
    return findings, skipped
