"""Token table to derived columns and class totals: where column names meet the taxonomy.

Verdicts are never stored. Everything here is recomputed from the stored sufficient statistics, so
a change of the taxonomy replays over old runs without their logits.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.schema import CLASSES, PROB_EDGES
from wapo_analysis.table import Array, Records

_CELL_KEYS = ("step", "rank", "sign", "regime", "prob_bin")


def probability_bin(prob: Array) -> Array:
    """Index of the half-open bin of PROB_EDGES each probability lies in; p = 1 is in the last.

    Parameters
    ----------
    prob : ndarray, shape (rows,)
        Probabilities in [0, 1].

    Returns
    -------
    ndarray of int8, shape (rows,)
    """
    inner = np.searchsorted(PROB_EDGES[1:-1], prob, side="right")
    return inner.astype(np.int8)


@np.errstate(over="ignore", invalid="ignore")  # impossible input gives NaN, not a warning
def derived_columns(columns: Mapping[str, Array], temperature: float) -> dict[str, Array]:
    """Compute every derived column of the token table.

    Parameters
    ----------
    columns : mapping of str to ndarray, shape (rows,)
        Measured columns of the token table; missing statistics are NaN.
    temperature : float
        Softmax temperature the statistics were taken at.

    Returns
    -------
    dict of str to ndarray
        Derived columns in the order the schema declares them. ``pred_*`` are per unit learning
        rate: the logit step is ``coef / T**2`` (taxonomy/README.md, section on temperature).
    """
    logp = columns["logp"].astype(np.float64)
    entropy = columns["entropy"].astype(np.float64)
    rest = columns["collision_rest"].astype(np.float64)
    logp_rest = columns["collision_logp_rest"].astype(np.float64)
    coef = columns["coef"].astype(np.float64)
    prob, complement = np.exp(logp), -np.expm1(logp)
    step = tax.logit_step(coef, temperature)
    after, entropy_after = columns["logp_after"], columns["entropy_after"]
    return {
        "prob": prob,
        "complement": complement,
        "collision": tax.collision(prob, rest),
        "sign": np.asarray(tax.sign_code(columns["advantage"]), np.int8),
        "regime": np.asarray(tax.regime_code(prob, complement, rest), np.int8),
        "cls": np.asarray(tax.class_code(columns["advantage"], prob, complement, rest), np.int8),
        "prob_bin": probability_bin(prob),
        "grad_norm": tax.grad_norm(coef, complement, rest, temperature),
        "pred_dprob": tax.dprob_sampled(step, prob, complement, rest),
        "pred_dentropy": tax.dentropy(step, prob, complement, logp, entropy, rest, logp_rest),
        # A difference of logs keeps its digits where a difference of probabilities loses them.
        "dprob": prob * np.expm1(after.astype(np.float64) - logp),
        "dentropy": entropy_after.astype(np.float64) - entropy,
        "ratio": np.exp(logp - columns["logp_old"].astype(np.float64)),
    }


def derive(tokens: Records, temperature: float) -> Records:
    """Token records with all derived columns added; see :func:`derived_columns`."""
    return tokens.with_columns(derived_columns(tokens.columns, temperature))


def class_totals(tokens: Records) -> Records:
    """Exact totals per step x rank x sign x regime x probability bin.

    Parameters
    ----------
    tokens : Records
        Token records with derived columns (:func:`derive`); every row is a loss-mask token.

    Returns
    -------
    Records
        Rows of the ``classes`` table, cells without tokens left out. NaN statistics are left out
        of the sums they enter, so one missing value does not erase a total; a sum of nothing but
        NaN is NaN.
    """
    order, starts = _cells(tokens)
    first = order[starts]
    keys = {name: tokens[name][first] for name in _CELL_KEYS}
    sums = {name: _sums(values[order], starts) for name, values in _cell_terms(tokens).items()}
    return Records.build(CLASSES, {**keys, **sums})


def _cells(tokens: Records) -> tuple[Array, Array]:
    """Row order that brings the tokens of a cell together, and where in it each cell starts.

    Cells come in the order of their keys, rows of a cell in the order they have.
    """
    sign, regime, prob_bin = (tokens[name].astype(np.int16) + 1 for name in _CELL_KEYS[2:])
    cell = (sign * 3 + regime) * len(PROB_EDGES) + prob_bin
    cells = 9 * len(PROB_EDGES)
    for name in ("rank", "step"):
        values = tokens[name]
        if len(values) and values.min() != values.max():  # one step of one rank, as a rule
            shifted = values.astype(np.int64) - values.min()
            cell = shifted * cells + cell
            cells *= int(shifted.max()) + 1
    order = np.argsort(cell, kind="stable")
    ordered = cell[order]
    change = np.ones(len(ordered), bool)
    change[1:] = ordered[1:] != ordered[:-1]
    return order, np.flatnonzero(change)


def _sums(values: Array, starts: Array) -> Array:
    """Sum of each run of values; NaN is left out, of nothing else it is the sum."""
    if not len(starts):
        return values[:0]
    missing = np.isnan(values) if values.dtype.kind == "f" else None
    if missing is None or not missing.any():
        return np.asarray(np.add.reduceat(values, starts))
    total = np.add.reduceat(np.where(missing, 0.0, values), starts)
    return np.where(np.logical_and.reduceat(missing, starts), np.nan, total)


def _cell_terms(tokens: Records) -> dict[str, Array]:
    """Terms that the class table adds up, shape (rows,) each."""
    c = tokens.columns
    coef = c["coef"].astype(np.float64)
    moved = c["pred_dentropy"] * c["sign"]
    expected = np.where(c["regime"] == 1, -1.0, 1.0)
    return {
        "tokens": np.ones(len(tokens), np.int64),
        "kept": c["kept"].astype(np.int64),
        "clipped": (c["clipped"] & c["kept"]).astype(np.int64),
        "entropy_sum": c["entropy"].astype(np.float64),
        "logp_sum": c["logp"].astype(np.float64),
        "coef_sum": coef,
        "coef_abs_sum": np.abs(coef),
        "grad_mass": c["grad_norm"],
        "grad_mass_proxy": np.abs(coef) * c["complement"],
        "pred_dprob_sum": c["pred_dprob"],
        "pred_dentropy_sum": c["pred_dentropy"],
        "rule_breaks": (moved * expected < 0).astype(np.int64),
        "rescored": np.isfinite(c["dentropy"]).astype(np.int64),
        "dprob_sum": c["dprob"],
        "dentropy_sum": c["dentropy"],
    }


def with_class(frame: pd.DataFrame) -> pd.DataFrame:
    """Class-table frame with a ``cls`` code column from sign and regime (4 none, -1 unknown)."""
    sign, regime = frame["sign"].to_numpy(), frame["regime"].to_numpy()
    code = np.where(sign > 0, 1 - regime, 3 - regime)
    code = np.where(regime < 0, -1, code)
    return frame.assign(cls=np.where(sign == 0, 4, code).astype(np.int8))
