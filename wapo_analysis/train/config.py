"""Settings of a training run: one frozen dataclass, readable from TOML, and what they decide."""

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from wapo_analysis.declare import (
    Limit,
    above_zero,
    between,
    check_settings,
    declared_settings,
    one_of,
    setting,
    typed_values,
)
from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig, ObjectiveSettings
from wapo_analysis.objectives.table import OBJECTIVES

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from wapo_analysis.train.tasks import Task

_SHARE = Limit(lambda value: 0 <= value < 1, "in [0, 1)")
_TOML_WORDS = ("true", "false", "inf", "nan", "none")
_STEPS = _TOKENS = between(1, 10_000_000)
_EVERY = between(0, 10_000_000)
#: Most rollouts of a step; no published run comes near.
MAX_ROLLOUTS = 131_072
BATCHED = "continuous-batching"
_ROWS = between(1, MAX_ROLLOUTS)
#: Most completions of one evaluation.
MAX_EVALUATED = 1_000_000


# fmt: off
@dataclass(frozen=True, kw_only=True)
class _Objective:
    """The setting that stands before those of the objective."""

    objective: str = setting(
        "grpo", "What is optimised, see docs/objectives.md.", one_of(*OBJECTIVES), cli=True)

_CONFIG_BYTES = 1 << 20  # most bytes of a settings file


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ObjectiveSettings, _Objective):
    """Everything that decides a run; written whole to its manifest.

    Each setting is declared once, by `declare.setting`: its limits, its option of ``wapo train``,
    whether a continued run or a fork may change it, and its line of docs/training.md. Raises
    UserError on values out of range, naming the field, the value and what is allowed.
    """

    task: str = setting(
        "chain-sum", "What is trained on: embedded, a data format, or a reward of your own; "
        "wapo tasks lists them.", forkable=False, cli=True)
    data: str | None = setting(
        None, "Data of the task: a file, a folder, a hub name, or the settings of a reasoning-gym "
        "data set.", unset="none", forkable=False, cli=True)
    eval_data: str | None = setting(
        None, "Held-out problems, in the form of data.", unset="a part of data",
        resumable=True, cli=True)
    eval_fraction: float = setting(
        0.05, "Share of data held out where there is no eval_data.", _SHARE, forkable=False)
    context_words: int = setting(
        800, "hotpotqa: most words of paragraphs in a prompt.", _TOKENS, forkable=False)
    model: str = setting(
        "base", "Policy to start from: base (shipped), a folder, a hub name, a .gguf file, or "
        "smollm2.", forkable=False, cli=True)
    precision: str = setting(
        "auto", "bf16-mixed: float32 weights and optimizer, bfloat16 products in scoring, backward "
        "and sampling, frozen weights beside LoRA in bfloat16. auto: bf16-mixed on a GPU, float32 "
        "on a CPU and with probes.", one_of("auto", "float32", "bf16-mixed"), forkable=False,
        cli=True)
    deterministic: bool = setting(
        False, "On a GPU too: the same settings give the same weights bit by bit; slower.",
        resumable=True)
    gradient_checkpointing: bool = setting(
        False, "Compute layers again in the backward pass: less memory, same update, a third more "
        "time.", resumable=True)
    lora_rank: int | None = setting(
        None, "Train low-rank adapters of this rank beside frozen weights.", between(1, 16_384),
        unset="all weights are trained", forkable=False, cli=True)
    lora_alpha: float | None = setting(
        None, "Adapters count alpha / rank times.", above_zero(1e6), unset="twice the rank",
        forkable=False)
    lora_targets: tuple[str, ...] = setting(
        ("all-linear",), "Layers that get adapters, by name; all-linear is every linear layer but "
        "the output head.", Limit(lambda names: len(names) > 0 and all(names), "names of layers"),
        forkable=False)

    chat: str = setting(
        "auto", "Use the tokenizer's chat template; auto does if there is one.",
        one_of("auto", "on", "off"), forkable=False)
    system_prompt: str | None = setting(
        None, "System prompt of the chat template.", unset="the template's own", forkable=False)
    stop: tuple[str, ...] = setting(
        (), "Texts that end a completion, beside the model's end tokens.",
        Limit(all, "texts that are not empty"))
    max_prompt_tokens: int | None = setting(
        None, "Longer prompts lose their beginning.", _TOKENS,
        unset="one that does not fit is refused", resumable=True)
    sampler: str = setting(
        "built-in", "What samples; continuous-batching is transformers' own.",
        one_of("built-in", BATCHED))
    sample_batch_size: int | None = setting(
        None, "Rollouts sampled at once; does not change the samples.", _ROWS, unset="all",
        resumable=True)
    temperature: float = setting(
        1.0, "Softmax temperature of sampling and training.", above_zero(1000, 1e-6), cli=True)
    max_new_tokens: int | None = setting(
        None, "Longest completion, in tokens.", _TOKENS, unset="the task's own", cli=True)

    steps: int = setting(100, "Batches of rollouts.", _STEPS, resumable=True, cli=True)
    prompts_per_step: int = setting(
        16, "Prompts (groups) in a batch.", _ROWS, forkable=False, cli="--prompts")
    rollouts_per_prompt: int = setting(
        8, "Completions per prompt (group size).", between(2, MAX_ROLLOUTS), cli="--rollouts")
    epochs: int = setting(1, "Passes over each batch.", between(1, 1000), cli=True)
    minibatches: int = setting(4, "Optimizer updates per pass.", _ROWS, cli=True)
    microbatch_size: int | None = setting(
        None, "Rollouts per forward pass: smaller takes less memory and does not change the "
        "update.", _ROWS, unset="the whole mini-batch; on a GPU as many tokens as its memory has "
        "room for", resumable=True, cli=True)

    lr: float = setting(5e-5, "Peak learning rate.", above_zero(1000), cli=True)
    lr_schedule: str = setting(
        "constant", "Course after the warm-up; linear and cosine fall to zero over the steps.",
        one_of("constant", "linear", "cosine"))
    optimizer: str = setting(
        "adamw", "sgd has no momentum (betas are then not used).", one_of("adamw", "sgd"),
        forkable=False, cli=True)
    warmup_steps: int = setting(0, "Steps of linear warm-up.", _EVERY)
    weight_decay: float = setting(0.0, "Weight decay of the optimizer.", between(0, 100))
    beta1: float = setting(0.9, "AdamW beta1.", _SHARE)
    beta2: float = setting(0.999, "AdamW beta2.", _SHARE)
    max_grad_norm: float = setting(
        1.0, "Gradient norm clip; 0 switches it off.", between(0, 1e9))

    seed: int = setting(
        0, "Decides prompts and sampling.", between(0, 2**63 - 1), forkable=False, cli=True)
    device: str = setting(
        "auto", "Where it runs; auto takes a GPU if there is one.", one_of("auto", "cpu", "cuda"),
        resumable=True, cli=True)
    engine: str = setting("built-in", "Who trains: our own loop, or TRL (docs/scale.md).",
        one_of("built-in", "trl"), forkable=False, cli=True)
    trl_settings: tuple[str, ...] = setting(
        (), "NAME=VALUE for TRL's GRPOConfig.", resumable=True, forkable=False, cli="--trl")
    checkpoint_every: int = setting(
        50, "Steps between checkpoints; 0 keeps only the last one.", _EVERY, resumable=True)
    keep_checkpoints: int = setting(
        2, "Checkpoints that are kept; older ones are deleted.", _STEPS, resumable=True)
    log_to: str = setting(
        "none", "Copy the step log to TensorBoard or Weights & Biases.",
        one_of("none", "tensorboard", "wandb", "both"), resumable=True, cli=True)
    label: str | None = setting(
        None, "Name in figures; runs that share it count as seeds of one setting.",
        Limit(lambda text: 0 < len(text) <= 200, "1 to 200 characters"),
        unset="objective and classes", resumable=True)

    eval_every: int = setting(
        0, "Steps between evaluations on held-out prompts (one before, one after training); 0 "
        "never.", _EVERY, resumable=True, cli=True)
    eval_prompts: int = setting(
        64, "Held-out prompts of an evaluation.", between(1, 100_000), resumable=True)
    eval_samples: int = setting(
        4, "Completions of each held-out prompt; pass@1, pass@2, pass@4 ... up to this number.",
        between(1, 10_000), resumable=True)

    token_every: int = setting(
        1, "Write token rows of every n-th step; class totals are exact at every step.", _EVERY,
        resumable=True)
    token_fraction: float = setting(
        1.0, "Share of rollouts whose token rows are written.",
        Limit(lambda value: 0 < value <= 1, "in (0, 1]"), resumable=True, cli=True)
    topk: int = setting(
        8, "Most probable tokens that are recorded at the positions of four rollouts of a step "
        "with token rows; 0 records none.", between(0, 127), resumable=True)
    on_warning: str = setting(
        "none", "Guard: what a new warning of the diagnosis leads to, see docs/guard.md.",
        one_of("none", "checkpoint"), resumable=True, cli=True)
    on_critical: str = setting(
        "none", "Guard: what a new critical finding leads to; stop ends the run after a "
        "checkpoint.", one_of("none", "checkpoint", "stop"), resumable=True, cli=True)
    audit: bool = setting(
        False, "Print what the trainer really computes after the third step, see docs/audit.md.",
        resumable=True)
    store_bits: int = setting(
        15, "Mantissa bits that float32 columns keep on disk; 23 keeps all.", between(7, 23),
        resumable=True)
    capture_mode: str | None = setting(
        None, "Read statistics off the logits (passive), or make no logits at all (replace); auto "
        "decides by the memory that is free.", one_of("passive", "replace", "auto"),
        unset="passive; replace on a GPU from 32,769 tokens of vocabulary", resumable=True)
    rescore_every: int = setting(
        10, "Score tokens again after the update on every n-th step; 0 never.", _EVERY,
        resumable=True)
    probe_every: int = setting(
        0, "Decompose one update of every n-th step by class, see docs/attribution.md; 0 never.",
        _EVERY, resumable=True, cli=True)
    probe_rows: int | None = setting(
        32, "Rollouts that a probe scores.", _ROWS, unset="the whole mini-batch", resumable=True,
        cli=True)
    # fmt: on

    def __post_init__(self) -> None:
        check_settings(self)
        if self.probe_every and self.precision == "bf16-mixed":
            raise UserError(
                "probe_every needs precision float32: bfloat16 products do not resolve the share "
                "of one class in a step"
            )
        rollouts = self._product("prompts_per_step", "rollouts_per_prompt", MAX_ROLLOUTS)
        self._product("eval_prompts", "eval_samples", MAX_EVALUATED)
        if rollouts % self.minibatches:
            raise UserError(f"minibatches must be a divisor of {rollouts}, got {self.minibatches}")
        if self.trl_settings and self.engine != "trl":
            raise UserError("trl_settings are for engine trl; set engine to trl")
        from wapo_analysis.train.tasks import check_task

        check_task(self.task, self.data, self.eval_data, self.eval_fraction)
        self.objective_config(max_new_tokens=1)  # checks its own fields

    def _product(self, first: str, second: str, most: int) -> int:
        product = int(getattr(self, first) * getattr(self, second))
        if product > most:
            raise UserError(f"{first} times {second} must be at most {most}, got {product}")
        return product

    def objective_config(self, max_new_tokens: int) -> ObjectiveConfig:
        """Settings of the objective; ``max_new_tokens`` fills WAPO's length if none is set."""
        own = {field.name: getattr(self, field.name) for field in fields(ObjectiveSettings)}
        own["max_seq_len"] = self.max_seq_len or max_new_tokens
        return ObjectiveConfig(name=self.objective, **own)

    def load_task(self) -> "Task":
        """The task with its data; read once as long as the files stay as they are.

        Raises UserError if the data cannot be used.
        """
        from wapo_analysis.train.tasks import get_task

        return get_task(
            self.task,
            self.data,
            eval_data=self.eval_data,
            eval_fraction=self.eval_fraction,
            context_words=self.context_words,
        )

    def mixed(self, device: "torch.device") -> bool:
        """Whether products are bfloat16 on a device."""
        if self.precision == "auto":
            return device.type != "cpu" and not self.probe_every
        return self.precision == "bf16-mixed"

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, from 1.

        Warm-up: lr step / warmup_steps. After it, with N steps to go and n of them done, linear is
        lr (1 - n / N) and cosine lr (1 + cos(pi n / N)) / 2, so the last step still moves.
        """
        warmup = self.warmup_steps
        if step <= warmup:
            return self.lr * (step / warmup)
        done = min((step - 1 - warmup) / max(self.steps - warmup, 1), 1.0)
        if self.lr_schedule == "linear":
            return self.lr * (1.0 - done)
        if self.lr_schedule == "cosine":
            return self.lr * (1.0 + math.cos(math.pi * done)) / 2.0
        return self.lr

    def make_optimizer(self, parameters: Iterable["Tensor"]) -> "Optimizer":
        """The optimizer of the run, in its first state."""
        from torch.optim import SGD, AdamW

        common: Any = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return SGD(parameters, **common)
        return AdamW(parameters, betas=(self.beta1, self.beta2), fused=True, **common)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a step ends with a checkpoint: every n-th and the last one."""
        every = self.checkpoint_every
        return step == self.steps or (every > 0 and step % every == 0)

    def evaluation_due(self, step: int) -> bool:
        """Whether a step ends with an evaluation: every n-th and the last one."""
        every = self.eval_every
        return every > 0 and (step % every == 0 or step == self.steps)

    @property
    def shown_label(self) -> str:
        """Name of the setting in figures: the label, else objective and classes."""
        if self.label:
            return self.label
        words = [self.objective.upper().replace("_", " ")]
        if self.include_bins:
            words.append(f"{'+'.join(self.include_bins)} only")
        if self.exclude_bins:
            words.append(f"without {'+'.join(self.exclude_bins)}")
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: Self | None = None) -> Self:
        """Build from plain values, on top of ``base`` if given.

        Raises UserError on an unknown name or a value of the wrong type.

        Notes
        -----
        ``dtype`` of runs and files of before 0.2 is read as the precision that took its place.
        """
        clean = typed_values(cls, _renamed(values))
        return replace(base, **clean) if base is not None else cls(**clean)

    @classmethod
    def from_toml(cls, file: Path) -> Self:
        """Read a flat TOML file of settings.

        Raises UserError if the file is missing, is no TOML, or holds an unknown setting.
        """
        from wapo_analysis.store.files import open_regular

        try:
            with open_regular(file, _CONFIG_BYTES) as stream:
                values = tomllib.loads(stream.read().decode("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read config {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"config {file} is not valid TOML: {error}") from error
        return cls.from_dict(values)

    def changed(self) -> dict[str, Any]:
        """Settings off their default."""
        declared = declared_settings(type(self))
        values = {name: getattr(self, name) for name in declared}
        return {name: v for name, v in values.items() if v != declared[name].default}

    def options(self) -> list[str]:
        """Options of ``wapo train`` that give these settings again."""
        words, declared = [], declared_settings(type(self))
        for name, value in self.changed().items():
            if declared[name].option and value is not None:
                words += [declared[name].option, _as_option(value)]
            else:
                words += ["--set", f"{name}={_as_toml(value)}"]
        return words


def _renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings with ``dtype``, as it was called, told as ``precision``."""
    if "dtype" not in values:
        return values
    kinds = {"float32": "float32", "bfloat16": "bf16-mixed"}
    if values["dtype"] not in kinds:
        raise UserError(
            f"dtype is now precision; allowed: auto, float32, bf16-mixed, got {values['dtype']!r}"
        )
    others = {name: value for name, value in values.items() if name != "dtype"}
    return {"precision": kinds[values["dtype"]], **others}


def _as_option(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _as_toml(value: Any) -> str:
    """A setting's value as TOML, with none for None."""
    if value is None:
        return "none"
    plain = isinstance(value, str) and value.isidentifier() and value not in _TOML_WORDS
    return str(value) if plain else json.dumps(value)
