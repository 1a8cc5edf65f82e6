"""Sign, regime and class of a token update (README sections 1 and 4).

Codes are built with comparisons and integer arithmetic only, so one program serves Python numbers,
numpy arrays, torch tensors and pandas Series. Every argument may have any shape; they broadcast.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

#: A Python number, numpy array, torch tensor or pandas Series; results keep the kind given.
Array: TypeAlias = Any

#: The four classes, in code order 0..3 (the names of arXiv 2606.16154).
CLASSES = ("pos_peak", "pos_valley", "neg_peak", "neg_valley")

#: Zero advantage: the update does nothing, so it has no class.
NONE = "none"

#: A statistic is missing (NaN), so the class cannot be told.
UNKNOWN = "unknown"

CLASS_CODES: dict[str, int] = {
    **{name: code for code, name in enumerate(CLASSES)},
    NONE: 4,
    UNKNOWN: -1,
}
CLASS_NAMES: dict[int, str] = {code: name for name, code in CLASS_CODES.items()}

#: Relative width of the border that counts as peak.
#:
#: On a uniform row every token is an exact tie ``p = S``, and rounding alone would decide its
#: regime; float32 statistics carry a relative error of a few 1e-7.
TIE_TOLERANCE = 1e-6

#: What `expand_bins` takes.
BIN_NAMES = (*CLASSES, "pos", "neg", "peak", "valley")


def sign_code(advantage: Array) -> Array:
    """Sign of the advantage: 1 positive, -1 negative, 0 zero or NaN.

    Parameters
    ----------
    advantage : Array
        Advantage A, any shape, unit of the reward. The function is elementwise.

    Returns
    -------
    Array
        Integers of the same shape and kind. Raises nothing.

    Examples
    --------
    >>> [sign_code(a) for a in (0.5, -2.0, 0.0, float("nan"))]
    [1, -1, 0, 0]
    """
    return (advantage > 0) * 1 - (advantage < 0) * 1


def valley_depth(prob: Array, complement: Array, collision_rest: Array) -> Array:
    r"""How far the sampled token lies below the border: $S - p = C_o - p(1-p)$.

    Positive in a valley, negative on a peak. The right-hand form keeps its relative accuracy where
    $p$ and $S$ are both near 1 (README section 6).

    Parameters
    ----------
    prob : Array
        Probability p of the sampled token, in [0, 1].
    complement : Array
        1 - p, computed without cancellation, e.g. ``-expm1(logp)``.
    collision_rest : Array
        Sum of squared probabilities of all other tokens.

    Returns
    -------
    Array
        Same shape and kind, a difference of probabilities. Raises nothing.

    Examples
    --------
    >>> valley_depth(0.25, 0.75, 0.3125)
    0.125
    """
    return collision_rest - prob * complement


def is_peak(prob: Array, complement: Array, collision_rest: Array) -> Array:
    r"""Whether the sampled token is a peak: $p \ge S$, that is $p(1-p) \ge C_o$.

    S is the collision probability, the probability one expects to draw. A token within a relative
    ``TIE_TOLERANCE`` of the border counts as peak; so does p = 1. Source: arXiv 2606.16154.

    Parameters
    ----------
    prob, complement, collision_rest : Array
        As in :func:`valley_depth`.

    Returns
    -------
    Array
        Booleans of the same shape and kind; False where a statistic is NaN (:func:`regime_code`
        tells that case apart). Raises nothing.

    Examples
    --------
    >>> is_peak(0.25, 0.75, 3 * 0.25**2)
    True
    >>> is_peak(0.1, 0.9, 0.81)
    False
    """
    return prob * complement >= collision_rest * (1 - TIE_TOLERANCE)


def regime_code(prob: Array, complement: Array, collision_rest: Array) -> Array:
    """Regime of the sampled token: 1 peak, 0 valley, -1 unknown.

    Parameters
    ----------
    prob, complement, collision_rest : Array
        As in :func:`valley_depth`; NaN marks a statistic the source could not give.

    Returns
    -------
    Array
        Integers of the same shape and kind. Raises nothing.

    Examples
    --------
    >>> [regime_code(0.1, 0.9, collision_rest) for collision_rest in (0.09, 0.81, float("nan"))]
    [1, 0, -1]
    """
    peak = is_peak(prob, complement, collision_rest)
    return _known(prob, complement, collision_rest) * (peak + 1) - 1


def class_code(advantage: Array, prob: Array, complement: Array, collision_rest: Array) -> Array:
    """Class of the update as a code of :data:`CLASS_CODES`.

    Parameters
    ----------
    advantage : Array
        Advantage A; its sign is the sign of the class.
    prob, complement, collision_rest : Array
        As in :func:`valley_depth`.

    Returns
    -------
    Array
        Integers of the broadcast shape: 0..3 in the order of :data:`CLASSES`; 4 where the
        advantage is zero, whatever the statistics; -1 where the advantage, or for a nonzero
        advantage a statistic, is NaN. Raises nothing.

    Examples
    --------
    >>> [class_code(a, 0.9, 0.1, 0.01) for a in (1, -1, 0)]
    [0, 2, 4]
    >>> [class_code(a, 0.1, 0.9, 0.81) for a in (1, -1, float("nan"))]
    [1, 3, -1]
    """
    positive, negative, zero = advantage > 0, advantage < 0, advantage == 0
    regime = regime_code(prob, complement, collision_rest)
    known, valley = regime >= 0, regime == 0
    # Shifted by one, so that whatever no term below claims comes out as unknown (-1).
    return (positive & known) * (valley + 1) + (negative & known) * (valley + 3) + zero * 5 - 1


def rule_dentropy_sign(code: Array) -> Array:
    """Sign the taxonomy's rule gives to the entropy change of a class.

    The rule is right for every valley token, for the most probable token, and for the average over
    the tokens of a regime; it can be wrong for other peak tokens close to the border (README
    section 4). :func:`wapo_taxonomy.dentropy` is the exact number.

    Parameters
    ----------
    code : Array
        Class codes, as from :func:`class_code`.

    Returns
    -------
    Array
        Integers of the same shape and kind: -1 for pos_peak and neg_valley (sharpen), +1 for
        pos_valley and neg_peak (flatten), 0 for none and unknown. Raises nothing.

    Examples
    --------
    >>> [rule_dentropy_sign(CLASS_CODES[name]) for name in CLASSES]
    [-1, 1, 1, -1]
    """
    flattens = (code == CLASS_CODES["pos_valley"]) * 1 + (code == CLASS_CODES["neg_peak"]) * 1
    sharpens = (code == CLASS_CODES["pos_peak"]) * 1 + (code == CLASS_CODES["neg_valley"]) * 1
    return flattens - sharpens


def expand_bins(names: Iterable[str] | str) -> tuple[str, ...]:
    """Expand class, regime and sign names to full class names.

    Parameters
    ----------
    names : iterable of str, or str
        Each a class (``"pos_peak"``), a regime (``"peak"``) or a sign (``"pos"``).

    Returns
    -------
    tuple of str
        Class names, each once, in the order of :data:`CLASSES`.

    Raises
    ------
    ValueError
        If a name is none of these; the message gives the name and the allowed ones.

    Examples
    --------
    >>> expand_bins(["valley", "pos"])
    ('pos_peak', 'pos_valley', 'neg_valley')
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in BIN_NAMES:
            raise ValueError(f"unknown bin {name!r}; allowed: {', '.join(BIN_NAMES)}")
    return tuple(c for c in CLASSES if c in wanted or any(part in wanted for part in c.split("_")))


def _known(*statistics: Array) -> Array:
    """1 where no statistic is NaN, else 0."""
    known: Array = 1
    for statistic in statistics:
        known = known * (statistic == statistic)  # only NaN differs from itself
    return known
