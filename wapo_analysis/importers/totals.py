"""What tokens and rollouts say about a step: sums that add up over parts of any size."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from wapo_analysis.importers.rows import numbers
from wapo_analysis.table import Array


def rollout_totals(frame: pd.DataFrame) -> pd.DataFrame:
    """Rewards per step and group: count, sum, sum of squares, passes, extremes, length sum."""
    reward = numbers(frame["reward"], len(frame))
    length = numbers(frame.get("length"), len(frame))
    group = frame["group"] if "group" in frame else pd.Series(-1, index=frame.index)
    cut = frame["finish_reason"] if "finish_reason" in frame else pd.Series(None, index=frame.index)
    terms = pd.DataFrame(
        {
            "step": frame["step"].to_numpy(),
            "group": pd.to_numeric(group, errors="coerce").fillna(-1).to_numpy(),
            "rewards": np.isfinite(reward).astype(np.int64),
            "sum": reward,
            "squares": reward**2,
            "passes": (reward >= 1).astype(np.int64),
            "low": reward,
            "high": reward,
            "length": length,
            "lengths": np.isfinite(length).astype(np.int64),
            "cut": (cut == "length").to_numpy(np.int64),
            "ends": cut.notna().to_numpy(np.int64),
        }
    )
    return _by_group(terms)


def _by_group(terms: pd.DataFrame) -> pd.DataFrame:
    how = {name: "sum" for name in terms.columns if name not in ("step", "group", "low", "high")}
    grouped = terms.groupby(["step", "group"], as_index=False)
    return grouped.agg({**how, "low": "min", "high": "max"})


@dataclass
class StepTotals:
    """Sums over tokens and rollouts of every step, for the columns of the ``steps`` table."""

    _tokens: dict[int, dict[str, float]] = field(default_factory=dict)
    _rollouts: list[pd.DataFrame] = field(default_factory=list)

    def add_tokens(self, step: int, rows: pd.DataFrame) -> None:
        """Add token rows of one step, columns of the ``tokens`` table."""
        sums: dict[str, float] = self._tokens.setdefault(step, defaultdict(float))
        sums["tokens"] += len(rows)
        given = {name: numbers(rows.get(name), len(rows)) for name in _SUMMED}
        sign = np.sign(given["advantage"])
        log_ratio = given["logp"] - given["logp_old"]
        with np.errstate(over="ignore"):
            _add(sums, "kl_old", np.exp(log_ratio) - 1 - log_ratio)
        _add(sums, "entropy", given["entropy"])
        _add(sums, "entropy_pos", given["entropy"][sign > 0])
        _add(sums, "entropy_neg", given["entropy"][sign < 0])
        _add(sums, "kept_tokens", given["kept"])
        stopped = np.where(given["kept"] > 0, given["clipped"], np.nan)
        _add(sums, "clip_low", np.where(sign < 0, stopped, stopped * 0))
        _add(sums, "clip_high", np.where(sign > 0, stopped, stopped * 0))

    def add_rollouts(self, totals: pd.DataFrame) -> None:
        """Add what :func:`rollout_totals` gave for some rollouts."""
        self._rollouts.append(totals)

    def columns(self) -> dict[int, dict[str, float]]:
        """Columns of the ``steps`` table per step."""
        found: dict[int, dict[str, float]] = {}
        for step, sums in self._tokens.items():
            found[step] = _token_columns(sums)
        if self._rollouts:
            groups = _by_group(pd.concat(self._rollouts, ignore_index=True))
            for name, rows in groups.groupby("step", sort=True):
                found.setdefault(int(str(name)), {}).update(_reward_columns(rows))
        return found


_SUMMED = ("advantage", "logp", "logp_old", "entropy", "kept", "clipped")


def _add(sums: dict[str, float], name: str, values: Array) -> None:
    known = values[np.isfinite(values)]
    if len(known):
        sums[name] += float(known.sum())
        sums[f"{name} n"] += len(known)


def _token_columns(sums: dict[str, float]) -> dict[str, float]:
    columns: dict[str, float] = {"tokens": int(sums["tokens"])}
    for name in ("entropy", "entropy_pos", "entropy_neg", "kl_old", "clip_low", "clip_high"):
        if f"{name} n" in sums:
            columns[name] = sums[name] / sums[f"{name} n"]
    if sums.get("kept_tokens n") == sums["tokens"]:
        columns["kept_tokens"] = int(sums["kept_tokens"])
    return columns


def _reward_columns(rows: pd.DataFrame) -> dict[str, float]:
    count = float(rows["rewards"].sum())
    columns: dict[str, float] = {}
    if count:
        mean = float(rows["sum"].sum()) / count
        columns["reward"] = mean
        columns["reward_std"] = max(float(rows["squares"].sum()) / count - mean**2, 0.0) ** 0.5
        columns["pass_rate"] = float(rows["passes"].sum()) / count
    known = rows[(rows["group"] >= 0) & (rows["rewards"] > 0)]
    if len(known) and (known["rewards"] > 1).any():
        flat = known[known["low"] == known["high"]]
        columns["groups_all_wrong"] = float((flat["low"] <= 0).sum()) / len(known)
        columns["groups_all_right"] = float((flat["low"] > 0).sum()) / len(known)
    if rows["lengths"].sum():
        columns["length"] = float(rows["length"].sum()) / float(rows["lengths"].sum())
    if rows["ends"].sum():
        columns["truncated"] = float(rows["cut"].sum()) / float(rows["ends"].sum())
    return columns
