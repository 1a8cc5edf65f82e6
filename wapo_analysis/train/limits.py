"""What each setting of a run may be, as data: a test of its value and the words for it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple


class Limit(NamedTuple):
    """A test of a value, and how it is said after "must be"."""

    holds: Callable[[Any], bool]
    allowed: str


def _at_least(low: int) -> Limit:
    return Limit(lambda value: value >= low, f"at least {low}")


def _one_of(*names: str) -> Limit:
    return Limit(lambda value: value in names, f"{', '.join(names[:-1])} or {names[-1]}")


_COUNTS = (
    "steps", "prompts_per_step", "epochs", "minibatches", "microbatch_size", "sample_batch_size",
    "max_new_tokens", "max_seq_len", "max_prompt_tokens", "context_words", "lora_rank",
    "eval_prompts", "eval_samples", "keep_checkpoints", "probe_rows",
)  # fmt: skip
_OR_NEVER = (
    "seed", "warmup_steps", "checkpoint_every", "eval_every", "token_every", "rescore_every",
    "probe_every",
)  # fmt: skip
_POSITIVE = Limit(lambda value: 0 < value < math.inf, "positive and finite")
_NOT_NEGATIVE = Limit(lambda value: value >= 0, "0 or positive")
_DECAY = Limit(lambda value: 0 <= value < 1, "in [0, 1)")

LIMITS: Final[Mapping[str, Limit]] = {
    **dict.fromkeys(_COUNTS, _at_least(1)),
    **dict.fromkeys(_OR_NEVER, _at_least(0)),
    **dict.fromkeys(("lr", "temperature", "lora_alpha"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), _NOT_NEGATIVE),
    **dict.fromkeys(("beta1", "beta2"), _DECAY),
    "rollouts_per_prompt": _at_least(2),
    "token_fraction": Limit(lambda value: 0 < value <= 1, "in (0, 1]"),
    "store_bits": Limit(lambda value: 7 <= value <= 23, "7 to 23"),
    "dtype": _one_of("float32", "bfloat16"),
    "device": _one_of("auto", "cpu", "cuda"),
    "optimizer": _one_of("adamw", "sgd"),
    "lr_schedule": _one_of("constant", "linear", "cosine"),
    "chat": _one_of("auto", "on", "off"),
    "capture_mode": _one_of("passive", "replace", "auto"),
    "log_to": _one_of("none", "tensorboard", "wandb", "both"),
    "lora_targets": Limit(lambda value: len(value) > 0 and all(value), "names of layers"),
    "stop": Limit(all, "texts that are not empty"),
}
