"""Effect of one update on a whole vocabulary (README section 3).

The functions here need a logarithm, which is not an operator: they take it from the library of the
array they are given, so that this package itself imports none.
"""

import sys
from dataclasses import dataclass
from typing import Any

from wapo_taxonomy.classes import Array, is_peak, valley_depth
from wapo_taxonomy.effects import dentropy, dprob_sampled, grad_norm


@dataclass(frozen=True, eq=False)
class VocabularyPrediction:
    """First-order effect of one update on one distribution.

    Attributes
    ----------
    dprob : Array
        Change of every token's probability, shape (V,); sums to zero.
    dentropy : Array
        Change of the entropy, nats.
    grad_norm : Array
        Length of the move of z/T, ``|step| * norm(e_y - p)``; at temperature 1 and unit learning
        rate it is the norm of the loss gradient.
    is_peak : Array
        Whether the sampled token is a peak.
    """

    dprob: Array
    dentropy: Array
    grad_norm: Array
    is_peak: Array


def namespace(array: Array) -> Any:
    """Return the module whose ``log``, ``where``, ``zeros_like`` and ``stack`` fit an array.

    Parameters
    ----------
    array : Array
        A numpy array, torch tensor, pandas Series, or anything with ``__array_namespace__``.

    Returns
    -------
    module
        The array's own library; numpy for pandas.

    Raises
    ------
    TypeError
        If the object is no array, such as a list.

    Examples
    --------
    >>> import numpy as np
    >>> namespace(np.zeros(3)) is np
    True
    """
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    library = type(array).__module__.partition(".")[0]
    # Whoever made the array has imported its library, so a look-up is enough.
    module = sys.modules.get("numpy" if library == "pandas" else library)
    if not hasattr(module, "zeros_like"):
        raise TypeError(
            f"expected a numpy array, torch tensor or pandas Series, got {type(array).__name__}"
        )
    return module


def one_hot(like: Array, index: int, xp: Any) -> Array:
    """Build the unit vector with a 1 at ``index``, of the shape, dtype and device of ``like``.

    Parameters
    ----------
    like : Array
        Vector, shape (V,).
    index : int
        Position in the vocabulary.
    xp : module
        Namespace of ``like``.

    Returns
    -------
    Array
        Shape (V,).

    Raises
    ------
    IndexError
        If the position is outside the vocabulary.

    Examples
    --------
    >>> import numpy as np
    >>> one_hot(np.zeros(3), 1, np).tolist()
    [0.0, 1.0, 0.0]
    """
    hot = xp.zeros_like(like)
    hot[index] = 1
    return hot


def predict(probs: Array, sampled: int, step: Array = 1.0) -> VocabularyPrediction:
    r"""Predict what one update does to every token of one distribution.

    Per token $dp_v = k\,p_v(S - p_y - p_v)$ and $dp_y = k\,p_y(1 - 2p_y + S)$, in their stable
    forms (README sections 3 and 6).

    Parameters
    ----------
    probs : Array
        Distribution of the next token, shape (V,), float32 or float64, sums to 1; exact zeros are
        allowed.
    sampled : int
        Position of the sampled token.
    step : Array
        k of :func:`wapo_taxonomy.logit_step`, a number.

    Returns
    -------
    VocabularyPrediction
        ``dprob`` has the shape and kind of ``probs``, the rest are scalars of that library.

    Raises
    ------
    IndexError
        If the sampled position is outside the vocabulary.
    TypeError
        If ``probs`` is no array.

    Examples
    --------
    A rewarded valley takes from the dominant token and gives to itself and to the tail:

    >>> import numpy as np
    >>> effect = predict(np.array([0.8, 0.15, 0.05]), sampled=1, step=0.1)
    >>> np.sign(effect.dprob).tolist(), bool(effect.is_peak), bool(effect.dentropy > 0)
    ([-1.0, 1.0, 1.0], False, True)
    """
    xp = namespace(probs)
    hot = one_hot(probs, sampled, xp)
    mode = one_hot(probs, probs.argmax(), xp)
    rest, tail = probs * (1 - hot), probs * (1 - mode)
    # ln 1 = 0 stands in where 0 ln 0 = 0 is meant. Of a probability rounded near 1 the logarithm is
    # off by that rounding, which cancels below: what multiplies it sums up to (1 - p)^2.
    logs = xp.log(probs + (probs == 0))
    squares = rest * rest
    own = {
        "prob": (probs * hot).sum(),
        "complement": rest.sum(),
        "collision_rest": squares.sum(),
    }
    # S - p_y - p_v, taken from the side of whichever of y and v may be near 1.
    mode_depth = valley_depth((probs * mode).sum(), tail.sum(), (tail * tail).sum())
    gap = xp.where(mode > 0, mode_depth - own["prob"], valley_depth(**own) - rest)
    return VocabularyPrediction(
        dprob=step * rest * gap + dprob_sampled(step, **own) * hot,
        dentropy=dentropy(
            step,
            logp=(logs * hot).sum(),
            entropy=-(probs * logs).sum(),
            collision_logp_rest=(squares * logs).sum(),
            **own,
        ),
        grad_norm=grad_norm(step, own["complement"], own["collision_rest"]),
        is_peak=is_peak(**own),
    )
