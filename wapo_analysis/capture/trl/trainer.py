"""What a TRL trainer is: the only place that reads its attributes.

A `TrlTrainer` is built once per attach; everything else in this folder asks it.

Shapes: B rollouts of a gradient pass, T completion positions.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wapo_analysis.capture.lm_head import inner_model, rows_of
from wapo_analysis.errors import UserError
from wapo_analysis.objectives.table import rollout_surrogate
from wapo_analysis.settings import steps_per_batch
from wapo_analysis.store import Manifest

SCORER = "_get_per_token_logps_and_entropies"
#: Key under which old per-token log-probabilities travel where the trainer keeps only their sum.
OLD_LOGPS = "wapo_old_logps"
_NEEDED = ("_compute_loss", "_generate_and_score_completions", "training_step", "add_callback")
_KNOWN = ("GRPOTrainer", "RLOOTrainer", "GMPOTrainer")
_CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_CONFIG = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "num_generations", "num_iterations", "max_prompt_length",
    "max_completion_length", "temperature", "top_p", "top_k", "beta", "use_bias_correction_kl",
    "epsilon", "epsilon_high", "delta", "loss_type", "scale_rewards", "importance_sampling_level",
    "top_entropy_quantile",
    "mask_truncated_completions", "entropy_coef", "off_policy_mask_threshold", "use_vllm",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "max_grad_norm",
    "max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type", "optim", "bf16", "fp16",
    "output_dir",
)  # fmt: skip
#: Entries of the trainer's own log that are columns of ours.
_LOGGED_AS = {"kl": "kl_ref", "frac_reward_zero_std": "groups_flat"}
#: Beginnings of entries that are kept under the trainer's own name.
_LOGGED_TOO = ("sampling/", "rewards/", "eval/")


def kind_of(trainer: Any) -> str:
    """Which of TRL's trainers it is or derives from.

    Raises UserError naming the object's type, what is in the way and what is allowed.
    """
    classes = type(trainer).__mro__
    missing = [name for name in _NEEDED if not callable(getattr(trainer, name, None))]
    theirs = [c for c in classes if c.__module__.startswith("trl.") and c.__name__[0] != "_"]
    if not missing and not theirs:
        return _KNOWN[0]
    if not missing and theirs[0].__name__ in _KNOWN:
        return theirs[0].__name__
    why = f"it has no {missing[0]}" if missing else f"the loss of {theirs[0].__name__} is not known"
    raise UserError(
        f"cannot attach to {type(trainer).__name__}: {why}; allowed are trl's GRPOTrainer (0.21 or "
        "newer), RLOOTrainer and GMPOTrainer and its subclasses; watch a loop of your own with "
        "wapo_analysis.Recorder"
    )


def hidden_tensors(trainer: Any) -> str | None:
    """Name what keeps per-token tensors to itself, None if nothing does."""
    kinds = type(trainer).__mro__
    if any("unsloth" in f"{kind.__module__}.{kind.__name__}".lower() for kind in kinds):
        return "Unsloth's compiled trainer"
    uses_liger = getattr(trainer, "use_liger_loss", False) or getattr(
        trainer, "use_liger_kernel", False
    )
    if uses_liger and hasattr(trainer, "liger_grpo_loss"):
        return "Liger's fused GRPO loss (use_liger_kernel / use_liger_loss)"
    if not callable(getattr(trainer, SCORER, None)):
        return f"a trainer without {SCORER}"
    return None


def causal_model(trainer: Any) -> Any:
    """Return the causal language model inside distributed wrappers and PEFT."""
    return inner_model(trainer.accelerator.unwrap_model(trainer.model))


def most_dropout(model: Any) -> float:
    """Largest dropout of a model, by its modules and its settings; 0 if it has none."""
    found = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    settings = vars(getattr(model, "config", None) or object)
    found += [v for n, v in settings.items() if "dropout" in n and isinstance(v, int | float)]
    return float(max(found, default=0.0))


def logps_and_entropies(scored: Any) -> tuple[Tensor | None, Tensor | None]:
    """Pick both tensors from whatever the trainer's scoring returns: tuple, dict or tensor."""
    if isinstance(scored, Tensor):
        return scored, None
    if isinstance(scored, Mapping):
        return scored.get("logps"), scored.get("entropies")
    return scored[0], scored[1] if len(scored) > 1 else None


def behaviour_logps(inputs: Mapping[str, Any], logps_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What a sampling engine reported, else the trainer's old log-probabilities; and the latter."""
    old: Tensor | None = inputs.get("old_per_token_logps")
    old = logps_BT.detach() if old is None else old
    sampler = inputs.get("sampling_per_token_logps")
    return (old if sampler is None else torch.where(sampler.isnan(), old, sampler)), old


def loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens of the loss: completion tokens that no tool wrote, bool of shape (B, T)."""
    mask: Tensor = inputs["completion_mask"].bool()
    tools = inputs.get("tool_mask")
    return mask if tools is None else mask & tools.bool()


@dataclass(frozen=True)
class ClipRule:
    """Clip of the surrogate; no bounds for losses whose clip keeps gradient."""

    #: A ratio below ``low`` stops a token with A < 0, one above ``high`` a token with A > 0.
    low: float = -torch.inf
    high: float = torch.inf
    #: Largest ratio of the unclipped term (two-sided clipping): above it, and above ``high``, a
    #: token with A < 0 is stopped.
    delta: float = torch.inf
    #: Whose ratio it is: the token's own, or the rollout's by mean or sum of the log-ratios.
    level: Literal["token", "mean", "sum"] = "token"

    def clipped(self, log_ratio_BT: Tensor, mask_BT: Tensor, advantage_BT: Tensor) -> Tensor:
        """Tokens whose gradient the clip takes away.

        Returns bools, shape (B, T). ``log_ratio_BT``, ``mask_BT``, ``advantage_BT`` (B, T): ln(pi /
        pi_old) in nats, loss mask, advantage.
        """
        if self.level != "token":
            total = (log_ratio_BT * mask_BT).sum(dim=1, keepdim=True)
            count = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
            log_ratio_BT = total if self.level == "sum" else total / count
        ratio = log_ratio_BT.exp()
        # min(min(x, delta) A, clamp(x) A): which branch holds, and whether x is in it.
        stopped = (ratio > min(self.high, self.delta)) & (advantage_BT > 0)
        stopped = stopped | ((ratio < self.low) & (advantage_BT < 0))
        above = (ratio > max(self.high, self.delta)) & (advantage_BT < 0)
        return (stopped | above) & mask_BT.bool()


def clip_rule(trainer: Any, kind: str) -> ClipRule:
    """Clip rule in force: of our objective if `use_objective` is on, else of trainer and loss."""
    low, high = (float(getattr(trainer, f"epsilon_{side}", 0.2)) for side in ("low", "high"))
    own = getattr(trainer, "_wapo_objective", None)
    if own is not None:
        for_all = own.token_loss is rollout_surrogate
        high = own.bounds.high if own.uses_ratio else torch.inf
        low = own.bounds.low if own.uses_ratio else -torch.inf
        return ClipRule(low, high, level="mean" if for_all else "token")
    if kind == "RLOOTrainer":  # one ratio for the whole completion
        return ClipRule(1 - low, 1 + high, level="sum")
    if kind == "GMPOTrainer":  # the bounds are those of the log-ratio of each token
        bounds = torch.tensor([-low, high]).exp().tolist()
        return ClipRule(*bounds)
    sequence = getattr(trainer, "importance_sampling_level", "token") == "sequence"
    level: Literal["token", "mean"] = "mean" if sequence else "token"
    # TRL 0.21 has no other losses; a subclass without loss_type keeps the surrogate it inherits.
    if getattr(trainer, "loss_type", "grpo") not in _CLIPPED_LOSSES:
        return ClipRule(level=level)
    delta = getattr(trainer.args, "delta", None)
    return ClipRule(1 - low, 1 + high, torch.inf if delta is None else float(delta), level)


class TrlTrainer:
    """A trainer as far as watching needs to know it.

    Raises UserError if its loss is not known.

    Attributes
    ----------
    raw : trl.GRPOTrainer
    model : transformers.PreTrainedModel
        The causal language model inside wrappers and adapters.
    objective : str
        Name of the loss.
    hidden_by : str or None
        What keeps per-token tensors from us.
    temperature : float
    rank, processes : int
    done : int
        Steps of earlier calls of ``train()``, which count on.
    """

    def __init__(self, trainer: Any) -> None:
        self.raw, self.kind = trainer, kind_of(trainer)
        self.model = causal_model(trainer)
        self.hidden_by = hidden_tensors(trainer)
        self.temperature = float(getattr(trainer, "temperature", 1.0))
        self.rank = int(trainer.accelerator.process_index)
        self.processes = int(trainer.accelerator.num_processes)
        self.done = 0
        self._logged: dict[str, int] = {}
        wapo = getattr(trainer, "_wapo_objective", None)
        own = {"RLOOTrainer": "rloo", "GMPOTrainer": "gmpo"}.get(self.kind)
        loss = own or str(getattr(trainer, "loss_type", "grpo"))
        self.objective = loss if wapo is None else str(wapo.name)

    @property
    def clip(self) -> ClipRule:
        """Clip rule in force now: a callback may change the bounds while it trains."""
        return clip_rule(self.raw, self.kind)

    @property
    def training(self) -> bool:
        """Whether it trains, not evaluates."""
        return bool(self.raw.model.training)

    @property
    def step(self) -> int:
        """Number of the optimizer step that is under way."""
        return self.done + int(self.raw.state.global_step) + 1

    @property
    def between_batches(self) -> bool:
        """The updates on a generated batch are done, so training goes on from here as it would."""
        return int(self.raw.state.global_step) % steps_per_batch(vars(self.raw.args)) == 0

    @property
    def loss_scale(self) -> float:
        """What the back-propagated loss is multiplied by on top of the objective.

        The fp16 loss scale, and the number of processes whose gradients are averaged.
        """
        scaler = getattr(self.raw.accelerator, "scaler", None)
        return float(scaler.get_scale() if scaler is not None else 1.0) * self.processes

    @property
    def has_kl(self) -> bool:
        """A KL term puts a gradient on every token, clipped or not."""
        inside = self.kind != "RLOOTrainer" and not hasattr(self.raw, "_wapo_objective")
        return inside and float(getattr(self.raw, "beta", 0.0) or 0.0) != 0.0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        outer = self.raw.optimizer
        inner: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
        return inner

    @property
    def casts_head(self) -> bool:
        """The head is applied in float32."""
        return bool(getattr(self.raw.args, "cast_lm_head_to_fp32", False))

    def precision(self) -> AbstractContextManager[Any]:
        """Context in which the trainer computes its loss."""
        context: AbstractContextManager[Any] = self.raw.compute_loss_context_manager()
        return context

    def old_logps(
        self, inputs: Mapping[str, Any], logps_BT: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities of the behaviour policy, and of the proximal one if it is another.

        The loss's ratio is that to the proximal policy; what a sampling engine reported is the
        behaviour policy's. Shape (B, T) each; None of a loss that has but their sum.
        """
        if "old_logps" in inputs:
            return inputs.get(OLD_LOGPS), None
        behaviour, old = behaviour_logps(inputs, logps_BT)
        ours = hasattr(self.raw, "_wapo_objective")
        return behaviour, None if ours or behaviour is old else old

    def log_ratio(
        self, inputs: Mapping[str, Any], logps_BT: Tensor, old_BT: Tensor | None, mask_BT: Tensor
    ) -> Tensor:
        """ln(pi / pi_old) for the clip rule, shape (B, T); where but its sum is known, in parts."""
        if old_BT is not None:
            return logps_BT - old_BT
        total: Tensor = (logps_BT * mask_BT).sum(1) - inputs["old_logps"]
        return (total / mask_BT.sum(1).clamp(min=1)).unsqueeze(1).expand_as(logps_BT)

    def weight(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Importance weights that the loss multiplies with, broadcast to (B, T)."""
        correcting = getattr(self.raw, "use_vllm", False) and getattr(
            self.raw, "vllm_importance_sampling_correction", False
        )
        return inputs.get("importance_sampling_ratio") if correcting else None

    def sum_over_processes(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Add numbers up; every process makes the call, with the same names in the same order."""
        vector = torch.tensor(list(sums.values()), dtype=torch.float64)
        vector = vector.to(self.raw.accelerator.device)
        total = self.raw.accelerator.reduce(vector, reduction="sum").tolist()
        return dict(zip(sums, total, strict=True))

    def log(self, entries: Mapping[str, float]) -> None:
        """Add entries to the trainer's own log."""
        for name, value in entries.items():
            self.raw._metrics["train"][name].append(value)

    def logged(self) -> dict[str, float]:
        """Means of what the trainer put into its own log since the last call, as step columns."""
        found = {}
        for name, values in getattr(self.raw, "_metrics", {}).get("train", {}).items():
            column = _LOGGED_AS.get(name, name if name.startswith(_LOGGED_TOO) else None)
            new = [float(value) for value in values[self._logged.get(name, 0) :]]
            self._logged[name] = len(values)
            known = [value for value in new if math.isfinite(value)]
            if column is not None and known:
                found[column] = sum(known) / len(known)
        return found

    def forget_logged(self) -> None:
        """Take note that the trainer writes a log line, after which its lists are empty."""
        if self.training:
            self._logged.clear()

    def save(self, folder: Path) -> None:
        """Write what ``train(resume_from_checkpoint=...)`` needs, past the trainer's own limit."""
        raw, place = self.raw, str(folder)
        raw.save_model(place, _internal_call=True)
        if not raw.args.save_only_model:
            for name in ("_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"):
                if callable(write := getattr(raw, name, None)):
                    write(place)
        raw.state.save_to_json(str(folder / "trainer_state.json"))

    def manifest(self, name: str | None, label: str | None) -> Manifest:
        """Manifest of a watched run: objective, model, settings that matter, versions."""
        args, rule = self.raw.args, self.clip
        config = {key: getattr(args, key) for key in _CONFIG if hasattr(args, key)}
        config |= {"dropout": most_dropout(self.raw.model)}
        own = getattr(self.raw, "_wapo_objective", None)
        settings = {} if own is None else asdict(own)
        settings |= {"name": self.objective, "bounds": [rule.low, rule.high], "delta": rule.delta}
        if rule.level != "token":
            settings["ratio"] = f"{rule.level} of the rollout's log-ratios"
        planned = int(getattr(args, "max_steps", 0))
        parameters = list(self.raw.model.parameters())
        return Manifest.begun(
            "trl",
            ("trl", "torch", "transformers", "accelerate", "peft", "vllm"),
            name=name or f"{self.objective} seed {args.seed}",
            label=label,
            trainer=type(self.raw).__name__,
            objective=settings,
            model=getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__,
            tokenizer=type(self.raw.processing_class).__name__,
            vocabulary=rows_of(self.model.get_output_embeddings().weight),
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            seed=args.seed,
            device=str(self.raw.accelerator.device),
            processes=self.processes,
            planned_steps=planned if planned > 0 else None,
            config={key: _plain(value) for key, value in config.items()},
            not_in_coef=self.beside_logp,
        )

    @property
    def beside_logp(self) -> list[str]:
        """Parts of the loss whose gradient does not pass through the log-probabilities."""
        flags = {
            "entropy bonus": getattr(self.raw, "_entropy_bonus_enabled", False),
            "router load-balancing loss": getattr(self.raw, "aux_loss_enabled", False),
        }
        return [name for name, given in flags.items() if given]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool, str, type(None))) else str(value)
