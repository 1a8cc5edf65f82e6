"""One batch of rollouts: prompts, completions, rewards, advantages, and its step statistics.

Shapes: P prompts, R rollouts per prompt, B = P R. Rollout i = k P + p is the k-th of prompt p, so
that every run of P rollouts, hence every mini-batch, holds all prompts evenly.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wapo_analysis.completions import repetition
from wapo_analysis.train.advantages import group_advantages
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.models import Policy
from wapo_analysis.train.objectives import OBJECTIVES
from wapo_analysis.train.rollout import Rollouts, sample
from wapo_analysis.train.tasks import Problem, Task

_PROMPTS, _SAMPLING = 1, 2  # streams of random numbers within a step


@dataclass(frozen=True)
class Batch:
    """Sampled and graded rollouts of one step.

    Attributes
    ----------
    problems : list of Problem, length B
    rollouts : Rollouts
    completions : list of str, length B
    rewards, advantages : ndarray of float64, shape (B,)
    group : ndarray of int64, shape (B,)
        Prompt of each rollout, 0..P-1.
    """

    problems: list[Problem]
    rollouts: Rollouts
    completions: list[str]
    rewards: np.ndarray[Any, np.dtype[np.float64]]
    advantages: np.ndarray[Any, np.dtype[np.float64]]
    group: np.ndarray[Any, np.dtype[np.int64]]

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Completion tokens of each rollout, shape (B,)."""
        return np.asarray(self.rollouts.mask.sum(dim=1).cpu().numpy())


def draw_batch(policy: Policy, task: Task, config: TrainConfig, step: int) -> Batch:
    """Draw the prompts of a step, sample and grade their completions.

    The prompts depend on (seed, step) alone: two objectives with one seed see the same prompts,
    and a resumed run sees those it would have seen.

    Raises
    ------
    NonFiniteLogits
        If the policy cannot be sampled from.
    """
    prompts, repeats = config.prompts_per_step, config.rollouts_per_prompt
    rng = np.random.default_rng([config.seed, step, _PROMPTS])
    problems = task.problems(rng, prompts) * repeats
    stream = np.random.SeedSequence([config.seed, step, _SAMPLING]).generate_state(1, np.uint64)
    generator = torch.Generator(policy.device).manual_seed(int(stream[0] >> 1))
    encoded = [policy.encode(problem.prompt) for problem in problems]
    limit = config.max_new_tokens or task.max_new_tokens
    rollouts = sample(policy, encoded, limit, config.temperature, generator)
    ids, lengths = rollouts.completion_ids.tolist(), rollouts.mask.sum(dim=1).tolist()
    completions = [policy.decode(row[:n]) for row, n in zip(ids, lengths, strict=True)]
    rewards = np.array(
        [task.reward(p, c) for p, c in zip(problems, completions, strict=True)], np.float64
    )
    group = np.tile(np.arange(prompts), repeats)
    kind = OBJECTIVES[config.objective].advantage
    advantages = group_advantages(kind, rewards, group, official=config.official)
    return Batch(problems, rollouts, completions, rewards, advantages, group)


def rollout_columns(batch: Batch) -> dict[str, Any]:
    """Columns of the rollouts table."""
    return {
        "group": batch.group,
        "rollout": np.arange(len(batch.rewards)),
        "prompt": [p.prompt for p in batch.problems],
        "completion": batch.completions,
        "answer": [p.answer for p in batch.problems],
        "reward": batch.rewards,
        "advantage": batch.advantages,
        "length": batch.lengths(),
        "finish_reason": np.where(batch.rollouts.stopped.cpu().numpy(), "stop", "length"),
    }


def batch_statistics(batch: Batch) -> dict[str, float]:
    """Columns of the steps table that the rollouts alone decide."""
    by_group = [batch.rewards[batch.group == g] for g in np.unique(batch.group)]
    flat = [float(r.max()) for r in by_group if r.max() == r.min()]
    ids, lengths = batch.rollouts.completion_ids.tolist(), batch.lengths()
    return {
        "reward": float(batch.rewards.mean()),
        "reward_std": float(batch.rewards.std()),
        "pass_rate": float((batch.rewards >= 1).mean()),
        "groups_all_wrong": sum(r <= 0 for r in flat) / len(by_group),
        "groups_all_right": sum(r > 0 for r in flat) / len(by_group),
        "length": float(lengths.mean()),
        "truncated": float((~batch.rollouts.stopped).float().mean()),
        "repetition": float(
            np.mean([repetition(row[:n]) for row, n in zip(ids, lengths, strict=True)])
        ),
        "tokens": int(lengths.sum()),
    }
