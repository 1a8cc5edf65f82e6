"""Detectors of rewards that are sums: one function that takes over, functions that never speak."""

import numpy as np

from wapo_analysis.diagnose.advice import Advice
from wapo_analysis.diagnose.context import Context, grades_form
from wapo_analysis.diagnose.detectors.registry import detector
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.series import Series
from wapo_analysis.store import Need

MOST = 0.6
"""Part of the reward at which functions of form, or one function, have taken it over."""
RARELY = 0.3
"""Mean in [0, 1] below which a function is rarely earned."""
CONTENT_GAIN = 0.25
"""Part of the reward that the content has gained, from which on it is learned all the same."""
POOR_FIT = 0.5
"""Standard deviation left over, relative to that of the reward, at which weights are unknown."""
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
    if share < MOST or not rare or gained >= CONTENT_GAIN * total:
        return []
    lead, last = " and ".join(sorted(carrying)), " and ".join(sorted(rest))
    begin = _since(context, parts, carrying)
    level = ", ".join(f"{name} {context.reward_functions[name].end:.2g}" for name in sorted(rest))
    return [
        Finding(
            name="one_reward_takes_over",
            severity="warning" if form and carrying == form else "info",
            step=begin,
            message=f"{lead} {'supplies' if len(carrying) == 1 else 'supply'} {share:.0%} of the "
            f"reward from step {begin} on; {last} {'is' if len(rest) == 1 else 'are'} rarely "
            f"earned ({level}).",
            evidence={"function": lead, "share": share, "rest": last},
            advice=Advice(
                f"Compare the weights of {lead} and {last}: the task itself should be what pays."
            ),
            reference=COMPOSITION,
        )
    ]


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
                    message=f"The reward function {name} has been {series.end:.3g} at every step: "
                    "it teaches nothing.",
                    evidence={"function": name, "value": series.end},
                    advice=Advice("Check it on a completion that should earn it."),
                    reference=COMPOSITION,
                )
            )
    return found


def _weighted(context: Context) -> dict[str, Series]:
    """Functions times their weights in the reward, where the log shows them, else as they are."""
    functions = context.reward_functions
    total = context.series("reward")
    known = [s for s in functions.values() if np.array_equal(s.steps, total.steps)]
    if len(known) < len(functions) or len(total) < 4 * len(functions):
        return functions
    columns = np.column_stack([s.values for s in known])
    weights, *_ = np.linalg.lstsq(columns, total.values, rcond=None)
    left = total.values - columns @ weights
    if (weights < 0).any() or left.std() > POOR_FIT * total.values.std():
        return functions
    scaled = zip(functions.items(), weights, strict=True)
    return {name: Series(s.steps, weight * s.values) for (name, s), weight in scaled}


def _since(context: Context, parts: dict[str, Series], carrying: list[str]) -> int:
    """First step from which the carrying functions have had most of the reward."""
    shared = next(iter(parts.values())).steps
    if any(not np.array_equal(s.steps, shared) for s in parts.values()):
        return int(shared[0])
    total = sum(np.maximum(s.smooth, 0) for s in parts.values())
    most = sum(np.maximum(parts[name].smooth, 0) for name in carrying) >= MOST * total
    off = np.flatnonzero(~most)
    return int(shared[min(int(off[-1]) + 1, len(shared) - 1)] if len(off) else shared[0])
