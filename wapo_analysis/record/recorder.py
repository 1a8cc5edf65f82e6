"""The recorder: gradient passes in, a run folder out; any trainer feeds it.

It reads tensors, draws no random numbers and never raises into training: a failure is logged once
and recording stops. The training thread only keeps references and starts copies; a thread of its
own computes and writes.

Shapes: B rollouts of a gradient pass, T positions, V vocabulary, N tokens, R rollouts of a step.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.record import Alone, Closing, Steps, check_schedule, guarded, on_schedule
from wapo_analysis.record.batches import batch_pass
from wapo_analysis.record.beside import Action, Beside, Ring, Save, acts, check_actions, made_beside
from wapo_analysis.record.step import OpenStep, number, step_rollouts
from wapo_analysis.record.tokens import TokenPass
from wapo_analysis.record.topk import TOPK, TopReader
from wapo_analysis.record.writer import QUEUE_ROWS, StepWriter, Texts
from wapo_analysis.stats import TokenStats
from wapo_analysis.store import PartWriter, RunWriter
from wapo_analysis.store.lock import RunLost
from wapo_analysis.store.manifest import described
from wapo_analysis.store.parquet import MANTISSA_BITS
from wapo_analysis.table import Records

__all__ = ["Recorder", "TokenPass", "on_schedule"]

log = logging.getLogger(__name__)


class Recorder(Alone, Closing):
    """Records one run into a folder.

    Parameters
    ----------
    path : str or Path, or None
        Run folder, new unless ``resume_after`` is given; None records nothing.
    manifest : mapping, optional
        What is known of the run: ``label`` (legends), ``objective`` (``{"name": "grpo"}``),
        ``seed``, ``model``, ...; see docs/run_format.md.
    token_every : int
        Write token rows of every n-th step (class totals are kept of every step); 0 writes none.
    token_fraction : float
        Share of the rollouts whose token rows are written, in (0, 1]; no random state is touched.
    rescore_every, probe_every : int
        Score again after the update, or decompose one, on every n-th step, 0 never; for one who
        asks `wants_rescore` and `wants_probe`.
    temperature : float
        Softmax temperature of the statistics.
    rank : int
        Process number, part of every file name.
    resume_after : int, optional
        Continue the run in ``path`` after this step.
    store_bits : int
        Mantissa bits that float32 columns keep on disk, 7..23; 23 keeps all.
    queue_rows : int
        Token rows that may wait for the disk, about 100 bytes each. While more would, each step
        writes half the share of the one before, in the end none (column ``token_fraction``).
    synchronous : bool
        Write in the training thread; the files are the same.
    sequence_level : bool
        The clip looks at the ratio of the whole rollout (GSPO).
    take_over : bool
        Take the run from a process that still seems to write it; that one stops recording.
    topk : int
        Keep this many of the most probable tokens, ids and log-probabilities, at the positions of
        four rollouts of every step with token rows (table ``topk``); 0 keeps none.
    audit : bool
        Print what the trainer really computes after the third step (docs/audit.md).
    on_warning, on_critical : {"checkpoint", "stop"} or callable, optional
        A guard (docs/guard.md): call `checkpoint` after every step and ask `asked`.

    Raises
    ------
    UserError
        On numbers out of range or a folder that cannot be used. Later failures never raise: they
        are logged once, in ``failure``.

    Examples
    --------
    >>> import tempfile, torch
    >>> logits = torch.randn(2, 3, 5, requires_grad=True)
    >>> tokens, mask = torch.randint(5, (2, 3)), torch.ones(2, 3)
    >>> advantages, groups = torch.tensor([0.5, -0.5]), torch.tensor([0, 0])
    >>> logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    >>> with tempfile.TemporaryDirectory() as folder, Recorder(folder) as recorder:
    ...     recorder.watch(logp, tokens, mask, advantages, groups, logits=logits)
    ...     (-(logp * advantages[:, None]).mean()).backward()
    ...     recorder.finish_step(1, reward=[1.0, 0.0])
    """

    lost = False  # to another process: nothing may be written to the folder any more

    def __init__(
        self, path: str | Path | None, manifest: Mapping[str, Any] | None = None, *,
        token_every: int = 1, token_fraction: float = 1.0, rescore_every: int = 0,
        probe_every: int = 0, temperature: float = 1.0, rank: int = 0,
        resume_after: int | None = None, store_bits: int = MANTISSA_BITS,
        queue_rows: int = QUEUE_ROWS, synchronous: bool = False, sequence_level: bool = False,
        take_over: bool = False, topk: int = TOPK, audit: bool = False,
        on_warning: Action = None, on_critical: Action = None,
    ) -> None:  # fmt: skip
        check_schedule(rank, token_fraction, token_every, rescore_every, probe_every)
        check_actions(on_warning, on_critical)
        super().__init__(None if path is None else Path(path).absolute())
        self._beside: Beside | None = None
        self.ring: Ring | None = None
        self.token_every, self.token_fraction = token_every, token_fraction
        self.rescore_every, self.probe_every = rescore_every, probe_every
        self.temperature, self.rank, self.sequence_level = temperature, rank, sequence_level
        names = ("temperature", "token_every", "token_fraction", "rescore_every", "probe_every")
        settings = {n: getattr(self, n) for n in names} | {"store_bits": store_bits, "topk": topk}
        self.tops = TopReader(topk, token_every, token_fraction, temperature)
        self._step, self._count = OpenStep(), Steps(resume_after)
        self._told, self._since, self._captured = set[str](), perf_counter(), 0.0
        if self.path is None:
            return
        # Rank 0 owns what a run has once: manifest, step log, vocabulary.
        kind = RunWriter if rank == 0 else PartWriter
        entries = {**described(self.path, manifest or {}), **settings}
        entries |= {} if resume_after is None else acts(self.path, resume_after)
        self._writer = kind(self.path, entries, resume_after, store_bits, take_over)
        if rank == 0:
            note, asked = self._writer.update_manifest, (audit, on_warning, on_critical)
            self._beside, self.ring = made_beside(self.path, note, *asked, entries)
        self._steps = StepWriter(self._writer, self.fail, queue_rows, synchronous, self._beside)

    def failed(self, error: BaseException) -> None:
        """Stop recording for good, with one warning; training goes on."""
        self.lost, path = isinstance(error, RunLost), self.path or self.original
        if self.path is not None:
            self._steps.abandon()
        log.warning("recording to %s stopped (%s); training goes on", path, self.failure)

    def wants_rescore(self, step: int) -> bool:
        """Whether tokens of this step are to be scored again after the update."""
        return self.failure is None and on_schedule(step, self.rescore_every)

    def wants_probe(self, step: int) -> bool:
        """Whether an update of this step is to be decomposed."""
        # Not step 1: AdamW then divides by the gradient itself, which inflates classes that cancel.
        return self.failure is None and self.probe_every > 0 and step % self.probe_every == 0

    def asked(self, action: str) -> bool:
        """Whether the guard asked for "checkpoint" or "stop" since the last call of this."""
        return self._beside is not None and self._beside.asked(action)

    @guarded
    def checkpoint(self, save: Save) -> None:
        """Save a checkpoint for the guard, if there is one and it is time; after `finish_step`.

        ``save`` fills a folder that becomes RUN/checkpoints/step-N; if it fails, that is told once.
        """
        ring = self.ring
        if ring is not None and ring.due(self._count.last):
            self.flush()
            if self.failure is None and ring.write(self._count.last, save):
                self.note(guard_checkpoints=ring.entry())

    def returned(self) -> bool | None:
        """Whether a gradient reached a pass of the open step, see `OpenStep`; None of no pass."""
        return self._step.returned() if self._step.passes or self._step.settled else None

    def forget(self) -> None:
        """Drop what the open step has been given: its update was skipped."""
        self._step, _ = OpenStep(), self.tops.taken()

    @guarded
    def watch_pass(
        self,
        tokens: TokenPass,
        logp: Tensor | None = None,
        read: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Take the tokens of one gradient pass, before its backward pass.

        Parameters
        ----------
        tokens : TokenPass
            Tokens with every statistic known before the backward pass.
        logp : Tensor on the autograd graph, optional
            The tensor the loss is made of, shape (N,) unless ``read`` is given; its gradient is
            -coef. None if the caller fills ``tokens.coef`` before the step ends.
        read : callable, optional
            Fills ``tokens`` from the gradient; by default coef alone is filled.
        """

        def keep(gradient: Tensor) -> None:
            tokens.coef = -gradient.detach()

        def came(gradient: Tensor) -> None:  # what a hook returns takes the gradient's place
            self.guard(read or keep, gradient)

        if logp is not None and logp.requires_grad:
            logp.register_hook(came)
        self._step.passes.append(tokens)

    @guarded
    def watch(
        self,
        logp: Tensor,
        tokens: Tensor | None,
        mask: Tensor,
        advantages: Tensor,
        groups: Tensor | None,
        *,
        logits: Tensor | None = None,
        logp_old: Tensor | None = None,
        logp_prox: Tensor | None = None,
        stats: TokenStats | None = None,
        entropy: Tensor | None = None,
        collision: Tensor | None = None,
        rollouts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kept: Tensor | None = None,
        clip: tuple[float, float] | None = None,
        minibatch: int | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Watch one gradient pass; call it after the forward and before the backward pass.

        Tensors are padded, (B, T), or packed, (M,): rollouts one after another (``cu_seqlens``) or
        in any order (``rollouts`` per position). P below is (B, T) or (M,).

        Parameters
        ----------
        logp : Tensor, shape P
            Log-probability of each sampled token in nats: the very tensor the loss is made of.
            The gradient that reaches it is recorded: exactly -coef, whatever the loss is.
        tokens : Tensor of int64, shape P
            Sampled tokens; None if the source does not know them.
        mask : Tensor, shape P
            Non-zero on completion tokens.
        advantages : Tensor, shape (B,) or P
        groups : Tensor of int64, shape (B,) or P
            Prompt of each rollout within the step; None if unknown.
        logits : Tensor, shape P + (V,), optional
            Logits that predict each token, before the division by temperature; they give all
            statistics. Only read, block by block, nothing is kept.
        logp_old, logp_prox : Tensor, shape P, optional
            Log-probabilities under the behaviour policy; those that the loss's ratio is to, if
            they are others.
        stats : TokenStats, optional
            Statistics of the tokens under the mask, in its order, where they are known.
        entropy, collision : Tensor, shape P, optional
            Entropy in nats and sum of p_v^2, where logits are not known. A collision of single
            precision loses the class of tokens within 1e-4 of certainty.
        rollouts : Tensor of int64, shape (B,) or P, optional
            Number of each rollout within the step; by default counted up. With epochs, give them.
        cu_seqlens : Tensor of int, shape (B + 1,), optional
            Where the rollouts of a packed batch begin, and M at the end, as in flash-attention.
        kept : Tensor of bool, shape P, optional
            Tokens that take part in the loss; by default the gradient tells.
        clip : tuple of float, optional
            Bounds of the ratio, e.g. ``(0.8, 1.2)``: sharpens the clip flag.
        minibatch : int, optional
            Gradient pass within the step; by default each call is the next.
        loss_scale : float
            Factor on the loss before backward (``GradScaler.get_scale()``).
        """
        if loss_scale is None or not loss_scale > 0:
            raise UserError(f"loss_scale must be positive, got {loss_scale}")
        batch = batch_pass(
            logp, tokens, mask, advantages, groups, rollouts=rollouts, cu_seqlens=cu_seqlens,
            first_rollout=self._step.rollouts, temperature=self.temperature,
            minibatch=len(self._step.batches) if minibatch is None else minibatch,
            logits=logits, entropy=entropy, collision=collision, logp_old=logp_old,
            logp_prox=logp_prox, stats=stats, kept=kept, clip=clip,
            sequence_level=self.sequence_level,
        )  # fmt: skip
        self._step.batches.append(batch)
        self.tops.look(self._count.last + 1, batch.tokens, batch.place, logits, stats)
        self.watch_pass(batch.tokens, logp, partial(batch.read_gradient, loss_scale=loss_scale))

    watch_batch = watch  # its name until packed batches came

    @guarded
    def add_probe(self, rows: Records) -> None:
        """Take the rows of one probed update; the step's end writes them."""
        self._step.probes.append(rows)

    @guarded
    def settle(self, step: int, texts: Texts | None = None) -> Records | None:
        """Compute the token records of the passes so far, ahead of `finish_step`, in this thread.

        They are derived, and waited for on a device; None without passes.

        Parameters
        ----------
        step : int
            Step the passes belong to.
        texts : callable, optional
            Token ids to their texts, for the vocabulary of the run.
        """
        tokens = self._step.settle(step, self.rank, self.temperature)
        named = texts is not None and self.rank == 0 and on_schedule(step, self.token_every)
        if tokens is not None and texts is not None and named:
            self._steps.name(tokens["token_id"], texts)
        return tokens

    @guarded
    def finish_step(
        self,
        step: int,
        *,
        reward: Tensor | Sequence[float] | float | None = None,
        texts: Texts | None = None,
        prompts: Sequence[str] | None = None,
        completions: Sequence[str] | None = None,
        rollouts: Mapping[str, Any] | None = None,
        sums: Mapping[str, float] | None = None,
        **columns: float,
    ) -> None:
        """Finish a step; call it after the last optimizer step on a batch of rollouts.

        Parameters
        ----------
        step : int
            Step number, from 1, counting up; one that does not is counted on, with a warning.
        reward : Tensor or sequence of R numbers, or one number
            Reward of each watched rollout in the order of their numbers, or only their mean.
        texts : callable, optional
            Token ids to texts, e.g. ``tokenizer.batch_decode``; called in this thread.
        prompts, completions : sequence of R str, optional
            Texts of the rollouts.
        rollouts : mapping of str to sequence, optional
            Columns of the ``rollouts`` table, if the caller has them; copied.
        sums : mapping of str to float, optional
            Of rollouts (`wapo_analysis.derive.rollout_sums`); None if ``columns`` holds all.
        **columns : float
            Further columns of the ``steps`` table (``loss``, ``lr``, ...); your own have a slash.
        """
        now, self._step, step = self._step, OpenStep(), self._count.next(step)
        found = step_rollouts(now.batches, reward, prompts, completions, now.trained)
        row: dict[str, Any] = {"step": step, **self._times(), **found.row}
        if now.batches:
            rollouts, sums = found.columns, found.sums
            now.forget_unknown_clips()
            now.tell(self._told)
        row |= {name: number(name, value) for name, value in columns.items()}
        if self.ring is not None:
            self.ring.earned(row.get("reward"))
        job = now.job(
            row,
            rollouts or {},
            tops=self.tops.taken(),
            rank=self.rank,
            temperature=self.temperature,
            share=self.token_fraction if on_schedule(step, self.token_every) else 0.0,
            sums=sums,
            sequence_level=self.sequence_level,
        )
        self._steps.put(job, texts if self.rank == 0 else None)

    def _times(self) -> dict[str, float]:
        """Wall time of the step and what recording took of it."""
        now = perf_counter()
        row = {"seconds": now - self._since, "seconds_capture": self.seconds - self._captured}
        self._since, self._captured = now, self.seconds
        return row

    @guarded
    def name_tokens(self, ids: Iterable[int], texts: Texts) -> None:
        """Add token ids and their texts to the vocabulary of the run."""
        if self.rank == 0:
            self._steps.name(np.fromiter(ids, np.int64), texts)

    @guarded
    def note(self, **changes: Any) -> None:
        """Change manifest entries."""
        self._steps.note(**changes)

    @guarded
    def flush(self) -> None:
        """Wait until every finished step is on disk, as a checkpoint needs that may be resumed."""
        self._steps.drain()
        if self.failure is None:
            self._writer.sync()

    def close(self, status: str = "finished") -> None:
        """End the run; a step that was not finished is dropped."""
        if self.path is None or self.forked:
            return
        left, self._step = self._step, OpenStep()
        try:
            if status == "finished" and self.failure is None:
                left.tell_unfinished(self._count.last)
            self._steps.finish()
            self._writer.close(status if self.failure is None else "recording_failed")
        except Exception as error:
            self.fail(error)
