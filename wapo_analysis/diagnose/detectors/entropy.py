"""Detectors of the entropy, both ways, of the class that moves it; and the band it is judged by."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.diagnose.advice import CLASS_ADVICE, LOWER_LR, POSITIVE_ONLY, Advice
from wapo_analysis.diagnose.context import Context, driver_advice, driver_words, entropy_drivers
from wapo_analysis.diagnose.detectors import detector, lasting, level_finding
from wapo_analysis.diagnose.detectors.completions import degenerate_since
from wapo_analysis.diagnose.result import Finding, Severity
from wapo_analysis.diagnose.reward import CALM_STEPS, RewardState, reward_state
from wapo_analysis.series import Departure, Series, departure
from wapo_analysis.store import Need
from wapo_analysis.table import Array

#: Ratio to the baseline at which a rise warns, and at which it is an explosion.
RISE = (1.5, 2.0)
#: Ratio at which a fall warns, and at which it is a collapse if the reward does not pay for it.
FALL = (0.5, 0.2)
#: Ratio of a collapse where no reward was recorded: learning alone seldom goes that far.
FALL_UNPAID = 0.05
#: Ratio of a collapse where the reward was lost: no learning asks for the doubt.
FALL_LOST = 0.5
#: Part of the run by which the entropy may follow the reward and still be the cause of its loss.
LATE = 0.1
#: Share of the baseline within which a run has not left it: half the way to a warning.
HOME = 0.25
#: Smallest rise in nats; below it a ratio to a tiny entropy compares noise.
MIN_RISE = 0.05
#: Records back at which a fall that was paid for still counts as paid.
LATELY = 2
#: Entropy in nats that is nothing to worry about while the reward gains, wherever it began.
SOUND = 0.3
SIGMAS = 6.0
#: Ratio below which nothing is left to explore with, whatever was gained.
FALL_DEEP = 0.05
#: Ratio to its value when the reward stopped gaining, below which a fall went on unpaid.
FELL_ON = 0.5

EXPLOSION_REFERENCE = "arXiv:2606.16154 (WAPO); taxonomy/README.md, multi-step behaviour"
COLLAPSE_REFERENCE = "arXiv:2505.22617 (entropy mechanism); arXiv:2606.16154 (WAPO)"


@dataclass(frozen=True, slots=True)
class Band:
    """Levels of the smoothed entropy, nats."""

    #: The run's own baseline.
    level: float
    #: Beyond these it warns.
    low: float
    high: float
    #: Beyond these it is a collapse (unless the reward pays for it), or an explosion.
    lowest: float
    highest: float


def entropy_band(context: Context) -> Band | None:
    """Levels around the baseline of a run, in nats; None without entropy.

    Ratios to the baseline, and at least ``SIGMAS`` standard deviations of the gap away from it, or
    half of them to warn: a jump inflates its own noise, and a run stays departed that passed all.
    """
    series, reward = context.series("entropy"), context.reward
    if not len(series):
        return None
    level, gap = series.level, series.gap_noise
    # The entropy has a floor at zero, so that noise is a factor there: no sigma asks for less.
    noise = gap / level if level > 0 else np.inf
    deep = FALL_UNPAID if reward is None else FALL_LOST if _before_loss(series, reward) else FALL[1]
    return Band(
        level=level,
        low=level * min(FALL[0], float(np.exp(-SIGMAS / 2 * noise))),
        high=max(RISE[0] * level, level + max(SIGMAS / 2 * gap, MIN_RISE)),
        lowest=level * min(deep, float(np.exp(-SIGMAS * noise))),
        highest=max(RISE[1] * level, level + max(SIGMAS * gap, MIN_RISE)),
    )


@detector("entropy_explosion", Need("steps", "entropy"))
def find_entropy_rise(context: Context) -> list[Finding]:
    """Entropy above twice its baseline to the end; a warning where the reward still gains.

    An info where it gains and the entropy is no higher than in most sound runs.
    """
    series, band = context.series("entropy"), entropy_band(context)
    if band is None:
        return []
    loose, strict = series.smooth >= band.high, series.smooth >= band.highest
    gone = departure(loose, strict, _home(series), series.persist)
    if gone is None:
        return []
    reward = context.reward
    paid = reward is not None and reward.improved
    low = paid and series.end <= SOUND
    if gone.crossed is None or (low and gone.ongoing):
        severity: Severity = "info" if low else "warning"
        return [_entropy_finding(context, gone, True, "entropy_rise", severity)]
    if not gone.ongoing:
        return [_entropy_finding(context, gone, True, "entropy_excursion", "warning")]
    name = "entropy_rise" if paid else "entropy_explosion"
    return [_entropy_finding(context, gone, True, name, "warning" if paid else "critical")]


@detector("entropy_collapse", Need("steps", "entropy"))
def find_entropy_fall(context: Context) -> list[Finding]:
    """Entropy below a fifth of its baseline to the end while the reward does not pay for it.

    Below a half if the reward was lost. A reward for the same answer to every prompt pays nothing.
    """
    series, band = context.series("entropy"), entropy_band(context)
    if band is None or band.level <= 0:
        return []
    loose, strict = series.smooth <= band.low, series.smooth <= band.lowest
    gone = departure(loose, strict, _home(series), series.persist)
    if gone is None:
        return []
    if not gone.ongoing:
        return [_entropy_finding(context, gone, False, "entropy_excursion", "warning")]
    if _paid_lately(context, series, gone) and degenerate_since(context.sameness) is None:
        return [_entropy_finding(context, gone, False, "entropy_decline", "info")]
    if gone.crossed is None:
        return [_entropy_finding(context, gone, False, "entropy_fall", "warning")]
    return [_entropy_finding(context, gone, False, "entropy_collapse", "critical")]


def _before_loss(entropy: Series, reward: RewardState) -> bool:
    """The reward was lost, the entropy was below half of its baseline by then, and stays there."""
    loss = reward.loss if reward.lost else None
    if loss is None or loss.crossed is None:
        return False
    soon = len(reward.series) - loss.crossed < CALM_STEPS
    if soon or entropy.smooth[-2 * entropy.persist :].max() > FALL_LOST * entropy.level:
        return False  # a dip on the way to an explosion looks the same
    fell = reward.series.step(max(loss.onset - 1, 0))
    then = min(int(np.searchsorted(entropy.steps, fell)), len(entropy) - 1)
    if entropy.end > entropy.smooth[then]:
        return False  # it rises since the reward falls: what it lost before, the reward paid for
    lost = reward.series.step(loss.crossed) + LATE * np.ptp(entropy.steps)
    seen = entropy.smooth[entropy.steps <= lost]
    return bool((seen <= FALL[0] * entropy.level).any())


def _home(series: Series) -> Array:
    """Where a smoothed value counts as still at the level of the baseline."""
    near = max(3 * series.smooth_noise, HOME * abs(series.level))
    return np.abs(series.smooth - series.level) <= near


def _paid_lately(context: Context, entropy: Series, gone: Departure) -> bool:
    """Whether the reward pays for the fall, or did two records ago: one record decides nothing."""
    reward = context.reward
    if reward is None or reward.lost:
        return False
    count = len(reward.series)
    ends = (count - back for back in range(LATELY + 1))
    states = (reward_state(reward.series.head(n), reward.solved) for n in ends if n >= CALM_STEPS)
    return any(_paid_for(state, entropy, gone) for state in states)


def _paid_for(reward: RewardState, entropy: Series, gone: Departure) -> bool:
    """Whether the reward is worth the entropy that went.

    It is while the reward still gains, or once the task is solved. Where the reward stands, what
    fell while it gained was paid for, if much was gained, the fall ended there and something is
    left. For a fall that is no collapse yet, any rise is enough, or noise that would hide it.
    """
    if reward.lost:
        return False
    if reward.solved or reward.gaining:
        return True
    if gone.crossed is None:
        return reward.rising or reward.hidden
    stood = min(
        int(np.searchsorted(entropy.steps, reward.series.step(reward.stands_from))),
        len(entropy) - 1,
    )
    fell_on = entropy.end < FELL_ON * entropy.smooth[stood]
    return reward.much_gained and not fell_on and entropy.end > FALL_DEEP * entropy.level


_DECLINE = Advice("Normal while the reward rises; once it no longer does, stop.")
_ENTROPY_TAIL = {
    "entropy_explosion": "and stays there",
    "entropy_collapse": "and stays there",
    "entropy_rise": "",
    "entropy_fall": "",
    "entropy_decline": "as the policy became certain",
    "entropy_excursion": "and came back",
}


def _entropy_finding(
    context: Context, gone: Departure, rose: bool, name: str, severity: Severity
) -> Finding:
    series, reward = context.series("entropy"), context.reward
    onset, last = gone.onset, gone.warned if gone.crossed is None else gone.crossed
    direction, verb = (1, "rose") if rose else (-1, "fell")
    drivers = entropy_drivers(context, series.step(onset), series.step(last), direction)
    extreme = series.smooth[onset:].max() if rose else series.smooth[onset:].min()
    there = series.end if gone.ongoing else float(extreme)
    clauses = [
        f"Entropy {verb} from {series.level:.3g} to {there:.3g} nats"
        f"{_times(there, series.level)} from step {series.step(onset)} "
        f"{_ENTROPY_TAIL[name]}".rstrip(),
        reward.words() if reward is not None else "no reward was recorded",
        driver_words(drivers, direction),
    ]
    return Finding(
        name=name,
        severity=severity,
        step=series.step(onset),
        message="; ".join(clause for clause in clauses if clause) + ".",
        evidence={
            "entropy_start": series.level,
            "entropy_end": series.end,
            "entropy_extreme": float(extreme),
            "ratio": series.end / series.level if series.level > 0 else None,
            "predicted_dentropy": sum(d.predicted_dentropy for d in drivers) if drivers else None,
            **(reward.evidence() if reward is not None else {}),
        },
        advice=_DECLINE if name == "entropy_decline" else driver_advice(drivers),
        reference=EXPLOSION_REFERENCE if rose else COLLAPSE_REFERENCE,
        warned=series.step(gone.warned),
        until=None if gone.crossed is None else series.step(gone.crossed),
    )


def _times(value: float, level: float) -> str:
    if level <= 0:
        return ""
    ratio = value / level
    times = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
    return f" ({times} times its baseline)"


#: Share of the predicted dH that one class must have to dominate.
DOMINANT = 0.8
#: Share of the gradient mass at which a class has taken over.
TAKEOVER = 0.7
#: Share of the gradient mass at which one sign of the advantage outweighs the other.
ONE_SIGN = 0.8
#: Rise of a share above its own baseline without which it is how the run is built.
SHARE_RISE = 0.2
#: A sign with no more than this at the baseline is left out by the objective.
BUILT_IN = 0.02
TAXONOMY = "arXiv:2606.16154 (WAPO); taxonomy/README.md"
SIGNS = "arXiv:2506.01347 (negative reinforcement); arXiv:2606.16154 (WAPO)"


@detector("one_class_dominates", Need("classes", "pred_dentropy_sum"))
def find_dominance(context: Context) -> list[Finding]:
    """One class makes up four fifths of the predicted dH, up or down, to the end."""
    sizes = context.pred_dentropy.abs()
    sizes = sizes[(sizes > 0).any(axis=1)]
    if sizes.empty:
        return []
    top = str(sizes.tail(max(3, len(sizes) // 4)).mean().idxmax())
    series = _share(sizes, (top,))
    begin = lasting(series, series.smooth >= DOMINANT)
    if begin is None:
        return []
    predicted = float(context.pred_dentropy[top].loc[series.step(begin) :].sum())
    alarming = not _one_class_wanted(context) and np.sign(predicted) == _unpaid_move(context)
    step = series.step(begin)
    return [
        Finding(
            name="one_class_dominates",
            severity="warning" if alarming else "info",
            step=step,
            message=f"{top} alone makes up {series.end:.0%} of the predicted dH "
            f"({'a rise' if predicted > 0 else 'a fall'}) from step {step} on.",
            evidence={"class": top, "share": series.end, "predicted_dentropy": predicted},
            advice=CLASS_ADVICE[top]
            if alarming
            else Advice("Compare the measured change of the entropy with the predicted one."),
            reference=TAXONOMY,
        )
    ]


@detector("one_class_takes_the_gradient", Need("classes", "grad_mass"))
def find_takeover(context: Context) -> list[Finding]:
    """One class takes over the gradient: seven tenths of its mass, a fifth more than at first.

    No more than an info where one sign of the advantage is trained alone.
    """
    mass = _known(context.gradient_mass)
    if mass.empty:
        return []
    top = str(mass.tail(max(3, len(mass) // 10)).mean().idxmax())
    series = _share(mass, (top,))
    one_sign = not {"pos", "neg"} <= context.situation.facts
    return level_finding(
        series,
        lasting(series, series.smooth >= max(TAKEOVER, series.level + SHARE_RISE)),
        name="one_class_takes_the_gradient",
        severity="info" if one_sign or _one_class_wanted(context) or _paid(context) else "warning",
        what=f"{top} tokens carry most of the gradient",
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
    top = str(mass[list(names)].tail(max(3, len(mass) // 10)).mean().idxmax())
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
    return mass[(mass > 0).any(axis=1)]


def _share(table: pd.DataFrame, names: tuple[str, ...]) -> Series:
    """Share of some classes in the total of a table of non-negative numbers, per step."""
    part = table[list(names)].sum(axis=1) / table.sum(axis=1)
    return Series(table.index.to_numpy(), part.to_numpy())


def _paid(context: Context) -> bool:
    reward = context.reward
    return reward is not None and (reward.improved or reward.solved)


def _pays(reward: RewardState) -> bool:
    """Whether it pays for a move of the entropy, or is too short to tell."""
    return reward.rising or reward.solved or len(reward.series) < CALM_STEPS


def _one_class_wanted(context: Context) -> bool:
    """The run was told to train on some classes only."""
    return bool(context.run.manifest.objective.get("include_bins"))


def _unpaid_move(context: Context) -> int:
    """1 or -1 if the entropy ends above or below its detectors' band and the reward gained nothing.

    0 if it does not, if the reward rose or is solved, or while too few steps are known to tell.
    """
    series = context.series("entropy")
    reward = context.reward
    if len(series) < CALM_STEPS or (reward is not None and _pays(reward)) or series.level <= 0:
        return 0
    ratio = series.end / series.level
    return 1 if ratio >= RISE[0] else -1 if ratio <= FALL[0] else 0
