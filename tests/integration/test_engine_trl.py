"""``wapo train --engine trl`` on real TRL: the built-in trainer's run, in one process or two."""

import signal
import sys
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest

pytest.importorskip("trl", reason="needs the extra [trl]")

from safetensors.torch import load_file

from tests.support.processes import ended, started, stop
from wapo_analysis import open_run
from wapo_analysis.cli import run as wapo

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = ["--prompts", "4", "--rollouts", "4", "--device", "cpu"]
TRAIN = [sys.executable, "-W", "ignore", "-m", "wapo_analysis", "train", "--engine", "trl"]
RECIPES = {
    "grpo": [
        "--objective", "grpo", "--steps", "3", "--minibatches", "1", "--eval-every", "2",
        "--set", "eval_prompts=5",
    ],
    "wapo-lora": [
        "--objective", "wapo", "--steps", "2", "--minibatches", "2", "--epochs", "2",
        "--lora-rank", "4", "--lr", "1e-3",
    ],
    "dapo-bins": ["--objective", "dapo", "--exclude-bins", "pos_valley", "--steps", "2",
                  "--minibatches", "2", "--microbatch-size", "4"],
}  # fmt: skip


def weights(run: Path) -> dict[str, np.ndarray]:
    """Trained weights, or adapters, of the last checkpoint."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    name = next(
        f for f in ("adapter_model.safetensors", "model.safetensors") if (last / f).exists()
    )
    return {key: value.numpy() for key, value in load_file(last / name).items()}


def largest_gap(first: Path, second: Path) -> float:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)


def train(recipe: list[str], out: Path, *more: str) -> None:
    assert wapo(["train", *SMALL, *recipe, "--out", str(out), *more]) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_end_where_one_does(name: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(RECIPES[name], one, "--engine", "trl")
    for code, _, errors in ended(started([*TRAIN, *SMALL, *RECIPES[name], "--out", str(two)])):
        assert code == 0, errors[-3000:]
    assert largest_gap(one, two) < 1e-5
    single, both = open_run(one), open_run(two)
    assert both.manifest["processes"] == 2
    assert sorted(both.rollouts["completion"]) == sorted(single.rollouts["completion"])
    assert set(both.tokens()["rank"]) == {0, 1}
    evaluated = [c for c in single.steps if c.startswith("eval/") and c != "eval/seconds"]
    assert bool(evaluated) == (name == "grpo")
    for column in ("reward", "entropy", "tokens", *evaluated):
        np.testing.assert_allclose(both.steps[column], single.steps[column], rtol=1e-4)


def test_it_trains_what_the_built_in_trainer_trains(tmp_path: Path) -> None:
    own, theirs = tmp_path / "own", tmp_path / "trl"
    train(RECIPES["grpo"], own)
    train(RECIPES["grpo"], theirs, "--engine", "trl")
    assert largest_gap(own, theirs) < 1e-5
    mine, told = open_run(own), open_run(theirs)
    assert sorted(mine.rollouts["completion"]) == sorted(told.rollouts["completion"])
    for column in ("grad_norm", "eval/pass@1", "eval/reward", "eval/entropy", "eval/prompts"):
        np.testing.assert_allclose(mine.steps[column], told.steps[column], rtol=1e-4)
    before = [run.manifest["eval_before"] for run in (mine, told)]
    assert [numbers.pop("eval/seconds") > 0 for numbers in before] == [True, True]
    assert before[0] == pytest.approx(before[1], rel=1e-6)
    # The same commands afterwards.
    for command in (["diagnose", str(theirs)], ["eval", str(theirs), "--prompts", "4"]):
        assert wapo(command) == 0


def test_several_updates_of_a_batch_are_the_built_in_trainers(tmp_path: Path) -> None:
    # With AdamW rounding decides where a gradient is about as small as its epsilon.
    plain = [*RECIPES["wapo-lora"], "--set", "optimizer=sgd", "--lr", "1"]
    own, theirs = tmp_path / "own", tmp_path / "trl"
    train(plain, own)
    train(plain, theirs, "--engine", "trl")
    assert largest_gap(own, theirs) < 1e-6
    moved = max(np.abs(value).max() for name, value in weights(own).items() if "lora_B" in name)
    assert moved > 1e-3  # they begin at 0
    assert len(open_run(theirs).steps) == 8


def test_a_resumed_run_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    recipe = ["--objective", "wapo", "--minibatches", "2", "--set", "checkpoint_every=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train([*recipe, "--steps", "3"], whole, "--engine", "trl")
    train([*recipe, "--steps", "2"], parts, "--engine", "trl")
    assert wapo(["train", "--out", str(parts), "--resume", "--steps", "3"]) == 0
    assert largest_gap(whole, parts) < 1e-6
    found = open_run(parts)
    assert found.steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert len(found.manifest["resumed"]) == 1


def test_an_interrupt_of_one_ends_both_after_a_whole_batch(tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = ["--minibatches", "2", "--steps", "10000"]
    workers = started([*TRAIN, *SMALL, *recipe, "--out", str(out)])
    try:
        before = monotonic()
        while not (out / "steps.jsonl").exists() or not (out / "steps.jsonl").read_bytes():
            assert all(worker.poll() is None for worker in workers)
            assert monotonic() - before < 200
            sleep(0.2)
        workers[1].send_signal(signal.SIGTERM)
        found = ended(workers, timeout=120)
    finally:
        stop(workers)
    assert [code for code, *_ in found] == [130, 130]
    run = open_run(out)
    assert run.manifest["status"] == "interrupted"
    last = int(run.steps["step"].max())
    assert last % 2 == 0
    assert (out / "trl" / f"checkpoint-{last}").is_dir()


def test_a_guard_stops_it_between_batches_and_it_goes_on_from_a_checkpoint_of_the_guard(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    recipe = ["--include-bins", "neg_peak", "--lr", "3e-3", "--minibatches", "2", "--steps", "60"]
    guard = ["--on-warning", "checkpoint", "--on-critical", "stop", "--engine", "trl"]
    assert wapo(["train", *SMALL, *recipe, *guard, "--out", str(out)]) == 130
    run = open_run(out)
    last = int(run.steps["step"].iloc[-1])
    assert last < 120
    assert "stop" in {entry["did"] for entry in run.manifest["guard"]}
    held = {int(f.name.split("-")[1]) for f in (out / "checkpoints").glob("step-*")}
    assert held >= set(run.manifest["guard_checkpoints"]["steps"])
    assert {step % 2 for step in held} == {0}, "a batch is two updates"
    back = min(held)
    again = ["train", "--out", str(out), "--resume", "--checkpoint", str(back)]
    # On a busy machine the guard first looks late; going on it may look, and stop, before that.
    again += ["--on-critical", "checkpoint"]
    assert wapo([*again, "--steps", str(last // 2)]) == 0
    found = open_run(out)
    assert found.steps["step"].tolist() == list(range(1, last + 1))
    assert len(found.manifest["resumed"]) == 1
