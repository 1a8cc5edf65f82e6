"""How advantages were made from rewards: which centre, which scale, over which rollouts.

Shapes: R rollouts of the audited steps, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from wapo_analysis.audit.evidence import OWN_SOURCES, Evidence
from wapo_analysis.table import Array

MOST_OFFSET = 1.2e-3
"""Largest number that trainers add to a standard deviation before they divide by it."""
_LEAST = 4

AGAIN = "group mean and std, then std of the batch"
RULES = {
    "the reward itself": "the reward itself",
    "group mean": "reward minus the group's mean",
    "group mean, population std": "(reward - group mean) / population std of the group",
    "group mean, sample std": "(reward - group mean) / sample std of the group (N - 1)",
    "leave one out": "reward minus the mean of the group's other rollouts",
    "group mean, population std of the batch": "(reward - group mean) / population std of all",
    "group mean, sample std of the batch": "(reward - group mean) / sample std of all (N - 1)",
    "batch mean": "reward minus the batch's mean",
    "batch mean, population std": "(reward - batch mean) / population std of the batch",
    "batch mean, sample std": "(reward - batch mean) / sample std of the batch (N - 1)",
    "group median": "reward minus the group's median",
    AGAIN: "(reward - group mean) / std of the group, then divided by the std of the batch once "
    "more",
}


@dataclass
class Advantages:
    """What the advantages of the audited rollouts say.

    Attributes
    ----------
    rules : set of str
        Keys of `RULES` that fit; several if these rewards cannot tell them apart.
    turned : str or None
        How the rewards had to be turned for a rule to fit, which is a fault.
    why_not : str or None
        Why nothing is known.
    rollouts : int
        Rollouts that show it.
    """

    rules: set[str] = field(default_factory=set)
    turned: str | None = None
    why_not: str | None = None
    rollouts: int = 0


def read_advantages(seen: Evidence) -> Advantages:
    """Find the rules that give the recorded advantages from the recorded rewards."""
    found = Advantages()
    table = _rollouts(seen)
    if table is None or not len(table):
        found.why_not = "no reward of each rollout was recorded"
        return found
    if seen.sampled and seen.source not in OWN_SOURCES:
        found.why_not = "only some of the rollouts were recorded"
        return found
    batches = [_Batch(part, seen.rounding) for _, part in table.groupby("step")]
    batches = [b for b in batches if b.reward.std() > 0 and (b.advantage != 0).any()]
    found.rollouts = sum(len(b.reward) for b in batches)
    if found.rollouts < _LEAST:
        found.why_not = "no step has rewards that differ and advantages that are not 0"
        return found
    if (np.concatenate([b.group for b in batches]) < 0).any():
        found.why_not = "the groups of the rollouts are not known"
        return found
    found.rules = _fitting(batches)
    if found.rules:
        return found
    for told, turn in TURNS.items():
        rules = _fitting([turn(b) for b in batches])
        if rules and found.rollouts >= 2 * _LEAST:
            found.rules, found.turned = rules, told
            return found
    found.why_not = (
        "no known rule gives these advantages from the rewards (shaped or several rewards?)"
    )
    return found


def _rollouts(seen: Evidence) -> pd.DataFrame | None:
    table = seen.rollouts
    names = {"step", "group", "rollout", "reward", "advantage"}
    if not len(table) or not names <= set(table.columns):
        return None
    table = table[np.isfinite(table["reward"]) & np.isfinite(table["advantage"])]
    if "rank" in table and seen.source not in OWN_SOURCES and table["rank"].nunique() > 1:
        table = table.assign(step=table["step"] * 1000 + table["rank"])
    ordered: pd.DataFrame = table.sort_values(["step", "rollout"], kind="stable")
    return ordered


class _Batch:
    """Rewards and advantages of one step, shape (R,) each."""

    def __init__(self, table: pd.DataFrame, rounding: float) -> None:
        self.reward = table["reward"].to_numpy(np.float64)
        self.advantage = table["advantage"].to_numpy(np.float64)
        self.group = table["group"].to_numpy(np.int64)
        self.rounding = 2.2 * rounding + 1e-5

    def turned(self, reward: Array | None = None, group: Array | None = None,
               sign: float = 1.0) -> "_Batch":  # fmt: skip
        other = object.__new__(_Batch)
        other.reward = self.reward if reward is None else reward
        other.group = self.group if group is None else group
        other.advantage, other.rounding = sign * self.advantage, self.rounding
        return other

    def means(self, index: Array) -> Array:
        return np.asarray((np.bincount(index, self.reward) / np.bincount(index))[index])

    def stds(self, index: Array, ddof: int) -> Array:
        away = (self.reward - self.means(index)) ** 2
        count = np.bincount(index)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.sqrt(np.bincount(index, away) / (count - ddof))[index])


def _fitting(batches: list[_Batch]) -> set[str]:
    parts = [_candidates(b) for b in batches]
    fitting = {
        name for name in RULES
        if all(
            any(_fits(b, *way) for way in part[name])
            for b, part in zip(batches, parts, strict=True)
        )
    }  # fmt: skip
    # Where groups are alike, a second division changes nothing.
    return fitting - {AGAIN} or fitting


def _candidates(b: _Batch) -> dict[str, list[tuple[Array, Array | None]]]:
    """Of each rule the ways to compute it: numerator and, if it divides, divisor; shape (R,)."""
    index = np.unique(b.group, return_inverse=True)[1]
    size = np.bincount(index)[index]
    whole = np.zeros(len(index), np.int64)
    centred, from_batch = b.reward - b.means(index), b.reward - b.reward.mean()
    medians = pd.Series(b.reward).groupby(index).transform("median").to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        others = np.where(size > 1, centred * size / (size - 1), 0.0)
    again = []
    for ddof in (0, 1):
        std = b.stds(index, ddof)
        with np.errstate(divide="ignore", invalid="ignore"):
            made = np.where(std > 1e-9, centred / std, 0.0)
        again += [(centred, std * made.std(ddof=other)) for other in (0, 1) if len(made) > other]
    one_way = {
        "the reward itself": (b.reward, None),
        "group mean": (centred, None),
        "group mean, population std": (centred, b.stds(index, 0)),
        "group mean, sample std": (centred, b.stds(index, 1)),
        "leave one out": (others, None),
        "group mean, population std of the batch": (centred, b.stds(whole, 0)),
        "group mean, sample std of the batch": (centred, b.stds(whole, 1)),
        "batch mean": (from_batch, None),
        "batch mean, population std": (from_batch, b.stds(whole, 0)),
        "batch mean, sample std": (from_batch, b.stds(whole, 1)),
        "group median": (b.reward - medians, None),
    }
    return {**{name: [way] for name, way in one_way.items()}, AGAIN: again}


def _fits(b: _Batch, numerator: Array, scale: Array | None) -> bool:
    """Whether A = numerator / (scale + offset) for one small offset, up to rounding."""
    error = b.rounding * (np.abs(b.advantage) + np.abs(b.reward).max())
    flat = np.abs(numerator) <= 1e-6 * max(float(np.abs(b.reward).max()), 1e-30)
    if scale is None:
        return bool((np.abs(b.advantage - numerator) <= error).all())
    error = b.rounding * (np.abs(b.advantage) + 1)
    # A flat group has 0 / offset: whatever rounding left there may be large, or the group gets 0.
    if (flat & (np.abs(b.advantage) > 1e-2)).any():
        return False
    told = ~flat & (np.abs(b.advantage) > 1e-4) & (scale > 1e-3)
    if not told.any() or not np.isfinite(scale[told]).all():
        return False
    offset = numerator[told] / b.advantage[told] - scale[told]
    size = np.abs(b.advantage[told])
    slack = 4 * b.rounding * (scale[told] + np.abs(b.reward).max()) / np.minimum(size, 1)
    middle, least = float(np.median(offset[size >= np.median(size)])), float(slack.min())
    if not -least <= middle <= MOST_OFFSET + least:
        return False
    return bool((np.abs(offset - middle) <= slack).all())


def _interleaved(b: _Batch) -> _Batch:
    """Groups as they were if rollouts of a group stood one group apart."""
    groups = len(np.unique(b.group))
    return b.turned(group=np.arange(len(b.group)) % groups)


def _blocks(b: _Batch) -> _Batch:
    """Groups as they were if rollouts of a group stood one behind the other."""
    return b.turned(group=np.arange(len(b.group)) // np.bincount(b.group - b.group.min()).max())


TURNS: dict[str, Callable[[_Batch], _Batch]] = {
    "the advantages have the wrong sign": lambda b: b.turned(sign=-1.0),
    "the rewards of every rollout's predecessor were used": lambda b: b.turned(
        np.roll(b.reward, 1)
    ),
    "the rewards of every rollout's successor were used": lambda b: b.turned(np.roll(b.reward, -1)),
    "groups were formed from every n-th rollout, not from rollouts of a prompt": _interleaved,
    "groups were formed from neighbouring rollouts, not from rollouts of a prompt": _blocks,
}
"""Faults by which a rule fits all the same."""
