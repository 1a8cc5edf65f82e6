"""An optimizer step decomposed: the share of each class, of momentum and of weight decay.

Both optimizers are linear in the gradient once the second moment of the real step is held fixed.
With clip factor k, class gradients g_c, bias corrections b1' = 1 - beta1^t, b2' = 1 - beta2^t and
D = sqrt(v_t / b2') + eps, v_t being the second moment after the real step,

    AdamW   dw = sum_c -lr (1 - beta1) k g_c / (b1' D)  -  lr beta1 m_(t-1) / (b1' D)  -  lr wd w
    SGD     dw = sum_c -lr k g_c  -  lr wd w

Nothing here draws random numbers or touches gradients or optimizer state.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from wapo_analysis.errors import UserError
from wapo_analysis.schema import GRADIENT, MOMENTUM, UPDATE, WEIGHT_DECAY

Tensors = list[Tensor]


@dataclass(frozen=True)
class Before:
    """Copies of what the optimizer step will change.

    ``weights``: the parameters; ``momentum``: first moment m_(t-1) of AdamW; zeros where there is
    none yet.
    """

    weights: Tensors
    momentum: Tensors

    @classmethod
    def of(cls, parameters: Sequence[Tensor], optimizer: Optimizer) -> "Before":
        """Copy weights and first moments.

        Raises UserError if the optimizer's step cannot be split.
        """
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
