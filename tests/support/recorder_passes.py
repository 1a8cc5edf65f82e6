"""Passes of random statistics for a recorder, and a disk that does not answer."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.store import Run

ROWS = 60
ROLLOUTS = {"group": [0, 0], "rollout": [0, 1], "reward": [1.0, 0.0], "completion": ["a", "b"]}


def tokens(seed: int, rows: int = ROWS, minibatch: int = 0) -> TokenPass:
    """A pass of random statistics; its own generator, so no global state is used."""
    g = torch.Generator().manual_seed(seed)
    prob = torch.rand(rows, generator=g) * 0.98 + 0.01
    rest = (1 - prob) ** 2 * torch.rand(rows, generator=g)
    rollout = torch.arange(rows) % 20
    return TokenPass(
        group=rollout // 4,
        rollout=rollout,
        position=torch.arange(rows) // 20,
        token_id=torch.randint(500, (rows,), generator=g),
        advantage=(rollout % 3 - 1).float(),
        logp=prob.log(),
        logp_old=prob.log() + 0.01,
        entropy=1 - prob,
        collision_rest=rest,
        collision_logp_rest=-rest,
        clipped=torch.rand(rows, generator=g) < 0.2,
        kept=torch.rand(rows, generator=g) < 0.9,
        top1=prob > 0.5,
        coef=torch.randn(rows, generator=g),
        minibatch=minibatch,
    )


def record(recorder: Recorder, steps: Iterable[int], passes: int = 2) -> None:
    for step in steps:
        for number in range(passes):
            recorder.watch_pass(tokens(10 * step + number, minibatch=number))
        recorder.finish_step(step, reward=step / 10, rollouts=ROLLOUTS, texts=spell)


def spell(ids: list[int]) -> list[str]:
    return [f"<{i}>" for i in ids]


def without_times(run: Run) -> Any:
    return run.steps.drop(columns=[c for c in run.steps if c.startswith("seconds")])


@contextmanager
def stuck(recorder: Recorder) -> Iterator[None]:
    """A disk that does not answer within the block."""
    go, real = threading.Event(), recorder._writer.write_part

    def write_part(*given: Any) -> None:
        assert go.wait(60)
        real(*given)

    recorder._writer.write_part = write_part  # type: ignore[method-assign]
    try:
        yield
    finally:
        go.set()
