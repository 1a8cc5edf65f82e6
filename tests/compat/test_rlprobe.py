"""rlprobe's synthetic failures are named and its healthy run is left alone.

pip install rlprobe==0.1.0
pytest -m slow tests/compat/test_rlprobe.py
"""

from pathlib import Path

import pytest

from wapo_analysis.diagnose import Diagnosis, diagnose
from wapo_analysis.importers import import_run
from wapo_analysis.store import open_run

generate_run = pytest.importorskip("rlprobe.testing.synth").generate_run

NAMED = {
    "kl_blowup": {"kl_drift"},
    "entropy_collapse": {"entropy_collapse"},
    "reward_hack_length": {"reward_pays_for_length"},
    "format_gaming": {"form_rises_alone"},
    "clip_saturation": {"clip_saturation"},
    "adv_collapse": {"advantages_vanish"},
    "value_divergence": {"value_diverges"},
    "grad_pathology": {"gradient_spikes"},
    "truncation_starve": {"truncation_drift"},
    "repetition_spiral": {"repetition_drift"},
    "reward_std_death": {"stalled"},
    "ref_drift_asymmetry": {"kl_by_position"},
    "degenerate_groups": {"zero_signal", "zero_signal_too_easy"},
    "throughput_rot": {"steps_slow_down"},
}
INFO = ("degenerate_groups", "throughput_rot", "reward_hack_length")
"""Told, not always as a warning."""


def read(tmp_path: Path, scenario: str | None, seed: int) -> Diagnosis:
    source = tmp_path / f"{scenario}-{seed}"
    generate_run(source, scenario, n_steps=300, seed=seed)
    out = tmp_path / f"run-{scenario}-{seed}"
    import_run(source, out)
    return diagnose(open_run(out))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", sorted(NAMED))
def test_a_failure_is_named_over_ten_seeds(tmp_path: Path, scenario: str) -> None:
    for seed in range(10):
        d = read(tmp_path, scenario, seed)
        told = {f.name for f in d.findings if f.severity != "info" or scenario in INFO}
        assert told & NAMED[scenario], (seed, d.verdict, sorted(told))


@pytest.mark.slow
def test_the_healthy_run_is_left_alone_over_twenty_seeds(tmp_path: Path) -> None:
    for seed in range(20):
        d = read(tmp_path, None, seed)
        assert d.verdict == "healthy"
        assert not [f.name for f in d.findings if f.severity != "info"]
