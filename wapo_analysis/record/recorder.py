"""The recorder: turns gradient passes into token rows, exact class totals and step lines.

It reads tensors, draws no random numbers and never raises into training: a failure (disk full, a
bug) is logged once and recording stops while training goes on. The training thread only keeps
references and starts copies; a thread of its own computes and writes.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.record.null_recorder import NullRecorder, RowOf, Texts, guarded, on_schedule
from wapo_analysis.record.step_job import StepJob, token_records
from wapo_analysis.record.step_writer import QUEUE_ROWS, StepWriter
from wapo_analysis.record.tokens import TokenPass, on_host
from wapo_analysis.schema import ROLLOUTS
from wapo_analysis.store import RunWriter
from wapo_analysis.store.files import MANTISSA_BITS
from wapo_analysis.store.ranks import PartWriter
from wapo_analysis.table import Records

__all__ = ["NullRecorder", "Recorder", "TokenPass", "guarded", "on_schedule"]

log = logging.getLogger(__name__)


class Recorder(NullRecorder):
    """Records one run into a folder.

    Parameters
    ----------
    path : str or Path
        Run folder, new unless ``resume_after`` is given.
    manifest : mapping
        Description of the run, see docs/run_format.md.
    token_every : int
        Write token rows of every n-th step (class totals are kept of every step); 0 writes none.
    token_fraction : float
        Share of the rollouts whose token rows are written, in (0, 1]; chosen by a fixed rule from
        step and rollout number, so no random state is touched.
    rescore_every : int
        Score the tokens again after the update on every n-th step; 0 never.
    probe_every : int
        Take one update of every n-th step apart (docs/attribution.md); 0 never.
    temperature : float
        Softmax temperature of the statistics.
    rank : int
        Process number, part of every file name.
    resume_after : int, optional
        Continue the run in ``path`` after this step.
    store_bits : int
        Mantissa bits that float32 columns keep on disk, 7..23; 23 keeps all.
    queue_rows : int
        Token rows that may wait for the disk, about 100 bytes each. If more would, the rows of a
        step are sampled down, by halves and in the end to none, rather than training held up; see
        the column ``token_fraction``. Class totals, rollouts and step lines are always written.
    synchronous : bool
        Write in the training thread; the files are the same.

    Attributes
    ----------
    failure : str or None
        Why recording stopped.
    seconds : float
        Time that recording took of the training thread.
    tokens : Records or None
        Derived token records of the last `settle`.

    Raises
    ------
    UserError
        On numbers out of range or a folder that cannot be used. Later failures never raise; see
        ``failure``.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Mapping[str, Any],
        *,
        token_every: int = 1,
        token_fraction: float = 1.0,
        rescore_every: int = 10,
        probe_every: int = 0,
        temperature: float = 1.0,
        rank: int = 0,
        resume_after: int | None = None,
        store_bits: int = MANTISSA_BITS,
        queue_rows: int = QUEUE_ROWS,
        synchronous: bool = False,
    ) -> None:
        if min(token_every, rescore_every, probe_every) < 0:
            raise UserError(
                "token_every, rescore_every and probe_every must be 0 (never) or positive"
            )
        if not 0 < token_fraction <= 1:
            raise UserError(f"token_fraction must be in (0, 1], got {token_fraction}")
        self.path = Path(path)
        self.token_every, self.token_fraction = token_every, token_fraction
        self.rescore_every, self.probe_every = rescore_every, probe_every
        self.temperature, self.rank = temperature, rank
        self.failure = None
        self.seconds = 0.0
        settings = {
            "temperature": temperature,
            "token_every": token_every,
            "token_fraction": token_fraction,
            "rescore_every": rescore_every,
            "probe_every": probe_every,
            "store_bits": store_bits,
        }
        # Rank 0 owns what a run has once: manifest, step log, vocabulary.
        writer = RunWriter if rank == 0 else PartWriter
        self._writer = writer(self.path, {**manifest, **settings}, resume_after, store_bits)
        self._steps = StepWriter(self._writer, self.fail, queue_rows, synchronous)
        self._passes: list[TokenPass] = []
        self._probes: list[Records] = []
        self._settled: list[Records] = []
        self.tokens: Records | None = None

    def fail(self, error: Exception) -> None:
        """Stop recording for good, with one warning; training goes on."""
        if self.failure is None:
            self.failure = f"{type(error).__name__}: {error}"
            self._steps.abandon()
            log.warning("recording to %s stopped (%s); training goes on", self.path, self.failure)

    def wants_rescore(self, step: int) -> bool:
        """Whether tokens of this step are to be scored again after the update."""
        return self.failure is None and on_schedule(step, self.rescore_every)

    def wants_probe(self, step: int) -> bool:
        """Whether an update of this step is to be taken apart."""
        # Not step 1: AdamW then divides by the first gradient itself, and classes that cancel in it
        # have shares out of all proportion to the step.
        return self.failure is None and self.probe_every > 0 and step % self.probe_every == 0

    @guarded
    def add_probe(self, rows: Records) -> None:
        """Take the rows of one probed update; they are written when the step ends."""
        self._probes.append(rows)

    @guarded
    def watch(self, tokens: TokenPass, logp: Tensor | None = None) -> None:
        """Take the tokens of one gradient pass, before its backward pass.

        Parameters
        ----------
        tokens : TokenPass
            Tokens with every statistic known before the backward pass.
        logp : Tensor, shape (N,), on the autograd graph, optional
            Its gradient is the exact -coef of any loss: ratio, clip, masks and normalisers in.
            None if the caller fills ``tokens.coef`` before the step ends.
        """

        def keep_gradient(grad: Tensor) -> None:
            tokens.coef = -grad.detach()

        if logp is not None and logp.requires_grad:
            logp.register_hook(keep_gradient)
        self._passes.append(tokens)

    @guarded
    def end_step(
        self,
        row: Mapping[str, float],
        rollouts: Mapping[str, Sequence[Any]],
        texts: Texts | None = None,
        row_of: RowOf | None = None,
    ) -> None:
        """Finish a step: class totals, token rows, rollouts and the step line will be written.

        Parameters
        ----------
        row : mapping
            Columns of the ``steps`` table, ``step`` among them.
        rollouts : mapping of str to sequence
            Columns of the ``rollouts`` table without ``step`` and ``rank``; copied.
        texts : callable, optional
            Token ids to their texts, for the vocabulary of the run; called in this thread.
        row_of : callable, optional
            Further columns of the ``steps`` table from the step's derived token records, computed
            by the writer thread; not called for a step without tokens.
        """
        self._end_step(row, rollouts, texts, row_of)

    def _end_step(
        self,
        row: Mapping[str, float],
        rollouts: Mapping[str, Sequence[Any]],
        texts: Texts | None,
        row_of: RowOf | None = None,
    ) -> None:
        step = int(row["step"])
        job = StepJob(
            dict(row),
            self.rank,
            self.temperature,
            passes=[on_host(tokens) for tokens in self._passes],
            tokens=self._settled,
            share=self.token_fraction if on_schedule(step, self.token_every) else 0.0,
            others=self._beside_tokens(step, rollouts),
            row_of=row_of,
        )
        self._passes, self._settled, self._probes = [], [], []
        self._steps.put(job, texts if self.rank == 0 else None)

    def _beside_tokens(self, step: int, rollouts: Mapping[str, Sequence[Any]]) -> list[Records]:
        """Rollouts and probes of the step; what the caller may write again is copied."""
        others = []
        count = len(rollouts["reward"]) if rollouts else 0
        if count:
            keys = {"step": np.full(count, step), "rank": np.full(count, self.rank)}
            own = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in rollouts.items()}
            others.append(Records.build(ROLLOUTS, {**keys, **own}))
        if self._probes:
            others.append(Records.concat(self._probes))
        return others

    @guarded
    def settle(self, step: int, texts: Texts | None = None) -> None:
        """Compute the token records of the passes so far, ahead of `end_step`, in this thread.

        Parameters
        ----------
        step : int
            Step the passes belong to.
        texts : callable, optional
            Token ids to their texts, for the vocabulary of the run.

        Notes
        -----
        ``tokens`` then holds these records, derived columns included. It waits for the device; a
        caller who does not need the numbers now leaves it out, or gives `end_step` a ``row_of``.
        """
        passes = [on_host(tokens) for tokens in self._passes]
        self._passes = []
        built = token_records(passes, step, self.rank, self.temperature)
        if built:
            self.tokens = built[0]
            self._settled += built
            if texts is not None and self.rank == 0 and on_schedule(step, self.token_every):
                self._steps.name(built[0]["token_id"], texts)

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

    @guarded
    def close(self, status: str) -> None:
        """End the run; a step that was not finished is dropped."""
        self._passes, self._probes, self._settled = [], [], []
        self._steps.finish()
        self._writer.close(status if self.failure is None else "recording_failed")
