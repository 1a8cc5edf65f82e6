"""The policy: a model on its device, and from a problem's text to what the model sees.

One place encodes prompts (chat template, system prompt, ends, length limit), so that the text a run
records is the text the policy was given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from wapo_analysis.errors import UserError

_MARK = "wapo"  # stands for an assistant's words when the template is asked how it ends them


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are put to a policy and what ends its completions."""

    #: Use the tokenizer's chat template; auto uses it if there is one.
    chat: str = "auto"
    #: System prompt of the template; None leaves the template's own.
    system: str | None = None
    #: Texts that end a completion, beside the model's end tokens.
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it."""

    #: Template and begin token included.
    text: str
    #: Its token ids.
    ids: list[int]
    #: The beginning of the problem's text was left out to fit a length limit.
    cut: bool = False


class PromptFormat:
    """Encodes prompts for one tokenizer.

    Raises UserError if a chat template is asked for and the tokenizer has none, a system prompt is
    given without a template, or the template cannot be used.
    """

    def __init__(self, tokenizer: Any, style: PromptStyle) -> None:
        self.style = style
        self._tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if style.chat == "on" and not has_template:
            raise UserError("chat is on, but the model's tokenizer has no chat template; set off")
        self.chat = style.chat == "on" or (style.chat == "auto" and has_template)
        if style.system is not None and not self.chat:
            raise UserError("system_prompt needs a chat template, and none is used here")
        self._begin = [] if self.chat else _begin_ids(tokenizer)
        self._bare = len(self._ids(self.render("")))

    def render(self, prompt: str) -> str:
        """Text the model is given for a problem's text.

        Raises UserError if the chat template refuses it (some know no system prompt).
        """
        if not self.chat:
            return str(self._tokenizer.decode(self._begin)) + prompt if self._begin else prompt
        return self._templated(prompt, add_generation_prompt=True)

    def encode(self, prompt: str, limit: int | None = None) -> Prompt:
        """Encode a problem's text.

        Raises UserError if not even an empty text fits. ``limit``: most tokens. A longer prompt
        loses tokens from the beginning of its own text, never of the template, and is marked as
        cut.
        """
        text = self.render(prompt)
        ids = self._ids(text)
        if limit is None or len(ids) <= limit:
            return Prompt(text, ids)
        if self._bare >= limit:
            raise UserError(
                f"max_prompt_tokens is {limit}, but the chat template alone takes {self._bare}"
            )
        own = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        dropped = 0
        # Text that is decoded and encoded again can come out longer; then drop a little more.
        while len(ids) > limit:
            dropped += len(ids) - limit
            rest = str(self._tokenizer.decode(own[dropped:])).lstrip("\N{REPLACEMENT CHARACTER}")
            text = self.render(rest)
            ids = self._ids(text)
        return Prompt(text, ids, cut=True)

    def turns(self, prompt: str) -> list[dict[str, str]]:
        """The conversation that a problem's text begins."""
        system = self.style.system
        turns = [] if system is None else [{"role": "system", "content": system}]
        return [*turns, {"role": "user", "content": prompt}]

    def end_ids(self) -> tuple[int, ...]:
        """Tokens by which the chat template ends an assistant's turn; empty without a template."""
        if not self.chat:
            return ()
        after = self._templated("", reply=_MARK).rpartition(_MARK)[2]
        added = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        special = added | set(self._tokenizer.all_special_ids)
        ids = self._tokenizer(after, add_special_tokens=False)["input_ids"]
        return tuple(token for token in ids if token in special)[:1]

    def _templated(self, prompt: str, reply: str | None = None, **options: Any) -> str:
        turns = self.turns(prompt)
        if reply is not None:
            turns.append({"role": "assistant", "content": reply})
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except (TemplateError, ValueError) as error:
            raise UserError(f"the model's chat template fails: {error}; set chat off") from error

    def _ids(self, text: str) -> list[int]:
        # A rendered template holds its own begin token; plain text was given one by render.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _begin_ids(tokenizer: Any) -> list[int]:
    """Begin token, as a list, if the tokenizer itself would put one before plain text."""
    begin = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return [begin] if begin is not None and ids[:1] == [begin] else []


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal while loading and saving."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # The bar of the GGUF reader is a plain tqdm that heeds no switch of transformers.
    bar, gguf.tqdm = gguf.tqdm, partial(gguf.tqdm, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer on one device."""

    model: Any
    tokenizer: Any
    device: torch.device
    #: Tokens that end a completion.
    eos_ids: tuple[int, ...]
    #: Token that fills rows; never attended to.
    pad_id: int
    #: From a problem's text to what the model sees.
    format: PromptFormat
    #: Products are bfloat16, weights that are trained float32.
    mixed: bool = False
    #: The model in bfloat16, which samples; it is brought up to date before it does.
    rounded: Any = None

    @property
    def module(self) -> nn.Module:
        """The model as a plain module."""
        assert isinstance(self.model, nn.Module)
        return self.model

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The model that samples, as it is now: in bfloat16 where products are."""
        if self.rounded is None:
            with self.autocast():
                yield self.model
            return
        with torch.no_grad():
            torch._foreach_copy_(list(self.rounded.parameters()), list(self.module.parameters()))
        yield self.rounded

    def autocast(self) -> torch.autocast:
        """A block in which the model's products are made as training makes them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    @property
    def context(self) -> int | None:
        """Tokens of prompt and completion the model can take; None if it does not say."""
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(window) if window else None

    def trainable(self) -> dict[str, Tensor]:
        """Parameters that training moves, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a problem's text, chat template included."""
        return self.format.encode(prompt).ids

    def decode(self, ids: list[int]) -> str:
        """Text of a completion without its special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def texts(self, ids: list[int]) -> list[str]:
        """Text of each single token, special ones by name."""
        return [str(self.tokenizer.decode([i], skip_special_tokens=False)) for i in ids]


def enable_recompute(model: Any) -> None:
    """Prepare a model's layers for gradient checkpointing.

    transformers does it in training mode alone, where dropout would be on. The policy that is
    trained is the one that sampled, so the layers' own dropout is set to 0, and they alone are
    switched to training mode, around the forward pass (`recomputing`). Raises UserError if the
    architecture does not support it.
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
