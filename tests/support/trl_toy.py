"""A tiny model, tokenizer and GRPO trainer, built on the spot; works with TRL 0.21 to 1.16."""

import dataclasses
import gc
import string
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("trl") is None:  # pytest imports every file here for its doctests
    import pytest

    pytest.skip("needs the extra [trl]", allow_module_level=True)

import torch
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)
# accelerate collects garbage after every training; what is imported need not be walked each time.
gc.freeze()

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
TEMPERATURE = 0.8
_TAGS = ["tool_call", "tool_response", "think", "tools"]
_WORDS = ["<pad>", "<eos>", *"0123456789+= abcdefghij"]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(_WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def calling_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with Qwen3's chat template, which knows tools."""
    special = ["<pad>", "<|im_end|>", "<|im_start|>"]
    tags = [f"<{end}{tag}>" for tag in _TAGS for end in ("", "/")]
    words = {word: i for i, word in enumerate([*special, *tags, *string.printable])}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens([AddedToken(tag, special=False) for tag in tags])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen3.jinja").read_text()
    return tokenizer


def toy_model(seed: int = 0, sharpness: float = 20.0, **config: Any) -> LlamaForCausalLM:
    """Two layers with a head so sharp that some tokens are nearly certain and some are not."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(_WORDS), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(
        LlamaConfig(**{**sizes, **special, "max_position_embeddings": 64, **config})
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def digits(completions: list[str], **_: Any) -> list[float]:
    """Share of digits in the completion: varied within any group."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def toy_dataset() -> Dataset:
    sums = [(a, b) for a in range(5) for b in range(5)]
    return Dataset.from_dict(
        {"prompt": [f"{a}+{b}=" for a, b in sums], "answer": [str(a + b) for a, b in sums]}
    )


def toy_config(out: Path, kind: Any = GRPOConfig, **settings: Any) -> Any:
    """Settings of a short run; those an older TRL does not know are left out."""
    given = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "num_generations": 4,
        "gradient_accumulation_steps": 2, "max_completion_length": 8, "max_steps": 2,
        "report_to": [], "logging_steps": 1, "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-2, "bf16": False, "temperature": TEMPERATURE,
        "seed": 3, "beta": 0.0, **settings,
    }  # fmt: skip
    known = {f.name for f in dataclasses.fields(kind)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**{name: value for name, value in given.items() if name in known})


def toy_trainer(
    out: Path,
    kind: type[GRPOTrainer] = GRPOTrainer,
    *,
    model: Any = None,
    lora: Any = None,
    reward: Any = digits,
    eval_dataset: Any = None,
    config: Any = GRPOConfig,
    **settings: Any,
) -> Any:
    """Build a trainer on a fresh toy model."""
    args = toy_config(out, config, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            toy_model() if model is None else model,
            reward,
            args=args,
            train_dataset=toy_dataset(),
            eval_dataset=eval_dataset,
            processing_class=toy_tokenizer(),
            **({"peft_config": lora} if lora is not None else {}),
        )


def run(trainer: Any) -> dict[str, torch.Tensor]:
    """Train and return a copy of the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


class WatchesLoss:
    """Keeps what every loss was given, so that its gradient can be taken again by autograd."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[tuple[int, dict[str, Any], Any]] = []
        self._scored: Any = None
        self._leaf: Any = None
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._leaf is not None:
            return self._leaf
        self._scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._scored

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        if self._leaf is None and self.model.training:
            scored = [None if t is None else t.detach().clone() for t in self._scored]
            self.calls.append((self.state.global_step + 1, dict(inputs), scored))
        return loss

    def expected(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """-dL/dlogp of every pass, (B, T), by autograd through TRL's own loss; after training."""
        self.model.train()
        results = []
        for _, inputs, (logps, *others) in self.calls:
            leaf = logps.requires_grad_()
            self._leaf = (leaf, *others)
            loss = self._compute_loss(self.model, inputs)
            scaled = getattr(self, "loss_is_scaled_for_ga", None)
            if scaled is None:  # transformers 4; TRL 0.21 leaves the division to it
                scaled = getattr(self, "compute_loss_func", None) is not None
            scale = 1 if scaled else self.current_gradient_accumulation_steps
            # transformers 5.0 to 5.2 let accelerate divide too; with later ones this is 1.
            scale *= self.accelerator.gradient_accumulation_steps
            (grad,) = torch.autograd.grad(loss / scale, leaf)
            results.append((-grad, inputs))
        self._leaf = None
        return results


class WatchedLoss(WatchesLoss, GRPOTrainer):
    """A GRPOTrainer that keeps what its loss was given."""


def mask_of(inputs: dict[str, Any]) -> torch.Tensor:
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def collect_tokens(recorder: Any) -> list[Any]:
    """Let a recorder also keep the token records of every step, before they are rounded."""
    steps: list[Any] = []
    settle = recorder.settle

    def keep(step: int, texts: Any = None) -> Any:
        steps.append(settle(step, texts))
        return steps[-1]

    recorder.settle = keep
    return steps


def full_softmax(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """logp, entropy, S and Q of the loss tokens, float64, from whole softmaxes, (N,) each."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    width = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    logp = torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)[mask_of(inputs)]
    index = inputs["completion_ids"][mask_of(inputs)].unsqueeze(1)
    p = logp.exp()
    chosen = {"logp": logp, "square": p**2, "square_logp": p**2 * logp}
    own = {name: values.gather(1, index).squeeze(1) for name, values in chosen.items()}
    return {
        "logp": own["logp"],
        "entropy": -(p * logp).sum(-1),
        "collision_rest": (p**2).scatter(1, index, 0.0).sum(-1),
        "collision_logp_rest": (p**2 * logp).scatter(1, index, 0.0).sum(-1),
    }
