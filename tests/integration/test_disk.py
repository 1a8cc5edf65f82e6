"""A disk that takes no checkpoint never ends the training; the ending and the exit code tell it."""

import errno
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from tests.support.builders import write_fake_run
from wapo_analysis.cli.train import _ended, shown_progress
from wapo_analysis.store import manifest as store_manifest
from wapo_analysis.store import open_run, read_manifest
from wapo_analysis.store.manifest import write_manifest
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train


def test_a_checkpoint_that_cannot_be_written_is_told_once_and_training_goes_on(
    tiny_config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(tiny_config, steps=3, checkpoint_every=1)
    run = tmp_path / "run"

    def in_the_way(row: dict[str, float]) -> None:
        if row["step"] == 1:
            (run / "checkpoints").rename(run / "moved")
            (run / "checkpoints").write_text("no folder")

    with caplog.at_level(logging.WARNING):
        policy = train(config, run, progress=in_the_way)
    told = [r.message for r in caplog.records if "not written" in r.message]
    assert len(told) == 1
    assert "step 2" in told[0]
    assert open_run(run).manifest.status == "checkpoint_failed"
    assert len(open_run(run).steps) == 3
    assert [f.name for f in (run / "moved").iterdir()] == ["step-00000001"]
    plain = train(config)
    for mine, theirs in zip(policy.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("status", ["recording_failed", "checkpoint_failed", "running"])
def test_the_exit_code_tells_a_job_script(
    tmp_path: Path, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_fake_run(tmp_path / "run", steps=8, status=status)
    with pytest.raises(typer.Exit) as left:
        _ended(run)
    assert left.value.exit_code == 3
    assert status in capsys.readouterr().err


def test_a_folder_that_vanished_is_told(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit) as left:
        _ended(tmp_path / "gone")
    assert left.value.exit_code == 3
    _ended(write_fake_run(tmp_path / "whole", steps=8))


def test_the_ending_is_written_where_nothing_else_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_fake_run(tmp_path / "run", steps=8)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_manifest, "write_atomic", full)
    write_manifest(run, read_manifest(run).changed({"status": "recording_failed"}))
    assert read_manifest(run).status == "recording_failed"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_fake_run(tmp_path / "run", steps=8)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with shown_progress("grpo seed 0", 3) as shown:
            for step in (1, 2, 3):
                shown({"step": step, "reward": 0.5, "entropy": 1.0})
        told = capsys.readouterr().err.splitlines()
        _ended(run)  # says where the run is, or leaves it; never an exit
        monkeypatch.undo()
    assert told == ["wapo: progress is no longer shown: No space left on device; training goes on"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_result_that_cannot_be_printed_is_one_line_and_a_failure(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", steps=8)
    command = f"'{sys.executable}' -m wapo_analysis diagnose '{run}' > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "wapo: cannot read or write the output: No space left on device\n",
    )
