"""Decoding with a key-value cache, in blocks between which the host looks at what was sampled.

Shapes: n rows in hand, k tokens of a block, V vocabulary. On a GPU nothing waits within a block: a
row that has ended decodes on to the block's end, and what it then writes is dropped. Rows that have
ended leave between blocks, with their part of the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from wapo_analysis.train.policy import Policy

if TYPE_CHECKING:
    from wapo_analysis.train.rollout import Noise

#: Tokens between two looks; on a CPU looking is free, and decoding on is not.
BLOCK = {"cpu": 1, "cuda": 16}
_LEAVE = 8  # rows leave once one in so many has ended: moving the others' cache costs a step or two
_STOP_MARGIN = 8  # tokens of context before a stop text, so that it is decoded as in the whole


class NonFiniteLogits(ArithmeticError):
    """The policy's logits are NaN or infinite, so nothing can be sampled from it."""


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer with room for the whole text: a token is written where it goes, not appended.

    ``keys`` and ``values`` are views of the part that is filled.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, layer: DynamicLayer, room: int) -> "_RoomyLayer":
        made: Any = cls.__new__(cls)
        made.__dict__.update(layer.__dict__)
        made.room = room
        made.select(None)
        found: _RoomyLayer = made
        return found

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        start, count = self.keys.shape[-2], keys.shape[-2]
        self._keys.narrow(-2, start, count).copy_(keys)
        self._values.narrow(-2, start, count).copy_(values)
        self.keys = self._keys.narrow(-2, 0, start + count)
        self.values = self._values.narrow(-2, 0, start + count)
        return self.keys, self.values

    def select(self, rows: Tensor | None) -> None:
        """Keep some rows."""
        for name in ("keys", "values"):
            held = getattr(self, name)
            held = held if rows is None else held.index_select(0, rows)
            space = held.new_empty((*held.shape[:-2], self.room, held.shape[-1]))
            filled = space[..., : held.shape[-2], :]
            filled.copy_(held)
            setattr(self, f"_{name}", space)
            setattr(self, name, filled)


@dataclass
class _Context:
    """What the model has read: its cache, and which positions count.

    ``token`` (n,), or None: sampled, but not yet read.
    """

    model: Any
    #: (u, L): left-padded prompts, each once; the mask is 1 on real tokens.
    ids: Tensor
    mask: Tensor
    #: (n,): the prompt of each row: a group's is read once.
    copies: Tensor
    #: Some prompt is padded.
    padded: bool
    #: Positions of prompt and longest completion.
    room: int
    token: Tensor | None = None

    def __post_init__(self) -> None:
        self._read = length = self.mask.shape[1]
        self._attention = self.mask.new_ones((len(self.mask), self.room))
        self._attention[:, :length] = self.mask
        self._texts = self.mask.sum(1, keepdim=True) - length
        self._cache: Any = None
        self._roomy = self._plain = False
        self._known = takes_whole_masks(self.model)

    def logits(self) -> Tensor:
        """Read what has not been read; logits of the next token, shape (n, V)."""
        if self.token is None:
            return self._first()
        places = self._texts + self._read
        self._read += 1
        return self._forward(self.token.unsqueeze(1), self._mask(), places)[0]

    def _first(self) -> Tensor:
        """Read the prompts."""
        logits, cache = self._forward(self.ids, self.mask, positions(self.mask))
        self._cache, layers = cache, getattr(cache, "layers", [])
        self._roomy = len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)
        self._plain = self._roomy and self._known
        if self._roomy:
            cache.layers = [_RoomyLayer.of(layer, self.room) for layer in layers]
        if len(self.copies) == len(self.ids):
            return logits
        if self.keep(self.copies):
            return logits[self.copies]
        self.ids, self.mask = self.ids[self.copies], self.mask[self.copies]
        self.__post_init__()
        return self._first()

    def _forward(self, ids: Tensor, mask: Tensor | None, places: Tensor) -> tuple[Tensor, Any]:
        """Logits of the last position, shape (rows of ids, V), and the cache."""
        # Inference mode saves a small model on a CPU a tenth of a step. A model that keeps tensors
        # of its forward pass could not train on with them, so only known kinds of model get it.
        quick = self._known and ids.device.type == "cpu"
        with torch.inference_mode() if quick else torch.no_grad():
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1], out.past_key_values

    def _mask(self) -> Tensor | None:
        """Mask of one more token."""
        seen = self._attention[:, : self._read]
        if not self._plain:
            return seen
        return seen.bool()[:, None, None] if self.padded else None

    def keep(self, rows: Tensor) -> bool:
        """Keep some rows only; False if this cache cannot."""
        select = getattr(self._cache, "batch_select_indices", None)
        if not self._roomy and select is None:
            return False
        if self._roomy:
            for layer in self._cache.layers:
                layer.select(rows)
        elif select is not None:
            select(rows)
        self._texts, self._attention = self._texts[rows], self._attention[rows]
        self.token = None if self.token is None else self.token[rows]
        return True


@dataclass
class _Row:
    """What the host knows of one completion."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class Sampled:
    """Completions of n rows: ids and log-probabilities (n, T), what counts, which have ended."""

    ids: Tensor
    mask: Tensor
    logp: Tensor
    ended: Tensor
    entropy: Tensor | None


@dataclass
class Sampler:
    """Samples completions of rows that are in memory together."""

    policy: Policy
    #: What samples: the policy's, or its copy in another precision.
    model: Any
    max_new_tokens: int
    temperature: float
    noise: "Noise"
    #: Measure it at every position.
    entropy: bool = False
    #: Tokens between two looks of the host; None takes `BLOCK`.
    block: int | None = None

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, mask: Tensor, rows: Tensor, padded: bool, copies: Tensor | None = None
    ) -> Sampled:
        """Sample; ``rows`` (n,) are the numbers in the batch.

        Prompts are left-padded, ids and mask (u, L); ``copies`` (n,) says which each row has, None
        that each has its own. Raises NonFiniteLogits if the policy gives NaN or infinite logits.
        """
        policy, device = self.policy, ids.device
        told = [_Row() for _ in range(len(rows))]
        hand, at = list(range(len(rows))), torch.arange(len(rows), device=device)
        shape = len(rows), self.max_new_tokens
        out = [torch.full(shape, policy.pad_id, device=device)]
        out += [torch.zeros(shape, device=device) for _ in range(1 + self.entropy)]
        copies, room = at if copies is None else copies, ids.shape[1] + self.max_new_tokens
        context = _Context(self.model, ids, mask, copies, padded, room)
        start = 0
        while True:
            stop = min(start + (self.block or BLOCK[device.type]), self.max_new_tokens)
            parts = self._decode(context, rows, start, stop)
            for whole, part in zip(out, parts, strict=True):
                whole[at, start:stop] = part
            self._look(parts, [told[row] for row in hand])
            left = [place for place, row in enumerate(hand) if not told[row].ended]
            if not left or stop == self.max_new_tokens:
                return self._whole(out, told)
            if (len(hand) - len(left)) * _LEAVE >= len(hand):
                keep = sent(torch.tensor(left), device)
                if context.keep(keep):
                    hand, at, rows = [hand[place] for place in left], at[keep], rows[keep]
            start = stop

    def _decode(self, context: _Context, rows: Tensor, start: int, stop: int) -> list[Tensor]:
        """Ids, log-probabilities and entropies of a block, shape (n, k) each."""
        columns: list[list[Tensor]] = [[] for _ in range(2 + self.entropy)]
        for position in range(start, stop):
            logp = torch.log_softmax(context.logits().float() / self.temperature, dim=-1)
            probabilities = logp.exp()
            if self.entropy:
                columns[2].append(torch.special.entr(probabilities).sum(dim=-1))
            context.token = self.noise.pick(probabilities, rows, position)
            columns[0].append(context.token)
            columns[1].append(logp.gather(1, context.token.unsqueeze(1)).squeeze(1))
        return [torch.stack(column, dim=1) for column in columns]

    def _look(self, parts: list[Tensor], rows: Sequence[_Row]) -> None:
        """Let the host see a block, in one copy, and tell which rows have ended in it."""
        fine = parts[1].isfinite().all()
        seen = torch.cat([parts[0].flatten(), fine.long().view(1)]).tolist()
        if not seen.pop():
            raise NonFiniteLogits("the policy gives logits that are NaN or infinite")
        count, texts = parts[0].shape[1], self.policy.format.style.stop
        for number, row in enumerate(rows):
            if not row.ended:
                self._extend(row, seen[number * count : (number + 1) * count], texts)

    def _extend(self, row: _Row, ids: list[int], texts: Sequence[str]) -> None:
        """Add a block to a row, up to the token that ends it."""
        begun, ends = len(row.ids), self.policy.eos_ids
        for token in ids:
            row.ids.append(token)
            if token in ends:
                row.ended = True
                break
        if not texts:
            return
        # A token spells at least a byte, so this many hold any stop text and some before it.
        window = max(len(text.encode()) for text in texts) + _STOP_MARGIN
        if not self._says(row.ids[-(window + len(ids)) :], texts):
            return
        for length in range(begun + 1, len(row.ids) + 1):
            if self._says(row.ids[max(0, length - window) : length], texts):
                del row.ids[length:]
                row.ended = True
                return

    def _says(self, ids: list[int], texts: Sequence[str]) -> bool:
        text = self.policy.decode(ids)
        return any(stop in text for stop in texts)

    def _whole(self, out: list[Tensor], told: Sequence[_Row]) -> Sampled:
        """All rows, cut where they ended and padded to the longest."""
        device, lengths = out[0].device, [len(row.ids) for row in told]
        facts = sent(torch.tensor([lengths, [row.ended for row in told]]), device)
        ids, logp, *entropy = (part[:, : max(lengths)] for part in out)
        mask = torch.arange(max(lengths), device=device) < facts[0].unsqueeze(1)
        return Sampled(
            torch.where(mask, ids, self.policy.pad_id),
            mask,
            torch.where(mask, logp, 0.0),
            facts[1].bool(),
            torch.where(mask, entropy[0], 0.0) if entropy else None,
        )


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, which nobody waits for."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def takes_whole_masks(model: Any) -> bool:
    """Whether a model's attention is told by a boolean mask alone.

    Of a mask of texts (n, L) a model looks at the values, which a GPU is waited for, to make its
    own. Layers with a window make several, and older models put positions into theirs.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config._attn_implementation == "sdpa"
        and (hasattr(config, "rope_parameters") or hasattr(config, "rope_theta"))
        and not getattr(config, "alibi", False)
        and kinds == {"full_attention"}
        and not getattr(config, "attention_chunk_size", None)
        and (hasattr(config, "layer_types") or not getattr(config, "sliding_window", None))
    )


def whole_mask(attention: Tensor) -> Tensor:
    """Which position sees which, (n, 1, L, L): real tokens up to its own, and itself at least."""
    length = attention.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=attention.device).tril()
    own = torch.eye(length, dtype=torch.bool, device=attention.device)
    return (earlier & attention.bool()[:, None, None]) | own


def positions(attention: Tensor) -> Tensor:
    """Position of each token in its own text, left padding left out."""
    return (attention.cumsum(dim=1) - 1).clamp(min=0)
