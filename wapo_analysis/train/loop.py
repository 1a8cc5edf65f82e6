"""The training loop, top to bottom: sample, grade, update in mini-batches, record.

Shapes: B rollouts of a mini-batch, b of a micro-batch, T completion positions, N their tokens.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
import wapo_taxonomy as tax
from torch import Tensor

from wapo_analysis.capture.recorder import NullRecorder, Recorder, TokenPass
from wapo_analysis.stats import TokenStats, token_stats
from wapo_analysis.store import open_run
from wapo_analysis.train.batch import Batch, batch_statistics, draw_batch, rollout_columns
from wapo_analysis.train.checkpoint import last_checkpoint, load_optimizer, save_checkpoint
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loss import keep_tokens, policy_loss
from wapo_analysis.train.manifest import new_manifest, resumed_manifest
from wapo_analysis.train.models import Policy, load_policy, pick_device
from wapo_analysis.train.objectives import ObjectiveConfig
from wapo_analysis.train.probe import Prober
from wapo_analysis.train.rollout import NonFiniteLogits, Rollouts, completion_logits
from wapo_analysis.train.tally import StepTally
from wapo_analysis.train.tasks import get_task
from wapo_analysis.train.weights import BatchWeights, batch_weights, minibatch_weights

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, float]], None]


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Policy:
    """Train a policy and, if ``out`` is given, record the run there.

    Parameters
    ----------
    config : TrainConfig
    out : str or Path, optional
        Run folder; None trains without a recorder and gives bitwise the same weights.
    resume : bool
        Continue the run in ``out`` from its last checkpoint.
    progress : callable, optional
        Called with the step's row after every step.
    threads : int, optional
        CPU threads of this process; None leaves torch's own choice.

    Returns
    -------
    Policy
        The trained policy.

    Raises
    ------
    UserError
        On a bad setting, an unusable folder, or nothing to resume.
    NonFiniteLogits
        If the policy can no longer be sampled from; the run is closed as ``diverged``.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    run = Path(out) if out is not None else None
    started_at, weights = 0, None
    if resume and run is not None:
        weights, started_at = last_checkpoint(run)
    policy = load_policy(config.model, pick_device(config.device), config.dtype, weights)
    trainer = Trainer(policy, config)
    if weights is not None:
        load_optimizer(weights, policy, trainer.optimizer)
    recorder = _recorder(run, config, policy, started_at if resume else None)
    status = "failed"
    try:
        for step in range(started_at + 1, config.steps + 1):
            row = trainer.step(step, recorder)
            if progress is not None:
                progress(row)
            if run is not None and _checkpoint_due(config, step):
                save_checkpoint(run, step, policy, trainer.optimizer)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except NonFiniteLogits:
        status = "diverged"
        raise
    finally:
        recorder.close(status)
    return policy


def _optimizer(parameters: list[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def _checkpoint_due(config: TrainConfig, step: int) -> bool:
    every = config.checkpoint_every
    return step == config.steps or (every > 0 and step % every == 0)


def _recorder(
    run: Path | None, config: TrainConfig, policy: Policy, resume_after: int | None
) -> NullRecorder:
    if run is None:
        return NullRecorder()
    if resume_after is None:
        manifest = new_manifest(config, policy)
    else:
        manifest = resumed_manifest(open_run(run), config)
    return Recorder(
        run,
        manifest,
        token_every=config.token_every,
        token_fraction=config.token_fraction,
        rescore_every=config.rescore_every,
        probe_every=config.probe_every,
        temperature=config.temperature,
        resume_after=resume_after,
    )


@dataclass(frozen=True)
class _Pass:
    """One mini-batch on its way through the loss."""

    index: int
    rollouts: Rollouts
    advantage: Tensor  # (B,)
    group: Tensor  # (B,)
    rows: Tensor  # (B,) rollout numbers


class Trainer:
    """Policy, optimizer and objective of one run.

    Parameters
    ----------
    policy : Policy
        Trained in place.
    config : TrainConfig
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        self.task = get_task(config.task)
        self.objective: ObjectiveConfig = config.objective_config(
            config.max_new_tokens or self.task.max_new_tokens
        )
        self.parameters: list[Tensor] = [p for p in policy.module.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, config)
        self.prober = Prober(self.parameters, self.optimizer, config, self._score)
        self._captured = self._probed = 0.0

    def step(self, step: int, recorder: NullRecorder) -> dict[str, float]:
        """Do one step: draw a batch, update on it, record it.

        Returns
        -------
        dict
            The step's row of the ``steps`` table.
        """
        started = perf_counter()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._lr(step)
        batch = draw_batch(self.policy, self.task, self.config, step)
        sampled = perf_counter()
        weights = batch_weights(
            self.objective,
            batch.advantages,
            batch.lengths(),
            batch.group,
            self.config.rollouts_per_prompt,
            self.config.minibatches,
        )
        tally = StepTally()
        for update in self._passes(batch):
            self._update(step, update, weights, tally, recorder)
        self.prober.other = batch.rollouts
        row: dict[str, float] = {"step": step, **batch_statistics(batch), **tally.columns()}
        row |= {"lr": self._lr(step), "seconds_rollout": sampled - started}
        row |= {"seconds": perf_counter() - started}
        row |= {"seconds_capture": recorder.seconds - self._captured}
        row |= {"seconds_probe": self.prober.seconds - self._probed}
        self._captured, self._probed = recorder.seconds, self.prober.seconds
        recorder.end_step(row, rollout_columns(batch), self.policy.texts)
        return row

    def _lr(self, step: int) -> float:
        return self.config.lr * min(1.0, step / max(self.config.warmup_steps, 1))

    def _passes(self, batch: Batch) -> Iterator[_Pass]:
        """Mini-batches in order, epoch after epoch: consecutive runs of rollouts."""
        device = self.policy.device
        rows = torch.arange(len(batch.rewards), device=device)
        advantage = torch.from_numpy(batch.advantages).to(device)
        group = torch.from_numpy(batch.group).to(device)
        chunks = rows.split(len(rows) // self.config.minibatches)
        for index in range(self.config.epochs * len(chunks)):
            chosen = chunks[index % len(chunks)]
            yield _Pass(
                index, batch.rollouts.rows(chosen), advantage[chosen], group[chosen], chosen
            )

    def _update(
        self,
        step: int,
        update: _Pass,
        weights: BatchWeights,
        tally: StepTally,
        recorder: NullRecorder,
    ) -> None:
        """One optimizer update on one mini-batch, accumulated over micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        watched = [
            self._backward(micro, scaled, tally, recorder)
            for micro, scaled in self._weighted_micro_batches(update, weights)
        ]
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, self.config.max_grad_norm or math.inf
        )
        if bool(torch.isfinite(norm)):
            probe = self.prober.start(step, update.index, recorder)
            self.optimizer.step()
            probe.finish(watched, float(norm))
        tally.add_update(float(norm))
        if recorder.wants_rescore(step):
            for tokens, rollouts in watched:
                after = self._score(rollouts, grad=False)
                tokens.logp_after, tokens.entropy_after = after.logp, after.entropy

    def _weighted_micro_batches(
        self, update: _Pass, weights: BatchWeights
    ) -> Iterator[tuple[_Pass, BatchWeights]]:
        """Micro-batches with their weights.

        With kept-token normalisation the weights depend on which tokens of the whole mini-batch
        are kept, so a split mini-batch is first scored without gradient.
        """
        size = self.config.microbatch_size or len(update.rows)
        parts = torch.arange(len(update.rows), device=update.rows.device).split(size)
        micro = [
            replace(
                update,
                rollouts=update.rollouts.rows(part),
                advantage=update.advantage[part],
                group=update.group[part],
                rows=update.rows[part],
            )
            for part in parts
        ]
        whole = None
        if self.objective.normalize_by_kept_tokens and not self.objective.official:
            keep = torch.cat([self._keep(m, self._score(m.rollouts, grad=False)) for m in micro])
            whole = minibatch_weights(self.objective, weights, update.rows, keep, update.group)
        for part, piece in zip(parts, micro, strict=True):
            if whole is not None:
                scaled = replace(whole, sequence_weight=whole.sequence_weight[part])
            else:
                keep = piece.rollouts.mask
                if self.objective.normalize_by_kept_tokens:
                    keep = self._keep(piece, self._score(piece.rollouts, grad=False))
                scaled = minibatch_weights(self.objective, weights, piece.rows, keep, piece.group)
            yield piece, scaled

    def _score(self, rollouts: Rollouts, grad: bool) -> TokenStats:
        """Statistics of the N completion tokens, flat over the mask."""
        with torch.set_grad_enabled(grad):
            logits = completion_logits(self.policy, rollouts)
            flat = logits[rollouts.mask]
            return token_stats(
                flat, rollouts.completion_ids[rollouts.mask], self.config.temperature
            )

    def _keep(self, update: _Pass, stats: TokenStats) -> Tensor:
        """Tokens of the mini-batch that enter the loss, shape (B, T)."""
        mask = update.rollouts.mask
        prob, complement = stats.logp.detach().exp(), -torch.expm1(stats.logp.detach())
        peak = torch.zeros_like(mask)
        peak[mask] = tax.is_peak(prob, complement, stats.collision_rest)
        return keep_tokens(self.objective, update.advantage, mask, peak)

    def _backward(
        self, update: _Pass, weights: BatchWeights, tally: StepTally, recorder: NullRecorder
    ) -> tuple[TokenPass, Rollouts]:
        """Forward and backward of one micro-batch; the recorder sees the pass in between."""
        rollouts, mask = update.rollouts, update.rollouts.mask
        stats = self._score(rollouts, grad=True)
        keep = self._keep(update, stats)
        # Whatever the mask hides is 0, so the loss sees a plain (B, T) tensor.
        logp = torch.zeros_like(rollouts.logp_old, dtype=stats.logp.dtype)
        logp = logp.masked_scatter(mask, stats.logp)
        out = policy_loss(
            self.objective,
            logp,
            rollouts.logp_old,
            update.advantage,
            mask,
            keep,
            weights.sequence_weight,
        )
        tokens = _token_pass(update, stats, out.kept, out.clipped)
        recorder.watch(tokens, stats.logp)
        loss = out.loss * weights.multiplier
        tally.add_tokens(tokens, out.ratio[mask], loss, int(out.nonfinite))
        if loss.requires_grad:
            loss.backward()
        return tokens, rollouts


def _token_pass(update: _Pass, stats: TokenStats, kept: Tensor, clipped: Tensor) -> TokenPass:
    """Rows of the token table for the N completion tokens of a micro-batch."""
    rollouts, mask = update.rollouts, update.rollouts.mask
    row, position = mask.nonzero(as_tuple=True)
    return TokenPass(
        group=update.group[row],
        rollout=update.rows[row],
        position=position,
        token_id=rollouts.completion_ids[mask],
        advantage=update.advantage[row],
        logp=stats.logp.detach(),
        logp_old=rollouts.logp_old[mask],
        entropy=stats.entropy,
        collision_rest=stats.collision_rest,
        collision_logp_rest=stats.collision_logp_rest,
        clipped=clipped[mask],
        kept=kept[mask],
        top1=stats.top1,
        minibatch=update.index,
    )
