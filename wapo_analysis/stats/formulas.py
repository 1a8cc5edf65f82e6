"""Reduced rows to statistics: the formulas, once for all backends, and what they make."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
# exp(-10000) is 0 in float64 too: an empty rest has weight 0 and no NaN from 0 * inf.
_NOTHING = -1e4


class Reduced(NamedTuple):
    """What a pass over the logits leaves of N rows.

    ``numbers`` (N, 7): logit of the target, largest logit m, origin a (-inf if nothing is left of
    the row), and, over the rest, the sums of e = 2^x, e x, e^2, e^2 x with x = (logit - a) log2(e)
    / T; ``top_values``, ``top_ids`` (N, k), optional: largest logits and their ids.
    """

    numbers: Tensor
    top_values: Tensor | None = None
    top_ids: Tensor | None = None


class Columns(NamedTuple):
    """Statistics of N rows and what the backward pass needs; float64 but ``top1``, ``top_ids``."""

    logp: Tensor
    entropy: Tensor
    collision_rest: Tensor
    collision_logp_rest: Tensor
    top1: Tensor
    log_z: Tensor
    highest: Tensor
    top_logp: Tensor | None
    top_ids: Tensor | None


def wide(block: Tensor) -> Tensor:
    """Return the block in float32; float64 stays."""
    return block if block.dtype == torch.float64 else block.float()


def finish(reduced: Reduced, temperature: float) -> Columns:
    """Statistics from reduced rows.

    In nats. A row whose largest logit is not finite, or with a NaN in its sums, is NaN
    throughout. ``log_z`` is the log of the normaliser relative to the largest logit.
    """
    chosen, highest, origin, sum_e, sum_ex, sum_e2, sum_e2x = reduced.numbers.double().unbind(1)
    # What is NaN here is NaN in every statistic.
    highest = highest.masked_fill(~(highest + sum_e).isfinite(), torch.nan)
    x_target = (chosen - highest) / temperature
    shift = ((origin - highest) / temperature).clamp(min=_NOTHING)
    weight, top1 = shift.exp(), x_target == 0
    others = (~top1).double()  # the mode itself, if it is not the target
    e_target = x_target.exp() * others
    below = weight * sum_e
    z = 1 + e_target + below
    log_z = torch.log1p(e_target + below)
    logp = x_target - log_z
    sum_x = math.log(2) * sum_ex + shift * sum_e
    sum_2x = math.log(2) * sum_e2x + shift * sum_e2
    rest = (weight**2 * sum_e2 + others) / z**2
    rest_logp = weight**2 * sum_2x / z**2 - rest * log_z
    entropy = ((below + others) * log_z - weight * sum_x) / z
    entropy = entropy - logp.exp() * logp.clamp(min=_NOTHING)
    top_logp = top_ids = None
    if reduced.top_values is not None and reduced.top_ids is not None:
        above = (reduced.top_values.double() - highest.unsqueeze(1)) / temperature
        top_logp = above - log_z.unsqueeze(1)
        top_ids = reduced.top_ids.masked_fill(log_z.isnan().unsqueeze(1), -1)
    return Columns(logp, entropy, rest, rest_logp, top1, log_z, highest, top_logp, top_ids)


def narrowed(columns: Columns, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Columns of `TokenStats` that are always measured, in its order and dtypes.

    Where the log-probability fades to 0 the squares do too: 1 - p = 0 beside a positive sum of
    squares would be no distribution, and would call a certain token a valley.
    """
    logp = columns.logp.to(dtype)
    here = logp != 0
    rest, rest_logp = columns.collision_rest * here, columns.collision_logp_rest * here
    return logp, columns.entropy.to(dtype), rest, rest_logp, columns.top1


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

    @classmethod
    def measured(cls) -> tuple[str, ...]:
        """Names of the statistics that are there whatever is asked for."""
        return tuple(name for name in cls._fields if name not in cls._field_defaults)

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenStats":
        """Apply a function to every statistic that is there."""
        return TokenStats(*(part if part is None else change(part) for part in self))  # type: ignore[arg-type]

    @classmethod
    def concat(cls, parts: "Sequence[TokenStats]") -> "TokenStats":
        """Stack the tokens of several parts, which hold the same statistics."""
        columns = zip(*parts, strict=True)
        return cls(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]
