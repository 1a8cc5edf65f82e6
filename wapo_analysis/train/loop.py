"""The training loop, top to bottom: sample, grade, update in mini-batches, record.

Shapes: B rollouts of a mini-batch, b of a micro-batch, T completion positions, N their tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.loss import policy_loss
from wapo_analysis.objectives.weights import BatchWeights, batch_weights
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.record.topk import ReadRows, reading
from wapo_analysis.stats import TokenStats
from wapo_analysis.store import read_manifest
from wapo_analysis.store.lock import check_free
from wapo_analysis.train.batch import (
    Batch,
    MiniBatch,
    batch_columns,
    batch_sums,
    draw_batch,
    micro_batches,
    mini_batches,
    rollout_columns,
)
from wapo_analysis.train.checkpoint import (
    keep_checkpoint,
    load_optimizer,
    naming,
    resume_point,
    write_state,
)
from wapo_analysis.train.config import BATCHED, TrainConfig
from wapo_analysis.train.evaluate import evaluate
from wapo_analysis.train.lifecycle import (
    check_resumed,
    closed_as_it_ended,
    nothing_left_if_refused,
    open_recorder,
    stop_between_steps,
)
from wapo_analysis.train.loggers import StepTally, check_loggers, open_loggers
from wapo_analysis.train.models import configured_policy, repeatable
from wapo_analysis.train.policy import Policy, recomputing
from wapo_analysis.train.probe import Prober
from wapo_analysis.train.rollout import Rollouts
from wapo_analysis.train.scoring import kept_tokens, planned, rescored, score

Progress = Callable[[dict[str, float]], None]


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    checkpoint: int | None = None,
    take_over: bool = False,
    until: int | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Policy:
    """Train a policy and, if ``out`` is given, record the run there.

    Returns the trained policy. Raises UserError on a bad setting, an unusable folder, nothing to
    resume, or a GPU without memory for a step; the run is then closed as ``out_of_memory``;
    NonFiniteLogits if the policy can no longer be sampled from; the run is closed as ``diverged``;
    KeyboardInterrupt on Ctrl-C or SIGTERM, after the step has ended and a checkpoint has been
    written.

    Parameters
    ----------
    out : str or Path, optional
        Run folder; None trains without a recorder and gives bitwise the same weights.
    resume : bool
        Continue the run in ``out`` from its last checkpoint.
    checkpoint : int, optional
        Continue from the checkpoint of this step instead; what came later is dropped.
    take_over : bool
        Also if another process still seems to write the run; it stops recording if it lives.
    until : int, optional
        Stop after this step, with a checkpoint, if the settings say more.
    progress : callable, optional
        Called with the step's row after every step.
    threads : int, optional
        CPU threads of this process; None leaves torch's own choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    run = Path(out) if out is not None else None
    if resume and run is not None and not take_over:
        check_free(run)
    trainer, done = begin(config, run if resume else None, checkpoint)
    check_loggers(config.log_to)
    trainer.last = config.steps if until is None else min(until, config.steps)
    exact = repeatable(config.deterministic and trainer.policy.device.type != "cpu")
    with nothing_left_if_refused(run) as begun, exact:

        def shown(row: dict[str, float]) -> None:
            begun.yes = True
            if progress is not None:
                progress(row)

        _record(trainer, run, done if resume else None, take_over, shown)
    return trainer.policy


def begin(
    config: TrainConfig, resumed: Path | None, checkpoint: int | None
) -> "tuple[Trainer, int]":
    """Trainer in the state it starts from, and the step it has reached.

    Raises UserError if the model or the checkpoint cannot be used, or a setting decides other
    weights. ``resumed``: Run that is continued; None starts a new one; ``checkpoint``: step of its
    checkpoint; None takes the newest.
    """
    weights, done, earlier = None, 0, None
    if resumed is not None:
        weights, done = resume_point(resumed, checkpoint)
        if config.steps < done:
            told = f"{resumed} has done {done} steps; steps cannot be fewer"
            raise UserError(f"{told}, got {config.steps}")
        check_resumed(resumed, config)
        earlier = read_manifest(resumed)
    with naming(weights):
        policy = configured_policy(config, weights)
    trainer = Trainer(policy, config, earlier)
    if weights is not None:
        with naming(weights):
            load_optimizer(weights, policy, trainer.optimizer)
    return trainer, done


def _record(
    trainer: "Trainer",
    run: Path | None,
    resume_after: int | None,
    take_over: bool,
    shown: Progress,
) -> None:
    """Train and record the steps after ``resume_after``, and show their rows."""
    config = trainer.config
    recorder = open_recorder(run, config, trainer.policy, trainer.capture, resume_after, take_over)
    loggers = open_loggers(config.log_to, run, config, resume_after)
    with closed_as_it_ended((recorder.close, loggers.close), config) as ended:
        if run is not None and resume_after is None and config.eval_every:
            before = evaluate(trainer.policy, trainer.task, config)
            recorder.note(eval_before=before.columns())
        if trainer.last != config.steps:
            recorder.note(planned_steps=trainer.last)
        for row in _steps(trainer, resume_after or 0, run, recorder):
            loggers.log(row)
            shown(row)
        ended.status = "finished" if trainer.saved else "checkpoint_failed"
        ended.status = ended.status if trainer.recorded else "recording_failed"


def _steps(
    trainer: "Trainer", done: int, run: Path | None, recorder: Recorder
) -> Iterator[dict[str, float]]:
    """Train the steps after ``done``, with checkpoints; yields their rows.

    Raises KeyboardInterrupt when the run was asked to stop, once the step is whole and in a
    checkpoint.
    """
    config = trainer.config
    with stop_between_steps() as stop:
        for step in range(done + 1, trainer.last + 1):
            row = trainer.step(step, recorder)
            stopping = recorder.asked("stop") or stop.asked
            due = config.checkpoint_due(step) or step == trainer.last or stopping
            if run is not None and due:
                trainer.checkpoint(run, step, recorder)
            recorder.checkpoint(partial(write_state, step, trainer.policy, trainer.optimizer))
            yield row
            if stopping and step < trainer.last:
                raise KeyboardInterrupt


class Trainer:
    """Policy, optimizer and objective of one run.

    ``policy``: trained in place; ``manifest``: of the run that is resumed.

    Attributes
    ----------
    recorded : bool
        Recording had not failed at the last checkpoint.
    saved : bool
        The last checkpoint that was due has been written.
    last : int
        Step after which training ends.
    """

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy, self.config = policy, config
        self.recorded, self.saved, self.last = True, True, config.steps
        self.task = config.load_task()
        longest = config.max_new_tokens or self.task.max_new_tokens
        self.capture = planned(policy, config, longest, manifest)
        self.objective: ObjectiveConfig = config.objective_config(longest)
        self.parameters: list[Tensor] = list(policy.trainable().values())
        self.optimizer = config.make_optimizer(self.parameters)
        self.prober = Prober(self.parameters, self.optimizer, config, self._score)
        self._captured = self._probed = 0.0

    def checkpoint(self, run: Path, step: int, recorder: Recorder) -> None:
        """Write a checkpoint, once every step before it is recorded.

        A disk that takes none is told once; the older ones stay and training goes on.
        """
        recorder.flush()
        self.recorded = recorder.failure is None
        keep, ring = self.config.keep_checkpoints, recorder.ring
        if not recorder.lost:
            state = run, step, self.policy, self.optimizer
            self.saved = keep_checkpoint(*state, keep, ring, told=not self.saved)

    def draw(self, step: int) -> Batch:
        """Sample and grade the batch of a step."""
        batch = draw_batch(self.policy, self.task, self.config, step)
        if not self.policy.mixed and self.config.sampler != BATCHED:
            return batch
        updates = mini_batches(batch, self.config, self.policy.device, epochs=1)
        pieces = [piece for update in updates for piece in self._split(update)]
        return rescored(batch, pieces, partial(self._score, grad=False))

    def _split(self, update: MiniBatch) -> list[MiniBatch]:
        """Micro-batches of a mini-batch."""
        return update.split(self.config.microbatch_size, self.capture.microbatch_tokens)

    def step(self, step: int, recorder: Recorder) -> dict[str, float]:
        """Do one step: draw a batch, update on it, record it.

        Returns the step's row of the ``steps`` table.
        """
        started = perf_counter()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.config.learning_rate(step)
        batch = self.draw(step)
        sampled = perf_counter()
        weights = batch_weights(
            self.objective,
            batch.advantages,
            batch.lengths,
            batch.group,
            self.config.rollouts_per_prompt,
            self.config.minibatches,
        ).on(self.policy.device)
        tally = StepTally()
        for update in mini_batches(batch, self.config, self.policy.device):
            self._update(step, update, weights, tally, recorder)
        self.prober.other = batch.rollouts
        row: dict[str, Any] = {"step": step, **batch_columns(batch)}
        row |= tally.columns(batch_sums(batch))
        row |= {"lr": self.config.learning_rate(step), "seconds_rollout": sampled - started}
        row |= {"seconds": perf_counter() - started}
        row |= {"seconds_capture": recorder.seconds - self._captured}
        row |= {"seconds_probe": self.prober.seconds - self._probed}
        self._captured, self._probed = recorder.seconds, self.prober.seconds
        if self.config.evaluation_due(step):
            row |= evaluate(self.policy, self.task, self.config).columns()
        recorder.finish_step(rollouts=rollout_columns(batch), texts=self.policy.texts, **row)
        return row

    def _update(
        self,
        step: int,
        update: MiniBatch,
        weights: BatchWeights,
        tally: StepTally,
        recorder: Recorder,
    ) -> None:
        """One optimizer update on one mini-batch, accumulated over micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        split = self._split(update)
        pieces = micro_batches(update, split, weights, self.objective, self._kept)
        watched = [self._backward(step, *piece, tally, recorder) for piece in pieces]
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        )
        if math.isfinite(norm):
            probe = self.prober.start(step, update.index, recorder)
            self.optimizer.step()
            probe.finish(watched, norm)
        tally.add_update(norm)
        if recorder.wants_rescore(step):
            for tokens, rollouts in watched:
                after = self._score(rollouts, False, reading(recorder, tokens.top))
                tokens.logp_after, tokens.entropy_after = after.logp, after.entropy

    def _score(
        self, rollouts: Rollouts, grad: bool, look: Callable[[ReadRows], None] | None = None
    ) -> TokenStats:
        """Statistics of the N completion tokens, flat over the mask."""
        with torch.set_grad_enabled(grad), recomputing(self.policy.module, grad):
            return score(self.policy, rollouts, self.config.temperature, self.capture.mode, look)

    def _kept(self, update: MiniBatch) -> Tensor:
        """Tokens of the mini-batch that would enter the loss now, shape (B, T); no gradient."""
        return kept_tokens(self.objective, update, self._score(update.rollouts, grad=False))

    def _backward(
        self, step: int, update: MiniBatch, weights: BatchWeights, tally: StepTally,
        recorder: Recorder,
    ) -> tuple[TokenPass, Rollouts]:  # fmt: skip
        """Forward and backward of one micro-batch; the recorder sees the pass in between."""
        rollouts, mask = update.rollouts, update.rollouts.mask
        top = recorder.guard(update.top_tokens, recorder, step)
        stats = self._score(rollouts, True, reading(recorder, top))
        keep = kept_tokens(self.objective, update, stats)
        # Whatever the mask hides is 0, so the loss sees a plain (B, T) tensor.
        logp = torch.zeros(mask.numel(), dtype=stats.logp.dtype, device=mask.device)
        logp = logp.index_copy(0, rollouts.kept, stats.logp).view(mask.shape)
        out = policy_loss(
            self.objective, logp, rollouts.logp_old, update.advantage, mask, keep,
            weights.sequence_weight,
        )  # fmt: skip
        tokens = update.token_pass(stats, out.kept, out.clipped)
        tokens.top = top
        recorder.watch_pass(tokens, stats.logp)
        loss = out.loss * weights.multiplier
        tally.add_tokens(tokens, out.ratio.reshape(-1)[rollouts.kept], loss)
        if loss.requires_grad:
            loss.backward()
        return tokens, rollouts
