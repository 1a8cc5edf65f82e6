"""What a TRL trainer is: can it be watched, how does it clip, what goes into the manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture.trl.stats import causal_model
from wapo_analysis.errors import UserError
from wapo_analysis.store import Manifest

SCORER = "_get_per_token_logps_and_entropies"
_NEEDED = ("_compute_loss", "_generate_and_score_completions", "training_step", "add_callback")
_CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_CONFIG = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "num_generations", "num_iterations", "max_prompt_length",
    "max_completion_length", "temperature", "top_p", "top_k", "beta", "epsilon", "epsilon_high",
    "delta", "loss_type", "scale_rewards", "importance_sampling_level", "top_entropy_quantile",
    "mask_truncated_completions", "entropy_coef", "off_policy_mask_threshold", "use_vllm",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "max_grad_norm",
    "max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type", "optim", "bf16", "fp16",
)  # fmt: skip


def check_trainer(trainer: Any) -> None:
    """Refuse what is not a GRPOTrainer.

    Raises
    ------
    UserError
        Naming the object's type and what is allowed.
    """
    missing = [name for name in _NEEDED if not callable(getattr(trainer, name, None))]
    if missing:
        raise UserError(
            f"cannot attach to {type(trainer).__name__}: it has no {missing[0]}; allowed are trl's "
            "GRPOTrainer (0.21 or newer) and its subclasses; watch a loop of your own with "
            "wapo_analysis.Recorder"
        )


def hidden_tensors(trainer: Any) -> str | None:
    """Name the setting that keeps per-token tensors inside a kernel, None if there is none."""
    kinds = type(trainer).__mro__
    if any("unsloth" in f"{kind.__module__}.{kind.__name__}".lower() for kind in kinds):
        return "Unsloth's compiled trainer"
    uses_liger = getattr(trainer, "use_liger_loss", False) or getattr(
        trainer, "use_liger_kernel", False
    )
    if uses_liger and hasattr(trainer, "liger_grpo_loss"):
        return "Liger's fused GRPO loss (use_liger_kernel / use_liger_loss)"
    return None


def logps_and_entropies(scored: Any) -> tuple[Tensor | None, Tensor | None]:
    """Pick both tensors from whatever the trainer's scoring returns: tuple, dict or tensor."""
    if isinstance(scored, Tensor):
        return scored, None
    if isinstance(scored, Mapping):
        return scored.get("logps"), scored.get("entropies")
    return scored[0], scored[1] if len(scored) > 1 else None


@dataclass(frozen=True)
class ClipRule:
    """Clip of the surrogate, as TRL counts it; no bounds for losses whose clip keeps gradient.

    Attributes
    ----------
    low, high : float
        A ratio below ``low`` stops a token with A < 0, one above ``high`` a token with A > 0.
    delta : float
        A ratio above it stops a token with A < 0 (two-sided clipping).
    per_sequence : bool
        The ratio is the geometric mean over the rollout.
    """

    low: float
    high: float
    delta: float
    per_sequence: bool

    def clipped(self, log_ratio_BT: Tensor, mask_BT: Tensor, advantage_BT: Tensor) -> Tensor:
        """Tokens whose gradient the clip takes away.

        Parameters
        ----------
        log_ratio_BT, mask_BT, advantage_BT : Tensor, shape (B, T)
            ln(pi / pi_old) in nats, loss mask, advantage.

        Returns
        -------
        Tensor of bool, shape (B, T)
        """
        if self.per_sequence:
            count = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
            log_ratio_BT = (log_ratio_BT * mask_BT).sum(dim=1, keepdim=True) / count
        ratio = log_ratio_BT.exp()
        stopped = (ratio > self.high) & (advantage_BT > 0)
        stopped = stopped | ((ratio < self.low) & (advantage_BT < 0))
        return (stopped | ((ratio > self.delta) & (advantage_BT < 0))) & mask_BT.bool()


def clip_rule(trainer: Any) -> ClipRule:
    """Clip rule in force: of the WAPO objective if `use_wapo` is on, else of the loss type."""
    sequence = getattr(trainer, "importance_sampling_level", "token") == "sequence"
    wapo = getattr(trainer, "_wapo_objective", None)
    if wapo is not None:
        return ClipRule(wapo.bounds.low, wapo.bounds.high, torch.inf, False)
    # TRL 0.21 has no other losses; a subclass without loss_type keeps the surrogate it inherits.
    if getattr(trainer, "loss_type", "grpo") not in _CLIPPED_LOSSES:
        return ClipRule(-torch.inf, torch.inf, torch.inf, sequence)
    delta = getattr(trainer.args, "delta", None)
    return ClipRule(
        1 - float(getattr(trainer, "epsilon_low", 0.2)),
        1 + float(getattr(trainer, "epsilon_high", 0.2)),
        torch.inf if delta is None else float(delta),
        sequence,
    )


def new_manifest(trainer: Any, name: str | None, label: str | None) -> Manifest:
    """Manifest of a watched run: objective, model, settings that matter, versions."""
    model, rule = causal_model(trainer), clip_rule(trainer)
    wapo = getattr(trainer, "_wapo_objective", None)
    loss = wapo.name if wapo is not None else str(getattr(trainer, "loss_type", "grpo"))
    config = {key: getattr(trainer.args, key) for key in _CONFIG if hasattr(trainer.args, key)}
    settings = {"name": loss, "bounds": [rule.low, rule.high], "delta": rule.delta}
    seed, planned = trainer.args.seed, int(getattr(trainer.args, "max_steps", 0))
    parameters = list(trainer.model.parameters())
    return Manifest.begun(
        "trl",
        ("trl", "torch", "transformers", "accelerate", "peft", "vllm"),
        name=name or f"{loss} seed {seed}",
        label=label,
        trainer=type(trainer).__name__,
        objective=settings,
        model=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        tokenizer=type(trainer.processing_class).__name__,
        vocabulary=int(model.get_output_embeddings().weight.shape[0]),
        parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        seed=seed,
        device=str(trainer.accelerator.device),
        processes=trainer.accelerator.num_processes,
        planned_steps=planned if planned > 0 else None,
        config={key: _plain(value) for key, value in config.items()},
        not_in_coef=_beside_logp(trainer),
    )


def _beside_logp(trainer: Any) -> list[str]:
    """Parts of the loss whose gradient does not pass through the log-probabilities."""
    parts = []
    if getattr(trainer, "_entropy_bonus_enabled", False):
        parts.append("entropy bonus")
    if getattr(trainer, "aux_loss_enabled", False):
        parts.append("router load-balancing loss")
    return parts


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool, str, type(None))) else str(value)
