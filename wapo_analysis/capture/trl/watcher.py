"""The watcher: sits in a TRL trainer's own calls and hands what it sees to a recorder.

One step, in the order of TRL's calls: ``_generate_and_score_completions`` (rollouts get numbers),
``training_step`` > ``_compute_loss`` > scoring (statistics, gradient hook) for each micro-batch,
``on_pre_optimizer_step`` (learning rate), ``on_step_end`` (second scoring, writing, log entries).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture import PASSIVE, CaptureMode, Patches
from wapo_analysis.capture.trl.passes import SeenPass, TrlProber, score_again, token_pass
from wapo_analysis.capture.trl.replace import OwnHead, TrlHead
from wapo_analysis.capture.trl.rollouts import RolloutReader, log_entries, log_sums, no_sums
from wapo_analysis.capture.trl.stats import StatsReader
from wapo_analysis.capture.trl.trainer import SCORER, TrlTrainer, logps_and_entropies, loss_mask
from wapo_analysis.derive import step_columns
from wapo_analysis.record.recorder import Recorder, on_schedule
from wapo_analysis.record.tokens import given_in_all
from wapo_analysis.record.topk import TopTokens

log = logging.getLogger(__name__)

_MASKS = ("get_high_entropy_mask", "get_off_policy_mask")


class TrlWatcher:
    """Watches one trainer until its patches are closed.

    Parameters
    ----------
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
        trainer: TrlTrainer,
        recorder: Recorder,
        patches: Patches,
        *,
        exact_every: int,
        log_metrics: bool,
        probe_rows: int,
        replace: bool,
        resume_after: int | None,
    ) -> None:
        self._trainer, self._recorder, self._guard = trainer, recorder, recorder.guard
        self._exact_every, self._log_metrics = exact_every, log_metrics
        self._rollouts, prober = RolloutReader(trainer), TrlProber(trainer, recorder, probe_rows)
        self._prober, self._several = prober, trainer.processes > 1
        self._inputs: dict[str, Any] | None = None
        self._current: SeenPass | None = None
        self._training = self._generating_now = self._named = False
        self._saw_tokens: bool | None = None
        self._scores_others = False
        self._top: TopTokens | None = None
        self._resume_after, self._last = resume_after, resume_after or 0
        self._start_step()
        raw = trainer.raw
        patches.wrap(raw, "_generate_and_score_completions", self._generate)
        if callable(getattr(raw, "_calculate_rewards", None)):
            patches.wrap(raw, "_calculate_rewards", self._calculate_rewards)
        patches.wrap(raw, "training_step", self._training_step)
        patches.wrap(raw.accelerator, "clip_grad_norm_", self._clip_grad_norm)
        _add_callback(raw, patches, self)
        if trainer.hidden_by is not None:
            self._only_scalars(trainer.hidden_by)
            return
        self._head = OwnHead(self._fell_back) if replace else TrlHead()
        rows = recorder.token_every > 0
        self._stats = StatsReader(trainer, patches, self._guard, rows, self._head)
        patches.wrap(raw, "_compute_loss", self._compute_loss)
        patches.wrap(raw, SCORER, self._scoring)
        for name in _MASKS:
            if callable(getattr(raw, name, None)):
                patches.wrap(raw, name, self._keep_mask)

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
        rule = f"our head failed in step {self._trainer.step} ({type(error).__name__}: {error})"
        self._recorder.note(capture=CaptureMode(PASSIVE, rule).to_dict())

    # Calls of the trainer, in the order they happen ------------------------------------------

    def begin_training(self, done: int) -> None:
        """Say which step comes next; called by every ``train()`` with the steps it starts after.

        A second one starts from 0 again: its steps count on, and a step the first did not finish is
        dropped. A continued run must start where it was left.
        """
        if self._resume_after is not None and done != self._resume_after:
            raise ValueError(
                f"resume_after={self._resume_after}, but training starts after step {done}: give "
                "both the step of the checkpoint, trainer.train(resume_from_checkpoint=...)"
            )
        self._resume_after = None
        self._trainer.done = max(self._last - done, 0)
        self._start_step()
        self._recorder.forget()

    def _generate(
        self, original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        started = perf_counter()
        self._generating_now = self._trainer.training
        try:
            batch = original(inputs, *args, **kwargs)
        finally:
            self._generating_now = False
        if self._trainer.training:
            self._generating += perf_counter() - started
            self._guard(self._rollouts.take_batch, inputs, batch)
        return batch

    def _calculate_rewards(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rewards = original(*args, **kwargs)
        if self._trainer.training:
            self._guard(self._rollouts.take_rewards, rewards)
        return rewards

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._training = True
        try:
            loss = original(*args, **kwargs)
        finally:
            self._training = False
        self._guard(self._add_loss, loss)
        return loss

    def _add_loss(self, loss: Tensor) -> None:
        part = loss.detach().double()
        self._loss = part if self._loss is None else self._loss + part
        if self._saw_tokens is None:
            self._only_scalars(f"the loss of {type(self._trainer.raw).__name__}")

    def _compute_loss(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not self._training:
            return original(model, inputs, *args, **kwargs)
        self._inputs, self._current = inputs, None
        try:
            return original(model, inputs, *args, **kwargs)
        finally:
            self._inputs = None

    def _scoring(self, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._inputs is None or not torch.is_grad_enabled():
            scored = original(model, *args, **kwargs)
            if self._generating_now:
                self._guard(self._take_scores, scored)
            return scored

        def score() -> Any:
            with self._head.scoring():
                return original(model, *args, **kwargs)

        if self._current is not None:
            scored = score()
            ids = args[0] if args else kwargs.get("input_ids")
            self._guard(self._take_second, self._inputs, self._current, scored, ids)
            return scored
        seen = self._current = SeenPass(score)
        step = self._trainer.step
        self._stats.scheduled = on_schedule(step, self._exact_every) or (
            not self._several and self._recorder.wants_probe(step)
        )
        self._guard(self._open, self._inputs)
        try:
            scored = score()
            self._guard(self._take_pass, self._inputs, scored, seen)
        finally:
            self._stats.cancel()
        self._passes.append(seen)
        return scored

    def _keep_mask(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mask = original(*args, **kwargs)
        if self._inputs is not None and self._current is not None:
            self._current.masks.append(mask.detach())
        return mask

    def _clip_grad_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        if norm is not None:
            self._row["grad_norm"] = norm
        return norm

    # A gradient pass -------------------------------------------------------------------------

    def _take_scores(self, scored: Any) -> None:
        logps_BT, _ = logps_and_entropies(scored)
        if logps_BT is not None:
            self._rollouts.take_scores(logps_BT)

    def _open(self, inputs: dict[str, Any]) -> None:
        mask_BT, step, tops = loss_mask(inputs), self._trainer.step, self._recorder.tops
        self._top = None
        if tops.wants(step):
            row, position = place = mask_BT.nonzero(as_tuple=True)
            rollout = self._rollouts.numbers(inputs)[0][row]
            self._top = tops.choose(step, place, rollout, position, len(self._passes))
        self._stats.open(mask_BT, inputs["completion_ids"], self._top)

    def _take_pass(self, inputs: dict[str, Any], scored: Any, seen: SeenPass) -> None:
        logps_BT, entropies_BT = logps_and_entropies(scored)
        if logps_BT is None or not logps_BT.requires_grad:
            return
        columns = self._stats.close(logps_BT, entropies_BT)
        if self._saw_tokens is None:
            self._recorder.note(statistics_from=self._stats.source)
        self._saw_tokens = True
        numbers, index = self._rollouts.numbers(inputs), len(self._passes)
        seen.mask_BT = loss_mask(inputs)
        seen.tokens, seen.clipped = token_pass(
            self._trainer, inputs, logps_BT.detach(), columns, numbers, index
        )
        seen.tokens.top = self._top
        weight = self._trainer.weight(inputs)
        seen.masks += [] if weight is None else [weight.detach()]
        self._recorder.watch_pass(seen.tokens, logps_BT, partial(self._gradient, seen))

    def _take_second(
        self, inputs: dict[str, Any], seen: SeenPass, scored: Any, ids: Tensor | None
    ) -> None:
        """Add the gradient of a loss that scores the same tokens twice to their rows."""
        logps_BT, _ = logps_and_entropies(scored)
        if logps_BT is None or not logps_BT.requires_grad or seen.tokens is None:
            return
        own = inputs["completion_ids"]
        if ids is not None and torch.equal(ids[:, -own.shape[1] :], own):
            logps_BT.register_hook(lambda grad: self._guard(self._gradient, seen, grad))
        elif not self._scores_others:
            self._scores_others = True
            self._recorder.note(not_in_coef=[*self._trainer.beside_logp, "scoring of other tokens"])

    def _gradient(self, seen: SeenPass, grad_BT: Tensor) -> None:
        seen.take_gradient(grad_BT, self._trainer.loss_scale, self._trainer.has_kl)

    # The end of a step -----------------------------------------------------------------------

    def before_update(self) -> None:
        """Note the learning rate; called by the trainer before its optimizer steps."""
        self._row["lr"] = self._trainer.raw.optimizer.param_groups[0]["lr"]
        self._prober.before_update(self._trainer.step)

    def after_update(self) -> None:
        """Decompose the update, if it is its turn; called after the optimizer has stepped."""
        started = perf_counter()
        self._prober.after_update(self._trainer.step, self._passes, self._row.get("grad_norm"))
        self._row["seconds_probe"] = perf_counter() - started

    def end_step(self) -> None:
        """Score again, write, log; called by the trainer after its optimizer has stepped."""
        step = self._last = self._trainer.step - 1
        # What all processes do together must happen on each, even where recording has failed.
        if on_schedule(step, self._recorder.rescore_every):
            if self._several or self._recorder.failure is None:
                self._rescore()
        if self._several or self._log_metrics:
            sums = self._guard(self._sums, step) or self._no_sums()
            if self._several:
                sums = self._trainer.sum_over_processes(sums)
            self._guard(self._write, step, sums)
        else:
            self._guard(lambda: self._finish_step(step, {}, self._sums_beside_tokens()))
        self._start_step()

    def obey(self, control: Any) -> None:
        """Do what the guard asked for: keep a checkpoint of its own, stop after one of TRL's."""
        if self._trainer.between_batches:
            self._recorder.checkpoint(self._trainer.save)
        if self._trainer.between_batches and self._recorder.asked("stop"):
            control.should_save = control.should_training_stop = True

    def flush(self) -> None:
        """Wait for the disk before the trainer writes a checkpoint, so that it can be resumed."""
        self._recorder.flush()

    def _rescore(self) -> None:
        started = perf_counter()
        try:
            with self._trainer.precision():
                score_again(self._trainer.raw.model, self._passes, self._look_again)
        except Exception as error:
            self._recorder.fail(error)
        self._recorder.seconds += perf_counter() - started

    @contextmanager
    def _look_again(self, seen: SeenPass) -> Iterator[None]:
        """Read the most probable tokens once more from the scoring in this block."""
        self._stats.scheduled = on_schedule(self._last, self._exact_every)
        if seen.tokens is not None:
            self._stats.open_again(seen.mask_BT, seen.tokens.top)
        try:
            yield
        finally:
            self._stats.cancel()

    def _sums(self, step: int) -> dict[str, float]:
        recorder, texts = self._recorder, self._rollouts.texts
        if self._several and not self._named:
            # Rank 0 names every token, for it does not see those of the other processes.
            self._named = True
            recorder.name_tokens(range(len(self._trainer.raw.processing_class)), texts)
        given = given_in_all([seen.tokens for seen in self._passes if seen.tokens is not None])
        tokens = recorder.settle(step, texts)
        return log_sums(tokens, given, recorder.sequence_level) | self._sums_beside_tokens()

    def _no_sums(self) -> dict[str, float]:
        return dict.fromkeys([*no_sums(), "loss", "loss n"], 0.0)

    def _sums_beside_tokens(self) -> dict[str, float]:
        loss = 0.0 if self._loss is None else float(self._loss)
        return {**self._rollouts.sums(), "loss": loss, "loss n": float(self._loss is not None)}

    def _write(self, step: int, sums: dict[str, float]) -> None:
        columns = step_columns(sums)
        if self._log_metrics and self._saw_tokens:
            self._trainer.log(log_entries(sums, columns))
        self._finish_step(step, columns)

    def _finish_step(
        self, step: int, columns: dict[str, float], sums: dict[str, float] | None = None
    ) -> None:
        """Write the step; ``sums`` leaves those over tokens to the writer thread."""
        row: dict[str, Any] = {"updates": 1, **(step_columns(sums) if sums else {}), **columns}
        row |= {name: float(value) for name, value in self._row.items()}
        known = {n: v for n, v in self._rollouts.statistics().items() if isfinite(v)}
        row |= self._trainer.logged() | known | {"seconds_rollout": self._generating}
        self._recorder.finish_step(
            step, rollouts=self._rollouts.columns(), texts=self._rollouts.texts, sums=sums, **row
        )


def _add_callback(trainer: Any, patches: Patches, watcher: TrlWatcher) -> None:
    """Let the trainer tell the watcher about updates; transformers is loaded only here."""
    from transformers import TrainerCallback

    guard = watcher._guard

    class Steps(TrainerCallback):  # type: ignore[misc]
        def __reduce__(self) -> Any:
            return TrainerCallback, ()  # a copy of the trainer is not watched

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            guard(watcher.begin_training, int(state.global_step))

        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            guard(watcher.before_update)

        def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            guard(watcher.after_update)

        def on_log(self, *_: Any, **kwargs: Any) -> None:
            guard(watcher._trainer.forget_logged)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.end_step()
            guard(watcher.obey, control)
            if control.should_save:
                guard(watcher.flush)

    trainer.add_callback(callback := Steps())
    patches.on_close(lambda: trainer.remove_callback(callback))
