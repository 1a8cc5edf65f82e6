"""Joining the processes a launcher has started: places, refusals, launchers, interrupts."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.processes import ended, started, stop
from wapo_analysis import open_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.distributed import ALONE, World
from wapo_analysis.train.launched import check_processes, joined_processes, launched
from wapo_analysis.train.loop import train

SHARED = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "minibatches": 2, "device": "cpu"}


class Place(World):
    """The arithmetic of one process among several, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_shares_split_every_run_evenly_in_order(run: int, runs: int, size: int) -> None:
    rows = run * size * runs
    shares = [Place(rank, size).share(rows, runs) for rank in range(size)]
    assert sorted(torch.cat(shares).tolist()) == list(range(rows))
    for share in shares:
        assert share.tolist() == sorted(share.tolist())
        assert torch.bincount(share // (run * size), minlength=runs).tolist() == [run] * runs


def test_one_process_shares_with_nobody() -> None:
    assert ALONE.share(6, 3).tolist() == list(range(6))
    placed = ALONE.collect(torch.tensor([True]), torch.tensor([2]), 3)
    assert placed.tolist() == [False, False, True]
    assert ALONE.in_turn(lambda: 7) == ALONE.longest(7) == ALONE.gather(7)[0] == 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "8 rollouts .* split evenly over 3 processes"),
        ({"minibatches": 1, "prompts_per_step": 3, "probe_every": 2}, "probe_every works with one"),
        (
            {"prompts_per_step": 3, "eval_every": 1, "eval_prompts": 1, "eval_samples": 2},
            "too small for 3 processes",
        ),
    ],
)
def test_settings_that_cannot_be_shared_are_refused(settings: dict[str, Any], words: str) -> None:
    config = TrainConfig.from_dict({**SHARED, **settings})
    check_processes(config, ALONE)
    with pytest.raises(UserError, match=words):
        check_processes(config, Place(0, 3))
    with pytest.raises(UserError, match=words):
        train(config, world=Place(0, 3))


def test_only_a_launcher_makes_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == (0, 1)
    with joined_processes("cpu") as world:
        assert world is ALONE
    for name, value in {"RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == (3, 4)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in {**places, "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(UserError, match="4 processes on a machine with 1 GPU; start at most 1"),
        joined_processes("auto"),
    ):
        pass


# ---- through the command line -------------------------------------------------------------------

TRAIN = [sys.executable, "-W", "ignore", "-m", "wapo_analysis", "train"]
SMALL = ["--prompts", "4", "--rollouts", "4", "--minibatches", "2", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_train_and_the_report_is_drawn(launcher: str, tmp_path: Path) -> None:
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--nproc-per-node", "2"]
    else:
        pytest.importorskip("accelerate")
        start = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-W", "ignore", "-m", *start, "-m", "wapo_analysis", "train"]
    command += [*SMALL, "--steps", "2", "--out", str(tmp_path / "run")]
    [(code, printed, errors)] = ended(started(command, None))
    assert code == 0, errors[-3000:]
    assert printed.count("run: ") == 1
    run = open_run(tmp_path / "run")
    assert (run.manifest["status"], run.manifest["processes"]) == ("finished", 2)
    assert wapo(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0


@pytest.mark.slow
def test_a_batch_that_cannot_be_split_is_told_once(tmp_path: Path) -> None:
    command = [*TRAIN, *SMALL, "--prompts", "3", "--minibatches", "4"]
    first, second = ended(started([*command, "--out", str(tmp_path / "run")]))
    assert (first[0], second[0]) == (2, 2)
    assert first[2].strip() == (
        "wapo: a mini-batch of 3 rollouts (prompts_per_step 3 x rollouts_per_prompt 4 / "
        "minibatches 4) cannot be split evenly over 2 processes"
    )
    assert second[1] == second[2] == ""
    assert not (tmp_path / "run").exists()


@contextmanager
def training(out: Path, command: list[str], places: int | None) -> Iterator[list[subprocess.Popen]]:
    """A long run, once it has made a step."""
    arguments = [*SMALL, "--steps", "100000", "--set", "checkpoint_every=1", "--out", str(out)]
    workers = started([*command, *arguments], places)
    try:
        before = monotonic()
        while not (out / "checkpoints").is_dir() or not list((out / "checkpoints").glob("step*")):
            assert all(worker.poll() is None for worker in workers)
            assert monotonic() - before < 200
            sleep(0.1)
        yield workers
    finally:
        stop(workers)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_other(rank: int, tmp_path: Path) -> None:
    with training(tmp_path / "run", TRAIN, 2) as workers:
        workers[rank].kill()
        code, _, errors = ended([workers[1 - rank]], timeout=60)[0]
    assert code == 1
    assert "stopped: another process of this run has ended" in errors
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == ("failed" if rank == 1 else "running")
    assert len(run.steps) >= 1
    assert len(run.tokens()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("through", ["torchrun", "one process"])
def test_an_interrupt_ends_all_after_a_whole_step(through: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "wapo_analysis", "train"] if through == "torchrun" else TRAIN
    places = None if through == "torchrun" else 2
    with training(tmp_path / "run", command, places) as workers:
        workers[-1].send_signal(signal.SIGINT)
        found = ended(workers, timeout=60)
    if through == "one process":
        assert [code for code, *_ in found] == [130, 130]
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "interrupted"
    last = run.steps["step"].max()
    for table in (run.tokens(), run.rollouts):
        assert set(table[table["step"] == last]["rank"]) == {0, 1}
    config = replace(TrainConfig.from_dict(run.manifest["config"]), steps=int(last) + 1)
    train(config, tmp_path / "run", resume=True)
    assert open_run(tmp_path / "run").manifest["status"] == "finished"
