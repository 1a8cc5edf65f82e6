import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wapo_analysis.errors import UserError
from wapo_analysis.objectives import config
from wapo_analysis.objectives.config import ADVANTAGE_KINDS, group_advantages

FLAT = st.floats(-5, 5, allow_subnormal=False)


def test_docstring_example() -> None:
    assert doctest.testmod(config).failed == 0


@pytest.mark.parametrize("official", [False, True])
def test_each_kind_equals_its_formula(official: bool) -> None:
    rng = np.random.default_rng(0)
    rewards, group = rng.normal(size=24), np.arange(24) % 3
    grid = rewards.reshape(8, 3)
    expected = {
        "standardized": (grid - grid.mean(0)) / (grid.std(0) + 1e-8),
        "centered": grid - grid.mean(0),
        "raw": grid,
    }
    assert set(expected) == set(ADVANTAGE_KINDS)
    for kind, values in expected.items():
        found = group_advantages(kind, rewards, group, official=official)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, values.ravel(), rtol=1e-12, atol=1e-14)


@given(value=FLAT, size=st.integers(1, 12), kind=st.sampled_from(["standardized", "centered"]))
def test_a_flat_group_is_exactly_zero(value: float, size: int, kind: str) -> None:
    found = group_advantages(kind, [value] * size, [0] * size)
    assert (found == 0).all()


def test_official_keeps_the_rounding_residue_of_a_flat_group() -> None:
    # 0.1 + 0.1 + 0.1 rounds up, so the mean exceeds 0.1 and every member counts as negative.
    official = group_advantages("centered", [0.1] * 3, [0] * 3, official=True)
    assert (official < 0).all()
    assert (np.abs(official) < 1e-16).all()
    # Eight times 0.8 rounds down: every member counts as positive and passes WAPO's gate.
    assert (group_advantages("centered", [0.8] * 8, [0] * 8, official=True) > 0).all()
    assert (group_advantages("standardized", [0.1] * 3, [0] * 3, official=True) < -1e-10).all()


def test_a_reward_at_the_mean_is_exactly_zero() -> None:
    rewards, group = [0.1, 0.2, 0.3], [0, 0, 0]
    assert group_advantages("centered", rewards, group)[1] == 0
    assert group_advantages("standardized", rewards, group)[1] == 0
    assert group_advantages("centered", rewards, group, official=True)[1] != 0
    # Of large rewards the residue is as much larger: here it is 2.8e-14.
    assert group_advantages("centered", [200.1, 200.2, 200.3], group)[1] == 0
    # The largest reward of the group decides, here of one in which another earned nothing.
    assert group_advantages("centered", [0.0, 0.7, 1.4], group)[1] == 0


def test_a_small_real_difference_is_not_rounded_away() -> None:
    found = group_advantages("centered", [1.0, 1.0 + 1e-9], [0, 0])
    np.testing.assert_allclose(found, [-5e-10, 5e-10], rtol=1e-6)


@pytest.mark.parametrize(("units", "zero"), [(14, True), (16, True), (20, False), (40, False)])
def test_a_deviation_of_eight_rounding_units_is_none(units: int, zero: bool) -> None:
    """Half of the difference of two rewards, in units of the larger one."""
    for size in (1.0, 0.5, 1024.0):
        pair = [size, size * (1 + units * np.finfo(np.float64).eps)]
        assert (group_advantages("centered", pair, [0, 0]) == 0).all() == zero


@given(
    rewards=st.lists(st.floats(-2, 2), min_size=2, max_size=10),
    kind=st.sampled_from(sorted(ADVANTAGE_KINDS)),
    seed=st.integers(0, 100),
)
def test_order_does_not_matter(rewards: list[float], kind: str, seed: int) -> None:
    values = np.array(rewards)
    order = np.random.default_rng(seed).permutation(len(values))
    group = np.zeros(len(values), int)
    found = group_advantages(kind, values, group)
    np.testing.assert_allclose(
        group_advantages(kind, values[order], group), found[order], rtol=1e-12, atol=1e-300
    )


def test_groups_need_not_be_adjacent_and_do_not_mix() -> None:
    found = group_advantages("centered", [0, 10, 2, 10], [7, 3, 7, 3])
    assert found.tolist() == [-1, 0, 1, 0]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="standardized, centered, raw"):
        group_advantages("mean", [1.0], [0])
    with pytest.raises(UserError, match=r"shapes \(2,\) and \(1,\)"):
        group_advantages("raw", [1.0, 2.0], [0])
    for bad in (np.nan, np.inf, 1e200):
        with pytest.raises(UserError, match="rollout 1 is not usable"):
            group_advantages("centered", [0.0, bad], [0, 0])


def test_a_residue_of_rounding_is_measured_against_the_rewards() -> None:
    rewards = [90.3, 90.4, 90.5]
    residue = rewards[1] - math.fsum(rewards) / 3
    assert 8 * np.finfo(np.float64).eps < abs(residue) < 1e-13, "far above the rounding of 1"
    for kind in ("centered", "standardized"):
        low, middle, high = group_advantages(kind, rewards, [0, 0, 0])
        assert middle == 0
        assert low < 0 < high


def test_the_largest_reward_that_is_used() -> None:
    assert group_advantages("raw", [1e100, -1e100], [0, 0]).tolist() == [1e100, -1e100]
    with pytest.raises(UserError, match=r"reward 1\.1e\+100 of rollout 1 is not usable"):
        group_advantages("raw", [0.0, 1.1e100], [0, 0])
