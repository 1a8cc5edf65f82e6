"""Statistics of the tokens of one TRL gradient pass, from whatever the trainer computes.

Shapes: B rollouts, T completion positions, L positions in all, V vocabulary, D hidden width, N
tokens of the loss mask. Four sources, told apart by what the model returns:

* logits (TRL 0.21 to 1.14): reduced inside the forward, before the trainer divides them in place;
* our own head in place of TRL's (replace mode): statistics come with the log-probabilities;
* hidden states and head: the backbone's output goes through the head once more, in blocks, inside
  the model's own forward, where a head that is split over processes is whole or can be gathered;
* the fused head (TRL 1.15 on): log sum p^2 comes with the log-probabilities, nearly for free.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture import Hook, Patches
from wapo_analysis.capture.lm_head import LmHead, rows_of, whole
from wapo_analysis.capture.trl.replace import TrlHead
from wapo_analysis.capture.trl.trainer import TrlTrainer
from wapo_analysis.record.topk import TopTokens
from wapo_analysis.stats import TokenStats, token_stats

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 0.3

Columns = dict[str, Tensor | None]


@dataclass
class _Call:
    """One scoring of the completions while the loss is computed."""

    mask_BT: Tensor
    ids_BT: Tensor
    exact: bool
    top: TopTokens | None = None
    again: bool = False
    from_logits: list[TokenStats] = field(default_factory=list)
    from_own: list[TokenStats] = field(default_factory=list)
    from_head: list[TokenStats] = field(default_factory=list)
    fused: list[Any] = field(default_factory=list)
    rows: int = 0

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """Mask and ids of the rollouts of the next forward pass."""
        rows = slice(self.rows, self.rows + count)
        self.rows = rows.stop
        return self.mask_BT[rows], self.ids_BT[rows]


class StatsReader:
    """Reads token statistics out of a trainer's own forward passes.

    ``scheduled``: the head is to be read in this scoring, by the schedule alone: the same on all
    processes, whether or not one of them still records; ``source``: what gave the last statistics.

    Parameters
    ----------
    patches : Patches
        Takes the two changes made here: the forward of the causal model, a hook on its backbone.
    guard : callable
        ``guard(action, *args)`` runs an action and keeps its exception from the trainer.
    top1 : bool
        Let the fused head tell whether a token was the most probable one; costs another pass.
    head : TrlHead
        Who makes the log-probabilities of a fused head; gets installed.
    """

    def __init__(
        self,
        trainer: TrlTrainer,
        patches: Patches,
        guard: Callable[..., Any],
        top1: bool,
        head: TrlHead,
    ) -> None:
        self._trainer, self._guard, self._head = trainer, guard, head
        self._model = trainer.model
        self._richer = richer_head(trainer, top1)
        self._call: _Call | None = None
        self._hidden: Tensor | None = None
        self._inside = False
        self._trusted = True
        self.scheduled = False
        self.source = "none"
        patches.wrap(self._model, "forward", self._forward)
        head.install(self._model, patches)
        backbone = getattr(self._model, "base_model", None)
        if isinstance(backbone, torch.nn.Module) and backbone is not self._model:
            patches.on_close(backbone.register_forward_hook(Hook(self._keep_hidden)).remove)

    def open(self, mask_BT: Tensor, ids_BT: Tensor, top: TopTokens | None = None) -> None:
        """Look at the forward passes that follow; if ``scheduled``, at their head too.

        Parameters
        ----------
        mask_BT : Tensor of bool, shape (B, T)
            Loss mask.
        ids_BT : Tensor of int64, shape (B, T)
            Completion ids.
        top : TopTokens, optional
            Rows whose most probable tokens are read, where there are logits or the head is read.
        """
        self._call = _Call(mask_BT, ids_BT, self.scheduled, top)

    def open_again(self, mask_BT: Tensor | None, top: TopTokens | None) -> None:
        """Look at the same tokens once more after the update, and at nothing else."""
        if mask_BT is not None and top is not None and top.ids is not None:
            self._call = _Call(mask_BT, mask_BT, self.scheduled, top, again=True)

    def cancel(self) -> None:
        """Stop looking; nothing is kept."""
        self._call, self._hidden, self.scheduled = None, None, False

    def close(self, logps_BT: Tensor, entropies_BT: Tensor | None) -> Columns:
        """Statistics of the pass since `open`.

        Returns logp, entropy, collision_rest, collision_logp_rest and top1, shape (N,) each; None
        is "not known". ``logps_BT`` (B, T): log-probabilities the trainer works with, nats;
        ``entropies_BT`` (B, T), optional: its entropies, nats.
        """
        call, self._call = self._call, None
        assert call is not None
        logp = logps_BT.detach()[call.mask_BT].float()
        if call.from_own:
            self.source = "our head in place of the trainer's"
            return dict(
                TokenStats.concat(call.from_own).map(partial(_completion, call=call))._asdict()
            )
        stats = self._exact(call)
        if stats is not None and self._agrees(stats.logp, logp, logps_BT.dtype):
            self.source = "logits" if call.from_logits else "hidden states and head"
            return dict(stats._asdict())
        columns: Columns = {"logp": logp}
        if entropies_BT is not None:
            columns["entropy"] = entropies_BT.detach()[call.mask_BT].float()
        columns.update(self._from_fused(call, logp))
        return columns

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._call is None and not self.scheduled:
            return original(*args, **kwargs)
        # Its extra outputs cost a pass over the logits; where the head is read anyway they idle.
        call = self._call
        read = self._head.working or (call is not None and call.exact and self._trusted)
        wanted = call is not None and kwargs.get("fused_lm_head") and not read
        self._hidden, self._inside = None, True
        try:
            out = (self._richer if wanted and self._richer else original)(*args, **kwargs)
        finally:
            self._inside = False
        if not (self.scheduled and getattr(out, "log_probs", None) is not None):
            self._guard(self._take, out, None)
        else:
            # Gathering a head is a step of all processes: none leaves it out, failed or not.
            with whole(self._model.get_output_embeddings()) as tensors:
                self._guard(self._take, out, tensors)
        self._hidden = None
        return out

    def _take(self, out: Any, tensors: tuple[Tensor, Tensor | None] | None) -> None:
        call = self._call
        if call is None:
            return
        own = self._head.take()
        if own is not None:
            call.from_own.append(own)
        elif getattr(out, "log_probs", None) is not None:
            call.fused.append(out)
            if tensors is not None:
                self._read_head(tensors, self._hidden)
        elif getattr(out, "logits", None) is not None:
            self._read_top(call, out.logits, None)
            if not call.again:
                call.from_logits.append(self._reduce(out.logits, call))

    @torch.no_grad()
    def _read_top(self, call: _Call, rows_BLX: Tensor, head: LmHead | None) -> None:
        """Most probable tokens from logits, or from hidden states and head, of a whole pass."""
        if call.top is None or len(rows_BLX) != len(call.mask_BT):
            return
        rows_BTX = rows_BLX.detach()[:, -call.mask_BT.shape[1] - 1 : -1]
        if head is None:
            call.top.read(rows_BTX.__getitem__)
            return
        with self._precision(rows_BTX):
            cast = self._trainer.casts_head
            call.top.read(lambda at: head.logits(rows_BTX[at].float() if cast else rows_BTX[at]))

    def _precision(self, hidden: Tensor) -> AbstractContextManager[Any]:
        """That of the trainer's own head: none of the autocast around it, where that is cast."""
        context: AbstractContextManager[Any] = (
            torch.autocast(hidden.device.type, enabled=False)
            if self._trainer.casts_head
            else self._trainer.raw.accelerator.autocast()
        )
        return context

    def _read_head(self, tensors: tuple[Tensor, Tensor | None], hidden: Tensor | None) -> None:
        call = self._call
        if call is None or not self._trusted:
            return
        if hidden is not None:
            head = LmHead.of(self._model, tensors)
            self._read_top(call, hidden, head)
            if not call.again:
                call.from_head.append(self._project(head, hidden, call))
            return
        self._trusted = False
        log.warning(
            "the model's hidden states are not seen (was it compiled before attach?); sums of p^2 "
            "come from TRL's own head from the next pass on"
        )

    @torch.no_grad()
    def _reduce(self, logits_BLV: Tensor, call: _Call) -> TokenStats:
        """Statistics of the next rollouts of the pass; prompts and padding are never read."""
        mask_BT, ids_BT = call.next(len(logits_BLV))
        logits_BTV = logits_BLV.detach()[:, -mask_BT.shape[1] - 1 : -1]
        return token_stats(logits_BTV, ids_BT, self._trainer.temperature, mask_BT)

    def _keep_hidden(self, module: Any, args: Any, out: Any) -> None:
        hidden = getattr(out, "last_hidden_state", None)
        if not self.scheduled or hidden is None:
            return
        if self._inside:
            self._hidden = hidden.detach()
            return
        # Liger's path of TRL 1.14 asks the backbone alone; it too runs inside the model's forward.
        with whole(self._model.get_output_embeddings()) as tensors:
            self._guard(self._read_head, tensors, hidden.detach())

    def _exact(self, call: _Call) -> TokenStats | None:
        parts = call.from_logits or call.from_head
        return TokenStats.concat(parts) if parts else None

    @torch.no_grad()
    def _project(self, head: LmHead, hidden_BLD: Tensor, call: _Call) -> TokenStats:
        """Statistics from hidden states and head, with the precision of the trainer's own head."""
        mask_BT, ids_BT = call.next(len(hidden_BLD))
        hidden_ND = hidden_BLD[:, -mask_BT.shape[1] - 1 : -1][mask_BT]
        cast = self._trainer.casts_head
        with self._precision(hidden_ND):
            hidden = hidden_ND.float() if cast else hidden_ND
            return head.stats(hidden, ids_BT[mask_BT], self._trainer.temperature)

    def _agrees(self, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
        """Trust statistics only as long as their log-probabilities are the trainer's own."""
        weights = self._model.get_output_embeddings().weight.dtype
        exact = weights == dtype and not torch.is_autocast_enabled(theirs.device.type)
        tolerance = _TOLERANCE.get(dtype, _HALF_TOLERANCE) if exact else _HALF_TOLERANCE
        gap = (ours - theirs).abs()
        worst = float(gap[torch.isfinite(gap)].max()) if bool(torch.isfinite(gap).any()) else 0.0
        if worst <= tolerance:
            return True
        if self._trusted:
            log.warning(
                "recomputed log-probabilities differ from the trainer's by up to %.2g nats; "
                "statistics that need the whole distribution are recorded as missing",
                worst,
            )
        self._trusted = False
        return False

    def _from_fused(self, call: _Call, logp: Tensor) -> Columns:
        """S - p^2 in float64, held within what p allows: (1-p)^2/(V-1) <= rest <= (1-p)^2."""
        if not call.fused:
            return {}

        def gathered(name: str) -> Tensor | None:
            parts: list[Any] = [getattr(out, name, None) for out in call.fused]
            if any(part is None for part in parts):
                return None
            return _completion(torch.cat(parts).detach(), call)

        self.source = "fused head"
        columns: Columns = {"top1": gathered("is_top1")}
        log_collision = gathered("log_sum_sq_probs")
        if log_collision is not None:
            wide = logp.double()
            others = max(rows_of(self._model.get_output_embeddings().weight) - 1, 1)
            rest = log_collision.double().exp() - (2 * wide).exp()
            highest = torch.expm1(wide).square()
            columns["collision_rest"] = rest.clamp(min=highest / others, max=highest).float()
        return columns


def _completion(values_BL: Tensor, call: _Call) -> Tensor:
    """Values of the loss tokens, shape (N,), among those of all predicted positions."""
    return values_BL[:, -call.mask_BT.shape[1] :][call.mask_BT]


def richer_head(trainer: TrlTrainer, top1: bool) -> Callable[..., Any] | None:
    """Forward of the fused head that also returns log sum p^2; None before TRL 1.15.

    None too if somebody has wrapped the trainer's head: replacing it would cut that wrapper off.
    """
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return None
    model = trainer.model
    plain = vars(model).get("forward")
    code = getattr(getattr(plain, "__func__", None), "__code__", None)
    if code is None or "add_fused_lm_head" not in code.co_qualname:
        return None
    try:
        add_fused_lm_head(
            model,
            temperature=trainer.temperature,
            cast_lm_head_to_fp32=trainer.casts_head,
            outputs=("log_probs", "entropy", "log_sum_sq_probs", *(("is_top1",) if top1 else ())),
        )
        richer: Callable[..., Any] = model.forward
    finally:
        model.forward = plain
    return richer
