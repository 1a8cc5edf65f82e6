"""Groups, rewards and copies: what whole rollouts show.

Shapes: R rollouts of the audited steps.
"""

import math

import numpy as np
import pandas as pd

from wapo_analysis.audit.evidence import Evidence, first_of
from wapo_analysis.audit.result import NO_SAMPLES, Findings, look
from wapo_analysis.table import Array

_CHANCE = 1e-7
"""Chance below which a copy is not put down to chance."""


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
    place = np.arange(len(unit)) - first[unit]
    with np.errstate(over="ignore"):
        mixed = (token[order] + 1) * (place * 2 + 1) * np.int64(2654435761) + place**3
        mixed = (mixed ^ (mixed >> 17)) * np.int64(40503)
    code = np.zeros(len(first), np.int64)
    np.add.at(code, unit, mixed)
    odds = np.bincount(unit, np.nan_to_num(seen["logp"][order], nan=0.0))
    groups = seen.groups[order][first]
    sizes = np.bincount(unit)
    keys = np.stack([groups, code, sizes])
    _, index, counts = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
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
