"""Whether tokens come from the policy that trains, and whether it moves."""

import math
from typing import Any

import numpy as np
import pytest

from tests.support.audit_rows import checked, evidence, joined, only, token_rows
from wapo_analysis.audit import sampling
from wapo_analysis.audit.evidence import NO_SAMPLES, Findings

NAN = np.nan


# ---- the first pass -----------------------------------------------------------------------------


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


def told(found: Findings) -> list[str]:
    return [deviation.name for deviation in found.deviations]


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


@pytest.mark.parametrize(
    ("n", "known", "cold"), [(100, 100, True), (98, 98, False), (100, 50, True), (100, 48, False)]
)
def test_a_temperature_needs_a_hundred_tokens_fifty_of_known_entropy(
    n: int, known: int, cold: bool
) -> None:
    away = np.where(np.arange(n) < known, AWAY[:n], NAN)
    found = first_pass(0.1 * AWAY[:n], away)
    assert told(found) == [COLD if cold else "first pass is off"]


def test_tokens_that_are_all_alike_have_no_temperature() -> None:
    assert told(first_pass(both_ways(0.1))) == ["first pass is off"]


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


# ---- whether weights move -----------------------------------------------------------------------


def visited(
    tokens: int, moved: int = 0, ratio: bool = True, by: float = 0.1, coef: float = 0.1,
    passes: int = 2, **given: Any,
) -> Findings:  # fmt: skip
    """Passes over one rollout, from one to the next of which some log-probabilities move."""
    parts = []
    for number in range(passes):
        logp = -0.5 + by * number * (np.arange(tokens) < moved)
        old = -0.5 if ratio else logp
        parts.append(
            token_rows([tokens], logp=logp, logp_old=old, minibatch=number, coef=coef, **given)
        )
    return checked(sampling.check_weights_move, evidence(joined(*parts)))


CHANGE = "log-probabilities change between passes over the same rollouts"
NOT_SEEN = "no token was scored twice (rescore_every, or several passes, show it)"


@pytest.mark.parametrize(
    ("tokens", "moved", "fact"),
    [(20, 2, CHANGE), (19, 19, None), (20, 1, None), (60, 3, None), (60, 4, CHANGE)],
)
def test_one_token_of_twenty_that_moves_between_passes_shows_that_weights_do(
    tokens: int, moved: int, fact: str | None
) -> None:
    found = visited(tokens, moved)
    assert found.facts.get("weights") == fact
    assert not told(found)
    assert fact is not None or found.missing == {"weights": NOT_SEEN}


@pytest.mark.parametrize(
    ("tokens", "coef", "stuck"), [(50, 0.1, True), (49, 0.1, False), (50, 0.0, False)]
)
def test_log_probabilities_that_stay_between_passes_are_told(
    tokens: int, coef: float, stuck: bool
) -> None:
    found = visited(tokens, coef=coef)
    if not stuck:
        assert found.missing == {"weights": NOT_SEEN}
        return
    when = "do not change between passes over the same rollouts"
    assert found.facts["weights"] == f"log-probabilities {when}"
    assert only(found).name == "weights do not change"
    assert only(found).says == f"log-probabilities of the same tokens {when}"
    assert only(found).tokens == "50 tokens, equal to 2e-05 of their size"


@pytest.mark.parametrize(("by", "stuck"), [(7.5e-5, True), (8.3e-5, False)])
def test_a_move_within_the_rounding_of_both_is_none(by: float, stuck: bool) -> None:
    assert bool(told(visited(60, 60, by=by))) is stuck


def test_every_later_pass_is_compared_with_the_one_before() -> None:
    assert only(visited(30, passes=3)).tokens.startswith("60 tokens")


@pytest.mark.parametrize("last", [False, True])
def test_a_ratio_that_stays_1_while_tokens_move_is_told(last: bool) -> None:
    told_of = only(visited(60, 30, ratio=False))
    assert told_of.name == "ratio never leaves 1"
    assert told_of.tokens == "30 tokens that moved"
    parts = []
    for number in range(2):
        logp = np.full(60, -0.5 + 0.1 * number)
        off = (np.arange(60) == 0) & (number == last)
        parts.append(
            token_rows([60], logp=logp, logp_old=logp + 0.1 * off, minibatch=number, coef=0.1)
        )
    found = checked(sampling.check_weights_move, evidence(joined(*parts)))
    assert found.facts == {"weights": CHANGE}
    assert not told(found)
    unknown = joined(*(part | {"logp_old": np.full(60, NAN)} for part in parts))
    assert not told(checked(sampling.check_weights_move, evidence(unknown)))


def test_visits_are_of_one_token_of_one_rollout() -> None:
    """Passes over other rollouts, or over other places, are no second visits."""
    one = token_rows([60], coef=0.1)
    for other in (one | {"rollout": one["rollout"] + 1}, one | {"position": one["position"] + 60}):
        rows = joined(one, other | {"minibatch": np.ones(60, int)})
        found = checked(sampling.check_weights_move, evidence(rows))
        assert found.missing == {"weights": NOT_SEEN}
    lost = one | {"logp": np.where(np.arange(60) < 10, NAN, -0.5), "minibatch": np.ones(60, int)}
    for rows in (joined(one, lost), joined(lost | {"minibatch": one["minibatch"]},
                                           one | {"minibatch": lost["minibatch"]})):  # fmt: skip
        found = checked(sampling.check_weights_move, evidence(rows))
        assert only(found).tokens.startswith("50 tokens")
    nothing = joined(one, lost | {"logp": np.full(60, NAN)})
    assert "weights" in checked(sampling.check_weights_move, evidence(nothing)).missing


def rescored(n: int, moved: int, by: float = 0.1, coef: float = 0.1) -> Findings:
    after = -0.5 + by * (np.arange(n) < moved)
    rows = token_rows([n], logp_after=after, coef=coef)
    return checked(sampling.check_weights_move, evidence(rows))


@pytest.mark.parametrize(
    ("n", "moved", "fact", "stuck"),
    [
        (50, 0, "log-probabilities do not change with the update", True),
        (49, 0, None, False),
        (50, 1, "log-probabilities change with the update", False),
        (49, 49, None, False),
    ],
)
def test_scores_after_the_update_show_whether_weights_move(
    n: int, moved: int, fact: str | None, stuck: bool
) -> None:
    found = rescored(n, moved)
    assert found.facts.get("weights") == fact
    assert bool(told(found)) is stuck
    if stuck:
        assert only(found).tokens.startswith("50 tokens")
    assert fact is not None or found.missing == {"weights": NOT_SEEN}


def test_a_rescored_step_without_gradient_says_nothing() -> None:
    found = rescored(60, 0, coef=0.0)
    assert not found.facts
    assert not found.missing
    assert not told(found)


@pytest.mark.parametrize(("by", "stuck"), [(1.9e-5, True), (2.1e-5, False)])
def test_a_move_after_the_update_is_one_beyond_rounding(by: float, stuck: bool) -> None:
    assert bool(told(rescored(60, 60, by))) is stuck


def test_only_rescored_tokens_count() -> None:
    after = np.where(np.arange(80) < 50, -0.5, NAN)
    found = checked(
        sampling.check_weights_move, evidence(token_rows([80], logp_after=after, coef=0.1))
    )
    assert only(found).tokens.startswith("50 tokens")


def recurring(
    places: int, of: int = 4, steps: tuple[int, ...] = (1, 2, 3), entropy: float = 0.7,
    coef: float = 0.1, apart: float = 0.0, **given: Any,
) -> Findings:  # fmt: skip
    """First tokens of places that come again in other steps, each of them ``of`` times."""
    parts = []
    for number, step in enumerate(steps):
        logp = np.repeat(-0.5 - 0.01 * np.arange(places), of) + apart * number
        parts.append(
            token_rows([1] * len(logp), logp=logp, entropy=entropy, step=step, coef=coef,
                       token_id=4, **given)
        )  # fmt: skip
    return checked(sampling.check_weights_move, evidence(joined(*parts)))


@pytest.mark.parametrize(
    ("changed", "tokens"),
    [
        ({}, 60),
        ({"places": 4}, 0),
        ({"of": 1}, 0),  # fifteen rows
        ({"of": 2}, 30),
        ({"places": 7, "of": 1}, 21),
        ({"places": 20, "of": 1, "steps": (1, 3, 5)}, 60),
        ({"steps": (1, 2)}, 0),
        ({"steps": (1, 3)}, 0),
        ({"entropy": 1.1e-3}, 60),
        ({"entropy": 0.9e-3}, 0),  # a token that is certain is so in every step
        ({"coef": 0.0}, 0),
        ({"apart": 1e-4}, 0),
        ({"position": 1}, 0),
        ({"steps": (1, 2, 3, 3)}, 80),
    ],
)
def test_prompts_that_come_again_with_the_same_numbers_show_still_weights(
    changed: dict[str, Any], tokens: int
) -> None:
    found = recurring(**({"places": 5} | changed))
    if not tokens:
        assert found.missing == {"weights": NOT_SEEN}
        return
    assert only(found).says.endswith("do not change from step to step")
    assert only(found).tokens.startswith(f"{tokens} tokens")


def test_the_same_numbers_in_neighbouring_steps_may_come_of_one_batch() -> None:
    rows = joined(*(
        token_rows([1] * 30, logp=-0.5 - 0.01 * (np.arange(30) % 6) - 0.1 * (step // 2),
                   entropy=0.7, step=step, coef=0.1, token_id=4)
        for step in (2, 3, 4, 5)
    ))  # fmt: skip
    assert "weights" in checked(sampling.check_weights_move, evidence(rows)).missing


@pytest.mark.parametrize(
    ("lr", "config", "added", "fault"),
    [
        ([0.1, 0.1], {}, "", True),
        ([0.0, 0.0], {}, ": the learning rate is 0", True),
        ([0.0, 0.1], {}, "", True),
        ([0.0, 0.0], {"warmup_steps": 5}, "", False),
        ([0.0, 0.0], {"warmup_ratio": 0.1}, "", False),
        ([0.0, 0.0], {"warmup_steps": 0, "warmup_ratio": 0}, ": the learning rate is 0", True),
        ([0.1, 0.1], {"warmup_steps": 5}, "", True),
        ([], {"warmup_steps": 5}, "", True),
        (None, {"warmup_steps": 5}, "", True),
    ],
)
def test_a_learning_rate_of_0_is_told_but_for_warm_up(
    lr: list[float] | None, config: dict[str, Any], added: str, fault: bool
) -> None:
    rows = token_rows([60], logp_after=-0.5, coef=0.1)
    steps = {"step": np.arange(len(lr or [])) + 1} | ({} if lr is None else {"lr": lr})
    found = checked(sampling.check_weights_move, evidence(rows, steps=steps, config=config))
    assert bool(told(found)) is fault
    if fault:
        assert only(found).says.endswith(f"do not change with the update{added}")
    else:
        assert found.facts["weights"].endswith(", for warm-up starts at learning rate 0")


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
        ([6, 6, 6, 6, 6], 6.0, False),  # ends of one length are a template
        ([11] * 5 + [12], 2.1, True),
        ([11] * 5 + [12], 1.9, False),
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
