"""Copies of the step log: TensorBoard read back, W&B offline, failures that stop nothing."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run
from wapo_analysis.train import loggers
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the event files, by its tag."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_holds_the_step_log(tiny_config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="extra tensorboard is not installed")
    config = replace(tiny_config, log_to="tensorboard", eval_every=2, eval_prompts=2)
    train(config, tmp_path / "run")
    steps, read = open_run(tmp_path / "run").steps, scalars(tmp_path / "run")
    for column, tag in {
        "reward": "train/reward",
        "entropy": "train/entropy",
        "eval/pass@1": "eval/pass@1",
        "seconds_rollout": "seconds/seconds_rollout",
    }.items():
        there = steps[["step", column]].dropna()
        assert [step for step, _ in read[tag]] == there.step.tolist()
        np.testing.assert_allclose([v for _, v in read[tag]], there[column], rtol=1e-6)


def test_a_resumed_run_replaces_what_was_logged_of_later_steps(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="extra tensorboard is not installed")
    config = replace(tiny_config, log_to="tensorboard", steps=3, checkpoint_every=1)
    train(config, tmp_path / "run")
    from shutil import rmtree

    rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    train(replace(config, steps=4), tmp_path / "run", resume=True)
    assert [step for step, _ in scalars(tmp_path / "run")["train/reward"]] == [1, 2, 3, 4]


def test_event_files_of_a_resumed_run_are_in_order_by_name(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    # TensorBoard reads them so, and of one second a tenth file would come before the ninth
    pytest.importorskip("tensorboard", reason="extra tensorboard is not installed")
    for after in (None, 1, 2):
        loggers.open_loggers("tensorboard", tmp_path, tiny_config, after).close("finished")
    seconds = [file.name.split(".")[3] for file in (tmp_path / "tensorboard").iterdir()]
    assert len(set(seconds)) == 3


@pytest.mark.slow
def test_wandb_offline(tiny_config: TrainConfig, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(replace(tiny_config, log_to="wandb"), tmp_path / "run")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    late = time.monotonic() + 10  # W&B's own process may still write when its finish() returns
    while b"train/reward" not in file.read_bytes():
        assert time.monotonic() < late
        time.sleep(0.05)


class FakeRun:
    """What the logger uses of a W&B run."""

    id = "abc"

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.exit_code: int | None = None

    def log(self, row: dict[str, float], step: int) -> None:
        self.logged.append((row, step))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The package, faked: its settings of init and its run are kept."""
    fake = SimpleNamespace(run=FakeRun(), settings=[], __spec__=object())

    def init(**settings: object) -> FakeRun:
        fake.settings.append(settings)
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_is_given_every_step_and_the_same_run_on_resume(
    wandb: SimpleNamespace, tiny_config: TrainConfig, tmp_path: Path, monkeypatch
) -> None:
    config = replace(tiny_config, log_to="wandb", steps=2)
    train(config, tmp_path / "run")
    assert [step for _, step in wandb.run.logged] == [1, 2]
    assert "train/reward" in wandb.run.logged[0][0]
    assert wandb.run.exit_code == 0
    assert wandb.settings[0]["project"] == "wapo-analysis"
    assert wandb.settings[0]["config"]["objective"] == "grpo"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(replace(config, steps=3), tmp_path / "run", resume=True)
    assert wandb.settings[1]["project"] == "mine"
    assert (wandb.settings[1]["id"], wandb.settings[1]["resume"]) == ("abc", "allow")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_logger_stops_no_training(
    where: str, wandb: SimpleNamespace, tiny_config: TrainConfig, tmp_path: Path, caplog
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    setattr(wandb if where == "init" else wandb.run, where, fail)
    train(replace(tiny_config, log_to="wandb"), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "finished"
    assert len(run.steps) == tiny_config.steps
    warned = [r.getMessage() for r in caplog.records if "no network" in r.getMessage()]
    assert len(warned) == 1
    assert "wandb" in warned[0]


def test_a_missing_package_is_told_before_anything_is_written(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "wapo-analysis\[tensorboard\]"'):
        train(replace(tiny_config, log_to="both"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
