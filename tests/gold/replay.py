"""Replaying golden cases through this project's own functions.

N rollouts, L padded length, V vocabulary, T = L - 1, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wapo_taxonomy import is_peak

from tests.gold import metrics
from tests.gold.folders import Case
from wapo_analysis.objectives.config import ObjectiveConfig, group_advantages
from wapo_analysis.objectives.loss import LossOutput, keep_tokens, policy_loss
from wapo_analysis.objectives.table import OBJECTIVES
from wapo_analysis.objectives.weights import BatchWeights, batch_weights, minibatch_weights
from wapo_analysis.stats import TokenStats, token_stats

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Replay:
    """Everything recomputed for one case in one precision."""

    arrays: Mapping[str, Array]
    """By golden array name without precision suffix."""
    values: Mapping[str, Any]
    """By the names of the case JSON's ``float64`` / ``float32`` and ``orchestrator`` objects."""


def objective_config(settings: Mapping[str, Any], official: bool = True) -> ObjectiveConfig:
    """Objective settings from a golden file's settings.

    Parameters
    ----------
    settings : mapping
        ``settings`` of a case or hazard. Without token_bin_counting the bins are ignored, as the
        published code does.
    official : bool
        Parity mode.
    """
    counted = settings.get("token_bin_counting", True)
    return ObjectiveConfig(
        name=settings["loss_type"],
        clip_eps=settings["clip_eps"],
        mask_ratio_low=settings["mask_ratio_low"],
        mask_ratio_high=settings["mask_ratio_high"],
        use_importance_sampling=bool(settings["use_importance_sampling"]),
        include_bins=tuple((settings.get("include_bins") if counted else None) or ()),
        exclude_bins=tuple((settings.get("exclude_bins") if counted else None) or ()),
        loss_mean_level=settings.get("loss_mean_level"),
        normalize_by_kept_tokens=bool(settings["normalize_by_kept_tokens"]),
        mask_negative_advantages=bool(settings["mask_negative_advantages"]),
        mask_positive_advantages=bool(settings["mask_positive_advantages"]),
        max_seq_len=settings["max_seq_len"],
        official=official,
    )


def case_weights(case: Case, config: ObjectiveConfig, advantages: Array) -> BatchWeights:
    """Weights of a case's batch."""
    return batch_weights(
        config,
        advantages,
        case.arrays["loss_mask"].sum(1),
        case.arrays["group_ids"],
        rollouts_per_prompt=case.settings["rollouts_per_example"],
        num_minibatches=case.settings["num_mini_batches"],
        world_size=case.settings["num_processes"],
    )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Inputs of the loss for a whole case, all (N, T) but advantage and group (N,)."""

    stats: TokenStats
    logp_old: Tensor
    mask: Tensor
    peak: Tensor
    advantage: Tensor
    group: Tensor


def _token_inputs(case: Case, logits: Tensor, advantages: Array) -> _Tokens:
    rows, length, _ = logits.shape
    targets = torch.from_numpy(case.arrays["input_ids"][:, 1:].astype(np.int64))
    flat = token_stats(logits[:, :-1], targets, temperature=case.settings["train_temperature"])
    stats = flat.map(lambda part: part.view(rows, length - 1))
    prob, complement = stats.logp.detach().exp(), -torch.expm1(stats.logp.detach())
    return _Tokens(
        stats=stats,
        logp_old=torch.from_numpy(case.arrays["inference_logprobs"][:, 1:]).to(logits.dtype),
        mask=torch.from_numpy(case.arrays["loss_mask"][:, 1:].astype(np.bool_)),
        peak=is_peak(prob, complement, stats.collision_rest),
        advantage=torch.from_numpy(advantages),
        group=torch.from_numpy(case.arrays["group_ids"].astype(np.int64)),
    )


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the loss: rows it saw, its result, and the view its diagnostics need."""

    rows: Tensor
    rank: int
    output: LossOutput
    weights: BatchWeights
    view: metrics.Microbatch


def _call(
    config: ObjectiveConfig,
    tokens: _Tokens,
    batch: BatchWeights,
    rows: Tensor,
    rank: int,
    counted: bool,
) -> _Call:
    mask, peak = tokens.mask[rows], tokens.peak[rows]
    advantage, logp = tokens.advantage[rows], tokens.stats.logp[rows]
    keep = keep_tokens(config, advantage, mask, peak)
    weights = minibatch_weights(config, batch, rows, keep, tokens.group[rows])
    old = tokens.logp_old[rows]
    output = policy_loss(config, logp, old, advantage, mask, keep, weights.sequence_weight)
    view = metrics.Microbatch(
        config=config,
        logp=logp.detach(),
        logp_old=old,
        entropy=tokens.stats.entropy[rows],
        valley=mask & ~peak & counted,
        mask=mask,
        keep=keep,
        advantage=advantage.to(logp.dtype),
        weight=weights.sequence_weight.to(logp.dtype),
    )
    return _Call(rows, rank, output, weights, view)


def _calls(
    case: Case, config: ObjectiveConfig, tokens: _Tokens, batch: BatchWeights
) -> list[_Call]:
    """Call the loss once per micro-batch."""
    partition = case.arrays["microbatch_index"]
    calls = []
    for index in np.unique(partition):
        rows = torch.from_numpy(np.flatnonzero(partition == index))
        rank = int(case.arrays["process_index"][rows[0]])
        calls.append(_call(config, tokens, batch, rows, rank, case.counts_bins))
    return calls


def _gradients(case: Case, logits: Tensor, logp: Tensor, calls: list[_Call]) -> dict[str, Array]:
    """Differentiate: the summed loss by logp, the scaled rank-mean loss by the logits."""
    total = torch.stack([c.output.loss for c in calls]).sum()
    (coef,) = torch.autograd.grad(total, logp, retain_graph=True)
    scale = calls[0].weights.multiplier / case.settings["num_processes"]
    (gradient,) = torch.autograd.grad(logp, logits, grad_outputs=coef * scale)
    return {"dloss_dlogp": coef.numpy(), "grad_logits": gradient.numpy()}


def _per_row(calls: list[_Call], values: list[Tensor]) -> Array:
    """Put the rows of all calls back into the order of the batch."""
    joined = torch.cat(values)
    return joined[torch.argsort(torch.cat([call.rows for call in calls]))].numpy()


def _token_arrays(calls: list[_Call]) -> dict[str, Array]:
    per_call = {
        "per_token_loss": [c.output.token_loss for c in calls],
        "token_ir": [c.view.token_ratio for c in calls],
        "sequence_ir": [c.view.sequence_ratio for c in calls],
        "keep_mask": [c.output.kept for c in calls],
        "is_valley": [c.view.valley for c in calls],
        "is_clipped": [metrics.is_clipped(c.view) for c in calls],
        "grad_magnitude": [metrics.grad_magnitude(c.view) for c in calls],
        "token_strength": [metrics.token_strength(c.view) for c in calls],
        "seq_loss_weights_effective": [c.weights.sequence_weight for c in calls],
    }
    return {name: _per_row(calls, values) for name, values in per_call.items()}


def _microbatch_arrays(calls: list[_Call]) -> dict[str, Array]:
    edges = list(metrics.PROB_BINS.values())
    mass = [metrics.binned([c.view], [metrics.grad_magnitude(c.view)], edges) for c in calls]
    summed = [metrics.summaries(c.view) for c in calls]
    return {
        "mb_loss": np.array([c.output.loss.item() for c in calls]),
        "mb_summary_sum": np.stack([s for s, _ in summed]),
        "mb_summary_count": np.stack([n for _, n in summed]),
        "mb_counts": np.stack([metrics.clip_counts(c.view) for c in calls]),
        "mb_grad_mass_sum": np.stack([s for s, _ in mass]),
        "mb_grad_mass_count": np.stack([n for _, n in mass]),
        "mb_token_count": np.stack([n for _, n in mass]),
        "mb_bin_counts": np.stack([metrics.bin_counts(c.view) for c in calls]),
    }


def _means(sums: Array, counts: Array) -> Array:
    """Mean per bin, axes [pos/neg, bin]; 0 in an empty bin."""
    return (sums / np.maximum(counts, 1)).T


def _step_arrays(calls: list[_Call]) -> dict[str, Array]:
    """Plot data of the whole step, written by rank 0."""
    views = [c.view for c in calls if c.rank == 0]
    coarse = list(metrics.PROB_BINS.values())
    strength = [metrics.token_strength(v) for v in views]
    mass, count = metrics.binned(views, [metrics.grad_magnitude(v) for v in views], coarse)
    return {
        "step_grad_mass": _means(mass, count),
        "step_token_count": count.T,
        "step_token_strength_coarse": _means(*metrics.binned(views, strength, coarse)),
        "step_token_strength_fine": _means(*metrics.binned(views, strength, metrics.fine_edges())),
    }


def _step_values(case: Case, batch: BatchWeights, calls: list[_Call]) -> dict[str, Any]:
    world = case.settings["num_processes"]
    first = [c.view for c in calls if c.rank == 0]
    summed = [metrics.summaries(v) for v in first]
    bins = sum(metrics.bin_counts(v) for v in first)
    multiplier = calls[0].weights.multiplier
    losses = [sum(c.output.loss.item() for c in calls if c.rank == r) for r in range(world)]
    names = [f"{name}_{kind}" for name in metrics.TOKEN_BINS for kind in ("eligible", "kept")]
    return {
        "loss_normalizer": batch.normalizer,
        "loss_multiplier_per_rank": [multiplier] * world,
        "step_loss_per_rank": [multiplier * loss for loss in losses],
        "rank0_bin_counts": dict(zip(names, np.ravel(bins).tolist(), strict=True))
        if case.counts_bins
        else {},
        "rank0_logged_metrics": metrics.logged_metrics(
            np.stack([s for s, _ in summed]),
            np.stack([n for _, n in summed]),
            np.stack([metrics.clip_counts(v) for v in first]),
        ),
    }


def replay_case(case: Case, dtype: torch.dtype, official: bool = True) -> Replay:
    """Recompute a case from its logits, rewards and partition alone.

    Advantages, weights, statistics, masks, losses and gradients come from the functions that
    training uses; gradients come from autograd.

    Parameters
    ----------
    case : Case
        Golden case.
    dtype : torch.dtype
        float64 or float32, precision of everything computed from the logits.
    official : bool
        Parity mode; False replays the case with the safe defaults.

    Returns
    -------
    Replay
        All quantities under their golden names.
    """
    config = objective_config(case.settings, official)
    advantages = group_advantages(
        OBJECTIVES[config.name].advantage,
        case.arrays["rewards"],
        case.arrays["group_ids"],
        official=official,
    )
    batch = case_weights(case, config, advantages)
    logits = torch.from_numpy(case.arrays["logits"]).to(dtype).requires_grad_()
    tokens = _token_inputs(case, logits, advantages)
    calls = _calls(case, config, tokens, batch)
    collision = (tokens.stats.logp.exp() ** 2 + tokens.stats.collision_rest) * case.counts_bins
    arrays = {
        "advantages": advantages,
        "seq_loss_weights": batch.sequence_weight.numpy(),
        "shifted_loss_mask": tokens.mask.numpy(),
        "trainer_logprobs": tokens.stats.logp.detach().numpy(),
        "entropies": tokens.stats.entropy.numpy(),
        "sum_p_sq": collision.detach().numpy(),
        **_gradients(case, logits, tokens.stats.logp, calls),
        **_token_arrays(calls),
        **_microbatch_arrays(calls),
        **_step_arrays(calls),
    }
    if not case.counts_bins:
        del arrays["mb_bin_counts"]
    return Replay(arrays, _step_values(case, batch, calls))
