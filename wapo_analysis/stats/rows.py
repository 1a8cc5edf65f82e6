"""Which rows of a logits tensor are read, and how, without a copy of the whole.

The largest columns of rows are found exactly, in two stages: block maxima, then inside the best
blocks. Those functions take the maxima and ``pick``, which gives the values (N, m) of any columns
(N, m) of the rows; the rows themselves they never see.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wapo_analysis.errors import UserError


def check(rows: Tensor, targets: Tensor, temperature: float, mask: Tensor | None = None) -> None:
    """Refuse shapes that do not fit and a temperature that is not positive.

    Parameters
    ----------
    rows : Tensor, shape (..., V) or (..., D)
        Logits or hidden states.
    targets : Tensor of int64, shape (...)
    mask : Tensor of bool, shape (...), optional

    Raises
    ------
    UserError
        One line that says what does not fit.
    """
    if rows.dim() < 2 or targets.shape != rows.shape[:-1]:
        raise UserError(
            "need (..., V) rows and (...) targets, "
            f"got {tuple(rows.shape)} and {tuple(targets.shape)}"
        )
    if mask is not None and (mask.shape != targets.shape or mask.dtype != torch.bool):
        raise UserError(
            f"need a bool mask of shape {tuple(targets.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if not temperature > 0:
        raise UserError(f"temperature must be positive, got {temperature}")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Refuse a head that does not fit hidden states (..., D); arguments of `fused_head_stats`.

    Raises
    ------
    UserError
        One line that says what does not fit.
    """
    check(hidden, targets, temperature, mask)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise UserError(f"weight {tuple(weight.shape)} does not fit hidden {tuple(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be positive and finite, got {value}")


def gathered(tensor: Tensor) -> Tensor:
    """Return a weight as it is, or gathered if it is FSDP2's shard of one.

    Raises UserError if a shard asks for a gradient: the gathered weight would pass none on.
    """
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UserError(
            "the head is a shard of FSDP2 (a DTensor): call fused_head_stats inside the model's "
            "forward, where it is whole, or under torch.no_grad()"
        )
    found: Tensor = gather()
    return found


def chosen_rows(
    targets: Tensor, vocabulary: int, mask: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Targets of the rows wanted, shape (N,), and their numbers; None if all are.

    Raises UserError if a target is no column; on a GPU the device itself ends the program, nobody
    waits.
    """
    flat = targets.reshape(-1).long()
    if kept is None and mask is not None:
        kept = mask.reshape(-1).nonzero().squeeze(1)
    chosen = flat if kept is None else flat[kept]
    inside = ((chosen >= 0) & (chosen < vocabulary)).all()
    if inside.device.type != "cpu":
        torch._assert_async(inside, f"targets must be in 0..{vocabulary - 1}")
    elif not inside:
        worst = chosen[(chosen < 0) | (chosen >= vocabulary)][0]
        raise UserError(f"targets must be in 0..{vocabulary - 1}, got {int(worst)}")
    return chosen, kept


class Rows:
    """The N rows of (..., V) logits that a mask keeps, in order, read block by block.

    ``logits`` (..., V): any strides; never copied as a whole. ``kept`` (N,), optional: numbers of
    the rows, counted over the leading dimensions, ascending. All rows without it. ``dtype``: what
    the rows are computed in: float32, or float64 if they are.
    """

    def __init__(self, logits: Tensor, kept: Tensor | None = None) -> None:
        self.logits, self.kept = logits, kept
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self._lead = logits.shape[:-1]
        self._count = self._lead.numel() if kept is None else len(kept)
        self._index: tuple[Tensor, ...] | None = None
        try:
            self._flat: Tensor | None = logits.view(-1, logits.shape[-1])
        except RuntimeError:  # the strides of the leading dimensions do not merge
            self._flat = None

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        """Rows start to stop - 1, shape (stop - start, V): a view if they lie evenly in memory.

        ``space`` takes rows that must be gathered, or converted to its dtype.
        """
        if space is None:
            return self._read(start, stop, None)
        space = space[: stop - start]
        if space.dtype == self.logits.dtype:
            return self._read(start, stop, space)
        return space.copy_(self._read(start, stop, None))

    def pick(self, start: int, stop: int, ids: Tensor) -> Tensor:
        """Values of some columns of rows start to stop - 1; ids and values (stop - start, m)."""
        if self.kept is None and self._flat is not None:
            return self._flat[start:stop].gather(1, ids)
        if self._flat is not None:
            return self._flat[self._numbers(start, stop).unsqueeze(1), ids]
        return self.logits[(*(part.unsqueeze(1) for part in self._places(start, stop)), ids)]

    def put(self, out: Tensor, start: int, values: Tensor) -> None:
        """Write the block that begins at row ``start`` into contiguous ``out`` of logits' shape."""
        flat, stop = out.view(-1, out.shape[-1]), start + len(values)
        run = self._run(start, stop)
        if run is not None:
            flat[run].copy_(values)
        else:
            flat.index_copy_(0, self._numbers(start, stop), values.to(out.dtype))

    def offsets(self) -> Tensor:
        """Distance of every row from the first element of ``logits``, in elements, shape (N,)."""
        index = self._places(0, len(self))
        strides = self.logits.stride()[:-1]
        total = torch.zeros_like(index[0])
        for one, stride in zip(index, strides, strict=True):
            total += one * stride
        return total

    def _read(self, start: int, stop: int, out: Tensor | None) -> Tensor:
        run = self._run(start, stop)
        if run is not None and self._flat is not None:
            return self._flat[run]
        if run is not None and run.start // self._lead[-1] == (run.stop - 1) // self._lead[-1]:
            panel = run.start // self._lead[-1]
            within = slice(run.start - panel * self._lead[-1], run.stop - panel * self._lead[-1])
            index: tuple[int | slice, ...] = (*_unravel(panel, self._lead[:-1]), within)
            return self.logits[index]
        if self._flat is not None:
            return torch.index_select(self._flat, 0, self._numbers(start, stop), out=out)
        return self.logits[self._places(start, stop)]

    def _places(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Numbers of rows start to stop - 1 in each leading dimension."""
        if self._index is None:  # once: every block reads some of it
            rest, index = self._numbers(0, len(self)), list[Tensor]()
            for size in reversed(self._lead):
                index.insert(0, rest % size)
                rest = rest // size
            self._index = tuple(index)
        return tuple(part[start:stop] for part in self._index)

    def _numbers(self, start: int, stop: int) -> Tensor:
        if self.kept is not None:
            return self.kept[start:stop]
        return torch.arange(start, stop, device=self.logits.device)

    def _run(self, start: int, stop: int) -> slice | None:
        """Row numbers as a slice, if they follow each other and asking costs no wait."""
        if self.kept is None:
            return slice(start, stop)
        if self.kept.device.type != "cpu" or stop <= start:
            return None
        first, last = int(self.kept[start]), int(self.kept[stop - 1])
        return slice(first, last + 1) if last - first == stop - 1 - start else None


def _unravel(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        number, rest = divmod(number, size)
        index.insert(0, rest)
    return tuple(index)


@cache
def memory() -> int:
    """Bytes of memory of this machine; 0 where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def one_by_one(
    function: Any, count: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """A batch of problems one after the other: their heads may differ."""

    def pick(place: int) -> Iterator[Any]:
        for value, dim in zip(args, in_dims, strict=True):
            yield value if not isinstance(dim, int) else value.select(dim, place)

    columns = zip(*(function.apply(*pick(i)) for i in range(count)), strict=True)
    whole = tuple(None if column[0] is None else torch.stack(column) for column in columns)
    return whole, tuple(None if column is None else 0 for column in whole)


# Columns of a block: wide enough that its maximum streams, narrow enough that few are opened.
BLOCK = 128
_SIGN_FREE = 0x7FFFFFFF

Pick = Callable[[Tensor], Tensor]


class Ends(NamedTuple):
    """Upper end of N rows, all (N, 1): logits of the target, the mode and the next, and an id."""

    chosen: Tensor
    highest: Tensor
    origin: Tensor
    mode: Tensor


def block_maxima(rows: Tensor) -> Tensor:
    """Maxima of blocks of 128 columns, the last one shorter, shape (N, ceil(V / 128))."""
    count = rows.shape[1] // BLOCK
    edge = count * BLOCK
    if count == 0:
        return rows.amax(1, keepdim=True)
    whole: Tensor = rows[:, :edge].unflatten(1, (count, BLOCK)).amax(2)
    if edge == rows.shape[1]:
        return whole
    return torch.cat((whole, rows[:, edge:].amax(1, keepdim=True)), 1)


def upper_end(pick: Pick, maxima: Tensor, target: Tensor, vocabulary: int) -> Ends:
    """Find the mode of every row and the largest column but the mode and the target.

    In the dtype of the maxima. ``mode`` is the target wherever no column is larger;
    ``origin`` is -inf where nothing is left.

    Parameters
    ----------
    maxima : Tensor, shape (N, ceil(V / 128))
        `block_maxima` of the rows; overwritten.
    target : Tensor of int64, shape (N, 1)
    vocabulary : int
        V.
    """
    chosen = pick(target).to(maxima.dtype)
    block = target.div(BLOCK, rounding_mode="floor")
    values, ids = _open(pick, maxima, block, vocabulary)
    maxima.scatter_(1, block, values.masked_fill_(ids == target, -torch.inf).amax(1, keepdim=True))
    others = maxima.amax(1, keepdim=True)
    off = others > chosen
    if maxima.device.type == "cpu" and not off.any():  # on a GPU asking would wait for it
        return Ends(chosen, torch.maximum(others, chosen), others, target)
    block = maxima.argmax(1, keepdim=True)
    values, ids = _open(pick, maxima, block, vocabulary)
    values.masked_fill_(ids == target, -torch.inf)
    mode = torch.where(off, ids.gather(1, values.argmax(1, keepdim=True)), target)
    values.masked_fill_(ids == mode, -torch.inf)
    maxima.scatter_(1, block, values.amax(1, keepdim=True))
    return Ends(chosen, torch.maximum(others, chosen), maxima.amax(1, keepdim=True), mode)


def top_columns(pick: Pick, maxima: Tensor, k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return the k largest columns of every row, largest first, the lowest id first among equals.

    The k largest lie in the k blocks of largest maximum: each of those holds a column at least as
    large as any column outside them, and with a lower id if equal, since the blocks are taken in
    the same order.

    Parameters
    ----------
    maxima : Tensor, shape (N, ceil(V / 128))
        `block_maxima` of the rows, in float32 or float64.
    k : int
        1 to V.
    vocabulary : int
        V.

    Returns
    -------
    values : Tensor, shape (N, k)
        In the dtype of the maxima. NaN counts as the largest value.
    ids : Tensor of int64, shape (N, k)
    """
    blocks = torch.arange(maxima.shape[1], device=maxima.device).unsqueeze(0)
    blocks = _places(maxima, blocks, min(k, maxima.shape[1]))
    values, ids = _open(pick, maxima, blocks, vocabulary)
    places = _places(values, ids, k)
    return values.gather(1, places), ids.gather(1, places)


def _open(pick: Pick, maxima: Tensor, blocks: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the columns in k blocks of every row, (N, 128 k); past the end -inf."""
    within = torch.arange(min(BLOCK, vocabulary), device=blocks.device)
    ids = ((blocks * BLOCK).unsqueeze(2) + within).flatten(1)
    if vocabulary % BLOCK == 0 or vocabulary < BLOCK:
        return pick(ids).to(maxima.dtype), ids
    values = pick(ids.clamp(max=vocabulary - 1)).to(maxima.dtype)
    return values.masked_fill_(ids >= vocabulary, -torch.inf), ids


def _places(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Places of the k largest values, (N, k), the lowest id first among equals."""
    if values.dtype == torch.float64:
        by_id = ids.expand(values.shape).argsort(dim=1, stable=True)
        order = values.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
        places: Tensor = by_id.gather(1, order[:, :k])
        return places
    # A float32's bits, the lower 31 flipped below zero, order as the number does; with the id
    # below them every key is distinct and topk has no ties to break. Adding 0 makes -0 be 0.
    bits = (values + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & _SIGN_FREE)).long().bitwise_left_shift_(32).sub_(ids)
    return keys.topk(k, dim=1).indices
