"""Scoring completions under the policy: with its logits, or from hidden states and head alone.

Shapes: B rollouts, T completion length, V vocabulary, D hidden width, N completion tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import wapo_taxonomy as tax
from torch import Tensor

from wapo_analysis.capture import (
    PASSIVE,
    REPLACE,
    CaptureMode,
    choose_mode,
    earlier_mode,
    free_memory,
)
from wapo_analysis.capture.lm_head import LmHead, head_obstacle, inner_model
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.loss import keep_tokens
from wapo_analysis.record.topk import ReadRows
from wapo_analysis.stats import TokenStats, token_stats
from wapo_analysis.train.batch import Batch, MiniBatch
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.policy import Policy
from wapo_analysis.train.rollout import Rollouts, completion_hidden, completion_logits

#: Largest vocabulary whose logits a GPU makes by default.
LARGE_VOCABULARY = 32_768
_SHARE = 0.6  # of the free memory that a micro-batch may take by estimate


def capture_mode(
    policy: Policy,
    config: TrainConfig,
    max_new_tokens: int,
    manifest: Mapping[str, Any] | None = None,
) -> CaptureMode:
    """Decide whether a run makes logits.

    Raises UserError if "replace" was asked for and the model does not allow it. ``max_new_tokens``:
    longest completion; ``manifest``: of the run that is resumed.
    """
    asked = config.capture_mode or PASSIVE
    earlier = earlier_mode(asked, manifest or {})
    if earlier is not None:
        return earlier
    rollouts = config.prompts_per_step * config.rollouts_per_prompt // config.minibatches
    weight = LmHead.of(inner_model(policy.model)).weight
    rows = min(config.microbatch_size or rollouts, rollouts)
    logits_bytes = rows * (max_new_tokens + 1) * weight.shape[0] * weight.element_size()
    large = policy.device.type != "cpu" and weight.shape[0] > LARGE_VOCABULARY
    by_default = config.capture_mode is None and large
    obstacle = None
    if asked != PASSIVE or by_default:
        obstacle = head_obstacle(policy.model, policy.device)
    free = free_memory(policy.device)
    if by_default and obstacle is None:
        rule = f"default on a GPU: a vocabulary above {LARGE_VOCABULARY}"
        return CaptureMode(REPLACE, rule, logits_bytes, free)
    return choose_mode(asked, logits_bytes, free, obstacle)


def kept_tokens(objective: ObjectiveConfig, update: MiniBatch, stats: TokenStats) -> Tensor:
    """Tokens of a mini-batch that enter the loss, by their statistics, shape (B, T)."""
    mask, logp = update.rollouts.mask, stats.logp.detach()
    peak = torch.zeros_like(mask)
    peak.view(-1)[update.rollouts.kept] = tax.is_peak(
        logp.exp(), -torch.expm1(logp), stats.collision_rest
    )
    return keep_tokens(objective, update.advantage, mask, peak)


def rescored(
    batch: Batch, pieces: Sequence[MiniBatch], statistics: Callable[[Rollouts], TokenStats]
) -> Batch:
    """Batch with log-probabilities as training makes them, where the sampler's are rounded.

    So the ratio of a first pass over it is 1. ``pieces``: the micro-batches of a pass over them;
    ``statistics``: rollouts to the statistics of their tokens.
    """
    logp = torch.zeros_like(batch.rollouts.logp_old)
    for piece in pieces:
        kept, length = piece.rollouts.kept, piece.rollouts.mask.shape[1]
        found = statistics(piece.rollouts).logp
        logp[piece.rows[kept // length], kept % length] = found.to(logp.dtype)
    return replace(batch, rollouts=replace(batch.rollouts, logp_old=logp))


def planned(
    policy: Policy,
    config: TrainConfig,
    max_new_tokens: int,
    manifest: Mapping[str, Any] | None = None,
) -> CaptureMode:
    """Mode and size of micro-batches of a run; a continued one keeps what it began with."""
    mode = capture_mode(policy, config, max_new_tokens, manifest)
    tokens = token_budget(policy, config, mode.mode)
    if tokens is not None and manifest is not None:
        tokens = manifest.get("capture", {}).get("microbatch_tokens") or tokens
    return replace(mode, microbatch_tokens=tokens)


def token_budget(policy: Policy, config: TrainConfig, mode: str) -> int | None:
    """Tokens, padding included, of a micro-batch that fits the memory; None where none is asked.

    On a GPU whose settings give no ``microbatch_size``. An estimate on the safe side: what a layer
    of a Llama keeps for its backward pass, and the logits with their gradient.
    """
    free = free_memory(policy.device)
    if policy.device.type == "cpu" or config.microbatch_size is not None or free is None:
        return None
    text = policy.model.config.get_text_config()
    width, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = getattr(text, "intermediate_size", None) or 4 * width
    size = 2 if policy.mixed else 4
    layer = size * (10 * width + 4 * inner) + 8 * width  # products, and norms in float32
    kept = layer + layers * 4 * width if config.gradient_checkpointing else layers * layer
    logits = 0 if mode == REPLACE else 3 * size * int(text.vocab_size)
    to_come = sum(12 * p.numel() for p in policy.trainable().values())  # gradients and moments
    return max(1, int(_SHARE * max(free - to_come, 0)) // (kept + logits))


def score(
    policy: Policy,
    rollouts: Rollouts,
    temperature: float,
    mode: str,
    look: Callable[[ReadRows], None] | None = None,
) -> TokenStats:
    """Statistics of the N completion tokens, flat over the mask; logp is on the autograd graph.

    ``mode``: whether (B, T, V) logits are made on the way; ``look``: called with a function that
    gives the logits (m, V) at m places (row, position).
    """
    ids, kept = rollouts.completion_ids, rollouts.kept
    if mode != REPLACE:
        logits = completion_logits(policy, rollouts)
        if look is not None:
            look(logits.__getitem__)
        return token_stats(logits, ids, temperature, kept=kept)
    head, hidden = LmHead.of(inner_model(policy.model)), completion_hidden(policy, rollouts)
    if look is not None:
        look(lambda place: head.logits(hidden[place]))
    with policy.autocast():
        return head.stats(hidden, ids, temperature, kept=kept)
