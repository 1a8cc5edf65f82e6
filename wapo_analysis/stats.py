"""Logits to token statistics: logp, entropy and the collision sums, exact on near-certain tokens.

Shapes: N rows (tokens), V vocabulary, D hidden width. Everything is in nats and at temperature T.

The sampled token and the mode are left out of the sums. For a near-certain token the textbook
forms ``1 - 2p + sum p^2`` and ``p ln p + H`` subtract almost equal numbers; without these two terms
nothing is left to cancel (taxonomy/README.md, section on stable forms).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp(2 x) stays a normal number, so padded (-inf) and far columns cost no denormal arithmetic and
# give no 0 * inf; what is clamped is below the rounding of every sum.
_LOWEST = {torch.float32: -43.0, torch.float64: -350.0}
_CHUNK_ELEMENTS = 1 << 19


class TokenStats(NamedTuple):
    """Statistics of N tokens; only ``logp`` carries gradient.

    Attributes
    ----------
    logp : Tensor, shape (N,)
        Log-probability of the target, nats.
    entropy : Tensor, shape (N,)
        Entropy of the whole distribution, nats.
    collision_rest : Tensor, shape (N,)
        Sum of p_v^2 over v != target.
    collision_logp_rest : Tensor, shape (N,)
        Sum of p_v^2 ln p_v over v != target, nats.
    top1 : Tensor of bool, shape (N,)
        The target is (one of) the most probable.
    """

    logp: Tensor
    entropy: Tensor
    collision_rest: Tensor
    collision_logp_rest: Tensor
    top1: Tensor


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
    _check(logits, targets, temperature)
    rows = chunk_rows or max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    return TokenStats(*_FromLogits.apply(logits, targets, float(temperature), rows))


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
    _check(hidden, targets, temperature)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit hidden {tuple(hidden.shape)}")
    rows = chunk_rows or max(1, _CHUNK_ELEMENTS // weight.shape[0])
    return TokenStats(*_FromHidden.apply(hidden, weight, bias, targets, float(temperature), rows))


def _check(rows: Tensor, targets: Tensor, temperature: float) -> None:
    if rows.dim() != 2 or targets.shape != rows.shape[:1]:
        raise ValueError(
            f"need (N, V) rows and (N,) targets, got {tuple(rows.shape)} and {tuple(targets.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _wide(block: Tensor) -> Tensor:
    return block if block.dtype == torch.float64 else block.float()


def _block_stats(scaled: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Statistics of one block of logits already divided by T, and the log of the normaliser.

    With x = logit - max and e = exp(x), sums run over all tokens but the target y and the mode m:
    log Z = log1p(sum e [+ e_y if y != m]); the mode adds e = 1, x = 0 wherever it is not y.
    """
    index = targets.unsqueeze(1)
    top, mode = scaled.max(dim=1, keepdim=True)
    x_target = scaled.gather(1, index) - top
    is_mode = x_target == 0
    mode = torch.where(is_mode, index, mode)
    x = (scaled - top).clamp_(min=_LOWEST[scaled.dtype])
    e = x.exp()
    e_target = torch.where(is_mode, 0.0, x_target.exp())
    e.scatter_(1, index, 0.0).scatter_(1, mode, 0.0)
    x.mul_(e)  # e x; x itself is not needed again but through e
    sum_e, sum_ex = e.sum(1, keepdim=True), x.sum(1, keepdim=True)
    sum_e2x = (x * e).sum(1, keepdim=True)
    sum_e2 = e.square_().sum(1, keepdim=True)
    others = torch.where(is_mode, 0.0, 1.0)
    log_z = torch.log1p(sum_e + e_target)
    z = log_z.exp()
    logp = x_target - log_z
    rest = (sum_e2 + others) / z**2
    rest_logp = sum_e2x / z**2 - rest * log_z
    entropy_rest = ((sum_e + others) * log_z - sum_ex) / z
    prob = logp.exp()
    entropy = entropy_rest - torch.where(prob > 0, prob * logp, 0.0)
    # A NaN row fails every comparison above; its target column may still look finite.
    bad = torch.where(torch.isfinite(top + sum_e), 0.0, torch.nan)
    columns = (logp + bad, entropy + bad, rest + bad, rest_logp + bad, is_mode, log_z + top)
    return tuple(column.squeeze(1) for column in columns)


def _stacked(blocks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*blocks, strict=True))


def _logit_gradient(scaled: Tensor, targets: Tensor, log_z: Tensor, logp: Tensor) -> Tensor:
    """Rows of d logp / d scaled logits = e_y - p, exact in the sampled column."""
    grad = (scaled - log_z.unsqueeze(1)).exp_().neg_()
    return grad.scatter_(1, targets.unsqueeze(1), -torch.expm1(logp).unsqueeze(1))


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, ...]:
        blocks = [
            _block_stats(_wide(block) / temperature, chosen)
            for block, chosen in zip(logits.split(rows), targets.split(rows), strict=True)
        ]
        *columns, log_z = _stacked(blocks)
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
            grad = _logit_gradient(_wide(block) / ctx.temperature, chosen, z, lp)
            into.copy_(grad.mul_((g / ctx.temperature).unsqueeze(1)))
        return out, None, None, None


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
            _block_stats(_wide(_head(h, weight, bias)) / temperature, chosen)
            for h, chosen in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        *columns, log_z = _stacked(blocks)
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
            scaled = _wide(_head(h, weight, bias)) / ctx.temperature
            grad = _logit_gradient(scaled, chosen, z, lp)
            grad.mul_((g / ctx.temperature).unsqueeze(1))
            into.copy_(grad.to(weight.dtype) @ weight)
            d_weight += grad.T @ _wide(h)
            d_bias += grad.sum(0)
        d_bias_out = None if bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight.to(weight.dtype), d_bias_out, None, None, None


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)
