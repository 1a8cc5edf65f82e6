"""``wapo compare`` says where two settings part, in text and in JSON."""

import json
from pathlib import Path

import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.cli import run


@pytest.mark.slow
def test_compare_tells_where_two_settings_part(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        write_fake_run(tmp_path / f"a{seed}", objective="grpo", seed=seed, drift="explosion")
        write_fake_run(tmp_path / f"b{seed}", objective="wapo", seed=seed, drift="healthy")
    assert run(["compare", str(tmp_path), "--format", "json"]) == 0
    parting = json.loads(capfd.readouterr().out)["parting"]
    entropy = next(p for p in parting["partings"] if p["quantity"] == "entropy")
    assert isinstance(entropy["step"], int)
    assert entropy["lasting"]
    assert run(["compare", str(tmp_path)]) == 0
    assert f"entropy at step {entropy['step']}" in " ".join(capfd.readouterr().out.split())
