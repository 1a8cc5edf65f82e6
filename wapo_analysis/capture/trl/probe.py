"""Probes in an attached TRL run: one update is taken apart between two calls of the trainer.

``on_pre_optimizer_step`` copies the weights, ``on_optimizer_step``, which comes before the learning
rate moves on and before gradients are cleared, splits the step. Scoring runs without dropout, so
the class gradients of a model with dropout are those of its mean; ``closure_error`` tells by how
much that misses the real step.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture.trl.passes import SeenPass, evaluating
from wapo_analysis.capture.trl.source import logps_and_entropies
from wapo_analysis.errors import UserError
from wapo_analysis.probes.measure import Scorable, Update, clip_factor, take_apart
from wapo_analysis.probes.split import Before
from wapo_analysis.record.recorder import Recorder

log = logging.getLogger(__name__)


def check_probing(trainer: Any, probe_every: int, probe_rows: int) -> None:
    """Refuse probes where a step cannot be taken apart.

    Raises
    ------
    UserError
        With several processes, weights below float32, or numbers out of range.
    """
    if probe_every < 0 or probe_rows < 1:
        raise UserError("probe_every must be 0 (never) or positive, probe_rows at least 1")
    if not probe_every:
        return
    if trainer.accelerator.num_processes > 1:
        raise UserError("probe_every works with one process; with several, leave it 0")
    small = {p.dtype for p in trainer.model.parameters() if p.requires_grad} - {torch.float32}
    if small:
        raise UserError(
            f"probe_every needs float32 weights, got {', '.join(map(str, small))}: lower precision "
            "does not resolve the share of one class in a step"
        )


class TrlProber:
    """Takes updates of one trainer apart, on the recorder's schedule.

    Parameters
    ----------
    trainer : trl.GRPOTrainer
    recorder : Recorder
        Gets the rows.
    rows : int
        Rollouts scored of the update, and as many of the step before; whole micro-batches.
    """

    def __init__(self, trainer: Any, recorder: Recorder, rows: int) -> None:
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
        model = self._trainer.model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        try:
            self._before = Before.of(self._parameters, self._optimizer())
        except Exception as error:
            self._stop(error)

    def after_update(self, step: int, passes: Sequence[SeenPass], grad_norm: Any) -> None:
        """Take the update apart; a failure stops probing, never the training.

        Parameters
        ----------
        step : int
        passes : sequence of SeenPass
            Gradient passes of the update.
        grad_norm : Tensor, float or None
            Norm before clipping; None if nothing was clipped.
        """
        before, self._before = self._before, None
        earlier, self._earlier = self._earlier, self._some(passes)
        trainer = self._trainer
        if before is None or trainer.accelerator.optimizer_step_was_skipped:
            return
        limit = float(trainer.args.max_grad_norm or 0.0) if grad_norm is not None else None
        update = Update(
            step=step,
            minibatch=0,
            parameters=self._parameters,
            optimizer=self._optimizer(),
            before=before,
            passes=[self._scorable(seen, own=True) for seen in passes if seen.tokens],
            clip=clip_factor(float(grad_norm), limit) if limit else 1.0,
            temperature=float(getattr(trainer, "temperature", 1.0)),
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

    def _optimizer(self) -> torch.optim.Optimizer:
        """The trainer's optimizer without accelerate's wrapper."""
        outer = self._trainer.optimizer
        inner: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
        return inner

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
        with torch.set_grad_enabled(grad), self._trainer.compute_loss_context_manager():
            logps_BT, entropies_BT = logps_and_entropies(seen.score())
        if logps_BT is None or entropies_BT is None or seen.mask_BT is None:
            raise ValueError("the trainer's scoring gives no entropies")
        return logps_BT[seen.mask_BT].float(), entropies_BT.detach()[seen.mask_BT].float()
