"""Token statistics from logits, and which program reduces their rows."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.stats.eager import block_rows, reduce_compiled, reduce_rows
from wapo_analysis.stats.formulas import LOG2_E, Reduced, TokenStats, finish, narrowed
from wapo_analysis.stats.rows import Rows, check, chosen_rows

BACKENDS = ("auto", "eager", "compile", "triton")

Reducer = Callable[..., Reduced]


def reducer(backend: str, logits: Tensor) -> Reducer:
    """Program for these logits.

    Returns ``(rows, targets, temperature, topk, chunk_rows) -> Reduced``. Raises UserError if the
    backend was asked for by name and cannot run here. ``backend``: one of `BACKENDS`.
    """
    if backend == "compile":
        return reduce_compiled
    if backend == "triton" or (backend == "auto" and logits.is_cuda):
        obstacle = _no_triton(logits)
        if obstacle is None:
            from wapo_analysis.stats.triton_kernel import reduce_triton

            return reduce_triton
        if backend == "triton":
            raise UserError(f"backend 'triton' cannot run here: {obstacle}")
    return reduce_rows


def _no_triton(logits: Tensor) -> str | None:
    """Return what keeps the Triton kernel from running, None if nothing."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if logits.dtype == torch.float64:
        return "float64 is reduced by 'eager'"
    if not logits.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the logits are on {logits.device}, not on a CUDA device"
    return None


def token_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    topk: int = 0,
    *,
    kept: Tensor | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
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
    logits : Tensor, shape (..., V)
        Raw logits, any strides, only read and never copied as a whole. Half precision is computed
        in float32, float64 stays. ``-inf`` columns (padded vocabulary) have probability 0. A NaN
        or +inf makes its own row NaN and no other.
    targets : Tensor of int64, shape (...)
        Sampled tokens.
    temperature : float
        Softmax temperature, > 0.
    mask : Tensor of bool, shape (...), optional
        Rows wanted; the others are never read, nor their targets.
    topk : int
        Return this many of the most probable tokens of every row, equal ones by ascending id.
    kept : Tensor of int64, shape (N,), optional
        Numbers of the rows wanted, counted over the leading dimensions, ascending; instead of a
        mask, whose numbers a GPU would have to be waited for.
    backend : {"auto", "eager", "compile", "triton"}
        How rows are reduced. "auto" takes the Triton kernel for CUDA tensors where Triton is
        installed, else plain operations in blocks. "compile" builds a kernel with `torch.compile`:
        seconds once per dtype, and on a CPU it needs a C++ compiler.
    chunk_rows : int, optional
        Rows of a block of plain operations; working memory is two such blocks in float32.

    Returns
    -------
    TokenStats
        N tokens, flat over the mask. Gradient flows through ``logp`` alone, if the logits ask for
        it and gradients are enabled: d logp / d logits = (e_y - p) / T, and 0 in rows that the
        mask hides. The first derivative only, forward (`torch.func.jvp`) or backward.

    Raises
    ------
    UserError
        On shapes that do not fit, a target that is no column, a temperature that is not positive,
        a ``topk`` that is not in 0..V, or a backend that does not exist or cannot run here.
    """
    check(logits, targets, temperature, mask)
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if not 0 <= topk <= logits.shape[-1]:
        raise UserError(f"topk must be in 0..{logits.shape[-1]}, got {topk}")
    chosen, kept = chosen_rows(targets, logits.shape[-1], mask, kept)
    columns = _FromLogits.apply(logits, chosen, kept, float(temperature), topk, backend, chunk_rows)
    return TokenStats(*columns[:-2])


class _FromLogits(torch.autograd.Function):
    """Statistics, then what the derivative needs: only the first output has one."""

    @staticmethod
    def forward(
        logits: Tensor,
        targets: Tensor,
        kept: Tensor | None,
        temperature: float,
        topk: int,
        backend: str,
        chunk_rows: int | None,
    ) -> tuple[Tensor | None, ...]:
        rows = Rows(logits, kept)
        reduced = reducer(backend, logits)(rows, targets, temperature, topk, chunk_rows)
        done = finish(reduced, temperature)
        dtype = rows.dtype
        return (
            *narrowed(done, dtype),
            None if done.top_logp is None else done.top_logp.to(dtype),
            done.top_ids,
            done.highest.to(dtype),
            (done.log_z * LOG2_E).to(dtype),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        logits, targets, kept, temperature, _, _, chunk_rows = inputs
        logp, *others = output
        ctx.mark_non_differentiable(*(part for part in others if part is not None))
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        saved = (logits, targets, kept, logp, *others[-2:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, _, kept, *_ = ctx.saved_tensors
        if grads[0] is None:
            return (None,) * 7
        out = (torch.empty if kept is None else torch.zeros)(
            logits.shape, dtype=logits.dtype, device=logits.device
        )
        for rows, start, stop, slope in _slopes(ctx):
            factor = grads[0][start:stop] / ctx.temperature
            rows.put(out, start, slope.mul_(factor.unsqueeze(1)))
        return out, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, moved: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Directional derivative (e_y - p) . d logits / T."""
        tangent = Rows(moved, ctx.saved_tensors[2])
        parts = [
            (slope * tangent.block(start, stop)).sum(1) / ctx.temperature
            for _, start, stop, slope in _slopes(ctx)
        ]
        logp = ctx.saved_tensors[3]
        known = torch.cat(parts) if parts else torch.zeros_like(logp)
        return known, *(None,) * (len(TokenStats._fields) + 1)


def _slopes(ctx: Any) -> Any:
    """Blocks of rows e_y - p, exact in the sampled column, with where each begins and ends."""
    logits, targets, kept, logp, highest, log2_z = ctx.saved_tensors
    rows = Rows(logits, kept)
    size = block_rows(rows, ctx.chunk_rows)
    buffer = torch.empty((size, logits.shape[-1]), dtype=logp.dtype, device=logits.device)
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        slope = buffer[: stop - start].copy_(rows.block(start, stop))
        slope.sub_(highest[start:stop].unsqueeze(1)).mul_(LOG2_E / ctx.temperature)
        slope.sub_(log2_z[start:stop].unsqueeze(1)).exp2_().neg_()
        own = -torch.expm1(logp[start:stop]).unsqueeze(1)
        slope.scatter_(1, targets[start:stop].unsqueeze(1), own)
        yield rows, start, stop, slope
