"""Rows to `Reduced` in torch operations: plain on two reused blocks in cache, or compiled."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import relu

from wapo_analysis.errors import UserError
from wapo_analysis.stats.formulas import LOG2_E, Reduced
from wapo_analysis.stats.rows import BLOCK, Rows, block_maxima, top_columns, upper_end

# Elements of a block: two of them in float32 (1.25 MiB) stay near a CPU's core, also beside other
# work (twice as many took a quarter longer); a GPU is kept busy by 64 MiB.
CPU_ELEMENTS = 5 << 15
_GPU_ELEMENTS = 1 << 23
# Elements of a group: what a CPU's last cache keeps between the two looks at the logits.
_GROUP_ELEMENTS = 1 << 21
# Rows of a compiled block: enough to hide what a call costs.
_COMPILED_ROWS = 128
# Columns of a group that the search for the largest ones opens at once: some MiB with their ids.
_OPENED_ELEMENTS = 1 << 15
# Lowest exponent of 2 in a sum: its square is still a normal number, since denormal arithmetic is
# slow, and what is raised to it (padded columns too) is below the rounding of a sum that holds a 1.
LOWEST = {torch.float32: -62.0, torch.float64: -140.0}

# (start, stop, origins (n, 1), ids left out (n, 2)) -> the four sums of those n rows, each (n, 1).
Sums = Callable[[int, int, Tensor, Tensor], tuple[Tensor, ...]]


def block_rows(rows: Rows, chunk_rows: int | None) -> int:
    """Rows that are worked on at once: at least one, at most all there are."""
    elements = CPU_ELEMENTS if rows.logits.device.type == "cpu" else _GPU_ELEMENTS
    fit = chunk_rows or elements // rows.logits.shape[-1]
    return max(1, min(fit, len(rows)))


def reduce_rows(
    rows: Rows, targets: Tensor, temperature: float, topk: int = 0, chunk_rows: int | None = None
) -> Reduced:
    """Reduce N rows block by block.

    In float32; float64 if the rows are.

    Parameters
    ----------
    targets : Tensor of int64, shape (N,)
    topk : int
        Number of largest columns to return.
    chunk_rows : int, optional
        Rows of a block.
    """
    size = block_rows(rows, chunk_rows)
    x, e = rows.logits.new_empty((2, size, rows.logits.shape[-1]), dtype=rows.dtype)

    def sums(start: int, stop: int, origin: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        block = torch.sub(rows.block(start, stop, x), origin, out=x[: stop - start])
        return _sums(block.scatter_(1, out, -torch.inf), e[: stop - start], LOG2_E / temperature)

    return reduce_by(sums, rows, targets, topk, size, x)


def reduce_keeping(
    rows: Rows, targets: Tensor, temperature: float, powers: Tensor
) -> tuple[Reduced, Tensor, Tensor]:
    """`reduce_rows` that keeps its powers exp((logit - origin) / temperature + lift).

    ``targets`` (N,). ``powers`` (N, V): where they go, rounded to its dtype; may be the memory of
    the rows. Of no meaning at target and mode.

    Returns
    -------
    Reduced
    Tensor of int64, shape (N,)
        Id of the largest column of each row; equal ones: the target, else the first.
    Tensor, shape (N,)
        The lifts: 0 where nothing is rounded.
    """
    size = block_rows(rows, None)
    x = rows.logits.new_empty((size, rows.logits.shape[-1]), dtype=rows.dtype)
    rounded = powers.dtype != rows.dtype
    space = torch.empty_like(x) if rounded else x
    modes, lifts = torch.empty_like(targets), x.new_zeros(len(rows))

    def sums(start: int, stop: int, origin: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        block = torch.sub(rows.block(start, stop, x), origin, out=x[: stop - start])
        modes[start:stop] = out[:, 1]
        e = space[: stop - start] if rounded else powers[start:stop]
        found = _sums(block.scatter_(1, out, -torch.inf), e, LOG2_E / temperature)
        if rounded:
            ends = (rows.pick(start, stop, out).to(rows.dtype) - origin) / temperature
            lift = _lift(found[0], ends, out)
            powers[start:stop].copy_(e.mul_(lift.exp()))
            lifts[start:stop] = lift.squeeze(1)
        return found

    return reduce_by(sums, rows, targets, 0, size, x), modes, lifts


def _lift(sum_e: Tensor, ends: Tensor, out: Tensor) -> Tensor:
    """What makes the normaliser of each row a power of 2, in nats, shape (N, 1).

    Then p - 1 of a token that is hardly probable, the largest number of its row, keeps its value
    when it is rounded: else rounding it would decide the error of the whole gradient.
    """
    # In numpy, whose calls take a tenth of torch's for a handful of rows.
    chosen, mode = ends.numpy().T
    alike = out[:, 0].numpy() == out[:, 1].numpy()
    with np.errstate(all="ignore"):  # NaN and infinity stay what they are
        log_z = np.logaddexp(np.log(sum_e.numpy()[:, 0]), chosen)
        log_z = np.where(alike, log_z, np.logaddexp(log_z, mode))
        lift = np.round(log_z * LOG2_E) / LOG2_E - log_z
    return torch.from_numpy(lift.astype(sum_e.numpy().dtype)).unsqueeze(1)


def reduce_by(
    sums: Sums,
    rows: Rows,
    targets: Tensor,
    topk: int,
    size: int,
    space: Tensor | None,
    maxima_of: Callable[[Tensor], Tensor] = block_maxima,
) -> Reduced:
    """Reduce rows with a given program for the sums.

    Parameters
    ----------
    targets : Tensor of int64, shape (N,)
    topk, size : int
        Largest columns to return; rows of a block.
    space : Tensor, shape (size, V), optional
        Free before and after each call of ``sums``; takes rows that must be converted.
    maxima_of : callable
        `block_maxima`, in the dtype the rows are computed in.
    """
    count, vocabulary = len(rows), rows.logits.shape[-1]
    new = partial(torch.empty, dtype=rows.dtype, device=rows.logits.device)
    columns, top_values = new((count, 7)), new((count, topk))
    top_ids = torch.empty_like(top_values, dtype=torch.int64)
    group = max(1, _GROUP_ELEMENTS // (size * vocabulary)) * size
    if topk:
        group = min(group, max(1, _OPENED_ELEMENTS // (BLOCK * topk)))
    for start, stop in _spans(0, count, group):
        pick, target = partial(rows.pick, start, stop), targets[start:stop].unsqueeze(1)
        blocks = (rows.block(*at, space) for at in _spans(start, stop, size))
        maxima = torch.cat([maxima_of(block) for block in blocks])
        if topk:
            found = top_columns(pick, maxima, topk, vocabulary)
            top_values[start:stop], top_ids[start:stop] = found
        ends = upper_end(pick, maxima, target, vocabulary)
        torch.cat(ends[:3], 1, out=columns[start:stop, :3])
        # Finite, so that -inf columns stay -inf even where nothing else is left.
        origin = ends.origin.clamp(min=torch.finfo(rows.dtype).min)
        out = torch.cat((target, ends.mode), 1)
        for first, last in _spans(start, stop, size):
            here = slice(first - start, last - start)
            torch.cat(sums(first, last, origin[here], out[here]), 1, out=columns[first:last, 3:])
    return Reduced(columns, *((top_values, top_ids) if topk else ()))


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _sums(x: Tensor, e: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Sums of e = 2^(x scale), e x scale, e^2 and e^2 x scale, each (N, 1)."""
    x.mul_(scale).clamp_(min=LOWEST[x.dtype])
    torch.exp2(x, out=e)
    sum_e, norm_e = e.sum(1, keepdim=True), torch.linalg.vector_norm(e, dim=1, keepdim=True)
    sum_ex = x.mul_(e).sum(1, keepdim=True)
    return sum_e, sum_ex, norm_e.square_(), x.mul_(e).sum(1, keepdim=True)


def reduce_compiled(
    rows: Rows, targets: Tensor, temperature: float, topk: int = 0, chunk_rows: int | None = None
) -> Reduced:
    """Reduce N rows as `reduce_rows` does, in two sweeps that store nothing: maxima and sums.

    Raises UserError where nothing can be compiled.
    """
    scale = torch.tensor(LOG2_E / temperature, dtype=rows.dtype, device=rows.logits.device)
    size = block_rows(rows, chunk_rows or _COMPILED_ROWS)
    on_cpu = rows.logits.device.type == "cpu"

    def sums(start: int, stop: int, origin: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        lowest, block = LOWEST[rows.dtype], _dynamic(rows.block(start, stop), origin)
        total = _kernel(_quick_sums)(*block, scale, math.exp2(lowest)) if on_cpu else None
        # A column of -inf makes the quick sums NaN, and so does a NaN.
        if total is None or not torch.cat(total).isfinite().all():
            total = _kernel(_compiled_sums)(*block, scale, lowest)
        # The two columns that do not count are 1 at most, and what is left is 1 at least.
        x = (rows.pick(start, stop, out).to(rows.dtype) - origin).mul_(scale).clamp_(lowest, 0)
        e = torch.exp2(x)
        e[:, 1:] *= out[:, 1:] != out[:, :1]
        parts = (e, e * x, e * e, e * e * x)
        return tuple(
            whole - part.sum(1, keepdim=True) for whole, part in zip(total, parts, strict=True)
        )

    def maxima(block: Tensor) -> Tensor:
        found: Tensor = _kernel(_compiled_maxima)(*_dynamic(block))
        return found

    try:
        return reduce_by(sums, rows, targets, topk, size, None, maxima)
    except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, a folder with a space
        why = str(error).strip().split("\n")[0]
        raise UserError(f"backend 'compile' cannot run here: {why}") from error


def _dynamic(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, their number of rows marked as one that changes."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensors


@cache
def _kernel(program: Callable[..., Any]) -> Any:
    return torch.compile(program)


def _compiled_maxima(rows: Tensor) -> Tensor:
    return block_maxima(rows).to(torch.promote_types(rows.dtype, torch.float32))


def _compiled_sums(
    rows: Tensor, origin: Tensor, scale: Tensor, lowest: float
) -> tuple[Tensor, ...]:
    """Sums over all columns, each (N, 1); a column above the origin counts as if it were there."""
    x = ((rows - origin) * scale).clamp(lowest, 0)
    e = torch.exp2(x)
    terms = (e, e * x, e * e, e * e * x)
    return tuple(term.sum(1, keepdim=True) for term in terms)


def _quick_sums(rows: Tensor, origin: Tensor, scale: Tensor, least: float) -> tuple[Tensor, ...]:
    """`_compiled_sums` of finite rows, by a tenth quicker: relu has no branch for a NaN.

    An e below ``least`` is 0, so that no square of it is subnormal, which a CPU takes long for.
    """
    y = relu((origin - rows) * scale)
    e = relu(torch.exp2(-y) - least)
    ey = e * y
    total, lower, square, lower_square = (t.sum(1, keepdim=True) for t in (e, ey, e * e, e * ey))
    return total, -lower, square, -lower_square
