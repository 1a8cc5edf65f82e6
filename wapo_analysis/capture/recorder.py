"""The recorder: turns gradient passes into token rows, exact class totals and step lines.

It reads tensors, draws no random numbers and never raises into training: a failure (disk full, a
bug) is logged once and recording stops while training goes on.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.capture.ranks import PartWriter
from wapo_analysis.derive import class_totals, derive
from wapo_analysis.errors import UserError
from wapo_analysis.schema import ROLLOUTS, TOKENS
from wapo_analysis.store import RunWriter
from wapo_analysis.table import Records

log = logging.getLogger(__name__)


@dataclass
class TokenPass:
    """Tokens of one gradient pass, flat over the loss mask; every tensor has shape (N,).

    ``coef`` is filled by the backward pass, ``*_after`` by re-scoring. Leave a statistic None if
    the source cannot give it: it is stored as missing.
    """

    group: Tensor
    rollout: Tensor
    position: Tensor
    token_id: Tensor
    advantage: Tensor
    logp: Tensor
    logp_old: Tensor | None = None
    entropy: Tensor | None = None
    collision_rest: Tensor | None = None
    collision_logp_rest: Tensor | None = None
    clipped: Tensor | None = None
    kept: Tensor | None = None
    top1: Tensor | None = None
    coef: Tensor | None = None
    logp_after: Tensor | None = None
    entropy_after: Tensor | None = None
    minibatch: int = field(default=0, kw_only=True)

    def to_columns(self, step: int, rank: int) -> dict[str, np.ndarray[Any, Any]]:
        """Columns of the token table; the one place where tensors become numpy arrays."""
        given = {
            f.name: _to_numpy(getattr(self, f.name))
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        rows = len(given["logp"])
        for name, value in (("step", step), ("minibatch", self.minibatch), ("rank", rank)):
            given[name] = np.full(rows, value)
        if self.kept is None:
            given["kept"] = np.ones(rows, bool)
        return given


def _to_numpy(values: Tensor) -> np.ndarray[Any, Any]:
    detached = values.detach()
    if detached.dtype in (torch.bfloat16, torch.float16):
        detached = detached.float()  # numpy has no bfloat16
    return np.asarray(detached.cpu().numpy())


F = TypeVar("F", bound=Callable[..., None])


def guarded(method: F) -> F:
    """Let no failure of recording reach the training that is being watched."""

    @wraps(method)
    def wrapper(self: "Recorder", *args: Any, **kwargs: Any) -> None:
        if self.failure is not None and method.__name__ != "close":
            return
        started = perf_counter()
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.fail(error)
        finally:
            self.seconds += perf_counter() - started

    return cast(F, wrapper)


class NullRecorder:
    """Records nothing; what a trainer holds when nobody watches."""

    path: Path | None = None
    failure: str | None = None
    seconds = 0.0

    def wants_rescore(self, step: int) -> bool:
        """Whether tokens of this step are to be scored again after the update."""
        return False

    def wants_probe(self, step: int) -> bool:
        """Whether an update of this step is to be taken apart."""
        return False

    def watch(self, tokens: TokenPass, logp: Tensor) -> None:
        """Take the tokens of one gradient pass, before its backward pass."""

    def add_probe(self, rows: Records) -> None:
        """Take the rows of one probed update."""

    def end_step(
        self,
        row: Mapping[str, float],
        rollouts: Mapping[str, Sequence[Any]],
        texts: Callable[[list[int]], list[str]] | None = None,
    ) -> None:
        """Finish a step: class totals, rows and the step line are written."""

    def note(self, **changes: Any) -> None:
        """Change manifest entries."""

    def close(self, status: str) -> None:
        """End the run."""


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
        }
        # Rank 0 owns what a run has once: manifest, step log, vocabulary.
        writer = RunWriter if rank == 0 else PartWriter
        self._writer = writer(self.path, {**manifest, **settings}, resume_after)
        self._passes: list[TokenPass] = []
        self._probes: list[Records] = []
        self.tokens: Records | None = None

    def fail(self, error: Exception) -> None:
        """Stop recording for good, with one warning; training goes on."""
        if self.failure is None:
            self.failure = f"{type(error).__name__}: {error}"
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
        texts: Callable[[list[int]], list[str]] | None = None,
    ) -> None:
        """Finish a step: class totals, token rows, rollouts and the step line are written.

        Parameters
        ----------
        row : mapping
            Columns of the ``steps`` table, ``step`` among them.
        rollouts : mapping of str to sequence
            Columns of the ``rollouts`` table without ``step`` and ``rank``.
        texts : callable, optional
            Token ids to their texts, for the vocabulary of the run.
        """
        self._write_step(row, rollouts, texts)

    def _write_step(
        self,
        row: Mapping[str, float],
        rollouts: Mapping[str, Sequence[Any]],
        texts: Callable[[list[int]], list[str]] | None,
    ) -> None:
        step = int(row["step"])
        self._settle(step, texts)
        count = len(rollouts["reward"]) if rollouts else 0
        if count:
            keys = {"step": np.full(count, step), "rank": np.full(count, self.rank)}
            self._writer.write_part(Records.build(ROLLOUTS, {**keys, **rollouts}), step, self.rank)
        probes, self._probes = self._probes, []
        if probes:
            self._writer.write_part(Records.concat(probes), step, self.rank)
        # The step line comes last: a step that is in the log has all its parts.
        self._writer.append_step(row)

    @guarded
    def settle(self, step: int, texts: Callable[[list[int]], list[str]] | None = None) -> None:
        """Write the tokens of the passes so far, ahead of `end_step`, which then writes the rest.

        Parameters
        ----------
        step : int
            Step the passes belong to; to be called once for it.
        texts : callable, optional
            Token ids to their texts, for the vocabulary of the run.

        Notes
        -----
        ``tokens`` then holds the step's token records, derived columns included.
        """
        self._settle(step, texts)

    def _settle(self, step: int, texts: Callable[[list[int]], list[str]] | None) -> None:
        passes, self._passes = self._passes, []
        if passes:
            self._write_tokens(step, passes, texts)

    def _write_tokens(
        self,
        step: int,
        passes: Sequence[TokenPass],
        texts: Callable[[list[int]], list[str]] | None,
    ) -> None:
        tokens = Records.concat(
            [Records.build(TOKENS, p.to_columns(step, self.rank)) for p in passes]
        )
        self.tokens = derive(tokens, self.temperature)
        self._writer.write_part(class_totals(self.tokens), step, self.rank)
        if not on_schedule(step, self.token_every):
            return
        chosen = tokens
        if self.token_fraction < 1:
            chosen = tokens.select(_chosen(tokens["rollout"], step, self.token_fraction))
        self._writer.write_part(chosen, step, self.rank)
        if texts is not None:
            self._name_tokens(np.unique(chosen["token_id"]).tolist(), texts)

    @guarded
    def name_tokens(self, ids: Iterable[int], texts: Callable[[list[int]], list[str]]) -> None:
        """Add token ids and their texts to the vocabulary of the run."""
        self._name_tokens(ids, texts)

    def _name_tokens(self, ids: Iterable[int], texts: Callable[[list[int]], list[str]]) -> None:
        new = self._writer.missing_vocab(ids)
        if new:
            self._writer.add_vocab(dict(zip(new, texts(new), strict=True)))

    @guarded
    def note(self, **changes: Any) -> None:
        """Change manifest entries."""
        self._writer.update_manifest(**changes)

    @guarded
    def close(self, status: str) -> None:
        """End the run; a step that was not finished is dropped."""
        self._passes, self._probes = [], []
        self._writer.close(status if self.failure is None else "recording_failed")


def on_schedule(step: int, every: int) -> bool:
    """Steps 1, 1 + every, ... so that the first step always counts."""
    return every > 0 and (step - 1) % every == 0


def _chosen(rollout: np.ndarray[Any, Any], step: int, fraction: float) -> np.ndarray[Any, Any]:
    """Rows of the chosen rollouts: a multiplicative hash of (step, rollout) below the fraction."""
    mixed = (rollout.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(step * 0xBF58476D1CE4E5B9 % 2**64)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53 < fraction
