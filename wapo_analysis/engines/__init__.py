"""The same recipe on somebody else's distributed trainer, TRL's.

Here is what our settings are called in its GRPOConfig, and which have no counterpart there.
"""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch

from wapo_analysis.declare import assigned, declared_settings
from wapo_analysis.errors import UserError, counted, unknown_name
from wapo_analysis.train.config import TrainConfig

#: Folder of a run that holds TRL's checkpoints.
STATE = "trl"
_OBJECTIVE, _RECORDING, _DATA = "use_objective", "attach", "train_dataset"
_MODEL, _RUN, _EVALUATION = "model", "the run folder", "the first process"

#: Where a setting of ours goes on this engine; one that is not here is refused off its default.
COUNTERPARTS: Final[Mapping[str, str]] = {
    "objective": _OBJECTIVE, "clip_eps": _OBJECTIVE, "mask_ratio_low": _OBJECTIVE,
    "mask_ratio_high": _OBJECTIVE, "use_importance_sampling": _OBJECTIVE,
    "include_bins": _OBJECTIVE, "exclude_bins": _OBJECTIVE, "loss_mean_level": _OBJECTIVE,
    "mask_negative_advantages": _OBJECTIVE, "mask_positive_advantages": _OBJECTIVE,
    "max_seq_len": _OBJECTIVE,
    "task": "train_dataset, reward_funcs", "data": _DATA, "eval_data": _DATA,
    "eval_fraction": _DATA, "context_words": _DATA, "prompts_per_step": "generation_batch_size",
    "model": _MODEL, "lora_rank": _MODEL, "lora_alpha": _MODEL, "lora_targets": _MODEL,
    "precision": "bf16", "deterministic": "full_determinism",
    "gradient_checkpointing": "gradient_checkpointing", "device": "use_cpu",
    "chat": _DATA, "system_prompt": _DATA, "max_prompt_tokens": _DATA,
    "temperature": "temperature", "max_new_tokens": "max_completion_length", "steps": "max_steps",
    "rollouts_per_prompt": "num_generations", "epochs": "num_iterations",
    "minibatches": "steps_per_generation", "microbatch_size": "per_device_train_batch_size",
    "lr": "learning_rate", "lr_schedule": "create_scheduler", "warmup_steps": "create_scheduler",
    "optimizer": "optim", "weight_decay": "weight_decay", "beta1": "adam_beta1",
    "beta2": "adam_beta2", "max_grad_norm": "max_grad_norm", "seed": "seed",
    "checkpoint_every": "save_steps", "keep_checkpoints": "save_total_limit",
    "log_to": "report_to", "label": _RUN, "engine": _RUN, "trl_settings": "GRPOConfig",
    "eval_every": _EVALUATION, "eval_prompts": _EVALUATION, "eval_samples": _EVALUATION,
    "token_every": _RECORDING, "token_fraction": _RECORDING, "rescore_every": _RECORDING,
    "probe_every": _RECORDING, "probe_rows": _RECORDING, "capture_mode": _RECORDING,
    "topk": _RECORDING, "audit": _RECORDING,
    "on_warning": _RECORDING, "on_critical": _RECORDING,
}  # fmt: skip
_TOLD: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OPTIM = {"adamw": "adamw_torch", "sgd": "sgd"}
_LOGS = {"none": [], "tensorboard": ["tensorboard"], "wandb": ["wandb"]}


class ProcessFailed(RuntimeError):
    """Another process of the run has failed."""

    def __str__(self) -> str:
        return "another process of this run has ended or does not answer"


def launched() -> tuple[int, int]:
    """Rank of this process and number of processes, as a launcher has told; else 0 and 1."""
    if not all(name in os.environ for name in _TOLD):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def check_gpus(config: TrainConfig, processes: int) -> None:
    """Refuse more processes than this machine has GPUs.

    Raises UserError if there are more, and the run is one on GPUs.
    """
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", processes)), torch.cuda.device_count()
    if processes > 1 and _uses_cuda(config) and here > gpus:
        raise UserError(
            f"{here} processes on a machine with {counted(gpus, 'GPU')}; start at most "
            f"{gpus}, or set device to cpu"
        )


def check_counterparts(config: TrainConfig) -> None:
    """Refuse settings that this engine has no counterpart of."""
    for name, declared in declared_settings(TrainConfig).items():
        if name not in COUNTERPARTS and getattr(config, name) != declared.default:
            raise UserError(f"{name} has no counterpart on engine trl; leave it at its default")
    if config.capture_mode == "auto":
        raise UserError("capture_mode auto is of the built-in trainer; set passive or replace")


def trl_settings(config: TrainConfig, out: Path, processes: int) -> dict[str, Any]:
    """Settings of TRL's GRPOConfig for a recipe.

    Raises UserError if a mini-batch cannot be split evenly, or a setting of TRL's is unknown or
    ours to set. ``processes``: processes that share each mini-batch.
    """
    update = config.prompts_per_step * config.rollouts_per_prompt // config.minibatches
    if update % processes:
        raise UserError(
            f"a mini-batch of {update} rollouts (prompts_per_step {config.prompts_per_step} x "
            f"rollouts_per_prompt {config.rollouts_per_prompt} / minibatches {config.minibatches}) "
            f"cannot be split evenly over {processes} processes"
        )
    own = update // processes
    most = min(config.microbatch_size or own, own)
    micro = next(size for size in range(most, 0, -1) if own % size == 0)
    every = config.checkpoint_every or config.steps
    settings = {
        "output_dir": str(out / STATE),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": own // micro,
        "steps_per_generation": own // micro * config.minibatches,
        "num_generations": config.rollouts_per_prompt,
        "num_iterations": config.epochs,
        "max_steps": config.steps * updates_per_batch(config),
        "max_completion_length": config.max_new_tokens or config.load_task().max_new_tokens,
        "temperature": config.temperature,
        "beta": 0.0,
        "learning_rate": config.lr,
        "optim": _OPTIM[config.optimizer],
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "full_determinism": config.deterministic,
        _checkpointing(): config.gradient_checkpointing,
        "bf16": _is_mixed(config),
        "use_cpu": not _uses_cuda(config),
        "save_strategy": "steps",
        "save_steps": every * updates_per_batch(config),
        "save_total_limit": config.keep_checkpoints,
        "report_to": _LOGS.get(config.log_to, ["tensorboard", "wandb"]),
        "logging_steps": 1,
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "disable_dropout": True,
        "ddp_find_unused_parameters": False,
    }
    return settings | _passed_on(config, settings)


def updates_per_batch(config: TrainConfig) -> int:
    """Optimizer updates on one batch of rollouts."""
    return config.epochs * config.minibatches


def _checkpointing() -> str:
    """Name of the setting, which transformers 6 will no longer call gradient_checkpointing."""
    from trl import GRPOConfig

    new = "activation_checkpointing"
    known = {field.name for field in fields(GRPOConfig)}
    return new if new in known else "gradient_checkpointing"


def _uses_cuda(config: TrainConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()


def _is_mixed(config: TrainConfig) -> bool:
    return config.precision == "bf16-mixed" or (
        config.precision == "auto" and _uses_cuda(config) and not config.probe_every
    )


def _passed_on(config: TrainConfig, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are TRL's alone, from NAME=VALUE."""
    from trl import GRPOConfig

    known = {field.name for field in fields(GRPOConfig)}
    found = assigned(config.trl_settings, "--trl")
    for name in found:
        if name not in known:
            raise unknown_name("setting of TRL's GRPOConfig", name, sorted(known))
        if name in ours:
            raise UserError(f"{name} of TRL follows from our own settings (docs/scale.md)")
    return found
