"""Detectors of training on another policy than the one that sampled: engine, lag, drift.

The first gradient pass of a step should meet the policy that sampled the tokens, so the importance
ratio r = exp(logp - logp_old) should be 1. Where it is not, either two engines disagree (seen from
the first step on) or the data are stale (not at first, then more and more).
"""

from wapo_analysis.diagnose.advice import LOWER_LR, Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.registry import detector
from wapo_analysis.diagnose.levels import lasting, level_finding
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.series import Series
from wapo_analysis.store import Need

FIRST_PASS_K3 = 0.01
"""k3 estimate of KL(behaviour || policy) in nats at the first pass that is more than rounding."""
FIRST_PASS_ESS = 0.9
"""Effective sample size over the number of tokens below which the ratio is uneven."""
GROWTH = 10.0
DRIFT_K3 = 0.006
"""k3 estimate over all passes in nats below which drift is how on-policy training looks."""
LAG = 4.0
"""Weight updates between sampling and training that are no longer how pipelines overlap."""
LAG_GROWTH = 2.0
MISMATCH = "arXiv:2510.26788 and trl issue 4159 (train-inference mismatch)"
STALENESS = "arXiv:2505.24298 (AReaL, staleness of asynchronous RL)"


ENGINE = {
    "engine_kl": (0.01, "their KL is in nats per token"),
    "engine_logp_diff": (0.05, "mean difference in nats"),
    "engine_prob_diff": (0.03, "mean difference of probabilities"),
}
"""Step column to the value that is more than rounding between engines, and what it is."""


@detector(
    "train_inference_mismatch",
    Need("steps", "engine_kl")
    | Need("steps", "engine_logp_diff")
    | Need("steps", "engine_prob_diff")
    | Need("tokens", "logp_old"),
)
def find_mismatch(context: Context) -> list[Finding]:
    """The sampling engine and the trainer give the same tokens different probabilities.

    From the log of the two engines where there is one; else from the first gradient pass over
    fresh rollouts, if it is off from the first step on and another engine may have sampled.
    """
    if context.second_engine:
        logged = _logged_mismatch(context)
        if logged:
            return logged
    seen = context.first_pass
    if context.second_engine is False or seen.empty:
        return []
    k3, ess = _series(context, "k3"), _series(context, "ess")
    off = (k3.smooth >= FIRST_PASS_K3) | (ess.smooth <= FIRST_PASS_ESS)
    begin, evidence = lasting(k3, off) if off[0] else None, _gap_evidence(context)
    if context.second_engine:
        return _mismatch(k3, begin, "k3 in nats", evidence)
    return _mismatch(k3, begin, "k3 in nats", evidence, _UNKNOWN_SAMPLER, _FIND_OUT)


def _logged_mismatch(context: Context) -> list[Finding]:
    """The first of the logged measures that is off to the end."""
    begun = []
    for name, (limit, unit) in ENGINE.items():
        series = context.series(name)
        begin = lasting(series, series.smooth >= limit) if len(series) else None
        if begin is not None:
            begun.append((series.step(begin), series, begin, unit))
    if not begun:
        return []
    _, series, begin, unit = min(begun, key=lambda found: found[0])
    ends = {name: s.end for name in ENGINE if len(s := context.series(name))}
    return _mismatch(series, begin, unit, ends)


_ENGINES = "The sampling engine and the trainer give different probabilities"
_UNKNOWN_SAMPLER = (
    "Tokens have another probability at the first recorded pass than when they were sampled: "
    "another engine or older weights sampled them, or the rows were recorded after an update"
)

_FIND_OUT = "Find out which of these it is; of two engines:"


def _mismatch(
    series: Series,
    begin: int | None,
    unit: str,
    evidence: dict[str, float],
    what: str = _ENGINES,
    goal: str = "The two engines should give the same probabilities.",
) -> list[Finding]:
    return level_finding(
        series,
        begin,
        name="train_inference_mismatch",
        severity="warning",
        what=f"{what} ({unit})",
        advice=Advice(
            goal,
            steps=(
                Advice("Set the same temperature, top-p and precision in both."),
                Advice("Score the samples with the trainer, from the same weights (logp_old)."),
                Advice(
                    "Correct with truncated importance sampling ({correction}).",
                    needs=("correction",),
                ),
            ),
        ),
        reference=MISMATCH,
        share=False,
        evidence=evidence,
    )


@detector("staleness", Need("steps", "staleness") | Need("tokens", "logp_old"))
def find_staleness(context: Context) -> list[Finding]:
    """The samples come from ever older policies: as logged, or by the first pass over them."""
    lag = context.series("staleness")
    if len(lag):
        least = max(LAG, LAG_GROWTH * lag.level)
        return _stale(lag, lasting(lag, lag.smooth >= least), "updates behind", {})
    k3 = _series(context, "k3")
    off = k3.smooth >= max(FIRST_PASS_K3, GROWTH * k3.level)
    begin = lasting(k3, off) if len(k3) and not off[0] else None
    return _stale(k3, begin, "k3 in nats", _gap_evidence(context) if begin is not None else {})


def _stale(
    series: Series, begin: int | None, unit: str, evidence: dict[str, float]
) -> list[Finding]:
    return level_finding(
        series,
        begin,
        name="staleness",
        severity="warning",
        what=f"The samples come from an older policy than the one they train ({unit})",
        advice=Advice(
            "Train on fresher samples.",
            steps=(
                Advice(
                    "Bound the lag between sampling and training ({max_lag}).", needs=("max_lag",)
                ),
                Advice("Sync the sampler's weights more often."),
                LOWER_LR,
            ),
        ),
        reference=STALENESS,
        share=False,
        evidence=evidence,
    )


@detector("off_policy_drift", Need("steps", "kl_old"))
def find_policy_drift(context: Context) -> list[Finding]:
    """The policy moves ever further from the behaviour policy within a batch (k3, all passes)."""
    series = context.series("kl_old")
    return level_finding(
        series,
        lasting(series, series.smooth >= max(DRIFT_K3, GROWTH * series.level)),
        name="off_policy_drift",
        severity="warning",
        what="The policy moves away from the one that sampled the batch (k3 in nats)",
        advice=Advice("The clip does not hold steps that are too large.", steps=(LOWER_LR,)),
        reference=STALENESS,
        share=False,
    )


def _series(context: Context, name: str) -> Series:
    return Series(context.first_pass.index.to_numpy(), context.first_pass[name].to_numpy())


def _gap_evidence(context: Context) -> dict[str, float]:
    seen = context.first_pass
    late = seen.tail(max(3, len(seen) // 10))
    return {
        "ess": float(late["ess"].median()),
        "max_dp": float(late["max_dp"].max()),
        "tokens": float(seen["tokens"].sum()),
    }
