"""The GPU recipe on a CPU, small: it trains, stops in time, goes on, and reports."""

import argparse
import json
import signal
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from experiments import gpu_grpo_vs_wapo as recipe
from experiments.gpu_start import (
    ERROR_RATE,
    Story,
    join_parts,
    last_number,
    write_problems,
)
from wapo_analysis.errors import UserError
from wapo_analysis.store import MANIFEST, open_run
from wapo_analysis.train.checkpoint import last_checkpoint
from wapo_analysis.train.jobs import Job
from wapo_analysis.train.models import load_policy
from wapo_analysis.train.tasks import get_task

FOREVER = float("inf")


def options(out: Path, *more: str) -> argparse.Namespace:
    return recipe.parse(["--tiny", "--device", "cpu", "--out", str(out), *more])


def jobs(out: Path, *more: str) -> list[Job]:
    given = options(out, "--settings", "stress", "--seeds", "1", *more)
    return recipe.recipe_jobs(out, recipe.base_config(given), given.settings, given.seeds)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recipe")
    arguments = ["--tiny", "--device", "cpu", "--settings", "stress", "--seeds", "1"]
    assert recipe.main([*arguments, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_both_objectives_start_alike_and_see_the_same_prompts(done: Path) -> None:
    grpo, wapo = (open_run(done / "stress" / f"{name}-0") for name in recipe.OBJECTIVES)
    assert [run.manifest["status"] for run in (grpo, wapo)] == ["finished"] * 2
    assert grpo.manifest["config"]["epochs"] == 4
    assert grpo.manifest["config"]["lr"] == 4 * recipe.RECIPES["tiny"].lr
    first = [run.rollouts[run.rollouts.step == 1] for run in (grpo, wapo)]
    assert first[0].completion.tolist() == first[1].completion.tolist()
    assert grpo.rollouts.prompt.tolist() == wapo.rollouts.prompt.tolist()
    assert grpo.steps.grad_norm.tolist() != wapo.steps.grad_norm.tolist()


@pytest.mark.slow
def test_what_is_shipped_is_small_and_agrees_with_the_runs(done: Path) -> None:
    files = sorted((done / "ship").iterdir())
    assert [file.name for file in files] == ["results.json", "stress.csv", "stress.html"]
    assert all(file.stat().st_size < recipe.FILE_LIMIT for file in files)
    results = json.loads(files[0].read_text())
    assert results["finished"]
    assert [row["objective"] for row in results["runs"]] == ["grpo", "wapo"]
    for row in results["runs"]:
        run = open_run(done / "stress" / f"{row['objective']}-0")
        assert row["grad_norm_max"] == run.steps.grad_norm.max()
        assert row["pass@1_before"] == run.manifest["eval_before"]["eval/pass@1"]
        assert row["pass@1"] == run.steps["eval/pass@1"].iloc[-1]
        assert row["verdict"] == "insufficient_data"
    assert len(pd.read_csv(files[1])) == 2 * recipe.RECIPES["tiny"].steps
    assert set(results["compare"]) == {"stress"}
    assert len(list((done / "stress" / "figures").glob("*.png"))) > 5


@pytest.mark.slow
def test_the_table_has_a_line_per_run(done: Path) -> None:
    rows = json.loads((done / "ship" / "results.json").read_text())["runs"]
    rows[0]["pass@1"] = None
    header, _, first, second = recipe.table(rows).splitlines()
    assert "pos_peak / pos_valley / neg_peak / neg_valley" in header
    assert first.startswith("| stress | grpo 0 | 4 | ")
    assert " -> n/a |" in first
    assert second.endswith(" | insufficient_data |")
    assert {line.count(" | ") for line in (header, first, second)} == {8}


@pytest.mark.slow
def test_finished_runs_are_not_trained_again(done: Path) -> None:
    found = jobs(done)
    before = [(job.out / "steps.jsonl").stat().st_mtime_ns for job in found]
    assert recipe.train_recipe(found, FOREVER, workers=1) == ["finished", "finished"]
    assert [(job.out / "steps.jsonl").stat().st_mtime_ns for job in found] == before


@pytest.fixture
def background() -> Iterator[None]:
    """As a shell starts a command in the background: Ctrl-C is ignored."""
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, held)


@pytest.mark.slow
@pytest.mark.usefixtures("background")
def test_a_run_out_of_time_goes_on_as_if_it_had_not_stopped(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs(tmp_path)[0]
    with monkeypatch.context() as patch:
        clock = chain([0.0], repeat(2.0))  # the time is over once the run has begun
        patch.setattr(recipe, "time", SimpleNamespace(time=lambda: next(clock)))
        assert recipe.train_until(job, deadline=1.0, threads=1) == "interrupted"
    assert (job.done_steps(), last_checkpoint(job.out)[1]) == (2, 2)
    assert recipe.train_until(job, time.time() - 1, threads=1) == "interrupted"
    assert job.done_steps() == 2
    assert recipe.train_until(job, FOREVER, threads=1) == "finished"
    assert len(open_run(job.out).manifest["resumed"]) == 1
    whole, parted = (
        load_file(last_checkpoint(run)[0] / "model.safetensors")
        for run in (done / "stress" / "grpo-0", job.out)
    )
    assert all(torch.equal(weight, parted[name]) for name, weight in whole.items())


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    job = jobs(tmp_path, "--steps", "1")[0]
    assert recipe.train_until(job, FOREVER, threads=1) == "finished"
    rmtree(job.out / "checkpoints")
    manifest = json.loads((job.out / MANIFEST).read_text())
    (job.out / MANIFEST).write_text(json.dumps({**manifest, "status": "running"}))
    assert recipe.train_until(job, FOREVER, threads=1) == "finished"
    assert job.done_steps() == 1


def test_without_time_nothing_is_trained_and_the_exit_code_says_so(tmp_path: Path) -> None:
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--budget-seconds", "0"]
    assert recipe.main(arguments) == recipe.UNFINISHED
    results = json.loads((tmp_path / "ship" / "results.json").read_text())
    assert (results["finished"], results["runs"]) == (False, [])


def test_one_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    broken, sound = jobs(tmp_path, "--steps", "1")
    broken.out.parent.mkdir(parents=True)
    broken.out.write_text("in the way")
    first, second = recipe.train_recipe([broken, sound], FOREVER, workers=1)
    assert (first, second) == ("failed", "finished")


@pytest.mark.slow
def test_the_policy_pretrained_on_the_spot_trains_on_word_problems(tmp_path: Path) -> None:
    job = jobs(tmp_path, "--pretrain", "--steps", "1")[0]
    policy = load_policy(str(tmp_path / "pretrained"), torch.device("cpu"))
    rng = np.random.default_rng(0)
    for _ in range(20):
        story = Story.draw(rng)
        text = story.demonstrate(rng)
        ids = policy.tokenizer(text)["input_ids"]
        assert policy.decode(ids) == text
        assert policy.encode(story.prompt()) + ids == policy.encode(story.prompt() + text)
    assert recipe.train_until(job, FOREVER, threads=1) == "finished"
    run = open_run(job.out)
    assert run.manifest["task"] == recipe.REWARD
    assert run.rollouts.prompt.str.endswith("Answer:").all()
    assert run.manifest["data"]["skipped"] == []


def test_word_problems_are_right_and_demonstrations_half_right(tmp_path: Path) -> None:
    file = write_problems(tmp_path / "words.jsonl", count=300)
    for line in file.read_text().splitlines():
        row = json.loads(line)
        steps, _, final = row["answer"].partition("\n#### ")
        results = []
        for step in steps.removesuffix(".").split(". "):
            left, _, right = step.partition(" = ")
            a, sign, b = left.split()
            assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
            results.append(int(right))
        assert int(final) == results[-1]
        assert last_number(f" {steps} The answer is {final}.", row["answer"]) == 1.0
    rng = np.random.default_rng(1)
    stories = [Story.draw(rng) for _ in range(3000)]
    right = [last_number(s.demonstrate(rng), str(s.solve()[1])) for s in stories]
    expected = np.mean([(1 - ERROR_RATE) ** len(story.changes) for story in stories])
    # Two errors can cancel, so a few more are right than are without error.
    assert expected - 0.03 < np.mean(right) < expected + 0.05


def test_the_file_is_in_the_form_of_gsm8k(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    task = get_task("gsm8k", str(write_problems(tmp_path / "words.jsonl", count=50)))
    record = task.data_record()
    assert (record["train"] + record["held_out"], record["skipped"]) == (50, [])


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("40 + 2 = 42. The answer is 42.", 1),
        ("It is 42", 1),
        ("1,042", 0),
        ("42 - 1 = 41.", 0),
        ("-42", 0),
        ("42.0", 1),
        ("no number", 0),
        ("", 0),
        ("9" * 5000, 0),
    ],
)
def test_the_last_number_counts(completion: str, reward: float) -> None:
    assert last_number(completion, "40 + 2 = 42.\n#### 42") == reward


def test_parts_make_up_the_model_or_are_refused(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).bytes(1000)
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "part-aa").write_bytes(whole[:400])
    (folders[1] / "part-ab").write_bytes(whole[400:800])
    (folders[1] / "part-ac").write_bytes(whole[800:])
    with pytest.raises(UserError, match="sha256"):
        join_parts(folders, tmp_path / "model.gguf")
    (folders[0] / "sha256").write_text(f"{sha256(whole).hexdigest()}  model.gguf\n")
    assert join_parts(folders, tmp_path / "model.gguf").read_bytes() == whole
    with pytest.raises(UserError, match="1 parts have SHA-256"):
        join_parts(folders[:1], tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


def test_bfloat16_trains_adapters_beside_the_weights(tmp_path: Path) -> None:
    found = recipe.base_config(options(tmp_path, "--lora"))
    assert (found.precision, found.lora_rank) == ("bf16-mixed", 32)
