"""Loading a policy: the shipped base, any Hugging Face causal language model, a GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wapo_analysis.errors import UserError

BASE = "base"


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer on one device.

    Attributes
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    device : torch.device
    eos_ids : tuple of int
        Tokens that end a completion.
    pad_id : int
        Token that fills rows; never attended to.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    eos_ids: tuple[int, ...]
    pad_id: int

    @property
    def module(self) -> nn.Module:
        """The model as a plain module."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt."""
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Text of a completion without its special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def texts(self, ids: list[int]) -> list[str]:
        """Text of each single token, special ones by name."""
        return [str(self.tokenizer.decode([i], skip_special_tokens=False)) for i in ids]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal while loading and saving."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """Device for ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    UserError
        If CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda is not available here; allowed: auto, cpu")
    return torch.device(name)


def load_policy(
    name: str, device: torch.device, dtype: str = "float32", weights: Path | None = None
) -> Policy:
    """Load a policy.

    Parameters
    ----------
    name : str
        ``"base"``, a folder, a hub name, or a ``.gguf`` file.
    device : torch.device
    dtype : {"float32", "bfloat16"}
    weights : Path, optional
        Checkpoint folder whose model replaces the named one's weights.

    Raises
    ------
    UserError
        If the model or its tokenizer cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, extra = _source(name)
    chosen, options = (str(weights), {}) if weights else (source, extra)
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, **extra)
            model = AutoModelForCausalLM.from_pretrained(
                chosen, dtype=getattr(torch, dtype), **options
            )
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load model {name!r}: {first} "
            '(allowed: "base", a model folder, a hub name, a .gguf file)'
        ) from error
    model.to(device).eval()  # no dropout: the policy that is trained is the one that sampled
    eos = _eos_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    return Policy(model, tokenizer, device, eos, int(pad))


def _source(name: str) -> tuple[str, dict[str, str]]:
    """Folder or hub name, with the extra argument a GGUF file needs."""
    if name == BASE:
        return str(files("wapo_analysis") / "assets" / "base"), {}
    if name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"no model file at {name}")
        return str(file.parent), {"gguf_file": file.name}
    return name, {}


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise UserError("the model's tokenizer has no end-of-text token; completions cannot end")
    return tuple(found) if isinstance(found, list) else (int(found),)
