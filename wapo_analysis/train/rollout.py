"""Sampling completions with a key-value cache, and the policy's logits over them.

Shapes: B rollouts, L prompt length after left padding, T completion length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wapo_analysis.train.models import Policy


class NonFiniteLogits(ArithmeticError):
    """The policy's logits are NaN or infinite, so nothing can be sampled from it."""


@dataclass(frozen=True)
class Rollouts:
    """Completions of a batch of prompts.

    Attributes
    ----------
    prompt_ids, prompt_mask : Tensor, shape (B, L)
        Left-padded prompts; the mask is 1 on real tokens.
    completion_ids : Tensor, shape (B, T)
        Right-padded completions, end token included.
    mask : Tensor of bool, shape (B, T)
        Real completion tokens.
    logp_old : Tensor, shape (B, T)
        Log-probability under the sampling policy at its temperature, nats; 0 where masked.
    stopped : Tensor of bool, shape (B,)
        The completion ended by itself.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    logp_old: Tensor
    stopped: Tensor

    def rows(self, index: Tensor) -> "Rollouts":
        """Some of the rollouts."""
        return Rollouts(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, both of shape (B, longest)."""
    longest = max(len(p) for p in prompts)
    ids = [[pad_id] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Rollouts:
    """Sample one completion per prompt from softmax(logits / temperature).

    Parameters
    ----------
    policy : Policy
    prompts : sequence of B token id sequences
    max_new_tokens : int
    temperature : float
    generator : torch.Generator
        The only source of randomness.

    Raises
    ------
    NonFiniteLogits
        If the policy gives NaN or infinite logits.
    """
    prompt_ids, prompt_mask = (t.to(policy.device) for t in pad_left(prompts, policy.pad_id))
    ends = torch.tensor(policy.eos_ids, device=policy.device)
    ids: list[Tensor] = []
    logps: list[Tensor] = []
    masks: list[Tensor] = []
    alive = torch.ones(len(prompts), dtype=torch.bool, device=policy.device)
    attention, cache, new = prompt_mask, None, prompt_ids
    with torch.no_grad():
        while len(ids) < max_new_tokens and bool(alive.any()):
            out = policy.model(
                input_ids=new,
                attention_mask=attention,
                position_ids=_positions(attention)[:, -new.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            logp = torch.log_softmax(out.logits[:, -1].float() / temperature, dim=-1)
            if not bool(torch.isfinite(logp.logsumexp(-1)).all()):
                raise NonFiniteLogits("the policy gives logits that are NaN or infinite")
            token = torch.multinomial(logp.exp(), 1, generator=generator)
            ids.append(torch.where(alive, token.squeeze(1), policy.pad_id))
            logps.append(torch.where(alive, logp.gather(1, token).squeeze(1), 0.0))
            masks.append(alive)
            alive = alive & ~torch.isin(ids[-1], ends)
            new = ids[-1].unsqueeze(1)
            attention = torch.cat([attention, masks[-1].to(attention.dtype).unsqueeze(1)], dim=1)
    completion_ids, mask, logp_old = (torch.stack(t, dim=1) for t in (ids, masks, logps))
    return Rollouts(prompt_ids, prompt_mask, completion_ids, mask, logp_old, ~alive)


def completion_logits(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Logits that predict each completion token, shape (B, T, V), on the autograd graph."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    attention = torch.cat(
        [rollouts.prompt_mask, rollouts.mask.to(rollouts.prompt_mask.dtype)], dim=1
    )
    length = rollouts.completion_ids.shape[1]
    logits: Tensor = policy.model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=_positions(attention),
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits
    return logits[:, -length - 1 : -1]


def _positions(attention: Tensor) -> Tensor:
    """Position of each token in its own text, left padding left out."""
    return (attention.cumsum(dim=1) - 1).clamp(min=0)
