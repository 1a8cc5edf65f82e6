"""What a run leaves to go on from: its settings, and exact checkpoints.

Weights and optimizer state are safetensors, so nothing is ever unpickled. Prompts and sampling are
seeded per step from (seed, step), so no random state needs saving. A stranger's run folder runs
nothing: what its manifest names is data unless the user says so, see docs/security.md.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wapo_analysis.errors import UserError, first_line, unknown_name
from wapo_analysis.record.beside import Ring
from wapo_analysis.store import read_manifest
from wapo_analysis.store.files import folder_when_whole, read_json, remove_folder
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.policy import Policy, no_progress_bars

log = logging.getLogger(__name__)

_STATE, _OPTIMIZER, _WEIGHTS = "trainer.json", "optimizer.safetensors", ".safetensors"
_ONLY_DATA: ContextVar[bool] = ContextVar("only_data", default=False)
_NAME = re.compile(r"step-\d+")


def save_checkpoint(
    run: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    keep: int = 2,
    ring: Ring | None = None,
) -> Path:
    """Write RUN/checkpoints/step-<step>, whole or not at all, and drop all but the last ``keep``.

    Those that a guard keeps (``ring``) are not counted and not dropped. Returns the checkpoint
    folder; transformers loads it like any model folder. Of a policy with LoRA it holds the adapters
    alone, for peft.

    Raises
    ------
    Exception
        Whatever the disk answers; nothing half written is left, and older checkpoints stay.
    """
    root = run / "checkpoints"
    for leftover in root.glob(".*"):  # of a process that was killed while it wrote or deleted
        shutil.rmtree(leftover, ignore_errors=True)
    target = root / f"step-{step:08d}"
    with folder_when_whole(target) as folder:
        write_state(step, policy, optimizer, folder)
    spare = set() if ring is None else ring.held
    for old in [c for c in checkpoints(run) if step_of(c) not in spare][:-keep]:
        remove_folder(old)
    return target


def write_state(step: int, policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write everything that training goes on from into a folder."""
    # Of a model with adapters only these are saved.
    options = {"save_embedding_layers": False} if hasattr(policy.model, "peft_config") else {}
    with no_progress_bars():
        policy.model.save_pretrained(folder, **options)
        policy.tokenizer.save_pretrained(folder)
    save_file(_optimizer_tensors(policy, optimizer), folder / _OPTIMIZER)
    (folder / _STATE).write_text(json.dumps({"step": step}))


def keep_checkpoint(
    run: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    keep: int,
    ring: Ring | None,
    told: bool,
) -> bool:
    """Save a checkpoint; whether the disk took it. A refusal is logged, unless ``told``."""
    try:
        save_checkpoint(run, step, policy, optimizer, keep, ring)
    except Exception as error:  # safetensors has errors of its own for a full disk
        if not told:
            log.warning(
                "checkpoint of step %d not written (%s); older ones are kept and training goes on",
                step,
                error,
            )
        return False
    return True


def drop_later(run: Path, step: int) -> None:
    """Drop checkpoints of steps after one: a run that goes on from it has not done them."""
    for folder in checkpoints(run):
        if step_of(folder) > step:
            remove_folder(folder)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((p for p in found if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def last_checkpoint(run: Path) -> tuple[Path, int]:
    """Newest checkpoint and its step.

    Raises UserError if the run has none, or the newest is broken.
    """
    found = checkpoints(run)
    if not found:
        raise UserError(
            f"{run} has no checkpoint to resume from or to evaluate; start a new run with --out"
        )
    return _whole(found[-1]), step_of(found[-1])


def checkpoint_at(run: Path, step: int) -> Path:
    """Checkpoint of one step.

    Raises UserError if the run has none of that step (the message lists those it has), or it is
    broken.
    """
    steps = {step_of(folder): folder for folder in checkpoints(run)}
    if step not in steps:
        raise unknown_name("checkpoint", step, sorted(steps) or ["none, the run has no checkpoint"])
    return _whole(steps[step])


def resume_point(run: Path, step: int | None = None) -> tuple[Path, int]:
    """Checkpoint to go on from, that of a step or the newest, and its step; raises as those."""
    return last_checkpoint(run) if step is None else (checkpoint_at(run, step), step)


def _whole(checkpoint: Path) -> Path:
    found = defect(checkpoint)
    if found is not None:
        raise _broken(checkpoint, found)
    return checkpoint


def defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, as far as can be seen without its model."""
    files = {file.name for file in checkpoint.iterdir() if file.is_file()}
    if not files:
        return "it is empty"
    lost = [name for name in (_STATE, _OPTIMIZER) if name not in files]
    if not any(name.endswith(_WEIGHTS) and name != _OPTIMIZER for name in files):
        lost.append(f"*{_WEIGHTS}")
    if lost:
        return f"it has no {' and no '.join(lost)}"
    try:
        if json.loads((checkpoint / _STATE).read_bytes())["step"] != step_of(checkpoint):
            return f"{_STATE} is of another step"
        for name in sorted(name for name in files if name.endswith(_WEIGHTS)):
            with safe_open(checkpoint / name, "pt"):
                pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{_STATE} cannot be read: {error}"
    except SafetensorError as error:
        return f"{name} cannot be read: {error}"
    return None


def _broken(checkpoint: Path, what: str) -> UserError:
    """The error that names a broken checkpoint and offers the next older one that is whole."""
    older = [c for c in checkpoints(checkpoint.parents[1]) if step_of(c) < step_of(checkpoint)]
    sound = next((step_of(c) for c in reversed(older) if defect(c) is None), None)
    offer = (
        f"the next older one is whole: add --checkpoint {sound}"
        if sound is not None
        else "there is no older one; start a new run with another --out"
    )
    return UserError(f"checkpoint {checkpoint} is broken ({what}); {offer}")


@contextmanager
def naming(checkpoint: Path | None) -> Iterator[None]:
    """A block that reads a checkpoint, if there is one: what fails in it names the checkpoint.

    Raises
    ------
    UserError
        Instead of whatever else is raised.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None or isinstance(error, UserError):
            raise
        raise _broken(checkpoint, first_line(error)) from error


def load_optimizer(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Fill an optimizer with the state saved in a checkpoint; call it within `naming`."""
    tensors = load_file(folder / _OPTIMIZER, device=str(policy.device))
    if not tensors and (isinstance(optimizer, torch.optim.SGD) or step_of(folder) == 0):
        return  # without momentum it has no state, nor before the first step
    for name, parameter in policy.trainable().items():
        try:
            entries = {k: tensors[f"{name}/{k}"] for k in ("exp_avg", "exp_avg_sq")}
            step = tensors[f"{name}/step"]
        except KeyError as error:
            raise ValueError(f"{_OPTIMIZER} lacks {error}") from error
        optimizer.state[parameter] = {"step": step, **entries}


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in policy.trainable().items()
        for key, value in optimizer.state[parameter].items()
    }


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

    Raises UserError if the model's own settings name code to be loaded, or its adapters are
    pickled.
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

    Raises UserError if the folder is no run, or its settings are not those of ``wapo train``.
    """
    manifest = read_manifest(run)
    return TrainConfig.from_dict(manifest.extra.get("recipe", manifest.config))


def settings_of(run: Path, changes: Mapping[str, Any], trust: bool = False) -> TrainConfig:
    """Settings of a run with changes on top.

    Raises UserError if the folder is no run, a setting is wrong, or the manifest names code to be
    run without ``trust``, or code inside the run folder. ``changes``: settings the user gives; a
    task among them is the user's word; ``trust``: the user has read what the manifest names.
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
