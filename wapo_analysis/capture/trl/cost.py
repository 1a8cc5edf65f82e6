"""What watching costs: the same TRL training steps with and without, interleaved in one process."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from wapo_analysis.capture.trl.attachment import attach
from wapo_analysis.errors import UserError

KNOBS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "class totals": {"token_every": 0, "rescore_every": 0},
    "full rows": {"token_every": 1, "rescore_every": 0},
    "full rows, scored again": {"token_every": 1, "rescore_every": 1},
    "replace, full rows": {"mode": "replace", "token_every": 1, "rescore_every": 0},
    "replace, scored again": {"mode": "replace", "token_every": 1, "rescore_every": 1},
}
"""The arms that are compared, and what `attach` is given in each."""


@dataclass(frozen=True)
class Cost:
    """Time of one arm.

    Attributes
    ----------
    seconds : float
        Median of one optimizer step without generation: forward, backward, update, watching. On a
        CPU that is CPU time, so waiting for the disk is not in it.
    overhead : float
        Median over rounds of this arm's step time over the plain one's of the same round, minus 1.
    """

    seconds: float
    overhead: float


def watching_cost(
    make_trainer: Callable[[str], Any], rounds: int = 7, steps: int = 3
) -> dict[str, Cost]:
    """Measure all arms side by side.

    Every round trains each arm in turn, so a slow minute of the machine hits all of them; the first
    round warms up and is dropped. Generation, which watching does not touch, is taken out of the
    time, so the overhead is that of the update alone and an upper bound for the whole step.

    Parameters
    ----------
    make_trainer : callable
        ``make_trainer(output_dir)`` gives a fresh trl GRPOTrainer, the same each time, that runs
        ``max_steps`` steps; its own settings decide sizes.
    rounds : int
        Rounds that count.
    steps : int
        Optimizer steps the trainer makes, to divide by.

    Returns
    -------
    dict of str to Cost
        Keys are those of `KNOBS`; without the replace arms where TRL has no fused head.
    """
    times: dict[str, list[float]] = {arm: [] for arm in KNOBS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for arm in tuple(times):
                place = Path(folder) / f"{number}-{arm.replace(' ', '-')}"
                try:
                    seconds = _timed(make_trainer(str(place / "out")), place / "run", KNOBS[arm])
                except UserError:
                    if "mode" not in (KNOBS[arm] or {}):
                        raise
                    del times[arm]  # before TRL 1.15 there is no head to replace
                    continue
                if number:
                    times[arm].append(seconds / steps)
    plain = times["plain"]
    return {
        arm: Cost(
            median(seconds),
            median(own / base for own, base in zip(seconds, plain, strict=True)) - 1,
        )
        for arm, seconds in times.items()
    }


def _timed(trainer: Any, run: Path, knobs: dict[str, Any] | None) -> float:
    """Seconds inside training steps and what follows them, without generation."""
    # On a CPU the time this process used, whatever else runs; a GPU needs the clock on the wall.
    on_gpu = trainer.accelerator.device.type == "cuda"
    clock = perf_counter if on_gpu else process_time
    generation, inner = [0.0], trainer._generate_and_score_completions

    def generate(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        batch = inner(*args, **kwargs)
        _wait(trainer)
        generation[0] += clock() - started
        return batch

    trainer._generate_and_score_completions = generate
    attachment = attach(trainer, run, **knobs) if knobs is not None else None
    started = clock()
    trainer.train()
    _wait(trainer)
    seconds = clock() - started - generation[0]
    if attachment is not None:
        attachment.close()
        if attachment.recorder.failure is not None:
            raise RuntimeError(f"watching failed: {attachment.recorder.failure}")
    return seconds


def _wait(trainer: Any) -> None:
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
