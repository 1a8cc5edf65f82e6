"""Running sums over the updates of one step, and the step columns they give."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wapo_analysis.derive import step_columns, token_sums
from wapo_analysis.record.recorder import TokenPass


class StepTally:
    """Sums of one step; each token counts once per gradient pass that saw it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._loss: Tensor | float = 0.0
        self._norms: list[float] = []

    def add_tokens(self, tokens: TokenPass, ratio: Tensor, loss: Tensor) -> None:
        """Add the tokens of one micro-batch, their ratio in the loss, shape (N,), and its loss."""
        sums = token_sums({**tokens.given(), "ratio": ratio})
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()}
        self._loss = self._loss + loss.detach().double()  # nobody waits for it

    def add_update(self, grad_norm: float) -> None:
        """Add one optimizer update with its gradient norm before clipping."""
        self._norms.append(grad_norm)

    def columns(
        self, total: Callable[[Tensor], Tensor], rollouts: Mapping[str, float]
    ) -> dict[str, float]:
        """Columns of the steps table; what no token was seen for is left out.

        Parameters
        ----------
        total : callable
            Adds a tensor up over processes (`distributed.World.total`).
        rollouts : mapping of str to float
            Sums over the rollouts of all processes, of `wapo_analysis.derive.rollout_sums`.
        """
        own = [torch.as_tensor(self._loss), *self._sums.values()]
        loss, *summed = total(torch.stack([value.double() for value in own])).tolist()
        sums = dict(zip(self._sums, summed, strict=True))
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        return {
            "loss": loss,
            "grad_norm": sum(finite) / len(finite) if finite else math.nan,
            **step_columns({**sums, **rollouts}),
            "skipped_updates": len(self._norms) - len(finite),
            "updates": len(self._norms),
        }
