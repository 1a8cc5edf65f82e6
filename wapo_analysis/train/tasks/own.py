"""A reward function of the user's own over prompts of a data file.

The function names what it wants: each of its parameters is given the field of the row of that name.
``prompt``, ``completion`` and ``problem`` (the :class:`Problem`) are always there.

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
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks.base import BadRow, Problem, text_field

_ALWAYS: Final = ("prompt", "completion", "problem")


class OwnReward:
    """Format of the user's own: ``prompt`` and whatever fields the function names.

    Parameters
    ----------
    spec : str
        ``module:function`` or ``path/file.py:function``.

    Raises
    ------
    UserError
        If the module or the function cannot be found or has parameters that cannot be named.
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

        Raises
        ------
        BadRow
            If there is no prompt, or no field that a parameter without default asks for.
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

        Raises
        ------
        UserError
            If it raises, or returns anything but a number in [0, 1]; names function and row.
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

    Modules are looked up as Python does, then in the current folder.

    Returns
    -------
    function : callable
    file : Path or None
        Where it is written.

    Raises
    ------
    UserError
        If it cannot be found or its module cannot be loaded.
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
        raise UserError(
            f"own reward {spec}: no function {name!r}; allowed: {', '.join(known) or 'none found'}"
        )
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
