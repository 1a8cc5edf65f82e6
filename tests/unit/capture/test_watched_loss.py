"""Watched losses: each trainer's call, on tensors of the shapes its sources document.

Every layout holds the same batch: 4 rollouts of a 3-token prompt and up to 5 sampled tokens. The
losses here have the arguments of the trainers' own, in their order; a bigram policy makes the
log-probabilities.
"""

import dataclasses
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wapo_analysis
from wapo_analysis import open_run
from wapo_analysis.capture import loss as loss_module
from wapo_analysis.capture.seams import SEAMS
from wapo_analysis.errors import UserError

watched_loss = partial(wapo_analysis.watched_loss, token_every=1)
VOCAB, PROMPT, WIDTH = 11, 3, 5
LENGTHS = torch.tensor([5, 3, 4, 5])
IDS = torch.randint(VOCAB, (4, PROMPT + WIDTH), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(WIDTH) < LENGTHS[:, None]
GENERATOR = torch.Generator().manual_seed(2)
OLD = -2.4 + 0.4 * torch.randn(4, WIDTH, generator=GENERATOR)
SAMPLER = OLD + 0.05 * torch.randn(4, WIDTH, generator=GENERATOR)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None].expand(4, WIDTH) * MASK
SOLID = torch.arange(PROMPT + WIDTH) < PROMPT + LENGTHS[:, None]
PACKED = IDS[SOLID]
BOUNDS = torch.cat([torch.zeros(1, dtype=torch.long), (PROMPT + LENGTHS).cumsum(0)])
Shown = list[tuple[Tensor, Tensor]]  # log-probabilities and mask, as the loss was given them


class Policy(nn.Module):
    """A bigram policy that answers as a causal language model does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, logits_to_keep: int = 0,
    ) -> SimpleNamespace:  # fmt: skip
        return SimpleNamespace(logits=self.table(input_ids[:, -logits_to_keep:]))


def next_logp(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of the token after each position but the last."""
    return logits[..., :-1, :].log_softmax(-1).gather(-1, ids[..., 1:, None])[..., 0]


def responses(policy: Policy) -> Tensor:
    return next_logp(policy(input_ids=IDS).logits, IDS)[:, -WIDTH:]


def surrogate(logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def packed_row(values: Tensor, fill: float) -> Tensor:
    """Per-response values as a packed row, prompts filled."""
    row = torch.full((4, PROMPT + WIDTH), fill, dtype=values.dtype)
    row[:, PROMPT:] = values
    return row[SOLID]


# ---- the trainers' losses and how they are called ------------------------------------------------


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


@pytest.mark.parametrize("name", TRAINERS)
def test_a_watched_loss_trains_the_same_and_every_token_has_its_row(
    name: str, tmp_path: Path
) -> None:
    trainer = TRAINERS[name]
    alone, coef = train(trainer, trainer.loss)
    with watched_loss(trainer.loss, run=tmp_path / "r", names=trainer.names) as watched:
        seen, _ = train(trainer, watched)
        assert watched.failure is None
    assert torch.equal(alone.table.weight, seen.table.weight)
    run = open_run(tmp_path / "r")
    assert run.manifest["source"] == trainer.names
    assert run.manifest["statistics_from"] == "logits"
    assert run.steps.step.tolist() == [1, 2]
    assert run.steps.lr.tolist() == [0.5, 0.5]
    rows = run.tokens()
    np.testing.assert_allclose(rows.coef, coef, rtol=4e-5, atol=1e-8)
    chosen = MASK.clone()
    if trainer.names == "nemo-rl":
        chosen[2] = False  # its sample mask
    assert len(rows) == 2 * int(chosen.sum())
    first = rows[rows.step == 1]
    assert first.token_id.tolist() == IDS[:, PROMPT:][chosen].tolist()
    full = Policy().table(IDS).log_softmax(-1)[:, PROMPT - 1 : -1][chosen].detach()
    np.testing.assert_allclose(first.entropy, -(full.exp() * full).sum(-1), rtol=4e-5)
    own = full.gather(-1, IDS[:, PROMPT:][chosen][:, None])[:, 0]
    rest = full.exp().square().sum(-1) - own.exp().square()
    np.testing.assert_allclose(first.collision_rest, rest, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first.advantage, ADVANTAGES[chosen], rtol=4e-5)
    np.testing.assert_allclose(first.ratio, (own - OLD[chosen]).exp(), rtol=2e-4)
    given = SAMPLER if trainer.sampler else OLD
    np.testing.assert_allclose(first.logp_old, given[chosen], rtol=4e-5)
    assert first.rollout.tolist() == chosen.nonzero()[:, 0].tolist()
    assert set(rows.cls) <= {"pos_peak", "pos_valley", "neg_peak", "neg_valley"}
    top = run.topk([1])
    logp, ids = full.topk(8)
    assert top.token_id.tolist() == ids.flatten().tolist()
    np.testing.assert_allclose(top.logp, logp.flatten(), rtol=4e-5, atol=1e-6)
    totals = run.classes.groupby(["step", "cls"], observed=True)[["tokens", "grad_mass"]].sum()
    sums = rows.assign(tokens=1, grad_mass=rows.grad_norm).groupby(["step", "cls"], observed=True)
    for key, total in sums[["tokens", "grad_mass"]].sum().iterrows():
        np.testing.assert_allclose(totals.loc[key], total, rtol=1e-4)


@pytest.mark.parametrize("given", ["attention_mask", "logits_to_keep", "both", "eos is padding"])
def test_padding_is_not_read_and_logits_may_be_of_the_last_positions(
    given: str, tmp_path: Path
) -> None:
    whole = SOLID.clone()
    if given == "eos is padding":  # a mask that hides the last token, which the loss has
        whole[range(4), PROMPT + LENGTHS - 1] = False
    arguments: dict[str, Any] = {"attention_mask": whole.long()} if given[:1] != "l" else {}
    if given in ("logits_to_keep", "both"):
        arguments["logits_to_keep"] = WIDTH + 1

    def train_one(policy: Policy, loss: Callable[..., Any]) -> None:
        logits = policy(input_ids=IDS, **arguments).logits[:, -WIDTH - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, IDS[:, PROMPT:, None])[..., 0]
        loss(logp, ADVANTAGES, MASK).backward()
        torch.optim.SGD(policy.parameters(), lr=0.5).step()

    with watched_loss(plain_loss, run=tmp_path / "r", names=PLAIN) as watched:
        train_one(Policy(), watched)
        assert watched.failure is None
    full = Policy().table(IDS).log_softmax(-1)[:, PROMPT - 1 : -1][MASK].detach()
    rows = open_run(tmp_path / "r").tokens()
    np.testing.assert_allclose(rows.entropy, -(full.exp() * full).sum(-1), rtol=4e-5)
    assert rows.token_id.tolist() == IDS[:, PROMPT:][MASK].tolist()


def test_every_trainer_of_the_table_is_called_here() -> None:
    assert {trainer.names for trainer in TRAINERS.values()} == set(SEAMS)


# ---- what holds for all of them -----------------------------------------------------------------

PLAIN = {"logp": "logp", "advantages": "adv", "mask": "mask"}


def plain_loss(logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    return -(logp * adv * mask).sum()


def step(policy: Policy, loss: Callable[..., Any], *optimizers: Any, part: Any = slice(4)) -> None:
    loss(responses(policy)[part], ADVANTAGES[part, :1], MASK[part]).backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"head": False}, "no head is read"),
        ({"temperature": 0.5}, "log-probabilities at temperature 0.5, "),
        ({"head": nn.Linear(1, 1)}, "no model has returned logits"),
    ],
    ids=["no head", "temperature", "another model"],
)
def test_without_sum_p_squared_the_class_is_unknown_and_that_is_said_once(
    given: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with watched_loss(plain_loss, run=tmp_path / "r", names=PLAIN, **given) as watched:
        for _ in range(2):
            step(policy, watched, optimizer)
    run = open_run(tmp_path / "r")
    assert set(run.tokens().cls) == {"unknown"}
    assert run.tokens().coef.notna().all()
    assert len(run.tokens()) == 2 * int(MASK.sum())
    assert [reason in line for line in caplog.messages] == [True]
    assert reason in run.manifest["statistics_from"]


def test_the_optimizer_ends_a_step_and_no_other_one(tmp_path: Path) -> None:
    policy = Policy()
    critic = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    own = torch.optim.Adam(policy.parameters(), lr=0.1)
    watched = watched_loss(plain_loss, run=tmp_path / "r", names=PLAIN, optimizer=own)
    critic.step()
    for part in (slice(0, 2), slice(2, 4)):  # two micro-batches of an update
        step(policy, watched, critic, part=part)
    with torch.no_grad():
        watched(responses(policy), ADVANTAGES, MASK)
    watched.tell(reward=[1.0, 0.0, 1.0, 0.0], grad_norm=2.0)
    own.step()
    own.step()
    step(policy, watched, own)
    watched.close()
    step(policy, watched, own)
    assert watched.failure is None
    assert watched._watch.recorder.returned() is None, "nothing is kept once closed"
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == [1, 2]
    assert run.steps.grad_norm.tolist()[0] == 2.0
    assert run.steps.reward.tolist()[0] == 0.5
    rows = run.tokens([1])
    assert rows.rollout.tolist() == MASK.nonzero()[:, 0].tolist(), "counted on over micro-batches"
    assert sorted(set(rows.minibatch)) == [0, 1]
    assert run.manifest["status"] == "finished"


def test_any_optimizer_ends_a_step_in_which_a_loss_was_watched(tmp_path: Path) -> None:
    policy = Policy()
    critic = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    own = torch.optim.SGD(policy.parameters(), lr=0.1)
    given = {"names": PLAIN, "token_every": 2, "texts": lambda ids: [f"<{i}>" for i in ids]}
    with watched_loss(plain_loss, run=tmp_path / "r", **given) as watched:
        for _ in range(3):
            step(policy, watched, own, critic)
    run = open_run(tmp_path / "r")
    assert run.steps.lr.tolist() == [0.1] * 3
    assert run.token_steps() == [1, 3]
    assert run.vocab[int(IDS[0, PROMPT])] == f"<{IDS[0, PROMPT]}>"


def test_an_optimizer_that_is_not_torchs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loss_module, "MOST_CALLS", 2)
    policy = Policy()
    with watched_loss(plain_loss, run=tmp_path / "told", names=PLAIN) as watched:
        for _ in range(4):
            step(policy, watched)
    assert caplog.messages == [
        "watching the loss stopped (UserError: no torch optimizer has stepped in 2 calls of the "
        "loss: call end_step() of the watched loss after each update); training goes on"
    ]
    with watched_loss(plain_loss, run=tmp_path / "by hand", names=PLAIN) as watched:
        for _ in range(4):
            step(policy, watched)
            watched.end_step(lr=0.3)
    assert open_run(tmp_path / "by hand").steps.lr.tolist() == [0.3] * 4


def no_scorer(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    return logits.mean(), {}


def broken_names(policy: Policy, loss: Callable[..., Any]) -> Tensor:
    return loss(responses(policy), ADVANTAGES, MASK)  # type: ignore[no-any-return]


FAULTS: dict[str, tuple[Callable[..., Any], Any, Callable[..., Any], str]] = {
    "an argument that is not there": (
        plain_loss, PLAIN | {"advantages": "adv.scores"}, broken_names,
        "the loss was called without advantages, which should be at 'adv.scores'; its arguments "
        "were logp, adv, mask",
    ),
    "a scorer that is not called": (
        no_scorer, "slime", lambda p, f: f(None, {}, p(input_ids=IDS).logits, None)[0],
        "the loss did not call get_log_probs_and_entropy, so its tokens are not seen",
    ),
    "a scorer that is nowhere": (
        partial(no_scorer), "slime", lambda p, f: f(None, {}, p(input_ids=IDS).logits, None)[0],
        "watching the loss stopped",
    ),
    "a shape": (
        lambda logp, adv, mask: plain_loss(logp, adv, mask[:, :5]), PLAIN,
        lambda p, f: f(responses(p), ADVANTAGES, torch.ones(4, 7)),
        "mask must have the shape of logp, (4, 5), got (4, 7)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_watching_is_one_line_and_training_goes_on(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loss, names, call, message = FAULTS[fault]
    grads = []
    with watched_loss(loss, run=tmp_path / "r", names=names, head=False) as watched:
        for function in (loss, watched, watched):
            policy = Policy()
            call(policy, function).backward()
            grads.append(policy.table.weight.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert sum(message in line for line in caplog.messages) == 1
    assert message.removeprefix("watching the loss stopped") in str(watched.failure)
    assert watched.failure


def test_a_folder_that_holds_a_run_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = TRAINERS["openrlhf"]
    for _ in range(2):
        with watched_loss(trainer.loss, run=tmp_path / "r", names="openrlhf") as watched:
            seen, _ = train(trainer, watched)
    alone, _ = train(trainer, trainer.loss)
    assert torch.equal(alone.table.weight, seen.table.weight)
    assert ["already holds a run" in line for line in caplog.messages] == [True]
    assert len(open_run(tmp_path / "r").steps) == 2


def test_a_loss_that_was_sent_to_a_worker_goes_on_with_the_run(tmp_path: Path) -> None:
    trainer = TRAINERS["nemo-rl"]
    with watched_loss(trainer.loss, run=tmp_path / "r", names="nemo-rl") as watched:
        policy = Policy()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        for _ in range(3):  # sent with every batch
            arrived = pickle.loads(pickle.dumps(watched))
            assert arrived.input_type == "logprob"
            trainer.call(policy, arrived)[0].backward()
            optimizer.step()
    assert open_run(tmp_path / "r").steps.step.tolist() == [1, 2, 3]


def test_a_twin_process_records_nothing(tmp_path: Path) -> None:
    policy = Policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    names = PLAIN
    with watched_loss(plain_loss, run=tmp_path / "r", names=names, rank=lambda: None) as watched:
        step(policy, watched, optimizer)
        assert watched.failure is None
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": "slim"}, "did you mean 'slime'"),
        ({"names": {"logp": "p"}}, "names must say where logp and advantages are"),
        ({"names": PLAIN | {"advantage": "a"}}, "did you mean 'advantages'"),
        ({"names": PLAIN, "token_fractoin": 2}, "did you mean 'token_fraction'"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_closest(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        watched_loss(plain_loss, run=tmp_path / "r", **given)
