"""What a data format is: how a row becomes a problem and how a completion is graded."""

from collections.abc import Mapping
from typing import Any, Protocol

from wapo_analysis.train.tasks.base import Problem


class BadRow(ValueError):
    """A row that cannot become a problem; the message says why."""


class Format(Protocol):
    """How the rows of one kind of data become problems, and how completions are graded."""

    @property
    def name(self) -> str:
        """The name typed on the command line."""

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""

    @property
    def max_new_tokens(self) -> int:
        """Longest completion worth sampling, in tokens, end-of-sequence included."""

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
