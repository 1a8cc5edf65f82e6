"""Every detector with the data it needs; a new one is a function and a line here."""

from collections.abc import Callable
from dataclasses import dataclass

from wapo_analysis.diagnose import health, numerics, policy
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.result import Finding, Skipped

MIN_STEPS = 8
"""Steps with a number below which nothing but broken numbers is judged."""


@dataclass(frozen=True, slots=True)
class Detector:
    """One check.

    Attributes
    ----------
    name : str
        What it looks for.
    find : callable
        Context to findings.
    needs : tuple of str
        Step columns that must all hold numbers.
    needs_any : tuple of str
        Step columns of which one must.
    needs_flow : bool
        It reads the predicted entropy flow of the class totals.
    min_steps : int
        Steps that each needed column must cover.
    """

    name: str
    find: Callable[[Context], list[Finding]]
    needs: tuple[str, ...] = ()
    needs_any: tuple[str, ...] = ()
    needs_flow: bool = False
    min_steps: int = MIN_STEPS

    def missing(self, context: Context) -> tuple[str, ...]:
        """Columns without which it cannot judge this run."""
        absent = context.missing(self.needs)
        any_absent = context.missing(self.needs_any)
        if self.needs_any and len(any_absent) == len(self.needs_any):
            absent += (" or ".join(any_absent),)
        if self.needs_flow and not context.has_flow:
            absent += ("classes.pred_dentropy_sum",)
        return absent

    def run(self, context: Context) -> list[Finding]:
        """Findings, none if the run is too short to judge."""
        if any(len(context.series(name)) < self.min_steps for name in self.needs):
            return []
        return self.find(context)


DETECTORS: tuple[Detector, ...] = (
    Detector("nonfinite", numerics.find_nonfinite, needs_any=numerics.WATCHED, min_steps=0),
    Detector("entropy_explosion", policy.find_entropy_rise, needs=("entropy",)),
    Detector("entropy_collapse", policy.find_entropy_fall, needs=("entropy",)),
    Detector("reward_collapse", policy.find_reward_loss, needs=("reward",)),
    Detector(
        "stalled",
        policy.find_stall,
        needs=("reward",),
        needs_any=("groups_all_wrong", "grad_norm"),
    ),
    Detector("gradient_spikes", numerics.find_gradient_spikes, needs=("grad_norm",)),
    Detector("zero_signal_too_hard", health.find_too_hard, needs=("groups_all_wrong",)),
    Detector("zero_signal_too_easy", health.find_too_easy, needs=("groups_all_right",)),
    Detector("truncation_drift", health.find_truncation, needs=("truncated",)),
    Detector("repetition_drift", health.find_repetition, needs=("repetition",)),
    Detector("clip_saturation_low", health.find_clip_low, needs=("clip_low",)),
    Detector("clip_saturation_high", health.find_clip_high, needs=("clip_high",)),
    Detector("one_class_dominates", health.find_dominance, needs_flow=True),
)


def run_detectors(context: Context) -> tuple[list[Finding], list[Skipped]]:
    """Run every detector that has its data; name those that have not."""
    findings: list[Finding] = []
    skipped: list[Skipped] = []
    for detector in DETECTORS:
        missing = detector.missing(context)
        if missing:
            skipped.append(Skipped(detector.name, missing))
        else:
            findings += detector.run(context)
    return findings, skipped
