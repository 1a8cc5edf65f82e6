"""What is done with the gradient passes of a step: rows, gradient, second scoring, probe.

A probe decomposes one update between two calls of the trainer: ``on_pre_optimizer_step`` copies
the weights, ``on_optimizer_step``, which comes before the learning rate moves on and before
gradients are cleared, splits the step. Scoring runs without dropout, so the class gradients of a
model with dropout are those of its mean; ``closure_error`` tells by how much that misses the real
step.

Shapes: B rollouts of the pass, T completion positions, N tokens of the loss mask.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture.trl.stats import Columns
from wapo_analysis.capture.trl.trainer import TrlTrainer, logps_and_entropies, loss_mask
from wapo_analysis.errors import UserError
from wapo_analysis.probes.measure import Before, Scorable, Update, clip_factor, take_apart
from wapo_analysis.record.batches import outside_counts
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.record.tokens import beside_logp

log = logging.getLogger(__name__)


@dataclass
class SeenPass:
    """One gradient pass: how to score its tokens again, and its rows unless recording failed."""

    #: Scores the tokens under the present weights.
    score: Callable[[], Any]
    tokens: TokenPass | None = None
    #: (B, T): loss mask.
    mask_BT: Tensor | None = None
    #: (N,): tokens that the clip rule stops.
    clipped: Tensor | None = None
    #: What the loss multiplies its tokens with: entropy mask, off-policy mask, weights.
    masks: list[Tensor] = field(default_factory=list)
    _grad_BT: Tensor | float = 0.0

    def take_gradient(self, grad_BT: Tensor, scale: float, has_kl: bool) -> None:
        """Fill ``coef``, ``clipped`` and ``kept`` from the gradient at the log-probabilities.

        Parameters
        ----------
        grad_BT : Tensor, shape (B, T)
            Gradient of the back-propagated loss; of a loss that scores twice, one of two to add.
        scale : float
            What that loss was multiplied by on top of the objective.
        has_kl : bool
            The loss has a term that puts a gradient on clipped tokens as well.

        Notes
        -----
        A token is not ``kept`` if a mask of the loss is 0 on it, or if no gradient came although
        its advantage is not 0 and the clip has not stopped it: something else took it out.
        """
        tokens, mask_BT, rule = self.tokens, self.mask_BT, self.clipped
        assert tokens is not None
        assert mask_BT is not None
        assert rule is not None
        self._grad_BT = self._grad_BT + grad_BT.detach()
        tokens.coef = -self._grad_BT[mask_BT].float() / scale
        tokens.outside = (outside_counts(self._grad_BT, mask_BT),)
        idle = tokens.coef == 0
        tokens.clipped = rule if has_kl else rule & idle
        kept = ~idle | (tokens.advantage == 0) | tokens.clipped
        for mask in self.masks:
            kept = kept & (mask.expand_as(mask_BT)[mask_BT] != 0)
        tokens.kept = kept


def token_pass(
    trainer: TrlTrainer,
    inputs: Mapping[str, Any],
    logps_BT: Tensor,
    columns: Columns,
    numbers: tuple[Tensor, Tensor],
    index: int,
) -> tuple[TokenPass, Tensor]:
    """Rows of the token table for one pass, and which of them the clip rule stops, shape (N,).

    ``coef``, ``clipped`` and ``kept`` come with the gradient. Old log-probabilities are
    shifted by the rounding between the recorded logp and the trainer's, so that the ratio is
    exactly the trainer's.

    Parameters
    ----------
    inputs : mapping
        What the trainer's loss was given.
    logps_BT : Tensor, shape (B, T)
        Log-probabilities the trainer works with, detached, nats.
    columns : dict
        Statistics, shape (N,), of `StatsReader.close`.
    numbers : pair of Tensor, shape (B,)
        Rollout and group of each row.
    index : int
        Gradient pass within the step, from 0.
    """
    mask_BT = loss_mask(inputs)
    row, position = mask_BT.nonzero(as_tuple=True)
    rollout, group = numbers
    advantage_BT = inputs["advantages"].detach()
    if advantage_BT.dim() == 1:
        advantage_BT = advantage_BT.unsqueeze(1)
    advantage_BT = advantage_BT.expand_as(logps_BT)
    old_BT, prox_BT = trainer.old_logps(inputs, logps_BT)
    logp = columns["logp"]
    assert logp is not None

    def shifted(values_BT: Tensor | None) -> Tensor | None:
        return None if values_BT is None else logp - (logps_BT - values_BT)[mask_BT].float()

    tokens = TokenPass(
        group=group[row],
        rollout=rollout[row],
        position=position,
        token_id=inputs["completion_ids"][mask_BT],
        advantage=advantage_BT[mask_BT],
        logp=logp,
        logp_old=shifted(old_BT),
        logp_prox=shifted(prox_BT),
        minibatch=index,
        **beside_logp(columns),
    )
    loss_old_BT = old_BT if prox_BT is None else prox_BT
    log_ratio_BT = trainer.log_ratio(inputs, logps_BT, loss_old_BT, mask_BT)
    return tokens, trainer.clip.clipped(log_ratio_BT, mask_BT, advantage_BT)[mask_BT]


@torch.no_grad()
def score_again(
    model: Any,
    passes: Sequence[SeenPass],
    looking: Callable[[SeenPass], AbstractContextManager[None]],
) -> None:
    """Fill ``logp_after`` and ``entropy_after`` under the present weights, without dropout.

    Each scoring runs in a context ``looking(pass)``, in which others may read its logits.
    A pass without rows is scored all the same: the forward may be a collective of all processes.
    """
    with evaluating(model):
        for seen in passes:
            with looking(seen):
                logps_BT, entropies_BT = logps_and_entropies(seen.score())
            if seen.tokens is None or seen.mask_BT is None:
                continue
            if logps_BT is not None:
                seen.tokens.logp_after = logps_BT[seen.mask_BT].float()
            if entropies_BT is not None:
                seen.tokens.entropy_after = entropies_BT[seen.mask_BT].float()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off, so no random number is drawn; then put every module back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_probing(trainer: TrlTrainer, probe_every: int, probe_rows: int) -> None:
    """Refuse probes where a step cannot be decomposed.

    Raises UserError with several processes, weights below float32, or numbers out of range.
    """
    if probe_every < 0 or probe_rows < 1:
        raise UserError("probe_every must be 0 (never) or positive, probe_rows at least 1")
    if not probe_every:
        return
    if trainer.processes > 1:
        raise UserError("probe_every works with one process; with several, leave it 0")
    small = {p.dtype for p in trainer.raw.model.parameters() if p.requires_grad}
    small -= {torch.float32}
    if small:
        raise UserError(
            f"probe_every needs float32 weights, got {', '.join(map(str, small))}: lower precision "
            "does not resolve the share of one class in a step"
        )


class TrlProber:
    """Decomposes updates of one trainer, on the recorder's schedule.

    ``recorder``: gets the rows; ``rows``: rollouts scored of the update, and as many of the step
    before; whole micro-batches.
    """

    def __init__(self, trainer: TrlTrainer, recorder: Recorder, rows: int) -> None:
        self._trainer, self._recorder, self._rows = trainer, recorder, rows
        self._before: Before | None = None
        self._earlier: list[SeenPass] = []
        self._parameters: list[Tensor] = []
        self._failed = False

    def before_update(self, step: int) -> None:
        """Copy what the optimizer is about to change, if the step is to be probed."""
        self._before = None
        if self._failed or not self._recorder.wants_probe(step):
            return
        model = self._trainer.raw.model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        try:
            self._before = Before.of(self._parameters, self._trainer.optimizer)
        except Exception as error:
            self._stop(error)

    def after_update(self, step: int, passes: Sequence[SeenPass], grad_norm: Any) -> None:
        """Decompose the update; a failure stops probing, never the training.

        ``passes``: gradient passes of the update; ``grad_norm``: norm before clipping; None if
        nothing was clipped.
        """
        before, self._before = self._before, None
        earlier, self._earlier = self._earlier, self._some(passes)
        trainer = self._trainer.raw
        if before is None or trainer.accelerator.optimizer_step_was_skipped:
            return
        limit = trainer.args.max_grad_norm
        update = Update(
            step=step,
            minibatch=0,
            parameters=self._parameters,
            optimizer=self._trainer.optimizer,
            before=before,
            passes=[self._scorable(seen, own=True) for seen in passes if seen.tokens],
            clip=1.0 if grad_norm is None else clip_factor(float(grad_norm), limit),
            temperature=self._trainer.temperature,
        )
        scored = [self._scorable(seen, own=True) for seen in self._earlier]
        scored += [self._scorable(seen, own=False) for seen in earlier]
        try:
            with evaluating(trainer.model):
                rows = take_apart(update, scored)
            if rows is not None:
                self._recorder.add_probe(rows)
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._failed = True
        log.warning("probing stopped (%s: %s); training goes on", type(error).__name__, error)

    def _some(self, passes: Sequence[SeenPass]) -> list[SeenPass]:
        """First passes until they hold enough rollouts; none if there is nothing to probe."""
        some: list[SeenPass] = []
        rows = 0
        for seen in passes:
            if seen.mask_BT is None or rows >= self._rows or not self._recorder.probe_every:
                break
            some.append(seen)
            rows += len(seen.mask_BT)
        return some

    def _scorable(self, seen: SeenPass, own: bool) -> Scorable:
        return Scorable(partial(self._score, seen), seen.tokens if own else None)

    def _score(self, seen: SeenPass, grad: bool) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(grad), self._trainer.precision():
            logps_BT, entropies_BT = logps_and_entropies(seen.score())
        if logps_BT is None or entropies_BT is None or seen.mask_BT is None:
            raise ValueError("the trainer's scoring gives no entropies")
        return logps_BT[seen.mask_BT].float(), entropies_BT.detach()[seen.mask_BT].float()
