"""The statistics of a set of tokens."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of N tokens; only ``logp`` carries gradient.

    Attributes
    ----------
    logp : Tensor, shape (N,)
        Log-probability of the target, nats.
    entropy : Tensor, shape (N,)
        Entropy of the whole distribution, nats.
    collision_rest : Tensor of float64, shape (N,)
        Sum of p_v^2 over v != target.
    collision_logp_rest : Tensor of float64, shape (N,)
        Sum of p_v^2 ln p_v over v != target, nats.
    top1 : Tensor of bool, shape (N,)
        The target is (one of) the most probable.
    top_logp, top_ids : Tensor, shape (N, k), optional
        The k most probable tokens, most probable first, equal ones by ascending id:
        log-probabilities (nats) and ids. None unless asked for.

    Notes
    -----
    The other floats are float32, float64 for float64 logits. float32 holds ``logp`` and ``entropy``
    to its rounding until the rest of the row lies 87 nats below the mode; further down they fade to
    0, with all else, at 103 nats. Squares of probabilities would fade at half of that, so they are
    float64. A row with a NaN or +inf, or of nothing but -inf, is NaN throughout, its ``top1`` False
    and its ``top_ids`` -1.
    """

    logp: Tensor
    entropy: Tensor
    collision_rest: Tensor
    collision_logp_rest: Tensor
    top1: Tensor
    top_logp: Tensor | None = None
    top_ids: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenStats":
        """Apply a function to every statistic that is there."""
        return TokenStats(*(part if part is None else change(part) for part in self))  # type: ignore[arg-type]

    @classmethod
    def concat(cls, parts: "Sequence[TokenStats]") -> "TokenStats":
        """Stack the tokens of several parts, which hold the same statistics."""
        columns = zip(*parts, strict=True)
        return cls(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]
