"""Evaluation on held-out prompts: pass@k, reward, entropy and length, without touching training.

The prompts are the task's held-out ones, always the same. The noise of sampling has its own stream,
the same at every evaluation, so that two evaluations of one run differ by the policy alone.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from wapo_analysis.errors import UserError
from wapo_analysis.results import Block, Grid, Result, Say, Section, plain
from wapo_analysis.table import Array
from wapo_analysis.train.batch import encode_problems, graded_texts
from wapo_analysis.train.checkpoint import naming, only_data, resume_point, settings_of
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.models import configured_policy
from wapo_analysis.train.policy import Policy
from wapo_analysis.train.rollout import sample
from wapo_analysis.train.tasks import Problem, Task

_EVALUATION = 3  # stream of random numbers, beside those of the training batch
_AT_ONCE = 64  # rows, if sample_batch_size does not say


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of ``k`` completions is right, estimated without bias.

    1 - C(n - c, k) / C(n, k) with c of n completions right (Chen et al., arXiv 2107.03374).

    Examples
    --------
    >>> pass_at_k(samples=4, correct=1, k=2)
    0.5
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def ks(samples: int) -> list[int]:
    """Numbers of tries that are reported: powers of two up to the samples, and these.

    Examples
    --------
    >>> ks(6)
    [1, 2, 4, 6]
    """
    powers = [2**n for n in range(samples.bit_length())]
    return sorted({*powers, samples})


@dataclass(frozen=True)
class Evaluation(Result):
    """Graded completions of held-out prompts.

    Attributes
    ----------
    problems : list of Problem, length P
    completions : list of str, length P n
        Completion j n + i is the i-th of prompt j.
    rewards : ndarray of float64, shape (P, n)
    entropy : float
        Mean over all sampled positions, nats.
    length, truncated, seconds : float
    temperature : float
        Of the sampling.
    run : str
        Run folder whose checkpoint was evaluated; empty during training.
    checkpoint : int
        Its step, 0 for the policy before training.
    """

    problems: list[Problem]
    completions: list[str]
    rewards: Array
    entropy: float
    length: float
    truncated: float
    seconds: float
    temperature: float
    run: str = ""
    checkpoint: int = 0

    def passes(self) -> dict[int, Array]:
        """For every number of tries k, pass@k of each prompt, shape (P,)."""
        samples = self.rewards.shape[1]
        right = (self.rewards >= 1).sum(axis=1).tolist()
        return {k: np.array([pass_at_k(samples, c, k) for c in right]) for k in ks(samples)}

    def columns(self) -> dict[str, float]:
        """Columns of the step log."""
        return {
            **{f"eval/pass@{k}": float(values.mean()) for k, values in self.passes().items()},
            "eval/reward": float(self.rewards.mean()),
            "eval/entropy": self.entropy,
            "eval/length": self.length,
            "eval/truncated": self.truncated,
            "eval/prompts": len(self.problems),
            "eval/seconds": self.seconds,
        }

    def pass_rates(self) -> dict[int, tuple[float, float]]:
        """pass@k and its standard error over the prompts; NaN of one prompt alone."""
        found = {}
        for k, values in self.passes().items():
            spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
            found[k] = float(values.mean()), spread / len(values) ** 0.5
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form of ``wapo eval --format json``."""
        columns = {name.removeprefix("eval/"): value for name, value in self.columns().items()}
        found: dict[str, Any] = plain(
            {
                "run": self.run,
                "checkpoint": self.checkpoint,
                "temperature": self.temperature,
                "samples": self.rewards.shape[1],
                **columns,
                "standard_error": {f"pass@{k}": e for k, (_, e) in self.pass_rates().items()},
            }
        )
        return found

    def page(self) -> Section:
        """What was evaluated, and its numbers."""
        prompts, samples = self.rewards.shape
        policy = f"checkpoint of step {self.checkpoint}" if self.checkpoint else "before training"
        rates = [
            [f"pass@{k}", f"{mean:.3f} ± {error:.3f} (standard error over prompts)"]
            for k, (mean, error) in self.pass_rates().items()
        ]
        rows = [
            ["quantity", "value"],
            *rates,
            ["reward", f"{self.rewards.mean():.3f}"],
            ["entropy", f"{self.entropy:.3f} nats"],
            ["length", f"{self.length:.1f} tokens, {self.truncated:.0%} cut at the limit"],
            ["time", f"{self.seconds:.1f} s"],
        ]
        what = (
            f"{prompts} held-out prompts, {samples} completions each at temperature "
            f"{self.temperature:g}"
        )
        parts: list[Block] = [Say(what), Grid(rows, left=2)]
        return Section(f"{self.run}, {policy}" if self.run else policy, parts)


def evaluate(policy: Policy, task: Task, config: TrainConfig) -> Evaluation:
    """Sample and grade ``eval_samples`` completions of each of ``eval_prompts`` held-out prompts.

    Raises NonFiniteLogits if the policy cannot be sampled from; UserError if the task has no
    held-out problems, or a prompt does not fit the model.
    """
    started = perf_counter()
    problems = task.held_out_problems(config.eval_prompts)
    if not problems:
        raise UserError(f"task {task.name} has no held-out problems; set eval_every to 0")
    samples = config.eval_samples
    asked = [problem for problem in problems for _ in range(samples)]
    stream = np.random.SeedSequence([config.seed, 0, _EVALUATION]).generate_state(1, np.uint64)
    prompts = encode_problems(policy, problems, task, config)
    rollouts = sample(
        policy,
        [prompt.ids for prompt in prompts for _ in range(samples)],
        config.max_new_tokens or task.max_new_tokens,
        config.temperature,
        torch.Generator(policy.device).manual_seed(int(stream[0] >> 1)),
        at_once=config.sample_batch_size or _AT_ONCE,
        entropy=True,
    )
    completions, rewards = graded_texts(policy, task, rollouts, asked)
    assert rollouts.entropy is not None
    return Evaluation(
        problems=problems,
        completions=completions,
        rewards=rewards.reshape(len(problems), samples),
        entropy=float(rollouts.entropy.double().sum() / rollouts.mask.sum()),
        length=float(rollouts.mask.sum(dim=1).double().mean()),
        truncated=float((~rollouts.stopped).double().mean()),
        seconds=perf_counter() - started,
        temperature=config.temperature,
    )


def evaluate_run(
    run: Path,
    step: int | None = None,
    threads: int | None = None,
    trust_run: bool = False,
    **changes: Any,
) -> Evaluation:
    """Evaluate a checkpoint of a run.

    Raises UserError if the folder is no run, the checkpoint is not there, or a setting is not
    allowed; NonFiniteLogits if the policy cannot be sampled from.

    Parameters
    ----------
    step : int, optional
        Step of the checkpoint, 0 for the policy before training; None takes the last one.
    threads : int, optional
        CPU threads of this process; None leaves torch's own choice.
    trust_run : bool
        Run code that the manifest names, and load its model from more than safetensors.
    **changes
        Settings to replace, those that are None left out.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    config = settings_of(run, given, trust_run)
    weights = None
    if step != 0:
        weights, step = resume_point(run, step)
    if threads is not None:
        torch.set_num_threads(threads)
    with naming(weights), only_data(not trust_run):
        policy = configured_policy(config, weights)
    return replace(evaluate(policy, config.load_task(), config), run=str(run), checkpoint=step)
