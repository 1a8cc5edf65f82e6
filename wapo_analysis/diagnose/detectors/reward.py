"""Detectors of the reward: lost after it was earned, fallen after a climb, standing still."""

from wapo_analysis.diagnose.advice import LOWER_LR, Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.registry import detector
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.store import Need

FALLEN_SHARE = 0.25
"""Share of a climb that a fall must undo to be worth a word."""
PLATEAU_RECORDS = 40
"""Records of reward below which standing still says nothing."""
PLATEAU_SHARE = 0.5
"""Part of the run that the reward must have stood."""
REWARD_REFERENCE = "arXiv:2606.16154 (WAPO)"


@detector("reward_collapse", Need("steps", "reward"))
def find_reward_loss(context: Context) -> list[Finding]:
    """At least half of the reward's gain, or of its baseline, lost to the end; or a quarter."""
    reward = context.reward
    if reward is None or reward.loss is None:
        return []
    series, loss, severe = reward.series, reward.loss, reward.lost
    if not severe and loss.ongoing and context.fall is not None and context.fall.climbed:
        return []
    entropy = context.series("entropy")
    onset = series.step(loss.onset)
    back = "" if loss.ongoing else ", then came back"
    low = float(series.smooth[loss.onset :].min())
    said = f"Reward fell from {reward.peak:.2f} at its best to {low:.2f} from step {onset}{back}."
    ends = {"entropy_start": entropy.level, "entropy_end": entropy.end} if len(entropy) else {}
    return [
        Finding(
            name="reward_collapse" if severe else "reward_drop",
            severity="critical" if severe else "warning" if loss.ongoing else "info",
            step=onset,
            message=said,
            evidence={
                **reward.evidence(),
                "best_step": reward.best_step,
                "lost_share": (reward.peak - series.end) / reward.peak if reward.peak > 0 else None,
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
    ]


@detector("fall_after_climb", Need("steps", "reward"))
def find_fall_after_climb(context: Context) -> list[Finding]:
    """The reward climbed, then lost a quarter of the climb or more; half of it is a collapse."""
    reward, fall = context.reward, context.fall
    if reward is None or fall is None or reward.lost or not fall.climbed:
        return []
    share = (fall.best - fall.end) / (fall.best - fall.start)
    if share < FALLEN_SHARE:
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
    if len(series) - begin < PLATEAU_SHARE * len(series):
        return []
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
