"""The head of a causal language model: what stands between its last hidden states and the softmax.

Shapes: B texts, L positions, V vocabulary, D hidden width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wapo_analysis.stats import TokenStats, fused_head_stats

_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Most by which the logits made here may differ from the model's own, in units of the largest one.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class LmHead:
    """Everything that makes logits of hidden states.

    Attributes
    ----------
    weight : Tensor, shape (V, D)
    bias : Tensor, shape (V,), or None
    scale : float
        Factor on the logits, before the soft cap.
    softcap : float or None
        Logits z become ``softcap * tanh(z / softcap)``.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any, tensors: tuple[Tensor, Tensor | None] | None = None) -> "LmHead":
        """Head of a model as it is now; wrappers may replace its tensors later.

        Parameters
        ----------
        model : transformers.PreTrainedModel
        tensors : pair of Tensor, optional
            Weight and bias, where the model holds but parts of them; see `whole`.
        """
        head = model.get_output_embeddings()
        weight, bias = tensors or (head.weight, getattr(head, "bias", None))
        return cls(weight, bias, *logit_transform(model.config))

    def stats(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        mask: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> TokenStats:
        """Statistics of some tokens, see `wapo_analysis.stats.fused_head_stats`."""
        return fused_head_stats(
            hidden,
            self.weight,
            targets,
            self.bias,
            temperature,
            mask,
            kept=kept,
            scale=self.scale,
            softcap=self.softcap,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits whole, shape (..., V), in at least float32; for comparing with the model's."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return wide if self.softcap is None else self.softcap * torch.tanh(wide / self.softcap)


def is_shard(weight: Tensor) -> bool:
    """Whether a process holds but a part of a weight: FSDP2's DTensor, or ZeRO-3."""
    return hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")


def rows_of(weight: Tensor) -> int:
    """Rows of a head as a whole; ZeRO-3 leaves a shape of (0,) between its forward passes."""
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@contextmanager
def whole(head: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Within: weight and bias of a head, gathered; every process must come here at the same time.

    Parameters
    ----------
    head : torch.nn.Module
        Output embeddings of a model.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    if not is_shard(weight):
        yield weight, bias
    elif hasattr(weight, "full_tensor"):
        with torch.no_grad():
            tensors = weight.full_tensor(), None if bias is None else bias.full_tensor()
        yield tensors
    else:
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        with maybe_gather_lm_head_ctx(weight, bias):
            yield weight, bias


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and soft cap between head and softmax, from a model's configuration.

    Parameters
    ----------
    config : transformers.PretrainedConfig

    Returns
    -------
    scale : float
        The first of the names it goes by; Granite divides by ``logits_scaling``, HyperCLOVA X
        multiplies with it.
    softcap : float or None
    """
    text = config.get_text_config()
    scale = next(
        (float(v) for v in (getattr(text, n, None) for n in _FACTORS) if v is not None), None
    )
    scaling = getattr(text, "logits_scaling", None)
    if scale is None and scaling is not None:
        inverse = getattr(text, "model_type", None) != "hyperclovax"
        scale = 1 / float(scaling) if inverse else float(scaling)
    softcap = getattr(text, "final_logit_softcapping", None)
    return 1.0 if scale is None else scale, softcap


def inner_model(model: Any) -> Any:
    """Return the causal language model inside PEFT's wrapper; its layers keep their adapters."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def last_hidden(model: Any, **inputs: Any) -> Tensor:
    """Hidden states that go into the head, shape (B, L, D), on the autograd graph.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Without PEFT's wrapper, see `inner_model`.
    **inputs
        Of its forward.
    """
    hidden: Tensor = model.base_model(**inputs).last_hidden_state
    return hidden


@torch.no_grad()
def head_obstacle(model: Any, device: torch.device) -> str | None:
    """Say why a model's log-probabilities cannot be made from hidden states and head.

    A few tokens are scored both ways: some architecture may do more on the way than this module
    knows of.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    device : torch.device

    Returns
    -------
    str or None
        None if nothing is in the way.
    """
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    if not isinstance(head, nn.Linear):  # an adapter, say, whose own weights would be passed over
        return f"its head is no plain linear layer but {type(head).__name__}"
    if inner.base_model is inner:
        return f"{type(inner).__name__} has no backbone of its own"
    ids = torch.arange(min(8, head.weight.shape[0]), device=device).unsqueeze(0)
    theirs = model(input_ids=ids, use_cache=False).logits
    try:
        ours = LmHead.of(inner).logits(last_hidden(inner, input_ids=ids, use_cache=False))
        gap = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
    except (RuntimeError, AttributeError) as error:
        return f"its head cannot be applied to hidden states ({str(error).splitlines()[0]})"
    if float(gap) <= _TOLERANCE.get(theirs.dtype, _HALF_TOLERANCE):
        return None
    return f"{type(inner).__name__} does more than head, scale and soft cap to make its logits"
