"""TRL's own GRPOTrainer with one bug at a time, by a subclass that changes as little as it can.

A tiny Llama on digits; the subclass does its harm where a user's subclass would: in the generated
batch, in the scoring, in the loss. Without the name of a bug it is TRL itself.

Shapes: B rollouts, T completion positions.
"""

import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import wapo_analysis

PAD, END, STEPS, GROUP = 0, 1, 3, 8
WORDS = ["<pad>", "<eos>", *"0123456789+= abcdefghij"]

BUGS = {
    "padding in the loss": "gradient on tokens after the end",
    "tokens after the end in the mask": "tokens after the end",
    "end token left out of the loss": "end token left out",
    "first token left out of the loss": "first token left out",
    "tool text in the loss": "gradient on masked tokens",
    "temperature forgotten in training": "tokens are no samples of the policy",
    "old log-probabilities at another temperature": "old log-probabilities at another temperature",
    "top-k sampling nobody declared": "tokens are no samples of the policy",
    "old log-probabilities of rounded weights": "first pass is off",
    "sampler one update behind": "stale sampler",
    "old log-probabilities taken anew": "another ratio",
    "loss divided twice by accumulation": "loss divided twice by accumulation",
    "micro-batch token means averaged": "another mean",
    "mean over the padded length": "another mean",
    "sum over tokens, no mean": "another mean",
    "token mean in the place of the rollout's": "another mean",
    "population std": "another advantage",
    "no division by the std": "another advantage",
    "std of the batch": "another advantage",
    "mean and std of the batch": "another advantage",
    "leave-one-out baseline": "another advantage",
    "advantages with the wrong sign": "advantages with the wrong sign",
    "advantages over the wrong axis": "advantages of other rollouts",
    "rewards of the neighbour": "advantages of other rollouts",
    "rewards shifted by one rollout": "rewards shifted by one rollout",
    "groups of several prompts": "groups of several prompts",
    "advantages of other rollouts in the loss": "advantages of other rollouts in the loss",
    "advantages not detached": "constant push on every token",
    "ratio inverted": "ratio inverted",
    "ratio detached": "another ratio",
    "one ratio per rollout": "another ratio",
    "clip missing": "clip does not act",
    "clip on the wrong side": "clip on the wrong side for A < 0",
    "clip without the minimum": "clip on the wrong side for A > 0",
    "clip range too narrow": "clip acts too early",
    "sign of the loss": "pushed against the advantage",
    "KL with the wrong sign": "KL with the wrong sign",
    "KL that was switched off": "gradient without advantage",
    "entropy bonus with the wrong sign": "constant push on every token",
    "duplicated rollouts": "rollouts are repeated",
    "learning rate 0": "weights do not change",
    "optimizer of other weights": "weights do not change",
    "fp16 underflow": "gradients underflow",
}
"""Bug of the TRL trainer -> name of the deviation that says so."""

SETTINGS: dict[str, dict[str, Any]] = {
    "micro-batch token means averaged": {"loss_type": "dapo", "gradient_accumulation_steps": 2},
    "loss divided twice by accumulation": {"gradient_accumulation_steps": 2},
    "learning rate 0": {"learning_rate": 0.0},
    "KL with the wrong sign": {"beta": 2.0, "num_iterations": 1, "learning_rate": 5e-2},
    "KL that was switched off": {"num_iterations": 1},
    "clip range too narrow": {"learning_rate": 5e-3},
    "sampler one update behind": {"num_iterations": 1},
    "rewards shifted by one rollout": {"sharpness": 25.0, "num_iterations": 1},
    "groups of several prompts": {"generation_batch_size": 32},
}
"""What a bug needs beside the usual settings."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def policy(folder: Path, seed: int, sharpness: float, dropout: float = 0.0) -> LlamaForCausalLM:
    """Two layers and a sharp head, loaded from a folder as TRL's reference model is."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD,
        eos_token_id=END, bos_token_id=None, attention_dropout=dropout,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def adapter(dropout: float) -> Any:
    """Settings of a LoRA adapter."""
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)


def digits(completions: list[str], **_: Any) -> list[float]:
    """Share of digits in a completion, less something for its length."""
    return [sum(c.isdigit() for c in text) / 8 - 0.01 * len(text) for text in completions]


def made_advantages(rewards: Tensor, bug: str) -> Tensor | None:
    """Advantages of a batch, shape (B,), where a bug makes them anew; None where it does not."""
    table = rewards.view(-1, GROUP)
    if bug == "advantages over the wrong axis":
        table = rewards.view(GROUP, -1).T
    if bug == "rewards of the neighbour":
        table = rewards.roll(1).view(-1, GROUP)
    centred = table - table.mean(1, keepdim=True)
    made = centred / (table.std(1, keepdim=True) + 1e-4)
    if bug == "population std":
        made = centred / (table.std(1, keepdim=True, correction=0) + 1e-4)
    elif bug == "no division by the std":
        made = centred
    elif bug == "std of the batch":
        made = centred / (rewards.std() + 1e-4)
    elif bug == "mean and std of the batch":
        made = (table - rewards.mean()) / (rewards.std() + 1e-4)
    elif bug == "leave-one-out baseline":
        made = centred * GROUP / (GROUP - 1)
    elif bug == "advantages with the wrong sign":
        made = -made
    elif bug not in ("advantages over the wrong axis", "rewards of the neighbour"):
        return None
    return (made.T if bug == "advantages over the wrong axis" else made).reshape(-1)


def surrogate(bug: str, ratio: Tensor, weight: Tensor, logps: Tensor) -> Tensor | None:
    """Token losses of a bug in the surrogate, shape (B, T); None where TRL's own stand."""
    plain, held = ratio * weight, ratio.clamp(0.8, 1.2) * weight
    least = torch.minimum(plain, held)
    return {
        "ratio inverted": -torch.minimum(1 / ratio * weight, (1 / ratio).clamp(0.8, 1.2) * weight),
        "ratio detached": -weight * logps,
        "sign of the loss": least,
        "clip missing": -plain,
        "clip without the minimum": -held,
        "clip on the wrong side": -torch.where(weight < 0, torch.maximum(plain, held), least),
        "clip range too narrow": -torch.minimum(plain, ratio.clamp(0.95, 1.05) * weight),
        "fp16 underflow": -least * 2e-4,
        "sum over tokens, no mean": -least,
        "mean over the padded length": -least,
        "advantages not detached": -least,
        "entropy bonus with the wrong sign": -least - 0.05 * logps,
        "KL that was switched off": -least,
    }.get(bug)


def _rounded(weights: Tensor) -> Tensor:
    """Weights as 4 bits hold them."""
    step = weights.abs().max() / 7
    return (weights / step).round() * step


class BuggyTrainer(GRPOTrainer):
    """GRPOTrainer with one bug, or none; ``engine`` is the noise of a sampler of its own."""

    bug, engine = "", 0.0
    _behind: dict[str, Tensor] | None = None
    _cold = False

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if self.bug == "groups of several prompts":
            sampler.batch_size *= sampler.mini_repeat_count
            sampler.num_samples, sampler.mini_repeat_count = len(sampler.data_source), 1
        return sampler

    def _generate(self, prompts: list[Any]) -> Any:
        """Completions; a sampler that is behind uses the weights of an update before."""
        if self.engine:
            return self._as_engine(prompts)
        if self.bug != "sampler one update behind":
            return super()._generate(prompts)
        now = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self.model.load_state_dict(self._behind or now)
        made = super()._generate(prompts)
        self._sampled_by, self._behind = self._behind or now, now
        self.model.load_state_dict(now)
        return made

    def _as_engine(self, prompts: list[Any]) -> Any:
        """What an engine like vLLM gives: log-probabilities that are nearly those of training."""
        self.use_vllm = False
        ids, done, mask, texts, _, extra, *images = super()._generate(prompts)
        self.use_vllm = True
        logps = []
        for prompt, tokens in zip(ids, done, strict=True):
            with torch.no_grad():
                logits = self.frozen(torch.tensor([prompt + tokens])).logits[
                    0, len(prompt) - 1 : -1
                ]
            every = (logits + self.engine * torch.randn_like(logits)).log_softmax(-1)
            logps.append(every.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist())
        return ids, done, mask, texts, logps, extra, *images

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards = super()._calculate_rewards(*args, **kwargs)
        return rewards.roll(1, 0) if self.bug == "rewards shifted by one rollout" else rewards

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        ids, logps = super()._generate_single_turn(*args, **kwargs)
        if self.bug == "duplicated rollouts":
            ids = [ids[row // 2 * 2] for row in range(len(ids))]
        return ids, logps

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards = torch.tensor(list(self._logs["rewards"]["digits"])[-len(batch["advantages"]) :])
        made = made_advantages(rewards.to(batch["advantages"].dtype), self.bug)
        batch["advantages"] = batch["advantages"] if made is None else made
        mask = batch["completion_mask"]
        if self.bug == "tokens after the end in the mask":
            batch["completion_mask"] = torch.ones_like(mask)
        if self.bug == "tool text in the loss":
            place = torch.arange(mask.shape[1])
            batch["tool_mask"] = ((place < 2) | (place > 3)).long().expand_as(mask).clone()
        if self.bug == "old log-probabilities of rounded weights":
            weights = {n: _rounded(t) for n, t in self.model.state_dict().items()}
            batch["old_per_token_logps"] = self._scored_by(weights, batch)
        if self.bug == "sampler one update behind":
            batch["old_per_token_logps"] = self._scored_by(self._sampled_by, batch)
        return batch

    @torch.no_grad()
    def _scored_by(self, weights: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of a batch under other weights, shape (B, T)."""
        now = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self.model.load_state_dict(weights)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        scored = super()._get_per_token_logps_and_entropies(
            self.model, ids, mask, batch["completion_ids"].shape[1]
        )[0]
        self.model.load_state_dict(now)
        return scored

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if (
            self.bug == "old log-probabilities at another temperature"
            and not torch.is_grad_enabled()
        ):
            # As a sampler that divides the logits by 2 has them: one more softmax is needed.
            ids, mask, keep = args[1], args[2], args[3]
            logits = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            logits = self.model.lm_head(logits)[:, -keep - 1 : -1] / 2
            logp = logits.log_softmax(-1).gather(-1, ids[:, -keep:, None])[..., 0]
            return (logp, *scored[1:])
        self._logps = scored[0]
        return scored

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        inputs = dict(inputs)
        mask, ids = inputs["completion_mask"], inputs["completion_ids"]
        place = torch.arange(mask.shape[1])
        if self.bug == "padding in the loss":
            inputs["completion_mask"] = torch.ones_like(mask)
        elif self.bug == "tool text in the loss":
            inputs.pop("tool_mask")
        elif self.bug == "end token left out of the loss":
            inputs["tool_mask"] = (ids != END).long()
        elif self.bug == "first token left out of the loss":
            inputs["tool_mask"] = (place > 0).long().expand_as(mask)
        elif self.bug == "advantages of other rollouts in the loss":
            inputs["advantages"] = inputs["advantages"].roll(1)
        elif self.bug == "old log-probabilities taken anew":
            inputs.pop("old_per_token_logps")
        loss = self._own_loss(model, inputs)
        if self.bug == "loss divided twice by accumulation":
            loss = loss / self.current_gradient_accumulation_steps
        return loss

    def _own_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        switched = {
            "micro-batch token means averaged": ("loss_type", "bnpo"),
            "token mean in the place of the rollout's": ("loss_type", "dapo"),
            "one ratio per rollout": ("importance_sampling_level", "sequence"),
            "KL with the wrong sign": ("beta", -self.beta),
        }.get(self.bug)
        if switched is not None:
            before = getattr(self, switched[0])
            setattr(self, *switched)
            loss: Tensor = super()._compute_loss(model, inputs)
            setattr(self, switched[0], before)
            return loss
        own = super()._compute_loss(model, inputs)
        return own if self._logps is None else self._rewritten(own, inputs)

    def _rewritten(self, own: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Loss of a bug in the surrogate or its mean, of the log-probabilities just scored."""
        logps, mask = self._logps, inputs["completion_mask"]
        old = inputs.get("old_per_token_logps")
        old = logps.detach() if old is None else old
        weight = inputs["advantages"][:, None]
        if self.bug == "advantages not detached":
            sure = (logps * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            weight = weight + 0.3 * (sure - sure.detach())
        used = logps.half() if self.bug == "fp16 underflow" else logps
        loss = surrogate(self.bug, (used - old.to(used.dtype)).exp(), weight, used)
        if loss is None:
            return own
        if self.bug == "KL that was switched off":
            loss = loss + 0.5 * ((self._reference(inputs) - logps).exp() + logps)
        count = self.current_gradient_accumulation_steps
        if self.bug == "sum over tokens, no mean":
            return (loss * mask).sum(1).mean() / count
        if self.bug == "mean over the padded length":
            return (loss * mask).mean(1).mean() / count
        return ((loss * mask).sum(1) / mask.sum(1)).mean() / count

    @torch.no_grad()
    def _reference(self, inputs: dict[str, Any]) -> Tensor:
        """Log-probabilities under the weights that training began with, shape (B, T)."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep = inputs["completion_ids"].shape[1]
        logits = self.frozen(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, -keep:, None])[..., 0]


def train(out: Path, bug: str = "", steps: int = STEPS, seed: int = 0, **settings: Any) -> None:
    """Train some steps of TRL with one bug, or none, and watch them."""
    torch.set_num_threads(1)
    given = {
        "per_device_train_batch_size": 32, "num_generations": GROUP, "num_iterations": 2,
        "gradient_accumulation_steps": 1, "max_steps": steps, "max_completion_length": 8,
        "learning_rate": 2e-2, "beta": 0.0, "loss_type": "grpo", "report_to": [], "use_cpu": True,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "bf16": False,
        "seed": seed + 3, **SETTINGS.get(bug, {}), **settings,
    }  # fmt: skip
    engine, lora = given.pop("engine", 0.0), given.pop("lora", 0.0)
    dtype = getattr(torch, given.pop("dtype", "float32"))
    model = policy(
        out.parent / "model", seed, given.pop("sharpness", 8.0), given.pop("dropout", 0.0)
    ).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = GRPOConfig(output_dir=str(out.parent / "trl"), **given)
        pairs = [(a, b) for a in range(10) for b in range(10)]
        trainer = BuggyTrainer(
            model, digits, args=args, processing_class=tokenizer(),
            train_dataset=Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs]}),
            peft_config=adapter(lora) if lora else None,
        )  # fmt: skip
        trainer.bug, trainer._logps, trainer.engine = bug, None, engine
        trainer.use_vllm = bool(engine)
        trainer.frozen = LlamaForCausalLM.from_pretrained(out.parent / "model").eval()
        if bug == "temperature forgotten in training":
            trainer.generation_config.temperature = 0.4
        if bug == "top-k sampling nobody declared":
            trainer.generation_config.top_k = 3
        if bug == "optimizer of other weights":
            copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
            trainer.optimizer = torch.optim.AdamW(copies, lr=2e-2)
        with wapo_analysis.attach(trainer, out, "full"):
            trainer.train()
    gc.collect()
