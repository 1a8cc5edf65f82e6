"""Bench: a micro-step, the ways to capture it, and what they cost."""

from pathlib import Path

import numpy as np
import torch

from experiments.bench.micro_step import MicroStep, Shape, Watcher
from experiments.bench.step import overheads
from wapo_analysis.store import open_run

TINY = Shape(300, 32, 64, 2, 2, 2, "tiny")


def test_every_way_to_capture_makes_the_same_update(tmp_path: Path) -> None:
    ways = {
        "plain": lambda step: step.plain(),
        "official": lambda step: step.official(),
        "beside": lambda step: step.beside(Watcher.into(tmp_path / "beside")),
        "trainer": lambda step: step.trainer(Watcher.into(tmp_path / "trainer")),
        "fused": lambda step: step.fused(Watcher.into(tmp_path / "fused")),
    }
    weights = {}
    for name, way in ways.items():
        step = MicroStep(TINY, batch=2, length=9)
        way(step)
        weights[name] = torch.cat([p.detach().flatten() for p in step.model.parameters()])
    start = torch.cat(
        [p.detach().flatten() for p in MicroStep(TINY, batch=2, length=9).model.parameters()]
    )
    assert not torch.equal(weights["plain"], start)
    for name in ("official", "beside"):
        assert torch.equal(weights[name], weights["plain"]), name
    for name in ("trainer", "fused"):
        torch.testing.assert_close(weights[name], weights["plain"], atol=3e-6, rtol=0)


def test_the_recorder_of_a_micro_step_holds_the_step(tmp_path: Path) -> None:
    step = MicroStep(TINY, batch=2, length=9)
    watcher = Watcher.into(tmp_path / "run")
    step.beside(watcher)
    assert watcher.seconds > 0
    tokens = open_run(tmp_path / "run").tokens()
    assert len(tokens) == step.tokens
    assert np.isfinite(tokens["coef"]).all()
    assert (tokens["coef"] != 0).all()


def test_overheads_of_both_knobs(tmp_path: Path) -> None:
    found = overheads(MicroStep(TINY, batch=2, length=9), tmp_path, rounds=2)
    assert set(found) == {"capture_overhead_class_totals", "capture_overhead_full"}
    assert all(measure.value > 0 for measure in found.values())
    assert not open_run(tmp_path / "class_totals-0").token_steps()
    assert open_run(tmp_path / "full-0").token_steps()
