"""What it means when prediction, counterfactual and measurement disagree.

The rules, in this order; the first that holds is the verdict. With M the measured change of a set
of tokens, M/2 that of half the update, G the change by all classes at once (the batch's own
gradient), K that by momentum and weight decay, P the prediction:

1. ``below resolution``    neither |M| nor |G| nor |P| reaches RESOLUTION nats
2. ``step too large``      the bent part of the change, 2 |M - 2 (M/2)|, exceeds BEND of the largest
   of its straight part |4 (M/2) - M| and the gross change |G| + |K|: no first-order law can hold
3. ``momentum dominates``  |K| > |G|: earlier batches, not this one, decide where the set goes
4. ``sharing dominates``   P and G differ in sign or by more than FACTOR: other tokens' updates move
   these through shared parameters
5. ``local law holds``     P and G agree in sign and within FACTOR
"""

import numpy as np

from wapo_analysis.table import Array

RESOLUTION = 1e-6
"""Nats; the rounding of float32 in a mean over some hundred tokens is about a tenth of this."""
BEND = 0.5
FACTOR = 3.0

BELOW, TOO_LARGE, MOMENTUM, SHARING, LOCAL = (
    "below resolution",
    "step too large",
    "momentum dominates",
    "sharing dominates",
    "local law holds",
)
MEANINGS = {
    BELOW: "the change is too small to distinguish from rounding",
    TOO_LARGE: "half the update does not do half the change: the step is too large for a "
    "first-order law; lower lr",
    MOMENTUM: "the momentum of earlier batches, not this batch, decides the change",
    SHARING: "other tokens' updates move these tokens through shared parameters more than their "
    "own do",
    LOCAL: "the tokens' own updates explain the change in sign and size",
}
"""Verdict -> what it means, one clause."""


def judge(predicted: Array, gradient: Array, carried: Array, measured: Array, half: Array) -> Array:
    """Verdict for each set of tokens, by the rules at the head of this module.

    Parameters
    ----------
    predicted : array_like, shape (n,)
        P, prediction of the taxonomy at the fitted scale, nats.
    gradient : array_like, shape (n,)
        G, change by all classes at once.
    carried : array_like, shape (n,)
        K, change by momentum plus that by weight decay.
    measured, half : array_like, shape (n,)
        M and M/2, change by the whole and by half of the update.

    Returns
    -------
    ndarray of str, shape (n,)
        Verdicts, keys of ``MEANINGS``.

    Examples
    --------
    >>> str(judge([1e-3], [2e-3], [0.0], [2e-3], [1e-3])[0])
    'local law holds'
    >>> str(judge([-1e-3], [2e-3], [0.0], [2e-3], [1e-3])[0])
    'sharing dominates'
    """
    p, g, k, m, h = (
        np.asarray(values, np.float64) for values in (predicted, gradient, carried, measured, half)
    )
    bend, straight = 2 * np.abs(m - 2 * h), np.abs(4 * h - m)
    gross = np.maximum(straight, np.abs(g) + np.abs(k))
    near = (p * g > 0) & (np.abs(p) <= FACTOR * np.abs(g)) & (np.abs(g) <= FACTOR * np.abs(p))
    small = np.maximum(np.maximum(np.abs(m), np.abs(g)), np.nan_to_num(np.abs(p))) < RESOLUTION
    rules = [small, bend > BEND * gross, np.abs(k) > np.abs(g), ~near]
    return np.asarray(np.select(rules, [BELOW, TOO_LARGE, MOMENTUM, SHARING], default=LOCAL))
