"""Sign, regime, class codes, rule and bin names."""

import math

import numpy as np
import pytest
import wapo_taxonomy as wt
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.taxonomy.test_taxonomy_reference import EXAMPLES, Case, cases, statistics

NAN = float("nan")


def test_names_and_codes_are_the_contract() -> None:
    assert wt.CLASSES == ("pos_peak", "pos_valley", "neg_peak", "neg_valley")
    assert wt.CLASS_CODES == {
        "pos_peak": 0,
        "pos_valley": 1,
        "neg_peak": 2,
        "neg_valley": 3,
        "none": 4,
        "unknown": -1,
    }
    assert {wt.CLASS_CODES[name]: name for name in wt.CLASS_CODES} == wt.CLASS_NAMES
    assert tuple(wt.EFFECTS) == wt.CLASSES
    assert all(effect.name == name for name, effect in wt.EFFECTS.items())


@EXAMPLES
@given(cases())
def test_regime_is_p_against_the_collision_probability(case: Case) -> None:
    s = statistics(case.logits, case.sampled, case.temperature)
    gap = s.collision - s.prob
    depth = wt.valley_depth(s.prob, s.complement, s.collision_rest)
    assert depth == pytest.approx(gap, abs=1e-14)
    if abs(gap) > 1e-5 * s.collision:
        peak = wt.is_peak(s.prob, s.complement, s.collision_rest)
        assert bool(peak) == (s.prob >= s.collision)


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 151_936])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_token_of_a_uniform_row_is_a_peak(size: int, dtype: str) -> None:
    probs = np.full(size, 1 / size, dtype)
    rest = probs[1:]
    for complement in (rest.sum(dtype=dtype), 1 - probs[0]):
        assert wt.is_peak(probs[0], complement, (rest**2).sum(dtype=dtype))


@pytest.mark.parametrize("sign", [1, -1])
def test_tie_tolerance_is_the_stated_relative_width(sign: int) -> None:
    prob, complement = 0.3, 0.7
    border = prob * complement
    inside = border * (1 + 0.5e-6)
    outside = border * (1 + 1.5e-6)
    assert wt.is_peak(prob, complement, inside)
    assert not wt.is_peak(prob, complement, outside)
    assert wt.class_code(sign, prob, complement, inside) == (0 if sign > 0 else 2)
    assert wt.class_code(sign, prob, complement, outside) == (1 if sign > 0 else 3)


def test_certain_token_is_a_peak_and_impossible_token_a_valley() -> None:
    assert wt.regime_code(1.0, 0.0, 0.0) == 1
    assert wt.regime_code(0.0, 1.0, 1.0) == 0


@pytest.mark.parametrize("where", range(3))
def test_missing_statistic_is_unknown_never_zero(where: int) -> None:
    known = [0.9, 0.1, 0.01]
    known[where] = NAN
    assert wt.regime_code(*known) == -1
    assert wt.class_code(1.0, *known) == -1
    assert wt.class_code(-1.0, *known) == -1
    assert wt.class_code(0.0, *known) == 4
    assert wt.class_code(NAN, 0.9, 0.1, 0.01) == -1
    assert wt.rule_dentropy_sign(-1) == 0


@given(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0, 1) | st.just(NAN),
    st.floats(0, 1) | st.just(NAN),
)
def test_class_code_is_the_table_of_sign_and_regime(a: float, prob: float, rest: float) -> None:
    regime = wt.regime_code(prob, 1 - prob, rest)
    if a == 0:
        expected = "none"
    elif math.isnan(a) or regime == -1:
        expected = "unknown"
    else:
        expected = ("pos" if a > 0 else "neg") + ("_peak" if regime else "_valley")
    assert wt.class_code(a, prob, 1 - prob, rest) == wt.CLASS_CODES[expected]
    assert wt.sign_code(a) == (0 if math.isnan(a) or a == 0 else math.copysign(1, a))


@pytest.mark.parametrize("name", wt.CLASSES)
def test_effects_and_rule_agree(name: str) -> None:
    effect = wt.EFFECTS[name]
    assert effect.entropy == wt.rule_dentropy_sign(wt.CLASS_CODES[name])
    assert effect.sampled == (1 if name.startswith("pos") else -1)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ()),
        (["pos_peak"], ("pos_peak",)),
        (["peak"], ("pos_peak", "neg_peak")),
        (["valley"], ("pos_valley", "neg_valley")),
        (["pos"], ("pos_peak", "pos_valley")),
        (["neg", "neg_peak", "neg"], ("neg_peak", "neg_valley")),
        (["neg_valley", "peak"], ("pos_peak", "neg_peak", "neg_valley")),
        (("peak", "valley"), wt.CLASSES),
        ("neg_peak", ("neg_peak",)),
    ],
)
def test_expand_bins(names: list[str], expected: tuple[str, ...]) -> None:
    assert wt.expand_bins(names) == expected


@pytest.mark.parametrize("bad", ["none", "peaks", "", "POS", "pos_peak,neg", "unknown"])
def test_expand_bins_names_the_bad_one_and_the_allowed(bad: str) -> None:
    with pytest.raises(ValueError, match="unknown bin") as error:
        wt.expand_bins(["pos", bad])
    assert repr(bad) in str(error.value)
    for allowed in (*wt.CLASSES, "peak", "valley", "pos", "neg"):
        assert allowed in str(error.value)
