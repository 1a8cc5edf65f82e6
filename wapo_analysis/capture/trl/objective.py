"""Our objectives for trl's GRPOTrainer: one call, and the trainer's loss is one of them.

Shapes: B rollouts of a gradient pass, T completion positions, N tokens of the loss mask.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import wapo_taxonomy as tax
from torch import Tensor

from wapo_analysis.capture import Hook, Patches
from wapo_analysis.capture.lm_head import LmHead, whole
from wapo_analysis.capture.trl.trainer import (
    SCORER,
    behaviour_logps,
    causal_model,
    hidden_tensors,
    kind_of,
    logps_and_entropies,
    loss_mask,
)
from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import RESIDUAL_ULPS, ObjectiveConfig, group_advantages
from wapo_analysis.objectives.loss import LossOutput, keep_tokens, policy_loss
from wapo_analysis.objectives.weights import BatchWeights, batch_weights

UNITS_KEY, WEIGHT_KEY = "wapo_multiplier", "wapo_weight"
_MARK = "_wapo_objective"
#: Nats by which log-probabilities through our reading of the head may differ from the trainer's.
_LARGEST_GAP = 0.3
#: What else the model's forward needs, under the names that TRL's batch and scoring share.
_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
    "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def use_objective(trainer: Any, config: ObjectiveConfig) -> Patches:
    """Train a trl GRPOTrainer with an objective of ours, bins included.

    The loss of a gradient pass is that of `wapo_analysis.objectives.loss.policy_loss`; advantages
    and the weights of the rollouts are those of the whole generated batch, over all processes, by
    the objective's own rules. pi_old is what vLLM reported, else the trainer's old
    log-probabilities. With bins the peaks are detected from the model's last hidden states, sent
    through its head once more.

    Parameters
    ----------
    trainer : trl.GRPOTrainer
        TRL 0.21 or newer, before ``train()``.
    config : ObjectiveConfig

    Returns
    -------
    Patches
        Its ``close()`` makes the trainer a plain GRPOTrainer again; nothing else needs it.

    Raises
    ------
    UserError
        If it is no GRPOTrainer or has a loss of its own, has an objective of ours already, or a
        setting is given that the objective has no place for. While training with bins: if the
        model's head is not one that can be read.

    Notes
    -----
    Source: docs/objectives.md. Call it before `wapo_analysis.attach`. ``official`` and
    ``normalize_by_kept_tokens`` need the whole mini-batch at once, which TRL does not show.
    """
    title = config.name.upper()
    _check_loss(trainer, title)
    if _MARK in vars(trainer):
        raise UserError(
            f"this trainer is {vars(trainer)[_MARK].name.upper()} already; close() what "
            "use_objective returned to go back"
        )
    for name in ("official", "normalize_by_kept_tokens"):
        if getattr(config, name):
            raise UserError(
                f"{name} needs the built-in trainer: TRL shows a loss one micro-batch at a time"
            )
    _check_settings(trainer, title)
    patches = Patches()
    patches.set(trainer, _MARK, config)
    # TRL 0.21 has a flag here, later ones a word.
    flag = isinstance(getattr(trainer, "scale_rewards", True), bool)
    patches.set(trainer, "scale_rewards", False if flag else "none")
    loss = _ObjectiveLoss(trainer, config, patches)
    patches.wrap(trainer, "_calculate_rewards", loss.keep_rewards)
    patches.wrap(trainer, "_generate_and_score_completions", loss.generate)
    patches.wrap(trainer, "_compute_loss", loss.compute)
    return patches


def use_wapo(trainer: Any, *, clip_eps: float = 9.0, max_seq_len: int | None = None) -> Patches:
    """Turn a trl GRPOTrainer into WAPO: positive-only gate, A = r - mean, upper clip only.

    The loss of one optimizer step is, over the rollouts with A > 0 of its batch,
    ``sum -min(x A, min(x, 1 + clip_eps) A) / (Z * group size * max_seq_len)`` with x = pi / pi_old
    and Z the groups that have such a rollout.

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
        As of `use_objective`.

    Raises
    ------
    UserError
        As `use_objective`.

    Notes
    -----
    Source: arXiv 2606.16154 and docs/objectives.md. Call it before `wapo_analysis.attach`.
    """
    _check_loss(trainer, "WAPO")
    limit = max_seq_len or _longest(trainer)
    config = ObjectiveConfig(name="wapo", clip_eps=clip_eps, max_seq_len=limit)
    return use_objective(trainer, config)


def _longest(trainer: Any) -> int:
    prompt = getattr(trainer, "max_prompt_length", None) or 0
    return int(prompt) + int(trainer.max_completion_length)


def _check_loss(trainer: Any, title: str) -> None:
    """Refuse a loss that would be replaced without a word."""
    kind = kind_of(trainer)
    if kind != "GRPOTrainer":
        raise UserError(
            f"{title} replaces the loss of trl's GRPOTrainer; {kind} has one of its own"
        )
    for owner in type(trainer).__mro__:
        if owner.__module__.startswith("trl."):
            return
        for name in ("compute_loss", "_compute_loss"):
            if name in vars(owner) and not _passes_on(vars(owner)[name]):
                raise UserError(
                    f"{title} replaces the loss of trl's GRPOTrainer; {owner.__name__} has one of "
                    f"its own ({name})"
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


def _check_settings(trainer: Any, title: str) -> None:
    """Refuse settings that change the loss and that our objective would silently drop."""
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
            f"{title} has no {used[0]}; leave it at its default (the others {title} does not take: "
            f"{', '.join(name for name in refused if name != used[0])})"
        )
    hidden = hidden_tensors(trainer)
    if hidden is not None:
        raise UserError(
            f"{title} needs per-token log-probabilities, which {hidden} keeps to itself"
        )


def _normalizes_objectives(args: Any) -> bool:
    return str(getattr(args, "multi_objective_aggregation", "sum_then_normalize")) != (
        "sum_then_normalize"
    )


class _ObjectiveLoss:
    """The three calls of a GRPOTrainer that an objective of ours replaces or follows."""

    def __init__(self, trainer: Any, config: ObjectiveConfig, patches: Patches) -> None:
        self._trainer, self._config = trainer, config
        self._rewards: Tensor | None = None
        self._hidden: list[Tensor] | None = None
        self._has_bins = bool(config.include_bins or config.exclude_bins)
        if self._has_bins:
            backbone = causal_model(trainer).base_model
            patches.on_close(backbone.register_forward_hook(Hook(self._keep_hidden)).remove)

    def keep_rewards(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keep the reward of every rollout of all processes; NaN of one that no function graded."""
        rewards = original(*args, **kwargs)
        weights = self._trainer.reward_weights.to(rewards.device).unsqueeze(0)
        total = (rewards * weights).double().nansum(dim=1)
        self._rewards = total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        return rewards

    def _group_size(self) -> int:
        training = self._trainer.model.training
        plain = self._trainer.num_generations
        return int(plain if training else getattr(self._trainer, "num_generations_eval", plain))

    def generate(self, original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Put our advantages, the rollouts' weights and the multiplier into the batch."""
        batch = original(inputs, *args, **kwargs)
        own, accelerator = batch["advantages"], self._trainer.accelerator
        counts = accelerator.gather(loss_mask(batch).sum(dim=1))
        advantages = self._advantages(len(counts))
        weights = self._weights(advantages, counts)
        first = accelerator.process_index * len(own)
        rows = slice(first, first + len(own))
        batch["advantages"] = advantages[rows].to(own)
        # One number per rollout, for TRL shuffles and splits what has a first dimension.
        batch[WEIGHT_KEY] = weights.sequence_weight[rows].to(own)
        batch[UNITS_KEY] = torch.full_like(own, weights.multiplier * self._updates())
        return batch

    def _advantages(self, count: int) -> Tensor:
        """Advantage of every rollout of all processes, float64; 0 where nothing graded it."""
        rewards, self._rewards = self._rewards, None
        assert rewards is not None
        graded = rewards.isfinite().cpu()
        reward = rewards.cpu()[graded].numpy()
        group = (torch.arange(count) // self._group_size())[graded].numpy()
        known = self._config.advantages(reward, group)
        if self._config.objective.advantage != "raw":
            # Rewards come in float32: what its rounding leaves of r - mean is no advantage.
            floor = RESIDUAL_ULPS * np.finfo(np.float32).eps * np.abs(reward).max(initial=0)
            known[np.abs(group_advantages("centered", reward, group)) <= floor] = 0.0
        found = torch.zeros(count, dtype=torch.float64)
        found[graded] = torch.from_numpy(known)
        return found

    def _weights(self, advantages: Tensor, counts: Tensor) -> BatchWeights:
        size = self._group_size()
        return batch_weights(
            self._config,
            advantages.numpy(),
            counts.cpu().numpy(),
            (torch.arange(len(counts)) // size).numpy(),
            size,
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
        self._hidden = [] if self._has_bins else None
        logps, entropies = self._score(model, inputs)
        old, _ = behaviour_logps(inputs, logps)
        advantages = inputs["advantages"]
        keep = keep_tokens(self._config, advantages, mask, self._peaks(inputs, logps, mask))
        out = policy_loss(self._config, logps, old, advantages, mask, keep, inputs[WEIGHT_KEY])
        self._log(mask, entropies, out, advantages)
        units, *_ = inputs[UNITS_KEY]  # the same for every rollout
        return out.loss * units.to(out.loss.dtype) * self._divisor()

    def _keep_hidden(self, module: Any, args: Any, out: Any) -> None:
        hidden = getattr(out, "last_hidden_state", None)
        if self._hidden is not None and hidden is not None:
            self._hidden.append(hidden.detach())

    @torch.no_grad()
    def _peaks(self, inputs: Any, logps: Tensor, mask: Tensor) -> Tensor:
        """Tokens at least as likely as one expects to draw, shape (B, T); none without bins."""
        peaks, hidden, self._hidden = torch.zeros_like(mask), self._hidden, None
        if not self._has_bins:
            return peaks
        if not hidden:
            raise UserError("include_bins and exclude_bins need a model that returns hidden states")
        trainer = self._trainer
        head = causal_model(trainer).get_output_embeddings()
        states = torch.cat(hidden)[:, -mask.shape[1] - 1 : -1][mask]
        cast = bool(getattr(trainer.args, "cast_lm_head_to_fp32", False))
        kind = states.device.type
        precision = torch.autocast(kind, enabled=False) if cast else trainer.accelerator.autocast()
        with whole(head) as tensors, precision:
            stats = LmHead.of(causal_model(trainer), tensors).stats(
                states.float() if cast else states,
                inputs["completion_ids"][mask],
                float(trainer.temperature),
            )
        logp = logps.detach()[mask].float()
        gap = float((stats.logp - logp).abs().max()) if len(logp) else 0.0
        if gap > _LARGEST_GAP:
            raise UserError(
                "peaks and valleys cannot be told apart: log-probabilities through the model's "
                f"head differ from the trainer's by {gap:.2g} nats; leave out include_bins and "
                "exclude_bins"
            )
        peaks[mask] = tax.is_peak(logp.exp(), -torch.expm1(logp), stats.collision_rest)
        return peaks

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
            raise UserError(
                "the trainer returned no log-probabilities; the loss cannot be computed"
            )
        return logps, entropies

    def _log(
        self, mask: Tensor, entropies: Tensor | None, out: LossOutput, advantages: Tensor
    ) -> None:
        """Feed the trainer's own entries, which its replaced loss would have filled."""
        training = self._trainer.model.training
        metrics = self._trainer._metrics["train" if training else "eval"]
        clipped, positive = out.clipped & out.kept, advantages.unsqueeze(1) > 0
        shown = {
            "clip_ratio/low_mean": (clipped & ~positive).float(),
            "clip_ratio/high_mean": (clipped & positive).float(),
        }
        if entropies is not None:
            shown["entropy"] = entropies.detach()
        for name, values in shown.items():
            mean = values[mask].float().mean() if bool(mask.any()) else values.new_zeros(())
            metrics[name].append(self._trainer.accelerator.gather(mean).nanmean().item())
