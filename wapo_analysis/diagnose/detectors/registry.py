"""Every detector with the data it needs; a new one is a function and a line here."""

from collections.abc import Callable
from dataclasses import dataclass

from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors import (
    balance,
    completions,
    forecast,
    health,
    numerics,
    offpolicy,
    policy,
)
from wapo_analysis.diagnose.result import Finding, Skipped

MIN_STEPS = 8
"""Steps with a number below which nothing but broken numbers is judged."""
EARLY_STEPS = 5
"""Steps of entropy that an early warning needs."""


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
        Step columns of which one must, unless one of ``or_parts`` is there.
    or_parts : tuple of str
        Parts that serve in place of ``needs_any``.
    needs_parts : tuple of str
        Parts that are no step columns (:meth:`Context.has`) and must all be there.
    min_steps : int
        Steps that each needed column must cover.
    """

    name: str
    find: Callable[[Context], list[Finding]]
    needs: tuple[str, ...] = ()
    needs_any: tuple[str, ...] = ()
    or_parts: tuple[str, ...] = ()
    needs_parts: tuple[str, ...] = ()
    min_steps: int = MIN_STEPS

    def missing(self, context: Context) -> tuple[str, ...]:
        """Columns without which it cannot judge this run."""
        absent = context.missing(self.needs)
        options = (*self.or_parts, *self.needs_any)
        none_there = len(context.missing(self.needs_any)) == len(self.needs_any)
        if options and none_there and not any(context.has(part) for part in self.or_parts):
            absent += (" or ".join(options),)
        return absent + tuple(part for part in self.needs_parts if not context.has(part))

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
    Detector(
        "early_warning",
        forecast.find_early_warning,
        needs=("entropy",),
        needs_parts=("classes.pred_dentropy_sum",),
        min_steps=EARLY_STEPS,
    ),
    Detector("entropy_projection", forecast.find_arrival, needs=("entropy",)),
    Detector("gradient_spikes", numerics.find_gradient_spikes, needs=("grad_norm",)),
    Detector("gradient_level", numerics.find_gradient_level, needs=("grad_norm",)),
    Detector("zero_signal_too_hard", health.find_too_hard, needs=("groups_all_wrong",)),
    Detector("zero_signal_too_easy", health.find_too_easy, needs=("groups_all_right",)),
    Detector("clip_saturation_low", health.find_clip_low, needs=("clip_low",)),
    Detector("clip_saturation_high", health.find_clip_high, needs=("clip_high",)),
    Detector("truncation_drift", completions.find_truncation, needs=("truncated",)),
    Detector("repetition_drift", completions.find_repetition, needs=("repetition",)),
    Detector("length_drift", completions.find_length_drift, needs=("length",)),
    Detector(
        "reward_pays_for_length",
        completions.find_length_pay,
        needs=("length",),
        needs_parts=("rollouts.length",),
    ),
    Detector(
        "degenerate_completions", completions.find_degenerate, needs_parts=("rollouts.completion",)
    ),
    Detector(
        "train_inference_mismatch",
        offpolicy.find_mismatch,
        needs_any=(Context.LOGP_GAP_COLUMN,),
        or_parts=("tokens.logp_old",),
    ),
    Detector("staleness", offpolicy.find_staleness, needs_parts=("tokens.logp_old",)),
    Detector("off_policy_drift", offpolicy.find_policy_drift, needs=("kl_old",)),
    Detector(
        "one_class_dominates", balance.find_dominance, needs_parts=("classes.pred_dentropy_sum",)
    ),
    Detector(
        "one_class_takes_the_gradient", balance.find_takeover, needs_parts=("classes.grad_mass",)
    ),
    Detector("mass_by_sign", balance.find_imbalance, needs_parts=("classes.grad_mass",)),
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
