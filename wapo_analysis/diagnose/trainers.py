"""What each trainer calls the settings that advice speaks of: one table, a row per setting.

Advice names a setting in braces, by its name in the built-in trainer, as in ``Advice("Lower
{lr}.")``; a run of another trainer is told that trainer's name. Names were read in the public
sources of TRL 1.16, verl 0.7, ms-swift, OpenRLHF, SkyRL, slime, NeMo-RL, LLaMA-Factory,
open-instruct, prime-rl and AReaL as of August 2026 (verl: January, AReaL: May). A trainer without
a setting has no entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

BUILT_IN: Final = "built-in"


@dataclass(frozen=True)
class Setting:
    """A setting of training.

    ``words``: what to call it where the trainer's name for it is not known; ``names``: trainer to
    its name.
    """

    words: str
    names: Mapping[str, str]


_VERL = "actor_rollout_ref.actor"
_SKYRL = "trainer.algorithm"

#: Setting to what each trainer calls it.
SETTINGS: Final[Mapping[str, Setting]] = {
    "lr": Setting("the learning rate", {
        BUILT_IN: "lr", "trl": "learning_rate", "ms-swift": "learning_rate",
        "llama-factory": "learning_rate", "open-instruct": "learning_rate",
        "verl": f"{_VERL}.optim.lr", "openrlhf": "--actor.adam.lr", "slime": "--lr",
        "skyrl": "trainer.policy.optimizer_config.lr", "nemo-rl": "policy.optimizer.kwargs.lr",
        "prime-rl": "trainer.optim.lr", "areal": "actor.optimizer.lr",
    }),
    "updates": Setting("the updates per batch", {
        BUILT_IN: "the updates per batch (epochs x minibatches)",
        "trl": "the updates per batch (num_iterations x steps_per_generation)",
        "ms-swift": "the updates per batch (num_iterations x steps_per_generation)",
        "llama-factory": "the updates per batch (ppo_epochs)",
        "verl": f"the updates per batch ({_VERL}.ppo_epochs x data.train_batch_size / "
        f"{_VERL}.ppo_mini_batch_size)",
        "openrlhf": "the updates per batch (--train.max_epochs x --rollout.batch_size x "
        "--rollout.n_samples_per_prompt / --train.batch_size)",
        "slime": "the updates per batch (--num-steps-per-rollout)",
        "skyrl": "the updates per batch (trainer.update_epochs_per_batch x "
        "trainer.train_batch_size / trainer.policy_mini_batch_size)",
        "nemo-rl": "the updates per batch (grpo.num_prompts_per_step x "
        "grpo.num_generations_per_prompt / policy.train_global_batch_size)",
        "open-instruct": "the updates per batch (num_epochs x num_mini_batches)",
        "areal": "the updates per batch (actor.ppo_n_minibatches)",
    }),
    "clip_low": Setting("the lower clip", {
        BUILT_IN: "clip_eps (mask_ratio_low in the dapo family)", "trl": "epsilon",
        "ms-swift": "epsilon", "verl": f"{_VERL}.clip_ratio_low", "slime": "--eps-clip",
        "openrlhf": "--actor.eps_clip_low_high", "skyrl": f"{_SKYRL}.eps_clip_low",
        "nemo-rl": "loss_fn.ratio_clip_min", "open-instruct": "clip_lower",
        "prime-rl": "trainer.loss.dppo_mask_low", "areal": "actor.eps_clip",
    }),
    "clip_high": Setting("the upper clip", {
        BUILT_IN: "clip_eps (mask_ratio_high in the dapo family)", "trl": "epsilon_high",
        "ms-swift": "epsilon_high", "verl": f"{_VERL}.clip_ratio_high",
        "slime": "--eps-clip-high", "openrlhf": "--actor.eps_clip_low_high",
        "skyrl": f"{_SKYRL}.eps_clip_high", "nemo-rl": "loss_fn.ratio_clip_max",
        "open-instruct": "clip_higher", "prime-rl": "trainer.loss.dppo_mask_high",
        "areal": "actor.eps_clip_higher",
    }),
    "max_grad_norm": Setting("the gradient norm clip", {
        BUILT_IN: "max_grad_norm", "trl": "max_grad_norm", "ms-swift": "max_grad_norm",
        "llama-factory": "max_grad_norm", "open-instruct": "max_grad_norm",
        "verl": f"{_VERL}.grad_clip", "openrlhf": "--actor.max_norm", "slime": "--clip-grad",
        "skyrl": "trainer.policy.optimizer_config.max_grad_norm",
        "nemo-rl": "policy.max_grad_norm", "prime-rl": "trainer.optim.max_norm",
        "areal": "actor.optimizer.gradient_clipping",
    }),
    "rollouts_per_prompt": Setting("the completions per prompt", {
        BUILT_IN: "rollouts_per_prompt", "trl": "num_generations",
        "ms-swift": "num_generations", "verl": "actor_rollout_ref.rollout.n",
        "openrlhf": "--rollout.n_samples_per_prompt", "slime": "--n-samples-per-prompt",
        "skyrl": "generator.n_samples_per_prompt", "nemo-rl": "grpo.num_generations_per_prompt",
        "open-instruct": "num_samples_per_prompt_rollout", "prime-rl": "orchestrator.group_size",
        "areal": "gconfig.n_samples",
    }),
    "max_new_tokens": Setting("the length limit of completions", {
        BUILT_IN: "max_new_tokens", "trl": "max_completion_length",
        "ms-swift": "max_completion_length", "llama-factory": "max_new_tokens",
        "verl": "data.max_response_length", "openrlhf": "--rollout.max_new_tokens",
        "slime": "--rollout-max-response-len",
        "skyrl": "generator.sampling_params.max_generate_length",
        "nemo-rl": "policy.generation.max_new_tokens", "open-instruct": "response_length",
        "prime-rl": "orchestrator.train.sampling.max_completion_tokens",
        "areal": "gconfig.max_new_tokens",
    }),
    "temperature": Setting("the sampling temperature", {
        BUILT_IN: "temperature", "trl": "temperature", "ms-swift": "temperature",
        "llama-factory": "temperature", "open-instruct": "temperature",
        "verl": "actor_rollout_ref.rollout.temperature", "openrlhf": "--rollout.temperature",
        "slime": "--rollout-temperature", "skyrl": "generator.sampling_params.temperature",
        "nemo-rl": "policy.generation.temperature",
        "prime-rl": "orchestrator.train.sampling.temperature", "areal": "gconfig.temperature",
    }),
    "data": Setting("the training problems", {
        BUILT_IN: "task, data", "trl": "train_dataset", "ms-swift": "dataset",
        "llama-factory": "dataset", "verl": "data.train_files",
        "openrlhf": "--data.prompt_dataset", "slime": "--prompt-data",
        "skyrl": "data.train_data", "nemo-rl": "data.train",
        "open-instruct": "dataset_mixer_list", "prime-rl": "orchestrator.train.source",
        "areal": "train_dataset",
    }),
    "kl": Setting("the KL coefficient", {
        "trl": "beta", "ms-swift": "beta", "open-instruct": "beta",
        "verl": f"{_VERL}.kl_loss_coef with {_VERL}.use_kl_loss",
        "openrlhf": "--algo.kl.init_coef", "slime": "--kl-loss-coef with --use-kl-loss",
        "skyrl": f"{_SKYRL}.kl_loss_coef with {_SKYRL}.use_kl_loss",
        "nemo-rl": "loss_fn.reference_policy_kl_penalty", "prime-rl": "trainer.loss.kl_tau",
        "areal": "actor.kl_ctl",
    }),
    "drop_flat_groups": Setting("sampling until groups differ", {
        "verl": "algorithm.filter_groups.enable", "ms-swift": "dynamic_sample",
        "openrlhf": "--algo.dynamic_filtering_enable",
        "slime": "--dynamic-sampling-filter-path", "skyrl": f"{_SKYRL}.dynamic_sampling.type",
        "nemo-rl": "grpo.use_dynamic_sampling", "open-instruct": "active_sampling",
    }),
    "correction": Setting("truncated importance sampling", {
        "trl": "vllm_importance_sampling_correction",
        "ms-swift": "rollout_importance_sampling_mode",
        "verl": "algorithm.rollout_correction.rollout_is", "slime": "--use-tis",
        "openrlhf": "--algo.advantage.is_correction_enable",
        "skyrl": f"{_SKYRL}.off_policy_correction.tis_ratio_type",
        "nemo-rl": "loss_fn.use_importance_sampling_correction",
        "open-instruct": "use_rho_correction", "areal": "actor.use_decoupled_loss",
    }),
    "max_lag": Setting("the lag between sampling and training", {
        "skyrl": "trainer.fully_async.max_staleness_steps",
        "nemo-rl": "grpo.async_grpo.max_trajectory_age_steps", "open-instruct": "async_steps",
        "openrlhf": "--train.async_queue_size", "slime": "--update-weights-interval",
        "prime-rl": "orchestrator.max_off_policy_steps",
        "areal": "rollout.max_head_offpolicyness",
    }),
    "checkpoint_every": Setting("the steps between checkpoints", {
        BUILT_IN: "checkpoint_every", "trl": "save_steps", "ms-swift": "save_steps",
        "llama-factory": "save_steps", "verl": "trainer.save_freq",
        "openrlhf": "--ckpt.save_steps", "slime": "--save-interval",
        "skyrl": "trainer.ckpt_interval", "nemo-rl": "checkpointing.save_period",
        "open-instruct": "checkpoint_state_freq", "prime-rl": "ckpt.interval",
        "areal": "saver.freq_steps",
    }),
    "exclude_bins": Setting("a mask on the loss", {BUILT_IN: "exclude_bins"}),
    "include_bins": Setting("the classes trained on", {BUILT_IN: "include_bins"}),
    "positive_only": Setting("set negative advantages to 0", {
        BUILT_IN: "objective = wapo", "trl": "wapo_analysis.use_wapo(trainer)",
    }),
    "no_length_bias": Setting("a loss without length bias", {
        BUILT_IN: "objective = dr_grpo, or loss_mean_level = global",
        "trl": "loss_type = dr_grpo", "ms-swift": "loss_type = dr_grpo",
        "verl": f"{_VERL}.loss_agg_mode = seq-mean-token-sum-norm",
        "skyrl": f"{_SKYRL}.loss_reduction = seq_mean_token_sum_norm",
        "nemo-rl": "loss_fn.token_level_loss = true",
        "open-instruct": "loss_denominator = a constant",
    }),
    "float32": Setting("float32 weights", {
        BUILT_IN: "precision = float32", "trl": "fp16 = bf16 = False",
    }),
}  # fmt: skip


def trainer_of(manifest: Mapping[str, Any]) -> str | None:
    """Which trainer's names a run is told of; None if unknown, as for a loop of one's own.

    An imported run is of the trainer whose log it was, so far as the importer knows.

    Examples
    --------
    >>> trainer_of({"source": "import", "import": {"trainer": "OpenRLHF"}})
    'openrlhf'
    """
    imported = manifest.get("import")
    told = imported if isinstance(imported, Mapping) else {}
    for name in (manifest.get("source"), told.get("trainer"), told.get("format")):
        found = _BY_SPELLING.get(_spelling(str(name)))
        if found is not None:
            return found
    return None


def setting_name(name: str, trainer: str | None) -> str:
    """Name of a setting in a trainer, or plain words for it."""
    setting = SETTINGS[name]
    return setting.names.get(trainer, setting.words) if trainer else setting.words


def has_setting(name: str, trainer: str | None) -> bool:
    """Whether a trainer is known to have a setting."""
    return trainer is not None and trainer in SETTINGS[name].names


def _spelling(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


_BY_SPELLING: Final = {
    _spelling(name): name for setting in SETTINGS.values() for name in setting.names
}
