"""Many updates of one softmax: plain gradient descent, and the laws of README section 7."""

import numpy as np
import pandas as pd
import pytest
import torch
import wapo_taxonomy as wt
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.taxonomy.test_taxonomy_reference import EXAMPLES, Case, cases, softmax

ENTROPY_SIGN = {name: effect.entropy for name, effect in wt.EFFECTS.items()}
START = np.log([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])


@EXAMPLES
@given(cases(temperatures=(0.5, 1.0, 2.0)), st.floats(0.01, 0.5))
def test_simulation_is_gradient_descent_on_the_raw_logits(case: Case, lr: float) -> None:
    logits = torch.tensor(case.logits, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=lr)
    states = []
    for _ in range(6):
        logp = torch.log_softmax(logits / case.temperature, 0)
        states.append(logp.detach().exp().numpy())
        optimizer.zero_grad()
        (-case.coef * logp[case.sampled]).backward()
        optimizer.step()
    got = wt.simulate(case.logits, case.sampled, case.coef, lr, 5, case.temperature)
    np.testing.assert_allclose(got.probs, np.array(states), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(got.prob_sampled, got.probs[:, case.sampled])
    np.testing.assert_array_equal(got.max_prob, got.probs.max(1))
    np.testing.assert_allclose(got.collision, (got.probs**2).sum(1))
    logs = np.log(np.where(got.probs > 0, got.probs, 1))
    np.testing.assert_allclose(got.entropy, -(got.probs * logs).sum(1), rtol=1e-8, atol=1e-13)
    assert set(got.regime.tolist()) <= {0, 1}


@EXAMPLES
@given(cases(temperatures=(1.0,)), st.floats(0.01, 4.0))
def test_positive_updates_shrink_their_gradient_and_negative_ones_grow_it(
    case: Case, step: float
) -> None:
    up = wt.simulate(case.logits, case.sampled, 1.0, step, 20)
    down = wt.simulate(case.logits, case.sampled, -1.0, step, 20)
    slack = 1 + 1e-9
    assert (up.move_norm[1:] <= up.move_norm[:-1] * slack + 1e-14).all()
    assert (down.move_norm[1:] * slack + 1e-14 >= down.move_norm[:-1]).all()
    assert (np.diff(up.prob_sampled) >= -1e-14).all()
    assert (np.diff(down.prob_sampled) <= 1e-14).all()


def test_rates_of_the_two_signs() -> None:
    """Positive: 1 / (1 - p) grows linearly. Negative: ln p falls linearly, without end."""
    up = wt.simulate(START, 1, 1.0, 0.05, 8_000)
    time = 0.05 * (8_000 - 4_000)
    growth = 1 / (1 - up.prob_sampled[-1]) - 1 / (1 - up.prob_sampled[4_000])
    assert 0.99 * time <= growth <= 2 * time
    down = wt.simulate(START, 1, -1.0, 0.01, 2_000)
    fall = np.log(down.prob_sampled[1_000]) - np.log(down.prob_sampled[2_000])
    assert 10.0 * (1 - down.prob_sampled[1_000]) ** 2 <= fall <= 20.0


def test_a_punished_peak_flattens_until_it_becomes_a_valley_then_sharpens() -> None:
    run = wt.simulate(np.log([0.94, 0.03, 0.02, 0.01]), 0, -1.0, 0.05, 3_000)
    assert run.regime[0] == 1
    assert run.regime[-1] == 0
    crossing = int(run.regime.argmin())
    top = int(run.entropy.argmax())
    assert 0 < top <= crossing
    assert run.entropy[top] > run.entropy[0] + 0.5
    assert (np.diff(run.entropy[crossing:]) < 0).all()
    assert run.entropy[-1] < 0.5 * run.entropy[top]


@pytest.mark.parametrize("name", wt.CLASSES)
@pytest.mark.parametrize("per_draw", [True, False])
def test_class_update_is_the_exact_average_over_the_regime(name: str, per_draw: bool) -> None:
    temperature, lr, coef = 2.0, 0.3, 1.5
    probs = softmax(START / temperature)
    s = (probs**2).sum()
    members = (probs >= s) == name.endswith("peak")
    sign = 1 if name.startswith("pos") else -1
    gradient = sum(
        probs[v] * sign * coef * (np.eye(6)[v] - probs) / temperature for v in np.where(members)[0]
    )
    if not per_draw:
        gradient = gradient / probs[members].sum()
    run = wt.simulate_class(START, name, coef, lr, 1, temperature, per_draw=per_draw)
    expected = softmax((START + lr * gradient) / temperature)
    np.testing.assert_allclose(run.probs[1], expected, rtol=1e-12)
    assert run.prob_sampled[0] == pytest.approx(probs[members].sum())
    assert run.move_norm[0] == pytest.approx(np.linalg.norm(lr * gradient / temperature))


@EXAMPLES
@given(cases(temperatures=(0.7, 1.0)), st.sampled_from(wt.CLASSES), st.booleans())
def test_class_updates_move_the_entropy_as_the_rule_says(
    case: Case, name: str, per_draw: bool
) -> None:
    """The average over a regime has the rule's sign for every distribution, at small steps."""
    run = wt.simulate_class(case.logits, name, 1.0, 1e-4, 5, case.temperature, per_draw=per_draw)
    change = ENTROPY_SIGN[name] * np.diff(run.entropy)
    assert (change >= -1e-7 * (1 + run.entropy[0])).all()


@pytest.mark.parametrize(
    ("name", "limit"),
    [("pos_peak", 0.0), ("neg_valley", 0.0), ("pos_valley", np.log(6)), ("neg_peak", np.log(6))],
)
def test_each_class_alone_reaches_its_end(name: str, limit: float) -> None:
    run = wt.simulate_class(START, name, lr=0.05, steps=4_000)
    assert run.entropy[-1] == pytest.approx(limit, abs=0.05)
    assert (run.entropy[-1] - run.entropy[0]) * ENTROPY_SIGN[name] > 0.2
    assert set(run.regime.tolist()) == {1 if name.endswith("peak") else 0}


def test_the_regime_of_every_state_is_that_of_its_distribution() -> None:
    """0.4 is above the sum of squares of the start, 0.2602, and 0.25 a little below it."""
    for token, regime in ((0, 1), (1, 0), (5, 0)):
        assert wt.simulate(START, token, 1.0, 0.05, 0).regime.tolist() == [regime]
    run = wt.simulate(START, 1, 1.0, 0.3, 12)
    p, s = run.prob_sampled, (run.probs**2).sum(1)
    assert run.regime.tolist() == (p >= s).astype(int).tolist()
    assert set(run.regime.tolist()) == {0, 1}


def test_a_class_is_simulated_alone_for_100_steps_unless_said() -> None:
    plain = wt.simulate_class(START, "neg_peak")
    said = wt.simulate_class(START, "neg_peak", 1.0, 0.1, 100, 1.0, per_draw=False)
    np.testing.assert_array_equal(plain.probs, said.probs)


def test_one_token_is_simulated_at_temperature_1_unless_said() -> None:
    plain, said = wt.simulate(START, 1, 1.0, 0.1, 3), wt.simulate(START, 1, 1.0, 0.1, 3, 1.0)
    np.testing.assert_array_equal(plain.probs, said.probs)
    assert plain.probs[0] == pytest.approx(np.exp(START))


@pytest.mark.parametrize("gap", [10.0, 30.0, 60.0])
def test_next_to_certainty_a_move_keeps_its_digits(gap: float) -> None:
    """e_y - p has the length sqrt(q^2 + q^2 / 2) there, with q = 1 - p shared by two others."""
    logits = np.array([gap, 0.0, 0.0])
    q = 2 / (np.exp(gap) + 2)
    one = wt.simulate(logits, 0, 1.0, 0.5, 0).move_norm[0]
    assert one == pytest.approx(0.5 * q * 1.5**0.5, rel=1e-12)
    # Its class has the mode alone; per draw the mode's mass makes it a little shorter.
    for per_draw, mass in ((False, 1.0), (True, 1 - q)):
        every = wt.simulate_class(logits, "pos_peak", lr=0.5, steps=0, per_draw=per_draw)
        assert every.move_norm[0] == pytest.approx(0.5 * mass * q * 1.5**0.5, rel=1e-12)


def test_per_draw_opposite_classes_are_one_flow() -> None:
    for first, second in (("pos_peak", "neg_valley"), ("pos_valley", "neg_peak")):
        one = wt.simulate_class(START, first, steps=50, per_draw=True)
        other = wt.simulate_class(START, second, steps=50, per_draw=True)
        np.testing.assert_allclose(one.probs, other.probs, rtol=1e-12)
    assert not np.allclose(
        wt.simulate_class(START, "pos_peak").probs, wt.simulate_class(START, "neg_valley").probs
    )


def test_per_update_a_positive_peak_fades_and_a_negative_valley_does_not() -> None:
    near = np.log([0.98, 0.01, 0.006, 0.004])
    positive = wt.simulate_class(near, "pos_peak", lr=1.0, steps=0).move_norm[0]
    negative = wt.simulate_class(near, "neg_valley", lr=1.0, steps=0).move_norm[0]
    assert positive < 0.03
    assert negative > 1.0


def test_uniform_row_has_no_valley_and_its_peaks_balance() -> None:
    for name in wt.CLASSES:
        run = wt.simulate_class(np.zeros(5), name, steps=3)
        np.testing.assert_allclose(run.probs, 0.2)
        mass = 1.0 if name.endswith("peak") else 0.0
        np.testing.assert_allclose(run.prob_sampled, mass)
        np.testing.assert_array_equal(run.move_norm, 0.0)


def test_forbidden_tokens_stay_forbidden() -> None:
    run = wt.simulate(np.array([0.0, 1.0, -np.inf]), 0, -1.0, 0.5, 10)
    dense = wt.simulate(np.array([0.0, 1.0]), 0, -1.0, 0.5, 10)
    np.testing.assert_array_equal(run.probs[:, 2], 0.0)
    np.testing.assert_allclose(run.entropy, dense.entropy)
    each = wt.simulate_class(np.array([0.0, 1.0, -np.inf]), "neg_peak", steps=10)
    assert np.isfinite(each.entropy).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", [np.array, torch.tensor, pd.Series])
def test_library_and_dtype_of_the_logits_are_kept(make, dtype: str) -> None:
    logits = make(START.astype(dtype))
    library = torch.Tensor if isinstance(logits, torch.Tensor) else np.ndarray
    for run in (
        wt.simulate(logits, 1, np.float64(-0.5), np.float64(0.1), 4, np.float64(2.0)),
        wt.simulate_class(logits, "neg_valley", steps=4),
    ):
        for name, value in vars(run).items():
            assert isinstance(value, library), name
            assert tuple(value.shape) == ((5, 6) if name == "probs" else (5,)), name
            assert ("int" in str(value.dtype)) if name == "regime" else dtype in str(value.dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be > 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be > 0, got nan"),
        ({"logits": np.zeros((2, 2))}, "one vector .* got 2 dimensions"),
    ],
)
def test_bad_numbers_are_named(arguments: dict, message: str) -> None:
    one = {"logits": START, "sampled": 0, "coef": 1.0, "lr": 0.1, "steps": 2} | arguments
    with pytest.raises(ValueError, match=message):
        wt.simulate(**one)
    every = {"logits": START, "class_name": "pos_peak"} | arguments
    with pytest.raises(ValueError, match=message):
        wt.simulate_class(**every)


def test_bad_class_and_size_are_named() -> None:
    with pytest.raises(ValueError, match="unknown class 'peak'; allowed: pos_peak, pos_valley"):
        wt.simulate_class(START, "peak")
    for coef in (-1.0, 0.0):
        with pytest.raises(ValueError, match=f"coef .* must be > 0, got {coef}"):
            wt.simulate_class(START, "pos_peak", coef=coef)
    with pytest.raises(IndexError):
        wt.simulate(START, 6, 1.0, 0.1, 1)
    with pytest.raises(TypeError, match="got list"):
        wt.simulate([0.0, 1.0], 0, 1.0, 0.1, 1)
