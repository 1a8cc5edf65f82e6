r"""Mathematics with a boxed answer: GSM8K and MATH format, judged by math-verify.

A completion is judged by its last ``\boxed{...}`` alone (GSM8K format: or, without a box, by what
follows its last ``####``). Equal means equal as mathematics: ``\frac{1}{2}`` is ``0.5``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final

from wapo_analysis.train.tasks.base import BadRow, Problem, text_field
from wapo_analysis.train.tasks.judge import Judge, require

MAX_BOX: Final = 1000
"""Longest answer that is judged, in characters; a longer one is wrong."""
_BOX: Final = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_MARK: Final = "####"
_NUMBER: Final = re.compile(r"[-+]?(\d[\d,]*(\.\d*)?|\.\d+)(/\d+)?")


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``.

    Parameters
    ----------
    text : str
        Any text. ``\boxed 5`` without braces takes the next word.

    Returns
    -------
    str or None
        None if there is no box, or the last one is not closed.

    Examples
    --------
    >>> last_box(r"so \boxed{\frac{1}{2}} is right")
    '\\frac{1}{2}'
    >>> last_box(r"\boxed{1}, no: \boxed{2") is None
    True
    """
    starts = list(_BOX.finditer(text))
    if not starts:
        return None
    begin = starts[-1].end()
    if text[begin : begin + 1] != "{":
        word = re.match(r"[^\s$]+", text[begin:])
        return word.group() if word else None
    depth = 0
    for place in re.finditer(r"\\.|[{}]", text[begin:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(place.group(), 0)
        if depth == 0 and place.group() == "}":
            return text[begin + 1 : begin + place.start()].strip()
    return None


def after_mark(text: str) -> str | None:
    """What follows the last ``####`` on its line; None if there is none or nothing follows."""
    head, mark, tail = text.rpartition(_MARK)
    return tail.strip().split("\n")[0].strip() or None if mark else None


def clean(text: str) -> str:
    """Answer without the punctuation of the sentence it stood in."""
    return text.strip().rstrip(".,").strip("$ ")


class MathJudge:
    """Compares answers as mathematics, in the grading process; answers seen again cost nothing.

    Raises
    ------
    UserError
        If math-verify is not installed, or not to be loaded.
    """

    def __init__(self, name: str) -> None:
        require("math_verify", "math", f"task {name}")
        self.judge = Judge(f"task {name}", {"do": "math_ready"})
        self._asked = lru_cache(1 << 16)(self._ask)

    def equal(self, answer: str, text: str | None) -> float:
        """1 if ``text`` is the same mathematics as ``answer``, else 0; 0 for None."""
        given = clean(text or "")
        if given == answer:
            return 1.0
        return self._asked(answer, given) if 0 < len(given) <= MAX_BOX else 0.0

    def _ask(self, answer: str, text: str) -> float:
        return self.judge.score(do="math_equal", answer=answer, text=text)

    def version(self) -> str:
        """Version of math-verify in the grading process."""
        return str(self.judge.start()["version"])


@dataclass(frozen=True, eq=False)
class Gsm8k:
    """Word problems: ``question``, and ``answer`` that ends with ``#### number``."""

    name: str = "gsm8k"
    description: str = "Grade-school word problems with a number as answer."
    max_new_tokens: int = 400
    question: str = "question"
    one_answer: bool = True
    judge: MathJudge = field(default_factory=lambda: MathJudge("gsm8k"))

    def parse(self, values: Mapping[str, Any]) -> Problem:
        """Make a problem of a row; the number loses its thousands separators.

        Raises
        ------
        BadRow
            If a field is missing or empty, or no number follows ``####``.
        """
        question, answer = text_field(values, "question"), text_field(values, "answer")
        if _MARK not in answer:
            raise BadRow(f"no '{_MARK} answer'")
        number = (after_mark(answer) or "").removeprefix("$").removesuffix("%").strip()
        if not number:
            raise BadRow(f"nothing after '{_MARK}'")
        if not _NUMBER.fullmatch(number):
            raise BadRow(f"{number[:20]!r} after '{_MARK}' is not a number")
        prompt = f"{question}\n\nReason step by step and put the final number in \\boxed{{}}."
        return Problem(prompt, number.replace(",", ""))

    def reward(self, problem: Problem, completion: str) -> float:
        r"""Give 1 if the last box, or without one the last ``####``, holds the number."""
        boxed = last_box(completion) if _BOX.search(completion) else after_mark(completion)
        return self.judge.equal(problem.answer, boxed)

    def solution(self, problem: Problem) -> str:
        """Shortest completion that must earn 1."""
        return f"\\boxed{{{problem.answer}}}"

    def record(self) -> dict[str, Any]:
        """Version of the judge."""
        return {"judge": f"math-verify {self.judge.version()}"}


@dataclass(frozen=True, eq=False)
class MathProblems:
    r"""Competition mathematics: ``problem``, and ``answer`` or a ``solution`` with a box."""

    name: str = "math"
    description: str = "Competition problems with any mathematical expression as answer."
    max_new_tokens: int = 1024
    question: str = "problem"
    one_answer: bool = True
    judge: MathJudge = field(default_factory=lambda: MathJudge("math"))

    def parse(self, values: Mapping[str, Any]) -> Problem:
        r"""Make a problem of a row; ``answer`` wins over the last box of ``solution``.

        Raises
        ------
        BadRow
            If a field is missing or empty, or the solution has no closed box.
        """
        problem = text_field(values, "problem")
        prompt = f"{problem}\n\nReason step by step and put the final answer in \\boxed{{}}."
        return Problem(prompt, self._answer(values))

    def _answer(self, values: Mapping[str, Any]) -> str:
        given = values.get("answer")
        if isinstance(given, int | float) and not isinstance(given, bool):
            if not math.isfinite(given):
                raise BadRow(f"'answer' is {given}")
            return format(Decimal(repr(given)), "f")
        if given is not None:
            text = text_field(values, "answer")
            found = last_box(text) if _BOX.search(text) else text
        elif values.get("solution") is not None:
            found = last_box(text_field(values, "solution"))
        else:
            raise BadRow("neither 'answer' nor 'solution'")
        if not found or not clean(found):
            raise BadRow(f"no answer in the \\boxed{{}} of {'answer' if given else 'solution'!r}")
        return clean(found)

    def reward(self, problem: Problem, completion: str) -> float:
        r"""Give 1 if the last ``\boxed{...}`` equals the answer as mathematics."""
        return self.judge.equal(problem.answer, last_box(completion))

    def solution(self, problem: Problem) -> str:
        """Shortest completion that must earn 1."""
        return f"\\boxed{{{problem.answer}}}"

    def record(self) -> dict[str, Any]:
        """Version of the judge."""
        return {"judge": f"math-verify {self.judge.version()}"}
