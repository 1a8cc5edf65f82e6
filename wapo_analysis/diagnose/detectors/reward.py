"""Detectors of the reward: lost after it was earned, fallen after a climb, uneven functions."""

from collections.abc import Sequence

import numpy as np

from wapo_analysis.diagnose.advice import LOWER_LR, Advice
from wapo_analysis.diagnose.context import Context, grades_form
from wapo_analysis.diagnose.detectors import detector, lasting
from wapo_analysis.diagnose.detectors.signal import DAPO
from wapo_analysis.diagnose.detectors.update import LARGE_STEPS
from wapo_analysis.diagnose.result import Finding, Severity
from wapo_analysis.diagnose.reward import RewardState, block_size, fell_before
from wapo_analysis.results import short
from wapo_analysis.series import Departure, Series
from wapo_analysis.store import Need

#: Share of a climb that a fall must undo to be worth a word.
FALLEN_SHARE = 0.25
#: Records of reward below which standing still says nothing.
PLATEAU_RECORDS = 40
#: Part of the run that the reward must have stood.
PLATEAU_SHARE = 0.5
#: Warnings that leave no doubt that a fall of the reward is one.
CONFIRM = LARGE_STEPS | {
    "early_warning", "entropy_excursion", "entropy_explosion", "entropy_fall", "entropy_rise",
    "gradient_spikes", "lr_far_off",
}  # fmt: skip
REWARD_REFERENCE = "arXiv:2606.16154 (WAPO)"


@detector("reward_collapse", Need("steps", "reward"))
def find_reward_loss(context: Context) -> list[Finding]:
    """At least half of the reward's gain, or of its baseline, lost to the end; or a quarter."""
    reward = context.reward
    if reward is None or reward.loss is None:
        return []
    loss, severe = reward.loss, reward.lost
    if not severe and loss.ongoing and context.fall is not None and context.fall.climbed:
        return []
    severity: Severity = "critical" if severe else "warning" if loss.ongoing else "info"
    return [_loss_finding(context, reward, loss, severity)]


def find_confirmed_loss(context: Context, found: Sequence[Finding]) -> list[Finding]:
    """A loss that the last records show and that might be noise, were it not for other warnings.

    Returns the same; a collapse of the reward takes the place of what was said of it. ``found``:
    what all detectors found.
    """
    reward = context.reward
    if reward is None or reward.falling is None or reward.lost:
        return list(found)
    if not any(f.name in CONFIRM and f.severity != "info" for f in found):
        return list(found)
    rest = [f for f in found if f.name not in ("reward_drop", "fall_after_climb")]
    return [*rest, _loss_finding(context, reward, reward.falling, "critical")]


def _loss_finding(
    context: Context, reward: RewardState, loss: Departure, severity: Severity
) -> Finding:
    series, entropy = reward.series, context.series("entropy")
    onset = series.step(loss.onset)
    back = "" if loss.ongoing else ", then came back"
    best, low = reward.best, series.end if loss.ongoing else reward.low(loss.onset)
    ends = {"entropy_start": entropy.level, "entropy_end": entropy.end} if len(entropy) else {}
    return Finding(
        name="reward_collapse" if severity == "critical" else "reward_drop",
        severity=severity,
        step=onset,
        message=f"Reward fell from {best:.2f} at its best to {low:.2f} from step {onset}{back}.",
        evidence={
            **reward.evidence(),
            "best_step": reward.best_step,
            "lost_share": (best - series.end) / best if best > 0 else None,
            **ends,
        },
        advice=Advice(
            "Read completions of the last steps: gibberish, repetition, or a reward that is "
            "being gamed?",
            steps=(LOWER_LR,),
        )
        if loss.ongoing
        else Advice("See what changed at that step: the data, the verifier, a restart?"),
        reference=REWARD_REFERENCE,
        warned=series.step(loss.warned),
        until=None if loss.crossed is None else series.step(loss.crossed),
    )


@detector("fall_after_climb", Need("steps", "reward"))
def find_fall_after_climb(context: Context) -> list[Finding]:
    """The reward climbed, then lost a quarter of the climb or more; half of it is a collapse."""
    reward, fall = context.reward, context.fall
    if reward is None or fall is None or reward.lost or not fall.climbed:
        return []
    share = (fall.best - fall.end) / (fall.best - fall.start)
    if share < FALLEN_SHARE or not fell_before(reward.series):
        return []
    best, onset = reward.series.step(fall.middle), reward.series.step(fall.onset)
    return [
        Finding(
            name="fall_after_climb",
            severity="warning",
            step=onset,
            message=f"Reward climbed from {fall.start:.2f} to {fall.best:.2f} around step "
            f"{best} and has fallen to {fall.end:.2f} since: {share:.0%} of the climb "
            "is lost.",
            evidence={
                "reward_start": fall.start,
                "reward_peak": fall.best,
                "reward_end": fall.end,
                "best_step": best,
                "lost_share": share,
            },
            advice=Advice(
                f"The reward was best around step {best}.",
                steps=(context.go_back(onset), LOWER_LR),
            ),
            reference=REWARD_REFERENCE,
        )
    ]


@detector("plateau", Need("steps", "reward"), min_steps=PLATEAU_RECORDS)
def find_plateau(context: Context) -> list[Finding]:
    """The reward rose, and has not moved over the later half of the run; it is not solved."""
    reward = context.reward
    if reward is None or reward.solved or not reward.improved or reward.gaining or context.fall:
        return []
    series, begin = reward.series, reward.stands_from
    if not 0 < begin <= (1 - PLATEAU_SHARE) * len(series):
        return []  # from the first record on: then noise hides where it rose
    step = series.step(begin)
    return [
        Finding(
            name="plateau",
            severity="info",
            step=step,
            message=f"Reward rose from {series.level:.2f} and has stood at {series.end:.2f} since "
            f"step {step}, for {len(series) - begin} of {len(series)} records.",
            evidence={"reward_start": series.level, "reward_end": series.end},
            advice=Advice("Check the held-out score: more steps of the same will not help."),
            reference=REWARD_REFERENCE,
        )
    ]


#: Part of the reward at which functions of form, or one function, have taken it over.
MOST = 0.6
#: Mean in [0, 1] below which a function is rarely earned.
RARELY = 0.3
#: Part of the reward that the content has gained, from which on it is learned all the same.
CONTENT_GAIN = 0.25
#: Standard deviation left over, relative to that of the reward, at which weights are unknown.
POOR_FIT = 0.5
#: Parts of the run from which a rise of the form alone is looked for; early it is ordinary.
ALONE_SINCE = (0.5, 0.25)
#: Rise of the form, of its scale and its noise; rise and level at which content stands unsolved.
FORM_GAIN, GAIN_SIGMAS, STOOD, UNSOLVED = 0.2, 4.0, 0.03, 0.8
SILENT_RECORDS = 20
COMPOSITION = "arXiv:2501.12948 (DeepSeek-R1, accuracy and format rewards)"
FUNCTIONS = Need("steps", "rewards/*/mean")


@detector("one_reward_takes_over", FUNCTIONS)
def find_takeover(context: Context) -> list[Finding]:
    """Most of the reward comes from its form, or from one function; the rest is rarely earned."""
    parts = _weighted(context)
    if len(parts) < 2:
        return []
    ends = {name: max(s.end, 0.0) for name, s in parts.items()}
    total = sum(ends.values())
    form = [name for name in parts if grades_form(name)]
    carrying = form if 0 < len(form) < len(parts) else [max(ends, key=ends.__getitem__)]
    rest = [name for name in parts if name not in carrying]
    share = sum(ends[name] for name in carrying) / total if total > 0 else 0.0
    gained = sum(parts[name].end - parts[name].level for name in rest)
    rare = all(context.reward_functions[name].end <= RARELY for name in rest)
    begin = _since(parts, carrying)
    if share < MOST or not rare or gained >= CONTENT_GAIN * total or begin is None:
        return []
    lead, last = " and ".join(sorted(carrying)), " and ".join(sorted(rest))
    level = ", ".join(f"{name} {context.reward_functions[name].end:.2g}" for name in sorted(rest))
    return [
        Finding(
            name="one_reward_takes_over",
            severity="warning" if form and carrying == form else "info",
            step=begin,
            message=f"{lead} {'supplies' if len(carrying) == 1 else 'supply'} most of the reward "
            f"from step {begin} on, {share:.0%} at the end; {last} "
            f"{'is' if len(rest) == 1 else 'are'} rarely earned ({level}).",
            evidence={"function": lead, "share": share, "rest": last},
            advice=Advice(
                f"Compare the weights of {lead} and {last}: the task itself should be what pays."
            ),
            reference=COMPOSITION,
        )
    ]


@detector("form_rises_alone", FUNCTIONS)
def find_form_alone(context: Context) -> list[Finding]:
    """Functions that grade the form rise late, and those of the content stand, unsolved."""
    functions = context.reward_functions
    form = {name: s for name, s in functions.items() if grades_form(name)}
    content = {name: s for name, s in functions.items() if name not in form}
    if not form or not content or find_takeover(context):
        return []
    for since in ALONE_SINCE:
        rose = {name: _gain(s, since) for name, s in form.items()}
        name = max(rose, key=lambda n: rose[n][0])
        gain, noise = rose[name]
        stands = all(_stands(s, since) for s in content.values())
        if gain < max(FORM_GAIN * _scale(form[name]), GAIN_SIGMAS * noise) or not stands:
            continue
        series, rest = form[name], " and ".join(sorted(content))
        step = series.step(int(since * len(series)))
        level = ", ".join(f"{n} {s.end:.2g}" for n, s in sorted(content.items()))
        return [
            Finding(
                name="form_rises_alone",
                severity="warning",
                step=step,
                message=f"From step {step} on {name} rose by {gain:.2g} to {series.end:.2g}, while "
                f"{rest} {'stands' if len(content) == 1 else 'stand'} ({level}): what is gained "
                "is form.",
                evidence={"function": name, "gain": gain, "rest": rest},
                advice=Advice(
                    f"Compare the weights of {name} and {rest}: the task itself should be what "
                    "pays.",
                    steps=(Advice(f"Pay for {name} only where the answer is right."),),
                ),
                reference=COMPOSITION,
            )
        ]
    return []


def _gain(series: Series, since: float) -> tuple[float, float]:
    """Rise from a part of the run to its end, in means of an eighth, and its noise."""
    size = block_size(series)
    begin = int(since * len(series))
    gain = series.values[-size:].mean() - series.values[begin : begin + size].mean()
    return float(gain), float(np.sqrt(2 * (series.noise**2 / size + series.wander)))


def _stands(series: Series, since: float) -> bool:
    gain, noise = _gain(series, since)
    scale = _scale(series)
    return gain <= max(STOOD * scale, 2 * noise) and series.end <= UNSOLVED * scale


def _scale(series: Series) -> float:
    """What a function can give: 1, or the most it gave."""
    return max(1.0, float(np.abs(series.values).max()))


@detector("reward_function_silent", FUNCTIONS)
def find_silent(context: Context) -> list[Finding]:
    """A reward function has given one and the same number all along."""
    found = []
    functions = context.reward_functions
    for name, series in functions.items():
        spread = context.reward_spreads.get(name)
        varies = spread is not None and bool((spread.values > 0).any())
        constant = len(series) >= SILENT_RECORDS and np.ptp(series.values) == 0
        if len(functions) > 1 and constant and not varies:
            found.append(
                Finding(
                    name="reward_function_silent",
                    severity="info",
                    step=series.step(0),
                    message=f"The reward function {name} has been {short(series.end)} at every "
                    "step: it teaches nothing.",
                    evidence={"function": name, "value": series.end},
                    advice=Advice("Check it on a completion that should earn it."),
                    reference=COMPOSITION,
                )
            )
    return found


@detector("reward_silent", Need("steps", "reward"))
def find_silent_reward(context: Context) -> list[Finding]:
    """No step has earned a reward: it is one and the same, 0 or below, all along.

    One that differs within batches or groups may be the same by its mean, or by rounding.
    """
    series, spread = context.series("reward"), context.series("reward_std")
    if len(series) < SILENT_RECORDS or series.values.max() > 0 or np.ptp(series.values):
        return []
    if (spread.values > 0).any() or (context.flat_groups.values < 1).any():
        return []
    return [
        Finding(
            name="reward_silent",
            severity="warning",
            step=series.step(0),
            message=f"The reward has been {short(series.end)} at every step: there is nothing to "
            "learn from it.",
            evidence={"value": series.end},
            advice=Advice(
                "Check that the reward can be earned at all: grade a right completion by hand.",
                steps=(Advice("Mix in easier problems ({data})."),),
            ),
            reference=DAPO,
        )
    ]


def _weighted(context: Context) -> dict[str, Series]:
    """Functions times their weights in the reward, where the log shows them, else as they are."""
    functions = context.reward_functions
    total = context.series("reward")
    known = [s for s in functions.values() if np.array_equal(s.steps, total.steps)]
    if len(known) < len(functions) or len(total) < 4 * len(functions):
        return functions
    columns = np.column_stack([s.values for s in known])
    weights, _, rank, _ = np.linalg.lstsq(columns, total.values, rcond=None)
    left = total.values - columns @ weights
    told = rank == len(known)  # functions that never vary, or alike, may have any weights
    if not told or (weights < 0).any() or left.std() > POOR_FIT * total.values.std():
        return functions
    scaled = zip(functions.items(), weights, strict=True)
    return {name: Series(s.steps, weight * s.values) for (name, s), weight in scaled}


def _since(parts: dict[str, Series], carrying: list[str]) -> int | None:
    """First step from which the carrying functions have had most of the reward; None if not now."""
    shared = next(iter(parts.values())).steps
    if any(not np.array_equal(s.steps, shared) for s in parts.values()):
        return int(shared[0])
    total = sum(np.maximum(s.smooth, 0) for s in parts.values())
    most = sum(np.maximum(parts[name].smooth, 0) for name in carrying) >= MOST * total
    begin = lasting(parts[carrying[0]], np.asarray(most))
    return None if begin is None else int(shared[begin])
