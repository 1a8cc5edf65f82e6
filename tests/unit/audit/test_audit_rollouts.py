"""How advantages were made from rewards: both sides of each bound."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.audit_rows import evidence, token_rows
from wapo_analysis.audit.rollouts import AGAIN, RULES, Advantages, read_advantages

NAN = np.nan
REWARD = np.array([1.0, 0.0, 0.25, 0.0, 0.5, 2.0, 0.0, 0.75, 1.0, 1.5, 0.25, 3.0])
GROUP = np.repeat([0, 1, 2], 4)


def by_group(values: np.ndarray, how: Any, group: np.ndarray = GROUP) -> np.ndarray:
    out = np.empty(len(values))
    for number in np.unique(group):
        out[group == number] = how(values[group == number])
    return out


def centred(r: np.ndarray, group: np.ndarray = GROUP) -> np.ndarray:
    return r - by_group(r, np.mean, group)


def std(r: np.ndarray, ddof: int, group: np.ndarray = GROUP) -> np.ndarray:
    return by_group(r, lambda x: np.std(x, ddof=ddof), group)


MADE = {
    "the reward itself": REWARD,
    "group mean": centred(REWARD),
    "group mean, population std": centred(REWARD) / (std(REWARD, 0) + 1e-6),
    "group mean, sample std": centred(REWARD) / (std(REWARD, 1) + 1e-4),
    "leave one out": centred(REWARD) * 4 / 3,
    "group mean, population std of the batch": centred(REWARD) / REWARD.std(),
    "group mean, sample std of the batch": centred(REWARD) / REWARD.std(ddof=1),
    "batch mean": REWARD - REWARD.mean(),
    "batch mean, population std": (REWARD - REWARD.mean()) / REWARD.std(),
    "batch mean, sample std": (REWARD - REWARD.mean()) / REWARD.std(ddof=1),
    "group median": REWARD - by_group(REWARD, np.median),
}


def advantages(
    advantage: Any, reward: Any = REWARD, group: Any = GROUP, source: str = "trl", **given: Any
) -> Advantages:
    """What is read of rollouts with these rewards and advantages, all of step 1."""
    manifest = {name: given.pop(name) for name in ("token_fraction", "store_bits") if name in given}
    n = len(np.asarray(reward))
    table = {"step": 1, "rollout": np.arange(n), "group": group, "reward": reward,
             "advantage": advantage} | given  # fmt: skip
    seen = evidence(token_rows([2]), pd.DataFrame(table), source=source, **manifest)
    return read_advantages(seen)


@pytest.mark.parametrize("rule", MADE)
def test_each_rule_is_told_from_rewards_and_advantages(rule: str) -> None:
    found = advantages(MADE[rule])
    assert found.rules == {rule}
    assert found.rollouts == 12
    assert found.turned is None
    assert found.why_not is None


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
def test_a_second_division_by_the_batch_is_told(first: int, second: int) -> None:
    reward = np.where(GROUP == 1, 0.5, REWARD)
    made = centred(reward) / np.where(GROUP == 1, 1.0, std(reward, first))
    assert advantages(made / made.std(ddof=second), reward).rules == {AGAIN}


def test_a_second_division_that_changes_nothing_is_none() -> None:
    reward = np.tile([1.0, 0.0, 0.0, 1.0], 3)
    assert advantages(centred(reward) / std(reward, 0), reward).rules == {
        "group mean, population std", "batch mean, population std",
        "group mean, population std of the batch",
    }  # fmt: skip


def test_every_rule_has_words() -> None:
    assert set(MADE) | {AGAIN} == set(RULES)


@pytest.mark.parametrize(
    ("offset", "known"),
    [(0.0, True), (1.2e-3, True), (1.3e-3, True), (1.45e-3, False), (-2.5e-4, False)],
)
def test_a_small_number_may_be_added_to_the_std(offset: float, known: bool) -> None:
    found = advantages(centred(REWARD) / (std(REWARD, 0) + offset), store_bits=30)
    assert (found.rules == {"group mean, population std"}) is known
    assert known or found.why_not == (
        "no known rule gives these advantages from the rewards (shaped or several rewards?)"
    )


@pytest.mark.parametrize("flat", [0.0, 0.009])
def test_a_group_of_equal_rewards_says_nothing_of_the_std(flat: float) -> None:
    reward = np.where(GROUP == 1, 0.5, REWARD)
    with np.errstate(divide="ignore", invalid="ignore"):
        made = np.where(GROUP == 1, flat, centred(reward) / (std(reward, 0) + 1e-6))
    assert advantages(made, reward).rules == {"group mean, population std"}
    large = np.where(GROUP == 1, 0.011, made)
    assert not advantages(large, reward).rules
    below = np.where(GROUP == 1, -0.011, made)
    assert not advantages(below, reward).rules


def test_rewards_are_equal_also_where_their_mean_is_not_exact() -> None:
    reward, group = np.r_[[0.7] * 3, REWARD[:9]], np.repeat([0, 1, 2, 3], 3)
    made = centred(reward, group) / (std(reward, 0, group) + 1e-6)
    for flat, rules in ((0.0, {"group mean, population std"}), (0.011, set())):
        assert advantages(np.where(group == 0, flat, made), reward, group).rules == rules


def test_one_rollout_off_the_rule_is_off() -> None:
    for rule, made in MADE.items():
        spoiled = made.copy()
        spoiled[5] *= 1.003
        assert rule not in advantages(spoiled).rules


@pytest.mark.parametrize(("share", "fits"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("place", [5, 11])
def test_a_difference_is_held_to_the_rounding_of_the_record(
    share: float, fits: bool, place: int
) -> None:
    bound = 2.2 * 2.0**-16 + 1e-5  # of |A| and the largest reward
    made = MADE["group mean"].copy()
    made[place] += share * bound * (abs(made[place]) + 3.0)
    assert (advantages(made).rules == {"group mean"}) is fits


def test_advantages_that_are_nearly_0_say_nothing_of_the_divisor() -> None:
    reward = np.r_[1.0, 0.0, 0.50001, 0.49999, REWARD[4:]]
    made = centred(reward) / std(reward, 0)
    made[2] = made[3] = 0.0
    assert advantages(made, reward).rules == {"group mean, population std"}


# ---- what it needs ------------------------------------------------------------------------------

NO_REWARD = "no reward of each rollout was recorded"
NO_SPREAD = "no step has rewards that differ and advantages that are not 0"
SOME = "only some of the rollouts were recorded"


def test_without_rollouts_no_rule_is_told() -> None:
    none = read_advantages(evidence(token_rows([2])))
    assert (none.why_not, none.rollouts, none.rules) == (NO_REWARD, 0, set())
    table = pd.DataFrame({"step": [1] * 12, "rollout": range(12), "group": GROUP, "reward": REWARD})
    assert read_advantages(evidence(token_rows([2]), table)).why_not == NO_REWARD
    assert advantages(np.full(12, NAN)).why_not == NO_REWARD
    assert advantages(MADE["group mean"], np.full(12, NAN)).why_not == NO_REWARD


def test_rollouts_without_a_reward_or_an_advantage_are_left_out() -> None:
    reward, made = np.r_[REWARD, NAN, 1.0], np.r_[MADE["group mean"], 0.5, NAN]
    found = advantages(made, reward, np.r_[GROUP, 3, 3])
    assert found.rules == {"group mean"}
    assert found.rollouts == 12


@pytest.mark.parametrize(
    ("source", "share", "why"),
    [("loop", 0.5, SOME), ("loop", 1.0, None), ("trl", 0.5, None), ("built-in", 0.5, None)],
)
def test_some_of_the_rollouts_of_a_loop_do_not_tell(
    source: str, share: float, why: str | None
) -> None:
    found = advantages(MADE["group mean"], source=source, token_fraction=share)
    assert found.why_not == why


def test_steps_of_equal_rewards_or_no_advantage_are_left_out() -> None:
    assert advantages(np.zeros(12)).why_not == NO_SPREAD
    assert advantages(MADE["group mean"], np.full(12, 0.7)).why_not == NO_SPREAD
    assert advantages(MADE["the reward itself"][:3], REWARD[:3], GROUP[:3]).why_not == NO_SPREAD
    assert advantages(REWARD[:4], REWARD[:4], GROUP[:4]).rules == {"the reward itself"}
    both = np.r_[MADE["group mean"], np.zeros(12)]
    found = advantages(both, np.tile(REWARD, 2), np.tile(GROUP, 2), step=np.repeat([1, 2], 12),
                       rollout=np.tile(np.arange(12), 2))  # fmt: skip
    assert found.rules == {"group mean"}
    assert found.rollouts == 12


def test_unknown_groups_are_told() -> None:
    group = np.where(np.arange(12) == 3, -1, GROUP)
    assert advantages(MADE["group mean"], group=group).why_not == (
        "the groups of the rollouts are not known"
    )


def test_a_rule_holds_in_every_step() -> None:
    second = REWARD[::-1].copy()
    made = np.r_[MADE["group mean"], centred(second)]
    args = {"reward": np.r_[REWARD, second], "group": np.tile(GROUP, 2),
            "step": np.repeat([1, 2], 12), "rollout": np.tile(np.arange(12), 2)}  # fmt: skip
    assert advantages(made, **args).rules == {"group mean"}
    other = np.r_[MADE["group mean"], second - second.mean()]
    assert not advantages(other, **args).rules


def test_processes_of_a_loop_are_batches_of_their_own() -> None:
    made = np.r_[MADE["batch mean"], 2 * REWARD - 2 * REWARD.mean()]
    args = {"reward": np.r_[REWARD, 2 * REWARD], "group": np.tile(GROUP, 2),
            "rank": np.repeat([0, 1], 12), "rollout": np.tile(np.arange(12), 2)}  # fmt: skip
    assert advantages(made, source="loop", **args).rules == {"batch mean"}
    assert not advantages(made, source="trl", **args).rules
    alone = args | {"rank": np.zeros(24, int)}
    assert not advantages(made, source="loop", **alone).rules
    steps = args | {"rank": np.repeat([0, 1, 0, 1], 6), "step": np.repeat([1, 1, 2, 2], 6)}
    assert not advantages(made, source="loop", **steps).rules


def test_the_order_of_the_table_is_that_of_steps_and_rollouts() -> None:
    """The turns look for neighbours, so rows are sorted first."""
    mixed = np.random.default_rng(0).permutation(12)
    turned = centred(np.roll(REWARD, 1))
    found = advantages(turned[mixed], REWARD[mixed], GROUP[mixed], rollout=mixed)
    assert found.turned == "the rewards of every rollout's predecessor were used"


# ---- turned advantages --------------------------------------------------------------------------

INTERLEAVED, BLOCKS = np.tile([0, 1, 2], 4), np.repeat([0, 1, 2], 4)


@pytest.mark.parametrize(
    ("made", "group", "turned"),
    [
        (-MADE["group mean"], GROUP, "the advantages have the wrong sign"),
        (centred(np.roll(REWARD, 1)), GROUP,
         "the rewards of every rollout's predecessor were used"),
        (centred(np.roll(REWARD, -1)), GROUP,
         "the rewards of every rollout's successor were used"),
        (centred(REWARD, INTERLEAVED), GROUP,
         "groups were formed from every n-th rollout, not from rollouts of a prompt"),
        (centred(REWARD, BLOCKS), INTERLEAVED,
         "groups were formed from neighbouring rollouts, not from rollouts of a prompt"),
    ],
)  # fmt: skip
def test_a_turn_of_the_rewards_that_fits_is_told(
    made: np.ndarray, group: np.ndarray, turned: str
) -> None:
    found = advantages(made, group=group)
    assert (found.rules, found.turned, found.rollouts) == ({"group mean"}, turned, 12)


@pytest.mark.parametrize(("rollout", "known"), [(7, False), (8, True)])
def test_eight_rollouts_tell_of_a_turn(rollout: int, known: bool) -> None:
    group = GROUP[:rollout]
    found = advantages(-centred(REWARD[:rollout], group), REWARD[:rollout], group)
    assert bool(found.turned) is known


def test_blocks_are_as_large_as_the_largest_group() -> None:
    group = np.tile([5, 6, 7], 4)[:11]
    made = centred(REWARD[:11], np.arange(11) // 4)
    found = advantages(made, REWARD[:11], group)
    assert found.turned == (
        "groups were formed from neighbouring rollouts, not from rollouts of a prompt"
    )


def test_pairs_have_one_other_each() -> None:
    group = np.arange(12) // 2
    made = centred(REWARD, group) * 2
    assert advantages(made, group=group).rules == {"leave one out"}


@pytest.mark.parametrize(("spread", "counts"), [(1.5e-3, True), (0.9e-3, False)])
def test_groups_whose_rewards_hardly_differ_say_nothing_of_the_divisor(
    spread: float, counts: bool
) -> None:
    reward = np.r_[REWARD[:8], 0.5 + spread * np.array([1.0, -1.0, 1.0, -1.0])]
    made = centred(reward) / std(reward, 0) * np.where(GROUP == 2, 0.5, 1.0)
    found = advantages(made, reward, store_bits=30)
    assert ("group mean, population std" in found.rules) is not counts


def test_groups_of_one_rollout_have_no_others() -> None:
    group = np.r_[GROUP[:8], 9]
    reward = REWARD[:9]
    made = centred(reward, group) * np.where(group == 9, 0.0, 4 / 3)
    assert advantages(made, reward, group).rules == {"leave one out"}
