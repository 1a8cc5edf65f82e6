"""Detectors of what the policy writes: cut off, repetitive, longer or shorter, always the same."""

import numpy as np

from wapo_analysis.diagnose.advice import LOWER_LR, Advice, leave_out
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors import (
    LEVEL_SIGMAS,
    detector,
    lasting,
    level_finding,
    risen,
)
from wapo_analysis.diagnose.detectors.heldout import held_out_follows
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.diagnose.reward import FEW, RISING, straight_rise
from wapo_analysis.results import short
from wapo_analysis.series import Series
from wapo_analysis.store import Need

DRIFT = 0.15
HALF = 0.5
#: Ratio to the baseline, either way, at which the length has drifted.
LENGTH_RATIO = 1.5
#: Move over the later half of a drift, relative to the baseline, that goes on.
MOVES = 0.05
#: Correlation of reward and length within groups, either way, that counts as paying for length.
PAY = 0.15
#: The same correlation where hardly anything but the length decides.
PAY_DECIDES = 0.5
#: Standard deviations of its mean over the steps that it must be from zero then.
PAY_SIGMAS = 3.0
#: Steps over which the correlation is taken, at least; of a long run it is the later half.
MIN_PAY_STEPS = 8
#: Move of the length, relative to the baseline, that shows the pay is taken.
PAID_MOVE = 0.06
#: Part of the logged diversity that is left, and the fall in itself, that count.
DISTINCT_LEFT, DISTINCT_FALL = 0.5, 0.15
#: Rise of the share of answers that other prompts got too.
SAME = 0.25
DAPO = "arXiv:2503.14476 (DAPO)"
LENGTH_BIAS = "arXiv:2503.20783 (length bias of GRPO); arXiv:2503.14476 (DAPO)"
TAXONOMY = "arXiv:2606.16154 (WAPO); taxonomy/README.md"
GAMING = "arXiv:2209.13085 (reward hacking); reward-doctor and other verifier audits"


@detector("truncation_drift", Need("steps", "truncated"))
def find_truncation(context: Context) -> list[Finding]:
    """More and more completions are cut at the length limit, or most of them are."""
    series = context.series("truncated")
    begin = risen(series, DRIFT, HALF)
    thirds = [part.mean() for part in np.array_split(series.values, 3)]
    if min(thirds) >= HALF:
        begin = 0  # most were cut all along, whatever the noise of a few completions a step
    return level_finding(
        series,
        begin,
        name="truncation_drift",
        severity="warning",
        what="Many completions are cut at the limit",
        advice=Advice(
            "Read some that are cut off.",
            steps=(
                Advice("If they are sound: raise {max_new_tokens}."),
                Advice("If they ramble, the entropy is the cause: see the other findings."),
            ),
        ),
        reference=DAPO,
    )


@detector("repetition_drift", Need("steps", "repetition"))
def find_repetition(context: Context) -> list[Finding]:
    """Completions repeat themselves more and more."""
    series = context.series("repetition")
    return level_finding(
        series,
        risen(series, DRIFT, HALF),
        name="repetition_drift",
        severity="warning",
        what="Completions repeat themselves",
        advice=Advice(
            "Read completions of these steps.",
            steps=(LOWER_LR, leave_out("neg_valley")),
        ),
        reference=TAXONOMY,
    )


@detector("length_drift", Need("steps", "length"))
def find_length_drift(context: Context) -> list[Finding]:
    """Completions end 1.5 times longer or shorter than they began.

    What the reward pays for is an info: it may be learning to reason at length, or to come to the
    point. Where a held-out score shows nothing of it, it is a warning.
    """
    series = context.series("length")
    if series.level <= 0:
        return []
    least = LEVEL_SIGMAS * series.gap_noise
    longer = lasting(
        series, series.smooth >= max(LENGTH_RATIO * series.level, series.level + least)
    )
    shorter = lasting(
        series, series.smooth <= min(series.level / LENGTH_RATIO, series.level - least)
    )
    begin = longer if longer is not None else shorter
    reward = context.reward
    paid = reward is not None and reward.rising
    alone = paid and not held_out_follows(context)
    goes_on = begin is not None and _goes_on(series, begin)
    what = f"Completions {'keep getting' if goes_on else 'are'} "
    what += "longer" if longer is not None else "shorter"
    if alone:
        what += ", which the training reward pays for and the held-out score does not,"
    return level_finding(
        series,
        begin,
        name="length_drift",
        severity="info" if paid and not alone else "warning",
        what=what,
        advice=_length_advice(longer is not None, paid and not alone),
        reference=LENGTH_BIAS,
        share=False,
        evidence={"ratio": series.end / series.level},
    )


def _goes_on(series: Series, begin: int) -> bool:
    """Whether the later half of what came since an index still moves away from the baseline."""
    later = series.values[(begin + len(series)) // 2 :]
    if len(later) <= FEW:
        return True
    rise, noise = straight_rise(later)
    way = float(np.sign(series.end - series.level))
    return way * rise > max(RISING * noise, MOVES * series.level)


def _length_advice(longer: bool, paid: bool) -> Advice:
    if longer:
        if paid:
            return Advice("Fine while the reward rises; watch how many are cut at the limit.")
        return Advice(
            "Read the longest completions: nothing is gained by their length.",
            steps=(Advice("Use a loss without length bias ({no_length_bias})."),),
        )
    if paid:
        return Advice(
            "Fine if they are as good as before; read some: a verifier that can be gamed is often "
            "gamed by leaving the work out."
        )
    return Advice(
        "Read completions: an early end-of-text is often the first sign of collapse.",
        steps=(LOWER_LR,),
    )


@detector("reward_pays_for_length", Need("steps", "length"), Need("rollouts", "length"))
def find_length_pay(context: Context) -> list[Finding]:
    """Within groups the reward goes with the length, and the length has moved the way it pays.

    Reads the completions of at most ``SAMPLED_STEPS`` steps. Shorter is a warning: the cheapest
    way to game a verifier is to leave the work out. Longer is an info, unless length alone all but
    decides what a completion earns and has grown 1.5 times.
    """
    series, pay = context.series("length"), context.length_pay
    if series.level <= 0 or not len(pay):
        return []
    late = pay.values[-max(MIN_PAY_STEPS, len(pay) // 2) :]
    paid = float(np.median(late))
    way = float(np.sign(paid))
    moved = way * (series.smooth - series.level)
    begin = lasting(series, moved >= max(PAID_MOVE * series.level, 4 * series.gap_noise))
    if begin is None or abs(paid) < PAY:
        return []
    step, words = series.step(begin), "longer" if way > 0 else "shorter"
    sure = abs(late.mean()) >= PAY_SIGMAS * late.std() / np.sqrt(len(late))
    decides, grown = abs(paid) >= PAY_DECIDES and sure, series.end >= LENGTH_RATIO * series.level
    return [
        Finding(
            name="reward_pays_for_length",
            severity="warning" if way < 0 or (decides and grown) else "info",
            step=step,
            message=f"Within groups {words} completions earn more (correlation {paid:+.2f}), "
            f"and from step {step} on they are {words} ({short(series.level)} to "
            f"{short(series.end)} tokens).",
            evidence={"correlation": paid, "start": series.level, "end": series.end},
            advice=Advice(
                "Read what earns the reward: if an answer is no better for its length, the "
                "verifier pays for the form."
            ),
            reference=GAMING,
        )
    ]


@detector("degenerate_completions", Need("rollouts", "completion"))
def find_degenerate(context: Context) -> list[Finding]:
    """Different prompts get the same completion, more and more of them.

    Reads the completions of at most ``SAMPLED_STEPS`` steps. That the answer no longer depends on
    the question is what collapse to one answer and a gamed verifier have in common.
    """
    series = context.sameness
    begin = degenerate_since(series)
    reward = context.reward
    paid = reward is not None and reward.improved
    return level_finding(
        series,
        begin,
        name="degenerate_completions",
        severity="warning",
        what="Different prompts get the same completion",
        advice=Advice(
            "The reward rises while answers stop depending on the prompt: audit the verifier on "
            "these completions before training on."
        )
        if paid
        else Advice(
            "Answers no longer depend on the question.",
            steps=(
                Advice("Go back to the last checkpoint before it."),
                LOWER_LR,
                leave_out("pos_peak", "neg_valley"),
            ),
        ),
        reference=GAMING if paid else TAXONOMY,
    )


@detector("garbled_completions", Need("rollouts", "completion"))
def find_garbled(context: Context) -> list[Finding]:
    """Completions turn into noise: one character over and over, or scripts mixed.

    Reads the completions of at most ``SAMPLED_STEPS`` steps.
    """
    series = context.noise
    return level_finding(
        series,
        risen(series, DRIFT, HALF) if len(series) else None,
        name="garbled_completions",
        severity="warning",
        what="Completions turn into noise, one character repeated or scripts mixed,",
        advice=Advice(
            "See whether the trainer's own weights write noise too.",
            steps=(
                Advice(
                    "If the sampler alone does, its weights or its precision differ from the "
                    "trainer's: compare the two."
                ),
                Advice("If both do: go back to the last checkpoint before it."),
                LOWER_LR,
            ),
        ),
        reference=TAXONOMY,
    )


def degenerate_since(series: Series) -> int | None:
    """Index from which the share of shared answers stands above its baseline; None if never."""
    if not len(series):
        return None
    least = max(SAME, LEVEL_SIGMAS * series.smooth_noise)
    return lasting(series, np.asarray(series.smooth >= series.level + least))


@detector("diversity_falls", Need("steps", "distinct"))
def find_fewer_distinct(context: Context) -> list[Finding]:
    """The logged diversity of completions falls to half of its baseline or less, to the end."""
    series = context.series("distinct")
    if series.values.min() < 0 or series.values.max() > 1:
        return []
    fall = max(DISTINCT_FALL, LEVEL_SIGMAS * series.gap_noise)
    least = min(DISTINCT_LEFT * series.level, series.level - fall)
    return level_finding(
        series,
        lasting(series, series.smooth <= least),
        name="diversity_falls",
        severity="warning",
        what="Completions resemble each other more (their diversity as logged)",
        advice=Advice(
            "Read completions of one prompt side by side: is it one answer in one wording?",
            steps=(Advice("Raise {temperature}."), LOWER_LR),
        ),
        reference=TAXONOMY,
    )
