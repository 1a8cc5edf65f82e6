"""The watcher: sits in a TRL trainer's own calls and hands what it sees to a recorder.

One step, in the order of TRL's calls: ``_generate_and_score_completions`` (rollouts get numbers),
``training_step`` > ``_compute_loss`` > scoring (statistics, gradient hook) for each micro-batch,
``on_pre_optimizer_step`` (learning rate), ``on_step_end`` (second scoring, writing, log entries).
"""

import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture.hooks import Patches
from wapo_analysis.capture.mode import PASSIVE, CaptureMode
from wapo_analysis.capture.trl.passes import (
    SeenPass,
    loss_mask,
    score_again,
    take_gradient,
    token_pass,
)
from wapo_analysis.capture.trl.probe import TrlProber
from wapo_analysis.capture.trl.replace import OwnHead, TrlHead
from wapo_analysis.capture.trl.rollouts import RolloutReader
from wapo_analysis.capture.trl.scalars import log_entries, log_sums
from wapo_analysis.capture.trl.source import SCORER, clip_rule, hidden_tensors, logps_and_entropies
from wapo_analysis.capture.trl.stats import StatsReader
from wapo_analysis.derive import step_columns
from wapo_analysis.record.recorder import Recorder, TokenPass, on_schedule
from wapo_analysis.record.tokens import given_in_all

log = logging.getLogger(__name__)


class TrlWatcher:
    """Watches one trainer until its patches are closed.

    Parameters
    ----------
    trainer : trl.GRPOTrainer
    recorder : Recorder
    patches : Patches
        Takes every change that is made to the trainer.
    exact_every : int
        Steps between passes of the hidden states through the head; 0 never.
    log_metrics : bool
        Add entries to the trainer's log.
    probe_rows : int
        Rollouts that a probe scores.
    replace : bool
        Let our head make the log-probabilities of the loss.
    """

    def __init__(
        self,
        trainer: Any,
        recorder: Recorder,
        patches: Patches,
        *,
        exact_every: int,
        log_metrics: bool,
        probe_rows: int,
        replace: bool = False,
    ) -> None:
        self._trainer, self._recorder = trainer, recorder
        self._head = OwnHead(self._fell_back) if replace else TrlHead()
        self._exact_every, self._log_metrics = exact_every, log_metrics
        self._rollouts, self._clip = RolloutReader(trainer), clip_rule(trainer)
        self._prober = TrlProber(trainer, recorder, probe_rows)
        self._several = trainer.accelerator.num_processes > 1
        self._inputs: dict[str, Any] | None = None
        self._training = self._named = False
        self._saw_tokens: bool | None = None
        self._stats: StatsReader | None = None
        self._start_step()
        patches.wrap(trainer, "_generate_and_score_completions", self._generate)
        if callable(getattr(trainer, "_calculate_rewards", None)):
            patches.wrap(trainer, "_calculate_rewards", self._calculate_rewards)
        patches.wrap(trainer, "training_step", self._training_step)
        patches.wrap(trainer.accelerator, "clip_grad_norm_", self._clip_grad_norm)
        _add_callback(trainer, patches, self)
        hidden = hidden_tensors(trainer)
        if hidden is None and callable(getattr(trainer, SCORER, None)):
            rows = recorder.token_every > 0
            self._stats = StatsReader(trainer, patches, self.guard, rows, self._head)
            patches.wrap(trainer, "_compute_loss", self._compute_loss)
            patches.wrap(trainer, SCORER, self._scoring)
        else:
            self._only_scalars(hidden or f"a trainer without {SCORER}")

    def _start_step(self) -> None:
        self._passes: list[SeenPass] = []
        self._loss: Tensor | None = None
        self._row: dict[str, Any] = {}
        self._generating = 0.0
        self._rollouts.start_step()

    def _only_scalars(self, reason: str) -> None:
        log.warning(
            "%s keeps per-token log-probabilities to itself; rewards, lengths, loss, gradient norm "
            "and learning rate are recorded, tokens are not",
            reason,
        )
        self._saw_tokens = False
        self._recorder.note(tokens_hidden_by=reason)

    def _fell_back(self, error: Exception) -> None:
        step = int(self._trainer.state.global_step) + 1
        rule = f"our head failed in step {step} ({type(error).__name__}: {error})"
        self._recorder.note(capture=CaptureMode(PASSIVE, rule).to_dict())

    def guard(self, action: Callable[..., Any], *args: Any) -> Any:
        """Run an action of ours; its failure ends the recording and never the training."""
        return self._recorder.guard(action, *args)

    # Calls of the trainer, in the order they happen ------------------------------------------

    def _generate(
        self, original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        started = perf_counter()
        batch = original(inputs, *args, **kwargs)
        if self._trainer.model.training:
            self._generating += perf_counter() - started
            self.guard(self._rollouts.take_batch, inputs, batch)
        return batch

    def _calculate_rewards(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rewards = original(*args, **kwargs)
        if self._trainer.model.training:
            self.guard(self._rollouts.take_rewards, rewards)
        return rewards

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._training = True
        try:
            loss = original(*args, **kwargs)
        finally:
            self._training = False
        self.guard(self._add_loss, loss)
        return loss

    def _add_loss(self, loss: Tensor) -> None:
        part = loss.detach().double()
        self._loss = part if self._loss is None else self._loss + part

    def _compute_loss(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not self._training:
            return original(model, inputs, *args, **kwargs)
        self._inputs = inputs
        try:
            loss = original(model, inputs, *args, **kwargs)
        finally:
            self._inputs = None
        if self._saw_tokens is None:
            self.guard(self._only_scalars, f"the loss of {type(self._trainer).__name__}")
        return loss

    def _scoring(self, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        inputs, stats = self._inputs, self._stats
        if inputs is None or stats is None or not torch.is_grad_enabled():
            return original(model, *args, **kwargs)

        def score() -> Any:
            with self._head.scoring():
                return original(model, *args, **kwargs)

        seen = SeenPass(score)
        self.guard(self._open, stats, inputs)
        try:
            scored = score()
            self.guard(self._take_pass, stats, inputs, scored, seen)
        finally:
            stats.cancel()
        self._passes.append(seen)
        return scored

    def _clip_grad_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        if norm is not None:
            self._row["grad_norm"] = norm
        return norm

    # A gradient pass -------------------------------------------------------------------------

    def _open(self, stats: StatsReader, inputs: dict[str, Any]) -> None:
        step = int(self._trainer.state.global_step) + 1
        exact = on_schedule(step, self._exact_every) or self._recorder.wants_probe(step)
        stats.open(loss_mask(inputs), inputs["completion_ids"], exact)

    def _take_pass(
        self, stats: StatsReader, inputs: dict[str, Any], scored: Any, seen: SeenPass
    ) -> None:
        logps_BT, entropies_BT = logps_and_entropies(scored)
        if logps_BT is None or not logps_BT.requires_grad:
            return
        columns = stats.close(logps_BT, entropies_BT)
        if self._saw_tokens is None:
            self._recorder.note(statistics_from=stats.source)
        self._saw_tokens = True
        mask_BT, numbers = loss_mask(inputs), self._rollouts.numbers(inputs)
        index = len(self._passes)
        tokens = token_pass(inputs, logps_BT.detach(), columns, numbers, self._clip, index)
        seen.tokens, seen.mask_BT = tokens, mask_BT
        self._recorder.watch(tokens, logps_BT, partial(self._gradient, tokens, mask_BT))

    def _gradient(self, tokens: TokenPass, mask_BT: Tensor, grad_BT: Tensor) -> None:
        accelerator = self._trainer.accelerator
        scaler = getattr(accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        take_gradient(tokens, mask_BT, grad_BT, scale * accelerator.num_processes)

    # The end of a step -----------------------------------------------------------------------

    def before_update(self) -> None:
        """Note the learning rate; called by the trainer before its optimizer steps."""
        self._row["lr"] = self._trainer.optimizer.param_groups[0]["lr"]
        self._prober.before_update(int(self._trainer.state.global_step) + 1)

    def after_update(self) -> None:
        """Take the update apart, if it is its turn; called after the optimizer has stepped."""
        started = perf_counter()
        step = int(self._trainer.state.global_step) + 1
        self._prober.after_update(step, self._passes, self._row.get("grad_norm"))
        self._row["seconds_probe"] = perf_counter() - started

    def end_step(self, step: int) -> None:
        """Score again, write, log; called by the trainer after its optimizer has stepped."""
        # What all processes do together must happen on each, even where recording has failed.
        if on_schedule(step, self._recorder.rescore_every):
            if self._several or self._recorder.failure is None:
                self._rescore()
        if self._several or self._log_metrics:
            sums = self.guard(self._sums, step) or self._no_sums()
            if self._several:
                sums = self._over_processes(sums)
            self.guard(self._write, step, sums)
        else:
            self.guard(self._finish_step, step, {}, self._sums_beside_tokens())
        self._start_step()

    def flush(self) -> None:
        """Wait for the disk before the trainer writes a checkpoint, so that it can be resumed."""
        self._recorder.flush()

    def _rescore(self) -> None:
        started = perf_counter()
        try:
            with self._trainer.compute_loss_context_manager():
                score_again(self._trainer.model, self._passes)
        except Exception as error:
            self._recorder.fail(error)
        self._recorder.seconds += perf_counter() - started

    def _sums(self, step: int) -> dict[str, float]:
        recorder, texts = self._recorder, self._rollouts.texts
        if self._several and not self._named:
            # Rank 0 names every token, for it does not see those of the other processes.
            self._named = True
            recorder.name_tokens(range(len(self._trainer.processing_class)), texts)
        given = given_in_all([seen.tokens for seen in self._passes if seen.tokens is not None])
        tokens = recorder.settle(step, texts)
        return log_sums(tokens, given, self._clip.per_sequence) | self._sums_beside_tokens()

    def _no_sums(self) -> dict[str, float]:
        return dict.fromkeys([*log_sums(None), *self._sums_beside_tokens()], 0.0)

    def _sums_beside_tokens(self) -> dict[str, float]:
        loss = 0.0 if self._loss is None else float(self._loss)
        return {**self._rollouts.sums(), "loss": loss, "loss n": float(self._loss is not None)}

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        accelerator = self._trainer.accelerator
        vector = torch.tensor(list(sums.values()), dtype=torch.float64)
        vector = vector.to(accelerator.device)
        total = accelerator.reduce(vector, reduction="sum").tolist()
        return dict(zip(sums, total, strict=True))

    def _write(self, step: int, sums: dict[str, float]) -> None:
        columns = step_columns(sums)
        if self._log_metrics and self._saw_tokens:
            for name, value in log_entries(sums, columns).items():
                self._trainer._metrics["train"][name].append(value)
        self._finish_step(step, columns)

    def _finish_step(
        self, step: int, columns: dict[str, float], sums: dict[str, float] | None = None
    ) -> None:
        """Write the step; ``sums`` leaves those over tokens to the writer thread."""
        row: dict[str, Any] = {"updates": 1, **(step_columns(sums) if sums else {}), **columns}
        row |= {name: float(value) for name, value in self._row.items()}
        row |= self._rollouts.statistics() | {"seconds_rollout": self._generating}
        self._recorder.finish_step(
            step, rollouts=self._rollouts.columns(), texts=self._rollouts.texts, sums=sums, **row
        )


def _add_callback(trainer: Any, patches: Patches, watcher: TrlWatcher) -> None:
    """Let the trainer tell the watcher about updates; transformers is loaded only here."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.guard(watcher.before_update)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.guard(watcher.after_update)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.end_step(int(state.global_step))
            if control.should_save:
                watcher.guard(watcher.flush)

    callback = Steps()
    trainer.add_callback(callback)
    patches.on_close(lambda: trainer.remove_callback(callback))
