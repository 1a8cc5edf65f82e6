"""The first-order formulas against autograd and central differences, and their stability."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import wapo_taxonomy as wt
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.taxonomy.test_taxonomy_reference import (
    EXAMPLES,
    Case,
    Statistics,
    along_gradient_step,
    cases,
    entropy,
    loss_gradient,
    softmax,
    statistics,
)


def exact_dentropy(step: float, s: Statistics) -> float:
    return wt.dentropy(
        step, s.prob, s.complement, s.logp, s.entropy, s.collision_rest, s.collision_logp_rest
    )


def scale(case: Case) -> float:
    return abs(wt.logit_step(case.coef, case.temperature))


@EXAMPLES
@given(cases())
def test_grad_norm_is_the_autograd_norm(case: Case) -> None:
    s = statistics(case.logits, case.sampled, case.temperature)
    got = wt.grad_norm(case.coef, s.complement, s.collision_rest, case.temperature)
    expected = np.linalg.norm(loss_gradient(case))
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-14)
    proxy = abs(case.coef) * s.complement / case.temperature
    assert proxy * (1 - 1e-12) <= got <= 2**0.5 * proxy * (1 + 1e-12)


@EXAMPLES
@given(cases())
def test_dprob_sampled_is_the_derivative_along_the_gradient_step(case: Case) -> None:
    s = statistics(case.logits, case.sampled, case.temperature)
    step = wt.logit_step(case.coef, case.temperature)
    got = wt.dprob_sampled(step, s.prob, s.complement, s.collision_rest)
    expected = along_gradient_step(case, lambda probs: probs[case.sampled])
    assert got == pytest.approx(expected, rel=1e-8, abs=1e-9 * scale(case))


@EXAMPLES
@given(cases())
def test_dprob_other_is_the_derivative_along_the_gradient_step(case: Case) -> None:
    s = statistics(case.logits, case.sampled, case.temperature)
    step = wt.logit_step(case.coef, case.temperature)
    probs = softmax(case.logits / case.temperature)
    got = wt.dprob_other(step, probs, s.prob, wt.collision(s.prob, s.collision_rest))
    expected = along_gradient_step(case, lambda probs: probs)
    others = np.arange(len(probs)) != case.sampled
    np.testing.assert_allclose(got[others], expected[others], rtol=1e-8, atol=1e-9 * scale(case))


@EXAMPLES
@given(cases())
def test_dentropy_is_the_derivative_along_the_gradient_step(case: Case) -> None:
    s = statistics(case.logits, case.sampled, case.temperature)
    got = exact_dentropy(wt.logit_step(case.coef, case.temperature), s)
    expected = along_gradient_step(case, entropy)
    assert got == pytest.approx(expected, rel=1e-7, abs=1e-8 * scale(case))


def test_one_over_temperature_once_would_be_wrong() -> None:
    case = Case(np.array([1.0, 0.3, -0.5]), sampled=0, coef=1.0, temperature=2.0)
    s = statistics(case.logits, 0, 2.0)
    expected = along_gradient_step(case, lambda probs: probs[0])
    right = wt.dprob_sampled(wt.logit_step(1.0, 2.0), s.prob, s.complement, s.collision_rest)
    wrong = wt.dprob_sampled(1.0 / 2.0, s.prob, s.complement, s.collision_rest)
    assert right == pytest.approx(expected, rel=1e-9)
    assert wrong == pytest.approx(2 * expected, rel=1e-9)


@EXAMPLES
@given(cases(), st.floats(0.01, 10.0))
def test_learning_rate_scales_the_step(case: Case, lr: float) -> None:
    one = wt.logit_step(case.coef, case.temperature)
    assert wt.logit_step(case.coef, case.temperature, lr) == pytest.approx(lr * one)


@EXAMPLES
@given(cases())
def test_stable_forms_equal_the_textbook_forms(case: Case) -> None:
    s = statistics(case.logits, case.sampled, case.temperature)
    collision = wt.collision(s.prob, s.collision_rest)
    collision_logp = wt.collision_logp(s.prob, s.logp, s.collision_logp_rest)
    assert collision == pytest.approx(s.collision, rel=1e-14)
    assert collision_logp == pytest.approx(s.collision_logp, rel=1e-14)
    # The textbook side loses digits by itself: compare to the absolute rounding of its terms.
    dprob = s.prob * (1 - 2 * s.prob + collision)
    bracket = s.prob * (s.logp + s.entropy) - (collision_logp + collision * s.entropy)
    got = wt.dprob_sampled(1.0, s.prob, s.complement, s.collision_rest)
    assert got == pytest.approx(dprob, abs=1e-15)
    assert exact_dentropy(1.0, s) == pytest.approx(-bracket, abs=1e-14 * (1 + s.entropy))


@EXAMPLES
@given(cases())
def test_always_true_laws_of_direction(case: Case) -> None:
    """README section 4: what holds for every token of a class, with no average."""
    s = statistics(case.logits, case.sampled, case.temperature)
    probs = softmax(case.logits / case.temperature)
    moves = wt.predict(probs, case.sampled, 1.0).dprob
    assert moves[case.sampled] > 0
    others, moves = np.delete(probs, case.sampled), np.delete(moves, case.sampled)
    depth = wt.valley_depth(s.prob, s.complement, s.collision_rest)
    if depth <= 0:
        assert (moves <= 0).all()
    elif depth > 1e-12:
        assert moves[others.argmax()] < 0
        clear = np.abs(others - depth) > 1e-12
        np.testing.assert_array_equal((moves > 0)[clear], (others < depth)[clear])
        assert (moves[others >= s.collision * (1 + 1e-9)] < 0).all()


@EXAMPLES
@given(cases())
def test_entropy_rule_is_right_for_valleys_and_for_the_mode(case: Case) -> None:
    s = statistics(case.logits, case.sampled, case.temperature)
    rounding = 1e-14 * (1 + s.entropy)
    change = exact_dentropy(1.0, s)
    if not wt.is_peak(s.prob, s.complement, s.collision_rest):
        assert change >= -rounding
    if case.sampled == case.logits.argmax():
        assert change <= rounding


@EXAMPLES
@given(cases())
def test_entropy_rule_is_right_on_average_over_each_regime(case: Case) -> None:
    tokens = range(len(case.logits))
    rows = [statistics(case.logits, v, case.temperature) for v in tokens]
    changes = np.array([r.prob * exact_dentropy(1.0, r) for r in rows])
    peak = np.array([wt.is_peak(r.prob, r.complement, r.collision_rest) for r in rows])
    rounding = 1e-13 * (1 + rows[0].entropy)
    assert changes.sum() == pytest.approx(0.0, abs=rounding)
    assert changes[peak].sum() <= rounding
    assert changes[~peak].sum() >= -rounding


def test_entropy_rule_can_be_wrong_for_a_peak_below_the_mode() -> None:
    """The counterexample of README section 4: a peak whose reward raises the entropy."""
    s = statistics(np.log([0.49, 0.44, 0.07]), 1)
    assert s.collision == pytest.approx(0.4386)
    code = wt.class_code(1.0, s.prob, s.complement, s.collision_rest)
    assert wt.CLASS_NAMES[code] == "pos_peak"
    assert wt.rule_dentropy_sign(code) == -1
    assert exact_dentropy(1.0, s) == pytest.approx(0.0167, abs=1e-4)


@EXAMPLES
@given(cases())
def test_where_the_entropy_rule_is_wrong_the_change_is_below_the_bound(case: Case) -> None:
    s = statistics(case.logits, case.sampled, case.temperature)
    if wt.is_peak(s.prob, s.complement, s.collision_rest):
        bound = s.collision_logp - s.collision * np.log(s.collision)
        assert exact_dentropy(1.0, s) <= bound + 1e-6 * (1 + s.entropy) * s.collision


def near_certain_rows(seed: int, rows: int = 400, size: int = 1000) -> list[Statistics]:
    """Rows whose sampled mode has 1 - p between 1e-12 and 1e-2, exact in float64."""
    rng = np.random.default_rng(seed)
    found = []
    for log_gap in rng.uniform(-12, -2, rows):
        logits = rng.standard_normal(size) * 3
        logits[0] = np.log(np.exp(logits[1:]).sum()) - log_gap * np.log(10)
        found.append(statistics(logits, 0))
    return found


def test_float32_is_accurate_on_near_certain_tokens_where_the_textbook_fails() -> None:
    rows = near_certain_rows(seed=0)
    exact = {
        "norm": np.array([wt.grad_norm(1.0, r.complement, r.collision_rest) for r in rows]),
        "dentropy": np.array([exact_dentropy(1.0, r) for r in rows]),
    }
    fields = ("prob", "complement", "logp", "entropy", "collision_rest", "collision_logp_rest")
    p, q, logp, h, c, cl = (
        np.array([getattr(r, field) for r in rows], dtype=np.float32) for field in fields
    )
    stable = {"norm": wt.grad_norm(1.0, q, c), "dentropy": wt.dentropy(1.0, p, q, logp, h, c, cl)}
    for name, value in stable.items():
        assert value.dtype == np.float32
        relative = np.abs(value.astype(np.float64) / exact[name] - 1)
        assert relative.max() < 1e-5, name
        assert (np.sign(value) == np.sign(exact[name])).all(), name

    s, t = p * p + c, p * p * logp + cl
    textbook_square = 1 - 2 * p + s
    textbook = -(p * (logp + h) - (t + s * h))
    assert (textbook_square <= 0).mean() > 0.05
    assert (np.sign(textbook) != np.sign(exact["dentropy"])).mean() > 0.02


def test_sixty_digits_confirm_the_stable_forms() -> None:
    """Operators only: Decimal works too, and settles what float64 cannot."""
    with localcontext() as context:
        context.prec = 60
        for gap in ("1e-3", "1e-9", "1e-15", "1e-25"):
            q = Decimal(gap)
            p = 1 - q
            rest = [q * Decimal(w) for w in ("0.5", "0.3", "0.2")]
            h = -sum(v * v.ln() for v in (p, *rest))
            c, cl = sum(v * v for v in rest), sum(v * v * v.ln() for v in rest)
            s, t = p * p + c, p * p * p.ln() + cl
            textbook = -(p * (p.ln() + h) - (t + s * h))
            exact = wt.dentropy(Decimal(1), p, q, p.ln(), h, c, cl)
            assert abs(exact - textbook) < Decimal("1e-55")
            floats = [float(x) for x in (p, q, p.ln(), h, c, cl)]
            assert wt.dentropy(1.0, *floats) == pytest.approx(float(exact), rel=1e-14)
            square = wt.dprob_sampled(Decimal(1), p, q, c)
            assert abs(square - p * (1 - 2 * p + s)) < Decimal("1e-55")


def test_one_hot_and_uniform_limits() -> None:
    assert wt.dentropy(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0) == 0
    assert wt.grad_norm(5.0, 0.0, 0.0) == 0
    size = 50
    s = statistics(np.zeros(size), 7)
    assert exact_dentropy(1.0, s) == pytest.approx(0.0, abs=1e-16)
    norm = wt.grad_norm(1.0, s.complement, s.collision_rest)
    assert norm == pytest.approx((1 - 1 / size) ** 0.5)


@pytest.mark.parametrize("name", wt.CLASSES)
def test_the_table_of_effects_has_the_signs_of_the_formulas(name: str) -> None:
    step = 1.0 if name.startswith("pos") else -1.0
    s = statistics(np.array([2.0, 0.0, 0.0, 0.0]), int(name.endswith("valley")), 1.0)
    assert wt.CLASSES[int(wt.class_code(step, s.prob, s.complement, s.collision_rest))] == name
    effect = wt.EFFECTS[name]
    dprob = wt.dprob_sampled(step, s.prob, s.complement, s.collision_rest)
    dentropy = wt.dentropy(
        step, s.prob, s.complement, s.logp, s.entropy, s.collision_rest, s.collision_logp_rest
    )
    assert (np.sign(dprob), np.sign(dentropy)) == (effect.sampled, effect.entropy)


def test_temperature_and_learning_rate_are_one_unless_said() -> None:
    assert wt.logit_step(3.0) == 3.0
    assert wt.logit_step(3.0, 2.0) == 0.75
    assert wt.logit_step(3.0, 2.0, 0.5) == 0.375
    assert wt.grad_norm(-2.0, 0.6, 0.64) == pytest.approx(2.0)
    assert wt.grad_norm(-2.0, 0.6, 0.64, 0.5) == pytest.approx(4.0)
