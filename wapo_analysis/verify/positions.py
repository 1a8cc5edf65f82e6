"""Random token positions with measured rates, and the formulas that are held against them.

Rates come from fourth-order central differences of a plain float64 softmax, taken along the
gradient step on the raw logits at a random temperature; no formula of the taxonomy enters them.
Batch axes are N positions by V tokens; probabilities and nats. ``own`` and ``more`` are the
statistics of `Positions`; every result is per unit of the step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import wapo_taxonomy as wt
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Vocabulary sizes the positions are spread over.
SIZES = (2, 5, 50, 1000)

_WIDTH = 1e-3


@dataclass(frozen=True)
class Positions:
    """Positions with one sampled token each, its statistics, and what a gradient step did."""

    #: Raw logits and softmax(logits / temperature), (N, V).
    logits: Floats
    probs: Floats
    #: Sampled token, (N,).
    sampled: NDArray[np.int64]
    #: Coefficient c = -dL/dlogp and temperature T, (N,).
    coef: Floats
    temperature: Floats
    #: ``prob``, ``complement``, ``collision_rest`` of the sampled token, (N,) each.
    own: dict[str, Floats]
    #: ``logp``, ``entropy``, ``collision_logp_rest`` in nats, (N,) each.
    more: dict[str, Floats]
    #: Measured change of every probability per unit of lr * c / T**2, (N, V).
    prob_rates: Floats
    #: Measured change of the entropy per unit of lr * c / T**2, nats, (N,).
    entropy_rate: Floats

    @property
    def hot(self) -> Bools:
        """Mask of the sampled token, (N, V)."""
        return mask(self.probs, self.sampled)

    @property
    def mode(self) -> Bools:
        """Mask of the most probable token, (N, V)."""
        return mask(self.probs, self.probs.argmax(1))


def draw_batches(rng: np.random.Generator, trials: int) -> Iterator[Positions]:
    """Draw positions, spread evenly over the vocabulary sizes.

    ``rng``: source of randomness; ``trials``: number of positions in all.

    Yields
    ------
    Positions
        One batch per entry of :data:`SIZES`.
    """
    for size, rows in zip(SIZES, np.array_split(np.arange(trials), len(SIZES)), strict=True):
        yield draw(rng, len(rows), size)


def draw(rng: np.random.Generator, rows: int, size: int) -> Positions:
    """Draw flat, ordinary, tied and near-certain rows; half of the tokens come from the policy.

    With measured rates. ``rng``: source of randomness; ``rows``, ``size``: number of positions N
    and vocabulary size V.
    """
    temperature = rng.choice([0.3, 0.7, 1.0, 1.7, 4.0], rows)
    scaled = rng.choice([0.0, 0.3, 1.0, 3.0], (rows, 1)) * rng.standard_normal((rows, size))
    scaled[::4] = np.round(scaled[::4])
    lifted = np.arange(rows) % 2 == 1
    scaled[lifted, rng.integers(size, size=lifted.sum())] += rng.uniform(0, 25, lifted.sum())
    drawn = (scaled + rng.gumbel(size=scaled.shape)).argmax(1)
    sampled = np.where(rng.random(rows) < 0.5, drawn, rng.integers(size, size=rows))
    coef = rng.choice([-1.0, 1.0], rows) * 10 ** rng.uniform(-2, 2, rows)
    logits = scaled * temperature[:, None]
    prob_rates, entropy_rate = _measure(logits, sampled, coef, temperature)
    own, more = statistics(scaled, sampled)
    return Positions(
        logits=logits,
        probs=softmax(scaled),
        sampled=sampled,
        coef=coef,
        temperature=temperature,
        own=own,
        more=more,
        prob_rates=prob_rates,
        entropy_rate=entropy_rate,
    )


def _measure(
    logits: Floats, sampled: NDArray[np.int64], coef: Floats, temperature: Floats
) -> tuple[Floats, Floats]:
    """Differentiate probabilities and entropy along the gradient step on the raw logits."""
    probs = softmax(logits / temperature[:, None])
    gradient = -(coef / temperature)[:, None] * (mask(probs, sampled) - probs)
    # Learning rate in units that move z/T by about the width, whatever coefficient and temperature.
    unit = temperature**2 / np.abs(coef)

    def after(width: float) -> Floats:
        return softmax((logits - (width * unit)[:, None] * gradient) / temperature[:, None])

    sign = np.sign(coef)
    prob_rates = sign[:, None] * derivative(after)
    return prob_rates, sign * derivative(lambda width: entropy(after(width)))


def gradient_by_differences(batch: Positions) -> Floats:
    """Measure dL/dz of L = -c ln p_y by one central difference per raw logit.

    Returns dL/dz divided by abs(c) / T, shape (N, V). ``batch``: N positions; the cost is V times
    that of one softmax.
    """
    hot, temperature = batch.hot, batch.temperature[:, None]

    def logp(token: int, width: float) -> Floats:
        logits = batch.logits.copy()
        logits[:, token] += width * batch.temperature
        return np.log(softmax(logits / temperature)[hot])

    columns = []
    for token in range(hot.shape[1]):

        def along(width: float, token: int = token) -> Floats:
            return logp(token, width)

        columns.append(derivative(along))
    return -np.sign(batch.coef)[:, None] * np.stack(columns, 1)


def mask(like: Floats, tokens: NDArray[np.int64]) -> Bools:
    """Mark one token per row: (N,) positions to an (N, V) mask. Raises nothing."""
    marked: Bools = np.arange(like.shape[1]) == tokens[:, None]
    return marked


def softmax(scaled: Floats) -> Floats:
    """Softmax over the last axis, of logits already divided by the temperature. Raises nothing."""
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    probs: Floats = weights / weights.sum(-1, keepdims=True)
    return probs


def entropy(probs: Floats) -> Floats:
    """Entropy over the last axis in nats, with 0 ln 0 = 0. Raises nothing."""
    total: Floats = (probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1)
    return -total


def statistics(
    scaled: Floats, sampled: NDArray[np.int64]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Compute the stored statistics of each sampled token without cancellation.

    Returns ``own`` and ``more`` of :class:`Positions`. ``scaled``: logits divided by the
    temperature, (N, V), V >= 2; ``sampled``: sampled token, (N,).
    """
    hot = mask(scaled, sampled)
    chosen = scaled[hot]
    top = np.where(hot, -np.inf, scaled).max(1)
    others = np.where(hot, 0.0, np.exp(scaled - top[:, None])).sum(1)
    logp = -np.logaddexp(0.0, top + np.log(others) - chosen)
    logs = np.where(hot, 0.0, scaled - chosen[:, None] + logp[:, None])
    rest = np.where(hot, 0.0, np.exp(logs))
    prob = np.exp(logp)
    own = {"prob": prob, "complement": -np.expm1(logp), "collision_rest": (rest**2).sum(1)}
    more = {
        "logp": logp,
        "entropy": -(rest * logs).sum(1) - prob * logp,
        "collision_logp_rest": (rest**2 * logs).sum(1),
    }
    return own, more


def derivative(function: Callable[[float], Floats]) -> Floats:
    """Fourth-order central difference of a function of one number at 0. Raises nothing."""
    near = function(_WIDTH) - function(-_WIDTH)
    far = function(2 * _WIDTH) - function(-2 * _WIDTH)
    return (8 * near - far) / (12 * _WIDTH)


#: A sampled token counts as nearly certain when 1 - p is below this.
NEAR_CERTAIN = 1e-2


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

    Returns 1 - 2p + S, and dH / k = -[p (ln p + H) - (Q + S H)] in nats. ``own``, ``more``:
    statistics of the sampled tokens, (N,) each.
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

    Returns dH / k in nats and whether the token is a peak, both (N, V). ``probs``: distributions,
    (N, V), float64.
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
