"""What is kept of a step: its columns, copies of them for other tools, and probed updates.

The run folder stays the truth. A logger or a probe that fails is switched off with one warning;
training goes on.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from wapo_analysis.derive import step_columns, token_sums
from wapo_analysis.errors import UserError
from wapo_analysis.probes.measure import (
    Scorable,
    Update,
    clip_factor,
    select_tokens,
    spread,
    take_apart,
)
from wapo_analysis.probes.split import Before
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.stats import TokenStats
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.rollout import Rollouts

log = logging.getLogger(__name__)

_PROJECT = "wapo-analysis"
_WANDB_ID = "wandb-id"


class Sink(Protocol):
    """Where scalars go."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Take the scalars of a step."""

    def close(self, status: str) -> None:
        """Flush and end."""


class Loggers:
    """The loggers of a run; none is a valid number of them.

    Parameters
    ----------
    sinks : mapping of str to Sink
        By the name a warning uses.
    """

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def log(self, row: Mapping[str, float]) -> None:
        """Copy a row of the step table; numbers that are not finite are left out."""
        step = int(row["step"])
        scalars = {
            _tag(name): float(value)
            for name, value in row.items()
            if name != "step" and math.isfinite(value)
        }
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(scalars, step)
            except Exception as error:
                self._drop(name, error)

    def close(self, status: str) -> None:
        """End every logger; ``status`` is the run's."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.close(status)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        del self._sinks[name]
        log.warning("logging to %s stopped (%s: %s)", name, type(error).__name__, error)


def check_loggers(kind: str) -> None:
    """Check that the packages of the loggers are installed.

    Raises
    ------
    UserError
        If one is not.
    """
    for package in _wanted(kind):
        if find_spec(package) is None:
            raise UserError(
                f"log_to {kind} needs {package}, which is not installed: "
                f'pip install "wapo-analysis[{package}]"'
            )


def open_loggers(
    kind: str, run: Path | None, config: TrainConfig, after: int | None = None
) -> Loggers:
    """Open the loggers of a run; one that cannot be opened is left out with a warning.

    Parameters
    ----------
    kind : {"none", "tensorboard", "wandb", "both"}
    run : Path, optional
        Run folder; without one nothing is logged.
    config : TrainConfig
        Settings, given to W&B as its config.
    after : int, optional
        The run is continued after this step; what was logged of later ones is replaced.
    """
    sinks: dict[str, Sink] = {}
    for name in _wanted(kind) if run is not None else ():
        assert run is not None
        try:
            sinks[name] = _OPENED[name](run, config, after)
        except Exception as error:
            log.warning("cannot log to %s (%s: %s)", name, type(error).__name__, error)
    return Loggers(sinks)


def _wanted(kind: str) -> tuple[str, ...]:
    return {"none": (), "both": ("tensorboard", "wandb")}.get(kind, (kind,))


def _tag(column: str) -> str:
    """Name of a column in a logger: grouped by what it is about."""
    if "/" in column:
        return column
    return f"seconds/{column}" if column.startswith("seconds") else f"train/{column}"


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: TrainConfig, after: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if after is None else after + 1
        self._writer = SummaryWriter(run / "tensorboard", purge_step=purge)
        if after is None:
            settings = "\n".join(f"    {k} = {v!r}" for k, v in config.to_dict().items())
            self._writer.add_text("settings", settings)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; its own variables (WANDB_MODE, WANDB_PROJECT ...) decide where."""

    def __init__(self, run: Path, config: TrainConfig, after: int | None) -> None:
        import wandb

        held = run / _WANDB_ID
        known = held.read_text().strip() if after is not None and held.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=f"{config.shown_label} seed {config.seed}",
            group=config.shown_label,
            dir=run,
            config=config.to_dict(),
            id=known,
            resume="allow" if known else None,
        )
        held.write_text(f"{self._run.id}\n")

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("finished", "interrupted") else 1)


_OPENED: Mapping[str, Callable[[Path, TrainConfig, int | None], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}


class StepTally:
    """Sums of one step; each token counts once per gradient pass that saw it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._loss: Tensor | float = 0.0
        self._norms: list[float] = []

    def add_tokens(self, tokens: TokenPass, ratio: Tensor, loss: Tensor) -> None:
        """Add the tokens of one micro-batch, their ratio in the loss, shape (N,), and its loss."""
        sums = token_sums({**tokens.given(), "ratio": ratio})
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()}
        self._loss = self._loss + loss.detach().double()  # nobody waits for it

    def add_update(self, grad_norm: float) -> None:
        """Add one optimizer update with its gradient norm before clipping."""
        self._norms.append(grad_norm)

    def columns(self, rollouts: Mapping[str, float]) -> dict[str, float]:
        """Columns of the steps table; what no token was seen for is left out.

        Parameters
        ----------
        rollouts : mapping of str to float
            Sums over the rollouts, of `wapo_analysis.derive.rollout_sums`.
        """
        own = [torch.as_tensor(self._loss), *self._sums.values()]
        loss, *summed = torch.stack([value.double() for value in own]).tolist()
        sums = dict(zip(self._sums, summed, strict=True))
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        return {
            "loss": loss,
            "grad_norm": sum(finite) / len(finite) if finite else math.nan,
            **step_columns({**sums, **rollouts}),
            "skipped_updates": len(self._norms) - len(finite),
            "updates": len(self._norms),
        }


Statistics = Callable[[Rollouts, bool], TokenStats]
Watched = Sequence[tuple[TokenPass, Rollouts]]


class NullProbe:
    """An update that is not probed."""

    def finish(self, watched: Watched, grad_norm: float) -> None:
        """Decompose the update after the optimizer has stepped."""


@dataclass
class Prober:
    """Decides which updates are probed and how.

    Parameters
    ----------
    parameters : list of Tensor
        What the optimizer moves.
    optimizer : AdamW or SGD
    config : TrainConfig
    statistics : callable
        Rollouts to the statistics of their tokens, with or without a graph.

    Attributes
    ----------
    other : Rollouts or None
        Rollouts of the step before; their tokens show what a step does to text it was not made of.
    seconds : float
        Time spent so far.
    failed : bool
        A probe failed, so no more are made.
    """

    parameters: list[Tensor]
    optimizer: Optimizer
    config: TrainConfig
    statistics: Statistics
    other: Rollouts | None = None
    seconds: float = 0.0
    failed: bool = False

    def start(self, step: int, minibatch: int, recorder: Recorder) -> NullProbe:
        """Probe of an update that is about to be made; a null one off schedule.

        One update of a probed step is decomposed; which one moves on from probe to probe, so that
        late mini-batches with their clipped tokens are seen as well.
        """
        updates = self.config.epochs * self.config.minibatches
        if self.failed or not recorder.wants_probe(step):
            return NullProbe()
        if minibatch != (step // self.config.probe_every - 1) % updates:
            return NullProbe()
        try:
            return UpdateProbe(self, recorder, step, minibatch)
        except Exception as error:  # no memory for the copies, say
            self.stop(error)
            return NullProbe()

    def stop(self, error: Exception) -> None:
        """Probe no more, with one warning; training goes on."""
        self.failed = True
        log.warning("probing stopped (%s: %s); training goes on", type(error).__name__, error)


class UpdateProbe(NullProbe):
    """The probe of one update; made before the optimizer steps, finished after.

    Parameters
    ----------
    prober : Prober
    recorder : Recorder
        Gets the rows.
    step, minibatch : int
        Which update.
    """

    def __init__(self, prober: Prober, recorder: Recorder, step: int, minibatch: int) -> None:
        self._prober, self._recorder = prober, recorder
        self._step, self._minibatch = step, minibatch
        self._before = Before.of(prober.parameters, prober.optimizer)

    def finish(self, watched: Watched, grad_norm: float) -> None:
        """Decompose the update; a failure stops probing, never the training.

        Parameters
        ----------
        watched : sequence of (TokenPass, Rollouts)
            Micro-batches of the update, with the gradient that reached each token.
        grad_norm : float
            Norm of the gradient before clipping.
        """
        started = perf_counter()
        prober = self._prober
        update = Update(
            step=self._step,
            minibatch=self._minibatch,
            parameters=prober.parameters,
            optimizer=prober.optimizer,
            before=self._before,
            passes=[self._scorable(rollouts, tokens) for tokens, rollouts in watched],
            clip=clip_factor(grad_norm, prober.config.max_grad_norm),
            temperature=prober.config.temperature,
        )
        try:
            rows = take_apart(update, self._scored(watched))
            if rows is not None:
                self._recorder.add_probe(rows)
        except Exception as error:
            prober.stop(error)
        finally:
            prober.seconds += perf_counter() - started

    def _scored(self, watched: Watched) -> list[Scorable]:
        """Rollouts to score: some of the update's own, as many of the step before."""
        limit, other = self._prober.config.probe_rows, self._prober.other
        scored = [self._scorable(rows, tokens) for tokens, rows in _some_rollouts(watched, limit)]
        if other is not None:
            most = sum(len(rollouts.mask) for _, rollouts in watched)
            rows = spread(len(other.mask), min(limit or most, most))
            scored.append(self._scorable(other.rows(torch.tensor(rows, device=other.mask.device))))
        return scored

    def _scorable(self, rollouts: Rollouts, tokens: TokenPass | None = None) -> Scorable:
        return Scorable(partial(self._score, rollouts), tokens)

    def _score(self, rollouts: Rollouts, grad: bool) -> tuple[Tensor, Tensor]:
        stats = self._prober.statistics(rollouts, grad)
        return stats.logp, stats.entropy


def _some_rollouts(watched: Watched, limit: int | None) -> list[tuple[TokenPass, Rollouts]]:
    """At most ``limit`` evenly spaced rollouts of the mini-batch, with their tokens."""
    count = sum(len(rollouts.mask) for _, rollouts in watched)
    picked = set(spread(count, limit))
    some, first = [], 0
    for tokens, rollouts in watched:
        here = [row for row in range(len(rollouts.mask)) if first + row in picked]
        first += len(rollouts.mask)
        if here:
            rows = torch.tensor(here, device=rollouts.mask.device)
            of_token = rollouts.mask.nonzero(as_tuple=True)[0]
            some.append((select_tokens(tokens, torch.isin(of_token, rows)), rollouts.rows(rows)))
    return some
