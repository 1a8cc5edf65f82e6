"""One batch for every trainer's loss: 4 rollouts of a 3-token prompt and up to 5 sampled tokens."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

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
