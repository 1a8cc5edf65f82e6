"""Detectors of the training signal: groups that teach nothing, and runs that learn nothing."""

import numpy as np
import pandas as pd

from wapo_analysis.diagnose.advice import Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors import (
    LEVEL_SIGMAS,
    MIN_STEPS,
    detector,
    lasting,
    level_finding,
)
from wapo_analysis.diagnose.result import Finding, Severity
from wapo_analysis.diagnose.reward import RewardState
from wapo_analysis.results import short
from wapo_analysis.series import Series, silent_since
from wapo_analysis.store import Need
from wapo_analysis.table import Array

#: Share of groups without any reward difference at which a batch is half wasted.
FLAT_GROUPS = 0.5
#: The same, with its rise, at which problems have split into learned and out of reach.
MOSTLY_FLAT, BECAME_FLAT = 0.66, 0.4
#: Difference between the halves of a run that is none, where neighbouring steps differ by more.
STEADY = 0.1
#: Standard deviations of the difference of two means that are no chance, wherever one looks.
CHANCE_SIGMAS = 4.0
#: Share of such groups that leaves no gradient.
NO_SIGNAL = 0.9
#: Gradient norm relative to its usual size that counts as none.
NO_GRADIENT = 1e-3
#: Mean reward in [0, 1] at which flat groups are flat at the bottom, or at the top.
HARD, EASY = 0.25, 0.75
#: Times as many groups all wrong as all right, or the reverse, that make it hard or easy.
SIDE = 2.0
#: Records whose mean says something of a share that is all or nothing at each of them.
ONE_GROUP_RECORDS = 25
#: Records of a solved batch that went to waste, a third of the run at least, to be warned of.
LONG_FLAT = 50
#: Spread of the advantages relative to the baseline that leaves next to no gradient.
ADVANTAGES_GONE = 0.1
#: Share of completions cut at the limit that explains why none earns a reward.
ALL_CUT = 0.9
#: Loss of the critic relative to its lowest that counts as running away.
CRITIC_GROWN = 3.0
#: The same relative to its baseline: critics begin badly and learn.
CRITIC_ABOVE = 1.5
#: Variance of the returns that the critic explained once, and at which it explains none.
EXPLAINED, EXPLAINS_NOTHING = 0.2, 0.0
CRITIC_REFERENCE = "arXiv:1707.06347 (PPO, value loss and clip); arXiv:2504.05118 (VAPO)"
DAPO = "arXiv:2503.14476 (DAPO, dynamic sampling)"

ANY_FLAT = (
    Need("steps", "groups_flat")
    | Need("steps", "groups_all_wrong")
    | Need("steps", "groups_all_right")
)


@detector("zero_signal", ANY_FLAT)
def find_flat_groups(context: Context) -> list[Finding]:
    """In half of the groups or more all rewards are equal, to the end: too hard, too easy."""
    flat = context.flat_groups
    mean = _rolling_mean(flat)
    steady = _steady(flat)  # of one or two groups a step the share is noise: of all it is not
    # With one group a step the share is 0 or 1: a few in a row are chance, as with a coin.
    least = MOSTLY_FLAT if _is_coarse(flat) else FLAT_GROUPS
    begin = 0 if steady else lasting(flat, mean >= least)
    if begin is None or not (_is_coarse(flat) or _no_chance(flat, begin)):
        return []
    side = _side(context)
    step, now = flat.step(begin), float(flat.values.mean() if steady else mean[-1])
    what, advice = _SIDES[side]
    if side and not _told_sides(context):
        what = f"have the same reward for every completion, {_BY_MEAN[side]} by the mean reward"
    wasted = _wasted(context, flat, begin) or _became_flat(context, flat, now)
    return [
        Finding(
            name=f"zero_signal_{side}" if side else "zero_signal",
            severity=_severity(context.reward, side, wasted),
            step=step,
            message=f"{now:.0%} of the groups {what}, so they teach nothing; half or more do from "
            f"step {step} on.",
            evidence={"start": flat.level, "end": now, **_varying(context)},
            advice=advice,
            reference=DAPO,
        )
    ]


def _steady(flat: Series) -> bool:
    """Whether a share jumps between steps, and is surely half or more, in both halves alike."""
    if len(flat) < MIN_STEPS or np.abs(np.diff(flat.values)).mean() <= STEADY:
        return False
    first, last = (float(part.mean()) for part in np.array_split(flat.values, 2))
    surely = min(first, last, _surely(flat.values)) >= FLAT_GROUPS
    return surely and last - first < STEADY


def _surely(shares: Array) -> float:
    """Mean of shares less two standard errors."""
    return float(shares.mean() - 2 * shares.std() / len(shares) ** 0.5)


def _no_chance(flat: Series, begin: int) -> bool:
    """Whether half or more from a record on is so for most of the run, or a rise beyond noise."""
    before, since = flat.values[:begin], flat.values[begin:]
    if not begin or (len(since) > len(before) and _surely(since) >= FLAT_GROUPS):
        return True
    noise = flat.whole_noise * (1 / len(before) + 1 / len(since)) ** 0.5
    return bool(since.mean() - before.mean() >= CHANCE_SIGMAS * noise)


_DROP_FLAT = Advice(
    "Leave flat groups out of the batch and fill it with others ({drop_flat_groups}).",
    needs=("drop_flat_groups",),
)
_SIDES = {
    "too_hard": (
        "have no right completion",
        Advice(
            "Make right completions turn up.",
            steps=(
                Advice("Give easier problems ({data})."),
                Advice("Raise {rollouts_per_prompt} or {temperature}."),
                _DROP_FLAT,
            ),
        ),
    ),
    "too_easy": (
        "are right in every completion",
        Advice(
            "If the held-out score is good, stop.",
            steps=(Advice("Give harder problems ({data})."), _DROP_FLAT),
        ),
    ),
    "": (
        "have the same reward for every completion",
        Advice(
            "Make groups differ.",
            steps=(
                _DROP_FLAT,
                Advice("Give problems of other difficulty ({data})."),
                Advice("Raise {rollouts_per_prompt} or {temperature}."),
            ),
        ),
    ),
}


_BY_MEAN = {"too_hard": "most of them none", "too_easy": "most of them all there is"}


def _told_sides(context: Context) -> bool:
    """Whether the log tells groups all wrong from groups all right."""
    return bool(len(context.series("groups_all_wrong")) or len(context.series("groups_all_right")))


def _side(context: Context) -> str:
    """Whether the flat groups lie at the bottom or at the top of the reward; empty if unknown."""
    wrong, right = context.series("groups_all_wrong"), context.series("groups_all_right")
    low = float(_rolling_mean(wrong)[-1]) if len(wrong) else 0.0
    high = float(_rolling_mean(right)[-1]) if len(right) else 0.0
    if max(low, high) >= FLAT_GROUPS / 2:
        return "too_hard" if low >= SIDE * high else "too_easy" if high >= SIDE * low else ""
    reward = context.reward
    if reward is None or context.form_alone:
        return ""
    if reward.solved or (reward.bounded and reward.series.end >= EASY):
        return "too_easy"
    held_out = context.held_out
    low_too = not len(held_out) or held_out.end <= HARD
    return "too_hard" if reward.bounded and reward.series.end <= HARD and low_too else ""


def _became_flat(context: Context, flat: Series, now: float) -> bool:
    """Not solved, and most groups have become flat."""
    solved = context.reward is not None and context.reward.solved
    return not solved and now >= MOSTLY_FLAT and now - flat.level >= BECAME_FLAT


def _wasted(context: Context, flat: Series, begin: int) -> bool:
    """Half of the batch has gone to waste for long, and the reward gains no more."""
    count = len(flat) - begin
    reward = context.reward
    gaining = reward is not None and reward.gaining
    return count >= max(LONG_FLAT, len(flat) // 3) and not gaining


def _severity(reward: RewardState | None, side: str, wasted: bool) -> Severity:
    if reward is None or wasted:
        return "warning"
    done = reward.solved or reward.much_gained
    return "info" if (side != "too_hard" and (done or reward.gaining)) else "warning"


def _varying(context: Context) -> dict[str, str]:
    """Reward functions that still vary over the batch, as evidence."""
    names = [name for name, s in context.reward_spreads.items() if s.end > 0]
    return {"functions_that_vary": ", ".join(names)} if names else {}


@detector("stalled", Need("steps", "reward"), Need("steps", "grad_norm") | ANY_FLAT)
def find_stall(context: Context) -> list[Finding]:
    """No gradient, or no group with a difference, to the end; the reward is stuck and unsolved."""
    reward = context.reward
    assert reward is not None
    if reward.solved:
        return []
    flat, grad = context.flat_groups, context.series("grad_norm")
    since = {
        "flat_groups": _since(flat, flat.values >= NO_SIGNAL),
        "grad_norm": _since(grad, grad.values <= NO_GRADIENT * _usual(grad)),
    }
    found = {name: step for name, step in since.items() if step is not None}
    if not found:
        return []
    step = min(found.values())
    if abs(reward.gain_since(step)) > reward.margin or _won(context):
        return []
    cut = context.series("truncated")
    all_cut = bool(len(cut) and cut.end >= ALL_CUT)
    return [
        Finding(
            name="stalled",
            severity="critical",
            step=step,
            message=f"Nothing is learned from step {step} on: {_why(context, found, all_cut)}.",
            evidence={
                **reward.evidence(),
                **{f"{name}_since": value for name, value in found.items()},
                "grad_norm_end": grad.end if len(grad) else None,
                **({"truncated": cut.end} if all_cut else {}),
                **_varying(context),
            },
            advice=Advice(
                "Completions must end by themselves to be graded.",
                steps=(
                    Advice("Raise {max_new_tokens}."),
                    Advice("Or ask for shorter answers."),
                ),
            )
            if all_cut
            else Advice(
                "Check that the reward can be earned at all; then make groups differ.",
                steps=(
                    Advice("Mix in problems of other difficulty ({data})."),
                    Advice("Raise {rollouts_per_prompt} or {temperature}."),
                    _DROP_FLAT,
                ),
            ),
            reference=DAPO,
        )
    ]


def _why(context: Context, found: dict[str, int], all_cut: bool) -> str:
    """The chain of causes, as far as the run shows it."""
    reward = context.reward
    assert reward is not None
    nothing = reward.series.end <= min(0.0, float(reward.series.values.min()))
    if all_cut:
        share = context.series("truncated").end
        every = "every completion" if share > 0.99 else f"{share:.0%} of completions"
        return f"{every} is cut at the limit, so " + (
            "none earns a reward and there is no gradient" if nothing else "groups do not differ"
        )
    parts = []
    if "flat_groups" in found:
        flat = context.flat_groups
        share = float(flat.values[flat.steps >= found["flat_groups"]].mean())
        some = f"{share:.0%} of the groups have no difference in reward"
        parts.append(
            "there is no difference in reward within the groups" if share >= 0.995 else some
        )
        varying = _varying(context).get("functions_that_vary")
        if varying:
            parts[0] += f", although {varying} varies between prompts"
    parts.append("the gradient is zero" if "grad_norm" in found else "")
    parts.append(reward.words() if not nothing else "no completion earns a reward")
    return "; ".join(part for part in parts if part)


def _won(context: Context) -> bool:
    """The reward climbed to its highest and every function stands: on its scale it is solved."""
    reward = context.reward
    assert reward is not None
    top = reward.series.end >= reward.peak - reward.margin / 4
    return reward.improved and top and not reward.bounded and not _varying(context)


def _usual(grad: Series) -> float:
    """Gradient norm of a step that has one: the median of those of the first third."""
    alive = grad.values[grad.values > 0]
    return float(np.median(alive[: max(5, len(alive) // 3)])) if len(alive) else 0.0


def _since(series: Series, quiet: Array) -> int | None:
    begin = silent_since(quiet)
    return None if begin is None else series.step(begin)


def _rolling_mean(series: Series) -> Array:
    """Mean over the window of a share; over many records where it is all or nothing."""
    width = max(series.window, ONE_GROUP_RECORDS) if _is_coarse(series) else series.window
    rolling = pd.Series(series.values).rolling(width, center=True, min_periods=width // 2)
    return rolling.mean().fillna(0.0).to_numpy()


def _is_coarse(series: Series) -> bool:
    """Whether a share is all or nothing, now one and now the other, as of one group a step."""
    values = np.unique(series.values)
    return len(values) == 2 and values[0] == 0 and values[1] == 1


@detector(
    "advantages_vanish", Need("steps", "advantage_std") | Need("steps", "critic/advantages/max")
)
def find_no_advantages(context: Context) -> list[Finding]:
    """The advantages shrink to a tenth of their spread or less, to the end."""
    series = context.advantage_spread
    if len(series) < MIN_STEPS or series.level <= 0:
        return []
    reward = context.reward
    solved = reward is not None and reward.solved
    return level_finding(
        series,
        lasting(series, series.smooth <= ADVANTAGES_GONE * series.level),
        name="advantages_vanish",
        severity="info" if solved else "warning",
        what="The advantages all but vanish (their spread), so there is next to no gradient,",
        advice=Advice("Nothing is left to learn from these problems.")
        if solved
        else Advice(
            "Find out why completions of a prompt are worth the same: all right, all wrong, or "
            "rewarded alike.",
            steps=(
                _DROP_FLAT,
                Advice("Raise {rollouts_per_prompt} or {temperature}."),
                Advice("Check that advantages are normalised and masked as meant."),
            ),
        ),
        reference=DAPO,
        share=False,
    )


@detector("value_diverges", Need("steps", "value_loss") | Need("steps", "value_explained"))
def find_critic(context: Context) -> list[Finding]:
    """The critic's loss runs away from its lowest, or its values explain the returns no more."""
    loss, explained = context.series("value_loss"), context.series("value_explained")
    told, steps = [], []
    if len(loss) >= MIN_STEPS and loss.values.min() >= 0:
        low = np.minimum.accumulate(loss.smooth)
        far = np.maximum(CRITIC_GROWN * low, low + LEVEL_SIGMAS * loss.smooth_noise)
        begin = lasting(loss, loss.smooth >= np.maximum(far, CRITIC_ABOVE * loss.level))
        if begin is not None:
            steps.append(loss.step(begin))
            told.append(
                f"its loss rose from {short(low[begin])} at its lowest to {short(loss.end)}"
            )
    if len(explained) >= MIN_STEPS:
        best = np.maximum.accumulate(explained.smooth)
        lost = (best >= EXPLAINED) & (explained.smooth <= EXPLAINS_NOTHING)
        begin = lasting(explained, lost)
        if begin is not None:
            steps.append(explained.step(begin))
            told.append(
                f"its values explained {best[begin]:.0%} of the variance of the returns at best, "
                f"and none at the end ({explained.end:.2f})"
            )
    if not told:
        return []
    return [
        Finding(
            name="value_diverges",
            severity="warning",
            step=min(steps),
            message=f"The critic fails from step {min(steps)} on: {'; '.join(told)}.",
            evidence={"value_loss": loss.end, "value_explained": explained.end},
            advice=Advice(
                "Advantages from such a critic are noise.",
                steps=(
                    Advice("Lower the learning rate of the critic, or clip its values."),
                    Advice("Warm the critic up alone before the policy trains on it."),
                    context.go_back(min(steps)),
                ),
            ),
            reference=CRITIC_REFERENCE,
        )
    ]
