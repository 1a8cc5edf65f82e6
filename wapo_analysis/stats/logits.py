"""Token statistics from logits."""

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


def token_stats(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, chunk_rows: int | None = None
) -> TokenStats:
    """Statistics of the target tokens under ``softmax(logits / temperature)``.

    Equals, up to rounding, the naive program

    >>> import torch
    >>> logits, targets = torch.randn(5, 11, dtype=torch.float64), torch.arange(5)
    >>> p = torch.softmax(logits / 0.7, -1); y = torch.nn.functional.one_hot(targets, 11)
    >>> naive = (p.log() * y).sum(-1), -(p * p.log()).sum(-1), (p**2 * (1 - y)).sum(-1)
    >>> stats = token_stats(logits, targets, temperature=0.7)
    >>> all(torch.allclose(a, b) for a, b in zip(naive, stats[:3], strict=True))
    True

    Parameters
    ----------
    logits : Tensor, shape (N, V)
        Raw logits; half precision is computed in float32, float64 stays. ``-inf`` columns (padded
        vocabulary) have probability 0. A NaN or +inf makes its own row NaN and no other.
    targets : Tensor of int64, shape (N,)
        Sampled tokens.
    temperature : float
        Softmax temperature, > 0.
    chunk_rows : int, optional
        Rows per block; working memory is a few blocks, never a second (N, V).

    Returns
    -------
    TokenStats
        Gradient flows through ``logp`` only: d logp / d logits = (e_y - p) / T.

    Raises
    ------
    ValueError
        On shapes that do not fit or a temperature that is not positive.
    """
    check(logits, targets, temperature)
    rows = chunk_rows or max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return TokenStats(*_FromLogits.apply(logits, targets, float(temperature), rows))


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, ...]:
        blocks = [
            block_stats(wide(block) / temperature, chosen)
            for block, chosen in zip(logits.split(rows), targets.split(rows), strict=True)
        ]
        *columns, log_z = stacked(blocks)
        ctx.save_for_backward(logits, targets, log_z, columns[0])
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(*columns[1:])
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        logits, targets, log_z, logp = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = (t.split(ctx.rows) for t in (logits, targets, log_z, logp, grads[0], out))
        for block, chosen, z, lp, g, into in zip(*parts, strict=True):
            grad = logit_gradient(wide(block) / ctx.temperature, chosen, z, lp)
            into.copy_(grad.mul_((g / ctx.temperature).unsqueeze(1)))
        return out, None, None, None
