"""Scoring completions under the policy: with its logits, or from hidden states and head alone.

Shapes: B rollouts, T completion length, V vocabulary, D hidden width, N completion tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

from wapo_analysis.capture.lm_head import LmHead, head_obstacle, inner_model
from wapo_analysis.capture.mode import (
    PASSIVE,
    REPLACE,
    CaptureMode,
    choose_mode,
    earlier_mode,
    free_memory,
)
from wapo_analysis.record.topk import ReadRows
from wapo_analysis.stats import TokenStats, token_stats
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.models import Policy
from wapo_analysis.train.rollout import Rollouts, completion_hidden, completion_logits


def capture_mode(
    policy: Policy,
    config: TrainConfig,
    max_new_tokens: int,
    manifest: Mapping[str, Any] | None = None,
) -> CaptureMode:
    """Decide whether a run makes logits.

    Parameters
    ----------
    policy : Policy
    config : TrainConfig
    max_new_tokens : int
        Longest completion.
    manifest : mapping, optional
        Of the run that is resumed.

    Raises
    ------
    UserError
        If "replace" was asked for and the model does not allow it.
    """
    asked = config.capture_mode
    earlier = earlier_mode(asked, manifest or {})
    if earlier is not None:
        return earlier
    rollouts = config.prompts_per_step * config.rollouts_per_prompt // config.minibatches
    weight = LmHead.of(inner_model(policy.model)).weight
    rows = min(config.microbatch_size or rollouts, rollouts)
    logits_bytes = rows * (max_new_tokens + 1) * weight.shape[0] * weight.element_size()
    obstacle = None if asked == PASSIVE else head_obstacle(policy.model, policy.device)
    return choose_mode(asked, logits_bytes, free_memory(policy.device), obstacle)


def score(
    policy: Policy,
    rollouts: Rollouts,
    temperature: float,
    mode: str,
    look: Callable[[ReadRows], None] | None = None,
) -> TokenStats:
    """Statistics of the N completion tokens, flat over the mask; logp is on the autograd graph.

    Parameters
    ----------
    policy : Policy
    rollouts : Rollouts
    temperature : float
    mode : {"passive", "replace"}
        Whether (B, T, V) logits are made on the way.
    look : callable, optional
        Called with a function that gives the logits (m, V) at m places (row, position).
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
    return head.stats(hidden, ids, temperature, kept=kept)
