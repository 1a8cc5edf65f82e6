"""Padded (B, T) tensors of a gradient pass to token rows; the rollouts of a step to columns.

Shapes: B rollouts of the pass, T positions, V vocabulary, N tokens under the mask. Nothing here
draws random numbers, keeps a graph or changes a tensor it was given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.derive import reward_columns, rollout_sums, step_columns
from wapo_analysis.errors import UserError
from wapo_analysis.record.tokens import TokenPass
from wapo_analysis.stats import TokenStats, token_stats
from wapo_analysis.table import Array

MATCH = 0.1
"""Mean distance in nats beyond which log-probabilities do not belong to the logits."""


@dataclass(frozen=True, kw_only=True)
class BatchPass:
    """What one call of ``watch_batch`` was given, and what its backward pass will be read with.

    Attributes
    ----------
    tokens : TokenPass
        The N tokens under the mask.
    row, column : Tensor of int64, shape (N,)
        Where they stand in the (B, T) tensors.
    rollouts, groups, lengths : Tensor, shape (B,)
        Number, prompt and token count of each rollout.
    advantages : Tensor, shape (B,)
        Advantage of each rollout; the mean over its tokens if it was given per token.
    log_ratio : Tensor, shape (N,), or None
        ``logp - logp_old`` as the loss saw it, nats.
    clip : tuple of float, or None
        Bounds of the ratio, if they are known.
    choose_kept : bool
        Whether the gradient is to tell which tokens took part in the loss.
    needs_grad : bool
        A backward pass is expected.
    """

    tokens: TokenPass
    row: Tensor
    column: Tensor
    rollouts: Tensor
    groups: Tensor
    lengths: Tensor
    advantages: Tensor
    log_ratio: Tensor | None
    clip: tuple[float, float] | None
    choose_kept: bool
    needs_grad: bool

    def read_gradient(self, gradient: Tensor, loss_scale: float) -> None:
        """Fill coef and the clip and kept flags from dL/dlogp, shape (B, T).

        A token of non-zero advantage whose gradient is exactly zero was either stopped by the
        clip or left out of the loss. It was stopped if its ratio lies outside the clip bounds;
        where those are unknown, if its ratio has already moved the way its advantage pushes, the
        one side on which a clip acts.
        """
        coef = -gradient.detach()[self.row, self.column] / loss_scale
        idle = (coef == 0) & (self.tokens.advantage != 0)
        if not self.choose_kept:
            assert self.tokens.kept is not None
            stopped = idle & self.tokens.kept
        elif self.log_ratio is None:
            stopped = torch.zeros_like(idle)
        elif self.clip is None:
            stopped = idle & (self.log_ratio * self.tokens.advantage > 0)
        else:
            low, high = (math.log(b) if b > 0 else -math.inf for b in self.clip)
            stopped = idle & ((self.log_ratio < low) | (self.log_ratio > high))
        self.tokens.coef, self.tokens.clipped = coef, stopped
        if self.choose_kept:
            self.tokens.kept = ~idle | stopped


def batch_pass(
    logp: Tensor,
    tokens: Tensor | None,
    mask: Tensor,
    advantages: Tensor,
    groups: Tensor | None,
    *,
    rollouts: Tensor | None,
    first_rollout: int,
    temperature: float,
    minibatch: int,
    logits: Tensor | None = None,
    entropy: Tensor | None = None,
    collision: Tensor | None = None,
    logp_old: Tensor | None = None,
    kept: Tensor | None = None,
    clip: tuple[float, float] | None = None,
) -> BatchPass:
    """Gather the N masked tokens of one gradient pass; see ``Recorder.watch_batch``.

    Rollouts without numbers get those from ``first_rollout`` on.

    Raises
    ------
    UserError
        On shapes that do not fit, or logits that do not give these log-probabilities.
    """
    _check_shapes(logp, mask, advantages, logits, (tokens, entropy, collision, logp_old, kept))
    _check_rollouts(logp, groups, rollouts)
    if rollouts is None:
        rollouts = torch.arange(len(logp)) + first_rollout
    rollouts = rollouts.detach().to(logp.device)
    mask = mask.detach().bool()
    row, column = mask.nonzero(as_tuple=True)
    advantage = advantages.detach()
    per_token = advantage[row] if advantage.dim() == 1 else advantage[row, column]
    now = logp.detach()[row, column]
    old = _flat(logp_old, row, column)
    ids = _flat(tokens, row, column)
    unknown = torch.full((len(mask),), -1, device=logp.device)
    groups = unknown if groups is None else groups.detach().to(logp.device)
    stats = _stats(now, tokens, logits, mask, temperature)
    given_s = _flat(collision, row, column)
    rest = None if given_s is None else (given_s - now.exp().square()).clamp(min=0)
    return BatchPass(
        tokens=TokenPass(
            group=groups[row],
            rollout=rollouts[row],
            position=(mask.cumsum(1) - 1)[row, column],
            token_id=unknown[row] if ids is None else ids,
            advantage=per_token,
            logp=now if stats is None else stats.logp,
            logp_old=old,
            entropy=_flat(entropy, row, column) if stats is None else stats.entropy,
            collision_rest=rest if stats is None else stats.collision_rest,
            collision_logp_rest=None if stats is None else stats.collision_logp_rest,
            kept=_flat(kept, row, column),
            top1=None if stats is None else stats.top1,
            minibatch=minibatch,
        ),
        row=row,
        column=column,
        rollouts=rollouts,
        groups=groups,
        lengths=mask.sum(1),
        advantages=advantage if advantage.dim() == 1 else _masked_mean(advantage, mask),
        log_ratio=None if old is None else now - old,
        clip=clip,
        choose_kept=kept is None,
        needs_grad=logp.requires_grad,
    )


def _check_rollouts(logp: Tensor, groups: Tensor | None, rollouts: Tensor | None) -> None:
    for name, values in (("groups", groups), ("rollouts", rollouts)):
        if values is not None and values.shape != logp.shape[:1]:
            raise UserError(f"{name} must have shape {tuple(logp.shape[:1])}, one per rollout")


def _check_shapes(
    logp: Tensor,
    mask: Tensor,
    advantages: Tensor,
    logits: Tensor | None,
    others: Sequence[Tensor | None],
) -> None:
    if logp.dim() != 2:
        raise UserError(f"logp must have shape (rollouts, positions), got {tuple(logp.shape)}")
    for tensor in (mask, *others):
        if tensor is not None and tensor.shape != logp.shape:
            raise UserError(
                f"logp has shape {tuple(logp.shape)}, another per-token tensor "
                f"{tuple(tensor.shape)}; all of them must be (rollouts, positions)"
            )
    if advantages.shape not in (logp.shape, logp.shape[:1]):
        raise UserError(
            f"advantages must have shape {tuple(logp.shape[:1])} or {tuple(logp.shape)}, "
            f"got {tuple(advantages.shape)}"
        )
    if logits is not None and (logits.dim() != 3 or logits.shape[:2] != logp.shape):
        raise UserError(f"logits must be {tuple(logp.shape)} x V, got {tuple(logits.shape)}")


def _flat(values: Tensor | None, row: Tensor, column: Tensor) -> Tensor | None:
    return None if values is None else values.detach()[row, column]


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _stats(
    logp: Tensor,
    tokens: Tensor | None,
    logits: Tensor | None,
    mask: Tensor,
    temperature: float,
) -> TokenStats | None:
    """Statistics of the N tokens under the mask; None without logits.

    Raises
    ------
    UserError
        If the logits do not give these log-probabilities: shifted by one, or at another
        temperature. Rounding in half precision passes.
    """
    if logits is None:
        return None
    if tokens is None:
        raise UserError("logits were given without the sampled tokens")
    stats = token_stats(logits.detach(), tokens.detach(), temperature, mask)
    if not len(logp):
        return stats
    away = float((stats.logp - logp).abs().nanmean())
    if away > MATCH:
        raise UserError(
            f"logits and logp disagree by {away:.2g} nats on average: give the logits that "
            "predict each token (shifted by one), before the division by temperature, and the "
            "temperature to Recorder"
        )
    return stats


def rollout_table(batches: Sequence[BatchPass]) -> dict[str, Any]:
    """Rollout, group, advantage and length of every rollout of a step, each once, by number.

    One copy brings all of it from the device.
    """
    if not batches:
        return {}
    names = ("rollouts", "groups", "advantages", "lengths")
    stacked = torch.cat(
        [torch.stack([getattr(b, name).detach().double() for name in names]) for b in batches], 1
    )
    rollout, group, advantage, length = stacked.cpu().numpy()
    numbers, first = np.unique(rollout, return_index=True)
    return {
        "rollout": numbers.astype(np.int64),
        "group": group[first].astype(np.int64),
        "advantage": advantage[first],
        "length": length[first],
    }


@dataclass(frozen=True)
class StepRollouts:
    """What the watched batches of a step and its rewards say.

    Attributes
    ----------
    row : dict
        Columns of the ``steps`` table.
    columns : dict
        Columns of the ``rollouts`` table; empty without a reward for each rollout.
    sums : dict
        Sums over rollouts, see `wapo_analysis.derive.rollout_sums`.
    """

    row: dict[str, float]
    columns: dict[str, Any]
    sums: dict[str, float]


def step_rollouts(
    batches: Sequence[BatchPass],
    reward: Tensor | Sequence[float] | float | None,
    prompts: Sequence[str] | None = None,
    completions: Sequence[str] | None = None,
) -> StepRollouts:
    """Rollouts of a step from its batches and what the caller knows; see `Recorder.finish_step`.

    Raises
    ------
    UserError
        If rewards or texts are not as many as the rollouts that were watched.
    """
    table = rollout_table(batches)
    sums = rollout_sums({"length": table["length"]} if table else {})
    row: dict[str, float] = step_columns(sums)
    if reward is None:
        return StepRollouts(row, {}, sums)
    rewards = _numbers(reward)
    if rewards.ndim == 0:
        return StepRollouts({**row, "reward": float(rewards)}, {}, sums)
    given = {"reward": rewards, "prompt": prompts, "completion": completions}
    table |= {name: list(values) for name, values in given.items() if values is not None and table}
    _check_counts(table)
    return StepRollouts({**row, **reward_columns(rewards, table.get("group"))}, table, sums)


def _numbers(values: Tensor | Sequence[float] | float) -> Array:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().double().cpu().numpy())
    return np.asarray(values, np.float64)


def _check_counts(rollouts: Mapping[str, Any]) -> None:
    """Per-rollout values must be as many as the rollouts that were watched."""
    for name, values in rollouts.items():
        if len(values) != len(rollouts["rollout"]):
            raise UserError(
                f"{name} has {len(values)} values, but {len(rollouts['rollout'])} rollouts were "
                "watched; where a step passes a rollout more than once, give rollouts to "
                "watch_batch"
            )
