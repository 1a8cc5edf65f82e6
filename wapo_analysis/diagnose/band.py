"""The band that entropy is judged by, in nats: the thresholds of ``diagnose`` as four levels."""

from dataclasses import dataclass

from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.entropy import (
    FALL,
    FALL_LOST,
    FALL_UNPAID,
    MIN_RISE,
    RISE,
    SIGMAS,
)


@dataclass(frozen=True, slots=True)
class Band:
    """Levels of the smoothed entropy, nats.

    Attributes
    ----------
    level : float
        The run's own baseline.
    low, high : float
        Beyond these it warns.
    lowest, highest : float
        Beyond these it is a collapse (unless the reward pays for it), or an explosion.
    """

    level: float
    low: float
    high: float
    lowest: float
    highest: float


def entropy_band(context: Context) -> Band | None:
    """Levels around the baseline of a run, in nats; None without entropy.

    They are those of ``find_entropy_rise`` and ``find_entropy_fall``: ratios to the baseline, and
    at least ``SIGMAS`` standard deviations of the gap away from it.
    """
    series = context.series("entropy")
    if not len(series):
        return None
    level = series.level
    least = level + max(SIGMAS * series.gap_noise, MIN_RISE)
    most = level - SIGMAS * series.gap_noise
    reward = context.reward
    deep = FALL_UNPAID if reward is None else FALL_LOST if reward.lost else FALL[1]
    return Band(
        level=level,
        low=min(FALL[0] * level, most),
        high=max(RISE[0] * level, least),
        lowest=min(deep * level, most),
        highest=max(RISE[1] * level, least),
    )
