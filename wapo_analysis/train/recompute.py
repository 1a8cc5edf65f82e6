"""Gradient checkpointing: layers keep their inputs only and are computed again in the backward.

transformers does this in training mode alone, where dropout would be on. Here the policy that is
trained is the one that sampled, so dropout must stay off: only the checkpointed layers themselves
are switched to training mode, only around the forward pass, and their own dropout is set to 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from wapo_analysis.errors import UserError


def enable_recompute(model: Any) -> None:
    """Prepare a model's layers for gradient checkpointing.

    Raises
    ------
    UserError
        If the architecture does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing: {type(model).__name__} does not support it; set it to false"
        )
    # The method has a new name since transformers 5.20; the old one warns there.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for layer in _layers(model):
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):
                setattr(layer, name, 0.0)


@contextmanager
def recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Checkpoint the layers in forward passes within, if ``on`` and if prepared.

    Sampling stays outside: a layer that is checkpointed keeps no key-value cache.
    """
    layers = _layers(model) if on else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
