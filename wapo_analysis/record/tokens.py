"""The tokens of one gradient pass, and their way from the trainer's device to numpy columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.record.topk import TopTokens
from wapo_analysis.stats import TokenStats
from wapo_analysis.table import Array


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
        mask: Tensor,
        stats: TokenStats,
        *,
        group: Tensor,
        rollout: Tensor,
        advantage: Tensor,
        token_id: Tensor,
        logp_old: Tensor,
        clipped: Tensor,
        kept: Tensor,
        minibatch: int = 0,
        at: Tensor | None = None,
    ) -> "TokenPass":
        """Pick the tokens of B rollouts of T positions that a mask wants.

        Parameters
        ----------
        mask : Tensor of bool, shape (B, T)
        stats : TokenStats, flat over the mask
        group, rollout, advantage : Tensor, shape (B,)
        token_id, logp_old, clipped, kept : Tensor, shape (B, T)
        at : Tensor of int64, shape (N,), optional
            Numbers of the tokens in (B T), ascending, if they are known: a GPU must be waited for
            to find them.
        """
        at = mask.reshape(-1).nonzero().squeeze(1) if at is None else at
        row, position = at // mask.shape[1], at % mask.shape[1]
        return cls(
            group=group[row],
            rollout=rollout[row],
            position=position,
            token_id=token_id.reshape(-1)[at],
            advantage=advantage[row],
            logp=stats.logp.detach(),
            logp_old=logp_old.reshape(-1)[at],
            entropy=stats.entropy,
            collision_rest=stats.collision_rest,
            collision_logp_rest=stats.collision_logp_rest,
            clipped=clipped.reshape(-1)[at],
            kept=kept.reshape(-1)[at],
            top1=stats.top1,
            minibatch=minibatch,
        )

    def given(self) -> dict[str, Tensor]:
        """Statistics that are there, without their graph."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v.detach() for name, v in values.items() if isinstance(v, Tensor)}


class HostPass:
    """Columns of a pass whose tensors are in host memory: views, nothing is copied.

    Parameters
    ----------
    tokens : TokenPass
        Later changes of its fields are not seen.
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


class DevicePass(HostPass):
    """Columns of a pass on an accelerator, packed and on their way to pinned memory.

    Floats as they are, integers and one word of flags are the rows of a single int32 tensor, so
    that a pass costs one copy; nobody waits for it but the reader of the columns.

    Parameters
    ----------
    tokens : TokenPass
        Integers must fit int32.
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
        packed = torch.stack([*rows, flags])
        pinned = device.type == "cuda"
        self._host = torch.empty(packed.shape, dtype=torch.int32, pin_memory=pinned)
        self._host.copy_(packed, non_blocking=pinned)
        self._event: torch.cuda.Event | None = None
        if pinned:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def __len__(self) -> int:
        return int(self._host.shape[1])

    @property
    def token_ids(self) -> Array | None:
        """None: a look would wait for the device."""
        return None

    def _arrived(self) -> dict[str, Array]:
        if self._event is not None:
            self._event.synchronize()
        words = self._host.numpy()
        given = {name: words[row].view(np.float32) for row, name in enumerate(self._floats)}
        start = len(self._floats)
        given |= {name: words[start + row] for row, name in enumerate(self._ints)}
        given |= {name: words[-1] >> bit & 1 == 1 for bit, name in enumerate(self._flags)}
        return given


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
