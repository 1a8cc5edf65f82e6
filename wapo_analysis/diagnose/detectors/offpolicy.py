"""Detectors of training on another policy than the one that sampled: engine, lag, drift.

The first gradient pass of a step should meet the policy that sampled the tokens, so the importance
ratio r = exp(logp - logp_old) should be 1. Where it is not, either two engines disagree (seen from
the first step on) or the data are stale (not at first, then ever more).
"""

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
LOGP_GAP = 0.05
"""Mean |difference| of log-probabilities between the engines, in nats, for sources without rows."""
MISMATCH = "arXiv:2510.26788 and trl issue 4159 (train-inference mismatch)"
STALENESS = "arXiv:2505.24298 (AReaL, staleness of asynchronous RL)"


@detector(
    "train_inference_mismatch", Need("tokens", "logp_old") | Need("steps", Context.LOGP_GAP_COLUMN)
)
def find_mismatch(context: Context) -> list[Finding]:
    """Two engines disagree: the ratio of the first pass is uneven from the first step on."""
    seen = context.first_pass
    if seen.empty:
        return _logged_mismatch(context)
    k3, ess = _series(context, "k3"), _series(context, "ess")
    off = (k3.smooth >= FIRST_PASS_K3) | (ess.smooth <= FIRST_PASS_ESS)
    return level_finding(
        k3,
        lasting(k3, off) if off[0] else None,
        name="train_inference_mismatch",
        severity="warning",
        what="The sampling engine and the trainer give different probabilities (k3 in nats)",
        advice="Score the samples with the trainer (logp_old from the same weights and dtype), set "
        "the same temperature and top-p in both engines, or correct with truncated importance "
        "sampling.",
        reference=MISMATCH,
        share=False,
        evidence=_gap_evidence(context),
    )


def _logged_mismatch(context: Context) -> list[Finding]:
    """The same from the log of a source without token rows."""
    series = context.series(context.LOGP_GAP_COLUMN)
    return level_finding(
        series,
        lasting(series, series.smooth >= LOGP_GAP),
        name="train_inference_mismatch",
        severity="warning",
        what="Log-probabilities of sampler and trainer differ (mean in nats)",
        advice="Set the same temperature, top-p and dtype in both engines, or correct with "
        "truncated importance sampling.",
        reference=MISMATCH,
        share=False,
    )


@detector("staleness", Need("tokens", "logp_old"))
def find_staleness(context: Context) -> list[Finding]:
    """The first pass met the sampling policy at first, and no longer does."""
    k3 = _series(context, "k3")
    off = k3.smooth >= max(FIRST_PASS_K3, GROWTH * k3.level)
    begin = lasting(k3, off)
    return level_finding(
        k3,
        begin if len(k3) and not off[0] else None,
        name="staleness",
        severity="warning",
        what="The samples come from an older policy than the one they train (k3 in nats)",
        advice="Sync the sampler's weights more often, bound the lag between sampling and "
        "training, or lower lr so that the policy moves less while samples wait.",
        reference=STALENESS,
        share=False,
        evidence=_gap_evidence(context),
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
        advice="Lower lr or the updates per batch (epochs x minibatches); the clip does not hold "
        "steps that are too large.",
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
