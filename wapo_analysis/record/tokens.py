"""The tokens of one gradient pass, and their way from the trainer's device to numpy columns."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.derive import (
    CELL_KEYS,
    CELLS,
    cell_numbers,
    cell_terms,
    derived_columns,
    token_sums,
)
from wapo_analysis.record.topk import TopTokens
from wapo_analysis.schema import CLASSES, TOKENS
from wapo_analysis.stats import TokenStats
from wapo_analysis.table import Array, Records


@dataclass
class TokenPass:
    """Tokens of one gradient pass, flat over the loss mask; every tensor has shape (N,).

    ``coef`` is filled by the backward pass, ``*_after`` by re-scoring; ``top`` holds the most
    probable tokens of a few rollouts, if any of the pass are looked at; ``outside`` counts the
    positions that got a gradient though the loss mask hides them. Leave a statistic None if
    the source cannot give it: it is stored as missing.

    The tensors are read when the step has ended, on a CPU without a copy, possibly by another
    thread while training goes on. They must own their memory: picking tokens by a mask or an index
    gives such tensors. Clone one that shares memory with a buffer the trainer writes again.
    """

    group: Tensor
    rollout: Tensor
    position: Tensor
    token_id: Tensor
    advantage: Tensor
    logp: Tensor
    logp_old: Tensor | None = None
    logp_prox: Tensor | None = None
    entropy: Tensor | None = None
    collision_rest: Tensor | None = None
    collision_logp_rest: Tensor | None = None
    clipped: Tensor | None = None
    kept: Tensor | None = None
    top1: Tensor | None = None
    coef: Tensor | None = None
    logp_after: Tensor | None = None
    entropy_after: Tensor | None = None
    minibatch: int = field(default=0, kw_only=True)
    top: TopTokens | None = field(default=None, kw_only=True)
    outside: tuple[Tensor, ...] = field(default=(), kw_only=True)

    @classmethod
    def of_rollouts(
        cls,
        stats: TokenStats,
        *,
        group: Tensor,
        rollout: Tensor,
        advantage: Tensor,
        token_id: Tensor,
        logp_old: Tensor,
        clipped: Tensor,
        kept: Tensor,
        minibatch: int,
        at: Tensor,
    ) -> "TokenPass":
        """Pick N tokens of B rollouts of T positions, those that ``stats`` are of.

        Parameters
        ----------
        group, rollout, advantage : Tensor, shape (B,)
        token_id, logp_old, clipped, kept : Tensor, shape (B, T)
        at : Tensor of int64, shape (N,)
            Numbers of the tokens in (B T), ascending.
        """
        row, position = at // token_id.shape[1], at % token_id.shape[1]
        return cls(
            group=group[row],
            rollout=rollout[row],
            position=position,
            token_id=token_id.reshape(-1)[at],
            advantage=advantage[row],
            logp=stats.logp.detach(),
            logp_old=logp_old.reshape(-1)[at],
            clipped=clipped.reshape(-1)[at],
            kept=kept.reshape(-1)[at],
            minibatch=minibatch,
            **beside_logp(stats),
        )

    def given(self) -> dict[str, Tensor]:
        """Statistics that are there, without their graph."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v.detach() for name, v in values.items() if isinstance(v, Tensor)}


def beside_logp(stats: TokenStats | Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Statistics but ``logp`` as fields of a `TokenPass`; what is unknown is None."""
    given = stats._asdict() if isinstance(stats, TokenStats) else stats
    return {name: given.get(name) for name in TokenStats.measured() if name != "logp"}


class HostPass:
    """Columns of a pass whose tensors are in host memory: views, nothing is copied.

    ``tokens``: later changes of its fields are not seen.
    """

    def __init__(self, tokens: TokenPass | TopTokens) -> None:
        self._minibatch = tokens.minibatch
        self._given = {name: _as_numpy(values) for name, values in tokens.given().items()}

    def __len__(self) -> int:
        return len(self._given["logp"])

    @property
    def token_ids(self) -> Array | None:
        """Sampled tokens, shape (N,), or None while they are on their way from the device."""
        return self._given["token_id"]

    def columns(self, step: int, rank: int) -> dict[str, Array]:
        """Columns of the token table, shape (N,) each; what is missing is left out."""
        given = self._arrived()
        rows = len(self)
        for name, value in (("step", step), ("minibatch", self._minibatch), ("rank", rank)):
            given[name] = np.full(rows, value)
        if "advantage" in given and "kept" not in given:
            given["kept"] = np.ones(rows, bool)
        return given

    def _arrived(self) -> dict[str, Array]:
        return dict(self._given)


class Sent:
    """A tensor on its way to pinned memory; nobody waits for it but who calls `arrived`."""

    def __init__(self, values: Tensor) -> None:
        pinned = values.device.type == "cuda"
        self.shape = values.shape
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        self._host.copy_(values, non_blocking=pinned)
        self._event: torch.cuda.Event | None = None
        if pinned:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def arrived(self) -> Array:
        """The values on the host."""
        if self._event is not None:
            self._event.synchronize()
        return np.asarray(self._host.numpy())


class DevicePass(HostPass):
    """Columns of a pass on an accelerator, packed and on their way to pinned memory.

    Floats as they are, integers and one word of flags are the rows of a single int32 tensor, so
    that a pass costs one copy; nobody waits for it but the reader of the columns. ``tokens``:
    integers must fit int32.
    """

    def __init__(self, tokens: TokenPass | TopTokens) -> None:
        self._minibatch = tokens.minibatch
        given, device = tokens.given(), tokens.logp.device
        self._floats = [name for name, v in given.items() if v.is_floating_point()]
        self._flags = [name for name, v in given.items() if v.dtype == torch.bool]
        self._ints = [n for n in given if n not in self._floats and n not in self._flags]
        words = [given[n].to(device, torch.float32).contiguous() for n in self._floats]
        rows = [word.view(torch.int32) for word in words]
        rows += [given[name].to(device, torch.int32) for name in self._ints]
        flags = torch.zeros_like(rows[0])
        for bit, name in enumerate(self._flags):
            flags |= given[name].to(device, torch.int32) << bit
        self._sent = Sent(torch.stack([*rows, flags]))

    def __len__(self) -> int:
        return int(self._sent.shape[1])

    @property
    def token_ids(self) -> Array | None:
        """None: a look would wait for the device."""
        return None

    def _arrived(self) -> dict[str, Array]:
        words = self._sent.arrived()
        given = {name: words[row].view(np.float32) for row, name in enumerate(self._floats)}
        start = len(self._floats)
        given |= {name: words[start + row] for row, name in enumerate(self._ints)}
        given |= {name: words[-1] >> bit & 1 == 1 for bit, name in enumerate(self._flags)}
        return given


#: Tokens summed up at a time on a device: what is derived of them takes 120 MB.
_BLOCK = 1 << 19
#: Places a cell has while it is summed up: threads that add to one place wait for each other.
_SPREAD = 64


class DeviceTotals:
    """Class totals and sums of a pass, made in float64 where its tokens are; only they travel.

    ``given``: statistics every pass of the step has, for sums for the step columns; None makes no
    sums; ``sequence_level``: the clip looks at the ratio of the whole rollout, all of it in this
    pass.
    """

    def __init__(
        self,
        tokens: TokenPass,
        temperature: float,
        given: frozenset[str] | None,
        sequence_level: bool = False,
    ) -> None:
        columns = _stored(tokens)
        ratio = _rollout_ratio(columns) if given is not None and sequence_level else None
        parts = []
        for start in range(0, max(1, len(columns["logp"])), _BLOCK):
            block = {name: values[start : start + _BLOCK] for name, values in columns.items()}
            block |= derived_columns(block, temperature)
            terms = cell_terms(block)
            part = [_cell_sums(cell_numbers(block), terms).flatten()]
            self._names, self._sums = list(terms), list[str]()
            if given is not None:
                if ratio is not None:
                    block["ratio"] = ratio[start : start + _BLOCK]
                sums = token_sums(block, given)
                self._sums = list(sums)
                part += [value.double().reshape(1) for value in sums.values()]
            parts.append(torch.cat(part))
        self._sent = Sent(torch.stack(parts).sum(0))

    def arrived(self, step: int, rank: int) -> tuple[Records, dict[str, float]]:
        """Rows of the ``classes`` table, and the sums."""
        values = self._sent.arrived()
        shape = 2, len(self._names), CELLS
        cells = values[: math.prod(shape)].reshape(shape)
        held = np.flatnonzero(cells[0, 0])
        codes = np.unravel_index(held, (3, 3, CELLS // 9))
        keys = {name: code - 1 for name, code in zip(CELL_KEYS[2:], codes, strict=True)}
        keys |= {"step": np.full(len(held), step), "rank": np.full(len(held), rank)}
        total = np.where(cells[1] > 0, cells[0], np.nan)[:, held]
        totals = Records.build(CLASSES, {**keys, **dict(zip(self._names, total, strict=True))})
        return totals, dict(zip(self._sums, values[cells.size :].tolist(), strict=True))


def _stored(tokens: TokenPass) -> dict[str, Tensor]:
    """Columns as the token table would hold them, missing statistics NaN."""
    given = tokens.given()
    like = given["logp"].float()
    columns = {
        column.name: given[column.name].to(like.device, getattr(torch, column.dtype))
        if column.name in given
        else torch.full_like(like, math.nan)
        for column in TOKENS.stored
        if column.dtype == "float32"
    }
    flags = {"kept": torch.ones_like, "clipped": torch.zeros_like}
    for name, absent in flags.items():
        there = given[name].to(like.device, torch.bool) if name in given else None
        columns[name] = absent(like, dtype=torch.bool) if there is None else there
    return columns | {"rollout": given["rollout"].to(like.device)}


def _rollout_ratio(columns: Mapping[str, Tensor]) -> Tensor:
    """`wapo_analysis.derive.sequence_ratio` of one pass, without a wait for the device."""
    rollout, order = columns["rollout"].sort(stable=True)
    index = torch.empty_like(order)
    index[order] = (rollout.diff(prepend=rollout[:1]) != 0).cumsum(0)
    old = columns["logp_old"].double()
    prox = columns["logp_prox"].double()
    log_ratio = columns["logp"].double() - torch.where(prox.isnan(), old, prox)
    sums = torch.zeros(2, len(index), dtype=torch.float64, device=index.device)
    sums[0].index_add_(0, index, log_ratio)
    sums[1].index_add_(0, index, torch.ones_like(log_ratio))
    return (sums[0] / sums[1].clamp(min=1)).exp()[index]


def _cell_sums(cell: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
    """Sum of every term in every cell without NaN, and the tokens it is known of.

    Returns Tensor of float64, shape (2, terms, CELLS).
    """
    place = torch.arange(len(cell), device=cell.device) % _SPREAD * CELLS + cell
    sums = torch.zeros(
        2, len(terms), _SPREAD * CELLS, dtype=torch.float64, device=cell.device
    )  # fmt: skip
    for row, values in enumerate(terms.values()):
        wide = values.double()
        sums[0, row].index_add_(0, place, wide.nan_to_num(0.0, math.inf, -math.inf))
        sums[1, row].index_add_(0, place, (~wide.isnan()).double())
    return sums.reshape(2, len(terms), _SPREAD, CELLS).sum(2)


def on_host(tokens: TokenPass | TopTokens) -> HostPass:
    """Start bringing a pass to the host; never waits for a CUDA device."""
    return HostPass(tokens) if tokens.logp.device.type == "cpu" else DevicePass(tokens)


def _as_numpy(values: Tensor) -> Array:
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # numpy has no bfloat16
    return np.asarray(values.cpu().numpy())


def given_in_all(passes: Sequence[TokenPass]) -> frozenset[str]:
    """Statistics that every one of some passes has."""
    names = [frozenset(tokens.given()) for tokens in passes]
    return frozenset.intersection(*names) if names else frozenset()


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same completion, in [0, 1].

    Examples
    --------
    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    grams = Counter(zip(*(ids[start:] for start in range(n)), strict=False))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0
