"""What a task is: problems to draw, a reward to check and, for pre-training, demonstrations."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from wapo_analysis.errors import UserError


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt and the answer that earns the reward.

    Attributes
    ----------
    prompt : str
        The text the policy continues.
    answer : str
        The final answer alone, without the intermediate results.
    """

    prompt: str
    answer: str


class Task(Protocol):
    """What the trainer needs of a task: problems to draw and a verifiable reward."""

    @property
    def name(self) -> str:
        """The name typed on the command line."""

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""

    @property
    def max_new_tokens(self) -> int:
        """Longest completion worth sampling, in tokens, end-of-sequence included."""

    def problems(self, rng: np.random.Generator, n: int) -> list[Problem]:
        """Draw ``n`` problems; the same generator state gives the same problems."""

    def reward(self, problem: Problem, completion: str) -> float:
        """Grade a completion: a number in [0, 1], deterministic, for any text at all."""


class EmbeddedTask(Task, Protocol):
    """A task that can also show how it is done, for pre-training the embedded base policy."""

    @property
    def error_rate(self) -> float:
        """Probability of an error at each decision of the demonstrations used in pre-training."""

    def demonstrate(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        """Write a completion that errs with probability ``error_rate`` at each decision."""


def check_count(n: int) -> int:
    """Return ``n``, a number of problems to draw.

    Raises
    ------
    UserError
        If ``n`` is negative.
    """
    if n < 0:
        raise UserError(f"the number of problems must be 0 or more, got {n}")
    return n


def check_rate(rate: float) -> float:
    """Return ``rate``, a probability of error.

    Raises
    ------
    UserError
        If ``rate`` is not in [0, 1].
    """
    if not 0.0 <= rate <= 1.0:
        raise UserError(f"an error rate must be in [0, 1], got {rate}")
    return rate
