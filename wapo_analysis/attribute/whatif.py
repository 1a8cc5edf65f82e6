"""How the entropy path of a run would have changed without some classes, from its probes.

A probe says by how much one class moves the mean entropy with its share of one update: of tokens
of the step before, which had no part in the update, for a step moves its own tokens more than any
that come after. Summed over the updates of the run that gives the class's part of the path. Two
things are added that the share alone does not hold:

* AdamW keeps (1 - beta1) of a gradient for the present update and spends the rest over the updates
  that follow. Over its life a gradient does ``(1 - beta1^t) / (1 - beta1)`` times its share.
* Without a class the rest of the gradient is smaller, and AdamW divides by that smaller size: the
  remaining classes act ``rho`` times as much, with rho^2 the sum of |g|^2 over that of |g_kept|^2
  over the probes so far (g clipped to max_grad_norm). SGD rescales by clipping alone.

With kept and all the effect of the kept classes and of all classes, interpolated between probes,

    estimated(t) = H(t) exp( sum_(s < t) updates life(s) (rho(s) kept(s) - all(s)) / H(s) )

The entropy of a step is that of the policy before its updates. The sum is over relative changes
because a push fades with the entropy that is left to push: every first-order dH vanishes as p goes
to 1. The estimate takes the batches of the recorded run, so it cannot know of samples that the
changed policy would have drawn.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.errors import UserError, counted, unknown_name
from wapo_analysis.probes import complete, trust
from wapo_analysis.results import Block, Command, Grid, Result, Say, Section, plain
from wapo_analysis.schema import GRADIENT, OTHER_TOKENS, UPDATE
from wapo_analysis.store import Run
from wapo_analysis.table import Array

MIN_PROBES = 3
_PARTS = (*range(len(tax.CLASSES)), GRADIENT, UPDATE)
RESAMPLES = 400
BAND = (0.05, 0.95)
#: Steps averaged at either end of the path.
ENDS = 5
#: Nats; less than two runs of one setting differ by.
SMALL_EFFECT = 0.005
#: Factor by which real effects miss estimated ones that stay in the recorded range, at most
#: (docs/attribution.md).
MODEL_FACTOR = 1.5
#: Nats; below this entropy relative changes are no longer trusted.
SMALLEST = 1e-3
_LARGEST_SHIFT = 50.0  # exp of it is far above any ceiling and still finite


@dataclass(frozen=True, kw_only=True)
class WhatIf(Result):
    """Estimated entropy path of a run without some classes, and whether it says anything.

    Attributes
    ----------
    run : str
        Name of the run.
    excluded : tuple of str
        Class names taken out.
    path : DataFrame
        ``step``, ``recorded`` and ``estimated`` entropy, ``low`` and ``high`` (90% band of a
        bootstrap over probes, widened by ``factor``), nats.
    recorded_change, estimated_change : float
        Change from the first steps to the last, nats.
    low, high : float
        Band of the estimated change.
    factor : float
        How many times larger or smaller the real effect may be than the estimated one.
    accounted : float
        Change of the recorded path according to the probes' whole updates, over the recorded
        change: near 1 if fixed tokens tell what fresh samples show; NaN if nothing changed.
    probes : int
        Probes it rests on.
    trust : DataFrame
        How often the predicted dH of each class had the right sign in this run; see
        :func:`wapo_analysis.probes.trust`.
    command : str or None
        Command of the true counterfactual; None if the built-in trainer did not write the run.
    """

    run: str
    excluded: tuple[str, ...]
    path: pd.DataFrame
    recorded_change: float
    estimated_change: float
    low: float
    high: float
    factor: float
    accounted: float
    probes: int
    trust: pd.DataFrame
    command: str | None

    @property
    def effect(self) -> float:
        """Estimated minus recorded change: what taking the classes out does, nats."""
        return self.estimated_change - self.recorded_change

    @property
    def is_clear(self) -> bool:
        """The band of the effect does not hold zero, and the effect is worth a word."""
        inside = self.low <= self.recorded_change <= self.high
        return not inside and abs(self.effect) >= SMALL_EFFECT

    @property
    def inside(self) -> bool:
        """The estimated path stays within the entropies that the run recorded."""
        known, path = self.path["recorded"], self.path["estimated"]
        low, high = known.min() - SMALL_EFFECT, known.max() + SMALL_EFFECT
        return bool(path.between(low, high).all())

    @property
    def silence(self) -> str | None:
        """Why nothing can be said; None if something can."""
        if not self.is_clear:
            return "the band of the probes holds zero"
        if not np.isfinite(self.factor):
            return "the probed updates do not account for the recorded path"
        if not self.inside:
            low, high = self.path["recorded"].min(), self.path["recorded"].max()
            return (
                f"the estimate leaves the entropies this run has seen ({low:.3f} to {high:.3f} "
                "nats), where its updates would have been others"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``says`` is None where nothing can be said."""
        says = None if self.silence else "higher" if self.effect > 0 else "lower"
        found: dict[str, Any] = plain(
            {
                "run": self.run,
                "excluded": list(self.excluded),
                "says": says,
                "silence": self.silence,
                "recorded_change": self.recorded_change,
                "estimated_change": self.estimated_change,
                "band": [self.low, self.high],
                "effect": self.effect,
                "clear": self.is_clear,
                "accounted": self.accounted,
                "probes": self.probes,
                "command": self.command,
                "trust": self.trust.to_dict("records"),
                "path": self.path.to_dict("records"),
            },
            digits=6,
        )
        return found

    def page(self) -> Section:
        """Direction and band where they hold, else the command that tells; and the trust."""
        parts: list[Block] = [Say(self._answer())]
        if self.silence is not None:
            parts.append(Command(self.command) if self.command else Say(_AGAIN))
        first, last = self.path["recorded"].iloc[0], self.path["recorded"].iloc[-1]
        said = f"Recorded: entropy {first:.3f} to {last:.3f} nats; {counted(self.probes, 'probe')}."
        parts.append(Say(said))
        if self.silence is None:
            parts.append(Grid(self._rows(), left=0))
        if len(self.trust):
            parts.append(Section("Predictions of this run that had the right sign", self._trust()))
        return Section(self.run, parts)

    def _answer(self) -> str:
        without = " and ".join(self.excluded)
        if self.silence is not None:
            return f"Cannot say what leaving {without} out would do: {self.silence}. Re-run it:"
        way = "higher" if self.effect > 0 else "lower"
        ends = sorted(abs(end - self.recorded_change) for end in (self.low, self.high))
        return (
            f"Without {without} entropy would have ended {way}, by {ends[0]:.3f} to {ends[1]:.3f} "
            "nats (90% band)."
        )

    def _rows(self) -> list[list[str]]:
        """A few rows of the path."""
        rows = [["step", "recorded", "estimated", "90% band"]]
        last = len(self.path) - 1
        for place in sorted({round(i * last / 9) for i in range(10)}):
            row = self.path.iloc[place]
            numbers = [f"{row[name]:.3f}" for name in ("recorded", "estimated")]
            rows.append([str(int(row["step"])), *numbers, f"{row['low']:.3f} to {row['high']:.3f}"])
        return rows

    def _trust(self) -> list[Block]:
        rows = [["class", "class alone", "whole update"]]
        for row in self.trust.to_dict("records"):
            alone = f"{row['alone']} of {row['alone_of']}"
            rows.append([str(row["cls"]), alone, f"{row['whole']} of {row['updates']}"])
        return [Grid(rows), Say("Of the class's own tokens, over the probed updates.")]


_AGAIN = "train it again with these classes left out of the loss"


def what_if(run: Run, exclude: Sequence[str]) -> WhatIf:
    """Estimate the entropy path of a run without some classes; see the head of this module.

    Raises UserError on an unknown name, if the classes had no gradient or all of it, or if the run
    has too few probes or no entropy. ``run``: a run of the built-in trainer with probes;
    ``exclude``: classes, regimes or signs, as ``exclude_bins`` takes them.
    """
    if unknown := [name for name in exclude if name not in tax.BIN_NAMES]:
        raise unknown_name("bin", unknown[0], tax.BIN_NAMES)
    names = tax.expand_bins(exclude)
    if not names:
        raise UserError(f"name the classes to exclude: {', '.join(tax.CLASSES)}, pos, neg, ...")
    _check_worth_asking(run, names)
    probes = _usable_probes(run)
    settings = _Settings.of(run)
    table = _effects(probes, settings, np.array([name not in names for name in tax.CLASSES]))
    recorded = run.steps[["step", "entropy"]].dropna()
    if recorded.empty:
        raise UserError(f"{run.name} has no entropy in its step log")
    steps, entropy = recorded["step"].to_numpy(), recorded["entropy"].to_numpy(np.float64)
    weights = settings.updates * _shares(table["step"].to_numpy(), steps)
    extra = table["extra"].to_numpy()
    relative = _before(weights / np.maximum(entropy, SMALLEST)[:, None])
    explained = _before(weights) @ table["update"].to_numpy()
    change = _change(entropy, entropy)
    accounted = _change(explained, explained) / change if change else float("nan")
    factor = _model_factor(accounted, change)
    wide = factor if np.isfinite(factor) else MODEL_FACTOR
    low, high = np.quantile(_bootstrap(relative, extra), BAND, axis=0)
    ceiling = log(run.manifest.vocabulary) if run.manifest.vocabulary else np.inf
    path = pd.DataFrame(
        {
            "step": steps,
            "recorded": entropy,
            "estimated": _moved(entropy, relative @ extra, ceiling),
            "low": _moved(entropy, np.minimum(low * wide, low / wide), ceiling),
            "high": _moved(entropy, np.maximum(high * wide, high / wide), ceiling),
        }
    )
    return WhatIf(
        run=run.name,
        excluded=names,
        path=path,
        recorded_change=change,
        estimated_change=_change(entropy, path["estimated"].to_numpy()),
        low=_change(entropy, path["low"].to_numpy()),
        high=_change(entropy, path["high"].to_numpy()),
        factor=factor,
        accounted=accounted,
        probes=len(table),
        trust=trust(run.probes),
        command=_fork_command(run, names),
    )


def _check_worth_asking(run: Run, excluded: Sequence[str]) -> None:
    """Refuse classes that had no part in the updates, and those that were all of them."""
    sums = run.classes.groupby("cls", observed=True)["coef_abs_sum"].sum()
    moved = [name for name in tax.CLASSES if sums.get(name, 0.0) > 0]
    if moved and set(moved) <= set(excluded):
        told = f"{run.name} was trained on {' and '.join(moved)} alone: without that nothing is"
        raise UserError(f"{told} trained, and the entropy stays what it was")
    if moved and not set(moved) & set(excluded):
        told = f"no token of {' or '.join(excluded)} had a gradient in {run.name}: to leave it out"
        raise UserError(f"{told} changes nothing; those that had one are of {', '.join(moved)}")


def _model_factor(accounted: float, change: float) -> float:
    """How far an effect may be off beside the scatter of the probes; infinite if anything goes.

    `MODEL_FACTOR`, or as far as the whole updates miss the recorded change, where there is one.
    """
    if abs(change) < SMALL_EFFECT:
        return MODEL_FACTOR
    if accounted <= 0:
        return float("inf")
    return max(MODEL_FACTOR, accounted, 1 / accounted)


def _fork_command(run: Run, excluded: Sequence[str]) -> str | None:
    if run.manifest.source != "built-in":
        return None
    before = run.manifest.objective.get("exclude_bins") or ()
    names = ",".join(dict.fromkeys([*map(str, before), *excluded]))
    return f"wapo fork {shlex.quote(str(run.path))} --at 0 --exclude-bins {names}"


@dataclass(frozen=True)
class _Settings:
    """What of the run's settings decides how a gradient acts."""

    updates: int
    beta1: float
    adaptive: bool
    limit: float

    @classmethod
    def of(cls, run: Run) -> "_Settings":
        setting = run.manifest.setting
        adaptive = setting("optimizer", "adamw") == "adamw"
        return cls(
            updates=setting("epochs", 1, 1, 2**15) * setting("minibatches", 1, 1, 2**15),
            beta1=setting("beta1", 0.9, 0.0, 1.0) if adaptive else 0.0,
            adaptive=adaptive,
            limit=setting("max_grad_norm", 0.0, 0.0, np.inf) or np.inf,
        )


def _usable_probes(run: Run) -> pd.DataFrame:
    probes = complete(run.probes[run.probes["tokens_of"] == OTHER_TOKENS], _PARTS)
    found = probes["step"].nunique()
    if found < MIN_PROBES:
        raise UserError(
            f"{run.name} has {counted(found, 'probe')}, what-if needs {MIN_PROBES}; record them "
            "with wapo train --probe-every 5 (docs/attribution.md)"
        )
    return probes


def _effects(probes: pd.DataFrame, settings: _Settings, kept: Array) -> pd.DataFrame:
    """Per probe: what one update more would do without the classes, and what it did.

    Returns ``step``; ``extra``, life times (rho kept - all); ``update``, the measured whole; nats.
    """
    by_part = probes.pivot(
        index=["step", "minibatch"], columns="part", values="counterfactual_dentropy"
    ).reset_index()
    count = (by_part["step"] - 1) * settings.updates + by_part["minibatch"] + 1
    life = (1 - settings.beta1 ** count.to_numpy()) / (1 - settings.beta1)
    classes = by_part[range(len(tax.CLASSES))].to_numpy()
    rho = _rescaling(probes, settings, kept)
    return pd.DataFrame(
        {
            "step": by_part["step"],
            "extra": life * (rho * classes[:, kept].sum(1) - by_part[GRADIENT].to_numpy()),
            "update": by_part[UPDATE],
        }
    )


def _rescaling(probes: pd.DataFrame, settings: _Settings, kept: Array) -> Array:
    """Factor rho of each probe by which the kept classes act more than they did."""
    classes = probes[probes["part"].isin(range(len(tax.CLASSES)))].sort_values(["step", "part"])
    names = [f"dot_{name}" for name in tax.CLASSES]
    gram = classes[names].to_numpy().reshape(-1, len(names), len(names))
    whole = np.sqrt(np.maximum(gram.sum((1, 2)), 0.0))
    rest = np.sqrt(np.maximum(gram[:, kept][:, :, kept].sum((1, 2)), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        if settings.adaptive:
            past = np.minimum(whole, settings.limit) ** 2, np.minimum(rest, settings.limit) ** 2
            rho = np.sqrt(np.cumsum(past[0]) / np.cumsum(past[1]))
        else:
            rho = np.minimum(1, settings.limit / rest) / np.minimum(1, settings.limit / whole)
    return np.where(rest > 0, rho, 0.0)


def _shares(probed: Array, steps: Array) -> Array:
    """How much each probe stands for each step, shape (steps, probes); rows sum to 1.

    Between two probes their effects are interpolated; before the first and after the last the
    nearest one counts.
    """
    basis = np.eye(len(probed))
    return np.stack([np.interp(steps, probed, row) for row in basis], axis=1)


def _before(rows: Array) -> Array:
    """Sums of the rows above each row, shape as given: zeros in the first."""
    return np.asarray(np.cumsum(rows, axis=0) - rows)


def _moved(entropy: Array, shift: Array, ceiling: float) -> Array:
    """Entropy after a relative shift, at most ln of the vocabulary."""
    return np.asarray(np.minimum(entropy * np.exp(np.minimum(shift, _LARGEST_SHIFT)), ceiling))


def _bootstrap(weights: Array, extra: Array) -> Array:
    """Shifts of the path when the probes are drawn anew, shape (RESAMPLES, steps)."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(extra), np.full(len(extra), 1 / len(extra)), size=RESAMPLES)
    drawn = counts @ weights.T
    size = weights.sum(axis=1)
    mean = np.divide(weights @ extra, size, out=np.zeros_like(size), where=size > 0)
    # Before any drawn probe counts, the mean of all stands in for that of the drawn ones.
    means = np.divide(
        (counts * extra) @ weights.T, drawn, out=np.tile(mean, (RESAMPLES, 1)), where=drawn > 0
    )
    return np.asarray(means * size)


def _change(start: Array, path: Array) -> float:
    """Mean of the last steps of a path less the first steps of its start."""
    width = min(ENDS, max(len(path) // 2, 1))
    return float(path[-width:].mean() - start[:width].mean())
