"""A stranger's run folder runs nothing: what its manifest names is data unless the user says so.

See docs/security.md.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wapo_analysis.errors import UserError
from wapo_analysis.store import read_manifest
from wapo_analysis.store.files import read_json
from wapo_analysis.train.config import TrainConfig

_ONLY_DATA: ContextVar[bool] = ContextVar("only_data", default=False)


@contextmanager
def only_data(on: bool = True) -> Iterator[None]:
    """Load models from safetensors alone: no pickles, no code beside the weights."""
    token = _ONLY_DATA.set(on)
    try:
        yield
    finally:
        _ONLY_DATA.reset(token)


def check_model(source: str) -> bool:
    """Whether only safetensors may be loaded now; if so, that a folder asks for nothing else.

    Raises
    ------
    UserError
        If the model's own settings name code to be loaded, or its adapters are pickled.
    """
    if not _ONLY_DATA.get():
        return False
    folder = Path(source)
    try:
        entries = read_json(folder / "config.json") if folder.is_dir() else {}
    except FileNotFoundError:
        entries = {}
    named = next(_code(entries), None)
    pickled = (folder / "adapter_model.bin").exists() and not (
        folder / "adapter_model.safetensors"
    ).exists()
    if named or pickled:
        what = f"its config.json names code ({named})" if named else "its adapters are pickled"
        raise UserError(f"model {source} is not loaded: {what}; --trust-run loads it all the same")
    return True


def _code(entries: Any) -> Iterator[str]:
    """Entries of a model's settings that have code loaded: classes beside it, kernels of a hub."""
    if isinstance(entries, Mapping):
        for name, value in entries.items():
            kernel = "attn_implementation" in name and "/" in str(value)
            if name == "auto_map" or kernel:
                yield str(name)
            yield from _code(value)


def recorded_settings(run: Path) -> TrainConfig:
    """Settings a run of ``wapo train`` was made with, on whichever engine.

    Raises
    ------
    UserError
        If the folder is no run, or its settings are not those of ``wapo train``.
    """
    manifest = read_manifest(run)
    return TrainConfig.from_dict(manifest.extra.get("recipe", manifest.config))


def settings_of(run: Path, changes: Mapping[str, Any], trust: bool = False) -> TrainConfig:
    """Settings of a run with changes on top.

    Parameters
    ----------
    run : Path
        Run folder.
    changes : mapping
        Settings the user gives; a task among them is the user's word.
    trust : bool
        The user has read what the manifest names.

    Raises
    ------
    UserError
        If the folder is no run, a setting is wrong, or the manifest names code to be run without
        ``trust``, or code inside the run folder.
    """
    from wapo_analysis.train.tasks import names_code

    config = TrainConfig.from_dict(changes, recorded_settings(run))
    if "task" in changes or not names_code(config.task):
        return config
    place = config.task.rpartition(":")[0]
    if not trust:
        raise UserError(
            f"{run} names code to be run, task {config.task!r}; read it, then give --trust-run "
            "(trust_run=True)"
        )
    if any(_inside(found, run) for found in _places(place)):
        raise UserError(
            f"task {config.task!r} lies inside the run folder {run}, whose files are never run; "
            "copy it elsewhere and name it with --task"
        )
    return config


def _places(place: str) -> list[str]:
    """Files and folders that a file or module name would be loaded from; nothing is imported."""
    if place.endswith(".py"):
        return [place]
    top = place.partition(".")[0]
    here = [os.path.join(os.getcwd(), name) for name in (top, f"{top}.py")]
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    found = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    return [*(path for path in here if os.path.exists(path)), *(p for p in found if p)]


def _inside(place: str, run: Path) -> bool:
    try:
        return Path(place).resolve().is_relative_to(run.resolve())
    except (OSError, RuntimeError, ValueError):
        return True
