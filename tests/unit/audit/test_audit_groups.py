"""Groups, rewards of equal completions, and rollouts that are copies: both sides of each bound."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.audit_rows import checked, evidence, joined, only, token_rows
from wapo_analysis.audit import rollouts
from wapo_analysis.audit.evidence import NO_SAMPLES, Findings

NAN = np.nan


# ---- groups -------------------------------------------------------------------------------------


def grouped(prompt: Any, group: Any = (0, 0, 1, 1), **given: Any) -> Findings:
    source = given.pop("source", "loop")
    table = {"step": 1, "rank": 0, "rollout": np.arange(len(group)), "group": group,
             "prompt": prompt} | given  # fmt: skip
    seen = evidence(token_rows([2]), pd.DataFrame(table), source=source)
    return checked(rollouts.check_groups, seen)


def test_groups_of_one_prompt_are_a_fact() -> None:
    found = grouped(["a", "a", "b", "b"])
    assert found.facts == {"groups": "one prompt in each"}
    assert not found.deviations


def test_a_group_of_two_prompts_is_told() -> None:
    found = grouped(["a", "b", "b", "b"])
    assert found.facts == {"groups": "1 of 2 hold several prompts"}
    assert only(found).says == "1 of 2 groups hold rollouts of different prompts"


@pytest.mark.parametrize(
    ("prompt", "given", "mixed"),
    [
        (["a", "b", "b", "b"], {"group": (-1, -1, 1, 1)}, False),
        (["a", None, "b", "b"], {}, False),
        (["a", "b", "b", "b"], {"group": (0, 0, 1, 1), "step": [1, 2, 1, 1]}, False),
        (["a", "b", "b", "b"], {"rank": [0, 1, 0, 0]}, False),
        (["a", "b", "b", "b"], {"rank": [0, 1, 0, 0], "source": "trl"}, True),
        (["a", "b", "b", "b"], {"rank": [0, 1, 0, 0], "source": "built-in"}, True),
        (["a", "a", "b", "b"], {"group": (0, 1, 0, 1)}, True),
    ],
)
def test_a_group_is_of_a_step_and_of_a_process_of_a_loop(
    prompt: list[Any], given: dict[str, Any], mixed: bool
) -> None:
    assert bool(grouped(prompt, **given).deviations) is mixed


def test_without_prompts_groups_are_not_compared() -> None:
    why = {"groups": "prompts were not recorded"}
    assert grouped([None] * 4).missing == why
    assert checked(rollouts.check_groups, evidence(token_rows([2]))).missing == why
    table = pd.DataFrame({"step": [1], "group": [0], "rollout": [0]})
    assert checked(rollouts.check_groups, evidence(token_rows([2]), table)).missing == why


# ---- rewards ------------------------------------------------------------------------------------


def rewarded(
    texts: Any, reward: Any, group: Any = None, steps: Any = 1, fraction: float = 1.0, **given: Any
) -> Findings:
    """Rollouts of two tokens, which its text says, and their rewards."""
    n = len(texts)
    group = np.zeros(n, int) if group is None else np.asarray(group)
    step = np.broadcast_to(steps, n)
    rows = token_rows([2] * n, group=group, token_id=np.repeat(texts, 2), step=step, **given)
    table = {"step": step, "rollout": np.arange(n), "group": group, "reward": reward}
    seen = evidence(rows, pd.DataFrame(table), token_fraction=fraction)
    return checked(rollouts.check_rewards, seen)


def test_equal_completions_with_equal_rewards_are_a_fact() -> None:
    texts = [1, 2] * 5
    found = rewarded(texts, np.array(texts, float))
    assert found.facts == {"rewards": "equal completions of a prompt: 8 of 8 agree in reward"}
    assert not found.deviations
    few = rewarded(texts[:9], np.array(texts[:9], float))
    assert few.missing == {"rewards": "too few equal completions of one prompt to compare rewards"}


TEXTS = np.array([1, 2, 3, 3, 1, 1, 3, 2, 3, 1, 1, 3])


@pytest.mark.parametrize(("shift", "who"), [(1, "successor"), (-1, "predecessor")])
def test_rewards_that_agree_once_they_are_moved_are_told(shift: int, who: str) -> None:
    reward = np.roll(TEXTS.astype(float), -shift)
    found = rewarded(TEXTS, reward)
    apart = sum(reward[n] != reward[list(TEXTS).index(t)] for n, t in enumerate(TEXTS))
    assert found.facts["rewards"] == (
        f"equal completions of a prompt: {9 - apart} of 9 agree in reward"
    )
    assert only(found).name == "rewards shifted by one rollout"
    assert only(found).says.startswith(f"{apart} of 9 equal completions of one prompt have")
    assert only(found).tokens == f"rewards are those of the {who}"


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize(
    ("texts", "apart"),
    [([1, 1, 1, 1, 1, 3, 1, 1, 2, 1, 2, 1], 3), ([1, 3, 1, 2, 3, 1, 2, 3, 1, 1, 3, 3], 4)],
)
def test_three_disagreements_may_be_chance(texts: list[int], apart: int, shift: int) -> None:
    found = rewarded(texts, np.roll(np.array(texts, float), shift))
    assert found.facts["rewards"].endswith(f": {9 - apart} of 9 agree in reward")
    assert bool(found.deviations) is (apart == 4)


def test_a_shift_mends_all() -> None:
    spoiled = np.roll(TEXTS.astype(float), -1)
    assert rewarded(TEXTS, spoiled).deviations
    spoiled[4] = 9.0
    assert not rewarded(TEXTS, spoiled).deviations


def test_completions_are_compared_within_their_prompt_and_step() -> None:
    texts = np.ones(12, int)
    reward = np.repeat([0.0, 1.0], 6)
    assert rewarded(texts, reward).facts["rewards"].endswith("5 of 11 agree in reward")
    apart = rewarded(texts, reward, group=np.repeat([0, 1], 6))
    assert apart.facts["rewards"].endswith("10 of 10 agree in reward")
    steps = rewarded(texts, reward, steps=np.repeat([1, 2], 6))
    assert steps.facts["rewards"].endswith("10 of 10 agree in reward")


def test_a_shift_is_one_within_a_step() -> None:
    texts = np.tile(TEXTS, 2)
    within = np.r_[np.roll(TEXTS, 1), np.roll(TEXTS, 1)].astype(float)
    step = np.repeat([1, 2], 12)
    assert rewarded(texts, within, steps=step).deviations
    through = np.roll(np.r_[TEXTS, TEXTS[::-1]].astype(float), 1)
    assert not rewarded(np.r_[TEXTS, TEXTS[::-1]], through, steps=step).deviations


def test_without_rollouts_groups_or_tokens_rewards_are_not_compared() -> None:
    why = "rollouts or their groups were not recorded"
    reward = TEXTS.astype(float)
    assert checked(rollouts.check_rewards, evidence(token_rows([2]))).missing == {"rewards": why}
    group = np.where(np.arange(12) == 3, -1, 0)
    assert rewarded(TEXTS, reward, group=group).missing == {"rewards": why}
    why = "neither texts nor tokens of the completions were recorded"
    assert rewarded(np.full(12, -1), reward).missing == {"rewards": why}
    assert rewarded(TEXTS, reward, fraction=0.5).missing == {"rewards": why}
    assert rewarded(TEXTS - 2, reward).facts
    assert rewarded(TEXTS, reward, rollout=np.arange(12) + 1).missing == {"rewards": why}


def test_rollouts_without_a_reward_are_left_out_and_rows_may_be_in_any_order() -> None:
    reward = TEXTS.astype(float)
    assert rewarded(np.r_[TEXTS, 1], np.r_[reward, NAN]).facts["rewards"].endswith(
        "9 of 9 agree in reward"
    )  # fmt: skip
    rows = token_rows([2] * 12, group=0, token_id=np.stack([TEXTS, TEXTS + 5], 1).ravel())
    order = np.random.default_rng(0).permutation(24)
    shifted = np.roll(reward, -1)
    table = pd.DataFrame({"step": 1, "rollout": range(12), "group": 0, "reward": shifted})
    seen = evidence({n: v[order] for n, v in rows.items()}, table.iloc[::-1])
    assert (
        only(checked(rollouts.check_rewards, seen)).tokens == "rewards are those of the successor"
    )


# ---- copies -------------------------------------------------------------------------------------


def copied(
    number: int, copies: int, logp: float = -2.0, size: int = 12, before: str = "", **given: Any
) -> Findings:
    """Rollouts of one group, of which some are the same tokens."""
    rng = np.random.default_rng(0)
    token = rng.integers(0, 50, (number, size))
    token[:copies] = token[0]
    rows = token_rows([size] * number, **({"group": 0, "logp": logp} | given))
    rows["token_id"] = token.ravel()
    found = Findings()
    if before:
        found.deviates(before, "", tokens="", cause="", look="")
    rollouts.check_duplicates(evidence(rows), found)
    return found


def test_rollouts_that_are_copies_are_told() -> None:
    told = only(copied(8, 2))
    assert told.name == "rollouts are repeated"
    assert told.says == (
        "2 rollouts are token for token another one of their group, which sampling would not give"
    )
    assert told.tokens == f"24 tokens; chance of a copy at most {math.exp(-24):.0e}"
    assert not copied(8, 1).deviations
    assert only(copied(8, 5)).says.startswith("5 rollouts")


@pytest.mark.parametrize(("logp", "told"), [(-20.3 / 12, True), (-20.2 / 12, False)])
def test_a_copy_is_told_against_all_odds(logp: float, told: bool) -> None:
    # 8^2 pairs of one group: 64 exp(sum of logp) < 1e-7 below -20.277.
    assert bool(copied(8, 2, logp).deviations) is told


def test_the_odds_are_those_of_all_pairs_of_all_groups() -> None:
    group = np.repeat([0, 1], 8)
    # 2 groups of 64 pairs: below -20.97.
    assert not copied(16, 2, -20.9 / 12, group=group).deviations
    assert copied(16, 2, -21.05 / 12, group=group).deviations


def test_copies_are_looked_for_within_a_group() -> None:
    group = np.arange(8)
    assert not copied(8, 2, group=group).deviations
    assert not copied(8, 2, group=-1).deviations
    assert not copied(8, 2, group=np.where(np.arange(8) == 7, -1, 0)).deviations


@pytest.mark.parametrize("known", ["tokens after the end", NO_SAMPLES])
def test_odds_of_tokens_that_are_no_samples_mean_nothing(known: str) -> None:
    assert len(copied(8, 2, before=known).deviations) == 1
    assert len(copied(8, 2, before="another mean").deviations) == 2


def test_copies_are_of_first_passes_with_known_tokens() -> None:
    assert not copied(8, 2, minibatch=1).deviations
    rows = token_rows([12] * 8, group=0, logp=-2.0, token_id=-1)
    assert not checked(rollouts.check_duplicates, evidence(rows)).deviations
    gap = np.where(np.arange(96) % 12 == 0, NAN, -2.0)
    told = only(copied(8, 2, logp=gap))  # type: ignore[arg-type]
    assert told.tokens.endswith(f"at most {math.exp(-22):.0e}")


def test_a_copy_has_the_same_tokens_in_the_same_places() -> None:
    rng = np.random.default_rng(1)
    one = rng.integers(0, 50, 12)
    for other in (one[::-1], np.roll(one, 1), np.r_[one[1], one[0], one[2:]],
                  np.r_[one[:11], one[11] + 1], np.r_[one[0] + 1, one[1:]]):  # fmt: skip
        rows = token_rows([12] * 8, group=0, logp=-2.0)
        rows["token_id"] = np.r_[one, other, rng.integers(0, 50, 72)]
        assert not checked(rollouts.check_duplicates, evidence(rows)).deviations
    shorter = token_rows([12, 11] + [12] * 6, group=0, logp=-2.0)
    shorter["token_id"] = np.r_[one, one[:11], rng.integers(0, 50, 72)]
    assert not checked(rollouts.check_duplicates, evidence(shorter)).deviations


def test_copies_are_found_in_any_order_and_zeros_are_tokens() -> None:
    rows = token_rows([12] * 4, group=0, logp=-2.0)
    rows["token_id"] = np.r_[np.zeros(24, int), np.arange(24) + 5]
    order = np.random.default_rng(0).permutation(48)
    found = checked(rollouts.check_duplicates, evidence({n: v[order] for n, v in rows.items()}))
    assert only(found).says.startswith("2 rollouts")
    two = joined(rows, rows | {"step": np.full(48, 2)})
    assert only(checked(rollouts.check_duplicates, evidence(two))).says.startswith("4 rollouts")
