"""Whether the ratio is 1 before the first update, and what it looks like if it is not."""

from typing import Any

import numpy as np
import pytest

from tests.support.audit_rows import checked, evidence, only, token_rows
from wapo_analysis.audit import sampling
from wapo_analysis.audit.evidence import Findings

NAN = np.nan


def told(found: Findings) -> list[str]:
    return [deviation.name for deviation in found.deviations]


def first_pass(x: Any, away: Any = 0.0, before: str = "", **given: Any) -> Findings:
    """Tokens with these ln ratios, whose logp + entropy is ``away``, in passes that are first."""
    manifest = {name: given.pop(name) for name in ("config", "objective") if name in given}
    n = len(x)
    rows = token_rows([n], logp=-0.5, log_ratio=np.asarray(x, float), entropy=0.5 + away, **given)
    found = Findings()
    if before:
        found.deviates(before, "", tokens="", cause="", look="")
    sampling.check_first_pass(evidence(rows, **manifest), found)
    return found


def both_ways(size: float, n: int = 100) -> np.ndarray:
    return size * np.resize([1, -1], n)


@pytest.mark.parametrize(("n", "known"), [(19, False), (20, True)])
def test_twenty_fresh_tokens_are_a_first_pass(n: int, known: bool) -> None:
    found = first_pass(np.zeros(n))
    if known:
        assert found.facts == {"first pass": "ratio 1 on every token before the first update"}
    else:
        why = "no first pass over fresh rollouts is among the audited steps"
        assert found.missing == {"first pass": why}


def test_later_passes_and_unknown_ratios_are_no_first_pass() -> None:
    late = np.r_[np.zeros(19, int), np.ones(30, int)]
    assert "first pass" in first_pass(both_ways(0.3, 49), minibatch=late).missing
    assert "first pass" in first_pass(np.r_[np.zeros(19), np.full(30, NAN)]).missing
    some = first_pass(np.r_[np.zeros(20), np.full(30, NAN)])
    assert some.facts == {"first pass": "ratio 1 on every token before the first update"}
    assert first_pass(np.full(30, NAN)).missing == {
        "first pass": "no old log-probabilities were recorded"
    }


@pytest.mark.parametrize(("off", "fact"), [(1, "ratio 1 on every"), (2, "ratio not 1: mean")])
def test_one_token_of_a_thousand_may_be_off(off: int, fact: str) -> None:
    x = np.where(np.arange(1000) < off, 0.3, 0.0)
    assert first_pass(x).facts["first pass"].startswith(fact)


@pytest.mark.parametrize(("size", "one"), [(1.75e-4, True), (1.85e-4, False)])
def test_a_ratio_is_1_up_to_the_rounding_of_the_record(size: float, one: bool) -> None:
    fact = first_pass(both_ways(size)).facts["first pass"]
    assert fact.startswith("ratio 1 on every" if one else "ratio not 1")


@pytest.mark.parametrize(
    ("size", "names"), [(0.0019, []), (0.049, []), (0.051, ["first pass is off"])]
)
def test_ratios_both_ways_are_a_fault_beyond_what_engines_give(
    size: float, names: list[str]
) -> None:
    found = first_pass(both_ways(size))
    assert found.facts["first pass"] == f"ratio not 1: mean |ln ratio| {size:.2g} nats"
    assert told(found) == names
    if names:
        assert "mean |ln ratio| 0.051 nats, both ways" in only(found).says
        assert only(found).tokens == "100 of 100 tokens of it"


def test_what_is_known_already_makes_ratios() -> None:
    assert told(first_pass(both_ways(0.3), before="tokens after the end")) == [
        "tokens after the end"
    ]
    assert told(first_pass(both_ways(0.3), before="another mean")) == [
        "another mean", "first pass is off",
    ]  # fmt: skip
    found = first_pass(both_ways(0.3), config={"dropout": 0.1})
    assert found.facts["first pass"].endswith("0.3 nats, as dropout 0.1 may make it")
    assert not told(found)
    assert told(first_pass(both_ways(0.3), config={"dropout": 0.0})) == ["first pass is off"]


@pytest.mark.parametrize(
    ("sizes", "quiet"),
    [
        ((0.0, 0.3), True),
        ((0.0, 0.3, 0.3), True),
        ((0.0, 0.3, 0.0), False),
        ((0.9e-4, 0.3), True),
        ((1.1e-4, 0.3), False),
        ((0.3, 0.0), False),
        ((0.3, 0.3), False),
        ((0.3,), False),
    ],
)
def test_a_first_step_of_ratio_1_and_none_later_is_a_stale_sampler(
    sizes: tuple[float, ...], quiet: bool
) -> None:
    x = np.concatenate([both_ways(size) for size in sizes])
    found = first_pass(x, step=np.repeat(3 + np.arange(len(sizes)), 100))
    assert (told(found) == ["stale sampler"]) is quiet
    if quiet:
        assert "the first pass has ratio 1 at step 3, but not later" in only(found).says
        assert f"{np.abs(x).mean():.2g} nats" in only(found).says
    else:
        assert told(found) == ["first pass is off"]


@pytest.mark.parametrize(("later", "quiet"), [(0.0041, True), (0.0019, False), (0.0021, True)])
def test_a_later_ratio_is_off_twenty_times_as_far(later: float, quiet: bool) -> None:
    parts = [np.zeros(100), both_ways(later), both_ways(0.02)]
    step = np.repeat([1, 2, 3], 100)
    assert (told(first_pass(np.concatenate(parts), step=step)) == ["stale sampler"]) is quiet
    start = 9.9e-5  # twenty times of which is hardly below the noise of engines
    assert sampling._quiet_start(
        evidence(token_rows([2], log_ratio=np.array([start, 0.0021]), step=np.array([5, 6])))
    ) == 5  # fmt: skip


# Of x = s away + b other, orthogonal, away explains s^2 / (s^2 + b^2).
AWAY, OTHER = np.resize([1.0, -1.0], 100), np.resize([1.0, 1.0, -1.0, -1.0], 100)
COLD = "old log-probabilities at another temperature"


@pytest.mark.parametrize(
    ("step", "slope", "other", "name"),
    [
        (1, 0.1, 0.049, COLD),
        (1, 0.1, 0.051, "first pass is off"),
        (1, 0.25, 0.125, "first pass is off"),  # four fifths, and no more
        (2, 0.1, 0.017, COLD),
        (2, 0.1, 0.018, "first pass is off"),
        (1, -0.1, 0.0, COLD),
        (1, 0.031, 0.0, COLD),
        (1, 0.029, 0.0, None),
        (1, -0.029, 0.0, None),
    ],
)
def test_ratios_that_follow_logp_and_entropy_are_of_another_temperature(
    step: int, slope: float, other: float, name: str | None
) -> None:
    found = first_pass(slope * AWAY + other * OTHER, AWAY, step=step)
    assert told(found) == ([name] if name else [])
    if name == COLD:
        way = "lower" if slope < 0 else "higher"
        assert f"(slope {slope:.2g}): old log-probabilities are those of a {way} temperature" in (
            only(found).says
        )


def test_ratios_of_just_two_thousandths_on_average_are_looked_at() -> None:
    x = np.where(np.arange(100) < 50, 2.0**-8, 0.0)
    x[50] = 0.2 - x.sum()
    assert x.mean() == 0.002
    rows = token_rows([100], logp=0.0, log_ratio=x, entropy=x / 0.05)
    assert told(checked(sampling.check_first_pass, evidence(rows))) == [COLD]


@pytest.mark.parametrize(
    ("n", "known", "cold"), [(100, 100, True), (98, 98, False), (100, 50, True), (100, 48, False)]
)
def test_a_temperature_needs_a_hundred_tokens_fifty_of_known_entropy(
    n: int, known: int, cold: bool
) -> None:
    away = np.where(np.arange(n) < known, AWAY[:n], NAN)
    found = first_pass(0.1 * AWAY[:n], away)
    assert told(found) == [COLD if cold else "first pass is off"]


def test_a_slope_of_three_hundredths_may_be_noise() -> None:
    rows = token_rows([100], logp=0.0, log_ratio=0.03 * AWAY, entropy=AWAY)
    assert not told(checked(sampling.check_first_pass, evidence(rows)))


def test_tokens_that_are_all_alike_have_no_temperature() -> None:
    assert told(first_pass(both_ways(0.1))) == ["first pass is off"]
    still = np.where(np.arange(100) < 50, 0.0, 0.2 * AWAY)
    assert told(first_pass(still, np.where(still == 0, AWAY, NAN))) == ["first pass is off"]


def test_a_token_or_two_of_ratio_1_or_of_the_mean_have_a_temperature_all_the_same() -> None:
    x, away = 0.1 * AWAY, AWAY.copy()
    x[0] = away[1] = 0.0
    assert told(first_pass(x, away)) == [COLD]


@pytest.mark.parametrize(
    ("x", "cut"),
    [
        (np.full(1000, -0.0051), True),
        (np.full(1000, -0.0049), False),
        (np.r_[np.full(999, -0.0051), 0.3], False),
        (np.r_[np.full(1999, -0.0051), 0.3], True),
        (np.r_[np.full(1000, -0.01), np.full(1000, 7e-5)], True),
        (np.r_[np.full(1000, -0.01), np.full(1000, 9e-5)], False),
    ],
)
def test_ratios_below_1_alone_are_of_a_cut_distribution(x: np.ndarray, cut: bool) -> None:
    found = first_pass(x)
    assert told(found) == (["old log-probabilities of a cut distribution"] if cut else [])
    if cut:
        assert f"(mean ln ratio {x.mean():.2g} nats)" in only(found).says
        off = int((np.abs(x) > 1.8e-4).sum())
        assert only(found).tokens == f"{off} of {len(x)} tokens of it"


def test_a_setting_of_the_objective_goes_before_one_of_the_configuration() -> None:
    rows = token_rows([2])
    seen = evidence(rows, objective={"beta": 1, "a": "x"}, config={"beta": 2, "gamma": 3, "a": 4})
    assert sampling.declared_number(seen, "beta", "gamma") == 1.0
    assert sampling.declared_number(seen, "none", "gamma") == 3.0
    assert sampling.declared_number(seen, "a") is None
    assert sampling.declared_number(evidence(rows), "beta") is None
