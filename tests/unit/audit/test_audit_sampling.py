"""Whether tokens are as probable as samples of the policy, and tokens after the end."""

import math
from typing import Any

import numpy as np
import pytest

from tests.support.audit_rows import checked, evidence, only, token_rows
from wapo_analysis.audit import sampling
from wapo_analysis.audit.evidence import NO_SAMPLES, Findings

NAN = np.nan


def told(found: Findings) -> list[str]:
    return [deviation.name for deviation in found.deviations]


# ---- how probable samples are -------------------------------------------------------------------


def sampled(
    prob: float, expected: float, n: int = 1000, balance: bool = True, **given: Any
) -> Findings:
    """Tokens of one probability and one sum p^2, half with A > 0; other columns as given."""
    manifest = {name: given.pop(name) for name in ("config", "source") if name in given}
    advantage = np.resize([1.0, -1.0], n) if balance else np.ones(n)
    usual = {"advantage": advantage, "collision_rest": expected - prob**2}
    rows = token_rows([n], logp=math.log(prob), **(usual | given))
    return checked(sampling.check_sampling, evidence(rows, **manifest))


def test_without_what_it_needs_sampling_is_not_judged() -> None:
    assert sampled(0.6, 0.5, collision_rest=NAN).missing == {"sampling": "sum p^2 was not recorded"}
    few = {"sampling": "fewer than 100 tokens were scored by the policy that sampled them"}
    assert sampled(0.6, 0.5, n=99).missing == few
    assert not sampled(0.6, 0.5, n=100).missing
    off = np.where(np.arange(199) < 99, 0.0, 1.1e-3)
    assert sampled(0.6, 0.5, n=199, log_ratio=off).missing == few
    assert not sampled(0.6, 0.5, n=199, log_ratio=off * 0.8).missing
    unknown = np.where(np.arange(199) < 99, 0.1, NAN)
    assert sampled(0.6, 0.5, n=199, collision_rest=unknown).missing == few
    assert sampled(0.6, 0.5, n=199, minibatch=np.arange(199) // 99).missing == few
    assert not sampled(0.6, 0.5, n=199, logp_old=np.full(199, NAN)).missing


@pytest.mark.parametrize(("n", "sure"), [(460, False), (461, True)])
def test_a_shift_is_told_once_chance_does_not_give_it(n: int, sure: bool) -> None:
    # 2 exp(-n 0.1^2 / (2 (0.5^1.5 - 0.5^2 + 0.1 / 3))) < 1e-7 from n = 461 on.
    found = sampled(0.6, 0.5, n, source="trl")
    shown = "mean p 0.600, of samples 0.500"
    if not sure:
        assert (
            found.facts["sampling"] == f"tokens are as probable as samples of the policy ({shown})"
        )
        assert not told(found)
        return
    assert (
        found.facts["sampling"] == f"tokens are not as probable as samples of the policy ({shown})"
    )
    assert (
        only(found).says == f"tokens are more probable than samples of the policy would be: {shown}"
    )
    assert only(found).tokens == "461 tokens of first passes; chance of it 1e-07"


def test_the_chance_is_that_of_freedman() -> None:
    prob, expected = np.array([0.9, 0.2, 0.7]), np.array([0.5, 0.25, 0.3])
    shift, chance = sampling._chance(prob, expected)
    assert shift == pytest.approx(0.25)
    spread = 0.5**1.5 + 0.25**1.5 + 0.3**1.5 - 0.25 - 0.0625 - 0.09
    assert chance == pytest.approx(2 * math.exp(-(0.75**2) / (2 * (spread + 0.25))))
    assert sampling._chance(1 - prob, 1 - expected)[0] == pytest.approx(-0.25)
    assert sampling._chance(np.zeros(0), np.zeros(0)) == (0.0, 2.0)


@pytest.mark.parametrize(("shift", "sure"), [(0.0149, False), (0.0151, True), (-0.0151, True)])
def test_a_shift_of_less_than_a_hundredth_and_a_half_is_not_worth_a_word(
    shift: float, sure: bool
) -> None:
    assert bool(told(sampled(0.5 + shift, 0.5, 24_000))) is sure


@pytest.mark.parametrize(
    ("prob", "expected", "says", "cause"),
    [
        (0.6, 0.5, "more", "a sampling temperature below"),
        (0.4, 0.5, "less", "a sampling temperature above"),
        (0.26, 0.5, "less", "a sampling temperature above"),
        (0.25, 0.5, "less", "a sampling temperature above"),
        (0.24, 0.5, "far less", "log-probabilities of other tokens"),
    ],
)
def test_the_cause_is_by_the_way_of_the_shift(
    prob: float, expected: float, says: str, cause: str
) -> None:
    deviation = only(sampled(prob, expected, 2000))
    assert deviation.name == NO_SAMPLES
    assert deviation.says.startswith(f"tokens are {says} probable than samples")
    assert deviation.cause.startswith(cause)


def test_an_impossible_collision_counts_as_one_of_a_distribution() -> None:
    assert "of samples 1.000" in sampled(0.9, 1.7).facts["sampling"]


@pytest.mark.parametrize(
    ("prob", "config", "known"),
    [
        (0.6, {"top_p": 0.9}, "top_p 0.9"),
        (0.6, {"top_p": 1, "top_k": 5}, "top_k 5"),
        (0.6, {"top_p": 1.0, "top_k": -1, "min_p": 0.1}, "min_p 0.1"),
        (0.6, {"top_p": 1.0, "top_k": 0, "min_p": 0}, ""),
        (0.6, {"top_k": 1}, "top_k 1"),
        (0.6, {"min_p": 1}, "min_p 1"),
        (0.6, {"top_p": 0}, "top_p 0"),
        (0.6, {"top_p": -1}, ""),
        (0.6, {"dropout": 0.1}, ""),
        (0.4, {"dropout": 0.1}, "dropout 0.1"),
        (0.4, {"top_p": 0.9}, ""),
    ],
)
def test_what_the_run_declares_makes_it_so(prob: float, config: dict[str, Any], known: str) -> None:
    found = sampled(prob, 0.5, config=config)
    assert bool(told(found)) is not bool(known)
    assert found.facts["sampling"].endswith(f", as {known} makes them" if known else ")")


def test_rollouts_picked_by_their_reward_are_not_the_samplers_fault() -> None:
    """Of a loop, better and worse rollouts must both be off, one way, and surely."""
    n = 2000
    prob = np.where(np.arange(n) % 2, 0.4, 0.7)  # A < 0, A > 0: on average too probable
    given = {"logp": np.log(prob), "collision_rest": 0.5 - prob**2}
    rows = token_rows([n], advantage=np.resize([1.0, -1.0], n), **given)
    found = checked(sampling.check_sampling, evidence(rows))
    assert not told(found)
    assert found.facts["sampling"].endswith("; rollouts that were picked by their reward may be so")
    assert told(checked(sampling.check_sampling, evidence(rows, source="trl")))
    assert told(checked(sampling.check_sampling, evidence(rows, source="built-in")))
    assert not told(sampled(0.6, 0.5, balance=False))
    assert told(sampled(0.6, 0.5))


@pytest.mark.parametrize(("few", "sure"), [(207, False), (210, True)])
def test_either_half_is_off_at_odds_of_a_thousand(few: int, sure: bool) -> None:
    # 2 exp(-0.03653 n) < 1e-3 from n = 209 on.
    advantage = np.where(np.arange(1000) < few, -1.0, 1.0)
    assert bool(told(sampled(0.6, 0.5, advantage=advantage))) is sure
    assert bool(told(sampled(0.6, 0.5, advantage=-advantage))) is sure


def test_odds_that_no_float_holds_are_told_as_the_least_one() -> None:
    assert only(sampled(0.05, 0.5, 2000)).tokens.endswith("chance of it 1e-300")


def test_tokens_without_an_advantage_are_of_neither_half() -> None:
    n = 18_000
    advantage = np.where(np.arange(n) < 3000, np.resize([1.0, -1.0], n), 0.0)
    prob = np.where(advantage == 0, 0.5, 0.6)
    rows = token_rows([n], advantage=advantage, logp=np.log(prob), collision_rest=0.5 - prob**2)
    assert told(checked(sampling.check_sampling, evidence(rows))) == [NO_SAMPLES]


# ---- tokens after the end -----------------------------------------------------------------------

PAD = 9


def padded(
    tails: list[int], size: int = 12, surprise: float = 6.0, other: int = 4, **given: Any
) -> Findings:
    """Rollouts of one size that end in runs of PAD, and others that do not."""
    number = len(tails) + other
    lengths = np.full(number, size)
    rows = token_rows(lengths, token_id=100 + np.arange(size * number), **given)
    for rollout, tail in enumerate(tails):
        end = (rollout + 1) * size
        rows["token_id"][end - tail : end] = PAD
        rows["logp"] = rows["logp"].astype(float)
        rows["logp"][end - tail + 1 : end] = -surprise
    return checked(sampling.check_tail, evidence(rows))


@pytest.mark.parametrize(
    ("tails", "surprise", "told_of"),
    [
        ([6, 8, 6, 5], 6.0, True),  # 21 tokens after a first one
        ([6, 8, 6, 4], 6.0, True),  # 20
        ([6, 8, 6, 3], 6.0, False),
        ([6, 8, 6, 4], 4.9, False),  # the policy would not be so surprised
        ([6, 8, 6, 4], 5.1, True),
        ([6, 8, 6, 4], 5.0, True),
        ([6, 6, 6, 6, 6], 6.0, False),  # ends of one length are a template
        ([11] * 5 + [12], 2.1, True),
        ([11] * 5 + [12], 1.9, False),
        ([11] * 5 + [12], 2.0, True),
        ([1, 6, 8, 6, 5], 6.0, True),
    ],
)
def test_runs_of_one_token_at_the_end_are_no_samples(
    tails: list[int], surprise: float, told_of: bool
) -> None:
    found = padded(tails, surprise=surprise)
    assert len(found.deviations) == told_of
    if told_of:
        tokens, runs = sum(tails) - len(tails), sum(t > 1 for t in tails)
        assert only(found).says == (
            f"every rollout is 12 tokens long, and {runs} end in a run of token {PAD} that the "
            f"policy would hardly sample (mean p {math.exp(-surprise):.2g})"
        )
        assert only(found).tokens == f"{tokens} tokens at the ends of rollouts"


def test_a_tail_is_of_rollouts_of_one_length_in_fresh_passes() -> None:
    tails = [6, 8, 6, 5]
    assert not padded(tails, minibatch=1).deviations
    rows = token_rows([12] * 4 + [11], token_id=100)
    for rollout, tail in enumerate(tails):
        end = (rollout + 1) * 12
        rows["token_id"][end - tail : end] = PAD
        rows["logp"][end - tail + 1 : end] = -6.0
    assert not checked(sampling.check_tail, evidence(rows)).deviations
    whole = {name: values[:48] for name, values in rows.items()}
    assert only(checked(sampling.check_tail, evidence(whole))).tokens.startswith("21 tokens")
    mixed = np.random.default_rng(0).permutation(48)
    found = checked(sampling.check_tail, evidence({n: v[mixed] for n, v in whole.items()}))
    assert only(found).tokens.startswith("21 tokens")


def test_without_token_ids_a_tail_is_not_seen() -> None:
    why = {"tokens after the end": "token ids were not recorded"}
    assert checked(sampling.check_tail, evidence(token_rows([3], token_id=-1))).missing == why
    one = token_rows([3], token_id=np.array([-1, -1, 5]))
    assert not checked(sampling.check_tail, evidence(one)).missing


def test_log_probabilities_that_are_not_known_do_not_surprise() -> None:
    found = padded([6, 8, 6, 5])
    assert found.deviations
    rows_with_gap = padded([6, 8, 6, 7], surprise=5.0)
    assert rows_with_gap.deviations
