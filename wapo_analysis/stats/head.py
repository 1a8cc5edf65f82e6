"""Token statistics from hidden states and the head, without the logits.

Shapes: N tokens, V vocabulary, D hidden width. Forward: blocks of rows against the whole head, for
the statistics of a row need all of it. Backward: blocks of the vocabulary against all rows, so that
each block of the head's gradient is written once, by one matrix product. On a CPU, logits that take
a small part of its memory are kept, as powers, and not made a second time (of float16 they are).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.stats.eager import CPU_ELEMENTS, block_rows, reduce_keeping
from wapo_analysis.stats.formulas import LOG2_E, Reduced, TokenStats, finish, narrowed, wide
from wapo_analysis.stats.logits import reducer
from wapo_analysis.stats.rows import Rows, check_head, chosen_rows, gathered, memory, one_by_one

# Rows that go through the head at once: fewer make the product slow, more only cost memory. Half
# precision on a CPU wants more of them: 256 took twice as long as 512.
_CPU_ROWS = 256
_CPU_HALF_ROWS = 512
_GPU_ROWS = 1024
# Elements of a block of the backward pass, and of its part that is exponentiated at once: in a
# CPU's cache; enough to keep a GPU busy.
_CPU_BLOCK = 1 << 20, 1 << 18
_GPU_BLOCK = 1 << 27, 1 << 25
# Powers of two below this are far under any rounding; denormal numbers would be slow.
_LOWEST = {torch.float32: -90.0, torch.float64: -900.0}
_NARROWEST = 1024
# Logits up to this part of the machine's memory are kept for the backward pass. Not of what is free
# of it: the same training gives the same bits every time.
_KEPT_SHARE = 32
# Least factor of a row of powers: far under any rounding, and its inverse fits into float32.
_LEAST_FACTOR = 1e-24
_ONCE = "fused_head_stats has a first derivative only"
# A product of half precision that CUDA gives in float32; torch has it with an addend since 2.10.
_HALF_IN_FLOAT_OUT = "dtype_out" in torch.ops.aten.addmm.overloads()


def fused_head_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    *,
    kept: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> TokenStats:
    """Statistics of tokens straight from hidden states and the head, without (N, V) logits.

    Equals, in value and gradient, up to the order of sums,

    >>> import torch
    >>> from wapo_analysis.stats import token_stats
    >>> hidden, weight, targets = torch.randn(5, 4), torch.randn(11, 4), torch.arange(5)
    >>> logits = 30 * torch.tanh(2 * (hidden @ weight.T) / 30)
    >>> fused = fused_head_stats(hidden, weight, targets, temperature=0.7, scale=2.0, softcap=30.0)
    >>> torch.allclose(fused.logp, token_stats(logits, targets, 0.7).logp, atol=1e-5)
    True

    Parameters
    ----------
    hidden : Tensor, shape (..., D)
        Last hidden states.
    weight : Tensor, shape (V, D)
        The head; may be tied to the embedding. Under FSDP2 call this inside the model's forward,
        where its weights are whole; elsewhere, under ``torch.no_grad``, a shard (DTensor) is
        gathered, which is a step of all processes.
    targets : Tensor of int64, shape (...)
        Sampled tokens.
    bias : Tensor, shape (V,), optional
        Bias of the head.
    temperature : float
        Softmax temperature, > 0.
    mask : Tensor of bool, shape (...), optional
        Tokens wanted; the others are dropped before anything is computed.
    kept : Tensor of int64, shape (N,), optional
        Numbers of the tokens wanted instead of a mask, see `token_stats`.
    scale : float
        Factor on the logits, before the soft cap.
    softcap : float, optional
        Logits z become ``softcap * tanh(z / softcap)``.
    chunk_rows : int, optional
        Rows that go through the head at once; a block of (chunk_rows, V) logits is then the most
        that exists. By default a CPU keeps logits without a soft cap for the backward pass instead
        of making them again, if they take no more than a 32nd of its memory (never in float16,
        where small powers would be lost).

    Returns
    -------
    TokenStats
        N tokens, flat over the mask. Gradient flows through ``logp`` alone, to whichever of hidden,
        weight and bias asks for it.

    Raises
    ------
    UserError
        On shapes that do not fit, a temperature or soft cap that is not positive, or a head that
        is a shard and asks for a gradient.

    Notes
    -----
    Half precision: the products are made and rounded in it, as the model's own head would do, and
    everything after them is float32; so is the sum over vocabulary blocks that gives d hidden.
    Inside autocast its dtype is taken. Forward-mode derivatives (`torch.func.jvp`) of logp and
    `torch.func.vmap` work; a second derivative is refused.
    """
    weight, bias = gathered(weight), None if bias is None else gathered(bias)
    check_head(hidden, weight, targets, bias, temperature, mask, scale, softcap)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets, kept = chosen_rows(targets, len(weight), mask, kept)
    hidden = hidden if kept is None else hidden.index_select(0, kept)
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    fewest = _GPU_ROWS
    if device == "cpu":
        fewest = _CPU_ROWS if dtype.itemsize >= 4 else _CPU_HALF_ROWS
    rows = chunk_rows or max(fewest, CPU_ELEMENTS // len(weight))
    learns = any(part is not None and part.requires_grad for part in (hidden, weight, bias))
    small = len(hidden) * len(weight) * dtype.itemsize <= memory() // _KEPT_SHARE
    free = chunk_rows is None and softcap is None and dtype != torch.float16 and device == "cpu"
    keep = free and small and learns and torch.is_grad_enabled()
    how = _How(float(temperature), float(scale), softcap, dtype, rows, keep)
    with torch.autocast(device, enabled=False):
        columns = _Head.apply(hidden, weight, bias, targets, how)
    return TokenStats(*columns[:-3])


@dataclass(frozen=True)
class _How:
    """How logits are made of hidden states: everything about a head that is no tensor."""

    temperature: float
    scale: float
    softcap: float | None
    dtype: torch.dtype
    rows: int
    keep: bool

    @property
    def unit(self) -> float:
        """Difference of two `bent` logits that is one nat."""
        return self.temperature / (self.scale if self.softcap is None else 1.0)

    def bent(self, logits: Tensor) -> Tensor:
        """Logits after the soft cap, float32; without one as they are."""
        if self.softcap is None:
            return logits
        return torch.tanh(wide(logits) * (self.scale / self.softcap)).mul_(self.softcap)

    def slope(self, bent: Tensor) -> Tensor | None:
        """Derivative of the soft cap; None without one."""
        return None if self.softcap is None else 1 - (bent / self.softcap).square_()


class _Head(torch.autograd.Function):
    """Statistics, then what the derivative needs: only the first output has one."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How
    ) -> tuple[Tensor, ...]:
        weight = weight.to(how.dtype)
        shift = None if bias is None else bias.to(how.dtype)
        # One buffer for all blocks: fresh memory would cost more than what is computed in it.
        held = len(hidden) if how.keep else min(how.rows, len(hidden))
        buffer = hidden.new_empty((held, len(weight)), dtype=how.dtype)
        # The soft cap makes float32 of half precision: in small parts.
        size = how.rows if how.softcap is None else block_rows(Rows(buffer), None)
        blocks = []
        for place in _slices(len(hidden), how.rows):
            rows, chosen = hidden[place].to(how.dtype), targets[place]
            out = buffer[place] if how.keep else buffer[: len(rows)]
            logits = _product(rows, weight, shift, out)
            if how.keep:
                blocks.append(_kept_statistics(logits, chosen, how.unit))
                continue
            parts = zip(logits.split(size), chosen.split(size), strict=True)
            blocks += [_statistics(how.bent(part), ids, how.unit) for part, ids in parts]
        *columns, factor = (torch.cat(column) for column in zip(*blocks, strict=True))
        # Not a part of the buffer: a view would hold all of it until the backward pass.
        return *columns, factor, buffer if how.keep else buffer.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, targets, how = inputs
        logp, *others, centre, factor, powers = output
        ctx.how = how
        ctx.mark_non_differentiable(*others, centre, factor, powers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, logp, centre, factor, powers)
        ctx.save_for_forward(hidden, weight, bias, targets, logp, centre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None:
            return None, None, None, None, None
        found = _Gradient.apply(*ctx.saved_tensors, grads[0], ctx.needs_input_grad[:3], ctx.how)
        return *found, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """Directional derivative (e_y - p) d scaled, row block by row block."""
        hidden, weight, bias, targets, logp, centre, *_ = ctx.saved_tensors
        how, (d_hidden, d_weight, d_bias, _, _) = ctx.how, tangents
        parts = []
        for rows in _slices(len(hidden), how.rows):
            moved: Any = 0.0 if d_bias is None else d_bias
            if d_hidden is not None:
                moved = moved + d_hidden[rows] @ weight.to(d_hidden.dtype).t()
            if d_weight is not None:
                moved = moved + hidden[rows].to(d_weight.dtype) @ d_weight.t()
            logits = torch.nn.functional.linear(
                hidden[rows].to(how.dtype),
                weight.to(how.dtype),
                None if bias is None else bias.to(how.dtype),
            )
            push = _push(logits, targets[rows], centre[rows], logp[rows], how)
            parts.append((push * moved).sum(1) * (-how.scale / how.temperature))
        return torch.cat(parts), *(None,) * (len(TokenStats.measured()) + 2)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Head, info.batch_size, in_dims, args)


class _Gradient(torch.autograd.Function):
    """First derivative of `_Head`, a node of its own so that a second one is refused, not wrong."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        *saved, upstream, wanted, how = args
        with torch.autocast(upstream.device.type, enabled=False):
            return _gradients(saved, upstream, wanted, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(_ONCE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_ONCE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Gradient, info.batch_size, in_dims, args)


def _statistics(logits: Tensor, targets: Tensor, unit: float) -> tuple[Tensor, ...]:
    """Statistics of some rows, the logit whose probability would be 1, and a factor of 1."""
    reduced = reducer("auto", logits)(Rows(logits), targets, unit)
    columns, centre = _finished(reduced, logits, unit)
    return *columns, centre, torch.ones_like(centre)


def _finished(reduced: Reduced, logits: Tensor, unit: float) -> tuple[tuple[Tensor, ...], Tensor]:
    done, dtype = finish(reduced, unit), torch.promote_types(logits.dtype, torch.float32)
    return narrowed(done, dtype), (done.highest + unit * done.log_z).to(dtype)


def _kept_statistics(logits: Tensor, targets: Tensor, unit: float) -> tuple[Tensor, ...]:
    """Statistics of some rows whose logits become (p - e_y) / factor, one a row."""
    reduced, mode, lift = reduce_keeping(Rows(logits), targets, unit, logits)
    columns, centre = _finished(reduced, logits, unit)
    highest, origin = reduced.numbers[:, 1], reduced.numbers[:, 2]
    factor = torch.exp((origin - centre) / unit - lift).clamp(min=_LEAST_FACTOR)
    # Not scatter_: of bfloat16 it goes through the whole tensor on a CPU.
    rows = torch.arange(len(targets), device=targets.device)
    known = (mode, torch.exp((highest - centre) / unit)), (targets, torch.expm1(columns[0]))
    for ids, push in known:
        logits[rows, ids] = (push / factor).to(logits.dtype)
    return *columns, centre, factor


def _gradients(
    saved: Sequence[Any], upstream: Tensor, wanted: Sequence[bool], how: _How
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias; None where not wanted.

    With P = (p - e_y) slope and -g the upstream gradient of each row, d weight = P^T (g hidden) and
    d hidden = g (P weight): g multiplies what has D columns, never what has V.
    """
    hidden, weight, bias, targets, logp, centre, relative, powers = saved
    factor = (upstream * (-how.scale / how.temperature) * relative).unsqueeze(1)
    if how.keep:
        return _kept_gradients(powers, hidden, weight, factor, wanted, how)
    rows, weighted = hidden.to(how.dtype), (hidden * factor).to(how.dtype)
    d_hidden = torch.zeros_like(hidden, dtype=centre.dtype) if wanted[0] else None
    d_weight = torch.empty_like(weight) if wanted[1] else None
    d_bias = torch.empty_like(bias) if wanted[2] else None
    elements = (_CPU_BLOCK if hidden.device.type == "cpu" else _GPU_BLOCK)[0]
    width = min(len(weight), max(_NARROWEST, elements // max(len(hidden), 1)))
    buffer = rows.new_empty(len(rows) * width)
    for block in _slices(len(weight), width):
        part = weight[block].to(how.dtype)
        shift = None if bias is None else bias[block].to(how.dtype)
        out = buffer[: len(rows) * len(part)].view(len(rows), len(part))
        logits = _product(rows, part, shift, out)
        push = _push_all(logits, targets - block.start, centre, logp, how)
        if d_hidden is not None:
            _add_product(d_hidden, push, part)
        if d_weight is not None:
            _put_product(d_weight[block], push.t(), weighted)
        if d_bias is not None:
            d_bias[block] = push.t() @ factor.squeeze(1).to(how.dtype)
    if d_hidden is not None:
        d_hidden = d_hidden.mul_(factor).to(hidden.dtype)
    return d_hidden, d_weight, d_bias


def _kept_gradients(
    powers: Tensor,
    hidden: Tensor,
    weight: Tensor,
    factor: Tensor,
    wanted: Sequence[bool],
    how: _How,
) -> tuple[Tensor | None, ...]:
    """`_gradients` of kept logits: powers (N, V) times factor (N, 1) is -g (p - e_y)."""
    d_hidden = d_weight = d_bias = None
    if wanted[0]:
        total = torch.zeros_like(hidden, dtype=factor.dtype)
        _add_product(total, powers, weight.to(how.dtype))
        d_hidden = total.mul_(factor).to(hidden.dtype)
    if wanted[1]:
        d_weight = torch.empty_like(weight)
        _put_product(d_weight, powers.t(), (hidden * factor).to(how.dtype))
    if wanted[2]:
        d_bias = (powers.t() @ factor.squeeze(1).to(how.dtype)).to(weight.dtype)
    return d_hidden, d_weight, d_bias


def _push_all(logits: Tensor, targets: Tensor, centre: Tensor, logp: Tensor, how: _How) -> Tensor:
    """`_push` in place, some rows at a time."""
    elements = (_CPU_BLOCK if logits.device.type == "cpu" else _GPU_BLOCK)[1]
    for rows in _slices(len(logits), max(1, elements // logits.shape[1])):
        block = logits[rows]
        block.copy_(_push(block, targets[rows], centre[rows], logp[rows], how))
    return logits


def _push(logits: Tensor, targets: Tensor, centre: Tensor, logp: Tensor, how: _How) -> Tensor:
    """(p - e_y) slope over some columns, float32 or float64; may overwrite the logits.

    A target outside of the columns is at home in another block. Its own column is taken from logp,
    which came from the same rounded logits, so that 1 - p keeps its digits.
    """
    bent = how.bent(logits)
    slope = how.slope(bent)
    push = wide(bent).sub_(centre.unsqueeze(1)).mul_(LOG2_E / how.unit)
    # 2^x: on some CPUs exp is several times slower.
    push = push.clamp_(min=_LOWEST[push.dtype]).exp2_()
    here = ((targets >= 0) & (targets < push.shape[1])).unsqueeze(1)
    column = targets.clamp(0, push.shape[1] - 1).unsqueeze(1)
    own = torch.where(here, torch.expm1(logp).unsqueeze(1), push.gather(1, column))
    push.scatter_(1, column, own)
    return push if slope is None else push.mul_(slope)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Logits of some rows and columns, written to ``out``."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def _put_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; on a GPU the product of half precision is not rounded to it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _HALF_IN_FLOAT_OUT and total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _slices(length: int, size: int) -> Iterator[slice]:
    """Blocks of at most ``size``; one empty block of nothing."""
    for start in range(0, max(length, 1), size):
        yield slice(start, min(start + size, length))
