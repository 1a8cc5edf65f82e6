"""Token table to derived columns, class totals and step columns: the only place that defines them.

Verdicts are never stored. Everything here is recomputed from the stored sufficient statistics, so
a change of the taxonomy replays over old runs without their logits.

Step columns come of sums that add up over micro-batches, processes and parts of a file:
`token_sums` and `rollout_sums`, then `step_columns`. A new column of tokens is one more entry of
`_token_terms`, and its declaration in the schema.
"""

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import wapo_taxonomy as tax
from wapo_taxonomy.vocabulary import namespace

from wapo_analysis.schema import CLASSES, PROB_EDGES
from wapo_analysis.table import Array, Records

CELL_KEYS = ("step", "rank", "sign", "regime", "prob_bin")
#: Statistics a token is counted in ``nonfinite`` for.
_STATISTICS = ("logp", "logp_old", "entropy")
#: Largest ln(pi / pi_old) in a `k3`, nats: an impossible token gives e^20, not inf.
K3_LIMIT = 20.0


def probability_bin(prob: Any) -> Any:
    """Index of the half-open bin of PROB_EDGES of ndarray or Tensor; p = 1 is in the last."""
    if isinstance(prob, np.ndarray):
        return np.searchsorted(PROB_EDGES[1:-1], prob, side="right").astype(np.int8)
    return sum(~(prob < edge) for edge in PROB_EDGES[1:-1])


@np.errstate(over="ignore", invalid="ignore")  # impossible input gives NaN, not a warning
def derived_columns(columns: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """Compute every derived column of the token table.

    Returns derived columns in the order the schema declares them. ``pred_*`` are per unit learning
    rate: the logit step is ``coef / T**2`` (taxonomy/README.md, section on temperature).
    ``columns`` (rows,): measured columns of the token table; missing statistics are NaN;
    ``temperature``: softmax temperature the statistics were taken at.
    """
    xp = namespace(columns["logp"])
    names = ("logp", "entropy", "collision_rest", "coef", "logp_after", "entropy_after")
    logp, entropy, rest, coef, after, entropy_after = (_wide(columns[name], xp) for name in names)
    step = tax.logit_step(coef, temperature)
    update = update_columns(columns, temperature)
    prob, complement = update["prob"], update["complement"]
    return {
        "prob": prob,
        "complement": complement,
        "collision": tax.collision(prob, rest),
        "sign": xp.asarray(tax.sign_code(columns["advantage"]), dtype=xp.int8),
        "regime": xp.asarray(tax.regime_code(prob, complement, rest), dtype=xp.int8),
        "cls": update["cls"],
        "prob_bin": probability_bin(prob),
        "grad_norm": update["grad_norm"],
        "pred_dprob": tax.dprob_sampled(step, prob, complement, rest),
        "pred_dentropy": update["pred_dentropy"],
        # A difference of logs keeps its digits where a difference of probabilities loses them.
        "dprob": prob * xp.expm1(after - logp),
        "dentropy": entropy_after - entropy,
        "ratio": xp.exp(logp - _loss_old(columns)),
    }


def _wide(values: Any, xp: Any) -> Any:
    return xp.asarray(values, dtype=xp.float64)


#: Measured columns that `update_columns` reads.
UPDATE_STATISTICS = (
    "advantage",
    "logp",
    "entropy",
    "collision_rest",
    "collision_logp_rest",
    "coef",
)


@np.errstate(over="ignore", invalid="ignore")  # impossible input gives NaN, not a warning
def update_columns(columns: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """The derived columns that say what a token's update does.

    Takes ``UPDATE_STATISTICS``, arrays of shape (rows,), missing ones NaN; gives ``prob``,
    ``complement``, ``cls`` (code), ``grad_norm`` and ``pred_dentropy``.
    """
    xp = namespace(columns["logp"])
    logp, entropy, rest, logp_rest, coef = (_wide(columns[n], xp) for n in UPDATE_STATISTICS[1:])
    prob, complement = xp.exp(logp), -xp.expm1(logp)
    step = tax.logit_step(coef, temperature)
    cls = tax.class_code(columns["advantage"], prob, complement, rest)
    return {
        "prob": prob,
        "complement": complement,
        "cls": xp.asarray(cls, dtype=xp.int8),
        "grad_norm": tax.grad_norm(coef, complement, rest, temperature),
        "pred_dentropy": tax.dentropy(step, prob, complement, logp, entropy, rest, logp_rest),
    }


def _loss_old(columns: Mapping[str, Any]) -> Any:
    """Old log-probabilities of the loss's ratio: the proximal policy's, else the behaviour's."""
    xp = namespace(columns["logp_old"])
    old = _wide(columns["logp_old"], xp)
    if "logp_prox" not in columns:
        return old
    return xp.where(xp.isnan(columns["logp_prox"]), old, columns["logp_prox"])


def derive(tokens: Records, temperature: float) -> Records:
    """Token records with all derived columns added; see :func:`derived_columns`."""
    return tokens.with_columns(derived_columns(tokens.columns, temperature))


def sequence_ratio(columns: Mapping[str, Array]) -> Array:
    """Geometric mean of the importance ratios of a rollout's tokens in one pass, shape (rows,)."""
    log_ratio = columns["logp"].astype(np.float64) - _loss_old(columns)
    keys = np.stack([columns["minibatch"], columns["rollout"]])
    index = np.unique(keys, axis=1, return_inverse=True)[1].ravel()
    mean = np.bincount(index, log_ratio) / np.bincount(index)
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(mean)[index])


def class_totals(tokens: Records) -> Records:
    """Exact totals per step x rank x sign x regime x probability bin.

    Returns rows of the ``classes`` table, cells without tokens left out. NaN statistics are left
    out of the sums they enter, so one missing value does not erase a total; a sum of nothing but
    NaN is NaN. ``tokens``: token records with derived columns (:func:`derive`); every row is a
    loss-mask token.
    """
    return _added(tokens, cell_terms(tokens.columns))


def merged_totals(parts: Iterable[Records]) -> Records:
    """Class totals of parts of the same tokens, at least one, as one table."""
    whole = Records.concat(parts)
    return _added(whole, {n: v for n, v in whole.columns.items() if n not in CELL_KEYS})


def _added(rows: Records, terms: Mapping[str, Array]) -> Records:
    order, starts = _cells(rows)
    keys = {name: rows[name][order[starts]] for name in CELL_KEYS}
    sums = {name: run_sums(values[order], starts) for name, values in terms.items()}
    return Records.build(CLASSES, {**keys, **sums})


def _cells(tokens: Records) -> tuple[Array, Array]:
    """Row order that brings the tokens of a cell together, and where in it each cell starts.

    Cells come in the order of their keys, rows of a cell in the order they have.
    """
    cell, cells = cell_numbers(tokens.columns), CELLS
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


CELLS = 9 * len(PROB_EDGES)  # of one step of one rank


def cell_numbers(columns: Mapping[str, Any]) -> Any:
    """Number of the cell of each token, 0 to ``CELLS`` - 1, of derived columns."""
    xp = namespace(columns["sign"])
    sign, regime, prob_bin = (xp.asarray(columns[n], dtype=xp.int16) + 1 for n in CELL_KEYS[2:])
    return (sign * 3 + regime) * len(PROB_EDGES) + prob_bin


def run_sums(values: Array, starts: Array) -> Array:
    """Sum of each run of values; NaN is left out, of nothing else it is the sum."""
    if not len(starts):
        return values[:0]
    missing = np.isnan(values) if values.dtype.kind == "f" else None
    if missing is None or not missing.any():
        return np.asarray(np.add.reduceat(values, starts))
    total = np.add.reduceat(np.where(missing, 0.0, values), starts)
    return np.where(np.logical_and.reduceat(missing, starts), np.nan, total)


def cell_terms(c: Mapping[str, Any]) -> dict[str, Any]:
    """Terms that the class table adds up, shape (rows,) each, of derived columns."""
    xp = namespace(c["coef"])
    coef = _wide(c["coef"], xp)
    moved = c["pred_dentropy"] * c["sign"]
    expected = xp.where(c["regime"] == 1, -1.0, 1.0)
    count = partial(xp.asarray, dtype=xp.int64)
    return {
        "tokens": xp.ones_like(count(c["kept"])),
        "kept": count(c["kept"]),
        "clipped": count(c["clipped"] & c["kept"]),
        "entropy_sum": _wide(c["entropy"], xp),
        "logp_sum": _wide(c["logp"], xp),
        "coef_sum": coef,
        "coef_abs_sum": abs(coef),
        "grad_mass": c["grad_norm"],
        "grad_mass_proxy": abs(coef) * c["complement"],
        "pred_dprob_sum": c["pred_dprob"],
        "pred_dentropy_sum": c["pred_dentropy"],
        "rule_breaks": count(moved * expected < 0),
        "rescored": count(xp.isfinite(c["dentropy"])),
        "dprob_sum": c["dprob"],
        "dentropy_sum": c["dentropy"],
    }


#: Names that ``cls`` takes in data frames: the four classes, none, unknown.
CLASS_ORDER = tuple(tax.CLASS_NAMES[code] for code in (*range(len(tax.CLASSES) + 1), -1))


def class_names(codes: Any) -> "pd.Categorical[str]":
    """Class codes, shape (rows,), as the names that users see."""
    places: Any = np.where(codes < 0, len(CLASS_ORDER) - 1, codes)
    return pd.Categorical.from_codes(places, pd.Index(CLASS_ORDER))


def class_codes(names: pd.Series) -> Array:
    """Class codes, int8 of shape (rows,), of a ``cls`` column of names; -1 is unknown."""
    codes = names.astype(pd.CategoricalDtype(list(CLASS_ORDER))).cat.codes.to_numpy(np.int8)
    return np.where(codes == len(CLASS_ORDER) - 1, -1, codes).astype(np.int8)


def with_class(frame: pd.DataFrame) -> pd.DataFrame:
    """Class-table frame with a ``cls`` column of names from sign and regime."""
    sign, regime = frame["sign"].to_numpy(), frame["regime"].to_numpy()
    code = 2 - sign - regime  # 0 and 1 are positive, 2 and 3 negative, the peak first
    code = np.where(regime < 0, -1, code)
    return frame.assign(cls=class_names(np.where(sign == 0, 4, code)))


def per_class(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """Sum of a class total by step and class of the taxonomy; 0 where a class had no token.

    Shape (steps, classes); steps without any are left out. ``cells``: class totals, see
    :attr:`Run.classes`.
    """
    known = cells[cells["cls"].isin(tax.CLASSES)].dropna(subset=[column]).astype({"cls": str})
    table = known.pivot_table(index="step", columns="cls", values=column, aggfunc="sum")
    return table.reindex(columns=list(tax.CLASSES)).fillna(0.0)


# Columns of the steps table: sums first, which add up over micro-batches, processes and parts ----


@np.errstate(over="ignore", invalid="ignore")  # impossible input is left out, not warned about
def token_sums(columns: Mapping[str, Any], given: Collection[str] | None = None) -> dict[str, Any]:
    """Sums over tokens for `step_columns`; they add up over any split of the tokens.

    Returns of every term its sum and, under its name with `` n``, the tokens it is known of: what
    is missing or not finite is left out of both.

    Parameters
    ----------
    columns : mapping of str to ndarray or Tensor, shape (rows,)
        Columns of the token table, ``advantage`` at least; flags may be 0, 1 or NaN.
        ``ratio`` is the importance ratio the clip looks at, by default the token's own.
    given : collection of str, optional
        Statistics the source has; others count as missing. By default all that are there.
    """
    xp = namespace(columns["advantage"])
    names = set(columns) if given is None else {"advantage", "ratio", *given} & set(columns)
    known = {name: xp.asarray(columns[name], dtype=xp.float64) for name in names}
    sums = {}
    for name, values in _token_terms(known, xp).items():
        finite = xp.isfinite(values)
        sums[name] = xp.where(finite, values, 0.0).sum()
        sums[f"{name} n"] = finite.sum()
    return sums


def _token_terms(known: Mapping[str, Any], xp: Any) -> dict[str, Any]:
    """What each token adds to a step column, shape (rows,) each; NaN where it does not count."""
    advantage = known["advantage"]
    missing = xp.full_like(advantage, np.nan)
    logp, logp_old, entropy = (known.get(name, missing) for name in _STATISTICS)
    kept, clipped = known.get("kept", missing), known.get("clipped", missing)
    prox = known.get("logp_prox", missing)
    old = xp.where(xp.isnan(prox), logp_old, prox)
    ratio = known.get("ratio", xp.exp(xp.where(xp.isfinite(old), logp - old, np.nan)))
    stopped = xp.where((kept > 0) & ~xp.isnan(ratio), clipped, np.nan)
    broken = sum(
        (~xp.isfinite(known[n]) for n in _STATISTICS if n in known), xp.zeros_like(advantage)
    )
    return {
        "entropy": entropy,
        "entropy_pos": xp.where(advantage > 0, entropy, np.nan),
        "entropy_neg": xp.where(advantage < 0, entropy, np.nan),
        "kl_old": k3(logp - logp_old, xp),
        "engine_kl": k3(prox - logp_old, xp),
        "engine_logp_diff": xp.abs(prox - logp_old),
        "engine_prob_diff": xp.abs(xp.exp(prox) - xp.exp(logp_old)),
        "clip_low": stopped * (ratio < 1),
        "clip_high": stopped * (ratio > 1),
        "rows": xp.ones_like(advantage),
        "kept_tokens": kept,
        "nonfinite": xp.asarray(broken > 0, dtype=xp.float64),
    }


def k3(log_ratio: Any, xp: Any = np) -> Any:
    """R - ln r - 1, an unbiased estimate of KL(q || p) from samples of q, with r = p / q.

    Nats, of ``ln r`` of any shape; held at `K3_LIMIT`, NaN where the ratio is not finite.
    """
    held = xp.where(xp.isfinite(log_ratio), xp.clip(log_ratio, None, K3_LIMIT), np.nan)
    return xp.expm1(held) - held


#: Terms whose sum is the column; of all others it is the mean over the tokens they are known of.
_TOTALS = ("rows", "kept_tokens", "nonfinite")


def rollout_sums(columns: Mapping[str, Array]) -> dict[str, float]:
    """Sums over rollouts for `step_columns`; they add up over processes and parts.

    Parameters
    ----------
    columns : mapping of str to ndarray, shape (rollouts,)
        ``length`` (tokens the policy wrote), ``truncated`` (0 or 1), ``repetition``, as far as the
        source has them; NaN where unknown. The lengths give the column ``tokens``, in place of a
        count of token rows, of which a completion has several where it is trained on twice.
    """
    sums: dict[str, float] = {}
    for name, values in columns.items():
        known = np.asarray(values, np.float64)
        known = known[np.isfinite(known)]
        sums[name] = float(known.sum())
        sums[f"{name} n"] = len(known)
    return sums


def step_columns(sums: Mapping[str, float]) -> dict[str, float]:
    """Columns of the steps table from added-up sums; what nothing is known of is left out.

    ``sums``: of `token_sums`, of `rollout_sums`, or both in one.
    """
    columns: dict[str, float] = {}
    for name in (name for name in sums if f"{name} n" in sums):
        total, count = float(sums[name]), float(sums[f"{name} n"])
        if name not in _TOTALS and count:
            columns[name] = total / count
        elif name in _TOTALS and count and count == float(sums["rows"]):
            columns[name] = int(total)
    rows = columns.pop("rows", None)
    written = sums["length"] if sums.get("length n") else rows
    return columns if written is None else columns | {"tokens": int(written)}


def reward_columns(reward: Array, group: Array | None) -> dict[str, float]:
    """Columns of the steps table that the rewards of all rollouts of a step decide.

    ``reward`` (rollouts,): NaN is left out. ``group`` (rollouts,), optional: prompt of each
    rollout, negative or NaN where it is unknown. Shares of groups need to know one, and a group of
    more than one rollout.
    """
    known = np.isfinite(reward)
    if not known.any():
        return {}
    rewards = np.asarray(reward, np.float64)[known]
    columns = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "pass_rate": float((rewards >= 1).mean()),
    }
    groups = np.full(len(rewards), -1) if group is None else group[known]
    rewards, groups = rewards[groups >= 0], groups[groups >= 0]
    order = np.argsort(groups, kind="stable")
    starts = np.unique(groups[order], return_index=True)[1]
    if not len(starts) or len(starts) == len(rewards):
        return columns
    low, high = (f.reduceat(rewards[order], starts) for f in (np.minimum, np.maximum))
    columns["groups_all_wrong"] = float(((low == high) & (low <= 0)).mean())
    columns["groups_all_right"] = float(((low == high) & (low > 0)).mean())
    return columns
