"""Several runs at once: results, progress, and what one failure does to the others."""

import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from time import sleep

import pytest

from wapo_analysis.cli import run
from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.jobs import Job, train_all


@pytest.mark.slow
def test_jobs_run_apart_and_one_failure_stops_no_other(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    good = Job(tiny_config, tmp_path / "good")
    bad = Job(replace(tiny_config, model="absent.gguf"), tmp_path / "bad")
    seen: list[Sequence[int]] = []
    failures = train_all([bad, good], workers=1, progress=seen.append)
    assert failures[0] is not None
    assert "no model file at absent.gguf" in failures[0]
    assert failures[1] is None
    assert open_run(good.out).steps.step.tolist() == [1, 2, 3]
    assert seen[-1] == [0, 3]


@pytest.mark.slow
def test_a_killed_worker_is_told_and_not_raised(tiny_config: TrainConfig, tmp_path: Path) -> None:
    import multiprocessing

    def kill(done: Sequence[int]) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None and done[0] >= 1:
                os.kill(child.pid, signal.SIGKILL)

    job = Job(replace(tiny_config, steps=400), tmp_path / "run")
    (failure,) = train_all([job], workers=1, progress=kill)
    assert failure is not None
    assert "killed" in failure
    assert len(open_run(job.out).steps) >= 1, "what was written before stays readable"


@pytest.mark.slow
def test_ctrl_c_ends_the_run_in_progress_and_begins_no_other(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    def interrupt(done: Sequence[int]) -> None:
        if done[0] >= 1:
            raise KeyboardInterrupt

    long = replace(tiny_config, steps=2000)
    jobs = [Job(long, tmp_path / name) for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        train_all(jobs, workers=1, progress=interrupt)
    assert open_run(jobs[0].out).status == "interrupted"
    assert [job.out.exists() for job in jobs] == [True, False, False]


@pytest.mark.slow
def test_ctrl_c_during_a_training_says_how_it_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"

    def interrupt() -> None:
        while not (folder / "steps.jsonl").exists():
            sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt, daemon=True).start()
    small = ["--prompts", "2", "--rollouts", "2", "--minibatches", "1"]
    assert run(["train", "--steps", "2000", *small, "--out", str(folder)]) == 130
    again = capfd.readouterr().err.strip().splitlines()[-1].partition(" goes on with ")[2]
    assert again == f"wapo train --out '{folder}' --resume"
    steps = len(open_run(folder).steps)
    assert run([*shlex.split(again)[1:], "--steps", str(steps + 1)]) == 0
    assert len(open_run(folder).steps) == steps + 1


def test_two_jobs_may_not_share_a_folder(tiny_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="same folder"):
        train_all([Job(tiny_config, tmp_path / "a")] * 2)
