"""The built-in trainer on a GPU: every way to train, and how often the host waits for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pretend_device import LEDGER, installed
from tests.support.tiny_models import save_tiny_llama
from wapo_analysis.errors import UserError
from wapo_analysis.probes.measure import Before, split_step
from wapo_analysis.store import open_run
from wapo_analysis.train import scoring
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]
needs_ledger = pytest.mark.skipif(not installed(), reason="only the pretended device counts waits")

WAYS: dict[str, dict[str, Any]] = {
    "grpo": {"epochs": 2, "eval_every": 1, "eval_prompts": 2, "eval_samples": 2},
    "wapo": {"objective": "wapo", "microbatch_size": 3},
    "probe": {"probe_every": 1},
    "replace": {"capture_mode": "replace", "temperature": 0.8, "precision": "float32"},
}


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    shape = {"prompts_per_step": 2, "rollouts_per_prompt": 4, "minibatches": 2, "steps": 1}
    return TrainConfig.from_dict({**shape, "rescore_every": 1, "device": "cuda"})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_and_goes_on(way: str, config: TrainConfig, tmp_path: Path) -> None:
    given = replace(config, **WAYS[way])
    train(given, tmp_path / "run")
    train(replace(given, steps=2), tmp_path / "run", resume=True)
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "finished"
    assert run.steps["step"].tolist() == [1, 2]
    assert run.steps["grad_norm"].max() > 0
    assert len(run.tokens()) == run.steps["tokens"].sum() * given.epochs
    assert len(run.probes) > 0 if way == "probe" else True


def test_adapters_train(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    train(replace(config, lora_rank=2, steps=2), tmp_path / "run")
    assert open_run(tmp_path / "run").steps["grad_norm"].max() > 0


def test_the_gpu_decides_precision_mode_and_micro_batches(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LARGE_VOCABULARY", 10)
    policy = train(replace(config, steps=1), tmp_path / "run")
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    assert {p.dtype for p in policy.rounded.parameters()} == {torch.bfloat16}
    run = open_run(tmp_path / "run")
    assert run.manifest["capture"]["mode"] == "replace"
    assert run.manifest["capture"]["microbatch_tokens"] > 1000
    first = run.tokens().query("minibatch == 0")
    assert (first["logp"] - first["logp_old"]).abs().max() < 1e-2  # as bfloat16 rounds
    lasting = replace(config, steps=1, capture_mode="passive")
    train(lasting, tmp_path / "passive")
    assert open_run(tmp_path / "passive").manifest["capture"]["mode"] == "passive"


@needs_ledger
def test_a_gpu_without_memory_names_what_to_change(config: TrainConfig, tmp_path: Path) -> None:
    def full(row: dict[str, float]) -> None:
        LEDGER.most_bytes = 1 << 12

    try:
        with pytest.raises(UserError, match="the GPU has no memory for a step") as refused:
            train(replace(config, steps=2), tmp_path / "run", progress=full)
    finally:
        LEDGER.most_bytes = None
    for name in ("microbatch_size", "sample_batch_size", "gradient_checkpointing"):
        assert name in str(refused.value)
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "out_of_memory"
    assert run.steps["step"].tolist() == [1]


@needs_ledger
@pytest.mark.parametrize("way", ["grpo", "wapo", "replace"])
def test_the_host_seldom_waits(way: str, config: TrainConfig, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    given = replace(config, model=str(model), max_new_tokens=64, **WAYS[way])
    given = replace(given, eval_every=0, steps=1, rescore_every=0)
    with LEDGER.counting() as waits:
        train(given, tmp_path / "run")
    run = open_run(tmp_path / "run")
    longest = int(run.rollouts["length"].max())
    assert longest > 32
    sampling = sum(n for (_, line), n in waits.items() if "train/sampler.py" in line)
    assert sampling <= -(-longest // 16) + 1
    assert sampling <= run.steps["tokens"].iloc[0] / 16
    updates = int(run.steps["updates"].iloc[0])
    pieces = updates * (2 if way == "wapo" else 1)
    # Before the first step, after the last, for eight rollouts of a step; events: the writer waits.
    elsewhere = ("models.py", "checkpoint.py", "lm_head.py", "sampler.py", "record/topk.py")
    learning = {
        at: n
        for at, n in waits.items()
        if at[0] != "event" and not any(name in at[1] for name in elsewhere)
    }
    once = 9  # a step: texts, lengths and sums to the host, weights to the device
    assert sum(learning.values()) <= 4 * pieces + once, learning


@needs_ledger
@pytest.mark.parametrize("fused", [True, False])
def test_splitting_a_step_waits_once_at_most(fused: bool) -> None:
    """A fused AdamW keeps a step count of every parameter on the device."""
    weights = [torch.nn.Parameter(torch.ones(3, device="cuda")) for _ in range(6)]
    optimizer = torch.optim.AdamW(weights, fused=fused)
    before = Before.of(weights, optimizer)
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    gradients = [[torch.full_like(weight, 0.125) for weight in weights]] * 4
    with LEDGER.counting() as waits:
        split_step(weights, optimizer, before, gradients, 1.0)
    assert sum(waits.values()) <= 1, waits
