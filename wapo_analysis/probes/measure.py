"""Decomposing one optimizer update: what does each part do to the tokens when applied alone.

To be called after the optimizer has stepped. The old weights are put back, the step is split, a few
tokens are scored after each part of it, and the new weights are put back bit by bit. Gradients,
optimizer state and random numbers are not touched.

Memory: beside the model, copies of the weights (2), of the first moment (1), of the class gradients
(4) and of the parts (8), so about fifteen times the trained parameters while a probe lasts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import wapo_taxonomy as tax
from torch import Tensor
from torch.optim import Optimizer

from wapo_analysis.probes.rows import Change, PartSize, ProbedTokens, probe_rows
from wapo_analysis.probes.split import (
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
from wapo_analysis.record.recorder import TokenPass
from wapo_analysis.schema import GRADIENT, OTHER_TOKENS, UPDATE
from wapo_analysis.table import Array, Records

#: ``score(grad)`` -> log-probability and entropy (nats) of N tokens under the present weights.
Score = Callable[[bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scorable:
    """Tokens that can be scored again.

    ``score``: see `Score`; logp carries gradient if asked to; ``tokens``: the same N tokens as the
    update saw them, with ``coef``; None for tokens that have no part in the update.
    """

    score: Score
    tokens: TokenPass | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update that was made.

    Attributes
    ----------
    step, minibatch : int
        Which.
    parameters : list of Tensor
        What the optimizer moves; ``grad`` is None where it did not.
    optimizer : AdamW or SGD
        After its step.
    before : Before
        Copies taken before its step.
    passes : sequence of Scorable
        All tokens of the update: their gradients add up to that of the step.
    clip : float
        Factor by which the gradient norm was clipped.
    temperature : float
        Softmax temperature.
    """

    step: int
    minibatch: int
    parameters: Tensors
    optimizer: Optimizer
    before: Before
    passes: Sequence[Scorable]
    clip: float
    temperature: float


def clip_factor(grad_norm: float, limit: float | None) -> float:
    """Factor of torch's ``clip_grad_norm_``, which adds the same 1e-6; 1 without a limit."""
    return min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0


def take_apart(update: Update, scored: Sequence[Scorable]) -> Records | None:
    """Split an update and measure what each part does alone.

    Returns rows of the probes table; None if no token of the update had a gradient. ``update``: the
    update; ``scored``: tokens to score, of the update and others.
    """
    if all(part.tokens is None or part.tokens.coef is None for part in update.passes):
        return None
    after = [p.detach().clone() for p in update.parameters]
    try:
        return _rows(update, scored, after)
    finally:
        put(update.parameters, after)


def _rows(update: Update, scored: Sequence[Scorable], after: Tensors) -> Records:
    parameters, before = update.parameters, update.before
    put(parameters, before.weights)
    gradients = _gradients(update)
    parts = split_step(parameters, update.optimizer, before, gradients, update.clip)
    parts = with_sums(parts, before, after)
    start = _scores(scored)

    def change(move: Tensors) -> Change:
        put(parameters, (old + part for old, part in zip(before.weights, move, strict=True)))
        now = _scores(scored)
        logp, entropy = (_joined(a) - _joined(b) for a, b in zip(now, start, strict=True))
        return Change(logp, entropy)

    return probe_rows(
        update.step,
        update.minibatch,
        _probed(scored, start, update.temperature),
        {code: change(part) for code, part in parts.items()},
        change([move / 2 for move in parts[UPDATE]]),
        _sizes(parts, gradients),
        left_over(parts),
    )


def _gradients(update: Update) -> list[Tensors]:
    """Gradient of each class over the whole update, pass by pass."""
    classes = len(tax.CLASSES)
    total = [[torch.zeros_like(p) for p in update.parameters] for _ in range(classes)]
    for part in update.passes:
        if part.tokens is None or part.tokens.coef is None:
            continue
        logp, _ = part.score(True)
        codes = class_codes(part.tokens)
        found = class_gradients(logp, part.tokens.coef, codes, update.parameters, classes)
        for into, add in zip(total, found, strict=True):
            torch._foreach_add_(into, add)
    return total


def class_codes(tokens: TokenPass) -> Tensor:
    """Class code of each token of a pass, shape (N,); unknown where a statistic is missing."""
    if tokens.collision_rest is None:
        return torch.full_like(tokens.token_id, tax.CLASS_CODES[tax.UNKNOWN])
    prob, complement = tokens.logp.exp(), -torch.expm1(tokens.logp)
    codes: Tensor = tax.class_code(tokens.advantage, prob, complement, tokens.collision_rest)
    return codes


def select_tokens(tokens: TokenPass, keep: Tensor) -> TokenPass:
    """Rows of a pass under a mask of shape (N,)."""
    kept: dict[str, Any] = {n: v[keep] for n, v in vars(tokens).items() if isinstance(v, Tensor)}
    return replace(tokens, **kept)


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` evenly spaced places among ``count``."""
    if limit is None or limit >= count:
        return list(range(count))
    return [place * count // limit for place in range(limit)]


def _scores(scored: Sequence[Scorable]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of each set of tokens now, nats."""
    pairs = [part.score(False) for part in scored]
    return [logp for logp, _ in pairs], [entropy for _, entropy in pairs]


def _joined(values: Sequence[Tensor]) -> Array:
    return torch.cat([v.detach().double() for v in values]).cpu().numpy()


def _probed(
    scored: Sequence[Scorable], start: tuple[list[Tensor], list[Tensor]], temperature: float
) -> ProbedTokens:
    """Statistics of the scored tokens before the update; the others push nothing and need none."""
    logps, entropies = start
    pairs = zip(scored, logps, strict=True)
    columns = zip(*(_statistics(part.tokens, logp) for part, logp in pairs), strict=True)
    cls, coef, rest, logp_rest = (_joined(same) for same in columns)
    return ProbedTokens(
        cls=cls.astype(np.int64),
        coef=coef,
        logp=_joined(logps),
        entropy=_joined(entropies),
        collision_rest=rest,
        collision_logp_rest=logp_rest,
        temperature=temperature,
    )


def _statistics(tokens: TokenPass | None, logp: Tensor) -> tuple[Tensor, ...]:
    """Class code, coef and the two collision sums of N tokens; what is missing is NaN."""
    zero, missing = torch.zeros_like(logp), torch.full_like(logp, torch.nan)
    if tokens is None:
        return zero + OTHER_TOKENS, zero, zero, zero
    rest, logp_rest = tokens.collision_rest, tokens.collision_logp_rest
    return (
        class_codes(tokens),
        zero if tokens.coef is None else tokens.coef,
        missing if rest is None else rest,
        missing if logp_rest is None else logp_rest,
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
