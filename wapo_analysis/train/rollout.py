"""Sampling completions with a key-value cache, and the policy's logits over them.

Shapes: B rollouts, L prompt length after left padding, T completion length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from wapo_analysis.capture.lm_head import inner_model, last_hidden
from wapo_analysis.train.models import Policy

_STOP_MARGIN = 8  # tokens of context before a stop text, so that it is decoded as in the whole


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
        The completion ended by itself: with an end token or a stop text.
    entropy : Tensor, shape (B, T), optional
        Entropy of the sampling distribution, nats; 0 where masked.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    logp_old: Tensor
    stopped: Tensor
    entropy: Tensor | None = None

    def rows(self, index: Tensor) -> "Rollouts":
        """Some of the rollouts."""
        held: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        chosen: dict[str, Any] = {n: None if v is None else v[index] for n, v in held.items()}
        return Rollouts(**chosen)


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
    *,
    at_once: int | None = None,
    entropy: bool = False,
    rows: Tensor | None = None,
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
    at_once : int, optional
        Rows in memory at a time; None takes all. Every row keeps its own noise, so the samples are
        the same but for the rounding of the logits.
    entropy : bool
        Measure the entropy at every sampled position.
    rows : Tensor of int64, shape (b,), optional
        Sample these only, with the noise they would have among all.

    Raises
    ------
    NonFiniteLogits
        If the policy gives NaN or infinite logits.
    """
    prompt_ids, prompt_mask = (t.to(policy.device) for t in pad_left(prompts, policy.pad_id))
    start = generator.get_state()
    wanted = torch.arange(len(prompts)) if rows is None else rows
    wanted = wanted.to(policy.device)
    parts = []
    for some in wanted.split(at_once or len(prompts)):
        generator.set_state(start)
        first = int(prompt_mask[some].argmax(dim=1).min())  # no row's prompt begins before
        noise = _Noise(generator, len(prompts), some)
        draw = _Sampler(policy, max_new_tokens, temperature, noise, entropy)
        parts.append(draw(prompt_ids[some, first:], prompt_mask[some, first:]))
    return _joined(parts, prompt_ids[wanted], prompt_mask[wanted], policy.pad_id)


@dataclass(frozen=True)
class _Noise:
    """Exponential noise for some rows of a batch, drawn for all of them.

    A row's noise does not depend on which rows are sampled beside it.
    """

    generator: torch.Generator
    total: int
    rows: Tensor

    def pick(self, probabilities: Tensor) -> Tensor:
        """One token per row from its probabilities, shape (b, V), as torch.multinomial would.

        argmax p / q with q ~ Exp(1) has distribution p.
        """
        shape = (self.total, probabilities.shape[1])
        noise = torch.empty(shape, dtype=probabilities.dtype, device=probabilities.device)
        noise.exponential_(generator=self.generator)
        chosen = noise if len(self.rows) == self.total else noise[self.rows]
        return torch.div(probabilities, chosen, out=chosen).argmax(dim=-1, keepdim=True)


@dataclass(frozen=True)
class _Sampler:
    """Samples completions of rows that are in memory together."""

    policy: Policy
    max_new_tokens: int
    temperature: float
    noise: _Noise
    entropy: bool

    @torch.no_grad()
    def __call__(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Rollouts:
        policy = self.policy
        ends = torch.tensor(policy.eos_ids, device=policy.device)
        ids: list[Tensor] = []
        logps: list[Tensor] = []
        masks: list[Tensor] = []
        entropies: list[Tensor] = []
        alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=policy.device)
        attention, cache, new = prompt_mask, None, prompt_ids
        while len(ids) < self.max_new_tokens and bool(alive.any()):
            out = policy.model(
                input_ids=new,
                attention_mask=attention,
                position_ids=_positions(attention)[:, -new.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            logp = torch.log_softmax(out.logits[:, -1].float() / self.temperature, dim=-1)
            if not bool(torch.isfinite(logp.logsumexp(-1)).all()):
                raise NonFiniteLogits("the policy gives logits that are NaN or infinite")
            probabilities = logp.exp()
            if self.entropy:
                entropies.append(torch.special.entr(probabilities).sum(dim=-1) * alive)
            token = self.noise.pick(probabilities)
            ids.append(torch.where(alive, token.squeeze(1), policy.pad_id))
            logps.append(torch.where(alive, logp.gather(1, token).squeeze(1), 0.0))
            masks.append(alive)
            alive = alive & ~torch.isin(ids[-1], ends) & ~self._stop_text(ids, alive)
            new = ids[-1].unsqueeze(1)
            attention = torch.cat([attention, masks[-1].to(attention.dtype).unsqueeze(1)], dim=1)
        completion_ids, mask, logp_old = (torch.stack(t, dim=1) for t in (ids, masks, logps))
        measured = torch.stack(entropies, dim=1) if self.entropy else None
        return Rollouts(
            prompt_ids, prompt_mask, completion_ids, mask, logp_old, ~alive, entropy=measured
        )

    def _stop_text(self, ids: list[Tensor], alive: Tensor) -> Tensor:
        """Rows whose last token completes a stop text, shape (b,)."""
        found = torch.zeros_like(alive)
        texts = self.policy.format.style.stop
        if not texts:
            return found
        # A token spells at least a byte, so this many hold any stop text and some before it.
        window = max(len(text.encode()) for text in texts) + _STOP_MARGIN
        tail = torch.stack(ids[-window:], dim=1).tolist()
        for row in alive.nonzero().flatten().tolist():
            text = self.policy.decode(tail[row])
            found[row] = any(stop in text for stop in texts)
        return found


def _joined(
    parts: Sequence[Rollouts], prompt_ids: Tensor, prompt_mask: Tensor, pad_id: int
) -> Rollouts:
    """Rollouts of all parts, padded to the longest completion."""
    if len(parts) == 1:
        return replace(parts[0], prompt_ids=prompt_ids, prompt_mask=prompt_mask)
    longest = max(part.mask.shape[1] for part in parts)

    def joined(name: str, fill: float) -> Tensor | None:
        held = [getattr(part, name) for part in parts]
        if held[0] is None:
            return None
        return torch.cat([pad(h, (0, longest - h.shape[1]), value=fill) for h in held])

    named = {"completion_ids": pad_id, "mask": False, "logp_old": 0.0, "entropy": 0.0}
    columns: dict[str, Any] = {name: joined(name, fill) for name, fill in named.items()}
    stopped = torch.cat([part.stopped for part in parts])
    return Rollouts(prompt_ids, prompt_mask, stopped=stopped, **columns)


def completion_logits(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Logits that predict each completion token, shape (B, T, V), on the autograd graph."""
    length = rollouts.completion_ids.shape[1]
    logits: Tensor = policy.model(**_inputs(rollouts), logits_to_keep=length + 1).logits
    return logits[:, -length - 1 : -1]


def completion_hidden(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Hidden states that predict each completion token, shape (B, T, D), on the autograd graph."""
    length = rollouts.completion_ids.shape[1]
    hidden = last_hidden(inner_model(policy.model), **_inputs(rollouts))
    return hidden[:, -length - 1 : -1]


def _inputs(rollouts: Rollouts) -> dict[str, Any]:
    """Prompts and completions as one forward pass takes them."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    attention = torch.cat(
        [rollouts.prompt_mask, rollouts.mask.to(rollouts.prompt_mask.dtype)], dim=1
    )
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": _positions(attention),
        "use_cache": False,
    }


def _positions(attention: Tensor) -> Tensor:
    """Position of each token in its own text, left padding left out."""
    return (attention.cumsum(dim=1) - 1).clamp(min=0)
