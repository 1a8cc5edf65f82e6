"""Where two settings part: the first step of a significant difference, and the classes behind it.

A difference is taken step by step, second minus first, pair by pair: runs of one seed saw the same
prompts, so their rewards are paired by prompt and what the prompts decide cancels. Windows of
``WINDOW`` steps are tested against zero, with the level shared out over all steps (Bonferroni), and
the difference must hold for ``PERSIST`` windows in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import wapo_taxonomy as tax
from scipy import special

from wapo_analysis.derive import per_class
from wapo_analysis.errors import counted
from wapo_analysis.results import short
from wapo_analysis.series import episodes, robust_sigma
from wapo_analysis.store import Run
from wapo_analysis.table import Array

WINDOW = 5
PERSIST = 3
#: Chance of a false parting over the whole run, per quantity.
ALPHA = 0.01
#: Share of the prompts of a step both runs must have for a pairing by prompt.
MATCHED = 0.5
#: Steps over which the class shares behind a parting are summed, at least.
MIN_MEAN = 5


@dataclass(frozen=True)
class Gap:
    """Difference of a quantity between two settings, second minus first, at every shared step."""

    #: (n,).
    steps: Array
    #: (n,): means over the pairs, in the unit of the quantity.
    first: Array
    second: Array
    #: (n,): standard error of the difference.
    error: Array


@dataclass(frozen=True, slots=True)
class Parting:
    """Where one quantity parts.

    Attributes
    ----------
    quantity : str
        ``reward``, ``entropy`` or ``pred_dentropy_<class>`` (its share of the predicted dH).
    step : int or None
        Last step of the first window that is significant; None if none is.
    first, second : float
        Means over that window, over the whole run if there is none.
    z : float or None
        Difference over its standard error in that window.
    lasting : bool
        The difference is still there at the end.
    """

    quantity: str
    step: int | None
    first: float
    second: float
    z: float | None
    lasting: bool

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        numbers = {"first": self.first, "second": self.second, "z": self.z}
        known = {k: v if v is not None and np.isfinite(v) else None for k, v in numbers.items()}
        return {"quantity": self.quantity, "step": self.step, **known, "lasting": self.lasting}


@dataclass(frozen=True)
class Divergence:
    """Where two settings part, and why.

    Attributes
    ----------
    names : tuple of str
        First and second.
    pairs : int
        Pairs of runs that were compared.
    paired_by : str
        ``prompt``, ``seed`` (same seed, other prompts) or ``order``.
    partings : tuple of Parting
        Reward, entropy, then the predicted dH of every class that is known.
    behind : tuple of (str, float)
        Classes whose share of the predicted dH differs in the direction of the entropy difference
        up to its parting, with that difference of shares; largest first.
    """

    names: tuple[str, str]
    pairs: int
    paired_by: str
    partings: tuple[Parting, ...]
    behind: tuple[tuple[str, float], ...]

    def parting(self, quantity: str) -> Parting | None:
        """Parting of one quantity; None if the runs do not have it."""
        return next((p for p in self.partings if p.quantity == quantity), None)

    def sentences(self) -> list[str]:
        """Where they part, in words."""
        told = [_words(p) for p in self.partings if p.quantity in ("reward", "entropy")]
        if not told:
            return []
        by = {"prompt": "paired by prompt", "seed": "paired by seed", "order": "not paired"}
        first, second = self.names
        lines = [
            f"Where {second} parts from {first} ({by[self.paired_by]}, "
            f"{counted(self.pairs, 'pair')}; means of {WINDOW} steps up to it): "
            f"{'; '.join(told)}."
        ]
        if self.behind:
            classes = ", ".join(f"{name} {gap * 100:+.0f} pp" for name, gap in self.behind)
            entropy = self.parting("entropy")
            until = f" up to step {entropy.step}" if entropy is not None and entropy.step else ""
            lines.append(f"Classes behind it, by share of the predicted dH{until}: {classes}.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "first": self.names[0],
            "second": self.names[1],
            "pairs": self.pairs,
            "paired_by": self.paired_by,
            "partings": [parting.to_dict() for parting in self.partings],
            "classes": [{"class": name, "share_difference": gap} for name, gap in self.behind],
        }


def _words(parting: Parting) -> str:
    unit = " nats" if parting.quantity == "entropy" else ""
    if parting.step is None:
        return f"{parting.quantity} nowhere"
    held = "" if parting.lasting else ", not to the end"
    return (
        f"{parting.quantity} at step {parting.step} ({short(parting.second)} against "
        f"{short(parting.first)}{unit}{held})"
    )


def divergence(
    names: tuple[str, str], pairs: Sequence[tuple[Run, Run]], by_seed: bool
) -> Divergence:
    """Find where the second run of every pair parts from the first.

    Quantities that one of the runs does not have are left out.

    Parameters
    ----------
    names : (str, str)
        Names of the two settings.
    pairs : sequence of (Run, Run)
        At least one; first and second setting.
    by_seed : bool
        The runs of a pair share their seed.
    """
    rewards = [_prompt_gap(*pair) for pair in pairs]
    matched = all(gap is not None for gap in rewards)
    reward = _pool([g for g in rewards if g is not None]) if matched else _step_gap(pairs, "reward")
    entropy = _step_gap(pairs, "entropy")
    shares = {name: _share_gap(pairs, name) for name in tax.CLASSES}
    named = {"reward": reward, "entropy": entropy}
    named |= {f"pred_dentropy_{name}": gap for name, gap in shares.items()}
    partings = tuple(part(name, gap) for name, gap in named.items() if len(gap.steps) >= WINDOW)
    found = {p.quantity: p for p in partings}
    return Divergence(
        names=names,
        pairs=len(pairs),
        paired_by="prompt" if matched else "seed" if by_seed else "order",
        partings=partings,
        behind=_behind(shares, found.get("entropy")),
    )


def part(quantity: str, gap: Gap) -> Parting:
    """Test the windows of a difference and take the first that is significant.

    z is the sum of the differences over the root of the summed squared errors of the window; the
    bound is the two-sided normal quantile at ``ALPHA`` over the number of windows. ``gap``: at
    least ``WINDOW`` steps.
    """
    difference = gap.second - gap.first
    total = _window_sums(difference)
    spread = np.sqrt(_window_sums(gap.error**2))
    z = np.divide(total, spread, out=np.zeros_like(total), where=spread > 0)
    bound = float(-special.ndtri(ALPHA / 2 / len(z)))
    persist = min(PERSIST, len(z))
    found = sorted(episodes(z >= bound, persist) + episodes(-z >= bound, persist))
    if not found:
        return Parting(quantity, None, _mean(gap.first), _mean(gap.second), None, False)
    begin, end = found[0][0], found[0][0] + WINDOW
    return Parting(
        quantity,
        int(gap.steps[end - 1]),
        _mean(gap.first[begin:end]),
        _mean(gap.second[begin:end]),
        float(z[begin]),
        bool(found[-1][1] == len(z) and z[-1] * z[begin] > 0),
    )


def _window_sums(values: Array) -> Array:
    """Sums over every window of ``WINDOW`` values, shape (n - WINDOW + 1,)."""
    sums = np.cumsum(np.r_[0.0, values])
    return np.asarray(sums[WINDOW:] - sums[:-WINDOW])


def _mean(values: Array) -> float:
    return float(np.mean(values))


def _prompt_gap(first: Run, second: Run) -> Gap | None:
    """Reward, paired by prompt; None unless most prompts of every shared step match."""
    tables = [_prompt_rewards(run) for run in (first, second)]
    if any(table.empty for table in tables):
        return None
    both = pd.concat(tables, axis=1, keys=["first", "second"])
    shared = both.index.get_level_values("step").isin(
        set(tables[0].index.get_level_values("step"))
        & set(tables[1].index.get_level_values("step"))
    )
    both = both[shared]
    if not len(both) or both.notna().all(axis=1).groupby(level="step").mean().min() < MATCHED:
        return None
    known = both.dropna()
    difference = (known["second"] - known["first"]).groupby(level="step")
    means = known.groupby(level="step").mean()
    error: pd.Series = difference.std() / np.sqrt(difference.size())
    return Gap(
        means.index.to_numpy(np.int64),
        means["first"].to_numpy(np.float64),
        means["second"].to_numpy(np.float64),
        # One matched prompt gives no spread; a fresh look at the others is as good a guess.
        error.fillna(error.median()).fillna(0.0).to_numpy(np.float64),
    )


def _prompt_rewards(run: Run) -> pd.Series:
    """Mean reward per step and prompt."""
    rows = run.rollouts
    rows = rows[rows["prompt"].notna() & rows["reward"].notna()]
    return rows.groupby(["step", "prompt"])["reward"].mean()


def _step_gap(pairs: Sequence[tuple[Run, Run]], column: str) -> Gap:
    """A step column, pair by pair."""

    def of(run: Run) -> pd.Series:
        return pd.Series(run.column(column), run.steps["step"])

    return _pool([_series_gap(*map(of, pair)) for pair in pairs])


def _share_gap(pairs: Sequence[tuple[Run, Run]], name: str) -> Gap:
    """Signed share of a class in the predicted dH of each step, pair by pair."""
    return _pool([_series_gap(*(dentropy_shares(run)[name] for run in pair)) for pair in pairs])


def dentropy_shares(run: Run) -> pd.DataFrame:
    """Signed predicted dH of each class over the sum of the sizes of all, per step.

    Index step, a column per class of the taxonomy; steps without any are left out. Shares,
    so that objectives of different scale compare.
    """
    table = per_class(run.classes, "pred_dentropy_sum")
    gross = table.abs().sum(axis=1)
    return table[gross > 0].div(gross[gross > 0], axis=0)


def _series_gap(first: pd.Series, second: pd.Series) -> Gap:
    """Two series at the steps both have; the error comes from how neighbours of the gap differ."""
    both = pd.concat([first, second], axis=1, keys=["first", "second"]).dropna()
    difference = (both["second"] - both["first"]).to_numpy(np.float64)
    apart = np.diff(difference)
    error = robust_sigma(apart) / np.sqrt(2) if len(apart) else 0.0
    return Gap(
        both.index.to_numpy(np.int64),
        both["first"].to_numpy(np.float64),
        both["second"].to_numpy(np.float64),
        np.full(len(both), error),
    )


def _pool(gaps: Sequence[Gap]) -> Gap:
    """Mean over pairs at the steps all of them have; errors of the mean."""
    shared = gaps[0].steps
    for gap in gaps[1:]:
        shared = np.intersect1d(shared, gap.steps)
    rows = [np.isin(gap.steps, shared) for gap in gaps]
    first = np.mean([gap.first[row] for gap, row in zip(gaps, rows, strict=True)], axis=0)
    second = np.mean([gap.second[row] for gap, row in zip(gaps, rows, strict=True)], axis=0)
    squares = np.sum([gap.error[row] ** 2 for gap, row in zip(gaps, rows, strict=True)], axis=0)
    return Gap(shared, first, second, np.sqrt(squares) / len(gaps))


def _behind(shares: dict[str, Gap], entropy: Parting | None) -> tuple[tuple[str, float], ...]:
    """Classes whose share of the predicted dH differs the way the entropy parts."""
    if entropy is None or entropy.step is None:
        return ()
    way = np.sign(entropy.difference)
    gaps = {}
    for name, gap in shares.items():
        chosen = gap.steps <= entropy.step
        if chosen.sum() >= MIN_MEAN:
            gaps[name] = _mean((gap.second - gap.first)[chosen])
    same_way = {name: gap for name, gap in gaps.items() if gap * way > 0}
    return tuple(sorted(same_way.items(), key=lambda item: -abs(item[1])))
