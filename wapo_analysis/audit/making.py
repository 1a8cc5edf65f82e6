"""How advantages were made from rewards, and with which policy the tokens were sampled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from wapo_analysis.table import Array

CLOSE = 2e-3
"""Relative error that rounding and the usual offsets of a standard deviation leave."""
_OFFSETS = (0.0, 1e-8, 1e-6, 1e-5, 1e-4)

Maker = Callable[[Array, Array], Array]


def _grouped(values: Array, group: Array, how: Literal["mean", "size"]) -> Array:
    return np.asarray(pd.Series(values).groupby(group).transform(how).to_numpy())


def _spread(values: Array, group: Array, ddof: int) -> Array:
    by_group = pd.Series(values).groupby(group)
    return np.asarray(by_group.transform(lambda part: part.std(ddof=ddof)).to_numpy())


def _centred(reward: Array, group: Array) -> Array:
    return np.asarray(reward - _grouped(reward, group, "mean"))


def _leave_one_out(reward: Array, group: Array) -> Array:
    size = _grouped(reward, group, "size")
    return np.asarray(_centred(reward, group) * size / np.maximum(size - 1, 1))


def _over(spread: Callable[[Array, Array], Array], offset: float) -> Maker:
    def make(reward: Array, group: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(_centred(reward, group) / (spread(reward, group) + offset))

    return make


def _whole(ddof: int, offset: float) -> Maker:
    def make(reward: Array, group: Array) -> Array:
        return np.asarray((reward - reward.mean()) / (reward.std(ddof=ddof) + offset + 1e-300))

    return make


def _rolled(places: int) -> Callable[[pd.DataFrame], Array]:
    return lambda part: np.roll(_rewards(part), places)


def _rewards(part: pd.DataFrame) -> Array:
    return np.asarray(part["reward"].to_numpy(float))


def _batch(reward: Array, ddof: int) -> Array:
    return np.full(len(reward), np.std(reward, ddof=ddof))


def makers() -> Mapping[str, list[Maker]]:
    """Name to the ways of making advantages that go by it."""
    spreads: dict[str, Callable[[Array, Array], Array]] = {
        "group mean, population std": lambda r, g: _spread(r, g, 0),
        "group mean, sample std": lambda r, g: _spread(r, g, 1),
        "group mean, std of the batch": lambda r, g: _batch(r, 0),
        "group mean, sample std of the batch": lambda r, g: _batch(r, 1),
    }
    scaled = {name: [_over(s, offset) for offset in _OFFSETS] for name, s in spreads.items()}
    return {
        "group mean": [_centred],
        **scaled,
        "leave one out": [_leave_one_out],
        "the reward itself": [lambda r, g: r],
        "batch mean": [lambda r, g: r - r.mean()],
        "batch mean, population std": [_whole(0, offset) for offset in _OFFSETS],
        "batch mean, sample std": [_whole(1, offset) for offset in _OFFSETS],
    }


@dataclass(frozen=True)
class Making:
    """Ways that give the recorded advantages.

    Attributes
    ----------
    names : tuple of str
    shifted : int
        Places by which the rewards are shifted for them to fit, 0 as they are.
    regrouped : bool
        They fit with rollouts grouped in another order than the recorded one.
    """

    names: tuple[str, ...]
    shifted: int = 0
    regrouped: bool = False


def making(rollouts: pd.DataFrame) -> Making | None:
    """How the advantages of some steps were made; None if the rewards do not tell.

    Parameters
    ----------
    rollouts : DataFrame
        ``step, group, rollout, reward, advantage``.
    """
    known = rollouts.dropna(subset=["reward", "advantage"])
    known = known[known["group"] >= 0].sort_values(["step", "rollout"])
    steps = [part for _, part in known.groupby("step") if part["reward"].nunique() > 1]
    if not steps or not any((part["advantage"] != 0).any() for part in steps):
        return None
    names = _fitting(steps, _rewards, _recorded_groups)
    if names:
        return Making(names)
    for places in (1, -1):
        names = _fitting(steps, _rolled(places), _recorded_groups)
        if names:
            return Making(names, shifted=places)
    names = _fitting(steps, _rewards, _other_groups)
    return Making(names, regrouped=bool(names))


def _recorded_groups(part: pd.DataFrame) -> Array:
    return np.asarray(part["group"].to_numpy())


def _other_groups(part: pd.DataFrame) -> Array:
    """Groups in the other of the two usual orders: one after another, or interleaved."""
    count = part["group"].nunique()
    place = np.arange(len(part))
    size = len(part) // count
    blocks = place // max(size, 1)
    recorded = pd.factorize(part["group"])[0]
    return place % count if np.array_equal(recorded, blocks) else blocks


def _fitting(
    steps: list[pd.DataFrame],
    reward_of: Callable[[pd.DataFrame], Array],
    group_of: Callable[[pd.DataFrame], Array],
) -> tuple[str, ...]:
    given = [(reward_of(p), group_of(p), p["advantage"].to_numpy(float)) for p in steps]
    return tuple(
        name
        for name, ways in makers().items()
        if any(all(_same(way(r, g), advantage) for r, g, advantage in given) for way in ways)
    )


def _same(made: Array, recorded: Array) -> bool:
    scale = max(float(np.abs(recorded).max()), 1e-12)
    return bool(np.all(np.abs(made - recorded) <= CLOSE * np.abs(recorded) + 1e-4 * scale))


@dataclass(frozen=True)
class FirstPass:
    """Log-ratios of tokens at their first gradient pass.

    Attributes
    ----------
    off : float
        Share of the tokens whose log-ratio is more than rounding.
    mean, size : float
        Mean log-ratio and mean absolute log-ratio, nats.
    temperature : float
        Sampling temperature over training temperature that explains them, NaN if none does.
    one_sided : bool
        Nearly all differences have the sign of a truncated sampler (top-p, top-k).
    """

    off: float
    mean: float
    size: float
    temperature: float
    one_sided: bool


def first_pass(logp: Array, old: Array, entropy: Array, error: Array) -> FirstPass | None:
    """Compare the log-probabilities of a first pass with those of the sampler, shape (N,) each.

    For a softmax at inverse temperature b the derivative of log p in b is log p + H (at b = 1), so
    a forgotten temperature shows as differences proportional to log p + H.
    """
    known = np.isfinite(logp) & np.isfinite(old)
    if known.sum() < 20:
        return None
    gap, error = (logp - old)[known], error[known]
    far = np.abs(gap) > error
    if far.mean() <= 0.01:
        return FirstPass(
            float(far.mean()), float(gap.mean()), float(np.abs(gap).mean()), np.nan, False
        )
    lever = (logp + entropy)[known]
    told = np.isfinite(lever)
    ratio = np.nan
    if told.sum() >= 20 and float(np.square(lever[told]).sum()) > 0:
        slope = float((lever * gap)[told].sum() / np.square(lever[told]).sum())
        rest = gap[told] - slope * lever[told]
        explained = 1 - float(np.square(rest).sum() / np.square(gap[told]).sum())
        if explained >= 0.8 and abs(slope) >= 0.02:
            ratio = 1 + slope
    one_sided = bool(np.mean(gap[far] < 0) >= 0.995 and far.sum() >= 20)
    return FirstPass(
        float(far.mean()), float(gap.mean()), float(np.abs(gap).mean()), ratio, one_sided
    )
