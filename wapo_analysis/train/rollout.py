"""Completions of prompts, sampled, and the policy's logits over them.

Shapes: B rollouts, n rows of them in hand, L prompt length after left padding, T completion length,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from wapo_analysis.capture.lm_head import inner_model, last_hidden
from wapo_analysis.errors import UserError, first_line
from wapo_analysis.train.config import BATCHED
from wapo_analysis.train.policy import Policy
from wapo_analysis.train.sampler import NonFiniteLogits as NonFiniteLogits
from wapo_analysis.train.sampler import (
    Sampled,
    Sampler,
    positions,
    sent,
    takes_whole_masks,
    whole_mask,
)

_PAGE = 32  # tokens of a page of the cache in continuous batching


@dataclass(frozen=True)
class Rollouts:
    """Completions of a batch of prompts."""

    #: (B, L): left-padded prompts; the mask is 1 on real tokens.
    prompt_ids: Tensor
    prompt_mask: Tensor
    #: (B, T): right-padded completions, end token included.
    completion_ids: Tensor
    #: (B, T): real completion tokens.
    mask: Tensor
    #: (B, T): log-probability under the sampling policy at its temperature, nats; 0 where masked.
    logp_old: Tensor
    #: (B,): the completion ended by itself: with an end token or a stop text.
    stopped: Tensor
    #: (B, T): entropy of the sampling distribution, nats; 0 where masked.
    entropy: Tensor | None = None

    @cached_property
    def kept(self) -> Tensor:
        """Numbers of the completion tokens in (B T), ascending, shape (N,); one wait for a GPU."""
        return self.mask.reshape(-1).nonzero().squeeze(1)

    def cut(self, prompt: int, completion: int) -> "Rollouts":
        """The same without padding that none of them needs: longest prompt and completion."""
        long = self.prompt_ids.shape[1] - prompt
        held = {
            name: getattr(self, name)[:, :completion]
            for name in ("completion_ids", "mask", "logp_old")
        }
        if self.entropy is not None:
            held["entropy"] = self.entropy[:, :completion]
        prompts = self.prompt_ids[:, long:], self.prompt_mask[:, long:]
        return replace(self, prompt_ids=prompts[0], prompt_mask=prompts[1], **held)

    def on(self, device: torch.device) -> "Rollouts":
        """The same on a device."""
        held: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {n: None if v is None else sent(v, device) for n, v in held.items()}
        return Rollouts(**moved)

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

    Raises NonFiniteLogits if the policy gives NaN or infinite logits.

    Parameters
    ----------
    generator : torch.Generator
        The only source of randomness.
    at_once : int, optional
        Rows in memory at a time; None takes all. Every row keeps its own noise, so the samples are
        the same but for the rounding of the logits.
    entropy : bool
        Measure the entropy at every sampled position.
    rows : Tensor of int64, shape (b,), optional
        Sample these only, with the noise they would have among all.
    """
    ids, mask = pad_left(prompts, policy.pad_id)
    wanted = torch.arange(len(prompts)) if rows is None else rows.cpu()
    like = _first_like(prompts, policy.device)
    start, device, parts = generator.get_state(), policy.device, []
    with policy.sampling() as model:
        for some in wanted.split(at_once or len(prompts)):
            generator.set_state(start)
            first = int(mask[some].argmax(dim=1).min())  # no row's prompt begins before
            noise: Noise = Exponentials(generator, len(prompts))
            if device.type != "cpu":
                noise = Uniforms(generator, len(prompts), max_new_tokens)
            draw = Sampler(policy, model, max_new_tokens, temperature, noise, entropy)
            once, copies = torch.unique(like[some], return_inverse=True)
            shown = mask[once, first:]
            held = (ids[once, first:], shown, some, copies)
            text, there, numbers, copies = (sent(t, device) for t in held)
            parts.append(draw(text, there, numbers, not bool(shown.all()), copies))
    prompt_ids, prompt_mask = sent(ids[wanted], device), sent(mask[wanted], device)
    return _joined(parts, prompt_ids, prompt_mask, policy.pad_id)


def _first_like(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Row that is read for each: the first with the same prompt; on a CPU itself.

    How a product is rounded depends on its rows, and on a CPU a seed gives the same samples
    whatever is read together.
    """
    if device.type == "cpu":
        return torch.arange(len(prompts))
    found: dict[tuple[int, ...], int] = {}
    return torch.tensor([found.setdefault(tuple(p), row) for row, p in enumerate(prompts)])


def sample_batched(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Rollouts:
    """Sample as `sample` does, by transformers' continuous batching, which draws its own noise.

    Raises UserError if it cannot be used with the model, the device or this version of
    transformers, or there are stop texts; NonFiniteLogits if the policy gives NaN or infinite
    logits.
    """
    if policy.format.style.stop:
        raise UserError(f"stop cannot be used with sampler {BATCHED}; set sampler built-in")
    try:
        made = _batched(policy, prompts, max_new_tokens, temperature, seed)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        if "nan" in reason:  # of torch.multinomial
            raise NonFiniteLogits from error
        raise UserError(
            f"sampler {BATCHED} cannot be used here, set sampler built-in ({reason})"
        ) from error
    rows = [torch.tensor(output.generated_tokens) for output in made]
    logp = [torch.tensor(output.logprobs) for output in made]
    ids, mask = pad_left(prompts, policy.pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    found = Rollouts(
        prompt_ids=ids,
        prompt_mask=mask,
        completion_ids=pad_sequence(rows, batch_first=True, padding_value=policy.pad_id),
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
        logp_old=pad_sequence(logp, batch_first=True),
        stopped=torch.tensor([int(row[-1]) in policy.eos_ids for row in rows]),
    )
    return found.on(policy.device)


def _batched(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Any]:
    """What transformers returns for each prompt, in their order."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    blocks = max(len(p) + max_new_tokens for p in prompts) // _PAGE + 1
    on_cpu = {"num_blocks": blocks * len(prompts), "use_cuda_graph": False}
    how = ContinuousBatchingConfig(
        page_size=_PAGE, return_logprobs=True, seed=seed, use_async_batching=False,
        **(on_cpu if policy.device.type == "cpu" else {}),
    )  # fmt: skip
    what = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, max_new_tokens=max_new_tokens,
        eos_token_id=list(policy.eos_ids), pad_token_id=policy.pad_id,
    )  # fmt: skip
    with policy.sampling() as model:
        training = model.training
        made = model.generate_batch(
            [list(p) for p in prompts], generation_config=what, continuous_batching_config=how,
            warmup=False,
        )  # fmt: skip
        model.train(training)
    outputs = sorted(made.values(), key=lambda output: int(output.request_id.split("_")[-1]))
    if failed := [output.error for output in outputs if output.error]:
        raise RuntimeError(failed[0])
    if len(outputs) < len(prompts):
        raise RuntimeError(f"{len(prompts) - len(outputs)} completions are missing")
    return outputs


def _joined(
    parts: Sequence[Sampled], prompt_ids: Tensor, prompt_mask: Tensor, pad_id: int
) -> Rollouts:
    """Rollouts of all parts, padded to the longest completion."""
    longest = max(part.mask.shape[1] for part in parts)

    def joined(name: str, fill: float) -> Any:
        held = [getattr(part, name) for part in parts]
        if held[0] is None:
            return None
        return torch.cat([pad(h, (0, longest - h.shape[1]), value=fill) for h in held])

    return Rollouts(
        prompt_ids,
        prompt_mask,
        completion_ids=joined("ids", pad_id),
        mask=joined("mask", False),
        logp_old=joined("logp", 0.0),
        stopped=torch.cat([part.ended for part in parts]),
        entropy=joined("entropy", 0.0),
    )


def completion_logits(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Logits that predict each completion token, shape (B, T, V), on the autograd graph."""
    length = rollouts.completion_ids.shape[1]
    with policy.autocast():
        logits: Tensor = policy.model(**_inputs(policy, rollouts), logits_to_keep=length + 1).logits
    return logits[:, -length - 1 : -1]


def completion_hidden(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Hidden states that predict each completion token, shape (B, T, D), on the autograd graph."""
    length = rollouts.completion_ids.shape[1]
    with policy.autocast():
        hidden = last_hidden(inner_model(policy.model), **_inputs(policy, rollouts))
    return hidden[:, -length - 1 : -1]


def _inputs(policy: Policy, rollouts: Rollouts) -> dict[str, Any]:
    """Prompts and completions as one forward pass takes them."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    attention = torch.cat(
        [rollouts.prompt_mask, rollouts.mask.to(rollouts.prompt_mask.dtype)], dim=1
    )
    whole = ids.device.type != "cpu" and takes_whole_masks(policy.model)
    return {
        "input_ids": ids,
        "attention_mask": whole_mask(attention) if whole else attention,
        "position_ids": positions(attention),
        "use_cache": False,
    }


class Noise(Protocol):
    """Randomness of a batch; a row's does not depend on which rows are sampled beside it."""

    def pick(self, probabilities: Tensor, rows: Tensor, position: int) -> Tensor:
        """One token per row, shape (n,), from its probabilities (n, V).

        ``rows`` are their numbers in the batch; positions come in order, each once.
        """


@dataclass
class Exponentials:
    """As torch.multinomial: argmax p / q with q ~ Exp(1) has distribution p.

    On a CPU the numbers are one stream, so those of all rows are drawn.
    """

    generator: torch.Generator
    total: int
    _space: Tensor | None = None

    def pick(self, probabilities: Tensor, rows: Tensor, position: int) -> Tensor:
        """See `Noise`."""
        if self._space is None:
            self._space = probabilities.new_empty((self.total, probabilities.shape[1]))
        noise = self._space.exponential_(generator=self.generator)
        chosen = noise if len(rows) == self.total else noise[rows]
        return torch.div(probabilities, chosen, out=chosen).argmax(dim=-1)


class Uniforms:
    """One number per row and position, through the inverse of the cumulative distribution.

    On a GPU: no noise of the size of the vocabulary, none for rows that are not in hand. ``total``,
    ``positions``: rows of the batch, and the most tokens of a completion.
    """

    def __init__(self, generator: torch.Generator, total: int, positions: int) -> None:
        self._numbers = torch.rand(
            (positions, total), generator=generator, dtype=torch.float64, device=generator.device
        )

    def pick(self, probabilities: Tensor, rows: Tensor, position: int) -> Tensor:
        """See `Noise`."""
        return inverse_cdf(probabilities, self._numbers[position].index_select(0, rows))


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens at given places of the cumulative distributions, shape (n,).

    Equals ``torch.searchsorted(probabilities.cumsum(1), uniform * sum, right=True)``, in float64
    and by sums of a fixed order: of blocks of tokens first, then inside the block.
    ``probabilities`` (n, V): not necessarily of sum 1. A token of probability 0 is never picked.
    ``uniform`` (n,): in [0, 1).
    """
    count, vocabulary = probabilities.shape
    width = max(1, round(vocabulary**0.5))
    blocks = -(-vocabulary // width)
    panels = pad(probabilities, (0, blocks * width - vocabulary)).view(count, blocks, width)
    sums = _cumulative(panels.sum(2, dtype=torch.float64))
    wanted = uniform.unsqueeze(1) * sums[:, -1:]
    block = _first_above(sums, wanted)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = panels.gather(1, block.unsqueeze(2).expand(-1, 1, width)).squeeze(1).double()
    token: Tensor = block * width + _first_above(_cumulative(inside), wanted - before)
    return token.squeeze(1)


def _cumulative(values: Tensor) -> Tensor:
    """Cumulative sums along rows; torch's own have no order that repeats on a GPU."""
    size = values.shape[1]
    steps = torch.ones(size, size, dtype=values.dtype, device=values.device).triu()
    sums: Tensor = torch.mm(values, steps)
    return sums


def _first_above(sums: Tensor, wanted: Tensor) -> Tensor:
    """First column above a value, (n, 1); rounding never leads past the last that adds anything."""
    past = (sums <= wanted).sum(1, keepdim=True)
    return torch.minimum(past, (sums < sums[:, -1:]).sum(1, keepdim=True))
