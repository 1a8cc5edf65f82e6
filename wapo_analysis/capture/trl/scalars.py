"""Sums of one step over its tokens that the trainer's own log shows, class by class.

Sums, not means, so that processes can be added up before any division.
"""

import math
from collections.abc import Mapping

import numpy as np
from wapo_taxonomy import CLASSES

from wapo_analysis.derive import token_sums
from wapo_analysis.record.step import pass_sums
from wapo_analysis.table import Records

SHOWN = (*CLASSES, "none", "unknown")
_NONE = dict.fromkeys(("advantage", "cls", "pred_dentropy", "grad_norm"), np.zeros(0))
_CODES = (*range(len(CLASSES)), len(CLASSES), -1)


def log_sums(
    tokens: Records | None, given: frozenset[str] = frozenset(), sequence_level: bool = False
) -> dict[str, float]:
    """Sums over the tokens of a step: those of the step columns, and of every class.

    Parameters
    ----------
    tokens : Records or None
        Token records with derived columns; None is no tokens, and every sum 0.
    given : frozenset of str
        Statistics that every pass has.
    sequence_level : bool
        The clip looks at the ratio of the whole rollout.

    Returns
    -------
    dict of str to float
        The same names always. Missing statistics are left out of their sum and their count.
    """
    columns = _NONE if tokens is None else tokens.columns
    sums = token_sums(_NONE) if tokens is None else pass_sums(tokens, given, sequence_level)
    sums = {name: float(value) for name, value in sums.items()}
    for name, code in zip(SHOWN, _CODES, strict=True):
        chosen = columns["cls"] == code
        flow = columns["pred_dentropy"][chosen]
        sums[f"tokens/{name}"] = float(chosen.sum())
        sums[f"grad_mass/{name}"] = float(np.nansum(columns["grad_norm"][chosen]))
        sums[f"flow/{name}"] = float(np.nansum(flow))
        sums[f"flow_tokens/{name}"] = float(np.isfinite(flow).sum())
    return sums


def log_entries(sums: Mapping[str, float], columns: Mapping[str, float]) -> dict[str, float]:
    """Numbers for the trainer's own log, under ``wapo/``; missing ones are left out.

    Parameters
    ----------
    sums : mapping of str to float
        Of `log_sums`.
    columns : mapping of str to float
        Step columns of the same step.

    Returns
    -------
    dict of str to float
        ``entropy_pos``, ``entropy_neg`` (nats); per class ``share`` (of all tokens), ``grad_share``
        (of the summed |dL/dz|) and ``entropy_flow`` (summed first-order dH of one unit of learning
        rate, nats), the last only where every token of the step has it; ``grad_mass`` in all.
    """
    entries = {name: columns[name] for name in ("entropy_pos", "entropy_neg") if name in columns}
    total = sum(sums[f"grad_mass/{name}"] for name in SHOWN)
    measured = sums["rows"] - sums["tokens/unknown"]
    if measured:
        entries["grad_mass"] = total
    flow_known = all(sums[f"flow_tokens/{n}"] == sums[f"tokens/{n}"] for n in CLASSES)
    for name in CLASSES:
        if measured:
            entries[f"share/{name}"] = sums[f"tokens/{name}"] / sums["rows"]
            entries[f"grad_share/{name}"] = _ratio(sums[f"grad_mass/{name}"], total)
        if measured and flow_known:
            entries[f"entropy_flow/{name}"] = sums[f"flow/{name}"]
    return {f"wapo/{name}": value for name, value in entries.items() if math.isfinite(value)}


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
