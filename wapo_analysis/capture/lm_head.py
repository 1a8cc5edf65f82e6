"""The head of a causal language model, and statistics read off the logits that it makes.

`HeadReader` serves a loss that is given log-probabilities alone: a hook on the forward that made
the logits computes statistics there and then, before anybody divides in place. The loss that
follows says which positions it wants; a reading counts only if it gives the very log-probabilities
that the loss was given.

Shapes: B texts of L positions in a forward, M = B (L - 1) of them predicted, V vocabulary, D hidden
width; P the shape of the loss's log-probabilities, (b, T) or packed (m,); N tokens under its mask.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from wapo_analysis.capture import Hook
from wapo_analysis.errors import first_line
from wapo_analysis.record import Guarded, guarded
from wapo_analysis.record.batches import MATCH
from wapo_analysis.stats import TokenStats, fused_head_stats, token_stats

_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Mean distance in nats of log-probabilities that are the same ones. Of a policy that is nearly
# uniform, those of the next token, too, may be near.
_SAME = 1e-6
# Most by which the logits made here may differ from the model's own, in units of the largest one.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class LmHead:
    """Everything that makes logits of hidden states."""

    #: (V, D).
    weight: Tensor
    #: (V,).
    bias: Tensor | None
    #: Factor on the logits, before the soft cap.
    scale: float = 1.0
    #: Logits z become ``softcap * tanh(z / softcap)``.
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any, tensors: tuple[Tensor, Tensor | None] | None = None) -> "LmHead":
        """Head of a model as it is now; wrappers may replace its tensors later.

        ``tensors``: weight and bias, where the model holds but parts of them; see `whole`.
        """
        head = model.get_output_embeddings()
        weight, bias = tensors or (head.weight, getattr(head, "bias", None))
        return cls(weight, bias, *logit_transform(model.config))

    def stats(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        kept: Tensor | None = None,
    ) -> TokenStats:
        """Statistics of some tokens, see `wapo_analysis.stats.fused_head_stats`."""
        return fused_head_stats(
            hidden,
            self.weight,
            targets,
            self.bias,
            temperature,
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

    ``head``: output embeddings of a model.
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

    Returns ``scale`` (the first of the names it goes by; Granite divides by ``logits_scaling``,
    HyperCLOVA X multiplies with it) and ``softcap``.
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
    knows of. Returns None if nothing is in the way.
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
        return f"its head cannot be applied to hidden states ({first_line(error)})"
    if float(gap) <= _TOLERANCE.get(theirs.dtype, _HALF_TOLERANCE):
        return None
    return f"{type(inner).__name__} does more than head, scale and soft cap to make its logits"


@dataclass(frozen=True)
class Reading:
    """What one forward said of the tokens it was given."""

    #: (R,): of those of the M tokens, each after a position but the last, that are no padding.
    stats: TokenStats
    #: (M,): those tokens.
    ids: Tensor
    #: (M,): number of each among the R; None if all are read, -1 of padding.
    row: Tensor | None
    #: B and L.
    shape: tuple[int, int]
    #: (n + 1,): where the n texts of a packed row begin, and L, if the positions given to the model
    #: say.
    begins: Tensor | None

    def at(self, index: Tensor) -> TokenStats | None:
        """Statistics at N of the M places, shape (N,); None where they are not to be had."""
        if not len(index):
            return self.stats.map(lambda values: values[index])
        if not 0 <= int(index.min()) <= int(index.max()) < len(self.ids):
            return None
        row = index if self.row is None else self.row[index]
        return self.stats.map(lambda values: values[row]) if int(row.min()) >= 0 else None


class HeadReader(Guarded):
    """Reads the logits of a model's forward passes with a graph.

    ``temperature``: softmax temperature of the loss. ``model``: the model that makes the logits; by
    default whichever returns some first. False waits for none: only given logits are read.
    ``reason``: why the last pass had no statistics; ``topk``: most probable tokens that are read,
    too.
    """

    topk = 0

    def __init__(self, temperature: float, model: nn.Module | bool = True) -> None:
        self.reason = "no model has returned logits by that name; head=model names yours"
        self._temperature = temperature
        self._reading: Reading | None = None
        self._handle: RemovableHandle | None = None
        if isinstance(model, nn.Module):
            self._watch(model)
        elif model:
            self._handle = register_module_forward_hook(self._find, with_kwargs=True)

    def failed(self, error: BaseException) -> None:
        """Read no more; the loss is watched all the same."""
        self.reason = f"reading the logits failed ({self.failure})"
        self.close()

    def close(self) -> None:
        """Take the hook out."""
        if self._handle is not None:
            self._handle.remove()

    def _watch(self, module: nn.Module) -> None:
        self._handle = module.register_forward_hook(Hook(self._forward), with_kwargs=True)

    def _find(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.guard(self._found, module, args, kwargs, output)

    def _found(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if _named_logits(output) is not None:
            self.close()
            self._watch(module)
            self._look(args, kwargs, output)

    def _forward(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if not torch.compiler.is_compiling():
            self.guard(self._look, args, kwargs, output)

    def _look(self, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        logits = first if isinstance(first, Tensor) else _named_logits(output)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if logits is not None and logits.requires_grad:
            self._read(logits.detach(), ids, kwargs)

    def _read(self, logits: Tensor, ids: Any, given: Mapping[str, Any]) -> None:
        self._reading = None
        self._used = self._texts = 0  # positions and texts of the reading that losses have had
        count, length = logits.shape[0], logits.shape[-2]
        if not isinstance(ids, Tensor) or ids.dim() != 2 or logits.dim() != 3 or len(ids) != count:
            self.reason = "the model was not given the token ids of its logits"
            return
        skipped = ids.shape[1] - length  # only the last positions were asked for
        if skipped < 0:
            self.reason = f"the model made {length} logits of {ids.shape[1]} tokens"
            return
        following, row, there = ids[:, skipped + 1 :], None, given.get("attention_mask")
        if isinstance(there, Tensor) and there.shape == ids.shape:
            there = there[:, skipped:-1].bool()
            row = there.flatten().cumsum(0) * there.flatten() - 1
        there, most = None if row is None else there, min(self.topk, logits.shape[-1])
        stats = token_stats(logits[:, :-1], following, self._temperature, there, most)
        begins = None if skipped else _begins(given.get("position_ids"), ids)
        self._reading = Reading(stats, following.flatten(), row, (count, length), begins)

    @guarded
    def take(self, logp: Tensor, mask: Tensor) -> tuple[TokenStats, Tensor] | None:
        """Statistics and ids of the tokens under the mask, shape (N,); None with a ``reason``.

        ``logp``, ``mask``: what the loss was given.
        """
        reading, place = self._reading, mask.bool().nonzero(as_tuple=True)
        if reading is None:
            return None
        wanted = logp.detach()[place]
        found, least = None, math.inf
        for index in self._places(logp, mask, place, reading):
            stats = reading.at(index)
            away = math.inf if stats is None else _distance(stats.logp, wanted)
            if stats is not None and (found is None or away < least):
                found, least = (stats, reading.ids[index]), away
            if least <= _SAME:
                break
        if found is None or not self._agrees(least):
            return None
        self._used += len(logp)
        self._texts += 1
        return found

    @guarded
    def read(self, logits: Tensor, ids: Tensor, logp: Tensor, mask: Tensor) -> TokenStats | None:
        """Statistics, shape (N,), of logits that the loss itself was given, shape P + (V,)."""
        mask, most = mask.bool(), min(self.topk, logits.shape[-1])
        stats = token_stats(logits.detach(), ids, self._temperature, mask, most)
        return stats if self._agrees(_distance(stats.logp, logp.detach()[mask])) else None

    def _agrees(self, away: float) -> bool:
        agrees = away <= MATCH
        if not agrees:
            self.reason = (
                "the model's logits do not give the loss's log-probabilities at temperature "
                f"{self._temperature:g}, {away:.2g} nats away on average (head=model says whose)"
            )
        return agrees

    def _places(
        self, logp: Tensor, mask: Tensor, place: tuple[Tensor, ...], reading: Reading
    ) -> Iterator[Tensor]:
        """Places of the N tokens among the M predicted ones, by each layout that may be meant."""
        count, predicted = reading.shape[0], reading.shape[1] - 1
        if logp.dim() == 1:
            if count == 1:
                yield place[0] + self._used - 1  # its own token's probability at each position
                yield place[0] + self._used  # the next one's
            return
        (row, column), width = place, logp.shape[1]
        if count == len(logp):
            # The last positions of every text; of a whole text each is its own token's probability,
            yield row * predicted + predicted - width + column
            if width > predicted:  # or the next one's
                yield row * predicted + column
        begins = reading.begins
        if begins is None:
            return
        if len(logp) == 1 and self._texts < len(begins) - 1:  # one text of the packed row a call
            yield begins[self._texts] + column
        elif len(begins) > len(logp):  # each text ends with its completion
            last = (mask.bool() * torch.arange(1, width + 1, device=mask.device)).amax(1)
            yield begins[1:][row] - last[row] + column - 1


def _distance(logp: Tensor, wanted: Tensor) -> float:
    """Mean distance in nats; infinite if it is no number, 0 of no tokens."""
    away = float((logp - wanted).abs().mean()) if len(wanted) else 0.0
    return math.inf if math.isnan(away) else away


def _named_logits(output: Any) -> Tensor | None:
    """Logits (B, L, V) of what a model returned, by that name; a value model has V = 1."""
    try:
        named = isinstance(output, Mapping)
        logits = output.get("logits") if named else getattr(output, "logits", None)
    except Exception:  # any module's output is asked, also such as hold what they are asked for
        return None
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[-1] == 1:
        return None
    return logits if logits.requires_grad else None


def _begins(positions: Any, ids: Tensor) -> Tensor | None:
    """Where texts begin in a packed row: wherever positions, shape (1, L), begin again."""
    if not isinstance(positions, Tensor) or positions.shape != ids.shape or len(ids) != 1:
        return None
    zero = (positions[0] == 0).nonzero()[:, 0]
    return torch.cat([zero, zero.new_tensor([ids.shape[1]])])
