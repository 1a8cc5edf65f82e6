"""A hand-written GRPO loop on padded tensors, right unless it is given the name of a bug."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wapo_analysis import Recorder

DIGITS, END, PAD, VOCAB = 10, 10, 11, 12
PROMPTS, ROLLOUTS, LENGTH, EPOCHS, PIECES, STEPS = 8, 16, 12, 2, 2, 3

BUGS = {
    "prompt tokens in the loss": "gradient on prompt tokens",
    "padding in the loss": "gradient on tokens after the end",
    "tokens after the end in the mask": "tokens after the end",
    "end token left out of the loss": "end token left out",
    "temperature forgotten in training": "tokens are no samples of the policy",
    "old log-probabilities at another temperature": "old log-probabilities at another temperature",
    "top-k sampling with its own log-probabilities": "old log-probabilities of a cut distribution",
    "log-probabilities shifted by one": "tokens are no samples of the policy",
    "loss divided twice by accumulation": "loss divided twice by accumulation",
    "micro-batch token means averaged": "another mean",
    "mean over the padded length": "another mean",
    "sum over tokens, no mean": "another mean",
    "advantages over the wrong axis": "advantages of other rollouts",
    "groups interleaved": "groups of several prompts",
    "sample std": "another advantage",
    "advantages over the batch": "another advantage",
    "advantages with the wrong sign": "advantages with the wrong sign",
    "advantages not detached": "constant push on every token",
    "rewards of the neighbour": "advantages of other rollouts",
    "rewards shifted by one rollout": "rewards shifted by one rollout",
    "ratio inverted": "ratio inverted",
    "ratio detached": "another ratio",
    "one ratio per rollout": "another ratio",
    "old log-probabilities taken anew": "ratio never leaves 1",
    "clip on the wrong side": "clip on the wrong side for A < 0",
    "clip missing": "clip does not act",
    "clip without the minimum": "clip on the wrong side for A > 0",
    "KL with the wrong sign": "KL with the wrong sign",
    "entropy bonus with the wrong sign": "constant push on every token",
    "old log-probabilities with dropout": "first pass is off",
    "sampler one update behind": "stale sampler",
    "duplicated rollouts": "rollouts are repeated",
    "zero_grad before the step": "weights do not change",
    "frozen weights": "weights do not change",
    "learning rate 0": "weights do not change",
    "fp16 underflow": "gradients underflow",
    "first token left out of the loss": "first token left out",
    "advantages of other rollouts in the loss": "advantages of other rollouts in the loss",
    "leave-one-out baseline": "another advantage",
    "no division by the std": "another advantage",
    "sign of the loss": "pushed against the advantage",
}
"""Bug of the loop -> name of the deviation that says so."""


class Policy(nn.Module):
    """Next-token logits, shape (B, L, V), of tokens of shape (B, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(64, VOCAB)
        self.cell, self.drop = nn.GRU(32, 64, batch_first=True), nn.Dropout(0.2)
        with torch.no_grad():
            self.head.weight.mul_(10)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of the token after each position."""
        return self.head(self.drop(self.cell(self.embed(ids))[0]))


@torch.no_grad()
def sample(policy: Policy, ids: Tensor, bug: str) -> tuple[Tensor, Tensor]:
    """Completions behind prompts, and their log-probabilities as the sampler has them."""
    cold = "temperature" in bug
    done, logps = torch.zeros(len(ids), dtype=torch.bool), []
    for _ in range(LENGTH):
        logits = policy(ids)[:, -1].index_fill(1, torch.tensor([PAD]), -30.0)
        if bug.startswith("top-k"):
            logits = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf)
        logits = logits * 2 if cold else logits
        token = logits.softmax(-1).multinomial(1)[:, 0]
        token = torch.where(done, PAD, token)
        logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        logps.append(torch.where(done, 0.0, logp))
        ids = torch.cat([ids, token[:, None]], dim=1)
        done |= token == END
    return ids, torch.stack(logps, dim=1)


def score(policy: Policy, ids: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, tokens and log-probabilities of every position after the first."""
    logits = policy(ids)
    logits = torch.cat([logits[..., :PAD], logits[..., PAD:] * 0 - 30], dim=-1)
    logits, tokens = (logits[:, 1:], ids[:, 1:]) if shift else (logits[:, :-1], ids[:, 1:])
    return logits, tokens, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def made_advantages(reward: Tensor, bug: str) -> Tensor:
    by_prompt = reward.view(PROMPTS, ROLLOUTS)
    if bug == "advantages over the wrong axis":
        by_prompt = reward.view(ROLLOUTS, PROMPTS).T
    if bug == "rewards of the neighbour":
        by_prompt = reward.roll(1).view(PROMPTS, ROLLOUTS)
    centred = by_prompt - by_prompt.mean(dim=1, keepdim=True)
    std = by_prompt.std(dim=1, keepdim=True, correction=1 if bug == "sample std" else 0)
    if bug == "advantages over the batch":
        centred, std = by_prompt - reward.mean(), reward.std(correction=0)
    adv = centred / (std + 1e-6)
    if bug == "no division by the std":
        adv = centred
    if bug == "leave-one-out baseline":
        adv = centred * ROLLOUTS / (ROLLOUTS - 1)
    adv = adv.T.reshape(-1) if bug == "advantages over the wrong axis" else adv.reshape(-1)
    return -adv if bug == "advantages with the wrong sign" else adv


def surrogate(logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, bug: str) -> Tensor:
    """Loss of every token, shape (B, L)."""
    x = old - logp if bug == "ratio inverted" else logp - old
    if bug == "one ratio per rollout":
        x = ((x * mask).sum(1) / mask.sum(1))[:, None].expand_as(x)
    ratio, weight = x.exp(), adv[:, None]
    if bug == "ratio detached":
        return -weight * logp
    if bug == "sign of the loss":
        return ratio * weight
    if bug == "clip missing":
        return -ratio * weight
    held = ratio.clamp(0.8, 1.2) * weight
    if bug == "clip without the minimum":
        return -held
    if bug == "clip on the wrong side":
        return -torch.where(weight < 0, torch.maximum(ratio * weight, held),
                            torch.minimum(ratio * weight, held))  # fmt: skip
    return -torch.minimum(ratio * weight, held)


def averaged(loss: Tensor, mask: Tensor, rows: int, total: float, bug: str, mean: str) -> Tensor:
    """Loss of a micro-batch of some of ``rows`` rollouts with ``total`` tokens."""
    parts = rows / len(loss)
    if bug == "micro-batch token means averaged":
        return (loss * mask).sum() / mask.sum() / parts
    if bug == "mean over the padded length":
        return (loss * mask).mean(dim=1).sum() / rows
    if bug == "sum over tokens, no mean":
        return (loss * mask).sum() / rows
    if mean == "token":
        result = (loss * mask).sum() / total
    else:
        result = ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / rows
    return result / parts if bug == "loss divided twice by accumulation" else result


def train(
    out: Path, bug: str = "", steps: int = STEPS, mean: str = "rollout", epochs: int = EPOCHS,
    pieces: int = PIECES, seed: int = 0, audit: bool = False,
) -> Recorder:  # fmt: skip
    """Train some steps with one bug, or none, and record them."""
    torch.manual_seed(seed)
    policy = Policy().eval()
    behind, reference = Policy().eval(), Policy().eval()
    behind.load_state_dict(policy.state_dict())
    reference.load_state_dict(policy.state_dict())
    rate = 0.0 if bug == "learning rate 0" else 2e-2
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    if bug == "frozen weights":
        optimizer = torch.optim.Adam(
            [nn.Parameter(p.detach().clone()) for p in policy.parameters()]
        )
    row = torch.arange(PROMPTS * ROLLOUTS)
    group = row % PROMPTS if bug == "groups interleaved" else row // ROLLOUTS
    declared: dict[str, Any] = {"name": "dapo" if mean == "token" else "grpo"}
    declared |= {"bounds": [0.8, 1.2], "advantage": "group mean, population std", "kl": "k3"}
    beta = 2.0 if bug == "KL with the wrong sign" else 0.0
    run = Recorder(
        out, {"objective": {**declared, "beta": beta}}, **({"audit": True} if audit else {})
    )
    prompts = torch.randint(DIGITS, (PROMPTS, 2))
    for step in range(1, steps + 1):
        ids, sampled = sample(behind if "behind" in bug else policy, prompts[row // ROLLOUTS], bug)
        if bug == "duplicated rollouts":
            ids, sampled = ids[row // 2 * 2], sampled[row // 2 * 2]
        behind.load_state_dict(policy.state_dict())
        out_ids = ids[:, 2:]
        length = ((out_ids == END).long().cumsum(1) == 0).sum(1).add(1).clamp(max=LENGTH)
        place = torch.arange(ids.shape[1] - 1)
        mask = ((place >= 1) & (place < 1 + length[:, None])).float()
        right = (out_ids == ids[:, :1]) | (out_ids == ids[:, 1:2])
        reward = ((right * mask[:, 1:]).sum(1) - 0.25 * (length - 4).clamp(min=0)).clamp(min=-1)
        reward = reward.roll(1) if bug == "rewards shifted by one rollout" else reward
        adv = made_advantages(reward, bug)
        loss_mask = mask
        if bug == "prompt tokens in the loss":
            loss_mask = (place < 1 + length[:, None]).float()
        if bug == "padding in the loss":
            loss_mask = (place >= 1).float().expand_as(mask)
        if bug == "tokens after the end in the mask":
            mask = loss_mask = (place >= 1).float().expand_as(mask).clone()
        if bug == "first token left out of the loss":
            loss_mask = mask * (place != 1)
        if bug == "end token left out of the loss":
            loss_mask = mask * (ids[:, 1:] != END)
        shift = int(bug == "log-probabilities shifted by one")
        with torch.no_grad():
            policy.train(bug == "old log-probabilities with dropout")
            old = score(policy, ids, shift)[2]
            policy.eval()
        if bug in ("old log-probabilities at another temperature", "sampler one update behind"):
            old[:, 1:] = sampled
        if bug.startswith("top-k"):
            old[:, 1:] = sampled
        minibatch = 0
        for _ in range(epochs):
            optimizer.zero_grad()
            for part in row.chunk(pieces):
                logits, tokens, logp = score(policy, ids[part], shift)
                before = logp.detach() if bug == "old log-probabilities taken anew" else old[part]
                weight = adv[part]
                if bug == "advantages of other rollouts in the loss":
                    weight = adv.roll(1)[part]
                if bug == "advantages not detached":
                    sure = (logp * mask[part]).sum(1) / mask[part].sum(1)
                    weight = weight + 0.3 * (sure - sure.detach())
                used = logp.half() if bug == "fp16 underflow" else logp
                loss = surrogate(used, before.to(used.dtype), weight, loss_mask[part], bug)
                if bug == "KL with the wrong sign":
                    with torch.no_grad():
                        ref = score(reference, ids[part], shift)[2]
                    loss = loss - beta * ((ref - logp).exp() - (ref - logp) - 1)
                if bug == "entropy bonus with the wrong sign":
                    loss = loss - 0.05 * logp
                loss = averaged(loss, loss_mask[part], len(row), float(loss_mask.sum()), bug, mean)
                loss = loss * 2e-4 if bug == "fp16 underflow" else loss
                run.watch(
                    used, tokens, mask[part], adv[part], group[part], logits=logits,
                    logp_old=before, rollouts=part, minibatch=minibatch,
                )  # fmt: skip
                minibatch += 1
                loss.backward()
            if bug == "zero_grad before the step":
                optimizer.zero_grad()
            optimizer.step()
        run.finish_step(
            step, reward=reward, updates=epochs, lr=rate,
            prompts=[str(p) for p in prompts[row // ROLLOUTS].tolist()],
        )  # fmt: skip
    run.close()
    return run
