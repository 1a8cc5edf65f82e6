"""Exact checkpoints: weights and optimizer state as safetensors, so nothing is ever unpickled.

Prompts and sampling are seeded per step from (seed, step), so no random state needs saving.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.train.adapters import save_options
from wapo_analysis.train.models import Policy, no_progress_bars

_STATE, _OPTIMIZER = "trainer.json", "optimizer.safetensors"


def save_checkpoint(
    run: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int = 2
) -> Path:
    """Write RUN/checkpoints/step-<step>, whole or not at all, and drop all but the last ``keep``.

    Returns
    -------
    Path
        The checkpoint folder; transformers loads it like any model folder. Of a policy with LoRA it
        holds the adapters alone, for peft.
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*"):  # of a process that was killed while it wrote or deleted
        shutil.rmtree(leftover, ignore_errors=True)
    target, unfinished = root / f"step-{step:08d}", root / f".step-{step:08d}"
    with no_progress_bars():
        policy.model.save_pretrained(unfinished, **save_options(policy.model))
        policy.tokenizer.save_pretrained(unfinished)
    save_file(_optimizer_tensors(policy, optimizer), unfinished / _OPTIMIZER)
    (unfinished / _STATE).write_text(json.dumps({"step": step}))
    for file in unfinished.iterdir():
        _to_disk(file)
    if target.exists():
        _remove(target)
    unfinished.rename(target)
    _to_disk(root)
    for old in checkpoints(run)[:-keep]:
        _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a half deleted one does not have its name any more."""
    doomed = checkpoint.with_name(f".old-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def last_checkpoint(run: Path) -> tuple[Path, int]:
    """Newest checkpoint and its step.

    Raises
    ------
    UserError
        If the run has none.
    """
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint to resume from; start a new run with --out")
    return found[-1], int(found[-1].name.split("-")[1])


def checkpoint_at(run: Path, step: int) -> Path:
    """Checkpoint of one step.

    Raises
    ------
    UserError
        If the run has none of that step; the message lists those it has.
    """
    steps = {int(folder.name.split("-")[1]): folder for folder in checkpoints(run)}
    if step not in steps:
        raise unknown_name("checkpoint", step, sorted(steps) or ["none, the run has no checkpoint"])
    return steps[step]


def load_optimizer(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Fill an optimizer with the state saved in a checkpoint.

    Raises
    ------
    UserError
        If the file is missing, broken, or of another model.
    """
    file = folder / _OPTIMIZER
    try:
        tensors = load_file(file, device=str(policy.device))
        if not tensors and isinstance(optimizer, torch.optim.SGD):
            return  # without momentum it has no state
        for name, parameter in policy.trainable().items():
            entries = {k: tensors[f"{name}/{k}"] for k in ("exp_avg", "exp_avg_sq")}
            step = tensors[f"{name}/step"].cpu()
            optimizer.state[parameter] = {"step": step, **entries}
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in policy.trainable().items()
        for key, value in optimizer.state[parameter].items()
    }
