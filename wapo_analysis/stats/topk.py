"""The largest columns of rows, exactly, in two stages: block maxima, then inside the best blocks.

Functions take the maxima and ``pick``, which gives the values (N, m) of any columns (N, m) of the
rows; the rows themselves they never see.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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

    Parameters
    ----------
    pick : callable
    maxima : Tensor, shape (N, ceil(V / 128))
        `block_maxima` of the rows; overwritten.
    target : Tensor of int64, shape (N, 1)
    vocabulary : int
        V.

    Returns
    -------
    Ends
        In the dtype of the maxima. ``mode`` is the target wherever no column is larger; ``origin``
        is -inf where nothing is left.
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
    pick : callable
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
    if k < maxima.shape[1]:
        blocks = _places(maxima, blocks, k)
    blocks = blocks.expand(len(maxima), -1)
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
