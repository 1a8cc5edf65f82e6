r"""Formats of rows: GSM8K and MATH, and a reward function of the user's own over prompts.

Of mathematics a completion is judged by its last ``\boxed{...}`` alone (GSM8K: or, without a box,
by what follows its last ``####``). Equal means equal as mathematics, by math-verify:
``\frac{1}{2}`` is ``0.5``.

A function of the user's own names what it wants: each of its parameters is given the field of the
row of that name. ``prompt``, ``completion`` and ``problem`` (a :class:`Problem`) are always there.

    def reward(completion, answer):
        return float(completion.strip().endswith(answer))
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.train.tasks.base import BadRow, Problem, text_field
from wapo_analysis.train.tasks.judge import Judge, require

#: Longest answer that is judged, in characters; a longer one is wrong.
MAX_BOX: Final = 1000
_BOX: Final = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_MARK: Final = "####"
_NUMBER: Final = re.compile(r"[-+]?(\d[\d,]*(\.\d*)?|\.\d+)(/\d+)?")


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``.

    Returns None if there is no box, or the last one is not closed. ``text``: any text. ``\boxed 5``
    without braces takes the next word.

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

    Raises UserError if math-verify is not installed, or not to be loaded.
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


class _Boxed:
    """What mathematics with a boxed answer has in common."""

    judge: MathJudge

    def solution(self, problem: Problem) -> str:
        """Shortest completion that must earn 1."""
        return f"\\boxed{{{problem.answer}}}"

    def record(self) -> dict[str, Any]:
        """Version of the judge."""
        return {"judge": f"math-verify {self.judge.version()}"}


@dataclass(frozen=True, eq=False)
class Gsm8k(_Boxed):
    """Word problems: ``question``, and ``answer`` that ends with ``#### number``."""

    name: str = "gsm8k"
    description: str = "Grade-school word problems with a number as answer."
    max_new_tokens: int = 400
    question: str = "question"
    one_answer: bool = True
    judge: MathJudge = field(default_factory=lambda: MathJudge("gsm8k"))

    def parse(self, values: Mapping[str, Any]) -> Problem:
        """Make a problem of a row; the number loses its thousands separators.

        Raises BadRow if a field is missing or empty, or no number follows ``####``.
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


@dataclass(frozen=True, eq=False)
class MathProblems(_Boxed):
    r"""Competition mathematics: ``problem``, and ``answer`` or a ``solution`` with a box."""

    name: str = "math"
    description: str = "Competition problems with any mathematical expression as answer."
    max_new_tokens: int = 1024
    question: str = "problem"
    one_answer: bool = True
    judge: MathJudge = field(default_factory=lambda: MathJudge("math"))

    def parse(self, values: Mapping[str, Any]) -> Problem:
        r"""Make a problem of a row; ``answer`` wins over the last box of ``solution``.

        Raises BadRow if a field is missing or empty, or the solution has no closed box.
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


_ALWAYS: Final = ("prompt", "completion", "problem")


class OwnReward:
    """Format of the user's own: ``prompt`` and whatever fields the function names.

    Raises UserError if the module or the function cannot be found or has parameters that cannot be
    named. ``spec``: ``module:function`` or ``path/file.py:function``.
    """

    max_new_tokens: int = 400
    question: str = "prompt"
    one_answer: bool = False

    def __init__(self, spec: str) -> None:
        self.name = spec
        self.function, self.file = load_function(spec)
        # Now, as it was loaded; the file may change while the run goes on.
        self.sha256 = hashlib.sha256(self.file.read_bytes()).hexdigest() if self.file else None
        self.wanted, self.required = _parameters(spec, self.function)

    @property
    def description(self) -> str:
        """First line of the function's docstring."""
        said = inspect.getdoc(self.function)
        return said.splitlines()[0] if said else f"Your own reward {self.name}."

    def parse(self, values: Mapping[str, Any]) -> Problem:
        """Make a problem of a row; every field is kept for the function.

        Raises BadRow if there is no prompt, or no field that a parameter without default asks for.
        """
        prompt = text_field(values, "prompt")
        for name in self.required:
            if values.get(name) is None:
                raise BadRow(f"no {name!r}")
        if values.get("answer") == "":
            raise BadRow("'answer' is empty")
        answer = values.get("answer")
        shown = answer if isinstance(answer, str) else json.dumps(answer, default=str)
        return Problem(prompt, "" if answer is None else shown, dict(values))

    def reward(self, problem: Problem, completion: str) -> float:
        """Call the function.

        Raises UserError if it raises, or returns anything but a number in [0, 1]; names function
        and row.
        """
        given = {"answer": problem.answer, **problem.extra}
        given |= {"prompt": problem.prompt, "completion": completion, "problem": problem}
        if self.wanted is not None:
            given = {name: value for name, value in given.items() if name in self.wanted}
        where = f"{self.name}, {problem.source or 'problem'}"
        try:
            value = self.function(**given)
        except (Exception, SystemExit) as error:
            raise UserError(f"reward {where}: {_told(error, self.file)}") from error
        return _checked(where, value)

    def solution(self, problem: Problem) -> None:
        """Only the function knows."""
        return

    def record(self) -> dict[str, Any]:
        """The function and the digest of its file."""
        return {"reward": self.name, "reward_sha256": self.sha256}


def _checked(where: str, value: Any) -> float:
    """A reward as a float, if it is one."""
    if isinstance(value, bool | int | float | np.bool_ | np.number) or (
        getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    ):
        number = float(value)
        if math.isfinite(number) and 0.0 <= number <= 1.0:
            return number
        shown = repr(number)
    else:
        shown = type(value).__name__
    raise UserError(f"reward {where}: must return a number in [0, 1], got {shown}")


def _told(error: BaseException, file: Path | None) -> str:
    """Exception and the line of the user's file it came through, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if file is not None and Path(frame.filename) == file]
    place = f" ({file.name}, line {mine[-1].lineno})" if mine and file else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{place}" if message else type(error).__name__ + place


def load_function(spec: str) -> tuple[Callable[..., Any], Path | None]:
    """Find a function by ``module:function`` or ``path/file.py:function``.

    Modules are looked up as Python does, then in the current folder. Returns ``function`` and
    ``file`` (where it is written). Raises UserError if it cannot be found or its module cannot be
    loaded.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UserError(f"own reward {spec!r} must be module:function or path/file.py:function")
    file = Path(place)
    try:
        module = _from_file(file) if file.suffix == ".py" else _from_path(place)
    except (Exception, SystemExit) as error:
        inner = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if file.suffix != ".py" and inner and f"{place}.".startswith(f"{inner}."):
            raise UserError(f"own reward {spec}: no module {place!r}") from error
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"own reward {spec} cannot be loaded: {_told(error, file.resolve())}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v) and n[0] != "_"]
        raise unknown_name(f"function in {place}:", name, known or ["none found"])
    source = getattr(module, "__file__", None)
    return function, Path(source) if source else None


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"no reward file at {file}")
    # The name carries the path, so that two files of one name do not meet.
    name = f"wapo_reward_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _from_path(name: str) -> ModuleType:
    """Import a module; the current folder counts, as it does for ``python -m``."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _parameters(spec: str, function: Callable[..., Any]) -> tuple[set[str] | None, list[str]]:
    """Names the function takes (None: any), and the fields every row must have for it."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(f"own reward {spec} has no signature that can be read") from error
    kinds = inspect.Parameter
    if unnamed := [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY,)]:
        raise UserError(f"own reward {spec}: parameter {unnamed[0]!r} cannot be given by name")
    named = [p for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    if "completion" not in {p.name for p in named} and len(named) == len(parameters):
        raise UserError(f"own reward {spec} must have a parameter 'completion'")
    required = [p.name for p in named if p.default is kinds.empty and p.name not in _ALWAYS]
    open_end = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    return (None if open_end else {p.name for p in named}), required
