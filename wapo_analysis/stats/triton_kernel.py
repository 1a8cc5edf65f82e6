"""Rows to `Reduced` on a GPU: one read, one exponential per element, any vocabulary.

One program per row, rows on grid axis 0. Every lane keeps the largest logit it has met out of its
sums and adds what that one pushes out, so at the end the mode is one of the logits kept out and the
rest are added. Nothing inside the loop crosses lanes: the origin of the exponents is guessed from
the first block and checked at the end. In the rare row where it is so far off that float32 would
overflow or lose the sums, the row is read once more from the right origin.
"""

# A kernel's parameters are pointers and numbers of another language.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from contextlib import nullcontext
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from wapo_analysis.stats.formulas import LOG2_E, Reduced
from wapo_analysis.stats.rows import Rows, block_maxima, top_columns

BLOCK, WARPS = 2048, 8
# Elements of the blocks in which the largest columns are looked for.
_TOP_ELEMENTS = 1 << 25
# Row offsets that are multiples of this many elements allow the widest loads.
_ALIGNED = 16

# In base 2: how far the origin may be off, and the lowest exponent of a normal number.
_FAR = tl.constexpr(40.0)
_LOWEST = tl.constexpr(-126.0)
_NAN = tl.constexpr(tl.PropagateNan.ALL)
_MINUS_INF = tl.constexpr(float("-inf"))


def reduce_triton(
    rows: Rows, targets: Tensor, temperature: float, topk: int = 0, chunk_rows: int | None = None
) -> Reduced:
    """Reduce N rows.

    Parameters
    ----------
    rows : Rows, N of them
        On a CUDA device, or anywhere in Triton's interpreter (``TRITON_INTERPRET=1``).
    targets : Tensor of int64, shape (N,)
    topk : int
        Number of largest columns to return; these are found by torch operations, block by block.
    chunk_rows : int, optional
        Rows of a block of that search.
    """
    logits, count = rows.logits, len(rows)
    found = torch.empty((count, 7), dtype=torch.float32, device=logits.device)
    scale = torch.tensor(LOG2_E / temperature, dtype=torch.float32).item()
    if count:
        aligned = all(stride % _ALIGNED == 0 for stride in logits.stride()[:-1])
        # Triton launches on the current device, which need not be that of the logits.
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            reduce_kernel[(count,)](
                logits,
                rows.offsets(),
                targets,
                found,
                logits.stride(-1),
                scale,
                VOCABULARY=logits.shape[-1],
                ALIGNED=_ALIGNED if aligned else 1,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    numbers = found.double()
    numbers[:, 2] /= scale  # the origin as a logit; exact, unlike in float32
    return Reduced(numbers, *(_top(rows, topk, chunk_rows) if topk else ()))


def _top(rows: Rows, k: int, chunk_rows: int | None) -> tuple[Tensor, ...]:
    vocabulary = rows.logits.shape[-1]
    size = chunk_rows or max(1, _TOP_ELEMENTS // vocabulary)
    parts = []
    for start in range(0, max(len(rows), 1), size):
        block = rows.block(start, min(start + size, len(rows)))
        pick = partial(torch.gather, block, 1)
        parts.append(top_columns(pick, block_maxima(block).float(), k, vocabulary))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@triton.jit
def reduce_kernel(
    logits,
    offsets,
    targets,
    out,
    stride,
    scale,
    VOCABULARY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the target's logit, the largest logit, the origin times scale, and the four sums."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + tl.multiple_of(tl.load(offsets + row), ALIGNED)
    target = tl.load(targets + row).to(tl.int32)
    chosen = tl.load(base + target.to(tl.int64) * stride).to(tl.float32)
    origin = _first_guess(base, target, stride, scale, VOCABULARY, BLOCK)
    highest, second, s, t, q, r = _sweep(
        base, target, chosen, origin, stride, scale, VOCABULARY, BLOCK
    )
    off = second * scale - origin
    if (tl.abs(off) > _FAR) & (second > _MINUS_INF):
        origin = second * scale
        highest, second, s, t, q, r = _sweep(
            base, target, chosen, origin, stride, scale, VOCABULARY, BLOCK
        )
    left = second != _MINUS_INF  # else every sum holds lowest exponents alone
    out += row * 7
    tl.store(out, chosen)
    tl.store(out + 1, tl.maximum(highest, chosen, propagate_nan=_NAN))
    tl.store(out + 2, origin)
    tl.store(out + 3, tl.where(left, s, 0.0))
    tl.store(out + 4, tl.where(left, t, 0.0))
    tl.store(out + 5, tl.where(left, q, 0.0))
    tl.store(out + 6, tl.where(left, r, 0.0))


@triton.jit
def _first_guess(base, target, stride, scale, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """Second largest logit of the first block without the target, times scale; always finite."""
    lane = tl.arange(0, BLOCK)
    z = _load(base, 0, target, stride, VOCABULARY, BLOCK)
    z = tl.where(lane == tl.argmax(z, 0), _MINUS_INF, z)
    guess = tl.max(z, 0) * scale
    return tl.where(tl.abs(guess) < 3e38, guess, 0.0)


@triton.jit
def _load(base, start, target, stride, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """One block of logits in float32, -inf at the target and past the end."""
    column = start + tl.arange(0, BLOCK)
    inside = column < VOCABULARY
    z = tl.load(base + column.to(tl.int64) * stride, mask=inside, other=_MINUS_INF).to(tl.float32)
    if (target >= start) & (target < start + BLOCK):
        z = tl.where(column == target, _MINUS_INF, z)
    return z


@triton.jit
def _add(y, origin, scale, s, t, q, r):
    """Add logits to the sums of e = 2^x, e x, e^2, e^2 x with x = y scale - origin."""
    x = tl.maximum(tl.fma(y, scale, -origin), _LOWEST, propagate_nan=_NAN)
    e = tl.exp2(x)
    ex = e * x
    return s + e, t + ex, tl.fma(e, e, q), tl.fma(ex, e, r)


@triton.jit
def _sweep(
    base, target, chosen, origin, stride, scale, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):
    """Largest logit but the target, the largest of the rest, and the sums over the rest."""
    held = tl.full([BLOCK], _MINUS_INF, tl.float32)
    second = tl.full([BLOCK], _MINUS_INF, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    q = tl.zeros([BLOCK], tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    ahead = _load(base, 0, target, stride, VOCABULARY, BLOCK)
    for start in range(0, VOCABULARY, BLOCK):
        z = ahead
        ahead = _load(base, start + BLOCK, target, stride, VOCABULARY, BLOCK)
        y = tl.minimum(z, held, propagate_nan=_NAN)
        held = tl.maximum(z, held)
        second = tl.maximum(second, y)
        s, t, q, r = _add(y, origin, scale, s, t, q, r)
    highest = tl.max(held, 0)
    # One lane keeps the mode out, unless the target is the mode itself.
    keeper = tl.where(highest > chosen, tl.argmax(held, 0), -1)
    y = tl.where(tl.arange(0, BLOCK) == keeper, _MINUS_INF, held)
    second = tl.maximum(second, y)
    s, t, q, r = _add(y, origin, scale, s, t, q, r)
    return highest, tl.max(second, 0), tl.sum(s, 0), tl.sum(t, 0), tl.sum(q, 0), tl.sum(r, 0)
