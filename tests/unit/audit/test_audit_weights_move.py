"""Whether updates change the policy, as log-probabilities that are scored twice tell."""

from typing import Any

import numpy as np
import pytest

from tests.support.audit_rows import checked, evidence, joined, only, token_rows
from wapo_analysis.audit import sampling
from wapo_analysis.audit.evidence import Findings

NAN = np.nan


def told(found: Findings) -> list[str]:
    return [deviation.name for deviation in found.deviations]


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


@pytest.mark.parametrize(("n", "told_of"), [(1000, False), (1001, True)])
def test_one_ratio_of_a_thousand_that_leaves_1_is_enough(n: int, told_of: bool) -> None:
    parts = []
    for number in range(2):
        logp = np.full(n, -0.5 + 0.1 * number)
        old = logp - 0.1 * (np.arange(n) == 0)
        parts.append(token_rows([n], logp=logp, logp_old=old, minibatch=number, coef=0.1))
    found = checked(sampling.check_weights_move, evidence(joined(*parts)))
    assert bool(told(found)) is told_of


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
