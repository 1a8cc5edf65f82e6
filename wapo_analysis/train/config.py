"""Settings of a training run: one frozen dataclass, readable from TOML."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.train.limits import LIMITS
from wapo_analysis.train.tasks import Task, check_task, get_task


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run; written whole to its manifest.

    Raises
    ------
    UserError
        On values out of range, naming the field, the value and what is allowed.
    """

    objective: str = "grpo"
    """Objective, one of the nine in docs/objectives.md."""
    clip_eps: float | None = None
    """Clip range of the importance ratio; None takes the objective's own."""
    mask_ratio_low: float = 0.8
    """Lower clip of the dapo family."""
    mask_ratio_high: float = 1.2
    """Upper clip of the dapo family."""
    use_importance_sampling: bool = True
    """wapo only: False drops the ratio from the loss."""
    include_bins: tuple[str, ...] = ()
    """Train on these classes only, e.g. ("neg_peak",)."""
    exclude_bins: tuple[str, ...] = ()
    """Leave these classes out of the loss."""
    loss_mean_level: str | None = None
    """seq, group or global; None takes the objective's own."""
    normalize_by_kept_tokens: bool = False
    """Divide by the tokens that stay in the loss instead of all."""
    official: bool = False
    """Reproduce the official implementation's quirks, see docs/objectives.md."""

    task: str = "chain-sum"
    """What is trained on: embedded, a data format, or a reward of your own; see docs/tasks.md."""
    data: str | None = None
    """Data of the task: a file, a folder or a hub name; settings of a reasoning-gym data set."""
    eval_data: str | None = None
    """Held-out problems, in the form of data; None holds out a part of data."""
    eval_fraction: float = 0.05
    """Share of data held out where there is no eval_data."""
    context_words: int = 800
    """hotpotqa: most words of paragraphs in a prompt."""
    model: str = "base"
    """Policy to start from: "base" (shipped), a folder, a hub name, a .gguf file, or "smollm2"."""
    dtype: str = "float32"
    """Weights: float32 or bfloat16 (LoRA adapters are float32 always)."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, same update, a third more time."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank beside frozen weights; None trains all weights."""
    lora_alpha: float | None = None
    """Adapters count alpha / rank times; None takes twice the rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers that get adapters, by name; all-linear is every linear layer but the output head."""

    chat: str = "auto"
    """Use the tokenizer's chat template: on, off, or auto (if there is one)."""
    system_prompt: str | None = None
    """System prompt of the chat template; None leaves the template's own."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the model's end tokens."""
    max_prompt_tokens: int | None = None
    """Longer prompts lose their beginning; None refuses one that does not fit the model."""
    sample_batch_size: int | None = None
    """Rollouts sampled at once; None takes all. Does not change the samples."""
    temperature: float = 1.0
    """Softmax temperature of sampling and training."""
    max_new_tokens: int | None = None
    """Longest completion; None takes the task's own."""
    max_seq_len: int | None = None
    """Length in WAPO's constant denominator; None takes max_new_tokens."""

    steps: int = 100
    """Batches of rollouts."""
    prompts_per_step: int = 16
    """Prompts (groups) in a batch."""
    rollouts_per_prompt: int = 8
    """Completions per prompt (group size)."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 4
    """Optimizer updates per pass."""
    microbatch_size: int | None = None
    """Rollouts per forward pass; None takes the whole mini-batch. Does not change the update."""

    lr: float = 5e-5
    """Peak learning rate."""
    lr_schedule: str = "constant"
    """After the warm-up: constant, or falling to zero over steps: linear, cosine."""
    optimizer: str = "adamw"
    """adamw, or sgd without momentum (betas are then not used)."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer."""
    beta1: float = 0.9
    """AdamW beta1."""
    beta2: float = 0.999
    """AdamW beta2."""
    max_grad_norm: float = 1.0
    """Gradient norm clip; 0 switches it off."""

    seed: int = 0
    """Decides prompts and sampling."""
    device: str = "auto"
    """auto, cpu or cuda."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0 keeps only the last one."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept; older ones are deleted."""
    log_to: str = "none"
    """Copy the step log to none, tensorboard, wandb or both."""
    label: str | None = None
    """Name in figures; runs that share it count as seeds of one setting."""

    eval_every: int = 0
    """Steps between evaluations on held-out prompts (one before, one after training); 0 never."""
    eval_prompts: int = 64
    """Held-out prompts of an evaluation."""
    eval_samples: int = 4
    """Completions of each held-out prompt; pass@1, pass@2, pass@4 ... up to this number."""

    token_every: int = 1
    """Write token rows of every n-th step; class totals are exact at every step."""
    token_fraction: float = 1.0
    """Share of rollouts whose token rows are written."""
    store_bits: int = 15
    """Mantissa bits that float32 columns keep on disk, 7 to 23; 23 keeps all."""
    capture_mode: str = "passive"
    """Read statistics off the logits (passive), or make no logits at all (replace); or auto."""
    rescore_every: int = 10
    """Score tokens again after the update on every n-th step; 0 never."""
    probe_every: int = 0
    """Take one update of every n-th step apart by class, see docs/attribution.md; 0 never."""
    probe_rows: int | None = 32
    """Rollouts that a probe scores; None takes the whole mini-batch."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, limit = getattr(self, field.name), LIMITS.get(field.name)
            if limit is None or (value is None and "None" in str(field.type)):
                continue
            _require(self, field.name, limit.holds(value), limit.allowed)
        if self.probe_every and self.dtype != "float32":
            raise UserError(
                "probe_every needs dtype float32: bfloat16 weights do not resolve the share of "
                "one class in a step"
            )
        rollouts = self.prompts_per_step * self.rollouts_per_prompt
        _require(self, "minibatches", rollouts % self.minibatches == 0, f"a divisor of {rollouts}")
        check_task(self.task, self.data, self.eval_data, self.eval_fraction)
        self.objective_config(max_new_tokens=1)  # checks its own fields

    def objective_config(self, max_new_tokens: int) -> ObjectiveConfig:
        """Settings of the objective; ``max_new_tokens`` fills WAPO's length if none is set."""
        return ObjectiveConfig(
            name=self.objective,
            clip_eps=self.clip_eps,
            mask_ratio_low=self.mask_ratio_low,
            mask_ratio_high=self.mask_ratio_high,
            use_importance_sampling=self.use_importance_sampling,
            include_bins=self.include_bins,
            exclude_bins=self.exclude_bins,
            loss_mean_level=self.loss_mean_level,
            normalize_by_kept_tokens=self.normalize_by_kept_tokens,
            max_seq_len=self.max_seq_len or max_new_tokens,
            official=self.official,
        )

    def load_task(self) -> Task:
        """The task with its data; read once as long as the files stay as they are.

        Raises
        ------
        UserError
            If the data cannot be used.
        """
        return get_task(
            self.task,
            self.data,
            eval_data=self.eval_data,
            eval_fraction=self.eval_fraction,
            context_words=self.context_words,
        )

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

        Raises
        ------
        UserError
            On an unknown name or a value of the wrong type.
        """
        known = {f.name: f.type for f in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown_name("setting", name, known)
        clean = {name: _typed(name, value, str(known[name])) for name, value in values.items()}
        return replace(base, **clean) if base is not None else cls(**clean)

    @classmethod
    def from_toml(cls, file: Path) -> Self:
        """Read a flat TOML file of settings.

        Raises
        ------
        UserError
            If the file is missing, is no TOML, or holds an unknown setting.
        """
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read config {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"config {file} is not valid TOML: {error}") from error
        return cls.from_dict(values)


def _require(config: TrainConfig, name: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise UserError(f"{name} must be {allowed}, got {getattr(config, name)!r}")


def _typed(name: str, value: Any, declared: str) -> Any:
    """Check a plain value against a field's declared type; ints pass as floats, lists as tuples."""
    wanted = {t.strip() for t in declared.replace("<class '", "").replace("'>", "").split("|")}
    if isinstance(value, list | tuple):
        if "tuple[str, ...]" in wanted and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif value is None:
        if "None" in wanted:
            return None
    elif type(value).__name__ in wanted:
        return value
    elif isinstance(value, int) and not isinstance(value, bool) and "float" in wanted:
        return float(value)
    raise UserError(f"{name} must be of type {declared}, got {value!r}")
