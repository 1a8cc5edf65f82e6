"""The GPU recipe on a GPU, small: its own start, two runs at a time, stopped and continued."""

import json
from pathlib import Path

import pytest
import torch

from experiments import gpu_grpo_vs_wapo as recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_runs_share_the_gpu_and_a_second_command_reports_them(tmp_path: Path) -> None:
    arguments = ["--tiny", "--pretrain", "--device", "cuda", "--workers", "2", "--seeds", "1"]
    arguments += ["--out", str(tmp_path)]
    assert recipe.main([*arguments, "--budget-seconds", "0"]) == recipe.UNFINISHED
    weights = tmp_path / "pretrained" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert recipe.main(arguments) == 0
    assert weights.stat().st_mtime_ns == written, "the second command has the same start"
    results = json.loads((tmp_path / "ship" / "results.json").read_text())
    assert results["device"] == torch.cuda.get_device_name()
    assert [row["status"] for row in results["runs"]] == ["finished"] * 4
    assert all(row["device"].startswith("cuda") for row in results["runs"])


def test_bfloat16_adapters_train(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    arguments = ["--tiny", "--lora", "--device", "cuda", "--settings", "stress"]
    arguments += ["--seeds", "1", "--workers", "1", "--out", str(tmp_path)]
    assert recipe.main(arguments) == 0
    rows = json.loads((tmp_path / "ship" / "results.json").read_text())["runs"]
    assert all(row["grad_norm_max"] > 0 for row in rows)
