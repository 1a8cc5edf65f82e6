"""Random token positions with measured rates, the raw material of the numerical proof.

Rates come from fourth-order central differences of a plain float64 softmax, taken along the
gradient step on the raw logits at a random temperature; no formula of the taxonomy enters them.
Batch axes are N positions by V tokens; probabilities and nats.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SIZES = (2, 5, 50, 1000)
"""Vocabulary sizes the positions are spread over."""

_WIDTH = 1e-3


@dataclass(frozen=True)
class Positions:
    """Positions with one sampled token each, its statistics, and what a gradient step did.

    Attributes
    ----------
    logits, probs : ndarray
        Raw logits and softmax(logits / temperature), (N, V).
    sampled : ndarray
        Sampled token, (N,).
    coef, temperature : ndarray
        Coefficient c = -dL/dlogp and temperature T, (N,).
    own : dict
        ``prob``, ``complement``, ``collision_rest`` of the sampled token, (N,) each.
    more : dict
        ``logp``, ``entropy``, ``collision_logp_rest`` in nats, (N,) each.
    prob_rates : ndarray
        Measured change of every probability per unit of lr * c / T**2, (N, V).
    entropy_rate : ndarray
        Measured change of the entropy per unit of lr * c / T**2, nats, (N,).
    """

    logits: Floats
    probs: Floats
    sampled: NDArray[np.int64]
    coef: Floats
    temperature: Floats
    own: dict[str, Floats]
    more: dict[str, Floats]
    prob_rates: Floats
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

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    trials : int
        Number of positions in all.

    Yields
    ------
    Positions
        One batch per entry of :data:`SIZES`. Raises nothing.
    """
    for size, rows in zip(SIZES, np.array_split(np.arange(trials), len(SIZES)), strict=True):
        yield draw(rng, len(rows), size)


def draw(rng: np.random.Generator, rows: int, size: int) -> Positions:
    """Draw flat, ordinary, tied and near-certain rows; half of the tokens come from the policy.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    rows, size : int
        Number of positions N and vocabulary size V.

    Returns
    -------
    Positions
        With measured rates. Raises nothing.
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

    Parameters
    ----------
    batch : Positions
        N positions; the cost is V times that of one softmax.

    Returns
    -------
    ndarray
        dL/dz divided by abs(c) / T, shape (N, V). Raises nothing.
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

    Parameters
    ----------
    scaled : ndarray
        Logits divided by the temperature, (N, V), V >= 2.
    sampled : ndarray
        Sampled token, (N,).

    Returns
    -------
    tuple of dict
        ``own`` and ``more`` of :class:`Positions`. Raises nothing.
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


def derivative(function: Callable[[float], Floats], width: float = _WIDTH) -> Floats:
    """Fourth-order central difference of a function of one number at 0. Raises nothing."""
    near = function(width) - function(-width)
    far = function(2 * width) - function(-2 * width)
    return (8 * near - far) / (12 * width)
