"""The slow obvious program the taxonomy is tested against, itself tested against autograd."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Case:
    """One position: raw logits (V,) float64, sampled token, coefficient, temperature."""

    logits: np.ndarray
    sampled: int
    coef: float
    temperature: float


@dataclass(frozen=True)
class Statistics:
    """The five numbers a run stores per token, computed without cancellation, and S and Q."""

    prob: float
    complement: float
    logp: float
    entropy: float
    collision_rest: float
    collision_logp_rest: float
    collision: float
    collision_logp: float


def softmax(scaled: np.ndarray) -> np.ndarray:
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def entropy(probs: np.ndarray) -> float:
    positive = probs[probs > 0]
    return float(-(positive * np.log(positive)).sum())


def direction(probs: np.ndarray, sampled: int) -> np.ndarray:
    return np.eye(len(probs))[sampled] - probs


def statistics(logits: np.ndarray, sampled: int, temperature: float = 1.0) -> Statistics:
    scaled = logits / temperature
    weights = np.exp(scaled - scaled.max())
    probs = weights / weights.sum()
    rest, log_rest = np.delete(probs, sampled), np.delete(scaled, sampled)
    complement = rest.sum()
    odds = np.delete(weights, sampled).sum() / weights[sampled]
    logp = -np.log1p(odds)
    log_rest = log_rest - scaled[sampled] + logp
    collision_rest, collision_logp_rest = (rest**2).sum(), (rest**2 * log_rest).sum()
    prob = probs[sampled]
    return Statistics(
        prob=prob,
        complement=complement,
        logp=logp,
        entropy=-(rest * log_rest).sum() - prob * logp,
        collision_rest=collision_rest,
        collision_logp_rest=collision_logp_rest,
        collision=collision_rest + prob**2,
        collision_logp=collision_logp_rest + prob**2 * logp,
    )


def derivative(function, width: float = 1e-3):
    """Fourth-order central difference at 0."""
    near = function(width) - function(-width)
    far = function(2 * width) - function(-2 * width)
    return (8 * near - far) / (12 * width)


def loss_gradient(case: Case) -> np.ndarray:
    """dL/dz over the raw logits by torch autograd, for L = -coef * log softmax(z / T)[y]."""
    logits = torch.tensor(case.logits, requires_grad=True)
    loss = -case.coef * torch.log_softmax(logits / case.temperature, dim=0)[case.sampled]
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient.numpy()


def along_gradient_step(case: Case, quantity) -> float:
    """d quantity(p) / d lr at lr = 0 of the step z <- z - lr dL/dz, by central differences."""
    gradient = loss_gradient(case)
    # A width in units of the move keeps the truncation error small at any coefficient and T.
    width = 1e-3 / max(1.0, float(np.abs(gradient).max()) / case.temperature)

    def after(lr: float):
        return quantity(softmax((case.logits - lr * gradient) / case.temperature))

    return derivative(after, width)


@st.composite
def cases(draw, temperatures=(0.3, 0.7, 1.0, 1.7, 4.0)) -> Case:
    """Many sizes; flat, ordinary, near-certain and tied rows."""
    size = draw(st.sampled_from([2, 3, 5, 17, 200]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = draw(st.sampled_from([0.0, 0.1, 1.0, 4.0])) * rng.standard_normal(size)
    if draw(st.booleans()):
        logits[rng.integers(size)] += draw(st.floats(0.0, 25.0))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    sampled = int(rng.integers(size)) if draw(st.booleans()) else int(logits.argmax())
    coef = draw(st.sampled_from([-3.0, -0.2, 0.5, 1.0, 2.0]))
    return Case(logits, sampled, coef, draw(st.sampled_from(temperatures)))


@EXAMPLES
@given(cases())
def test_reference_statistics_are_the_plain_sums(case: Case) -> None:
    got = statistics(case.logits, case.sampled, case.temperature)
    probs = softmax(case.logits / case.temperature)
    logs = np.log(probs)
    assert got.prob == pytest.approx(probs[case.sampled], rel=1e-12)
    # 1 - p of the plain sum is off by the rounding of its terms; ours has no such cancellation.
    rounding = len(probs) * np.finfo(np.float64).eps
    assert got.complement == pytest.approx(1 - probs[case.sampled], abs=rounding)
    assert got.entropy == pytest.approx(entropy(probs), rel=1e-9, abs=1e-14)
    assert got.collision == pytest.approx((probs**2).sum(), rel=1e-12)
    assert got.collision_logp == pytest.approx((probs**2 * logs).sum(), rel=1e-9, abs=1e-14)


@EXAMPLES
@given(cases())
def test_reference_gradient_is_the_softmax_gradient(case: Case) -> None:
    probs = softmax(case.logits / case.temperature)
    expected = -case.coef / case.temperature * direction(probs, case.sampled)
    np.testing.assert_allclose(loss_gradient(case), expected, rtol=1e-12, atol=1e-14)
