"""What one call of the published loss saw, and its per-token diagnostics.

Shapes: B rollouts of one micro-batch, T positions. Masks multiply, as there, so a non-finite
ratio spreads exactly as it does in the published numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wapo_analysis.objectives.config import ObjectiveConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """What one call of the loss saw; every tensor detached.

    ``logp``, ``logp_old``, ``entropy`` (B, T) are in nats; ``valley``, ``mask`` and ``keep`` are
    boolean (B, T); ``advantage`` and ``weight`` are (B,).
    """

    config: ObjectiveConfig
    logp: Tensor
    logp_old: Tensor
    entropy: Tensor
    valley: Tensor
    mask: Tensor
    keep: Tensor
    advantage: Tensor
    weight: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """Token log-ratio, nats, (B, T)."""
        return self.logp - self.logp_old

    @property
    def token_ratio(self) -> Tensor:
        """Token importance ratio, (B, T)."""
        return self.log_ratio.exp()

    @property
    def lengths(self) -> Tensor:
        """Loss-mask tokens per rollout, (B,)."""
        return self.mask.sum(-1).to(self.logp.dtype)

    @property
    def sequence_ratio(self) -> Tensor:
        """Geometric mean of a rollout's token ratios, (B,); masked by multiplication."""
        mask = self.mask.to(self.logp.dtype)
        return ((self.log_ratio * mask).sum(-1) / (self.lengths + 1e-8)).exp()

    @property
    def sign(self) -> Tensor:
        """Advantage of a rollout, 0 if it has no loss-mask token; (B, 1)."""
        zero = torch.zeros_like(self.advantage)
        return torch.where(self.lengths > 0, self.advantage, zero).unsqueeze(-1)

    @property
    def ratio(self) -> Tensor:
        """Ratio that diagnostics use, even where the loss has none; (B, T)."""
        if self.config.name == "raft":
            return torch.ones_like(self.logp)
        if self.config.name == "gspo":
            return self.sequence_ratio.unsqueeze(-1).expand_as(self.logp)
        return self.token_ratio

    @property
    def held_ratio(self) -> Tensor:
        """The same ratio held in the clip range, (B, T)."""
        return self.ratio.clamp(self.config.bounds.low, self.config.bounds.high)


def token_strength(batch: Microbatch) -> Tensor:
    """Diagnostic "token strength" w x A, shape (B, T); ignores clipping, gates and normaliser."""
    return batch.weight.unsqueeze(-1) * batch.ratio * batch.advantage.unsqueeze(-1)


def grad_magnitude(batch: Microbatch) -> Tensor:
    """Diagnostic "gradient magnitude" w x (1 - p) |A|, shape (B, T), 0 where the clip is active."""
    distance = 1 - batch.logp.exp()
    weight = batch.weight.unsqueeze(-1)
    if batch.config.name == "raft":
        return weight * distance
    advantage = batch.advantage.unsqueeze(-1)
    clipped = batch.ratio * advantage > batch.held_ratio * advantage
    return weight * batch.ratio * distance * advantage.abs() * (~clipped).to(batch.logp.dtype)


def is_clipped(batch: Microbatch) -> Tensor:
    """Kept tokens whose held ratio differs from the ratio, on either side; bool (B, T)."""
    if not batch.config.uses_ratio:
        return torch.zeros_like(batch.keep)
    return batch.keep & (batch.held_ratio != batch.ratio)
