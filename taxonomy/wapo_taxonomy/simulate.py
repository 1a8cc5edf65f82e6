r"""One softmax under many updates (README section 7).

Nothing here is first order: every step moves the logits and takes a new softmax. With u = z/T one
gradient step on the raw logits is $u \leftarrow u + k(e_y - p)$, $k = \eta c / T^2$.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wapo_taxonomy.classes import CLASSES, Array, is_peak, regime_code
from wapo_taxonomy.effects import logit_step
from wapo_taxonomy.vocabulary import namespace, one_hot

#: Probabilities (V,) -> direction of z/T (V,), probability of being drawn, regime code.
_Direction = Callable[[Array], tuple[Array, Array, Array]]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States of one distribution before, between and after the updates.

    Every field is an array of the library of the logits (numpy for pandas); row t is the state
    after t updates.

    Attributes
    ----------
    prob_sampled : Array
        Probability of the sampled token, or of the class's whole regime; shape (steps + 1,).
    entropy : Array
        Entropy in nats, shape (steps + 1,).
    collision : Array
        Collision probability, shape (steps + 1,).
    max_prob : Array
        Largest probability, shape (steps + 1,).
    probs : Array
        Distributions, shape (steps + 1, V).
    regime : Array
        Regime of the updated token, 1 peak, 0 valley; shape (steps + 1,).
    move_norm : Array
        L2 length of the move of z/T that the next update makes, shape (steps + 1,).
    """

    prob_sampled: Array
    entropy: Array
    collision: Array
    max_prob: Array
    probs: Array
    regime: Array
    move_norm: Array


def simulate(
    logits: Array, sampled: int, coef: float, lr: float, steps: int, temperature: float = 1.0
) -> Trajectory:
    r"""Repeat the same update of one fixed token.

    Each step is $u \leftarrow u + k(e_y - p)$ with u = z/T and $k = \eta c/T^2$ (README section 7).

    Parameters
    ----------
    logits : Array
        Raw logits at the start, shape (V,); -inf marks a forbidden token.
    sampled : int
        Position of the token that every update rewards or punishes.
    coef : float
        c; positive pushes the token up, negative down.
    lr : float
        Learning rate on the raw logits, > 0.
    steps : int
        Number of updates, >= 0.
    temperature : float
        T > 0.

    Returns
    -------
    Trajectory
        ``steps + 1`` states; ``regime`` is that of the token at each state.

    Raises
    ------
    ValueError
        If steps, learning rate or temperature are out of range, or the logits are no vector.
    IndexError
        If the sampled position is outside the vocabulary.
    TypeError
        If the logits are no array.

    Examples
    --------
    >>> import numpy as np
    >>> up = simulate(np.zeros(4), sampled=0, coef=1.0, lr=1.0, steps=50)
    >>> bool(up.prob_sampled[-1] > 0.95), bool(up.move_norm[-1] < up.move_norm[0] / 10)
    (True, True)
    """
    xp = namespace(logits)
    _check(logits, lr, steps, temperature)
    hot = one_hot(logits, sampled, xp)

    def direction(probs: Array) -> tuple[Array, Array, Array]:
        rest = probs * (1 - hot)
        prob, complement = (probs * hot).sum(), rest.sum()
        regime = regime_code(prob, complement, (rest * rest).sum())
        return complement * hot - rest, prob, regime

    step = logit_step(float(coef), float(temperature), float(lr))
    return _run(logits / float(temperature), step, steps, direction, xp)


def simulate_class(
    logits: Array,
    class_name: str,
    coef: float = 1.0,
    lr: float = 0.1,
    steps: int = 100,
    temperature: float = 1.0,
    per_draw: bool = False,
) -> Trajectory:
    r"""Repeat the expected update of one class.

    With R the tokens in the class's regime at this step and m their mass, the expected direction of
    one update of the class is $\sum_{v \in R} (p_v / m)(e_v - p) = p 1_R / m - p$, an exact average
    over the tokens the policy draws from R; the noise around it is left out. Per draw, where most
    draws may miss the class, it is m times as long: the gradient of m. (README section 7.)

    Parameters
    ----------
    logits : Array
        Raw logits at the start, shape (V,); -inf marks a forbidden token.
    class_name : str
        One of ``CLASSES``; gives regime and sign.
    coef : float
        Size |c| > 0 of the coefficient of every update.
    lr : float
        Learning rate on the raw logits, > 0.
    steps : int
        Number of updates, >= 0.
    temperature : float
        T > 0.
    per_draw : bool
        False: one step is one update of this class. True: one step is one token drawn from the
        policy, which the class may not contain; then pos_peak equals neg_valley and pos_valley
        equals neg_peak, because the expected update over all tokens is zero.

    Returns
    -------
    Trajectory
        ``steps + 1`` states; ``prob_sampled`` is the mass m, ``regime`` the class's own regime.

    Raises
    ------
    ValueError
        If the class is unknown or a number is out of range.
    TypeError
        If the logits are no array.

    Examples
    --------
    >>> import numpy as np
    >>> start = np.array([2.0, 1.0, 0.0, -1.0])
    >>> entropy = simulate_class(start, "neg_peak", lr=0.5, steps=200).entropy
    >>> bool(entropy[-1] > entropy[0])
    True
    """
    if class_name not in CLASSES:
        raise ValueError(f"unknown class {class_name!r}; allowed: {', '.join(CLASSES)}")
    if not coef > 0:
        raise ValueError(f"coef is the size of the coefficient and must be > 0, got {coef}")
    xp = namespace(logits)
    _check(logits, lr, steps, temperature)
    sign_name, regime_name = class_name.split("_")
    wants_peak = regime_name == "peak"

    def direction(probs: Array) -> tuple[Array, Array, Array]:
        squares = probs * probs
        peak = is_peak(probs, 1 - probs, squares.sum() - squares)
        members = peak if wants_peak else ~peak
        inside, outside = probs * members, probs * ~members
        mass = inside.sum()
        # p 1_R - m p, written without the cancellation inside R.
        move = inside * outside.sum() - outside * mass
        # A uniform row has no valley: mass and move are then 0, and 0 / 1 is meant.
        return (
            move if per_draw else move / (mass + (mass == 0)),
            mass,
            (mass == mass) * wants_peak * 1,
        )

    signed = float(coef) if sign_name == "pos" else -float(coef)
    step = logit_step(signed, float(temperature), float(lr))
    return _run(logits / float(temperature), step, steps, direction, xp)


def _run(scaled: Array, step: float, steps: int, direction: _Direction, xp: Any) -> Trajectory:
    """Move z/T ``steps`` times along ``direction`` and keep every state."""
    rows = []
    for _ in range(steps + 1):
        probs, entropy = _softmax(scaled, xp)
        move, prob, regime = direction(probs)
        move = step * move
        norm = (move * move).sum() ** 0.5
        rows.append((prob, entropy, (probs * probs).sum(), probs.max(), probs, regime, norm))
        scaled = scaled + move
    return Trajectory(*(xp.stack(column) for column in zip(*rows, strict=True)))


def _softmax(scaled: Array, xp: Any) -> tuple[Array, Array]:
    """Probabilities (V,) and entropy (nats), accurate also next to a certain token."""
    x = scaled - scaled.max()
    weights = xp.exp(x)
    # One mode, of weight exactly 1, is left out: log1p then keeps the digits of a small 1 - p.
    log_total = xp.log1p((weights * (x < 0)).sum() + ((weights * (x == 0)).sum() - 1))
    probs = weights / weights.sum()
    finite = xp.where(probs > 0, x, xp.zeros_like(x))
    return probs, log_total - (probs * finite).sum()


def _check(logits: Array, lr: float, steps: int, temperature: float) -> None:
    """Raise ValueError for a number out of range."""
    if logits.ndim != 1:
        raise ValueError(f"logits must be one vector (V,), got {logits.ndim} dimensions")
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    for name, value in (("lr", lr), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
