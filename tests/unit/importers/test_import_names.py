"""Which of a source's names is which column: the mapping, aliases, means, likenesses, trainers."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers import parse_mapping
from wapo_analysis.importers.mapping import (
    Feed,
    NameTable,
    function_column,
    is_supervised,
    likely_trainer,
    nearest,
    set_names,
)


@pytest.mark.parametrize("text", ["logp", "=logp", "logp=", "=", " = x"])
def test_a_mapping_is_a_pair(text: str) -> None:
    with pytest.raises(UserError, match="wants ours=theirs"):
        parse_mapping([text])


def test_pairs_of_a_mapping() -> None:
    assert parse_mapping(["logp = lp", "step=a=b"]) == {"logp": "lp", "step": "a=b"}
    with pytest.raises(UserError, match="'logp' twice"):
        parse_mapping(["logp=a", "logp=b"])
    with pytest.raises(UserError, match="unknown column 'lgp'"):
        parse_mapping(["lgp=a"])


# ---- rows of tokens and completions


def test_a_column_takes_the_first_of_its_names_that_is_there() -> None:
    taken, left = NameTable({}).plan("tokens", ["Log_Prob", "logps", "mask", "colour"])
    assert taken == {"logp": "Log_Prob", "loss_mask": "mask"}
    assert left == ["logps", "colour"]
    taken, left = NameTable({}).plan("rollouts", ["mask", "input", "score"])
    assert taken == {"prompt": "input", "reward": "score"}
    assert left == ["mask"], "a mask is of tokens"


def test_what_is_mapped_to_one_column_feeds_no_other() -> None:
    names = NameTable({"logp_old": "logprobs", "entropy": "absent"})
    taken, left = names.plan("tokens", ["logprobs", "logps", "entropies"])
    assert taken == {"logp_old": "logprobs", "logp": "logps"}
    assert left == ["entropies"], "the mapping says that the entropy is elsewhere"
    assert names.never_seen() == ["entropy=absent"]
    (again, _) = names.plan("tokens", ["absent"])
    assert (again, names.never_seen()) == ({"entropy": "absent"}, [])


# ---- the step


def test_the_runs_own_counter_goes_before_the_row_counter_of_a_logger() -> None:
    names = NameTable({})
    assert names.step_key(["_step", "train/Global_Step", "step"]) == "train/Global_Step"
    assert names.step_key(["_step", "loss"]) == "_step"
    assert names.step_key(["loss"]) is None


# ---- a metrics log


def test_a_name_of_the_mapping_with_a_minus_is_minus_its_numbers() -> None:
    assert NameTable({"entropy": "-ent"}).feeds(["ent"]) == {
        "entropy": Feed(("ent",), negative=True)
    }
    minus = NameTable({"entropy": "-ent"}).feeds(["-ent", "ent"])
    assert minus["entropy"] == Feed(("-ent",)), "a name as it stands goes first"
    names = NameTable({"entropy": "xent"})
    assert names.feeds(["ent"]) == {}
    assert names.never_seen() == ["entropy=xent"]


def test_what_is_mapped_is_taken_from_the_columns_it_would_feed() -> None:
    feeds = NameTable({"length": "reward"}).feeds(["reward", "entropy"])
    assert feeds == {"length": Feed(("reward",)), "entropy": Feed(("entropy",))}
    assert NameTable({"reward": "absent"}).feeds(["reward"]) == {}


def test_a_later_name_stands_in_at_steps_without_the_first(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": s, "critic/score/mean": 0.5} for s in range(1, 7)]
    for row in rows:
        first, later = ("actor/entropy", 0.5), ("actor/entropy_loss", 0.25)
        row |= [dict([first, later]), dict([first]), dict([later])][row["step"] % 3]
        row["val-core/a/acc/mean@1" if row["step"] < 4 else "val-core/a/reward/mean@1"] = 1.0
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert steps["entropy"].tolist() == [0.5, 0.25, 0.5, 0.5, 0.25, 0.5]
    assert report.mapped["entropy"] == "actor/entropy"
    assert steps["eval_reward"].tolist() == [1.0] * 6


def test_a_pattern_of_several_names_stands_in_for_none() -> None:
    core = "val-core/{}/{}/mean@1"
    keys = [core.format("a", "acc"), *(core.format(name, "reward") for name in "bc")]
    assert NameTable({}).feeds(keys)["eval_reward"] == Feed((keys[0],))


def test_names_that_say_that_they_are_means_are_those_without_the_word() -> None:
    feeds = NameTable({}).feeds(["avg_entropy", "kl mean", "mean_grad_norm", "lr_mean", "Mean"])
    assert {ours: feed.names for ours, feed in feeds.items()} == {
        "entropy": ("avg_entropy",), "kl_ref": ("kl mean",), "grad_norm": ("mean_grad_norm",),
    }  # fmt: skip
    both = NameTable({}).feeds(["entropy", "avg_entropy"])
    assert both["entropy"] == Feed(("entropy",))
    other = NameTable({}).feeds(["avg_rollout/raw_reward", "mean_reward_std"])
    assert other == {}, "only names in common use, of columns that are means"


def test_names_below_the_group_of_the_policy_are_those_without_it() -> None:
    keys = ["train/policy/grad_norm", "rollout/reward/mean", "optimizer/lr", "response/length/mean",
            "actor/kl", "critic/loss", "ref/entropy", "policy/lr/mean"]  # fmt: skip
    feeds = NameTable({}).feeds(keys)
    assert {ours: feed.names for ours, feed in feeds.items()} == {
        "grad_norm": (keys[0],), "reward": (keys[1],), "lr": (keys[2],), "length": (keys[3],),
    }  # fmt: skip


def test_names_may_begin_with_training_in_other_ways_and_have_points() -> None:
    keys = ["train_reward_mean", "train_policy_entropy", "train_kl", "train.grad_norm",
            "training/loss", "rollout.length.mean", "train_step_time"]  # fmt: skip
    feeds = NameTable({}).feeds(keys)
    assert {ours: feed.names for ours, feed in feeds.items()} == {
        "reward": (keys[0],), "entropy": (keys[1],), "kl_ref": (keys[2],), "grad_norm": (keys[3],),
        "loss": (keys[4],), "length": (keys[5],),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["accuracy", "acc", "train/success_rate", "train_acc"])
def test_the_accuracy_is_the_reward_of_a_log_without_another(name: str) -> None:
    assert NameTable({}).feeds([name, "loss"])["reward"] == Feed((name,))
    assert NameTable({}).feeds([name, "reward"])["reward"] == Feed(("reward",))


def test_numbers_of_reward_functions_have_one_name() -> None:
    assert function_column("train/rewards / exact/mean") == "rewards/exact/mean"
    assert function_column("rewards/exact") == "rewards/exact/mean"
    assert function_column("reward_component.exact") == "rewards/exact/mean"
    assert function_column("rewards/exact/std") == "rewards/exact/std"
    assert function_column("rewards/chosen") == "rewards/chosen"
    assert function_column("other") == "other"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["val/a/acc", "val/b/acc"], ["a", "b"]),
        (["val/a/acc", "val/b/reward"], ["a/acc", "b/reward"]),
        (["val/a", "val/b/c"], ["val/a", "val/b/c"]),
        (["val/a"], ["val/a"]),
    ],
)
def test_held_out_sets_are_called_by_what_tells_them_apart(
    names: list[str], told: list[str]
) -> None:
    assert list(set_names(names).values()) == told


@pytest.mark.parametrize(
    ("keys", "trainer"),
    [
        (["rewards/exact/mean", "frac_reward_zero_std"], "TRL"),
        (["rewards/exact/mean", "rewards/exact/std"], "TRL"),
        (["rewards/exact/mean"], None),
        (["critic/score/mean", "response_length/mean"], "verl"),
        (["reward", "entropy", "loss", "kl", "lr", "grad_norm", "policy_loss"], None),
        (["train/reward", "train/frac_reward_zero_std"], "TRL"),
        (
            [
                "critic/score/mean",
                "critic/rewards/mean",
                "actor/lr",
                "actor/pg_loss",
                "actor/kl_loss",
                "actor_train/grad_norm",
                "critic/entropy/mean",
                "group/all_correct_groups_ratio",
                "token/response_length/mean",
            ],
            "ROLL",
        ),
        (["Reward", "Critic_Loss", "Actor_LR", "ClipFrac", "Avg_Response_Len"], "minimind"),
        (["reward/mean", "reward/std", "policy/entropy"], None),
        (["reward", "kl", "train_speed(s/it)"], "ms-swift"),
        (["reward_mean", "entropy_mean", "kl_mean", "clip_fraction"], None),
        (["actor_loss", "critic_loss", "reward", "lr"], None),
    ],
)
def test_a_trainer_is_known_by_two_names_one_of_its_own(
    keys: list[str], trainer: str | None
) -> None:
    assert likely_trainer(keys) == trainer


@pytest.mark.parametrize(
    ("keys", "column", "key"),
    [
        (["train_acc"], "reward", "train_acc"),
        (["scores"], "reward", "scores"),
        (["my_reward", "return"], "reward", "my_reward"),
        (["rews"], "reward", "rews"),
        (["actor_critic_rewad"], "reward", "actor_critic_rewad"),
        (["rewad-7"], "reward", "rewad-7"),
        (["accent"], "reward", None),
        (["entropy_loss"], "entropy", None),
        (["entropy_bits"], "entropy", None),
        (["entropy_sum"], "entropy", None),
        (["entropy_bits"], "reward", None),
        (["my_loss"], "loss", "my_loss"),
        ([], "loss", None),
    ],
)
def test_what_a_name_looks_like(keys: list[str], column: str, key: str | None) -> None:
    assert nearest(keys, (column,)) == ({} if key is None else {column: key})


def test_no_name_is_proposed_for_two_columns() -> None:
    assert nearest(["reward_entropy", "ent"], ("reward", "entropy")) == {
        "reward": "reward_entropy", "entropy": "ent",
    }  # fmt: skip


def test_fine_tuning_on_given_answers_is_known_by_its_accuracy() -> None:
    assert is_supervised(["loss", "train/mean_token_accuracy"])
    assert not is_supervised(["loss", "mean_token_accuracy", "my_rewards"])
    assert not is_supervised(["loss"])


# ---- what is no such quantity


def fed(tmp_path: Path, **columns: list[float]) -> tuple[dict[str, str], list[str]]:
    """Columns that were found, and what was said."""
    rows = [{"step": s} | dict(zip(columns, values, strict=True))
            for s, values in enumerate(zip(*columns.values(), strict=True))]  # fmt: skip
    _, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    return report.mapped, [*report.events, *report.notes]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([-0.4, -0.3], False), ([-0.4, 0.0], True), ([0.0, 0.0], True), ([-0.4, 0.3], True),
        ([float("nan"), float("nan")], True), ([float("nan"), -0.3], False), ([0.4, 0.3], True),
    ],
)  # fmt: skip
def test_an_entropy_that_is_always_negative_is_a_term_of_the_loss(
    values: list[float], kept: bool, tmp_path: Path
) -> None:
    mapped, said = fed(tmp_path, reward=[0.5, 0.5], entropy=values)
    assert ("entropy" in mapped) is kept
    assert any("entropy is negative" in text for text in said) is not kept


@pytest.mark.parametrize(
    ("values", "kept"), [([-0.4, 0.3], False), ([-0.1, 0.3], True), ([0.0, 0.0], True)]
)
def test_a_divergence_that_is_negative_on_average_is_a_log_ratio(
    values: list[float], kept: bool, tmp_path: Path
) -> None:
    mapped, said = fed(tmp_path, reward=[0.5, 0.5], kl=values)
    assert ("kl_ref" in mapped) is kept
    assert any("a log-ratio, not a KL divergence" in text for text in said) is not kept


def counted(tmp_path: Path, **columns: list[int]) -> dict[str, list[float]]:
    names = [f"batch/solve_{name}" for name in columns]
    rows = [{"step": s, "reward": 0.5} | dict(zip(names, row, strict=True))
            for s, row in enumerate(zip(*columns.values(), strict=True))]  # fmt: skip
    steps, _ = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    shares = ("groups_all_wrong", "groups_all_right")
    return {name: steps[name].fillna(-1).tolist() for name in shares}


def test_counts_of_solved_prompts_are_shares_of_the_three(tmp_path: Path) -> None:
    found = counted(tmp_path, none=[0, 1, 2], all=[0, 0, 1], partial=[0, 0, 5])
    assert found == {"groups_all_wrong": [0, 1, 0.25], "groups_all_right": [0, 0, 0.125]}


def test_counts_of_solved_prompts_without_the_third_are_not_known(tmp_path: Path) -> None:
    found = counted(tmp_path, none=[0, 1, 2], all=[0, 0, 1])
    assert found == {"groups_all_wrong": [0, -1, -1], "groups_all_right": [0, 0, -1]}
