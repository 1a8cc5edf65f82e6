"""Mini-batches of a step on their way through the loss.

Shapes: R rollouts of the step, B of them in this process's part of a mini-batch, T completion
positions, N completion tokens of the part.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wapo_analysis.record.recorder import TokenPass
from wapo_analysis.stats import TokenStats
from wapo_analysis.train.batch import Batch
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.rollout import Rollouts


@dataclass(frozen=True)
class MiniBatch:
    """A mini-batch, as far as this process trains on it, or a micro-batch of it.

    Attributes
    ----------
    index : int
        Number of the update within the step.
    rollouts : Rollouts
    advantage, group, rows : Tensor, shape (B,)
        Of each rollout; rows are their numbers in the step.
    groups : Tensor, shape (R,)
        Group of every rollout of the step.
    """

    index: int
    rollouts: Rollouts
    advantage: Tensor
    group: Tensor
    rows: Tensor
    groups: Tensor

    def split(self, size: int | None) -> "list[MiniBatch]":
        """Micro-batches of ``size`` rollouts, the last one shorter; None takes all as one."""
        parts = torch.arange(len(self.rows), device=self.rows.device).split(size or len(self.rows))
        return [
            replace(
                self,
                rollouts=self.rollouts.rows(part),
                advantage=self.advantage[part],
                group=self.group[part],
                rows=self.rows[part],
            )
            for part in parts
        ]

    def token_pass(self, stats: TokenStats, kept: Tensor, clipped: Tensor) -> TokenPass:
        """Rows of the token table for the N completion tokens.

        Parameters
        ----------
        stats : TokenStats, flat over the mask
        kept, clipped : Tensor of bool, shape (B, T)
        """
        rollouts = self.rollouts
        return TokenPass.of_rollouts(
            rollouts.mask,
            stats,
            group=self.group,
            rollout=self.rows,
            advantage=self.advantage,
            token_id=rollouts.completion_ids,
            logp_old=rollouts.logp_old,
            clipped=clipped,
            kept=kept,
            minibatch=self.index,
        )


def mini_batches(batch: Batch, config: TrainConfig, device: torch.device) -> Iterator[MiniBatch]:
    """Mini-batches in order, epoch after epoch: consecutive runs of rollouts.

    Of several processes each sees its own rollouts of every run.
    """
    advantage = torch.from_numpy(batch.advantages).to(device)
    group = torch.from_numpy(batch.group).to(device)
    rows = torch.from_numpy(batch.mine).to(device)
    chunks = rows.split(len(rows) // config.minibatches)
    for index in range(config.epochs * len(chunks)):
        mine = chunks[index % len(chunks)]
        rollouts = batch.rollouts.rows(mine)
        yield MiniBatch(index, rollouts, advantage[mine], group[mine], mine, group)
