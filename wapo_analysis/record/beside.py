"""The seam for what judges a run while it is written, and the checkpoints that a guard keeps.

Judging lies above recording, so it is found by name and only where it is asked for. A finding
comes some steps after what it is about began, so the checkpoint that is wanted then must have been
written before anything was known.
"""

import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from wapo_analysis.errors import UserError
from wapo_analysis.store import MANIFEST, read_manifest
from wapo_analysis.store.files import folder_when_whole, remove_folder

log = logging.getLogger(__name__)

#: What a finding leads to: a word, or a function that gets it as plain values.
Action = str | Callable[[dict[str, Any]], None] | None
_WORDS = {"on_warning": ("checkpoint",), "on_critical": ("checkpoint", "stop")}


class Beside(Protocol):
    """Called in the writer's thread with the number of every step that is in the log."""

    def __call__(self, step: int) -> None:
        """Judge, if it is time; never raises."""

    def asked(self, action: str) -> bool:
        """Whether an action was asked for since the last call."""


def check_actions(on_warning: Action, on_critical: Action, processes: int = 1) -> None:
    """Refuse what is no action, and any where several processes train.

    Raises UserError naming what is allowed.
    """
    for name, action in (("on_warning", on_warning), ("on_critical", on_critical)):
        if action is not None and not callable(action) and action not in _WORDS[name]:
            words = " or ".join(map(repr, _WORDS[name]))
            raise UserError(f"{name} must be {words} or a function, got {action!r}")
        if action is not None and processes > 1:
            raise UserError("on_warning and on_critical work with one process; leave them None")


#: Steps between the checkpoints of a guard, at least.
EVERY = 3
#: How many of the newest, and of those that a finding protects, are kept.
RECENT, PROTECTED = 4, 2
#: The next checkpoint waits this many times as long as writing the last one took.
PAUSE = 10.0

Save = Callable[[Path], object]


class Ring:
    """Checkpoints of one of every few steps, kept while a guard watches: few, and the right ones.

    Kept are the `RECENT` newest ones, the one whose policy earned most, and for the `PROTECTED`
    latest findings that were acted on the newest one from before each. Nothing else in the folder
    is touched. The training thread saves, the writer's thread protects. ``root``: folder of the
    checkpoints; ``earlier``: what `entry` was when the run was left.
    """

    def __init__(self, root: Path, earlier: Mapping[str, Any]) -> None:
        self._root, self._lock = root, threading.Lock()
        self._own = {s for s in earlier.get("steps", ()) if self._is_there(s)}
        self._protected = [s for s in earlier.get("protected", ()) if s in self._own]
        self._best = earlier["best"] if earlier.get("best") in self._own else None
        self._best_reward = earlier.get("best_reward") if self._best is not None else None
        self._recent = sorted(self._own)[-RECENT:]
        self._rewards: list[float] = []  # of the policy of the newest one, and those after it
        self._bytes, self._resting, self._told = 0, 0.0, False

    def _at(self, step: int) -> Path:
        return self._root / f"step-{step:08d}"

    def _is_there(self, step: int) -> bool:
        return self._at(step).is_dir()

    @property
    def held(self) -> set[int]:
        """Steps of the checkpoints that are kept."""
        best = set() if self._best is None else {self._best}
        return {*self._recent, *self._protected} | best

    def entry(self) -> dict[str, Any]:
        """For the manifest; ``bytes`` is the size of one checkpoint."""
        return {
            "steps": sorted(self._own), "protected": list(self._protected), "best": self._best,
            "best_reward": self._best_reward, "every": EVERY, "bytes": self._bytes,
        }  # fmt: skip

    def earned(self, reward: Any) -> None:
        """Take the mean reward of a step, if it is known."""
        if isinstance(reward, float | int) and isfinite(reward):
            self._rewards.append(float(reward))

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after a step: after the first, then regularly."""
        rested = perf_counter() >= self._resting
        return rested and (not self._recent or step >= self._recent[-1] + EVERY)

    def protect(self, onset: int) -> int | None:
        """Keep the newest checkpoint from before a finding; its step, None if there is none.

        The checkpoint of step s holds the policy that samples step s + 1.
        """
        with self._lock:
            before = [s for s in self.held if s + 1 < onset and self._is_there(s)]
            if not before:
                return None
            step = max(before)
            self._protected = [*(s for s in self._protected if s != step), step][-PROTECTED:]
            return step

    def write(self, step: int, save: Save) -> bool:
        """Write a checkpoint and delete those that fall out; whether all went well, never raises.

        ``save``: fills the folder it is given.
        """
        started, target = perf_counter(), self._at(step)
        try:
            if not target.exists():
                if shutil.disk_usage(self._root.parent).free < 2 * self._bytes:
                    raise OSError("the disk is nearly full")
                with folder_when_whole(target) as folder:
                    save(folder)
                self._own.add(step)
            for old in self._turn(step):
                remove_folder(self._at(old))
            if not self._bytes:
                self._bytes = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
        except Exception as error:
            self._tell(step, error)
            return False
        finally:
            self._resting = perf_counter() + PAUSE * (perf_counter() - started)
        return True

    def _turn(self, step: int) -> list[int]:
        """Add a checkpoint; steps of those whose folders are to go."""
        with self._lock:
            earned = sum(self._rewards) / len(self._rewards) if self._rewards else None
            if self._recent and earned is not None:
                if self._best_reward is None or earned > self._best_reward:
                    self._best, self._best_reward = self._recent[-1], earned
            self._recent, self._rewards = [*self._recent, step][-RECENT:], []
            fallen = self._own - self.held
            self._own -= fallen
            return sorted(s for s in fallen if self._is_there(s))

    def _tell(self, step: int, error: Exception) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "the guard's checkpoint of step %d was not written (%s: %s); training goes on",
                step, type(error).__name__, error,
            )  # fmt: skip


def acts(path: Path, last: int) -> dict[str, Any]:
    """What a guard did and kept up to a step, as the manifest of the run has it."""
    if not (path / MANIFEST).exists():
        return {}
    before = read_manifest(path, tell=False)
    did = [entry for entry in before.get("guard") or () if entry["step"] <= last]
    kept = dict(before.get("guard_checkpoints") or {})
    if kept:
        kept["steps"] = [step for step in kept["steps"] if step <= last]
    found = {"guard": did, "guard_checkpoints": kept}
    return {name: entry for name, entry in found.items() if entry}


def made_beside(
    path: Path,
    note: Callable[..., None],
    audit: bool,
    on_warning: Action,
    on_critical: Action,
    earlier: Mapping[str, Any],
) -> tuple[Beside | None, Ring | None]:
    """What judges the run at a path and the checkpoints it keeps; None for what nobody asked for.

    ``earlier`` holds `acts` of a run that is continued.
    """
    if not audit and on_warning is None and on_critical is None:
        return None, None
    ring = None
    if isinstance(on_warning, str) or isinstance(on_critical, str):
        ring = Ring(path / "checkpoints", earlier.get("guard_checkpoints") or {})
    did = earlier.get("guard") or ()
    module = import_module("wapo_analysis.beside")
    judge: Beside = module.BesideTraining(path, note, audit, on_warning, on_critical, ring, did)
    return judge, ring
