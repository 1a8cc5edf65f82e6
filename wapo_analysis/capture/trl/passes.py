"""One gradient pass of a TRL trainer: its token rows, its gradient, its second scoring.

Shapes: B rollouts of the pass, T completion positions, N tokens of the loss mask.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture.trl.source import ClipRule, logps_and_entropies
from wapo_analysis.capture.trl.stats import Columns
from wapo_analysis.record.recorder import TokenPass


@dataclass
class SeenPass:
    """One gradient pass: how to score its tokens again, and its rows unless recording failed."""

    score: Callable[[], Any]
    tokens: TokenPass | None = None
    mask_BT: Tensor | None = None


def loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens of the loss: completion tokens that no tool wrote, bool of shape (B, T)."""
    mask: Tensor = inputs["completion_mask"].bool()
    tools = inputs.get("tool_mask")
    return mask if tools is None else mask & tools.bool()


def token_pass(
    inputs: Mapping[str, Any],
    logps_BT: Tensor,
    columns: Columns,
    numbers: tuple[Tensor, Tensor],
    clip: ClipRule,
    index: int,
) -> TokenPass:
    """Rows of the token table for one pass; ``coef`` and ``kept`` come with its gradient.

    Parameters
    ----------
    inputs : mapping
        What the trainer's loss was given.
    logps_BT : Tensor, shape (B, T)
        Log-probabilities the trainer works with, detached, nats.
    columns : dict
        Statistics, shape (N,), of `StatsReader.close`.
    numbers : pair of Tensor, shape (B,)
        Rollout and group of each row.
    clip : ClipRule
    index : int
        Gradient pass within the step, from 0.

    Returns
    -------
    TokenPass
        ``logp_old`` is what vLLM reported, else the trainer's old log-probabilities, else its
        present ones; shifted by the rounding between the recorded logp and the trainer's, so that
        the ratio is exactly the trainer's.
    """
    mask_BT = loss_mask(inputs)
    row, position = mask_BT.nonzero(as_tuple=True)
    rollout, group = numbers
    advantage_BT = inputs["advantages"].detach()
    if advantage_BT.dim() == 1:
        advantage_BT = advantage_BT.unsqueeze(1)
    advantage_BT = advantage_BT.expand_as(logps_BT)
    old_BT = inputs.get("old_per_token_logps")
    old_BT = logps_BT if old_BT is None else old_BT
    sampler_BT = inputs.get("sampling_per_token_logps")
    behaviour_BT = old_BT if sampler_BT is None else sampler_BT
    logp = columns["logp"]
    assert logp is not None
    return TokenPass(
        group=group[row],
        rollout=rollout[row],
        position=position,
        token_id=inputs["completion_ids"][mask_BT],
        advantage=advantage_BT[mask_BT],
        logp=logp,
        logp_old=logp - (logps_BT - behaviour_BT)[mask_BT].float(),
        entropy=columns.get("entropy"),
        collision_rest=columns.get("collision_rest"),
        collision_logp_rest=columns.get("collision_logp_rest"),
        clipped=clip.clipped(logps_BT - old_BT, mask_BT, advantage_BT)[mask_BT],
        top1=columns.get("top1"),
        minibatch=index,
    )


def take_gradient(tokens: TokenPass, mask_BT: Tensor, grad_BT: Tensor, scale: float) -> None:
    """Fill ``coef`` and ``kept`` from the gradient that arrived at the log-probabilities.

    Parameters
    ----------
    tokens : TokenPass
    mask_BT : Tensor of bool, shape (B, T)
    grad_BT : Tensor, shape (B, T)
        Gradient of the back-propagated loss.
    scale : float
        What that loss was multiplied by on top of the objective: the fp16 loss scale, and the
        number of processes whose gradients are averaged.

    Notes
    -----
    A token without gradient although its advantage is not 0, and that the clip has not stopped, was
    taken out of the loss: by the 80/20 entropy mask, an off-policy mask or a vLLM weight of 0.
    It is not ``kept``.
    """
    coef = -grad_BT.detach()[mask_BT].float() / scale
    tokens.coef = coef
    dropped = (coef == 0) & (tokens.advantage != 0)
    tokens.kept = ~dropped if tokens.clipped is None else ~dropped | tokens.clipped


@torch.no_grad()
def score_again(model: Any, passes: Sequence[SeenPass]) -> None:
    """Fill ``logp_after`` and ``entropy_after`` under the present weights, without dropout.

    A pass without rows is scored all the same: the forward may be a collective of all processes.
    """
    with evaluating(model):
        for seen in passes:
            logps_BT, entropies_BT = logps_and_entropies(seen.score())
            if seen.tokens is None or seen.mask_BT is None:
                continue
            if logps_BT is not None:
                seen.tokens.logp_after = logps_BT[seen.mask_BT].float()
            if entropies_BT is not None:
                seen.tokens.entropy_after = entropies_BT[seen.mask_BT].float()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off, so no random number is drawn; then put every module back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
