"""Token statistics from hidden states and the head, without the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wapo_analysis.stats.block import (
    CHUNK_ELEMENTS,
    block_stats,
    check,
    logit_gradient,
    stacked,
    wide,
)
from wapo_analysis.stats.result import TokenStats


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> TokenStats:
    """Same statistics from hidden states and the head, without ever holding (N, V) logits.

    Equals ``token_stats(hidden @ weight.T + bias, targets, temperature)``; the backward pass
    recomputes the logits block by block.

    Parameters
    ----------
    hidden : Tensor, shape (N, D)
    weight : Tensor, shape (V, D)
    targets : Tensor of int64, shape (N,)
    bias : Tensor, shape (V,), optional
    temperature : float
    chunk_rows : int, optional

    Raises
    ------
    ValueError
        On shapes that do not fit or a temperature that is not positive.
    """
    check(hidden, targets, temperature)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit hidden {tuple(hidden.shape)}")
    rows = chunk_rows or max(1, CHUNK_ELEMENTS // weight.shape[0])
    return TokenStats(*_FromHidden.apply(hidden, weight, bias, targets, float(temperature), rows))


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, ...]:
        blocks = [
            block_stats(wide(_head(h, weight, bias)) / temperature, chosen)
            for h, chosen in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        *columns, log_z = stacked(blocks)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, columns[0])
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(*columns[1:])
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, log_z, logp = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=log_z.dtype)
        d_bias = torch.zeros(weight.shape[0], dtype=log_z.dtype, device=weight.device)
        parts = (t.split(ctx.rows) for t in (hidden, targets, log_z, logp, grads[0], d_hidden))
        for h, chosen, z, lp, g, into in zip(*parts, strict=True):
            scaled = wide(_head(h, weight, bias)) / ctx.temperature
            grad = logit_gradient(scaled, chosen, z, lp)
            grad.mul_((g / ctx.temperature).unsqueeze(1))
            into.copy_(grad.to(weight.dtype) @ weight)
            d_weight += grad.T @ wide(h)
            d_bias += grad.sum(0)
        d_bias_out = None if bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight.to(weight.dtype), d_bias_out, None, None, None


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)
