"""rl-doctor's synthetic failures are named and its healthy run is left alone.

pip install rldoctor==0.2.0
pytest -m slow tests/compat/test_rl_doctor.py
"""

import json
from pathlib import Path

import pytest

from wapo_analysis.diagnose import Diagnosis, diagnose
from wapo_analysis.importers import import_run
from wapo_analysis.store import open_run

simulate = pytest.importorskip("rl_doctor.simulate").simulate

NAMED = {
    "entropy_collapse": {"entropy_collapse"},
    "saturated_groups": {"zero_signal_too_easy"},
    "too_hard": {"zero_signal_too_hard"},
    "reward_hacking": {"held_out_falls"},
    "length_hacking": {"length_drift"},
    "truncation": {"truncation_drift"},
    "kl_blowup": {"kl_drift"},
    "clip_saturation": {"clip_saturation_low"},
    "grad_spikes": {"gradient_spikes"},
    "plateau": {"plateau"},
    "format_domination": {"one_reward_takes_over"},
}


def read(tmp_path: Path, scenario: str, seed: int) -> Diagnosis:
    records, _ = simulate(scenario, n_steps=300, seed=seed)
    log = tmp_path / f"{scenario}-{seed}.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / f"run-{scenario}-{seed}"
    import_run(log, out)
    return diagnose(open_run(out))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", sorted(NAMED))
def test_a_failure_is_named_over_ten_seeds(tmp_path: Path, scenario: str) -> None:
    for seed in range(10):
        d = read(tmp_path, scenario, seed)
        loud = {f.name for f in d.findings if f.severity != "info" or scenario == "plateau"}
        assert loud & NAMED[scenario], (seed, d.verdict, sorted(loud))


@pytest.mark.slow
def test_the_healthy_run_is_left_alone_over_twenty_seeds(tmp_path: Path) -> None:
    for seed in range(20):
        d = read(tmp_path, "healthy", seed)
        assert d.verdict == "healthy"
        assert not [f.name for f in d.findings if f.severity != "info"]
