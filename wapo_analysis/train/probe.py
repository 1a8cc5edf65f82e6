"""Probing one update of the trainer: what each class's share of the step does when applied alone.

The probe runs after the optimizer has stepped. It puts the old weights back, splits the step,
scores a few rollouts after each part of it, and puts the new weights back bit by bit. Gradients,
optimizer state and random numbers are not touched.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
import wapo_taxonomy as tax
from torch import Tensor
from torch.optim import Optimizer

from wapo_analysis.capture.recorder import NullRecorder, TokenPass
from wapo_analysis.capture.step_parts import (
    Before,
    Tensors,
    class_gradients,
    dot,
    left_over,
    norm,
    put,
    split_step,
    with_sums,
)
from wapo_analysis.probes.rows import Change, PartSize, ProbedTokens, probe_rows
from wapo_analysis.schema import GRADIENT, OTHER_TOKENS, UPDATE
from wapo_analysis.stats import TokenStats
from wapo_analysis.table import Array, Records
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.rollout import Rollouts

log = logging.getLogger(__name__)

Score = Callable[[Rollouts, bool], TokenStats]
Watched = Sequence[tuple[TokenPass, Rollouts]]
Scored = Sequence[tuple[TokenPass | None, Rollouts]]


class NullProbe:
    """An update that is not probed."""

    def finish(self, watched: Watched, grad_norm: float) -> None:
        """Take the update apart after the optimizer has stepped."""


@dataclass
class Prober:
    """Decides which updates are probed and how.

    Parameters
    ----------
    parameters : list of Tensor
        What the optimizer moves.
    optimizer : AdamW or SGD
    config : TrainConfig
    score : callable
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

    parameters: Tensors
    optimizer: Optimizer
    config: TrainConfig
    score: Score
    other: Rollouts | None = None
    seconds: float = 0.0
    failed: bool = False

    def start(self, step: int, minibatch: int, recorder: NullRecorder) -> NullProbe:
        """Probe of an update that is about to be made; a null one off schedule.

        One update of a probed step is taken apart; which one moves on from probe to probe, so that
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
    recorder : NullRecorder
        Gets the rows.
    step, minibatch : int
        Which update.
    """

    def __init__(self, prober: Prober, recorder: NullRecorder, step: int, minibatch: int) -> None:
        self._prober, self._recorder = prober, recorder
        self._step, self._minibatch = step, minibatch
        self._before = Before.of(prober.parameters, prober.optimizer)

    def finish(self, watched: Watched, grad_norm: float) -> None:
        """Take the update apart; a failure stops probing, never the training.

        Parameters
        ----------
        watched : sequence of (TokenPass, Rollouts)
            Micro-batches of the update, with the gradient that reached each token.
        grad_norm : float
            Norm of the gradient before clipping.
        """
        started = perf_counter()
        after = [p.detach().clone() for p in self._prober.parameters]
        try:
            if any(tokens.coef is not None for tokens, _ in watched):
                self._recorder.add_probe(self._rows(watched, grad_norm, after))
        except Exception as error:
            self._prober.stop(error)
        finally:
            put(self._prober.parameters, after)
            self._prober.seconds += perf_counter() - started

    def _rows(self, watched: Watched, grad_norm: float, after: Tensors) -> Records:
        prober, before = self._prober, self._before
        put(prober.parameters, before.weights)
        gradients = self._class_gradients(watched)
        limit = prober.config.max_grad_norm
        # The factor of torch's clip_grad_norm_, which adds the same 1e-6.
        clip = min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0
        parts = split_step(prober.parameters, prober.optimizer, before, gradients, clip)
        parts = with_sums(parts, before, after)
        chosen = self._chosen(watched)
        start = self._statistics(chosen)
        changes = {code: self._change(chosen, start, part) for code, part in parts.items()}
        return probe_rows(
            self._step,
            self._minibatch,
            _probed_tokens(chosen, start, prober.config.temperature),
            changes,
            self._change(chosen, start, [step / 2 for step in parts[UPDATE]]),
            _sizes(parts, gradients),
            left_over(parts),
        )

    def _chosen(self, watched: Watched) -> Scored:
        """Rollouts to score: some of the update's own, as many of the step before."""
        limit, other = self._prober.config.probe_rows, self._prober.other
        chosen: list[tuple[TokenPass | None, Rollouts]] = [*_some_rollouts(watched, limit)]
        if other is not None:
            most = sum(len(rollouts.mask) for _, rollouts in watched)
            rows = _spread(len(other.mask), min(limit or most, most))
            chosen.append((None, other.rows(torch.tensor(rows, device=other.mask.device))))
        return chosen

    def _class_gradients(self, watched: Watched) -> list[Tensors]:
        """Gradient of each class over the whole mini-batch, micro-batch by micro-batch."""
        parameters, count = self._prober.parameters, len(tax.CLASSES)
        total = [[torch.zeros_like(p) for p in parameters] for _ in range(count)]
        for tokens, rollouts in watched:
            if tokens.coef is None:
                continue
            logp = self._prober.score(rollouts, True).logp
            found = class_gradients(logp, tokens.coef, _classes(tokens), parameters, count)
            for into, add in zip(total, found, strict=True):
                torch._foreach_add_(into, add)
        return total

    def _statistics(self, chosen: Scored) -> list[TokenStats]:
        return [self._prober.score(rollouts, False) for _, rollouts in chosen]

    def _change(self, chosen: Scored, start: Sequence[TokenStats], step: Tensors) -> Change:
        """What a step away from the old weights does to the tokens."""
        weights = zip(self._before.weights, step, strict=True)
        put(self._prober.parameters, (old + move for old, move in weights))
        now = self._statistics(chosen)
        return Change(
            _joined([n.logp for n in now]) - _joined([s.logp for s in start]),
            _joined([n.entropy for n in now]) - _joined([s.entropy for s in start]),
        )


def _spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` evenly spaced places among ``count``."""
    if limit is None or limit >= count:
        return list(range(count))
    return [place * count // limit for place in range(limit)]


def _some_rollouts(watched: Watched, limit: int | None) -> list[tuple[TokenPass, Rollouts]]:
    """At most ``limit`` evenly spaced rollouts of the mini-batch, with their tokens."""
    count = sum(len(rollouts.mask) for _, rollouts in watched)
    picked = set(_spread(count, limit))
    some, first = [], 0
    for tokens, rollouts in watched:
        here = [row for row in range(len(rollouts.mask)) if first + row in picked]
        first += len(rollouts.mask)
        if here:
            rows = torch.tensor(here, device=rollouts.mask.device)
            of_token = rollouts.mask.nonzero(as_tuple=True)[0]
            some.append((_select(tokens, torch.isin(of_token, rows)), rollouts.rows(rows)))
    return some


def _select(tokens: TokenPass, keep: Tensor) -> TokenPass:
    kept: dict[str, Any] = {n: v[keep] for n, v in vars(tokens).items() if isinstance(v, Tensor)}
    return replace(tokens, **kept)


def _classes(tokens: TokenPass) -> Tensor:
    """Class code of each token, shape (N,)."""
    assert tokens.collision_rest is not None
    prob, complement = tokens.logp.exp(), -torch.expm1(tokens.logp)
    code: Tensor = tax.class_code(tokens.advantage, prob, complement, tokens.collision_rest)
    return code


def _joined(values: Sequence[Tensor]) -> Array:
    return torch.cat([v.detach().double() for v in values]).cpu().numpy()


def _probed_tokens(chosen: Scored, start: Sequence[TokenStats], temperature: float) -> ProbedTokens:
    cls, coef = [], []
    for (tokens, _), stats in zip(chosen, start, strict=True):
        if tokens is None:
            cls.append(torch.full_like(stats.logp, OTHER_TOKENS))
        else:
            cls.append(_classes(tokens))
        given = None if tokens is None else tokens.coef
        coef.append(torch.zeros_like(stats.logp) if given is None else given)
    return ProbedTokens(
        cls=_joined(cls).astype(int),
        coef=_joined(coef),
        logp=_joined([s.logp for s in start]),
        entropy=_joined([s.entropy for s in start]),
        collision_rest=_joined([s.collision_rest for s in start]),
        collision_logp_rest=_joined([s.collision_logp_rest for s in start]),
        temperature=temperature,
    )


def _sizes(parts: dict[int, Tensors], gradients: list[Tensors]) -> dict[int, PartSize]:
    """Sizes of all parts; only sums of class gradients have a gradient of their own."""
    whole = [torch.stack(same).sum(0) for same in zip(*gradients, strict=True)]
    own = {**dict(enumerate(gradients)), GRADIENT: whole}
    none = (float("nan"),) * len(gradients)
    return {
        code: PartSize(
            grad_norm=norm(own[code]) if code in own else float("nan"),
            step_norm=norm(part),
            dots=tuple(dot(own[code], g) for g in gradients) if code in own else none,
        )
        for code, part in parts.items()
    }
