"""What a task is, and what a data format is.

A task draws problems, checks a reward and may demonstrate; a format makes a row a problem.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

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
        The final answer alone, without the intermediate results; empty where only a scorer knows.
    extra : mapping
        What the task's scorer needs beside the answer.
    source : str
        Where the problem stands in the data, e.g. ``"line 12"``; empty for generated ones.
    """

    prompt: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    source: str = ""


class Named(Protocol):
    """What is said of tasks and formats alike."""

    @property
    def name(self) -> str:
        """The name typed on the command line."""

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""

    @property
    def max_new_tokens(self) -> int:
        """Longest completion worth sampling, in tokens, end-of-sequence included."""


class Task(Named, Protocol):
    """What the trainer needs of a task: problems to draw and a verifiable reward."""

    def problems(self, rng: np.random.Generator, n: int) -> list[Problem]:
        """Draw problems to train on; the same generator state gives the same problems.

        Parameters
        ----------
        rng : numpy.random.Generator
            Source of randomness; advanced by the call.
        n : int
            How many problems, 0 or more.

        Returns
        -------
        list of Problem
            ``n`` problems, in the order drawn.

        Raises
        ------
        UserError
            If ``n`` is negative or there is nothing to draw from.
        """

    def held_out_problems(self, n: int) -> list[Problem]:
        """At most ``n`` problems for evaluation, always the same ones."""

    def reward(self, problem: Problem, completion: str) -> float:
        """Grade a completion, any text at all without special tokens: in [0, 1], deterministic."""

    def data_record(self) -> dict[str, Any]:
        """What the manifest says of the data: where from, digest, rows; empty if generated."""


class EmbeddedTask(Task, Protocol):
    """A task that can also show how it is done, for pre-training the embedded base policy."""

    @property
    def error_rate(self) -> float:
        """Probability of an error at each decision of the demonstrations used in pre-training."""

    def demonstrate(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        """Write a completion that errs with probability ``error_rate`` at each decision.

        Parameters
        ----------
        problem : Problem
            A problem of this task.
        rng : numpy.random.Generator
            Source of randomness; advanced by the call.
        error_rate : float
            In [0, 1]; 0 gives the correct completion.

        Returns
        -------
        str
            The completion, without end-of-sequence.

        Raises
        ------
        UserError
            If ``error_rate`` is not in [0, 1].
        """


def tools_of(task: Any) -> list[Callable[..., str]]:
    """Functions that the policy may call while it answers; none for most tasks."""
    tools: list[Callable[..., str]] = getattr(task, "tools", list)()
    return tools


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


class BadRow(ValueError):
    """A row that cannot become a problem; the message says why."""


class Format(Named, Protocol):
    """How the rows of one kind of data become problems, and how completions are graded."""

    @property
    def question(self) -> str:
        """Field that holds the question; equal questions are on one side of the split."""

    @property
    def one_answer(self) -> bool:
        """Whether one prompt with two answers is a contradiction."""

    def parse(self, values: Mapping[str, Any]) -> Problem:
        """Make a problem of a row.

        Raises
        ------
        BadRow
            If a field is missing, empty or of the wrong type.
        """

    def reward(self, problem: Problem, completion: str) -> float:
        """Grade a completion: a number in [0, 1]."""

    def solution(self, problem: Problem) -> str | None:
        """Shortest completion that must earn 1; None if only the scorer knows one."""

    def record(self) -> dict[str, Any]:
        """What else the manifest has to say of the data."""


def text_field(values: Mapping[str, Any], name: str) -> str:
    """Text of a field, outer white space removed.

    Raises
    ------
    BadRow
        If the field is missing, empty, no text, or holds half a surrogate pair.
    """
    value = values.get(name)
    if value is None:
        raise BadRow(f"no {name!r}")
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name!r} is not valid Unicode") from None
    return value.strip()
