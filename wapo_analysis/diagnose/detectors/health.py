"""Detectors of the training signal: groups that teach nothing, tokens the clip stops."""

from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.registry import detector
from wapo_analysis.diagnose.levels import lasting, level_finding
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.store import Need

FLAT_GROUPS = 0.5
CLIPPED = 0.2
DAPO = "arXiv:2503.14476 (DAPO)"
CLIP_SIDES = "arXiv:2509.26114 (clip-low raises, clip-high lowers the entropy)"


@detector("zero_signal_too_hard", Need("steps", "groups_all_wrong"))
def find_too_hard(context: Context) -> list[Finding]:
    """Half of the groups or more have no right completion, to the end."""
    series = context.series("groups_all_wrong")
    return level_finding(
        series,
        lasting(series, series.smooth >= FLAT_GROUPS),
        name="zero_signal_too_hard",
        severity="warning",
        what="In half of the groups or more every completion is wrong, so they teach nothing,",
        advice="Give easier problems, or raise rollouts_per_prompt or temperature so that a right "
        "completion turns up.",
        reference=DAPO,
    )


@detector("zero_signal_too_easy", Need("steps", "groups_all_right"))
def find_too_easy(context: Context) -> list[Finding]:
    """Half of the groups or more are all right, to the end; fine once much was gained."""
    series = context.series("groups_all_right")
    reward = context.reward
    solved = reward is not None and (reward.solved or reward.much_gained)
    return level_finding(
        series,
        lasting(series, series.smooth >= FLAT_GROUPS),
        name="zero_signal_too_easy",
        severity="info" if solved else "warning",
        what="In half of the groups or more every completion is right, so they teach nothing,",
        advice="Give harder problems, or stop: most of what can be earned is earned."
        if solved
        else "Give harder problems or leave the solved ones out of the batch.",
        reference=DAPO,
    )


@detector("clip_saturation_low", Need("steps", "clip_low"))
def find_clip_low(context: Context) -> list[Finding]:
    """The lower clip stops a fifth of the tokens or more."""
    series = context.series("clip_low")
    return level_finding(
        series,
        lasting(series, series.smooth >= CLIPPED),
        name="clip_saturation_low",
        severity="warning",
        what="The lower clip takes the gradient from a fifth of the tokens or more",
        advice="The policy moves far within one batch: lower lr, epochs or minibatches, or widen "
        "clip_eps (lower mask_ratio_low in the dapo family).",
        reference=CLIP_SIDES,
    )


@detector("clip_saturation_high", Need("steps", "clip_high"))
def find_clip_high(context: Context) -> list[Finding]:
    """The upper clip stops a fifth of the tokens or more."""
    series = context.series("clip_high")
    return level_finding(
        series,
        lasting(series, series.smooth >= CLIPPED),
        name="clip_saturation_high",
        severity="warning",
        what="The upper clip takes the gradient from a fifth of the tokens or more",
        advice="The policy moves far within one batch: lower lr, epochs or minibatches, or widen "
        "clip_eps (raise mask_ratio_high in the dapo family).",
        reference=CLIP_SIDES,
    )
