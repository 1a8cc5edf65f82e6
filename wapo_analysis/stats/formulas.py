"""Reduced rows to statistics: the formulas, once for all backends.

A backend reduces a row to seven numbers (`Reduced`); what is made of them is here, in
float64, since that costs nothing for N rows.

With m the largest logit (the mode), y the target and *the rest* every other token, the sums run
over the rest alone and are taken relative to its own largest logit, the origin a:

    x_v = (z_v - a) / T,  e_v = exp(x_v),  d = exp((a - m) / T)
    Z = 1 + [y != m] e_y + d sum e,  ln p_v = x_v + (a - m) / T - ln Z  for v in the rest

No sum subtracts nearly equal numbers and none is lost below the mode, however far the rest lies
under it (taxonomy/README.md, section on stable forms).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
# exp(-10000) is 0 in float64 too: an empty rest has weight 0 and no NaN from 0 * inf.
_NOTHING = -1e4


class Reduced(NamedTuple):
    """What a pass over the logits leaves of N rows.

    Attributes
    ----------
    numbers : Tensor, shape (N, 7)
        Logit of the target, largest logit m, origin a (-inf if nothing is left of the row), and,
        over the rest, the sums of e = 2^x, e x, e^2, e^2 x with x = (logit - a) log2(e) / T.
    top_values, top_ids : Tensor, shape (N, k), optional
        Largest logits and their ids.
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

    Parameters
    ----------
    reduced : Reduced, N rows
    temperature : float

    Returns
    -------
    Columns
        In nats. A row whose largest logit is not finite, or with a NaN in its sums, is NaN
        throughout. ``log_z`` is the log of the normaliser relative to the largest logit.
    """
    chosen, highest, origin, sum_e, sum_ex, sum_e2, sum_e2x = reduced.numbers.double().unbind(1)
    # Not finite times 0 is NaN, and what is NaN here is NaN in every statistic.
    highest = highest + (highest + sum_e) * 0
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


def narrowed(columns: Columns, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """First five columns in the dtypes of `TokenStats`.

    Where the log-probability fades to 0 the squares do too: 1 - p = 0 beside a positive sum of
    squares would be no distribution, and would call a certain token a valley.
    """
    logp = columns.logp.to(dtype)
    here = logp != 0
    rest, rest_logp = columns.collision_rest * here, columns.collision_logp_rest * here
    return logp, columns.entropy.to(dtype), rest, rest_logp, columns.top1
