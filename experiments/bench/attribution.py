"""What decomposing an update by class costs, and a Jacobian-vector product of all logits.

On a model of four layers (width 256, vocabulary 2000) with 16 x 128 tokens.
"""

from typing import Any

import torch
from torch import Tensor

from experiments.bench.harness import Measure, Measures, Work, interleave
from experiments.bench.micro_step import Shape, llama
from experiments.bench.options import Options
from experiments.bench.reference import trl_selective
from wapo_analysis.probes.measure import class_gradients

_SMALL = Shape(2000, 256, 1024, 4, 4, 4, "small")
_BATCH, _LENGTH = 16, 128
_CLASSES = 4
_EVERY = 20


def measure(options: Options) -> Measures:
    """Class gradients in plain steps, and a JVP in forward passes."""
    options.say("attribution: gradients of four classes, one JVP")
    model = llama(_SMALL)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(_SMALL.vocabulary, (_BATCH, _LENGTH), generator=draw)
    coef = torch.randn(_BATCH * (_LENGTH - 1), generator=draw)
    parameters: list[Tensor] = list(model.parameters())

    def logp() -> Tensor:
        return trl_selective(model(input_ids=ids).logits[:, :-1], ids[:, 1:]).flatten()

    def split(classes: int) -> Work:
        cls = torch.arange(len(coef)) % classes
        return lambda: class_gradients(logp(), coef, cls, parameters, classes)

    def plain() -> None:
        torch.autograd.grad(-(logp() * coef).sum(), parameters)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    times = interleave(
        {
            "plain": plain,
            "classes": split(_CLASSES),
            "three classes": split(3),
            "forward": forward,
            "jvp": _jvp(ids),
        },
        options.rounds_or(2, 5),
    )
    note = f"{_BATCH} x {_LENGTH} tokens, 4 layers, float32"
    classes = times.ratio("classes", "plain", note)
    return {
        "class_gradients_vs_step": classes,
        "three_class_gradients_vs_step": times.ratio("three classes", "plain", note),
        # A probe makes the class gradients after the update, on top of the trainer's own backward.
        "class_gradients_amortised": Measure(
            classes.value / _EVERY, note=f"every {_EVERY} updates, beside the trainer's backward"
        ),
        "jvp_vs_forward": times.ratio("jvp", "forward", note),
    }


def _jvp(ids: Tensor) -> Work:
    """JVP of all logits along a random direction, attention in its plain form."""
    from torch.func import functional_call, jvp

    model: Any = llama(_SMALL)
    model.set_attn_implementation("eager")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(1)
    tangents = {name: torch.randn(p.shape, generator=draw) for name, p in weights.items()}

    def logits(given: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, given, (), {"input_ids": ids}).logits
        return found

    def work() -> None:
        with torch.no_grad():
            jvp(logits, (weights,), (tangents,))

    return work
