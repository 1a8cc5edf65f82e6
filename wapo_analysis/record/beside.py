"""The seam for what judges a run while it is written: an audit, a guard.

Judging lies above recording, so it is found by name and only where it is asked for.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from wapo_analysis.errors import UserError

Action = str | Callable[[dict[str, Any]], None] | None
"""What a finding leads to: a word, or a function that gets it as plain values."""
_WORDS = {"on_warning": ("checkpoint",), "on_critical": ("checkpoint", "stop")}


class Beside(Protocol):
    """Called in the writer's thread with the number of every step that is in the log."""

    def __call__(self, step: int) -> None:
        """Judge, if it is time; never raises."""

    def asked(self, action: str) -> bool:
        """Whether an action was asked for since the last call."""


def check_actions(on_warning: Action, on_critical: Action) -> None:
    """Refuse what is no action.

    Raises
    ------
    UserError
        Naming what is allowed.
    """
    for name, action in (("on_warning", on_warning), ("on_critical", on_critical)):
        if action is not None and not callable(action) and action not in _WORDS[name]:
            words = " or ".join(map(repr, _WORDS[name]))
            raise UserError(f"{name} must be {words} or a function, got {action!r}")


def made_beside(
    path: Path, note: Callable[..., None], audit: bool, on_warning: Action, on_critical: Action
) -> Beside | None:
    """What judges the run at a path, None if nothing was asked for."""
    if not audit and on_warning is None and on_critical is None:
        return None
    module = import_module("wapo_analysis.beside")
    judge: Beside = module.BesideTraining(path, note, audit, on_warning, on_critical)
    return judge
