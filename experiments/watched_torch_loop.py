"""A hand-written GRPO loop in plain PyTorch; the five lines with ``Recorder`` or ``run`` watch it.

A GRU learns from its own samples to repeat the two digits it was shown; half a minute on one core.

    python experiments/watched_torch_loop.py --out runs/torch_loop && wapo diagnose runs/torch_loop
"""

import argparse

import torch
from torch import Tensor, nn

from wapo_analysis import Recorder

DIGITS, PROMPTS, ROLLOUTS, UPDATES = 10, 16, 16, 2


class Policy(nn.Module):
    """Next-digit logits, shape (B, L, 10), of digits of shape (B, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(DIGITS, 32), nn.Linear(64, DIGITS)
        self.cell = nn.GRU(32, 64, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of the digit after each position."""
        return self.head(self.cell(self.embed(ids))[0])


@torch.no_grad()
def sample(policy: Policy, ids: Tensor) -> Tensor:
    for _ in range(2):
        ids = torch.cat([ids, policy(ids)[:, -1].softmax(-1).multinomial(1)], dim=1)
    return ids


def main(arguments: list[str] | None = None) -> Policy:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/torch_loop")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    row, mask = torch.arange(PROMPTS * ROLLOUTS), torch.ones(PROMPTS * ROLLOUTS, 2)
    group = row // ROLLOUTS
    run = Recorder(options.out, {"objective": {"name": "grpo"}})
    for step in range(1, options.steps + 1):
        ids = sample(policy, torch.randint(DIGITS, (PROMPTS, 2))[group])
        out = ids[:, 2:]
        reward = (out == ids[:, :2]).float().mean(dim=1)
        by_prompt = reward.view(PROMPTS, ROLLOUTS)
        centred = by_prompt - by_prompt.mean(dim=1, keepdim=True)
        adv = (centred / (by_prompt.std(dim=1, keepdim=True) + 1e-4)).view(-1)
        old = None
        for _ in range(UPDATES):
            logits = policy(ids)[:, 1:-1]
            logp = logits.log_softmax(-1).gather(-1, out[..., None])[..., 0]
            old = logp.detach() if old is None else old
            ratio, weight = (logp - old).exp(), adv[:, None]
            loss = -torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight).mean()
            run.watch(logp, out, mask, adv, group, logits=logits, logp_old=old, rollouts=row)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.finish_step(step, reward=reward, loss=loss)
    run.close()
    return policy


if __name__ == "__main__":
    main()
