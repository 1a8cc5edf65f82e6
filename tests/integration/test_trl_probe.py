"""Probes of a real trl GRPOTrainer: the training stays bitwise the same, and the parts add up."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra [trl]")

from tests.support.trl_toy import run, toy_trainer
from wapo_analysis import UserError, attach, open_run
from wapo_analysis.probes import closure_error, three_numbers
from wapo_analysis.schema import GRADIENT, MOMENTUM, OTHER_TOKENS, UPDATE

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {"max_steps": 4, "weight_decay": 0.1, "learning_rate": 1e-3, "num_iterations": 2}


def probed(folder: Path, **knobs: Any) -> dict[str, torch.Tensor]:
    trainer = toy_trainer(folder / "out", **SETTINGS)
    with attach(trainer, folder / "run", probe_every=2, **knobs):
        return run(trainer)


def test_probing_changes_no_weight_and_no_random_number(tmp_path: Path) -> None:
    plain = run(toy_trainer(tmp_path / "plain", **SETTINGS))
    after = torch.random.get_rng_state()
    weights = probed(tmp_path, probe_rows=4)
    assert torch.equal(after, torch.random.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    assert open_run(tmp_path / "run").probes["step"].unique().tolist() == [2, 4]


def test_parts_account_for_the_step_and_add_up(tmp_path: Path) -> None:
    probed(tmp_path)
    table = open_run(tmp_path / "run")
    probes = table.probes
    assert probes["closure_error"].max() < 1e-2
    assert closure_error(probes) < 1e-12
    assert (probes["tokens_of"] == OTHER_TOKENS).any()
    norms = probes.groupby("part")["step_norm"].first()
    assert (norms[[GRADIENT, MOMENTUM, UPDATE]] > 0).all()
    joint = probes[probes["part"] == GRADIENT].groupby("step")["grad_norm"].first()
    steps = table.steps.set_index("step")["grad_norm"]
    np.testing.assert_allclose(joint, steps.loc[joint.index], rtol=1e-3)
    assert three_numbers(probes)["measured"].abs().max() > 1e-4
    assert np.isfinite(probes[probes["part"] == UPDATE]["predicted_dentropy"]).all()
    assert (table.steps["seconds_probe"] > 0).all()


def test_without_probes_nothing_is_written(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out", **SETTINGS)
    with attach(trainer, tmp_path / "run"):
        run(trainer)
    assert open_run(tmp_path / "run").probes.empty


def test_an_optimizer_that_cannot_be_split_stops_probing_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = toy_trainer(tmp_path / "out", **{**SETTINGS, "optim": "adagrad"})
    with caplog.at_level(logging.WARNING), attach(trainer, tmp_path / "run", probe_every=1) as a:
        run(trainer)
    assert a.recorder.failure is None
    told = [r.getMessage() for r in caplog.records if "probing stopped" in r.getMessage()]
    assert len(told) == 1
    assert "a step of Adagrad" in told[0]
    assert len(open_run(tmp_path / "run").steps) == 4


def test_what_cannot_be_probed_is_refused(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out", **SETTINGS)
    with pytest.raises(UserError, match="probe_every must be 0"):
        attach(trainer, tmp_path / "run", probe_every=-1)
    trainer.model.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"needs float32 weights, got torch\.bfloat16"):
        attach(trainer, tmp_path / "run", probe_every=1)
    assert not (tmp_path / "run").exists()
