"""Decomposing one optimizer update: its step split into parts, and what each does applied alone.

To be called after the optimizer has stepped. The old weights are put back, the step is split, a few
tokens are scored after each part of it, and the new weights are put back bit by bit. Gradients,
optimizer state and random numbers are not touched. While a probe lasts it holds about fifteen times
the trained parameters: copies of weights, first moment, class gradients (4) and parts (8).

Both optimizers are linear in the gradient once the second moment of the real step is held fixed.
With clip factor k, class gradients g_c, bias corrections b1' = 1 - beta1^t, b2' = 1 - beta2^t and
D = sqrt(v_t / b2') + eps, v_t being the second moment after the real step,

    AdamW   dw = sum_c -lr (1 - beta1) k g_c / (b1' D)  -  lr beta1 m_(t-1) / (b1' D)  -  lr wd w
    SGD     dw = sum_c -lr k g_c  -  lr wd w
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import wapo_taxonomy as tax
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from wapo_analysis.errors import UserError
from wapo_analysis.probes.rows import Change, PartSize, ProbedTokens, probe_rows
from wapo_analysis.record.recorder import TokenPass
from wapo_analysis.schema import GRADIENT, MOMENTUM, OTHER_TOKENS, UPDATE, WEIGHT_DECAY
from wapo_analysis.table import Array, Records

Tensors = list[Tensor]


@dataclass(frozen=True)
class Before:
    """Copies of what the optimizer step will change.

    ``momentum`` is the first moment m_(t-1) of AdamW; zeros where there is none yet.
    """

    weights: Tensors
    momentum: Tensors

    @classmethod
    def of(cls, parameters: Sequence[Tensor], optimizer: Optimizer) -> "Before":
        """Copy weights and first moments. Raises UserError if the step cannot be split."""
        check_splits(optimizer)
        moments = (optimizer.state[p].get("exp_avg") for p in parameters)
        return cls(
            [p.detach().clone() for p in parameters],
            [
                torch.zeros_like(p) if m is None else m.clone()
                for p, m in zip(parameters, moments, strict=True)
            ],
        )


def check_splits(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step is no sum of known parts.

    Raises UserError if it is neither AdamW (without amsgrad or maximize) nor SGD without momentum.
    """
    odd = [
        name
        for group in optimizer.param_groups
        for name in ("amsgrad", "maximize", "momentum")
        if group.get(name)
    ]
    if not isinstance(optimizer, AdamW | SGD) or odd:
        raise UserError(
            f"a step of {type(optimizer).__name__} with these options cannot be split by class; "
            "allowed: AdamW without amsgrad or maximize, SGD without momentum"
        )


def put(parameters: Sequence[Tensor], values: Iterable[Tensor]) -> None:
    """Copy values into the parameters, bit by bit."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def class_gradients(
    logp: Tensor, coef: Tensor, cls: Tensor, parameters: Sequence[Tensor], classes: int
) -> list[Tensors]:
    """Gradient of the loss that the tokens of each class supply.

    Equals, class by class, ``grad(-(coef * (cls == c) * logp).sum(), parameters)``: the loss
    depends on the parameters through logp alone and ``coef`` is -dL/dlogp, so the class gradients
    add up to the training gradient. Returns one gradient per class and parameter; zeros for a class
    without gradient.

    Parameters
    ----------
    logp : Tensor, shape (N,), on the autograd graph
        Log-probabilities of the sampled tokens; the graph is used up.
    coef : Tensor, shape (N,)
        -dL/dlogp of each token.
    cls : Tensor of int, shape (N,)
        Class code of each token.
    classes : int
        Number of classes; codes 0..classes-1.
    """
    weights = [torch.where(cls == code, -coef, 0.0).to(logp.dtype) for code in range(classes)]
    present = torch.stack([weight.any() for weight in weights]).tolist()
    filled = [code for code, some in enumerate(present) if some]
    gradients = [[torch.zeros_like(p) for p in parameters] for _ in range(classes)]
    for code in filled:
        found = torch.autograd.grad(
            logp,
            parameters,
            grad_outputs=weights[code],
            retain_graph=code != filled[-1],
            allow_unused=True,
        )
        for into, gradient in zip(gradients[code], found, strict=True):
            if gradient is not None:
                into.copy_(gradient)
    return gradients


def split_step(
    parameters: Sequence[Tensor],
    optimizer: Optimizer,
    before: Before,
    gradients: Sequence[Tensors],
    clip: float,
) -> dict[int, Tensors]:
    """Parts of the step the optimizer has just taken, see the head of this module.

    Returns class codes, ``MOMENTUM`` and ``WEIGHT_DECAY``; parameters the optimizer left alone have
    zero parts.

    Parameters
    ----------
    parameters : sequence of Tensor
        In the order of ``before``.
    optimizer : AdamW or SGD
        Its state is that after the step.
    before : Before
        Copies taken before the step.
    gradients : sequence of list of Tensor
        Class gradients before clipping.
    clip : float
        Factor by which the gradient norm was clipped.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    taken = _steps_taken(parameters, optimizer)
    codes = range(len(gradients))
    parts: dict[int, Tensors] = {code: [] for code in (*codes, MOMENTUM, WEIGHT_DECAY)}
    for number, parameter in enumerate(parameters):
        moved = parameter.grad is not None
        group: dict[str, Any] = groups[id(parameter)]
        gain, carry = _gains(parameter, optimizer, group, moved, taken[number])
        for code in codes:
            parts[code].append(gain * clip * gradients[code][number])
        parts[MOMENTUM].append(carry * before.momentum[number])
        decay = -group["lr"] * group["weight_decay"] if moved else 0.0
        parts[WEIGHT_DECAY].append(decay * before.weights[number])
    return parts


def _steps_taken(parameters: Sequence[Tensor], optimizer: Optimizer) -> list[float]:
    """Steps the optimizer has made of each parameter; a GPU is waited for once, not for each."""
    counts = [torch.as_tensor(optimizer.state[p].get("step", 0.0)) for p in parameters]
    there = [count.to(counts[-1].device) for count in counts]
    return [float(count) for count in torch.stack(there).tolist()] if there else []


def _gains(
    parameter: Tensor, optimizer: Optimizer, group: dict[str, Any], moved: bool, count: float
) -> tuple[Tensor, Tensor]:
    """What this step multiplies a gradient with, and the first moment before it."""
    zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    if not moved:
        return zero, zero
    if isinstance(optimizer, SGD):
        return zero - group["lr"], zero
    state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
    spread = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
    step = -group["lr"] / (1 - beta1**count) / spread
    return step * (1 - beta1), step * beta1


def with_sums(parts: dict[int, Tensors], before: Before, after: Tensors) -> dict[int, Tensors]:
    """Add all classes at once (``GRADIENT``) and the whole step as it was taken (``UPDATE``)."""
    classes = [part for code, part in parts.items() if code < UPDATE]
    gradient = [torch.stack(same).sum(0) for same in zip(*classes, strict=True)]
    update = [a - b for a, b in zip(after, before.weights, strict=True)]
    return {**parts, GRADIENT: gradient, UPDATE: update}


def dot(a: Tensors, b: Tensors) -> float:
    """Inner product over all parameters, summed in float64."""
    pairs = zip(a, b, strict=True)
    products = [x.double().flatten() @ y.double().flatten() for x, y in pairs]
    return float(sum(torch.stack(products).tolist())) if products else 0.0


def norm(a: Tensors) -> float:
    """L2 norm over all parameters, summed in float64."""
    return math.sqrt(dot(a, a))


def left_over(parts: dict[int, Tensors]) -> float:
    """Relative size of what GRADIENT, MOMENTUM and WEIGHT_DECAY leave of UPDATE: rounding."""
    known = zip(parts[GRADIENT], parts[MOMENTUM], parts[WEIGHT_DECAY], strict=True)
    rest = [u - (g + m + w) for u, (g, m, w) in zip(parts[UPDATE], known, strict=True)]
    size = norm(parts[UPDATE])
    return norm(rest) / size if size > 0 else float("nan")


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
    """One update that was made."""

    #: Which.
    step: int
    minibatch: int
    #: What the optimizer moves; ``grad`` is None where it did not.
    parameters: Tensors
    #: After its step.
    optimizer: Optimizer
    #: Copies taken before its step.
    before: Before
    #: All tokens of the update: their gradients add up to that of the step.
    passes: Sequence[Scorable]
    #: Factor by which the gradient norm was clipped.
    clip: float
    #: Softmax temperature.
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
