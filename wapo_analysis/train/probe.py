"""Probes in the built-in trainer: which updates are decomposed, and on which tokens."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from torch.optim import Optimizer

from wapo_analysis.probes.measure import (
    Before,
    Scorable,
    Update,
    clip_factor,
    select_tokens,
    spread,
    take_apart,
)
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.stats import TokenStats
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.rollout import Rollouts

log = logging.getLogger(__name__)

Statistics = Callable[[Rollouts, bool], TokenStats]
Watched = Sequence[tuple[TokenPass, Rollouts]]


class NullProbe:
    """An update that is not probed."""

    def finish(self, watched: Watched, grad_norm: float) -> None:
        """Decompose the update after the optimizer has stepped."""


@dataclass
class Prober:
    """Decides which updates are probed and how.

    ``parameters``: what the optimizer moves; ``statistics``: rollouts to the statistics of their
    tokens, with or without a graph.
    """

    parameters: list[Tensor]
    optimizer: Optimizer
    config: TrainConfig
    statistics: Statistics
    #: Rollouts of the step before; their tokens show what a step does to text it was not made of.
    other: Rollouts | None = None
    #: Time spent so far.
    seconds: float = 0.0
    #: A probe failed, so no more are made.
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

    ``recorder``: gets the rows; ``step``, ``minibatch``: which update.
    """

    def __init__(self, prober: Prober, recorder: Recorder, step: int, minibatch: int) -> None:
        self._prober, self._recorder = prober, recorder
        self._step, self._minibatch = step, minibatch
        self._before = Before.of(prober.parameters, prober.optimizer)

    def finish(self, watched: Watched, grad_norm: float) -> None:
        """Decompose the update; a failure stops probing, never the training.

        ``watched``: micro-batches of the update, with the gradient that reached each token;
        ``grad_norm``: norm of the gradient before clipping.
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
