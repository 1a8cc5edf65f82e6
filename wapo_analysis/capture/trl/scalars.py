"""Sums of one step over its tokens, and the numbers they give: step columns and log entries.

Sums, not means, so that processes can be added up before any division.
"""

import math
from collections.abc import Mapping

import numpy as np
from wapo_taxonomy import CLASSES

from wapo_analysis.table import Records

SHOWN = (*CLASSES, "none", "unknown")
_CODES = (*range(len(CLASSES)), len(CLASSES), -1)
_PER_CLASS = ("tokens", "grad_mass", "flow", "flow_tokens")
_TOKEN_SUMS = ("tokens", "entropy", "entropy_tokens", "kept", "low", "high", "kl", "kl_tokens")
_SIGN_SUMS = ("entropy_pos", "tokens_pos", "entropy_neg", "tokens_neg")
_OTHER_SUMS = ("loss", "rollouts", "length", "truncated", "repetition")
NAMES = (
    *_TOKEN_SUMS,
    *_SIGN_SUMS,
    *_OTHER_SUMS,
    *(f"{what}/{name}" for what in _PER_CLASS for name in SHOWN),
)
"""Order of the sums in the vector that processes add up; the same everywhere."""


def token_sums(tokens: Records) -> dict[str, float]:
    """Sums over the tokens of a step.

    Parameters
    ----------
    tokens : Records
        Token records with derived columns.

    Returns
    -------
    dict of str to float
        Keys are among `NAMES`. Missing statistics are left out of their sum and their count.
    """
    c = tokens.columns
    entropy, sign = c["entropy"].astype(np.float64), np.sign(c["advantage"])
    known = np.isfinite(entropy)
    stopped, ratio = c["clipped"] & c["kept"], c["ratio"]
    # k3 = r - ln r - 1 with r = pi / pi_old, an unbiased estimate of KL(pi_old || pi).
    log_ratio = np.minimum(c["logp"].astype(np.float64) - c["logp_old"], 60.0)
    kl = np.expm1(log_ratio) - log_ratio
    sums = {
        "tokens": float(len(tokens)),
        "entropy": float(entropy[known].sum()),
        "entropy_tokens": float(known.sum()),
        "kept": float(c["kept"].sum()),
        "low": float((stopped & (ratio < 1)).sum()),
        "high": float((stopped & (ratio > 1)).sum()),
        "kl": float(np.nansum(kl)),
        "kl_tokens": float(np.isfinite(kl).sum()),
    }
    for name, chosen in (("pos", known & (sign > 0)), ("neg", known & (sign < 0))):
        sums[f"entropy_{name}"] = float(entropy[chosen].sum())
        sums[f"tokens_{name}"] = float(chosen.sum())
    for name, code in zip(SHOWN, _CODES, strict=True):
        chosen = c["cls"] == code
        flow = c["pred_dentropy"][chosen]
        sums[f"tokens/{name}"] = float(chosen.sum())
        sums[f"grad_mass/{name}"] = float(np.nansum(c["grad_norm"][chosen]))
        sums[f"flow/{name}"] = float(np.nansum(flow))
        sums[f"flow_tokens/{name}"] = float(np.isfinite(flow).sum())
    return sums


def step_columns(sums: Mapping[str, float], processes: int) -> dict[str, float]:
    """Columns of the steps table; what no token or rollout was seen for is NaN."""
    return {
        "loss": sums["loss"] / processes,
        "entropy": _ratio(sums["entropy"], sums["entropy_tokens"]),
        "entropy_pos": _ratio(sums["entropy_pos"], sums["tokens_pos"]),
        "entropy_neg": _ratio(sums["entropy_neg"], sums["tokens_neg"]),
        "length": _ratio(sums["length"], sums["rollouts"]),
        "truncated": _ratio(sums["truncated"], sums["rollouts"]),
        "repetition": _ratio(sums["repetition"], sums["rollouts"]),
        "kl_old": _ratio(sums["kl"], sums["kl_tokens"]),
        "clip_low": _ratio(sums["low"], sums["kept"]),
        "clip_high": _ratio(sums["high"], sums["kept"]),
        "tokens": int(sums["tokens"]),
        "kept_tokens": int(sums["kept"]),
        "updates": 1,
    }


def log_entries(sums: Mapping[str, float]) -> dict[str, float]:
    """Numbers for the trainer's own log, under ``wapo/``; missing ones are left out.

    Returns
    -------
    dict of str to float
        ``entropy_pos``, ``entropy_neg`` (nats); per class ``share`` (of all tokens), ``grad_share``
        (of the summed |dL/dz|) and ``entropy_flow`` (summed first-order dH of one unit of learning
        rate, nats), the last only where every token of the step has it; ``grad_mass`` in all.
    """
    entries = {
        "entropy_pos": _ratio(sums["entropy_pos"], sums["tokens_pos"]),
        "entropy_neg": _ratio(sums["entropy_neg"], sums["tokens_neg"]),
    }
    total = sum(sums[f"grad_mass/{name}"] for name in SHOWN)
    measured = sums["tokens"] - sums["tokens/unknown"]
    if measured:
        entries["grad_mass"] = total
    flow_known = all(sums[f"flow_tokens/{n}"] == sums[f"tokens/{n}"] for n in CLASSES)
    for name in CLASSES:
        if measured:
            entries[f"share/{name}"] = _ratio(sums[f"tokens/{name}"], sums["tokens"])
            entries[f"grad_share/{name}"] = _ratio(sums[f"grad_mass/{name}"], total)
        if measured and flow_known:
            entries[f"entropy_flow/{name}"] = sums[f"flow/{name}"]
    return {f"wapo/{name}": value for name, value in entries.items() if math.isfinite(value)}


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
