"""Policy losses as each trainer calls them, on tensors of the shapes its sources document.

Every layout holds the same batch: 4 rollouts of a 3-token prompt and up to 5 sampled tokens. The
losses here have the arguments of the trainers' own, in their order; a bigram policy makes the
log-probabilities.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.trainer_batch import (
    ADVANTAGES,
    BOUNDS,
    IDS,
    LENGTHS,
    MASK,
    OLD,
    PACKED,
    PROMPT,
    SAMPLER,
    SOLID,
    VOCAB,
    WIDTH,
    Policy,
    Shown,
    next_logp,
    packed_row,
    responses,
    surrogate,
)

# ---- the trainers' losses and how they are called ------------------------------------------------


VERL_ENGINE = SimpleNamespace(
    is_mp_src_rank_with_outputs=lambda: True,
    get_data_parallel_rank=lambda: 0,
    get_data_parallel_size=lambda: 1,
    get_data_parallel_group=lambda: None,
    train_mode=lambda **_: nullcontext(),
)


def verl_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Any = None,
) -> Any:  # fmt: skip
    loss = surrogate(log_prob, old_log_prob, advantages) * rollout_is_weights
    scale = config.global_batch_info["dp_size"]
    return (loss * response_mask).sum() / response_mask.sum() * scale, {"actor/ppo_kl": 0.0}


def call_verl(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    weights = torch.ones(4, WIDTH)
    weights[3, 0] = 0
    logp = responses(policy)
    value, _ = loss(
        old_log_prob=OLD, log_prob=logp, advantages=ADVANTAGES, response_mask=MASK,
        loss_agg_mode="token-mean", config=SimpleNamespace(global_batch_info={"dp_size": 2}),
        rollout_is_weights=weights,
    )  # fmt: skip
    return value, [(logp, MASK)]


def call_verl_unpadded(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    """verl's forward without padding: one row, positions that begin again at every text."""
    positions = torch.arange(PROMPT + WIDTH).expand(4, -1)[SOLID]
    logits = policy(input_ids=PACKED[None], position_ids=positions[None]).logits[0]
    packed = logits.log_softmax(-1).gather(-1, PACKED.roll(-1)[:, None])[:, 0]
    whole = torch.zeros(4, PROMPT + WIDTH).masked_scatter(SOLID, packed)
    logp = whole[:, PROMPT - 1 : -1]
    value, _ = loss(
        old_log_prob=OLD, log_prob=logp, advantages=ADVANTAGES, response_mask=MASK,
        config=SimpleNamespace(global_batch_info={"dp_size": 2}),
        rollout_is_weights=torch.ones(4, WIDTH),
    )  # fmt: skip
    return value, [(logp, MASK)]


def skyrl_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, config: Any,
    loss_mask: Tensor | None = None, rollout_logprobs: Tensor | None = None,
) -> Any:  # fmt: skip
    return (surrogate(log_probs, old_log_probs, advantages) * loss_mask).sum(), {"clip_ratio": 0.0}


def call_skyrl(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    logp = responses(policy)
    value, _ = loss(
        logp, OLD, ADVANTAGES, config=SimpleNamespace(), loss_mask=MASK.float(),
        rollout_logprobs=SAMPLER,
    )  # fmt: skip
    return value + 0.1 * (logp * MASK).square().mean(), [(logp, MASK)]  # its KL term


@dataclasses.dataclass
class LossInputs:
    """As prime-rl's: one sequence of a packed row, its own probability at each token."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


def prime_loss(inputs: LossInputs, kl_tau: float = 0.1) -> Any:
    ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    loss = surrogate(inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages)
    loss = ((loss + kl_tau * ratio**2) * inputs.loss_mask).sum()
    return SimpleNamespace(loss=loss, metrics={})


def call_prime(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    logp = next_logp(policy(input_ids=PACKED[None]).logits, PACKED[None])
    logp = torch.cat([torch.full((1, 1), -np.log(VOCAB)), logp], 1).squeeze()
    sizes = BOUNDS.diff().tolist()
    rows = [packed_row(v, f) for v, f in ((OLD, 0.0), (ADVANTAGES, 0.0), (MASK, 0))]
    total, shown = torch.zeros(()), []
    for one, old, advantages, mask in zip(
        logp.split(sizes), *(row.split(sizes) for row in rows), strict=True
    ):
        shown.append((one, mask))
        total = total + loss(LossInputs(one, old, None, advantages, mask)).loss
    return total / int(MASK.sum()), shown


def get_log_probs_and_entropy(logits: Tensor, **_: Any) -> Any:
    """As slime's scorer: lists of one tensor a completion."""
    ends = BOUNDS[1:].tolist()
    spans = [slice(end - int(n) - 1, end - 1) for end, n in zip(ends, LENGTHS, strict=True)]
    full = logits.squeeze(0).log_softmax(-1)
    logp = full.gather(-1, PACKED.roll(-1)[:, None])[:, 0]
    entropy = -(full.exp() * full).sum(-1).detach()
    return None, {"log_probs": [logp[s] for s in spans], "entropy": [entropy[s] for s in spans]}


def slime_loss(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    _, scored = get_log_probs_and_entropy(logits, args=args)
    SLIME_SHOWN[:] = [
        (p, m.bool()) for p, m in zip(scored["log_probs"], batch["loss_masks"], strict=True)
    ]
    with torch.no_grad():
        get_log_probs_and_entropy(logits)
    logp, old = torch.cat(scored["log_probs"]), torch.cat(batch["log_probs"])
    loss = surrogate(logp, old, torch.cat(batch["advantages"]))
    return sum_of_sample_mean(loss), {"pg_loss": loss.detach().mean()}


SLIME_SHOWN: Shown = []


def call_slime(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    def per_sample(values: Tensor) -> list[Tensor]:
        return [v[:n] for v, n in zip(values, LENGTHS.tolist(), strict=True)]

    batch = {
        "log_probs": per_sample(OLD),
        "rollout_log_probs": per_sample(SAMPLER),
        "advantages": per_sample(ADVANTAGES),
        "loss_masks": per_sample(MASK.int()),
        "unconcat_tokens": list(PACKED.split(BOUNDS.diff().tolist())),
        "response_lengths": LENGTHS.tolist(),
    }
    logits = policy(input_ids=PACKED[None]).logits
    value, _ = loss(SimpleNamespace(), batch, logits, lambda values: values.mean())
    return value, list(SLIME_SHOWN)


class NemoLoss:
    """As NeMo-RL's loss classes: called by keywords, asked for its types."""

    input_type = "logprob"

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Any, global_valid_toks: Any
    ) -> Any:
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        old, advantages = data["prev_logprobs"][:, 1:], data["advantages"][:, 1:]
        loss = surrogate(next_token_logprobs, old, advantages)
        return (loss * mask).sum() / global_valid_toks, {"loss": 0.0}


def nemo_data() -> dict[str, Tensor]:
    def whole(values: Tensor) -> Tensor:
        return torch.cat([torch.zeros(4, PROMPT, dtype=values.dtype), values], 1)

    return {
        "input_ids": IDS,
        "token_mask": whole(MASK.float()),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        "advantages": whole(ADVANTAGES),
        "prev_logprobs": whole(OLD),
        "generation_logprobs": whole(SAMPLER),
    }


def nemo_mask(data: dict[str, Tensor]) -> Tensor:
    return (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool()


def call_nemo(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    data, logp = nemo_data(), next_logp(policy(input_ids=IDS).logits, IDS)
    value, _ = loss(
        data=data, global_valid_seqs=torch.tensor(3), global_valid_toks=MASK.sum(),
        next_token_logprobs=logp,
    )  # fmt: skip
    return value, [(logp, nemo_mask(data))]


def call_nemo_packed(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    """Its sequence packing: one row for the model, one sequence for each call of the loss."""
    positions = torch.arange(PROMPT + WIDTH).expand(4, -1)[SOLID]
    logits = policy(input_ids=PACKED[None], position_ids=positions[None]).logits
    total, shown = torch.zeros(()), []
    for row, (begin, end) in enumerate(zip(BOUNDS[:-1].tolist(), BOUNDS[1:].tolist(), strict=True)):
        data = {n: v[row : row + 1] for n, v in nemo_data().items()}
        data = {n: v[:, : end - begin] if v.dim() > 1 else v for n, v in data.items()}
        logp = next_logp(logits[:, begin:end], data["input_ids"])
        value, _ = loss(
            data=data, global_valid_seqs=torch.tensor(3), global_valid_toks=MASK.sum(),
            next_token_logprobs=logp,
        )  # fmt: skip
        total = total + value
        shown.append((logp, nemo_mask(data)))
    return total, shown


def areal_loss(
    logprobs: Tensor, entropy: Tensor, input_data: dict[str, Any], eps_clip: float = 0.2, **_: Any
) -> Tensor:
    loss = surrogate(logprobs, input_data["prox_logp"], input_data["advantages"])
    mask = input_data["loss_mask"].bool()
    return (loss * mask).sum() / mask.sum()


def call_areal(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    logits = policy(input_ids=PACKED[None]).logits[0]
    full = logits.log_softmax(-1)
    logp = full.gather(-1, PACKED.roll(-1)[:, None])[:, 0]

    def rolled(values: Tensor) -> Tensor:
        row = torch.zeros(4, PROMPT + WIDTH, dtype=values.dtype)
        row[:, PROMPT:] = values
        return row.roll(-1, -1)[SOLID]

    data = {
        "input_ids": PACKED,
        "cu_seqlens": BOUNDS.int(),
        "logprobs": rolled(SAMPLER),
        "prox_logp": rolled(OLD),
        "advantages": rolled(ADVANTAGES),
        "loss_mask": rolled(MASK),
    }
    entropy = -(full.exp() * full).sum(-1).detach()
    value = loss(logp, entropy, data, vocab_min_logits=None, vocab_max_logits=None)
    return value, [(logp, data["loss_mask"])]


class OpenRlhfLoss(nn.Module):
    """As OpenRLHF's PolicyLoss."""

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor,
        action_mask: Tensor | None = None, rollout_log_probs: Tensor | None = None,
        dp_size: int = 1, batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Any:  # fmt: skip
        loss = surrogate(log_probs, old_log_probs, advantages) * action_mask
        return loss.sum() / batch_num_tokens * dp_size, loss, loss, None


def call_openrlhf(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    logp = responses(policy)
    value, *_ = loss(
        logp, OLD, ADVANTAGES, action_mask=MASK, rollout_log_probs=None, dp_size=4,
        batch_num_tokens=float(MASK.sum()), global_batch_size=4.0,
    )  # fmt: skip
    return value, [(logp, MASK)]


class SwiftTrainer:
    """As ms-swift's GRPOTrainer: the loss is a method that scores by another."""

    def _get_per_token_logps_and_entropies(
        self, model: Policy, model_inputs: Any, grpo_batch: Any, compute_entropy: bool = False
    ) -> Any:
        logits = model(**model_inputs).logits
        full = logits.log_softmax(-1)
        entropy = -(full.exp() * full).sum(-1).detach()[:, -WIDTH - 1 : -1]
        logp = next_logp(logits, model_inputs["input_ids"])[:, -WIDTH:]
        self.shown = [(logp, grpo_batch.completion_mask)]
        return logp, entropy if compute_entropy else None

    def _compute_loss_and_metrics(self, model: Policy, model_inputs: Any, grpo_batch: Any) -> Any:
        logp, _ = self._get_per_token_logps_and_entropies(
            model, model_inputs, grpo_batch, compute_entropy=True
        )
        loss = surrogate(logp, grpo_batch.old_per_token_logps, grpo_batch.advantages)
        mask = grpo_batch.completion_mask
        return ((loss * mask).sum(-1) / mask.sum(-1)).mean(), {}


def call_swift(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    class Trainer(SwiftTrainer):
        _compute_loss_and_metrics = loss

    trainer = Trainer()
    batch = SimpleNamespace(
        completion_mask=MASK, advantages=ADVANTAGES, old_per_token_logps=OLD,
        rollout_per_token_logps=None,
    )  # fmt: skip
    value, _ = trainer._compute_loss_and_metrics(policy, {"input_ids": IDS}, batch)
    assert "_get_per_token_logps_and_entropies" not in vars(trainer), "put back as it was"
    return value, trainer.shown


def open_instruct_loss(
    new_logprobs: Tensor, ratio: Tensor, advantages: Tensor, ref_logprobs: Any, config: Any,
    rho_weights: Tensor,
) -> Any:  # fmt: skip
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)) * rho_weights
    return losses, (ratio > 1.2).float(), torch.zeros_like(losses)


def call_open_instruct(policy: Policy, loss: Callable[..., Any]) -> tuple[Tensor, Shown]:
    def whole(values: Tensor, fill: float) -> Tensor:
        return torch.cat([torch.full((4, PROMPT - 1), fill, dtype=values.dtype), values], 1)

    mask = whole(MASK, 0)
    logp = next_logp(policy(input_ids=IDS).logits, IDS).masked_fill(~mask, 1.0)
    ratio = (logp - whole(OLD, 1.0).masked_fill(~mask, 1.0)).exp()
    losses, _, _ = loss(
        new_logprobs=logp, ratio=ratio, advantages=whole(ADVANTAGES, 0.0), ref_logprobs=None,
        config=SimpleNamespace(), rho_weights=torch.ones_like(ratio),
    )  # fmt: skip
    return (losses * mask).sum() / mask.sum(), [(logp, mask)]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A trainer's loss, its call, the factor on it, and what it does not say."""

    loss: Callable[..., Any]
    call: Callable[[Policy, Callable[..., Any]], tuple[Tensor, Shown]]
    names: str
    scale: float = 1.0
    sampler: bool = False


TRAINERS = {
    "verl": Trainer(verl_loss, call_verl, "verl", 2.0),
    "verl without padding": Trainer(verl_loss, call_verl_unpadded, "verl", 2.0),
    "skyrl": Trainer(skyrl_loss, call_skyrl, "skyrl", sampler=True),
    "prime-rl": Trainer(prime_loss, call_prime, "prime-rl"),
    "slime": Trainer(slime_loss, call_slime, "slime", sampler=True),
    "nemo-rl": Trainer(NemoLoss(), call_nemo, "nemo-rl", sampler=True),
    "nemo-rl packed": Trainer(NemoLoss(), call_nemo_packed, "nemo-rl", sampler=True),
    "areal": Trainer(areal_loss, call_areal, "areal", sampler=True),
    "openrlhf": Trainer(OpenRlhfLoss(), call_openrlhf, "openrlhf", 4.0),
    "ms-swift": Trainer(SwiftTrainer._compute_loss_and_metrics, call_swift, "ms-swift"),
    "open-instruct": Trainer(open_instruct_loss, call_open_instruct, "open-instruct"),
}


def train(trainer: Trainer, loss: Callable[..., Any], steps: int = 2) -> tuple[Policy, Tensor]:
    """Train with a loss; returns the policy and the exact coef of all tokens of the steps."""
    policy = Policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    coefs = []
    for _ in range(steps):
        value, shown = trainer.call(policy, loss)
        for logp, _ in shown:
            logp.retain_grad()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        for logp, mask in shown:
            assert logp.grad is not None
            coefs.append(-logp.grad[mask.bool()] / trainer.scale)
    return policy, torch.cat(coefs)
