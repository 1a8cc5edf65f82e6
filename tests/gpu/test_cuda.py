"""The same promises on a GPU: statistics equal the CPU's, watching changes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wapo_analysis.stats import token_stats
from wapo_analysis.store import open_run
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(300, 4096, generator=generator) * 3).to(dtype)
    logits[:100, 5] += 20
    targets = torch.randint(4096, (300,), generator=generator)
    targets[:50] = 5
    here, there = token_stats(logits, targets, 0.8), token_stats(logits.cuda(), targets.cuda(), 0.8)
    for a, b in zip(here[:4], there[:4], strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-9)


def test_a_watched_run_on_the_gpu_is_the_plain_run(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, device="cuda", deterministic=True, steps=2)
    plain, watched = train(config), train(config, tmp_path / "run")
    other = watched.module.state_dict()
    assert all(torch.equal(v, other[name]) for name, v in plain.module.state_dict().items())
    assert open_run(tmp_path / "run").manifest["device"].startswith("cuda")
