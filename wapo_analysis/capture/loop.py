"""Watching a hand-written PyTorch loop: three calls, none of which can change the training.

    recorder = Recorder("runs/mine")
    ...
    recorder.watch_batch(logp, tokens, mask, advantages, groups, logits=logits)  # before backward
    ...
    recorder.finish_step(step, reward=rewards)

Shapes: B rollouts of a gradient pass, T positions, V vocabulary, R rollouts of a step.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.capture.loop_passes import (
    BatchPass,
    batch_pass,
    given_in_all,
    rollout_table,
)
from wapo_analysis.derive import reward_columns, rollout_sums, step_columns, token_sums
from wapo_analysis.errors import UserError
from wapo_analysis.record import recorder as core
from wapo_analysis.store import Manifest

log = logging.getLogger(__name__)


class Recorder(core.Recorder):
    """Records a run of any training loop into a folder.

    Parameters
    ----------
    path : str or Path
        Run folder, new.
    manifest : mapping, optional
        What is known of the run: ``label`` (legends), ``objective`` (``{"name": "grpo"}``),
        ``seed``, ``model``, ...; see docs/run_format.md.
    **settings
        ``token_every``, ``token_fraction``, ``temperature``, ``rank`` as in
        :class:`wapo_analysis.record.recorder.Recorder`.

    Raises
    ------
    UserError
        On numbers out of range or a folder that cannot be used. Later failures never raise: they
        are logged once, ``failure`` says what happened, and training goes on.

    Examples
    --------
    >>> import tempfile
    >>> logits = torch.randn(2, 3, 5, requires_grad=True)
    >>> tokens, mask = torch.randint(5, (2, 3)), torch.ones(2, 3)
    >>> advantages, groups = torch.tensor([0.5, -0.5]), torch.tensor([0, 0])
    >>> logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    >>> with tempfile.TemporaryDirectory() as folder, Recorder(folder) as recorder:
    ...     recorder.watch_batch(logp, tokens, mask, advantages, groups, logits=logits)
    ...     (-(logp * advantages[:, None]).mean()).backward()
    ...     recorder.finish_step(1, reward=[1.0, 0.0])
    """

    def __init__(
        self, path: str | Path, manifest: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        settings.setdefault("rescore_every", 0)  # a loop is not asked to score again
        name = Path(path).name
        described = Manifest.begun("loop", ("torch",), name=name, label=name)
        super().__init__(path, described.changed(manifest or {}), **settings)
        self._batches: list[BatchPass] = []
        self._numbered = 0
        self._warned = False
        self._since, self._captured = perf_counter(), 0.0

    @core.guarded
    def watch_batch(
        self,
        logp: Tensor,
        tokens: Tensor | None,
        mask: Tensor,
        advantages: Tensor,
        groups: Tensor | None,
        *,
        logits: Tensor | None = None,
        logp_old: Tensor | None = None,
        entropy: Tensor | None = None,
        collision: Tensor | None = None,
        rollouts: Tensor | None = None,
        kept: Tensor | None = None,
        clip: tuple[float, float] | None = None,
        minibatch: int | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Watch one gradient pass; call it after the forward and before the backward pass.

        Parameters
        ----------
        logp : Tensor, shape (B, T)
            Log-probability of each sampled token in nats: the very tensor the loss is made of.
            The gradient that reaches it is recorded: exactly -coef, whatever the loss is.
        tokens : Tensor of int64, shape (B, T)
            Sampled tokens; None if the source does not know them.
        mask : Tensor, shape (B, T)
            Non-zero on completion tokens.
        advantages : Tensor, shape (B,) or (B, T)
        groups : Tensor of int64, shape (B,)
            Prompt of each rollout within the step; None if unknown.
        logits : Tensor, shape (B, T, V), optional
            Logits that predict each token, before the division by temperature. They give
            entropy, class and predicted changes; only read, block by block, nothing is kept.
        logp_old : Tensor, shape (B, T), optional
            Log-probabilities under the behaviour policy.
        entropy, collision : Tensor, shape (B, T), optional
            Entropy in nats and sum of p_v^2, where they are known and logits are not. A
            collision of single precision loses the class of tokens within 1e-4 of certainty.
        rollouts : Tensor of int64, shape (B,), optional
            Number of each rollout within the step. By default they are counted up, which is right
            while every rollout is passed once a step; with epochs, give them.
        kept : Tensor of bool, shape (B, T), optional
            Tokens that take part in the loss; by default the gradient tells.
        clip : tuple of float, optional
            Bounds of the ratio, e.g. ``(0.8, 1.2)``: sharpens the clip flag, see
            :meth:`wapo_analysis.capture.loop_passes.BatchPass.read_gradient`.
        minibatch : int, optional
            Gradient pass within the step; by default each call is the next.
        loss_scale : float
            What the loss is multiplied by before backward (``GradScaler.get_scale()``).
        """
        if not loss_scale > 0:
            raise UserError(f"loss_scale must be positive, got {loss_scale}")
        if rollouts is None:
            rollouts = torch.arange(len(logp), device=logp.device) + self._numbered
        batch = batch_pass(
            logp,
            tokens,
            mask,
            advantages,
            groups,
            rollouts=rollouts.detach().to(logp.device),
            temperature=self.temperature,
            minibatch=len(self._batches) if minibatch is None else minibatch,
            logits=logits,
            entropy=entropy,
            collision=collision,
            logp_old=logp_old,
            kept=kept,
            clip=clip,
        )
        if logp.requires_grad:
            logp.register_hook(lambda gradient: self._read(batch, gradient, loss_scale))
        self._numbered += len(logp)
        self._batches.append(batch)
        self._passes.append(batch.tokens)

    @core.guarded
    def _read(self, batch: BatchPass, gradient: Tensor, loss_scale: float) -> None:
        batch.read_gradient(gradient, loss_scale)

    @core.guarded
    def finish_step(
        self,
        step: int,
        *,
        reward: Tensor | Sequence[float] | float | None = None,
        texts: Callable[[list[int]], list[str]] | None = None,
        prompts: Sequence[str] | None = None,
        completions: Sequence[str] | None = None,
        **columns: float,
    ) -> None:
        """Finish a step; call it after the last optimizer step on a batch of rollouts.

        Parameters
        ----------
        step : int
            Step number, from 1, counting up.
        reward : Tensor or sequence of R numbers, or one number
            Reward of each rollout in the order of their numbers, or only their mean.
        texts : callable, optional
            Token ids to their texts, e.g. ``tokenizer.batch_decode``.
        prompts, completions : sequence of R str, optional
            Texts of the rollouts.
        **columns : float
            Further columns of the ``steps`` table (``loss``, ``grad_norm``, ``lr``, ...).
        """
        batches, self._batches, self._numbered = self._batches, [], 0
        if any(b.needs_grad and b.tokens.coef is None for b in batches):
            self._warn_once()
        rollouts = rollout_table(batches)
        written = rollout_sums({"length": rollouts["length"]} if rollouts else {})
        row: dict[str, float] = {"step": int(step), **step_columns(written)}
        if reward is not None and np.ndim(_numbers(reward)) == 0:
            row["reward"] = float(_numbers(reward))
            rollouts = {}
        elif reward is not None:
            given = {"reward": _numbers(reward), "prompt": prompts, "completion": completions}
            rollouts |= {name: list(v) for name, v in given.items() if v is not None and rollouts}
            _check_counts(rollouts)
            row |= reward_columns(_numbers(reward), rollouts.get("group"))
        own = {name: _plain(value) for name, value in columns.items()}
        known = given_in_all(self._passes)
        self._end_step(
            row | self._seconds() | own,
            rollouts if "reward" in rollouts else {},
            texts,
            lambda rows: step_columns({**token_sums(rows.columns, known), **written}) | own,
        )

    def _seconds(self) -> dict[str, float]:
        """Wall time of the step and what recording took of it."""
        now = perf_counter()
        row = {"seconds": now - self._since, "seconds_capture": self.seconds - self._captured}
        self._since, self._captured = now, self.seconds
        return row

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "no gradient reached the logp given to watch_batch: give the very tensor the loss "
                "is computed from; coef is recorded as missing"
            )

    @property
    def watching(self) -> bool:
        """Whether a gradient pass was watched since the last finished step."""
        return bool(self._batches)

    def close(self, status: str = "finished") -> None:
        """End the run; a step that was not finished is dropped."""
        super().close(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")


def _numbers(values: Tensor | Sequence[float] | float) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(values, Tensor):
        return values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _check_counts(rollouts: Mapping[str, Any]) -> None:
    """Per-rollout values must be as many as the rollouts that were watched."""
    for name, values in rollouts.items():
        if len(values) != len(rollouts["rollout"]):
            raise UserError(
                f"{name} has {len(values)} values, but {len(rollouts['rollout'])} rollouts were "
                "watched; where a step passes a rollout more than once, give rollouts to "
                "watch_batch"
            )
