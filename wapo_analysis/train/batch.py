"""One batch of rollouts, its step statistics, and its mini-batches on their way through the loss.

Shapes: P prompts, R rollouts per prompt, B = P R. Rollout i = k P + p is the k-th of prompt p, so
that every run of P rollouts, hence every mini-batch, holds all prompts evenly. A mini-batch holds
b rollouts, T completion positions, N completion tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from wapo_analysis.derive import reward_columns, rollout_sums
from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.weights import BatchWeights, kept_token_weights, minibatch_weights
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.record.tokens import repetition
from wapo_analysis.record.topk import TopTokens
from wapo_analysis.stats import TokenStats
from wapo_analysis.table import Array
from wapo_analysis.train.config import BATCHED, TrainConfig
from wapo_analysis.train.policy import Policy, Prompt
from wapo_analysis.train.rollout import Rollouts, sample, sample_batched
from wapo_analysis.train.sampler import sent
from wapo_analysis.train.tasks import Problem, Task
from wapo_analysis.train.tasks.base import tools_of

_PROMPTS, _SAMPLING = 1, 2  # streams of random numbers within a step


@dataclass(frozen=True)
class Batch:
    """Sampled and graded rollouts of one step."""

    problems: list[Problem]
    #: What the model saw.
    prompts: list[Prompt]
    rollouts: Rollouts
    completions: list[str]
    #: (B,).
    rewards: Array
    advantages: Array
    #: (B,): prompt of each rollout, 0..P-1.
    group: Array

    @cached_property
    def lengths(self) -> Array:
        """Completion tokens of each rollout, shape (B,)."""
        return np.asarray(self.rollouts.mask.sum(dim=1).cpu().numpy())


def draw_batch(policy: Policy, task: Task, config: TrainConfig, step: int) -> Batch:
    """Draw the prompts of a step, sample and grade their completions.

    The prompts depend on (seed, step) alone: two objectives with one seed see the same prompts, and
    a resumed run sees those it would have seen. Raises NonFiniteLogits if the policy cannot be
    sampled from; UserError if a prompt does not fit the model.
    """
    prompts, repeats = config.prompts_per_step, config.rollouts_per_prompt
    longest = config.max_new_tokens or task.max_new_tokens
    drawn = step_problems(task, config.seed, step, prompts)
    problems = drawn * repeats
    generator = sampling_generator(config.seed, step, policy.device)
    encoded = encode_problems(policy, drawn, task, config) * repeats
    ids = [prompt.ids for prompt in encoded]
    if config.sampler == BATCHED:
        seed = generator.initial_seed()
        rollouts = sample_batched(policy, ids, longest, config.temperature, seed)
    else:
        rollouts = sample(
            policy, ids, longest, config.temperature, generator, at_once=config.sample_batch_size
        )
    completions, rewards = graded_texts(policy, task, rollouts, problems)
    group = np.tile(np.arange(prompts), repeats)
    advantages = config.objective_config(longest).advantages(rewards, group)
    return Batch(problems, encoded, rollouts, completions, rewards, advantages, group)


def encode_problems(
    policy: Policy, problems: list[Problem], task: Task, config: TrainConfig
) -> list[Prompt]:
    """Encode the prompts of problems so that prompt and completion fit the model.

    Raises UserError if one does not fit and ``max_prompt_tokens`` does not allow to cut it, or the
    task needs tools, which only engine trl calls.
    """
    if tools_of(task):
        raise UserError(f"task {task.name} needs tools, which only --engine trl calls")
    longest = config.max_new_tokens or task.max_new_tokens
    prompts = [policy.format.encode(p.prompt, config.max_prompt_tokens) for p in problems]
    context = policy.context
    for prompt, problem in zip(prompts, problems, strict=True):
        if context and len(prompt.ids) + longest > context:
            where = f" ({problem.source})" if problem.source else ""
            raise UserError(
                f"a prompt of {len(prompt.ids)} tokens{where} and {longest} new tokens do not fit "
                f"the model's {context}; set max_prompt_tokens or a lower max_new_tokens"
            )
    return prompts


def graded_texts(
    policy: Policy, task: Task, rollouts: Rollouts, problems: list[Problem]
) -> tuple[list[str], Array]:
    """Completion and reward of each rollout; ``problems`` are theirs."""
    ids, lengths = rollouts.completion_ids.tolist(), rollouts.mask.sum(dim=1).tolist()
    texts = [policy.decode(row[:n]) for row, n in zip(ids, lengths, strict=True)]
    pairs = zip(problems, texts, strict=True)
    return texts, np.array([task.reward(p, text) for p, text in pairs], np.float64)


def rollout_columns(batch: Batch) -> dict[str, Any]:
    """Columns of the rollouts table."""
    return {
        "group": batch.group,
        "rollout": np.arange(len(batch.group)),
        "prompt": [prompt.text for prompt in batch.prompts],
        "completion": batch.completions,
        "answer": [problem.answer for problem in batch.problems],
        "reward": batch.rewards,
        "advantage": batch.advantages,
        "length": batch.lengths,
        "finish_reason": np.where(batch.rollouts.stopped.cpu().numpy(), "stop", "length"),
    }


def batch_columns(batch: Batch) -> dict[str, float]:
    """Columns of the steps table that rewards and prompts decide."""
    cut = float(np.mean([prompt.cut for prompt in batch.prompts]))
    return {**reward_columns(batch.rewards, batch.group), "prompts_cut": cut}


def batch_sums(batch: Batch) -> dict[str, float]:
    """Sums over the completions, for the columns of the steps table that they decide."""
    ids, lengths = batch.rollouts.completion_ids.tolist(), batch.lengths
    return rollout_sums(
        {
            "length": lengths,
            "truncated": (~batch.rollouts.stopped).cpu().numpy(),
            "repetition": np.array(
                [repetition(row[:n]) for row, n in zip(ids, lengths, strict=True)]
            ),
        }
    )


@dataclass(frozen=True)
class MiniBatch:
    """A mini-batch, or a micro-batch of it."""

    #: Number of the update within the step.
    index: int
    rollouts: Rollouts
    #: (b,): of each rollout; rows are their numbers in the step.
    advantage: Tensor
    group: Tensor
    rows: Tensor
    #: (B,): group of every rollout of the step.
    groups: Tensor
    #: (b, 2): tokens of prompt and completion of each rollout, known to the host.
    lengths: Array

    def split(self, size: int | None, tokens: int | None = None) -> "list[MiniBatch]":
        """Micro-batches: rollouts in order, or by length.

        ``size``: rollouts of each, in order, the last one shorter; None takes all as one.
        ``tokens``: most tokens of each, padding included. Rollouts of like length come together,
        and what none of them needs is cut off.
        """
        if tokens is None:
            places = np.arange(len(self.rows))
            step = size or len(self.rows)
            return [self._some(places[at : at + step]) for at in range(0, len(places), step)]
        parts = map(self._some, by_length(self.lengths, tokens))
        return [replace(p, rollouts=p.rollouts.cut(*p.lengths.max(axis=0).tolist())) for p in parts]

    def _some(self, places: Array) -> "MiniBatch":
        part = sent(torch.from_numpy(places), self.rows.device)
        return replace(
            self,
            rollouts=self.rollouts.rows(part),
            advantage=self.advantage[part],
            group=self.group[part],
            rows=self.rows[part],
            lengths=self.lengths[places],
        )

    def top_tokens(self, recorder: Recorder, step: int) -> TopTokens | None:
        """Rows whose most probable tokens are to be recorded; None if there are none."""
        if not recorder.tops.wants(step):
            return None
        length, kept = self.rollouts.mask.shape[1], self.rollouts.kept
        row, position = kept // length, kept % length
        return recorder.tops.choose(step, (row, position), self.rows[row], position, self.index)

    def token_pass(self, stats: TokenStats, kept: Tensor, clipped: Tensor) -> TokenPass:
        """Rows of the token table for the N completion tokens. ``kept``, ``clipped`` (b, T)."""
        rollouts = self.rollouts
        return TokenPass.of_rollouts(
            stats,
            group=self.group,
            rollout=self.rows,
            advantage=self.advantage,
            token_id=rollouts.completion_ids,
            logp_old=rollouts.logp_old,
            clipped=clipped,
            kept=kept,
            minibatch=self.index,
            at=rollouts.kept,
        )


def by_length(lengths: Array, tokens: int) -> list[Array]:
    """Rollouts in parts of like length whose padded tokens stay within a number, longest first.

    ``lengths`` (b, 2): tokens of prompt and completion; ``tokens``: most tokens of a part; one that
    is longer is a part of its own.

    Examples
    --------
    >>> import numpy as np
    >>> lengths = np.array([[2, 1], [2, 9], [2, 2], [2, 8]])
    >>> [part.tolist() for part in by_length(lengths, 22)]
    [[1, 3], [2, 0]]
    """
    parts: list[list[int]] = []
    widest = np.zeros(2, np.int64)
    for place in np.argsort(-lengths.sum(axis=1), kind="stable").tolist():
        wider = np.maximum(widest, lengths[place])
        if parts and (len(parts[-1]) + 1) * int(wider.sum()) <= tokens:
            parts[-1].append(place)
            widest = wider
        else:
            parts.append([place])
            widest = lengths[place]
    return [np.array(part) for part in parts]


def mini_batches(
    batch: Batch, config: TrainConfig, device: torch.device, epochs: int | None = None
) -> Iterator[MiniBatch]:
    """Mini-batches in order, epoch after epoch: consecutive runs of rollouts."""
    held = (batch.advantages, batch.group, np.arange(len(batch.group)))
    advantage, group, rows = (sent(torch.from_numpy(part), device) for part in held)
    prompts = np.array([len(prompt.ids) for prompt in batch.prompts])
    lengths = np.stack([prompts, batch.lengths], axis=1)
    chunks = rows.split(len(rows) // config.minibatches)
    on_host = np.split(lengths, config.minibatches)
    for index in range((epochs or config.epochs) * len(chunks)):
        some, own = chunks[index % len(chunks)], on_host[index % len(chunks)]
        rollouts = batch.rollouts.rows(some)
        yield MiniBatch(index, rollouts, advantage[some], group[some], some, group, own)


def micro_batches(
    update: MiniBatch,
    pieces: list[MiniBatch],
    weights: BatchWeights,
    objective: ObjectiveConfig,
    kept: Callable[[MiniBatch], Tensor],
) -> list[tuple[MiniBatch, BatchWeights]]:
    """Micro-batches of a mini-batch, with their weights.

    With kept-token normalisation the weights depend on which tokens of the whole mini-batch are
    kept, so a split mini-batch is first scored without gradient.

    Parameters
    ----------
    pieces : list of MiniBatch
        Its micro-batches.
    weights : BatchWeights
        Of the whole batch.
    kept : callable
        Mini-batch to the tokens that would enter the loss, (b, T).
    """
    if objective.needs_whole_minibatch:
        longest = update.rollouts.mask.shape[1]
        own = [pad(keep, (0, longest - keep.shape[1])) for keep in map(kept, pieces)]
        rows = torch.cat([piece.rows for piece in pieces])
        # Rollouts of other mini-batches have no kept tokens in it, so they do not count.
        keep = own[0].new_zeros((len(update.groups), longest))
        keep[rows] = torch.cat(own)
        whole = kept_token_weights(objective, keep, update.groups, weights)
        return [
            (piece, replace(whole, sequence_weight=whole.sequence_weight[piece.rows]))
            for piece in pieces
        ]
    masks = [kept(p) if objective.normalize_by_kept_tokens else p.rollouts.mask for p in pieces]
    return [
        (piece, minibatch_weights(objective, weights, piece.rows, mask, piece.group))
        for piece, mask in zip(pieces, masks, strict=True)
    ]


def step_problems(task: Task, seed: int, step: int, n: int) -> list[Problem]:
    """The n problems of a step; they depend on (seed, step) alone."""
    return task.problems(np.random.default_rng([seed, step, _PROMPTS]), n)


def sampling_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Source of the noise of a step's samples."""
    stream = np.random.SeedSequence([seed, step, _SAMPLING]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(stream[0]) >> 1)
