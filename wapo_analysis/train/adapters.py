"""LoRA: train small low-rank adapters beside frozen weights, through peft."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wapo_analysis.errors import UserError
from wapo_analysis.train.trust import check_model

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters W + (alpha / rank) B A, with B = 0 at the start.

    Attributes
    ----------
    rank : int
    alpha : float
    targets : tuple of str
        Names of the layers, or ``("all-linear",)`` for every linear layer but the output head.
    seed : int
        Decides the first A.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ALL_LINEAR,)
    seed: int = 0


def add_adapter(model: Any, adapter: Adapter) -> Any:
    """Freeze a model and put new adapters beside it; its function does not change yet.

    Raises
    ------
    UserError
        If peft is not installed, no layer has a wanted name, or the output head is among them:
        the fused head reads its plain weight.
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
            raise UserError(f"lora_targets {names}: {str(error).splitlines()[0]}") from error
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise UserError("lora_targets names the output head, which must stay as it is")
    return adapted


def load_adapter(model: Any, folder: Path) -> Any:
    """Put the adapters saved in a checkpoint beside their model, ready to train on."""
    check_model(str(folder))
    with _peft_warnings():
        return _peft().PeftModel.from_pretrained(model, folder, is_trainable=True)


def is_adapter_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint holds adapters alone, not a whole model."""
    return (folder / "adapter_config.json").exists()


def save_options(model: Any) -> dict[str, Any]:
    """Options of ``save_pretrained``: of a model with adapters only these are saved."""
    return {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}


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
