"""The taxonomy's formulas over a batch, in the stable and in the textbook form.

``own`` and ``more`` are the statistics of :class:`wapo_analysis.verify.positions.Positions`; every
result is per unit of the step and has the shape and dtype of the statistics.
"""

import numpy as np
import wapo_taxonomy as wt

from wapo_analysis.verify.positions import Bools, Floats, entropy

NEAR_CERTAIN = 1e-2
"""A sampled token counts as nearly certain when 1 - p is below this."""


def stable_norm(own: dict[str, Floats]) -> Floats:
    """Length of e_y - p from the complement and the sum over the others, (N,). Raises nothing."""
    norm: Floats = wt.grad_norm(1.0, own["complement"], own["collision_rest"])
    return norm


def stable_entropy(statistics: dict[str, Floats]) -> Floats:
    """Entropy change dH / k in nats from all six statistics, (N,). Raises nothing."""
    change: Floats = wt.dentropy(1.0, **statistics)
    return change


def textbook(own: dict[str, Floats], more: dict[str, Floats]) -> tuple[Floats, Floats]:
    """Forms with full sums, in the dtype given.

    Parameters
    ----------
    own, more : dict
        Statistics of the sampled tokens, (N,) each.

    Returns
    -------
    tuple of ndarray
        1 - 2p + S, and dH / k = -[p (ln p + H) - (Q + S H)] in nats. Raises nothing.
    """
    p, logp, h = own["prob"], more["logp"], more["entropy"]
    s: Floats = wt.collision(p, own["collision_rest"])
    q: Floats = wt.collision_logp(p, logp, more["collision_logp_rest"])
    return 1 - 2 * p + s, q + s * h - p * (logp + h)


def as_float32(statistics: dict[str, Floats]) -> dict[str, Floats]:
    """Round every statistic to float32. Raises nothing."""
    return {name: value.astype(np.float32) for name, value in statistics.items()}


def every_token(probs: Floats) -> tuple[Floats, Bools]:
    """Exact dH / k and regime with each token of each row as the sampled one.

    Parameters
    ----------
    probs : ndarray
        Distributions, (N, V), float64.

    Returns
    -------
    tuple of ndarray
        dH / k in nats and whether the token is a peak, both (N, V). Raises nothing.
    """
    logs = np.log(np.where(probs > 0, probs, 1.0))
    squares = probs**2
    weighted = squares * logs
    own = {
        "prob": probs,
        "complement": 1 - probs,
        "collision_rest": squares.sum(1, keepdims=True) - squares,
    }
    more = {
        "logp": logs,
        "entropy": entropy(probs)[:, None],
        "collision_logp_rest": weighted.sum(1, keepdims=True) - weighted,
    }
    peak: Bools = wt.is_peak(**own)
    return stable_entropy(own | more), peak
