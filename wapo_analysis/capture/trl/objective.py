"""WAPO for trl's GRPOTrainer: one call, and the trainer's loss is our own objective.

Shapes: B rollouts of a gradient pass, T completion positions.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture.hooks import Patches
from wapo_analysis.capture.trl.trainer import (
    SCORER,
    hidden_tensors,
    kind_of,
    logps_and_entropies,
    loss_mask,
)
from wapo_analysis.errors import UserError
from wapo_analysis.objectives.advantages import RESIDUAL_ULPS
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.loss import LossOutput, keep_tokens, policy_loss
from wapo_analysis.objectives.weights import BatchWeights, batch_weights, fixed_length_weight

UNITS_KEY = "wapo_multiplier"
_MARK = "_wapo_objective"
_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
    "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
"""What else the model's forward needs, under the names that TRL's batch and scoring share."""


def use_wapo(trainer: Any, *, clip_eps: float = 9.0, max_seq_len: int | None = None) -> Patches:
    """Turn a trl GRPOTrainer into WAPO: positive-only gate, A = r - mean, upper clip only.

    The loss of one optimizer step is, over the rollouts with A > 0 of its batch,
    ``sum -min(x A, min(x, 1 + clip_eps) A) / (Z * group size * max_seq_len)`` with x = pi / pi_old
    and Z the groups that have such a rollout; pi_old is what vLLM reported, else the trainer's old
    log-probabilities. It is computed by `wapo_analysis.objectives.loss.policy_loss`.

    Parameters
    ----------
    trainer : trl.GRPOTrainer
        TRL 0.21 or newer, before ``train()``.
    clip_eps : float
        Upper clip: ratios are held at 1 + clip_eps.
    max_seq_len : int, optional
        Constant length L of the mean; None takes the trainer's limits, prompt (if it has one)
        plus completion. It only scales the learning rate.

    Returns
    -------
    Patches
        Its ``close()`` makes the trainer a plain GRPOTrainer again; nothing else needs it.

    Raises
    ------
    UserError
        If it is no GRPOTrainer or has a loss of its own, is WAPO already, or has a setting that
        WAPO has no place for.

    Notes
    -----
    Source: arXiv 2606.16154 and docs/objectives.md. Call it before `wapo_analysis.attach`.
    """
    _check_loss(trainer)
    if _MARK in vars(trainer):
        raise UserError("this trainer is WAPO already; close() what use_wapo returned to go back")
    _check_settings(trainer)
    limit = max_seq_len or _longest(trainer)
    config = ObjectiveConfig(name="wapo", clip_eps=clip_eps, max_seq_len=limit)
    patches = Patches()
    patches.set(trainer, _MARK, config)
    # TRL 0.21 has a flag here, later ones a word.
    flag = isinstance(getattr(trainer, "scale_rewards", True), bool)
    patches.set(trainer, "scale_rewards", False if flag else "none")
    loss = _WapoLoss(trainer, config)
    patches.wrap(trainer, "_calculate_rewards", loss.keep_rewards)
    patches.wrap(trainer, "_generate_and_score_completions", loss.generate)
    patches.wrap(trainer, "_compute_loss", loss.compute)
    return patches


def _longest(trainer: Any) -> int:
    prompt = getattr(trainer, "max_prompt_length", None) or 0
    return int(prompt) + int(trainer.max_completion_length)


def _check_loss(trainer: Any) -> None:
    """Refuse a loss that WAPO would replace without a word."""
    kind = kind_of(trainer)
    if kind != "GRPOTrainer":
        raise UserError(f"WAPO replaces the loss of trl's GRPOTrainer; {kind} has one of its own")
    for owner in type(trainer).__mro__:
        if owner.__module__.startswith("trl."):
            return
        for name in ("compute_loss", "_compute_loss"):
            if name in vars(owner) and not _passes_on(vars(owner)[name]):
                raise UserError(
                    f"WAPO replaces the loss of trl's GRPOTrainer; {owner.__name__} has one of its "
                    f"own ({name})"
                )


def _passes_on(method: Callable[..., Any]) -> bool:
    """Whether a loss returns that of the class above as it is: a look at it, no loss of its own."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return False
    plain: set[str] = set()
    changed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            whole = isinstance(node, ast.Assign) and _calls_above(node.value, method.__name__)
            (plain if whole else changed).update(ast.unparse(target) for target in targets)
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return bool(returned) and all(
        value is not None
        and (ast.unparse(value) in plain - changed or _calls_above(value, method.__name__))
        for value in returned
    )


def _calls_above(value: ast.expr, name: str) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) == f"super().{name}"


def _check_settings(trainer: Any) -> None:
    """Refuse settings that change the loss and that WAPO would silently drop."""
    args = trainer.args
    refused = {
        "beta": getattr(args, "beta", 0.0) != 0,
        "importance_sampling_level": getattr(args, "importance_sampling_level", "token") != "token",
        "top_entropy_quantile": getattr(args, "top_entropy_quantile", 1.0) < 1,
        "off_policy_mask_threshold": getattr(args, "off_policy_mask_threshold", None) is not None,
        "entropy_coef": bool(getattr(trainer, "_entropy_bonus_enabled", False)),
        "multi_objective_aggregation": _normalizes_objectives(args),
        "router_aux_loss_coef": bool(getattr(trainer, "aux_loss_enabled", False)),
    }
    used = [name for name, given in refused.items() if given]
    if used:
        raise UserError(
            f"WAPO has no {used[0]}; leave it at its default (the others WAPO does not take: "
            f"{', '.join(name for name in refused if name != used[0])})"
        )
    hidden = hidden_tensors(trainer)
    if hidden is not None:
        raise UserError(f"WAPO needs per-token log-probabilities, which {hidden} keeps to itself")


def _normalizes_objectives(args: Any) -> bool:
    return str(getattr(args, "multi_objective_aggregation", "sum_then_normalize")) != (
        "sum_then_normalize"
    )


class _WapoLoss:
    """The three calls of a GRPOTrainer that WAPO replaces or follows."""

    def __init__(self, trainer: Any, config: ObjectiveConfig) -> None:
        self._trainer, self._config = trainer, config
        self._largest_reward: Tensor | None = None

    def keep_rewards(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keep the largest reward of each group: the scale of its rounding."""
        rewards = original(*args, **kwargs)
        weights = self._trainer.reward_weights.to(rewards.device).unsqueeze(0)
        total = (rewards * weights).nansum(dim=1).abs()
        self._largest_reward = total.view(-1, self._group_size()).amax(dim=1)
        return rewards

    def _group_size(self) -> int:
        training = self._trainer.model.training
        plain = self._trainer.num_generations
        return int(plain if training else getattr(self._trainer, "num_generations_eval", plain))

    def generate(self, original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Set rounding residues of r - mean to 0 and add the batch's multiplier."""
        batch = original(inputs, *args, **kwargs)
        own = batch["advantages"]
        everyone = self._trainer.accelerator.gather(own)
        size, largest = self._group_size(), self._largest_reward
        assert largest is not None
        floor = RESIDUAL_ULPS * torch.finfo(everyone.dtype).eps * largest.repeat_interleave(size)
        everyone = torch.where(everyone.abs() <= floor, 0.0, everyone)
        first = self._trainer.accelerator.process_index * len(own)
        batch["advantages"] = everyone[first : first + len(own)]
        weights = self._weights(everyone, size)
        # One number per rollout, for TRL shuffles and splits what has a first dimension.
        batch[UNITS_KEY] = torch.full_like(own, weights.multiplier * self._updates())
        return batch

    def _weights(self, advantages: Tensor, group_size: int) -> BatchWeights:
        group = torch.arange(len(advantages)) // group_size
        return batch_weights(
            self._config,
            advantages.double().cpu().numpy(),
            torch.ones(len(advantages)).numpy(),  # lengths do not enter a constant-length mean
            group.numpy(),
            group_size,
            world_size=self._trainer.accelerator.num_processes,
        )

    def _updates(self) -> float:
        """Optimizer steps a generated batch is split over, below 1 if a step takes several."""
        args = self._trainer.args
        if not self._trainer.model.training:
            return 1.0
        return float(args.steps_per_generation) / float(args.gradient_accumulation_steps)

    def compute(self, original: Callable[..., Any], model: Any, inputs: Any) -> Any:
        """Loss of one gradient pass, a scalar."""
        mask = loss_mask(inputs)
        logps, entropies = self._score(model, inputs)
        old = inputs.get("old_per_token_logps")
        old = logps.detach() if old is None else old
        sampler = inputs.get("sampling_per_token_logps")
        if sampler is not None:
            old = torch.where(sampler.isnan(), old, sampler)
        advantages = inputs["advantages"]
        keep = keep_tokens(self._config, advantages, mask, torch.zeros_like(mask))
        weight = self._constant_weight(advantages)
        out = policy_loss(self._config, logps, old, advantages, mask, keep, weight)
        self._log(mask, entropies, out)
        loss = out.loss * inputs[UNITS_KEY][0].to(out.loss.dtype)
        return loss * self._divisor()

    def _constant_weight(self, advantages: Tensor) -> Tensor:
        weight = fixed_length_weight(self._group_size(), self._config.max_seq_len)
        return torch.full_like(advantages, weight)

    def _divisor(self) -> float:
        """Accumulation steps that Trainer (TRL 0.21) or accelerate will divide the loss by.

        accelerate divides with transformers 5.0 to 5.2, where both count the same steps.
        """
        trainer = self._trainer
        if not trainer.model.training:
            return 1.0
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = getattr(trainer, "compute_loss_func", None) is not None
        by_trainer = 1 if scaled else trainer.current_gradient_accumulation_steps
        deepspeed = str(trainer.accelerator.distributed_type).endswith("DEEPSPEED")
        by_accelerate = 1 if deepspeed else trainer.accelerator.gradient_accumulation_steps
        return float(by_trainer * by_accelerate)

    def _score(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor | None]:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        score = getattr(self._trainer, SCORER)
        extra = {name: inputs[name] for name in _MULTIMODAL if name in inputs}
        width = inputs["completion_ids"].shape[1]
        scored = score(model, ids, attention, width, compute_entropy=True, **extra)
        logps, entropies = logps_and_entropies(scored)
        if logps is None:
            raise UserError("the trainer returned no log-probabilities; WAPO cannot be computed")
        return logps, entropies

    def _log(self, mask: Tensor, entropies: Tensor | None, out: LossOutput) -> None:
        """Feed the trainer's own entries, which its replaced loss would have filled."""
        training = self._trainer.model.training
        metrics = self._trainer._metrics["train" if training else "eval"]
        shown = {"clip_ratio/high_mean": (out.clipped & out.kept).float()}
        if entropies is not None:
            shown["entropy"] = entropies.detach()
        for name, values in shown.items():
            mean = values[mask].float().mean() if bool(mask.any()) else values.new_zeros(())
            metrics[name].append(self._trainer.accelerator.gather(mean).nanmean().item())
