"""Detectors of how far the policy moves, and of training on another policy than sampled."""

import numpy as np

from wapo_analysis.diagnose.advice import LOWER_LR, Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors import MIN_STEPS, detector, lasting, level_finding
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.series import Series
from wapo_analysis.store import Need

#: Share of tokens without gradient because of the clip.
CLIPPED = 0.2
#: KL to the reference in nats per token at which a policy has left it.
FAR = 1.0
#: The same at which a reward that gains is no comfort.
FAR_ANYWAY = 2.0
#: The same where the reward did not gain while it went from half of this to here.
FAR_UNPAID = 0.5
#: Step columns with the share of tokens that either clip stops: TRL's, verl's and others'.
BOTH_CLIPS = ("clip_ratio/region_mean", "actor/pg_clipfrac", "clip_any")
#: Ratio to the baseline without which the distance is how the run was started.
KL_GROWTH = 5.0
#: KL in nats a token of one part of the completions, and its ratio to the others, that count.
PART_FAR, PART_RATIO = 0.2, 4.0
#: Findings that say that the updates are too large for a first-order law to hold.
LARGE_STEPS = {
    "off_policy_drift", "clip_saturation_low", "clip_saturation_high", "clip_saturation",
    "gradient_grows",
}  # fmt: skip
CLIP_SIDES = "arXiv:2509.26114 (clip-low raises, clip-high lowers the entropy)"
REFERENCE = "arXiv:2402.03300 (GRPO, KL penalty); arXiv:2503.14476 (DAPO, training without it)"


#: Finding to what stops the tokens, the step columns that tell, and what else would help.
_CLIPS = {
    "clip_saturation_low": ("The lower clip", ("clip_low",), "Widen {clip_low}."),
    "clip_saturation_high": ("The upper clip", ("clip_high",), "Widen {clip_high}."),
    "clip_saturation": ("The clip", BOTH_CLIPS, "Widen {clip_low} or {clip_high}."),
}


@detector(
    "clip_saturation",
    Need("steps", "clip_low") | Need("steps", "clip_high")
    | Need("steps", BOTH_CLIPS[0]) | Need("steps", BOTH_CLIPS[1]) | Need("steps", BOTH_CLIPS[2]),
)  # fmt: skip
def find_clip(context: Context) -> list[Finding]:
    """A clip stops a fifth of the tokens or more; both together where the log has no sides."""
    sides = len(context.series("clip_low")) or len(context.series("clip_high"))
    found: list[Finding] = []
    for name, (clip, columns, widen) in _CLIPS.items():
        series = next((s for c in columns if len(s := context.series(c)) >= MIN_STEPS), None)
        if series is None or (sides and columns == BOTH_CLIPS):
            continue
        found += level_finding(
            series,
            lasting(series, series.smooth >= CLIPPED),
            name=name,
            severity="warning",
            what=f"{clip} takes the gradient from a fifth of the tokens or more",
            advice=Advice(
                "The policy moves far within one batch.", steps=(LOWER_LR, Advice(widen))
            ),
            reference=CLIP_SIDES,
        )
    return found


@detector("kl_drift", Need("steps", "kl_ref"))
def find_kl_drift(context: Context) -> list[Finding]:
    """The policy has gone far from the reference model, and the reward does not pay for it."""
    series = context.series("kl_ref")
    grown = series.smooth >= KL_GROWTH * max(series.level, 0.0)
    paid = _gains_with(context, series)
    begin = lasting(series, grown & (series.smooth >= (FAR if paid else FAR_UNPAID)))
    return level_finding(
        series,
        begin,
        name="kl_drift",
        severity="info" if paid and series.end < FAR_ANYWAY else "warning",
        what="The policy is far from the reference model (KL in nats per token)",
        advice=Advice("The reward still gains: read completions to see that they stay sound.")
        if paid
        else Advice(
            "Compare completions with those of the reference model: what the distance buys must "
            "show in a held-out score.",
            steps=(Advice("Raise {kl}."), LOWER_LR),
        ),
        reference=REFERENCE,
        share=False,
        evidence=context.reward.evidence() if context.reward is not None else None,
    )


def _gains_with(context: Context, distance: Series) -> bool:
    """Whether the reward gained over the steps in which the distance doubled to where it is."""
    reward = context.reward
    if reward is None or reward.lost:
        return False
    if reward.solved or reward.gaining:
        return True
    half = np.flatnonzero(distance.smooth <= distance.end / 2)
    since = distance.step(int(half[-1]) if len(half) else 0)
    return reward.gain_since(since) > reward.margin


@detector("kl_by_position", Need("steps", "kl_positional/0"))
def find_kl_position(context: Context) -> list[Finding]:
    """Most of the KL to the reference is in one part of the completions, unlike at first."""
    parts = context.kl_parts
    if len(parts) < 3:
        return []
    ends = np.array([part.end for part in parts])
    top = int(np.argmax(ends))
    series, rest = parts[top], float(np.median(np.delete(ends, top)))
    least = max(KL_GROWTH * series.level, PART_FAR, PART_RATIO * rest)
    begin = lasting(series, series.smooth >= least)
    if begin is None or ends[top] < 0.5 * ends.sum():
        return []
    step, where = series.step(begin), f"part {top + 1} of {len(parts)}"
    ends_at = {0: "the beginning", len(parts) - 1: "the end"}.get(top, where)
    return [
        Finding(
            name="kl_by_position",
            severity="warning",
            step=step,
            message=f"The policy leaves the reference model at {ends_at} of completions: "
            f"{ends[top]:.2g} nats a token in {where}, {rest:.2g} in the others (from step {step} "
            "on).",
            evidence={"part": top + 1, "end": float(ends[top]), "others": rest},
            advice=Advice(
                "Read how completions of these steps begin or end: a phrase that every one has "
                "earns something."
            ),
            reference=REFERENCE,
        )
    ]


#: k3 estimate of KL(behaviour || policy) in nats at the first pass that is more than rounding.
FIRST_PASS_K3 = 0.01
#: Effective sample size over the number of tokens below which the ratio is uneven.
FIRST_PASS_ESS = 0.9
GROWTH = 10.0
#: k3 over all passes in nats below which drift is ordinary: where PPO stops early, if it does.
DRIFT_K3 = 0.01
#: Weight updates between sampling and training that are no longer how pipelines overlap.
LAG = 4.0
LAG_GROWTH = 2.0
MISMATCH = "arXiv:2510.26788 and trl issue 4159 (train-inference mismatch)"
STALENESS = "arXiv:2505.24298 (AReaL, staleness of asynchronous RL)"


#: Step column to the value that is more than rounding between engines, and what it is.
ENGINE = {
    "engine_kl": (0.01, "their KL is in nats per token"),
    "engine_logp_diff": (0.05, "mean difference in nats"),
    "engine_prob_diff": (0.03, "mean difference of probabilities"),
}


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
    begin = lasting(k3, k3.smooth >= max(FIRST_PASS_K3, GROWTH * k3.level))
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
