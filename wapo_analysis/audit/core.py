"""How the coefficient of a token depends on its ratio, and a rollout's weight on its length.

Every policy loss gives token t of rollout i the coefficient c = f(A, r) w_i with one weight w_i for
the whole rollout. So u = c / f is constant within a rollout for the right f, and for no other f
once ratios differ; and w_i, then known, shows over what the loss is averaged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from wapo_analysis.audit.evidence import Evidence
from wapo_analysis.table import Array

FITS = 0.995
"""Share of the tokens that a form must explain within their rounding errors."""
LENGTH_FITS = 2e-3
"""Relative spread of a weight that counts as constant."""
_LEAST = 8
"""Tokens, or rollouts, below which nothing is told."""
_SAPO = {1: 1.0, -1: 1.05}
"""Default temperatures of SAPO (arXiv 2511.20347) for A > 0 and A < 0."""


def _sapo(sign: Array, log_ratio: Array) -> Array:
    temperature = np.where(sign > 0, _SAPO[1], _SAPO[-1])
    gate = 1 / (1 + np.exp(-temperature * (np.exp(log_ratio) - 1)))
    return np.asarray(np.log(4 * gate * (1 - gate)) + log_ratio)


CORES: Mapping[str, Callable[[Evidence], Array]] = {
    "token ratio": lambda e: e.column("log_ratio"),
    "no ratio": lambda e: np.zeros(len(e.rows)),
    "rollout ratio (mean)": lambda e: _of_rollout(e, "mean"),
    "rollout ratio (sum)": lambda e: _of_rollout(e, "sum"),
    "capped token ratio": lambda e: np.minimum(e.column("log_ratio"), np.log(cap(e))),
    "inverted token ratio": lambda e: -e.column("log_ratio"),
    "sigmoid gate (SAPO)": lambda e: _sapo(np.sign(e.advantage), e.column("log_ratio")),
}
"""Form to ln |f / A| of every token; NaN where the data rule it out."""


def _of_rollout(evidence: Evidence, how: Literal["mean", "sum"]) -> Array:
    return np.asarray(evidence.rows.groupby("piece")["log_ratio"].transform(how).to_numpy())


def cap(evidence: Evidence) -> float:
    """Ratio above which coefficients stay what they are (CISPO), NaN if the tokens show none."""
    active = evidence.active & np.isfinite(evidence.column("log_ratio"))
    ratio = np.exp(evidence.column("log_ratio")[active])
    size = np.abs(evidence.coef[active] / evidence.advantage[active])
    pieces = evidence.rows["piece"].to_numpy()[active]
    plateaus = []
    for rows in np.split(np.argsort(pieces, kind="stable"), np.cumsum(np.bincount(pieces))[:-1]):
        if len(rows) < 3:
            continue
        lowest = rows[ratio[rows].argmin()]
        height = size[rows] * ratio[lowest] / size[lowest]
        level = float(height.max())
        held = ratio[rows][height > level * (1 - 1e-3)]
        plain = ratio[lowest] < 0.98 * level <= held.min() * 1.001
        if plain and len(held) >= 2 and held.max() > held.min() * 1.01:
            plateaus.append(level)
    if len(plateaus) < 3 or np.ptp(plateaus) > 2e-3 * np.median(plateaus):
        return float("nan")
    return float(np.median(plateaus))


@dataclass(frozen=True)
class Core:
    """Forms that explain the coefficients.

    Attributes
    ----------
    names : tuple of str
        All forms that fit; several where the data cannot tell them apart.
    share : float
        Share of the tokens explained by the best form.
    tokens : int
        Tokens that were asked.
    spread : float
        Standard deviation of the log-ratio within rollouts, nats.
    """

    names: tuple[str, ...]
    share: float
    tokens: int
    spread: float


def core(evidence: Evidence) -> Core:
    """Find the forms whose u is constant within every rollout."""
    active = evidence.active & np.isfinite(evidence.column("log_ratio"))
    pieces = evidence.rows["piece"].to_numpy()
    sizes = np.bincount(pieces[active], minlength=int(pieces.max()) + 1 if len(pieces) else 1)
    asked = active & (sizes[pieces] >= 3)
    if asked.sum() < _LEAST:
        return Core((), 0.0, int(asked.sum()), 0.0)
    plain = np.log(np.abs(evidence.coef[asked]) / np.abs(evidence.advantage[asked]))
    error = _error(evidence)[asked]
    fits = {}
    for name, form in CORES.items():
        off = _within(plain - form(evidence)[asked], pieces[asked])
        fits[name] = float(np.mean(np.abs(off) <= error))
    spread = float(np.std(_within(evidence.column("log_ratio")[asked], pieces[asked])))
    names = tuple(name for name, share in fits.items() if share >= FITS)
    # SAPO's gate is flat near a ratio of 1: where the plain forms fit as well, it tells nothing.
    return Core(names, max(fits.values()), int(asked.sum()), spread)


def _error(evidence: Evidence) -> Array:
    """Error of ln |u| within a rollout: the token's own and that of the rollout's median."""
    return np.asarray(2 * evidence.ratio_error + 4e-4)


def _within(values: Array, pieces: Array) -> Array:
    """Values minus the median of their rollout in the pass."""
    frame = pd.Series(values)
    return np.asarray((frame - frame.groupby(pieces).transform("median")).to_numpy())


def rollout_weights(evidence: Evidence, name: str) -> pd.DataFrame:
    """Weight of every rollout of every pass under a form: `Evidence.pieces` with ``weight``."""
    active = evidence.active
    log_u = np.full(len(evidence.rows), np.nan)
    form = CORES[name](evidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_u[active] = np.log(np.abs(evidence.coef / evidence.advantage))[active] - form[active]
    weights = pd.Series(log_u).groupby(evidence.rows["piece"].to_numpy()).median()
    return evidence.pieces.assign(weight=np.exp(weights)).dropna(subset=["weight"])


@dataclass(frozen=True)
class Level:
    """Over what the loss is averaged.

    Attributes
    ----------
    names : tuple of str
        ``rollout``, ``group``, ``tokens`` that fit within every pass; several if alike here.
    across : str
        How the constant differs between the passes of a step: ``same``, ``per pass`` (a mean of
        every pass by itself), ``padded`` (by the padded length of a pass), or "" if not told.
    total : float
        Weight of all tokens of a step together, the unweighted rollouts included; 1 for a mean.
    pieces : int
        Weights that were compared.
    """

    names: tuple[str, ...]
    across: str
    total: float
    pieces: int


def level(evidence: Evidence, name: str) -> Level:
    """Tell from the weights of the rollouts over what the loss is averaged."""
    weights = rollout_weights(evidence, name)
    group_tokens = evidence.pieces.groupby(["step", "passes", "group"])["tokens"].sum()
    of_step = evidence.pieces.drop_duplicates(["step", "rank", "rollout"])
    step_tokens = of_step.groupby(["step", "group"])["tokens"].sum()
    for name, totals in (("in_pass", group_tokens), ("in_step", step_tokens)):
        keys = pd.MultiIndex.from_frame(weights[list(totals.index.names)])
        weights = weights.assign(**{name: totals.reindex(keys).to_numpy()})
    many = weights.groupby("passes").filter(lambda part: len(part) >= 2)
    if len(many) < _LEAST // 2:
        return Level((), "", float("nan"), len(many))
    factors = {"rollout": ("tokens",), "tokens": (None,), "group": ("in_pass", "in_step")}
    fits = {}
    for kind, columns in factors.items():
        spreads = [_spread(many, column) for column in columns]
        if min(spreads) <= LENGTH_FITS:
            fits[kind] = columns[int(np.argmin(spreads))]
    across = _across(evidence, weights) if "tokens" in fits and len(fits) == 1 else ""
    return Level(tuple(fits), across, _total(evidence, weights, fits), len(many))


def _spread(weights: pd.DataFrame, column: str | None) -> float:
    """Largest relative spread within a pass of weight times a column."""
    values = np.log(weights["weight"] * (1 if column is None else weights[column]))
    by_pass = values.groupby(weights["passes"])
    return float((by_pass.max() - by_pass.min()).max())


def _across(evidence: Evidence, weights: pd.DataFrame) -> str:
    """How the one weight of each pass differs between the passes of a step."""
    constant = weights.groupby(["step", "passes"])["weight"].median()
    passes = evidence.pieces.groupby(["step", "passes"]).agg(
        tokens=("tokens", "sum"), longest=("tokens", "max"), rollouts=("tokens", "size")
    )
    joined = passes.assign(weight=constant).dropna()
    if joined.groupby("step").size().max() < 2:
        return ""
    forms = {
        "same": joined["weight"],
        "per pass": joined["weight"] * joined["tokens"],
        "padded": joined["weight"] * joined["longest"] * joined["rollouts"],
    }
    found = []
    for name, values in forms.items():
        by_step = np.log(values).groupby("step")
        if float((by_step.max() - by_step.min()).max()) <= LENGTH_FITS:
            found.append(name)
    return found[0] if len(found) == 1 else ""


def _total(evidence: Evidence, weights: pd.DataFrame, fits: Mapping[str, str | None]) -> float:
    """Mean over the steps of the weight of all their tokens; NaN where rows are missing."""
    if not evidence.whole or not fits:
        return float("nan")
    column = next(iter(fits.values()))
    pieces = evidence.pieces
    factor = weights["weight"] * (1 if column is None else weights[column])
    constant = factor.groupby(weights["passes"]).median()
    known = pieces[pieces["passes"].isin(constant.index)]
    by_piece = known["passes"].map(constant)
    if column == "tokens":
        share = by_piece
    elif column is None:
        share = by_piece * known["tokens"]
    else:
        groups = known.groupby(["passes", "group"])["tokens"].transform("sum")
        share = by_piece * known["tokens"] / groups
    return float(share.groupby(known["step"]).sum().mean())
