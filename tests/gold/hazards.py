"""Repeating the hand-made hazard calls of a golden folder. B rollouts, T positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.gold import metrics
from tests.gold.replay import objective_config
from wapo_analysis.objectives.loss import LossOutput, keep_tokens, policy_loss
from wapo_analysis.objectives.weights import BatchWeights, minibatch_weights

HAZARD_COLLISION = 0.3
"""Collision probability of the hazard calls that name none."""


def replay_hazard(
    row: Mapping[str, Any], official: bool = True
) -> tuple[LossOutput, Tensor, metrics.Microbatch]:
    """Repeat one hazard call.

    Parameters
    ----------
    row : mapping
        Row of hazards.json.
    official : bool
        Parity mode; False shows what the safe defaults make of the same inputs.

    Returns
    -------
    output : LossOutput
        Result of the loss.
    coef : Tensor, shape (B, T)
        d loss / d logp from autograd.
    view : Microbatch
        For the diagnostics.

    Raises
    ------
    UserError
        In safe mode, where the settings themselves are refused.
    """
    config = objective_config(row["settings"], official)
    dtype = getattr(torch, row["dtype"])
    given = {
        name: torch.tensor(np.array(value, dtype=np.float64)).to(dtype)
        for name, value in row["inputs"].items()
    }
    logp, old = given["trainer_logprobs"].requires_grad_(), given["inference_logprobs"]
    mask, advantage = given["loss_mask"].bool(), given["advantages"]
    collision = given.get("sum_p_sq", torch.full_like(old, HAZARD_COLLISION))
    peak = ~(logp.detach().exp() < collision)
    rows = torch.arange(len(mask))
    keep = keep_tokens(config, advantage, mask, peak)
    batch = BatchWeights(
        sequence_weight=given["seq_loss_weights"],
        normalizer=1.0,
        multiplier=1.0,
        num_minibatches=1,
    )
    group = given.get("group_ids", rows).long()
    weight = minibatch_weights(config, batch, rows, keep, group).sequence_weight.to(dtype)
    output = policy_loss(config, logp, old, advantage, mask, keep, weight)
    (coef,) = torch.autograd.grad(output.loss, logp)
    view = metrics.Microbatch(
        config=config,
        logp=logp.detach(),
        logp_old=old,
        entropy=torch.zeros_like(collision),
        valley=mask & ~peak,
        mask=mask,
        keep=keep,
        advantage=advantage,
        weight=weight,
    )
    return replace(output, loss=output.loss.detach()), coef, view
