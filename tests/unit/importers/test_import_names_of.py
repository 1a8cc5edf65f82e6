"""What the names that a trainer logs today feed, column by column."""

import pytest

from wapo_analysis.importers.mapping import NameTable, likely_trainer

TRAINERS: dict[str, dict[str, str]] = {
    # roll/utils/metrics/metrics_manager.py, roll/pipeline/rlvr and agentic
    "ROLL": {
        "reward": "critic/score/mean", "reward_penalised": "critic/rewards/mean",
        "entropy": "critic/entropy/mean", "length": "token/response_length/mean",
        "grad_norm": "actor_train/grad_norm", "lr": "actor/lr", "loss": "actor/pg_loss",
        "kl_ref": "actor/kl_loss", "clip_low": "actor/ppo_ratio_low_clipfrac",
        "clip_high": "actor/ppo_ratio_high_clipfrac", "eval_reward": "val_correct/all/mean",
        "groups_all_right": "group/all_correct_groups_ratio",
        "groups_all_wrong": "group/all_incorrect_groups_ratio",
    },
    # rllm/trainer/unified_trainer.py, algorithms/advantage.py, tinker/tinker_metrics_utils.py
    "rllm": {
        "reward": "reward/solver/mean", "reward_std": "reward/solver/std",
        "entropy": "train/entropy", "lr": "progress/lr", "advantage_std": "advantage/solver/std",
        "length": "batch/step_response_length/mean", "eval_reward": "val/math500/pass@1",
        "groups_all_wrong": "batch/solver/fractions/too_hard",
        "groups_all_right": "batch/solver/fractions/too_easy",
    },
    # tinker_cookbook/rl/metric_util.py
    "Tinker cookbook": {
        "reward": "env/all/reward/total", "length": "env/all/ac_tokens_per_turn",
        "entropy": "optim/entropy", "lr": "optim/lr",
        "groups_all_wrong": "env/all/by_group/frac_all_bad",
        "groups_all_right": "env/all/by_group/frac_all_good",
    },
    # tunix/rl/agentic/agentic_grpo_learner.py, tunix/sft/peft_trainer.py
    "tunix": {
        "reward": "global/train/rewards/score/mean", "kl_ref": "actor/train/kl",
        "length": "global/train/generation/completions/mean_length",
        "truncated": "global/train/generation/completions/clip_ratio",
        "advantage_std": "global/train/rewards/advantage/std", "loss": "actor/train/loss",
        "grad_norm": "actor/train/grad_norm", "lr": "actor/train/learning_rate",
        "clip_any": "actor/train/pg_clipfrac",
    },
    # trainer/train_agent.py and train_ppo.py of minimind
    "minimind": {
        "reward": "Reward", "kl_ref": "KL", "advantage_std": "AdvStd", "loss": "Loss",
        "length": "AvgLen", "lr": "LR",
    },
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_trainer_logs_today_feeds(trainer: str) -> None:
    names = TRAINERS[trainer]
    feeds = NameTable({}).feeds([*names.values(), "time/other", "system/samples"])
    assert {ours: feed.names for ours, feed in feeds.items()} == {
        ours: (name,) for ours, name in names.items()
    }
    assert likely_trainer(names.values()) == trainer


def test_shares_of_groups_go_before_counts_of_prompts() -> None:
    keys = ["batch/solve_none", "batch/solve_all", "batch/solver/fractions/too_hard"]
    feeds = NameTable({}).feeds(keys)
    assert feeds["groups_all_wrong"].names == (keys[2],)
    assert feeds["groups_all_right"].names == (keys[1],)
