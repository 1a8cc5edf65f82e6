"""Passive watching changes no bit of the training: weights with and without a recorder."""

import tempfile
from pathlib import Path

import torch

from experiments.bench.harness import Measure, Measures
from experiments.bench.options import Options
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

_STEPS = 3


def measure(options: Options) -> Measures:
    """Weights that differ in any bit after a few steps of the built-in trainer."""
    options.say(f"passive: {_STEPS} steps with and without a recorder")
    config = TrainConfig(
        steps=_STEPS, prompts_per_step=4, rollouts_per_prompt=4, max_new_tokens=24, device="cpu"
    )
    bare = train(config).module.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        watched = train(config, Path(folder) / "run").module.state_dict()
    differing = sum(int((bare[name] != watched[name]).sum()) for name in bare)
    total = sum(tensor.numel() for tensor in bare.values() if isinstance(tensor, torch.Tensor))
    note = f"of {total} weights, {_STEPS} steps; 20 steps in tests/integration"
    return {"passive_differing_weights": Measure(differing, note=note)}
