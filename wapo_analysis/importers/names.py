"""What other trainers call our columns: the one table, a row per column and trainer.

A name is listed only where the quantity is the same one. What merely resembles it (verl's
``actor/ppo_kl`` is the mean log-ratio, not the k3 estimate) keeps its own name in the step log and
can be mapped by hand. docs/import.md is generated from these rows.
"""

from typing import Final

from wapo_analysis.importers.alias import UNVERIFIED, Alias, functions, rows

# Step numbers: a run's own counter goes before the row counter of a logger.
_STEP: Final = (
    "global_step", "step", "training_step", "train_step", "training/global_step",
    "trainer/global_step", "current_steps", "global_step/max_steps", "iteration", "steps",
    "rollout/step", "_step",
)  # fmt: skip

ALIASES: Final[tuple[Alias, ...]] = (
    # ---- steps, trainer by trainer; of several rows of a column the first that fits is taken
    *rows(
        "steps", "TRL", "trl/trainer/grpo_trainer.py",
        reward="reward", reward_std="reward_std", groups_flat="frac_reward_zero_std",
        loss="loss", entropy="entropy", kl_ref="kl",
        length="completions/mean_length | completion_length",
        truncated="completions/clipped_ratio", clip_low="clip_ratio/low_mean",
        clip_high="clip_ratio/high_mean", clip_any="clip_ratio", seconds="step_time",
        engine_logp_diff="sampling/sampling_logp_difference/mean",
    ),
    *rows(
        "steps", "TRL", "transformers/trainer.py",
        lr="learning_rate", grad_norm="grad_norm", eval_reward="eval_reward | eval/reward",
    ),
    *rows("steps", "TRL", "transformers/utils/notebook.py", loss="training loss"),
    *rows(
        "steps", "TRL", "trl/experimental/async_grpo/async_grpo_trainer.py",
        staleness="sample/staleness_mean",
    ),
    *functions("TRL", "rewards/NAME/mean", "rewards/NAME/std", "trl/trainer/grpo_trainer.py"),
    *functions("TRL", "rewards/NAME", None, "trl/trainer/grpo_trainer.py before 0.16"),
    *rows(
        "steps", "ms-swift", "swift/rlhf_trainers/grpo_trainer.py",
        reward="reward", reward_std="reward_std", groups_flat="frac_reward_zero_std", kl_ref="kl",
        entropy="entropy/mean", length="completions/mean_length",
        truncated="completions/clipped_ratio", clip_low="clip_ratio/low_mean",
        clip_high="clip_ratio/high_mean",
        engine_kl="rollout_correction/k3_kl | rollout_correction/kl",
    ),
    *rows(
        "steps", "LLaMA-Factory", "src/llamafactory/train/callbacks.py",
        reward="reward", loss="loss", lr="lr",
    ),
    *rows(
        "steps", "verl", "verl/trainer/ppo/metric_utils.py",
        reward="critic/score/mean", reward_penalised="critic/rewards/mean",
        length="response_length/mean", truncated="response_length/clip_ratio",
        seconds="perf/time_per_step | timing_s/step", seconds_rollout="timing_s/gen",
        value_explained="critic/vf_explained_var",
    ),
    *rows("steps", "verl", "verl/workers/critic/dp_critic.py", value_loss="critic/vf_loss"),
    *rows(
        "steps", "verl", "verl/trainer/ppo/metric_utils.py (where no score is logged)",
        reward="critic/rewards/mean",
    ),
    *rows(
        "steps", "verl", "verl/workers/actor/dp_actor.py",
        loss="actor/pg_loss", grad_norm="actor/grad_norm", lr="actor/lr",
        entropy="actor/entropy | actor/entropy_loss",
    ),
    *rows(
        "steps", "verl", "verl/trainer/ppo/ray_trainer.py",
        kl_ref="actor/kl_loss | actor/reward_kl_penalty | critic/kl",
        eval_reward="val-core/*/acc/mean@* | val-core/*/reward/mean@* | val/test_score/*",
    ),
    *rows(
        "steps", "verl", "verl/trainer/ppo/rollout_corr_helper.py",
        engine_kl="rollout_corr/k3_kl | rollout_corr/kl | mismatch/mismatch_k3_kl",
    ),
    *rows(
        "steps", "verl", "verl/utils/debug/metrics.py",
        engine_prob_diff="training/rollout_probs_diff_mean",
    ),
    *rows(
        "steps", "NeMo-RL", "nemo_rl/algorithms/grpo.py",
        reward="reward", loss="loss", grad_norm="grad_norm", lr="lr",
        staleness="avg_trajectory_age", eval_reward="validation/accuracy",
        seconds="timing/train/total_step_time", seconds_rollout="timing/train/generation",
    ),
    *rows(
        "steps", "NeMo-RL", "nemo_rl/algorithms/grpo.py (as printed)",
        reward="avg_reward | avg_total_reward", length="mean_generation_length",
        engine_kl="generation_kl_error",
    ),
    *rows(
        "steps", "NeMo-RL", "nemo_rl/algorithms/loss/loss_functions.py",
        entropy="approx_entropy", kl_ref="kl_penalty", engine_kl="gen_kl_error",
    ),
    *rows(
        "steps", "NeMo-RL", "nemo_rl/experience/rollout_manager.py",
        length="mean_gen_tokens_per_sample", truncated="truncation_rate",
    ),
    *rows(
        "steps", "OpenRLHF", "openrlhf/trainer/ppo_trainer.py",
        reward="reward | rollout/reward_mean", reward_std="rollout/reward_std",
        length="rollout/response_length_mean | response_length",
        truncated="rollout/truncated_rate | truncated",
        eval_reward="eval/eval_*_pass1 | eval/*_pass1", seconds="timing/step_total",
        seconds_rollout="timing/generation",
    ),
    *rows("steps", "OpenRLHF", UNVERIFIED, truncated="rollout/truncated"),
    *rows(
        "steps", "OpenRLHF", "openrlhf/trainer/ray/ppo_actor.py",
        loss="policy_loss", grad_norm="actor_grad_norm", lr="actor_lr", entropy="entropy_loss",
        kl_ref="kl", engine_kl="vllm_kl", reward_penalised="return", clip_any="ppo_clip_ratio",
    ),
    *rows("steps", "OpenRLHF", "openrlhf/trainer/ray/ppo_critic.py", value_loss="critic_loss"),
    *rows(
        "steps", "SkyRL", "skyrl/train/trainer.py",
        reward="reward/avg_raw_reward", reward_penalised="loss/avg_final_rewards",
        kl_ref="policy/policy_kl | loss/avg_kl", length="generate/avg_num_tokens",
        engine_logp_diff="policy/rollout_train_logprobs_abs_diff_mean",
        staleness="async/staleness_mean", eval_reward="eval/all/avg_score",
        seconds="timing/step", seconds_rollout="timing/generate",
    ),
    *rows(
        "steps", "SkyRL", "skyrl/backends/skyrl_train/workers/worker.py",
        loss="policy/final_loss | policy/policy_loss", lr="policy/policy_lr",
        entropy="policy/policy_entropy",
    ),
    *rows("steps", "SkyRL", f"{UNVERIFIED} (public logs)", grad_norm="policy/raw_grad_norm"),
    *rows(
        "steps", "slime", "slime/observability/rollout_metrics.py",
        length="rollout/response_len/mean", truncated="rollout/truncated_ratio",
        eval_reward="eval/DATASET", seconds_rollout="perf/rollout_time",
    ),
    *rows(
        "steps", "slime", "slime/observability/train_metric_utils.py",
        reward="rollout/raw_reward", length="rollout/response_lengths", seconds="perf/step_time",
    ),
    *rows("steps", "slime", "slime/ray/rollout.py", truncated="rollout/truncated"),
    *rows(
        "steps", "slime", "slime/backends/megatron_utils/loss.py",
        loss="loss | pg_loss", entropy="entropy_loss | rollout/entropy", kl_ref="kl_loss",
        engine_logp_diff="train_rollout_logprob_abs_diff", grad_norm="grad_norm", lr="lr-pg_0",
    ),
    *rows(
        "steps", "open-instruct", "open_instruct/grpo_utils.py",
        loss="loss/total_avg | loss/policy_avg", entropy="policy/entropy_avg",
        kl_ref="objective/kl2_avg", grad_norm="optim/grad_norm", lr="lr",
        eval_reward="eval/scores",
        engine_logp_diff="debug/vllm_vs_local_logprob_diff_mean",
        engine_kl="debug/vllm_local_reverse_kl",
    ),
    *rows(
        "steps", "open-instruct", "open_instruct/data_loader.py",
        reward="scores | objective/verifiable_reward",
        pass_rate="objective/verifiable_correct_rate",
        length="val/sequence_lengths", truncated="1 - val/stop_rate",
        staleness="num_steps_off_policy", seconds="time/total",
    ),
    *functions(
        "open-instruct", "objective/NAME_reward", None, "open_instruct/ground_truth_utils.py"
    ),
    *rows(
        "steps", "AReaL", "areal/trainer/ppo/actor.py",
        reward="ppo_actor/task_reward/avg | rollout/reward", loss="ppo_actor/update/actor_loss/avg",
        entropy="ppo_actor/update/entropy/avg", truncated="ppo_actor/no_eos_ratios/avg",
        engine_kl="ppo_actor/update/compute_logp/kl_div_dual/avg",
        staleness="ppo_actor/update/version_stats/sample_staleness_theta_avg",
        grad_norm="ppo_actor/update/grad_norm", lr="ppo_actor/update/lr",
        eval_reward="eval-rollout/reward",
    ),
    *rows(
        "steps", "torchforge", "apps/grpo/main.py and src/forge/actors/trainer.py",
        reward="reward/evaluate_response/avg_total_reward", lr="rl_trainer/learning_rate",
        loss="rl_trainer/loss | rl_trainer/avg_loss | rl_trainer/avg_grpo_loss",
        kl_ref="grpo_loss/kl_divergence_mean",
        length="generator/generate/avg_tokens_generated | policy/generate/avg_tokens_generated",
    ),
    *functions(
        "torchforge", "reward/evaluate_response/avg_NAME_reward",
        "reward/evaluate_response/std_NAME_reward", "apps/grpo/main.py",
    ),
    *rows(
        "steps", "prime-rl", "src/prime_rl/trainer/rl/train.py",
        loss="loss/mean", grad_norm="optim/grad_norm", lr="optim/lr",
        entropy="entropy/all/mean", kl_old="mismatch_kl/all/mean | mismatch_kl/mean | mismatch_kl",
        seconds="time/step",
    ),
    *rows(
        "steps", "prime-rl", "src/prime_rl/orchestrator (before August 2026)",
        reward="reward/all/mean | reward/mean",
        length="decode_len/all/mean", truncated="is_truncated/all/mean",
        groups_all_wrong="solve_none/all", groups_all_right="solve_all/all",
        staleness="off_policy/mean | off_policy_level/all/mean",
        eval_reward="eval/*/avg@*", seconds_rollout="time/generate_completions",
    ),
    *rows(
        "steps", "prime-rl", UNVERIFIED,
        reward_std="reward/all/std | reward/std", length="tokens/completion",
    ),
    *rows(
        "steps", "prime-rl", "src/prime_rl/orchestrator/metrics.py (one environment: agg)",
        reward="agg/all/*/reward/mean", length="agg/all/*/num_output_tokens/mean",
        truncated="agg/all/*/is_truncated/mean", groups_all_wrong="agg/all/*/solved_none",
        groups_all_right="agg/all/*/solved_all",
    ),
    *rows("steps", "EasyR1", "verl/trainer/ray_trainer.py", eval_reward="val/reward_score"),
    *rows(
        "steps", "ROLL", "roll/utils/metrics/metrics_manager.py",
        reward="critic/score/mean", reward_penalised="critic/rewards/mean",
        entropy="critic/entropy/mean",
        length="token/response_length/mean | rollout/response_length/mean",
        groups_all_wrong="group/all_incorrect_groups_ratio",
        groups_all_right="group/all_correct_groups_ratio",
    ),
    *rows(
        "steps", "ROLL", "roll/pipeline (rlvr, agentic, base_worker.py)",
        loss="actor/pg_loss", kl_ref="actor/kl_loss", lr="actor/lr",
        grad_norm="actor_train/grad_norm", clip_low="actor/ppo_ratio_low_clipfrac",
        clip_high="actor/ppo_ratio_high_clipfrac",
        eval_reward="val_correct/all/mean | val/score/mean",
    ),
    *rows(
        "steps", "PipelineRL", "pipelinerl/finetune_loop.py and pipelinerl/finetune/rl/__init__.py",
        reward="rl/reward", entropy="rl/entropy", kl_ref="rl/kl", loss="rl/loss",
        grad_norm="stats/grad_norm", lr="stats/lr",
    ),
    *rows(
        "steps", "tunix", "tunix/rl/grpo/grpo_learner.py and tunix/sft/metrics_logger.py",
        reward="*/train/rewards/score/mean",
        length="*/train/completions/mean_length | */train/generation/completions/mean_length",
        truncated="*/train/generation/completions/clip_ratio",
        advantage_std="*/train/rewards/advantage/std", clip_any="actor/train/pg_clipfrac",
        kl_ref="*/train/kl", loss="actor/train/loss", grad_norm="actor/train/grad_norm",
        lr="actor/train/learning_rate",
    ),
    *rows(
        "steps", "rllm", "rllm/trainer/algorithms/advantage.py and rllm/trainer/unified_trainer.py",
        reward="reward/*/mean", reward_std="reward/*/std", advantage_std="advantage/*/std",
        groups_all_wrong="batch/*/fractions/too_hard",
        groups_all_right="batch/*/fractions/too_easy",
        length="batch/step_response_length/mean", lr="progress/lr", eval_reward="val/*/pass@1",
    ),
    *rows(
        "steps", "rllm", f"{UNVERIFIED} path; counts of prompts, made shares",
        groups_all_wrong="batch/solve_none", groups_all_right="batch/solve_all",
    ),
    *rows(
        "steps", "Tinker cookbook", "tinker_cookbook/rl/train.py and tinker_cookbook/rl/metrics.py",
        reward="env/all/reward/total", entropy="optim/entropy", lr="optim/lr",
        length="env/all/ac_tokens_per_turn", engine_kl="optim/kl_sample_train_v1",
        eval_reward="test/env/all/reward/total", seconds="time/total",
        groups_all_wrong="env/all/by_group/frac_all_bad",
        groups_all_right="env/all/by_group/frac_all_good",
    ),
    *rows(
        "steps", "TRL", "trl/experimental/ppo/ppo_trainer.py",
        reward="objective/scores", reward_penalised="objective/rlhf_reward",
        loss="loss/policy_avg", entropy="policy/entropy_avg", clip_any="policy/clipfrac_avg",
        value_loss="loss/value_avg",
    ),
    *rows(
        "steps", "TRL", "trl/trainer/ppo_trainer.py before 0.12",
        reward="env/reward_mean", reward_std="env/reward_std", loss="ppo/loss/policy",
        entropy="ppo/policy/entropy", length="tokens/responses_len_mean",
        clip_any="ppo/policy/clipfrac", value_loss="ppo/loss/value",
        value_explained="ppo/val/var_explained",
    ),
    *rows(
        "steps", "torchtune", "torchtune/dev/grpo/types.py",
        loss="loss | policy_loss", clip_any="clipfrac",
    ),
    *rows("steps", "torchtune", UNVERIFIED, reward="rewards"),
    *rows(
        "steps", "rlprobe", "rlprobe/schemas",
        reward="reward_mean", kl_ref="kl_mean", entropy="entropy_mean",
        length="completion_len_mean", truncated="truncation_rate | max_len_hit_frac",
        repetition="repetition_rate", groups_flat="zero_variance_group_frac",
        clip_any="clip_fraction", advantage_std="adv_std", value_loss="value_loss",
        value_explained="value_explained_variance", seconds="step_time_s",
        seconds_rollout="generation_time_s",
    ),
    *functions("rlprobe", "reward_component.NAME", None, "rlprobe/storage.py"),
    *rows(
        "steps", "minimind", "trainer/train_grpo.py, train_ppo.py and train_agent.py",
        reward="reward", loss="actor_loss", length="avg_response_len | avglen", lr="actor_lr",
        advantage_std="adv_std | advantages_std | advstd", value_loss="critic_loss",
        clip_any="clipfrac",
    ),
    *rows(
        "steps", "WAPO", "verifiers/rl/trainer/trainer.py",
        entropy_pos="entropy_pos", entropy_neg="entropy_neg",
    ),
    *rows(
        "steps", "any", "common use",
        step=" | ".join(_STEP),
        reward=(
            "mean_reward | reward_mean | rewards/mean | ep_rew_mean | accuracy | acc"
            " | train_accuracy | train_acc | success_rate | train_success_rate | solve_rate"
        ),
        reward_std="std_reward", loss="policy_loss", grad_norm="gradient_norm | gnorm",
        entropy="mean_entropy | policy_entropy | policy/entropy",
        length=(
            "mean_length | response_length | response_lengths | response_len | response/length"
            " | completion_len | generation_length | gen_length | gen_len | output_length | len"
        ),
        staleness="staleness | staleness/mean",
        clip_any="clip_fraction | clip_frac | clipfrac | policy/clip_frac | policy/clip_fraction",
        advantage_std=(
            "adv_std | advantages/std | advantages_std | advantage/std | critic/advantages/std"
        ),
        distinct=(
            "unique_completions | unique_ratio | unique_completion_ratio | completions/unique_ratio"
            " | diversity | distinct_2 | distinct_1 | distinct-2 | distinct-1"
        ),
        value_loss="vf_loss | value/loss", value_explained="explained_variance | vf_explained_var",
        eval_reward=(
            "eval/accuracy | eval_accuracy | eval/score | eval_score | eval/pass@1 | val/reward"
            " | val_reward | val/accuracy | val/acc | validation/reward | test/accuracy | eval/acc"
            " | eval/rewards | eval/success_rate | success_rate/eval | eval_success_rate"
        ),
    ),
    # ---- rows of tokens
    *rows(
        "tokens", "any", "common use",
        step="global_step | training_step | train_step | iteration | _step | steps",
        minibatch="mini_batch", rank="process_index | worker",
        group="group_id | group_ids | prompt_id | prompt_index | problem_id | uid",
        rollout="rollout_id | sample_id | sequence_id | seq_id | completion_id | sample | sequence"
                " | request_id",
        position="token_position | token_index | pos",
        token_id="token_ids | response_ids | output_ids | input_ids",
        advantage="advantages | adv",
        logp="logprob | logprobs | log_prob | log_probs | logps | token_logprobs | logp_train",
        logp_old=(
            "old_logp | old_logprob | old_logprobs | old_log_prob | old_log_probs"
            " | sampling_logprobs | behaviour_logprobs | behavior_logprobs | logp_inference"
        ),
        entropy="entropies | entropys | token_entropy | token_entropies",
        coef="gradient_coefficient", kept="keep_mask", clipped="is_clipped", top1="is_top1",
        prob="p | probs | probability | prob_train | token_prob",
        prob_old="old_prob | old_probs | prob_inference | behaviour_prob",
        collision="sum_p_sq | sum_sq_probs", loss_mask="mask",
    ),
    *rows(
        "tokens", "prime-rl", "src/prime_rl/trainer (token exports)",
        logp="trainer_logprobs", logp_old="inference_logprobs", clipped="is_masked",
        rollout="export_sequence_idx", minibatch="micro_step",
    ),
    *rows(
        "tokens", "TRL", "trl/trainer/grpo_trainer.py",
        token_id="completion_ids", logp="per_token_logps",
        logp_old="old_per_token_logps | sampling_per_token_logps", loss_mask="completion_mask",
    ),
    *rows(
        "tokens", "verl", "verl/workers and verl/trainer/ppo",
        logp_old="rollout_log_probs", collision="sum_pi_squared", loss_mask="response_mask",
    ),
    # ---- rows of completions
    *rows(
        "rollouts", "any", "common use",
        step="global_step | training_step | train_step | iteration | _step | steps",
        group="group_id | prompt_id | problem_id | uid",
        rollout="rollout_id | sample_id | completion_id | request_id",
        prompt="question | problem", completion="response | answer_text | generation",
        answer="ground_truth | reference | target", reward="rewards | total_reward",
        advantage="advantages", length="response_length | completion_length | num_tokens",
        finish_reason="stop_reason",
    ),
    *rows(
        "rollouts", "rlprobe", "rlprobe/schemas",
        prompt="prompt_text", completion="completion_text", reward="reward_total",
        length="completion_len",
    ),
    *rows(
        "rollouts", "verl", "verl/trainer/ppo/ray_trainer.py (_dump_generations)",
        prompt="input", completion="output", answer="gts", reward="score",
    ),
)  # fmt: skip
