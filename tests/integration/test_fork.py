"""Forks: the rest of a run again from a step of it, the same but for what was changed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from wapo_analysis.cli import run as wapo
from wapo_analysis.compare.fork import compare_fork
from wapo_analysis.errors import UserError
from wapo_analysis.store import Run, open_run, read_manifest
from wapo_analysis.train.checkpoint import last_checkpoint
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.fork import fork_run, plan_fork
from wapo_analysis.train.loop import train

STEPS, EVERY = 6, 2
TIMES = ("seconds", "seconds_rollout", "seconds_capture", "seconds_probe", "seconds_writer")


@pytest.fixture(scope="module")
def original(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with a checkpoint after every second; tests must not change it."""
    out = tmp_path_factory.mktemp("forks") / "original"
    config = replace(
        tiny_config, steps=STEPS, checkpoint_every=EVERY, keep_checkpoints=9, lr=1e-3,
        lr_schedule="cosine", warmup_steps=1,
    )  # fmt: skip
    train(config, out)
    return out


def table(run: Run, name: str) -> pd.DataFrame:
    found: pd.DataFrame = getattr(run, name) if name != "tokens" else run.tokens(derived=False)
    return found.drop(columns=[c for c in TIMES if c in found])


def assert_same_run(first: Path, second: Path) -> None:
    one, two = open_run(first), open_run(second)
    for name in ("steps", "classes", "rollouts", "tokens"):
        pd.testing.assert_frame_equal(table(one, name), table(two, name), check_exact=True)
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(last_checkpoint(run)[0] / file) for run in (first, second))
        assert a.keys() == b.keys()
        assert all(a[key].equal(b[key]) for key in a), file


@pytest.mark.parametrize("step", [0, 4, 5])
def test_a_fork_with_nothing_changed_is_the_original(
    step: int, original: Path, tmp_path: Path
) -> None:
    before = {f: f.stat().st_mtime_ns for f in original.rglob("*")}
    found = fork_run(plan_fork(original, step, {}), tmp_path / "fork")
    assert_same_run(original, tmp_path / "fork")
    assert found.steps.index.tolist() == list(range(step + 1, STEPS + 1))
    assert (found.prompts["difference"] == 0).all()
    assert {f: f.stat().st_mtime_ns for f in original.rglob("*")} == before


def test_a_change_acts_after_the_step_and_on_nothing_else(original: Path, tmp_path: Path) -> None:
    plan = plan_fork(original, 3, {"exclude_bins": ["neg_peak"]})
    assert (plan.checkpoint, plan.last) == (2, STEPS)
    assert plan.start == (
        "starts from the checkpoint of step 2, the nearest at or before step 3; up to there the "
        "run is repeated unchanged"
    )
    found = fork_run(plan, tmp_path / "fork")
    old, new = open_run(original), open_run(tmp_path / "fork")
    shared = [table(run, "steps").query("step <= 3") for run in (old, new)]
    pd.testing.assert_frame_equal(*shared, check_exact=True)
    for run in (old, new):
        assert run.steps.step.tolist() == list(range(1, STEPS + 1))
    columns = ["step", "group", "rollout", "prompt"]
    assert old.rollouts[columns].equals(new.rollouts[columns])
    first_own = [r.rollouts.query("step == 4")["completion"].tolist() for r in (old, new)]
    assert first_own[0] == first_own[1], "the policy of step 4 is still the same, and the noise"
    assert not old.steps.query("step == 4")["loss"].equals(new.steps.query("step == 4")["loss"])
    assert new.steps["lr"].equals(old.steps["lr"])

    manifest = read_manifest(tmp_path / "fork")
    assert manifest.forked == {
        "run": str(original),
        "step": 3,
        "checkpoint": 2,
        "change": {"exclude_bins": [[], ["neg_peak"]]},
        "notes": ["The repeated step 3 came out as recorded, to the last digit."],
    }
    assert manifest.label == "GRPO, after step 3: exclude_bins neg_peak"
    assert manifest.objective["exclude_bins"] == ["neg_peak"]
    assert manifest.status == "finished"
    assert found.change == {"exclude_bins": ([], ["neg_peak"])}


def test_the_comparison_is_paired_by_prompt(original: Path, tmp_path: Path) -> None:
    fork_run(plan_fork(original, 2, {"objective": "wapo"}), tmp_path / "fork")
    found = compare_fork(open_run(tmp_path / "fork"))
    old, new = open_run(original).rollouts, open_run(tmp_path / "fork").rollouts
    differences = []
    for step in range(3, STEPS + 1):
        for group in range(4):
            rewards = [t[(t.step == step) & (t.group == group)].reward.mean() for t in (old, new)]
            differences.append(rewards[1] - rewards[0])
    assert np.allclose(found.prompts["difference"], differences)
    assert found.reward.n == len(differences)
    assert found.reward.mean == pytest.approx(np.mean(differences))
    assert found.at_end["entropy_fork"] == open_run(tmp_path / "fork").steps.entropy.iloc[-1]
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["pairs"] == sum(data["prompts"].values()) == len(differences)
    assert data["forked"]["change"] == {"objective": ["grpo", "wapo"]}
    for text in (found.to_text(), found.to_markdown(), found._repr_html_()):
        assert "objective grpo -" in text
        assert "16 prompts" in text


def test_a_shorter_fork_keeps_the_schedule_and_goes_on(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "fork"
    fork_run(plan_fork(original, 2, {"epochs": 2}, steps=2), out)
    run = open_run(out)
    assert run.steps["lr"].tolist() == open_run(original).steps["lr"].tolist()[:4]
    assert (run.manifest.planned_steps, run.manifest.config["steps"]) == (4, STEPS)
    assert wapo(["train", "--out", str(out), "--resume", "--threads", "1"]) == 0
    assert open_run(out).steps["lr"].equals(open_run(original).steps["lr"])
    again = plan_fork(out, 4, {"epochs": 1})
    assert again.original.label == "GRPO, after step 2: epochs 2"
    with pytest.raises(UserError, match=r"at or before step 1 \(it has: .*it was forked itself"):
        plan_fork(out, 1, {})


def test_a_broken_checkpoint_is_passed_over(original: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(original, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "trainer.json").unlink()
    plan = plan_fork(tmp_path / "run", 5, {})
    assert plan.checkpoint == 2
    fork_run(plan, tmp_path / "fork")
    assert_same_run(original, tmp_path / "fork")


REFUSED = {
    "unknown setting 'lrr'": ["--at", "2", "--set", "lrr=1"],
    "seed cannot change in a fork": ["--at", "2", "--set", "seed=1"],
    "--at must be 0 to 5": ["--at", "6"],
    "length of a fork is given by --steps": ["--at", "2", "--set", "steps=9"],
    "no whole checkpoint at or before step 1 (it has: 2, 4, 6); --at 0": ["--at", "1"],
    "unknown objective 'wap'": ["--at", "2", "--objective", "wap"],
    "lr_schedule is cosine ends with it, at step 6": ["--at", "2", "--steps", "9"],
    "exists and is not empty": ["--at", "2", "--out", "."],
}


@pytest.mark.parametrize(("line", "options"), REFUSED.items())
def test_what_cannot_be_forked_is_one_line(
    line: str,
    options: list[str],
    original: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert wapo(["fork", str(original), *options]) == 2
    *_, told = capfd.readouterr().err.splitlines()
    assert line in told
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_run_of_another_trainer_has_nothing_to_fork(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.support.builders import write_fake_run

    path = write_fake_run(tmp_path / "r", steps=3, manifest={"source": "trl"})
    assert wapo(["fork", str(path), "--at", "1"]) == 2
    assert "was not written by wapo train" in capfd.readouterr().err


def test_the_command_prints_the_comparison(
    original: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--at", "4", "--set", "lr=1e-5", "--format", "json", "--threads", "1"]
    assert wapo(["fork", str(original), *options]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["forked"]["change"] == {"lr": [1e-3, 1e-5]}
    assert "starts from the checkpoint of step 4" in err
    assert (original.with_name("original-fork-4-lr-1e-5") / "manifest.json").exists()
