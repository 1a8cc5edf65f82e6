"""What whole rollouts show: how advantages were made from rewards, groups, rewards, copies.

Shapes: R rollouts of the audited steps, G groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from wapo_analysis.audit.declared import look
from wapo_analysis.audit.evidence import NO_SAMPLES, OWN_SOURCES, Evidence, Findings, first_of
from wapo_analysis.table import Array

#: Chance below which a copy is not put down to chance.
_CHANCE = 1e-7
#: Largest number that trainers add to a standard deviation before they divide by it.
MOST_OFFSET = 1.2e-3
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
    """What the advantages of the audited rollouts say."""

    #: Keys of `RULES` that fit; several if these rewards cannot tell them apart.
    rules: set[str] = field(default_factory=set)
    #: How the rewards had to be turned for a rule to fit, which is a fault.
    turned: str | None = None
    #: Why nothing is known.
    why_not: str | None = None
    #: Rollouts that show it.
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
    alone = "rank" in table and seen.source not in OWN_SOURCES  # processes of a loop
    parts = table.groupby(["step", "rank"] if alone else ["step"])
    batches = [_Batch(part, seen.rounding) for _, part in parts]
    batches = [b for b in batches if np.ptp(b.reward) > 0 and (b.advantage != 0).any()]
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
    flat = np.abs(numerator) <= 1e-6 * np.abs(b.reward).max()
    if scale is None:
        error = b.rounding * (np.abs(b.advantage) + np.abs(b.reward).max())
        return bool((np.abs(b.advantage - numerator) <= error).all())
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
    largest = np.unique(b.group, return_counts=True)[1].max()
    return b.turned(group=np.arange(len(b.group)) // largest)


#: Faults by which a rule fits all the same.
TURNS: dict[str, Callable[[_Batch], _Batch]] = {
    "the advantages have the wrong sign": lambda b: b.turned(sign=-1.0),
    "the rewards of every rollout's predecessor were used": lambda b: b.turned(
        np.roll(b.reward, 1)
    ),
    "the rewards of every rollout's successor were used": lambda b: b.turned(np.roll(b.reward, -1)),
    "groups were formed from every n-th rollout, not from rollouts of a prompt": _interleaved,
    "groups were formed from neighbouring rollouts, not from rollouts of a prompt": _blocks,
}


def check_groups(seen: Evidence, found: Findings) -> None:
    """Whether the rollouts of a group have one prompt."""
    table = seen.rollouts
    if not len(table) or "prompt" not in table or table["prompt"].isna().all():
        found.missing["groups"] = "prompts were not recorded"
        return
    table = table[(table["group"] >= 0) & table["prompt"].notna()]
    keys = ["step", "group"] + (["rank"] if seen.source not in ("built-in", "trl") else [])
    counts = table.groupby(keys)["prompt"].nunique()
    mixed = int((counts > 1).sum())
    if not mixed:
        found.facts["groups"] = "one prompt in each"
        return
    found.facts["groups"] = f"{mixed} of {len(counts)} hold several prompts"
    found.deviates(
        "groups of several prompts",
        f"{mixed} of {len(counts)} groups hold rollouts of different prompts",
        tokens="all tokens of these groups",
        cause="rollouts were sorted one way and grouped another (view, repeat)",
        look=look(seen.source, "advantage"),
    )


def check_rewards(seen: Evidence, found: Findings) -> None:
    """Whether equal completions of a prompt get the same reward; if not, whether a shift does."""
    table, name = seen.rollouts, "rewards"
    if not len(table) or (seen.groups < 0).any():
        found.missing[name] = "rollouts or their groups were not recorded"
        return
    table = table[np.isfinite(table["reward"])].sort_values(["step", "rollout"], kind="stable")
    keys = _completions(seen, table)
    if keys is None:
        found.missing[name] = "neither texts nor tokens of the completions were recorded"
        return
    pairs, apart = _disagreements(keys, table["reward"].to_numpy(float))
    if pairs < 8:
        found.missing[name] = "too few equal completions of one prompt to compare rewards"
        return
    found.facts[name] = f"equal completions of a prompt: {pairs - apart} of {pairs} agree in reward"
    if apart < 4:
        return
    for shift in (-1, 1):
        rewards = table.groupby("step")["reward"].transform(
            lambda values, shift=shift: np.roll(values, shift)
        )
        if _disagreements(keys, rewards.to_numpy(float))[1] == 0:
            found.deviates(
                "rewards shifted by one rollout",
                f"{apart} of {pairs} equal completions of one prompt have different rewards, and "
                "none if rewards are moved by one rollout",
                tokens=f"rewards are those of the {'successor' if shift > 0 else 'predecessor'}",
                cause="completions and rewards in different order, one dropped at an end",
                look=look(seen.source, "advantage"),
            )
            return


def _completions(seen: Evidence, table: pd.DataFrame) -> Array | None:
    """Number of each rollout's prompt and completion, shape (rollouts,); None if unknown."""
    rows = np.lexsort((seen["position"], seen.units))
    tokens = np.asarray(seen["token_id"], np.int64)
    if not len(tokens) or (tokens < 0).all() or seen.sampled:
        return None
    known: dict[tuple[int, int], bytes] = {}
    cuts = np.flatnonzero(np.diff(seen.units[rows])) + 1
    for part in np.split(rows, cuts):
        key = (int(seen["step"][part[0]]), int(seen["rollout"][part[0]]))
        known[key] = tokens[part].tobytes()
    names: dict[tuple[int, int, bytes], int] = {}
    numbers = []
    for step, group, rollout in table[["step", "group", "rollout"]].itertuples(index=False):
        found = known.get((step, rollout))
        if found is None:
            return None
        numbers.append(names.setdefault((step, group, found), len(names)))
    return np.array(numbers)


def _disagreements(keys: Array, rewards: Array) -> tuple[int, int]:
    """Rollouts beyond the first of their kind, and those among them with another reward."""
    first: dict[int, float] = {}
    pairs = apart = 0
    for key, reward in zip(keys.tolist(), rewards.tolist(), strict=True):
        if key in first:
            pairs += 1
            apart += first[key] != reward
        else:
            first[key] = reward
    return pairs, apart


def check_duplicates(seen: Evidence, found: Findings) -> None:
    """Rollouts that repeat one of the same group, token for token, against all odds."""
    token = np.asarray(seen["token_id"], np.int64)
    rows = np.flatnonzero(seen.first_passes())
    if any(d.name in ("tokens after the end", NO_SAMPLES) for d in found.deviations):
        return  # the odds below are those of sampled tokens
    if not len(rows) or (token < 0).all() or (seen.groups < 0).any():
        return
    order = rows[np.lexsort((seen["position"][rows], seen.units[rows]))]
    unit = np.unique(seen.units[order], return_inverse=True)[1]
    first = first_of(unit)
    names: dict[bytes, int] = {}
    texts = np.split(token[order], first[1:])
    code = np.array([names.setdefault(text.tobytes(), len(names)) for text in texts])
    odds = np.bincount(unit, np.nan_to_num(seen["logp"][order], nan=0.0))
    groups = seen.groups[order][first]
    sizes = np.bincount(unit)
    _, index, counts = np.unique(
        np.stack([groups, code]), axis=1, return_inverse=True, return_counts=True
    )
    pairs = np.bincount(groups)[groups] ** 2 * len(np.unique(groups))
    copies = (counts[index.reshape(-1)] > 1) & (odds + np.log(pairs) < math.log(_CHANCE))
    if copies.sum() >= 2:
        found.deviates(
            "rollouts are repeated",
            f"{int(copies.sum())} rollouts are token for token another one of their group, which "
            "sampling would not give",
            tokens=f"{int(sizes[copies].sum())} tokens; chance of a copy at most "
            f"{math.exp(float(odds[copies].max())):.0e}",
            cause="rollouts copied instead of sampled, one seed for several samples, or greedy "
            "sampling",
            look=look(seen.source, "rollouts"),
        )
