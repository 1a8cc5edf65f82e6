"""Detectors of who moves the policy: one class with all dH or gradient, one sign with all."""

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.diagnose.advice import CLASS_ADVICE, LOWER_LR, POSITIVE_ONLY, Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.entropy import FALL, RISE
from wapo_analysis.diagnose.detectors.registry import detector
from wapo_analysis.diagnose.levels import lasting, level_finding
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.diagnose.reward import CALM_STEPS
from wapo_analysis.series import Series
from wapo_analysis.store import Need

DOMINANT = 0.8
"""Share of the predicted dH that one class must have to dominate."""
TAKEOVER = 0.7
"""Share of the gradient mass at which a class has taken over."""
ONE_SIGN = 0.8
"""Share of the gradient mass at which one sign of the advantage outweighs the other."""
SHARE_RISE = 0.2
"""Rise of a share above its own baseline without which it is how the run is built."""
BUILT_IN = 0.02
"""A sign with no more than this at the baseline is left out by the objective."""
TAXONOMY = "arXiv:2606.16154 (WAPO); taxonomy/README.md"
SIGNS = "arXiv:2506.01347 (negative reinforcement); arXiv:2606.16154 (WAPO)"


@detector("one_class_dominates", Need("classes", "pred_dentropy_sum"))
def find_dominance(context: Context) -> list[Finding]:
    """One class makes up four fifths of the predicted dH, up or down, to the end."""
    flows = context.flows.abs()
    flows = flows[flows.sum(axis=1) > 0]
    if flows.empty:
        return []
    top = str(flows.tail(max(3, len(flows) // 4)).sum().idxmax())
    series = _share(flows, (top,))
    begin = lasting(series, series.smooth >= DOMINANT)
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
            message=f"{top} alone makes up {series.end:.0%} of the predicted dH "
            f"({'a rise' if flow > 0 else 'a fall'}) from step {step} on.",
            evidence={"class": top, "share": series.end, "predicted_dentropy": flow},
            advice=CLASS_ADVICE[top]
            if alarming
            else Advice("Compare the measured change of the entropy with the predicted one."),
            reference=TAXONOMY,
        )
    ]


@detector("one_class_takes_the_gradient", Need("classes", "grad_mass"))
def find_takeover(context: Context) -> list[Finding]:
    """One class takes over the gradient: seven tenths of its mass, a fifth more than at first."""
    mass = _known(context.gradient_mass)
    if mass.empty:
        return []
    top = str(mass.tail(max(3, len(mass) // 10)).sum().idxmax())
    series = _share(mass, (top,))
    return level_finding(
        series,
        lasting(series, series.smooth >= max(TAKEOVER, series.level + SHARE_RISE)),
        name="one_class_takes_the_gradient",
        severity="info" if _one_class_wanted(context) or _paid(context) else "warning",
        what=f"{top} tokens carry more and more of the gradient",
        advice=CLASS_ADVICE[top],
        reference=TAXONOMY,
        evidence={"class": top},
    )


@detector("mass_by_sign", Need("classes", "grad_mass"))
def find_imbalance(context: Context) -> list[Finding]:
    """Four fifths of the gradient mass come from one sign of the advantage, unlike at first.

    An objective that leaves a sign out by design says nothing here.
    """
    mass = _known(context.gradient_mass)
    negative = tuple(name for name in tax.CLASSES if name.startswith("neg"))
    series = _share(mass, negative)
    if not len(series) or not BUILT_IN < series.level < 1 - BUILT_IN:
        return []
    heavy = lasting(series, series.smooth >= max(ONE_SIGN, series.level + SHARE_RISE))
    light = lasting(series, series.smooth <= min(1 - ONE_SIGN, series.level - SHARE_RISE))
    side = "negative" if heavy is not None else "positive"
    names = negative if heavy is not None else tuple(set(tax.CLASSES) - set(negative))
    top = str(mass[list(names)].tail(max(3, len(mass) // 10)).sum().idxmax())
    return level_finding(
        series,
        heavy if heavy is not None else light,
        name=f"{side}_mass_outweighs",
        severity="info" if _paid(context) else "warning",
        what=f"Tokens of {side} advantage carry almost all of the gradient; the negative share is "
        "out of its range",
        advice=Advice(
            f"Most of it is {top}. Pushing down alone raises the entropy in the end.",
            steps=(
                Advice("Give easier problems, so that something is right ({data})."),
                POSITIVE_ONLY,
                LOWER_LR,
            ),
        )
        if heavy is not None
        else Advice(f"Most of it is {top}. Give harder problems ({{data}})."),
        reference=SIGNS,
        evidence={"class": top},
    )


def _known(mass: pd.DataFrame) -> pd.DataFrame:
    """Steps at which any class has gradient."""
    return mass[mass.sum(axis=1) > 0]


def _share(table: pd.DataFrame, names: tuple[str, ...]) -> Series:
    """Share of some classes in the total of a table of non-negative numbers, per step."""
    part = table[list(names)].sum(axis=1) / table.sum(axis=1)
    return Series(table.index.to_numpy(), part.to_numpy())


def _paid(context: Context) -> bool:
    reward = context.reward
    return reward is not None and (reward.improved or reward.solved)


def _one_class_wanted(context: Context) -> bool:
    """The run was told to train on some classes only."""
    return bool(context.run.manifest.objective.get("include_bins"))


def _unpaid_move(context: Context) -> int:
    """1 or -1 if the entropy ends above or below its detectors' band and the reward gained nothing.

    0 if it does not, if the reward rose or is solved, or while too few steps are known to tell.
    """
    series = context.series("entropy")
    reward = context.reward
    if (
        len(series) < CALM_STEPS
        or (reward is not None and (reward.rising or len(reward.series) < CALM_STEPS))
        or _paid(context)
        or series.level <= 0
        or series.end <= 0
    ):
        return 0
    ratio = series.end / series.level
    return 1 if ratio >= RISE[0] else -1 if ratio <= FALL[0] else 0
