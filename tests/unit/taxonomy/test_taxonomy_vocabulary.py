"""The whole-vocabulary prediction."""

import numpy as np
import pandas as pd
import pytest
import torch
import wapo_taxonomy as wt
from hypothesis import given

from tests.unit.taxonomy.test_taxonomy_reference import (
    EXAMPLES,
    Case,
    along_gradient_step,
    cases,
    entropy,
    loss_gradient,
    softmax,
    statistics,
)


@EXAMPLES
@given(cases())
def test_prediction_is_the_derivative_along_the_gradient_step(case: Case) -> None:
    probs = softmax(case.logits / case.temperature)
    step = wt.logit_step(case.coef, case.temperature)
    got = wt.predict(probs, case.sampled, step)
    atol = 1e-9 * abs(step)
    expected = along_gradient_step(case, lambda p: p)
    np.testing.assert_allclose(got.dprob, expected, rtol=1e-8, atol=atol)
    assert got.dentropy == pytest.approx(along_gradient_step(case, entropy), rel=1e-7, abs=1e-8)
    assert got.dprob.sum() == pytest.approx(0.0, abs=1e-14 * abs(step))
    norm = np.linalg.norm(loss_gradient(case)) / case.temperature
    # Near p = 1 the gradient of the loss itself has lost digits: 1e-15 of the step's size.
    assert got.grad_norm == pytest.approx(norm, rel=1e-9, abs=1e-14 * max(1.0, abs(step)))


@EXAMPLES
@given(cases())
def test_prediction_agrees_with_the_per_token_functions(case: Case) -> None:
    probs = softmax(case.logits / case.temperature)
    s = statistics(case.logits, case.sampled, case.temperature)
    got = wt.predict(probs, case.sampled, 0.5)
    own = wt.dprob_sampled(0.5, s.prob, s.complement, s.collision_rest)
    assert got.dprob[case.sampled] == pytest.approx(own, rel=1e-9)
    exact = wt.dentropy(
        0.5, s.prob, s.complement, s.logp, s.entropy, s.collision_rest, s.collision_logp_rest
    )
    assert got.dentropy == pytest.approx(exact, rel=1e-9, abs=1e-15 * (1 + s.entropy))
    if abs(s.collision - s.prob) > 1e-5 * s.collision:
        assert bool(got.is_peak) == (s.prob >= s.collision)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", [np.array, torch.tensor, pd.Series])
def test_kind_and_dtype_are_kept(make, dtype: str) -> None:
    numpy = np.array([0.5, 0.25, 0.125, 0.125], dtype)
    probs = make(numpy)
    got = wt.predict(probs, 1, 2.0)
    assert type(got.dprob) is type(probs)
    assert got.dprob.dtype == probs.dtype
    for scalar in (got.dentropy, got.grad_norm):
        assert str(scalar.dtype).endswith(dtype)
    np.testing.assert_allclose(np.asarray(got.dprob), wt.predict(numpy, 1, 2.0).dprob)


def test_exact_zeros_stay_zero_and_negative_positions_count_from_the_end() -> None:
    probs = np.array([0.0, 0.75, 0.0, 0.25])
    got = wt.predict(probs, -1, 1.0)
    dense = wt.predict(np.array([0.75, 0.25]), 1, 1.0)
    assert got.dprob.tolist() == [0.0, dense.dprob[0], 0.0, dense.dprob[1]]
    assert got.dentropy == dense.dentropy
    certain = wt.predict(np.array([0.0, 1.0]), 1, 1.0)
    assert certain.dprob.tolist() == [0.0, 0.0]
    assert (certain.dentropy, certain.grad_norm, bool(certain.is_peak)) == (0.0, 0.0, True)
    impossible = wt.predict(np.array([0.0, 1.0]), 0, 1.0)
    assert impossible.dprob.tolist() == [0.0, 0.0]
    assert impossible.grad_norm == pytest.approx(2**0.5)


@pytest.mark.parametrize("sampled", [0, 1, 3])
def test_float32_keeps_its_digits_next_to_certainty(sampled: int) -> None:
    """Also where another token than the sampled one is nearly certain."""
    exact = np.array([0.0, 6e-8, 3e-8, 1e-8])
    exact[0] = 1 - exact.sum()
    want = wt.predict(exact, sampled, 1.0)
    got = wt.predict(exact.astype(np.float32), sampled, 1.0)
    np.testing.assert_allclose(got.dprob, want.dprob, rtol=1e-5)
    assert got.dentropy == pytest.approx(want.dentropy, rel=1e-5)
    assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="numpy array, torch tensor or pandas Series, got list"):
        wt.predict([0.5, 0.5], 0)
    with pytest.raises(IndexError):
        wt.predict(np.array([0.5, 0.5]), 2)


def test_a_step_is_one_unless_said() -> None:
    probs = np.array([0.5, 0.3, 0.2])
    plain, half = wt.predict(probs, 1), wt.predict(probs, 1, 0.5)
    np.testing.assert_allclose(plain.dprob, 2 * half.dprob, rtol=1e-15)
    assert plain.dprob[1] == pytest.approx(0.3 * (1 - 0.6 + 0.38))
