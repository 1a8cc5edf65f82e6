"""Running sums over the updates of one step, and the step columns they give."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wapo_analysis.record.recorder import TokenPass

_SUMS = ("tokens", "entropy", "pos", "entropy_pos", "neg", "entropy_neg", "kept", "low", "high")


class StepTally:
    """Sums of one step; each token counts once per gradient pass that saw it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._kl: Tensor | None = None
        self._loss = 0.0
        self._norms: list[float] = []
        self._nonfinite = 0

    def add_tokens(self, tokens: TokenPass, ratio: Tensor, loss: Tensor, nonfinite: int) -> None:
        """Add the tokens of one micro-batch, shape (N,) each, and its scaled loss."""
        assert tokens.entropy is not None
        assert tokens.kept is not None
        assert tokens.clipped is not None
        assert tokens.logp_old is not None
        positive, negative = tokens.advantage > 0, tokens.advantage < 0
        entropy = tokens.entropy.double()
        stopped = tokens.clipped & tokens.kept
        columns = (
            torch.ones_like(entropy),
            entropy,
            positive,
            entropy * positive,
            negative,
            entropy * negative,
            tokens.kept,
            stopped & (ratio < 1),
            stopped & (ratio > 1),
        )
        sums = torch.stack([column.double().sum() for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums
        # k3 = r - ln r - 1 with r = pi / pi_old, an unbiased estimate of KL(pi_old || pi).
        log_ratio = (tokens.logp - tokens.logp_old).double().clamp(max=60.0)
        kl = (torch.expm1(log_ratio) - log_ratio).sum()
        self._kl = kl if self._kl is None else self._kl + kl
        self._loss += float(loss.detach())
        self._nonfinite += nonfinite

    def add_update(self, grad_norm: float) -> None:
        """Add one optimizer update with its gradient norm before clipping."""
        self._norms.append(grad_norm)

    def columns(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Columns of the steps table; NaN where no token of the kind was seen.

        Parameters
        ----------
        total : callable
            Adds a tensor up over processes (`distributed.World.total`).
        """
        assert self._sums is not None
        assert self._kl is not None
        own = self._sums.new_tensor([self._loss, self._nonfinite])
        *summed, kl, loss, nonfinite = total(torch.cat([self._sums, self._kl[None], own])).tolist()
        sums = dict(zip(_SUMS, summed, strict=True))
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        return {
            "loss": loss,
            "grad_norm": _ratio(sum(finite), len(finite)),
            "entropy": _ratio(sums["entropy"], sums["tokens"]),
            "entropy_pos": _ratio(sums["entropy_pos"], sums["pos"]),
            "entropy_neg": _ratio(sums["entropy_neg"], sums["neg"]),
            "kl_old": _ratio(kl, sums["tokens"]),
            "clip_low": _ratio(sums["low"], sums["kept"]),
            "clip_high": _ratio(sums["high"], sums["kept"]),
            "kept_tokens": int(sums["kept"]),
            "nonfinite": int(nonfinite),
            "skipped_updates": len(self._norms) - len(finite),
            "updates": len(self._norms),
        }


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
