"""Where the entropy is heading: the step at which it would arrive, and a warning before it leaves.

Both look at the logarithm of the entropy, so that a trend is a constant factor per step.
"""

from dataclasses import dataclass

import numpy as np

from wapo_analysis.diagnose.advice import LOWER_LR, Advice
from wapo_analysis.diagnose.context import Context, driver_advice, driver_words, entropy_drivers
from wapo_analysis.diagnose.detectors import detector
from wapo_analysis.diagnose.detectors.entropy import FALL, RISE, find_entropy_fall
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.series import Series, episodes, theil_sen
from wapo_analysis.store import Need
from wapo_analysis.table import Array

#: Name of the finding that comes before the entropy leaves its band.
EARLY = "early_warning"
#: Steps over which the early warning takes the trend.
TREND_WINDOW = 6
#: Mean sign of the pairwise differences in the window (Kendall's tau) that makes a trend.
AGREE = 0.7
#: The same where the predicted dH points the other way.
AGREE_ALONE = 0.85
#: Steps ahead at which the trend must leave the band.
AHEAD = 8
#: Factor by which the entropy must already have moved from its baseline, or its last turn.
MIN_MOVE = 1.1
PERSIST = 2

#: Most steps the trend of the projection is fitted to.
ARRIVAL_STEPS = 200
MIN_ARRIVAL_STEPS = 10
#: Standard deviations of a 99% interval.
CONFIDENCE = 2.576

EARLY_REFERENCE = "arXiv:2606.16154 (WAPO); taxonomy/README.md, first-order dH"
ARRIVAL_REFERENCE = "arXiv:2505.22617 (entropy mechanism); Theil-Sen slope"


@dataclass(frozen=True)
class Trend:
    """Trend of a series at every step, over the window that ends there.

    ``slope`` (n,): median of the pairwise slopes (Theil-Sen), per step; NaN in the first steps;
    ``agree`` (n,): mean sign of the pairwise differences (Kendall's tau), in [-1, 1].
    """

    slope: Array
    agree: Array


def rolling_trend(values: Array) -> Trend:
    """Theil-Sen slope and Kendall's tau over the `TREND_WINDOW` values that end at each step.

    Cost is linear in the steps: the pairs of a window are few. ``values`` (n,).
    """
    slope, agree = np.full(len(values), np.nan), np.zeros(len(values))
    window = TREND_WINDOW
    if len(values) >= window:
        seen = np.lib.stride_tricks.sliding_window_view(values, window)
        first, second = np.triu_indices(window, 1)
        rise = seen[:, second] - seen[:, first]
        slope[window - 1 :] = np.median(rise / (second - first), axis=1)
        agree[window - 1 :] = np.sign(rise).mean(axis=1)
    return Trend(slope, agree)


@detector(
    "early_warning",
    Need("steps", "entropy"),
    Need("classes", "pred_dentropy_sum"),
    min_steps=TREND_WINDOW,
)
def find_early_warning(context: Context) -> list[Finding]:
    """The entropy is about to leave its band: a steady trend, read together with the predicted dH.

    Reported while it lasts, or if the departure it announced came. A trend that the prediction
    agrees with needs less evidence and names the class; one against it says that the steps are too
    large for the first-order law. Downward it counts only while the reward does not pay: not for
    what it paid for on the whole, either.
    """
    series = context.series("entropy")
    if series.values.min() <= 0:
        return []
    for direction in (1, -1):
        if direction == -1 and _paid(context):
            continue
        begin = _announced(context, series, direction)
        if begin is not None:
            return [_early_finding(context, series, begin, direction)]
    return []


def _paid(context: Context) -> bool:
    """A fall is no loss: solved, the reward at its best, or a decline that it paid for."""
    reward = context.reward
    if reward is None:
        return False
    falls = reward.series.end < reward.peak - reward.margin
    if reward.solved or not falls:
        return True
    return any(finding.name == "entropy_decline" for finding in find_entropy_fall(context))


def _announced(context: Context, series: Series, direction: int) -> int | None:
    """Index of the first step of the trend that lasts or was followed by the departure."""
    logs = np.log(series.values)
    trend = rolling_trend(direction * logs)
    level = direction * np.log(series.level)
    edge = np.log(RISE[0]) if direction == 1 else -np.log(FALL[0])
    with np.errstate(invalid="ignore"):
        arrives = direction * logs + AHEAD * trend.slope >= level + edge
        moved = direction * logs - level >= np.log(MIN_MOVE)
    needed = np.where(direction * _predicted(context, series) > 0, AGREE, AGREE_ALONE)
    inside = direction * np.log(series.smooth) < level + edge
    early = arrives & moved & (trend.agree >= needed)
    for start, stop in episodes(early | ~inside, PERSIST):
        if early[start] and stop == len(series):
            return start
    return None


def _predicted(context: Context, series: Series) -> Array:
    """Predicted dH of all classes together over the window that ends at each step, NaN unknown."""
    net = context.pred_dentropy.sum(axis=1).rolling(TREND_WINDOW, min_periods=1).sum()
    return np.asarray(net.reindex(series.steps))


def _early_finding(context: Context, series: Series, begin: int, direction: int) -> Finding:
    step = series.step(begin)
    net = float(_predicted(context, series)[begin])
    known, agrees, up = np.isfinite(net), direction * net > 0, direction == 1
    drivers = entropy_drivers(context, step - TREND_WINDOW + 1, step, direction) if known else ()
    now, why = float(series.values[begin]), ""
    if agrees:
        why = f"; {driver_words(drivers, direction)}"
    elif direction * net < 0:
        why = (
            "; all classes together predict the opposite, so the steps are too large for first "
            "order"
        )
    return Finding(
        name=EARLY,
        severity="warning",
        step=step,
        message=f"Entropy {'rises' if up else 'falls'} steadily at step {step} ({series.level:.3g} "
        f"to {now:.3g} nats) and leaves its band within {AHEAD} steps at this rate{why}.",
        evidence={
            "direction": "up" if up else "down",
            "entropy_start": series.level,
            "entropy_then": now,
            "prediction_agrees": int(agrees),
            "predicted_dentropy": net if known else None,
            **({"class": drivers[0].cls} if drivers else {}),
        },
        advice=driver_advice(drivers)
        if agrees
        else Advice("The entropy has not left its band yet.", steps=(LOWER_LR,)),
        reference=EARLY_REFERENCE,
    )


@detector("entropy_projection", Need("steps", "entropy"), min_steps=2 * MIN_ARRIVAL_STEPS)
def find_arrival(context: Context) -> list[Finding]:
    """Projected step at which the entropy arrives at the ceiling or the floor of its band.

    The ceiling is twice, the floor a fifth of its baseline. Theil-Sen slope of the logarithm over
    the last quarter of the run; reported if its 99% interval leaves out zero and arrival is due
    within as many steps again.
    """
    series = context.series("entropy")
    level = series.level
    if series.values.min() <= 0 or not FALL[0] * level < series.smooth[-1] < RISE[0] * level:
        return []
    count = int(np.clip(len(series) // 4, MIN_ARRIVAL_STEPS, ARRIVAL_STEPS))
    logs, steps = np.log(series.values[-count:]), series.steps[-count:]
    slope, low, high = theil_sen(logs, steps, CONFIDENCE)
    now = float(np.median(logs - slope * (steps - steps[-1])))  # the line at the last step
    up = slope > 0
    slow = low if up else high
    if slope * slow <= 0:
        return []
    target = (RISE[1] if up else FALL[1]) * level
    way = float(np.log(target)) - now
    due = way / slope
    spacing = float(np.median(np.diff(series.steps)))
    if due > len(series) * spacing:
        return []
    last = series.step(-1)
    paid = context.reward is not None and (context.reward.improved or context.reward.solved)
    return [
        Finding(
            name="entropy_arrival",
            severity="info" if paid or due > count * spacing else "warning",
            step=int(steps[0]),
            message=f"At its present rate ({np.expm1(slope):+.1%} a step) the entropy arrives at "
            f"{target:.3g} nats, the {'ceiling' if up else 'floor'} of its band, at step "
            f"{last + due:.0f}.",
            evidence={
                "arrival_step": int(round(last + due)),
                "latest_step": int(round(last + way / slow)),
                "factor_per_step": float(np.exp(slope)),
                "target": target,
            },
            advice=Advice("Fine while the reward rises.")
            if paid
            else Advice("Watch it until then.", steps=(LOWER_LR,)),
            reference=ARRIVAL_REFERENCE,
        )
    ]
