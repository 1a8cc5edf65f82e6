"""Exact checkpoints: weights and optimizer state as safetensors, so nothing is ever unpickled.

Prompts and sampling are seeded per step from (seed, step), so no random state needs saving.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wapo_analysis.errors import UserError
from wapo_analysis.train.models import Policy, no_progress_bars

KEEP = 2
_STATE, _OPTIMIZER = "trainer.json", "optimizer.safetensors"


def save_checkpoint(run: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> Path:
    """Write RUN/checkpoints/step-<step>, whole or not at all, and drop all but the last two.

    Returns
    -------
    Path
        The checkpoint folder; transformers loads it like any model folder.
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    target, unfinished = root / f"step-{step:08d}", root / f".step-{step:08d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    with no_progress_bars():
        policy.model.save_pretrained(unfinished)
        policy.tokenizer.save_pretrained(unfinished)
    save_file(_optimizer_tensors(policy.module, optimizer), unfinished / _OPTIMIZER)
    (unfinished / _STATE).write_text(json.dumps({"step": step}))
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    for old in checkpoints(run)[:-KEEP]:
        shutil.rmtree(old)
    return target


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
        for name, parameter in policy.module.named_parameters():
            entries = {k: tensors[f"{name}/{k}"] for k in ("exp_avg", "exp_avg_sq")}
            step = tensors[f"{name}/step"].cpu()
            optimizer.state[parameter] = {"step": step, **entries}
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
