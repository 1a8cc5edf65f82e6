"""Joining the processes that torchrun or accelerate launch has started.

Both tell each process its place in RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; nothing else of them is used.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Final

import torch
import torch.distributed as dist

from wapo_analysis.errors import UserError
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.distributed import ALONE, ProcessFailed, World, all_processes
from wapo_analysis.train.models import pick_device

_TOLD: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE: Final = timedelta(minutes=30)  # that one process waits for another, grading included


def launched() -> tuple[int, int]:
    """Rank of this process and number of processes, as a launcher has told; else 0 and 1."""
    if not all(name in os.environ for name in _TOLD):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def joined_processes(device: str) -> Iterator[World]:
    """Join the processes a launcher has started, if this is one of them.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        As in the settings. On CUDA each process takes the GPU of its place on the machine.

    Raises
    ------
    UserError
        If CUDA is asked for and absent, or the machine has fewer GPUs than processes.
    """
    _, size = launched()
    if size < 2:
        yield ALONE
        return
    cuda = pick_device(device).type == "cuda"
    if cuda:
        _take_gpu(size)
    # This module takes the group of the moment as default of its functions. Imported later (by
    # torch._dynamo), it would keep the group and its threads beyond the end, and a thread that
    # still frees a tensor while the interpreter ends aborts the process.
    import_module("torch.distributed.nn")
    # Numbers and words of the bookkeeping go by the CPU, gradients by the device they are on.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    lost = False
    try:
        yield all_processes()
    except ProcessFailed:
        lost = True
        raise
    finally:
        if not lost:  # to say goodbye would wait for a process that is not there
            dist.destroy_process_group()


def _take_gpu(size: int) -> None:
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
    if here > gpus:
        raise UserError(
            f"{here} processes on a machine with {gpus} GPU{'s' * (gpus != 1)}; start at most "
            f"{gpus}, or set device to cpu"
        )
    torch.cuda.set_device(local)


def check_processes(config: TrainConfig, world: World) -> None:
    """Check that a run can be shared by several processes.

    Raises
    ------
    UserError
        If its mini-batches cannot be split evenly, it is probed, or an evaluation is too small.
    """
    if world.size == 1:
        return
    rollouts = config.prompts_per_step * config.rollouts_per_prompt // config.minibatches
    if rollouts % world.size:
        raise UserError(
            f"a mini-batch of {rollouts} rollouts (prompts_per_step {config.prompts_per_step} x "
            f"rollouts_per_prompt {config.rollouts_per_prompt} / minibatches {config.minibatches}) "
            f"cannot be split evenly over {world.size} processes"
        )
    if config.probe_every:
        raise UserError("probe_every works with one process; with several, leave it 0")
    held_out = config.eval_prompts * config.eval_samples
    if config.eval_every and held_out < world.size:
        raise UserError(
            f"an evaluation of {held_out} completions is too small for {world.size} processes; "
            "set a larger eval_prompts"
        )
