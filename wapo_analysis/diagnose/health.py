"""Detectors of the training signal: groups without signal, truncation, clipping, one-sided flow."""

import numpy as np

from wapo_analysis.diagnose.context import SOLVED, Context
from wapo_analysis.diagnose.result import Finding, Severity
from wapo_analysis.diagnose.series import Series, episodes
from wapo_analysis.table import Array

FLAT_GROUPS = 0.5
CLIPPED = 0.2
DRIFT = 0.15
HALF = 0.5
DOMINANT = 0.8
DAPO = "arXiv:2503.14476 (DAPO)"
CLIP_SIDES = "arXiv:2509.26114 (clip-low raises, clip-high lowers the entropy)"
TAXONOMY = "arXiv:2606.16154 (WAPO); taxonomy/README.md"


def _lasting(series: Series, mask: Array) -> int | None:
    """Index at which a condition that lasts to the end began."""
    found = episodes(mask, series.persist)
    return found[-1][0] if found and found[-1][1] == len(series) else None


def _level_finding(
    series: Series,
    begin: int | None,
    *,
    name: str,
    severity: Severity,
    what: str,
    advice: str,
    reference: str,
) -> list[Finding]:
    """One finding on a share that is high to the end; none if it never began."""
    if begin is None:
        return []
    step = series.step(begin)
    return [
        Finding(
            name=name,
            severity=severity,
            step=step,
            message=f"{what} from step {step} on ({series.level:.0%} at first, {series.end:.0%} "
            "at the end).",
            evidence={"start": series.level, "end": series.end},
            advice=advice,
            reference=reference,
        )
    ]


def find_too_hard(context: Context) -> list[Finding]:
    """Half of the groups or more have no right completion, to the end."""
    series = context.series("groups_all_wrong")
    return _level_finding(
        series,
        _lasting(series, series.smooth >= FLAT_GROUPS),
        name="zero_signal_too_hard",
        severity="warning",
        what="In half of the groups or more every completion is wrong, so they teach nothing,",
        advice="Give easier problems, or raise rollouts_per_prompt or temperature so that a right "
        "completion turns up.",
        reference=DAPO,
    )


def find_too_easy(context: Context) -> list[Finding]:
    """Half of the groups or more are all right, to the end; fine once the task is solved."""
    series = context.series("groups_all_right")
    solved = context.reward is not None and context.reward.solved
    return _level_finding(
        series,
        _lasting(series, series.smooth >= FLAT_GROUPS),
        name="zero_signal_too_easy",
        severity="info" if solved else "warning",
        what="In half of the groups or more every completion is right, so they teach nothing,",
        advice=f"Give harder problems, or stop: the pass rate is {SOLVED:.0%} or more."
        if solved
        else "Give harder problems or leave the solved ones out of the batch.",
        reference=DAPO,
    )


def _drift(series: Series) -> int | None:
    """Where a share rose above its own beginning, or above a half, to the end."""
    least = max(DRIFT, 6 * series.smooth_noise)
    return _lasting(series, series.smooth >= min(series.level + least, max(HALF, 2 * least)))


def find_truncation(context: Context) -> list[Finding]:
    """Ever more completions are cut at the length limit, or most of them are."""
    series = context.series("truncated")
    return _level_finding(
        series,
        _drift(series),
        name="truncation_drift",
        severity="warning",
        what="Many completions are cut at the limit",
        advice="Raise max_new_tokens if they are sound; if they ramble, entropy is the cause: see "
        "the other findings.",
        reference=DAPO,
    )


def find_repetition(context: Context) -> list[Finding]:
    """Completions repeat themselves ever more."""
    series = context.series("repetition")
    return _level_finding(
        series,
        _drift(series),
        name="repetition_drift",
        severity="warning",
        what="Completions repeat themselves",
        advice="Read completions of these steps; lower lr, or take neg_valley out (exclude_bins = "
        "neg_valley), which feeds what is already dominant.",
        reference=TAXONOMY,
    )


def find_clip_low(context: Context) -> list[Finding]:
    """The lower clip stops a fifth of the tokens or more."""
    series = context.series("clip_low")
    return _level_finding(
        series,
        _lasting(series, series.smooth >= CLIPPED),
        name="clip_saturation_low",
        severity="warning",
        what="The lower clip takes the gradient from a fifth of the tokens or more",
        advice="The policy moves far within one batch: lower lr, epochs or minibatches, or widen "
        "clip_eps (lower mask_ratio_low in the dapo family).",
        reference=CLIP_SIDES,
    )


def find_clip_high(context: Context) -> list[Finding]:
    """The upper clip stops a fifth of the tokens or more."""
    series = context.series("clip_high")
    return _level_finding(
        series,
        _lasting(series, series.smooth >= CLIPPED),
        name="clip_saturation_high",
        severity="warning",
        what="The upper clip takes the gradient from a fifth of the tokens or more",
        advice="The policy moves far within one batch: lower lr, epochs or minibatches, or widen "
        "clip_eps (raise mask_ratio_high in the dapo family).",
        reference=CLIP_SIDES,
    )


def find_dominance(context: Context) -> list[Finding]:
    """One class supplies four fifths of the predicted entropy flow, up or down, to the end."""
    flows = context.flows.abs()
    flows = flows[flows.sum(axis=1) > 0]
    if flows.empty:
        return []
    top = str(flows.tail(max(3, len(flows) // 4)).sum().idxmax())
    share = (flows[top] / flows.sum(axis=1)).to_numpy()
    series = Series(flows.index.to_numpy(), share)
    begin = _lasting(series, series.smooth >= DOMINANT)
    if begin is None:
        return []
    flow = float(context.flows[top].loc[series.step(begin) :].sum())
    alarming = not _one_class_wanted(context) and np.sign(flow) == _unpaid_move(context)
    step = series.step(begin)
    return [
        Finding(
            name="one_class_dominates",
            severity="warning" if alarming else "info",
            step=step,
            message=f"{top} alone supplies {series.end:.0%} of the predicted entropy flow "
            f"({'upward' if flow > 0 else 'downward'}) from step {step} on.",
            evidence={"class": top, "share": series.end, "predicted_dentropy": flow},
            advice="Expected if include_bins leaves one class; else compare the measured change "
            "with the predicted one, and try exclude_bins on it.",
            reference=TAXONOMY,
        )
    ]


def _one_class_wanted(context: Context) -> bool:
    """The run was told to train on some classes only."""
    objective = context.run.manifest.get("objective")
    return isinstance(objective, dict) and bool(objective.get("include_bins"))


def _unpaid_move(context: Context) -> int:
    """1 or -1 if the entropy ends 1.5 times above or below its beginning without a gain in reward.

    0 if it does not, or if the reward rose or is solved.
    """
    series, reward = context.series("entropy"), context.reward
    paid = reward is not None and (reward.improved or reward.solved)
    if paid or not len(series) or series.level <= 0 or series.end <= 0:
        return 0
    change = np.log(series.end / series.level)
    return int(np.sign(change)) if abs(change) >= np.log(1.5) else 0
