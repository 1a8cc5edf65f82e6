"""Detectors of a reward that is not what it stands for: held-out score, reference answers."""

from dataclasses import dataclass

import numpy as np

from wapo_analysis.diagnose.advice import Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors import detector, lasting
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.diagnose.reward import straight_rise
from wapo_analysis.series import Series
from wapo_analysis.store import Need
from wapo_analysis.table import Array

MIN_EVALUATIONS = 5
#: Sampled steps with reference answers that are needed.
MIN_ANSWERS = 8
#: Share of completions that must hold the answer at best, else it is written in another form.
SEEN = 0.1
#: Part of that share whose loss counts.
ANSWER_FALL = 0.25
#: Share of rewarded completions without the answer that counts.
UNEARNED = 0.3
#: Part of the answers lost, and share of rewarded completions without one, that leave no doubt.
GONE, MOSTLY = 0.5, 0.6
FALL_SIGMAS = 4.0
#: Evaluations, from the best on, whose straight line down is a fall though each is noisy.
STEADY = 7
#: Part of its best that the held-out score must lose.
FALL_SHARE = 0.15
#: Fall of a score that is worth a word; near zero the rest is a handful of answers.
LEAST_FALL = 0.03
#: Rise of the training reward in [0, 1], or of its scale, that a held-out score should show.
TRAINED = 0.15
#: Part of the rise in training below which the held-out score stands.
STOOD_SHARE = 0.2
HACKING = "arXiv:2209.13085 (reward hacking); arXiv:2210.10760 (overoptimization)"


@detector("held_out_falls", Need("steps", "eval_reward") | Need("steps", "eval/reward"))
def find_held_out_falls(context: Context) -> list[Finding]:
    """A held-out score falls while the training reward does not; of several sets the worst."""
    reward = context.reward
    if reward is not None and reward.lost:
        return []
    falls = {n: f for n, s in context.held_out_sets.items() if (f := _fall(s)) is not None}
    if not falls:
        return []
    name = max(falls, key=lambda n: falls[n].lost)
    fall, others = falls[name], [n for n in falls if n != name]
    score, step = context.held_out_sets[name], fall.step
    gain = reward.gain_since(step) if reward is not None else 0.0
    if reward is not None and gain < -reward.margin:
        return []
    rose = reward is not None and gain > reward.margin
    training = f" while the training reward rose by {gain:.2f}" if rose else ""
    of = f" of {name}" if name else ""
    also = f" So did that of {', '.join(sorted(others))}." if others else ""
    return [
        Finding(
            name="held_out_falls",
            severity="warning",
            step=step,
            message=f"The held-out score{of} fell from {fall.top:.2f} at step {step} to "
            f"{fall.end:.2f} at step {score.step(-1)}{training}.{also}",
            evidence={
                "best": fall.top,
                "end": fall.end,
                "training_gain": gain,
                "evaluations": len(score),
                **({"set": name} if name else {}),
            },
            advice=Advice(
                "What the verifier pays for is no longer what you want.",
                steps=(
                    context.go_back(step),
                    Advice("Read completions that earn the reward since."),
                ),
            ),
            reference=HACKING,
        )
    ]


@dataclass(frozen=True)
class _Fall:
    """A fall of a held-out score from its best, in means of three evaluations."""

    step: int
    top: float
    end: float

    @property
    def lost(self) -> float:
        """Part of the best that is lost."""
        return (self.top - self.end) / abs(self.top) if self.top else 0.0


def _fall(score: Series) -> _Fall | None:
    if len(score) < MIN_EVALUATIONS:
        return None
    near = _near(score)
    best = len(near) - 1 - int(np.argmax(near[::-1]))  # the last: there the score still stood
    top, end = float(near[best]), float(near[-1])
    if top - end < max(FALL_SHARE * abs(top), LEAST_FALL):
        return None
    since = score.values[best + 1 :]
    rise, chance = straight_rise(since) if len(since) >= STEADY else (0.0, 1.0)
    if top - end < FALL_SIGMAS * _noise(score) and -rise < FALL_SIGMAS * chance:
        return None
    return _Fall(score.step(best + 1), top, end)


@detector("held_out_stands", Need("steps", "eval_reward") | Need("steps", "eval/reward"))
def find_held_out_stands(context: Context) -> list[Finding]:
    """The training reward rises clearly, and the held-out score shows a fifth of it or less."""
    score, reward = context.held_out, context.reward
    if reward is None or len(score) < MIN_EVALUATIONS or not reward.improved:
        return []
    begin, end = float(score.values[:2].mean()), float(score.values[-2:].mean())
    rise = reward.series.end - reward.series.level
    scale = max(1.0, float(np.abs(reward.series.values).max()))
    shown = (end - begin) + 2 * _noise(score)
    if rise < TRAINED * scale or shown > STOOD_SHARE * rise / scale or find_held_out_falls(context):
        return []
    step = score.step(0)
    return [
        Finding(
            name="held_out_stands",
            severity="warning",
            step=step,
            message=f"The training reward rose from {reward.series.level:.2f} to "
            f"{reward.series.end:.2f}, yet the held-out score stands ({begin:.2f} to {end:.2f}).",
            evidence={"start": begin, "end": end, "training_gain": rise, "evaluations": len(score)},
            advice=Advice(
                "Read completions that earn the reward: the policy may have learned the verifier, "
                "or the training problems by heart.",
                steps=(
                    Advice("If it is the verifier: grade what you want."),
                    Advice("If it is the problems: give more of them ({data})."),
                ),
            ),
            reference=HACKING,
        )
    ]


@detector("reward_without_answer", Need("steps", "reward"), Need("rollouts", "answer"))
def find_reward_without_answer(context: Context) -> list[Finding]:
    """Completions hold the reference answer ever less often, and the reward does not fall.

    Critical if half of the answers are gone and most of what earns the reward has none. Reads the
    completions of at most ``SAMPLED_STEPS`` steps. Silent where answers are seldom written as the
    reference is.
    """
    held, missed = context.answers
    reward = context.reward
    assert reward is not None
    if reward.lost or len(held) < MIN_ANSWERS:
        return []
    best = np.maximum.accumulate(held.smooth)
    fallen = best - held.smooth
    enough = np.maximum(ANSWER_FALL * best, FALL_SIGMAS * held.smooth_noise)
    begin = lasting(held, (fallen >= enough) & (best >= SEEN))
    if begin is None or missed.end < UNEARNED:
        return []
    step, top = held.step(begin), float(held.smooth.max())
    if reward.gain_since(step) < -reward.margin:
        return []
    gone = lasting(held, (fallen >= np.maximum(GONE * best, enough)) & (best >= 2 * SEEN))
    certain = gone is not None and lasting(missed, missed.smooth >= MOSTLY) is not None
    return [
        Finding(
            name="reward_without_answer",
            severity="critical" if certain else "warning",
            step=step,
            message=f"Completions that hold the reference answer fell from {top:.0%} to "
            f"{held.end:.0%} from step {step} on, yet the reward does not fall; {missed.end:.0%} "
            "of those that earn it are without the answer.",
            evidence={"best": top, "end": held.end, "rewarded_without": missed.end},
            advice=Advice(
                "Read completions that earn the reward without the answer: the verifier may be "
                "gamed, or judge something else."
            ),
            reference=HACKING,
        )
    ]


def held_out_follows(context: Context) -> bool:
    """False if there is a held-out score and it does not follow the training reward."""
    return not (find_held_out_stands(context) or find_held_out_falls(context))


def _near(score: Series) -> Array:
    """Mean of each evaluation and its two neighbours, without those at the ends."""
    return np.convolve(score.values, np.full(3, 1 / 3), "valid")


def _noise(score: Series) -> float:
    """Noise of an evaluation around a smooth course, from second differences: a trend adds none."""
    floor = 0.01 * float(np.abs(score.values).max())
    bends = np.diff(score.values, 2)
    return max(float(np.sqrt(np.mean(bends**2) / 6)), floor)
