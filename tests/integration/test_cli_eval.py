"""``wapo eval`` and the options of ``wapo train`` for long runs."""

import json
from pathlib import Path

import pytest

from wapo_analysis.cli import run as wapo
from wapo_analysis.store import open_run

SMALL = "--steps 4 --prompts 2 --rollouts 2 --minibatches 1 --threads 1".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "evaluated"
    options = "--eval-every 2 --set eval_prompts=5 --set eval_samples=2 --set checkpoint_every=2"
    assert wapo(["train", *SMALL, *options.split(), "--out", str(out)]) == 0
    return out


def evaluation(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    assert wapo(["eval", *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_eval_repeats_what_the_run_measured(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(trained)
    assert run.steps.step[run.steps["eval/reward"].notna()].tolist() == [2, 4]
    for step, measured in (
        (0, run.manifest["eval_before"]),
        (2, run.steps.iloc[1]),
        (4, run.steps.iloc[3]),
    ):
        told = evaluation(capsys, str(trained), "--checkpoint", str(step))
        assert told["checkpoint"] == step
        for name in ("pass@1", "pass@2", "reward", "entropy", "length"):
            assert told[name] == pytest.approx(measured[f"eval/{name}"]), name


def test_eval_takes_the_last_checkpoint_and_its_own_numbers(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = evaluation(capsys, str(trained), "--prompts", "12", "--samples", "3")
    assert (told["checkpoint"], told["prompts"], told["samples"]) == (4, 12, 3)
    assert set(told["standard_error"]) == {"pass@1", "pass@2", "pass@3"}
    assert told["pass@1"] <= told["pass@2"] <= told["pass@3"]
    one = evaluation(capsys, str(trained), "--prompts", "1")
    assert one["standard_error"]["pass@1"] is None


def test_eval_prints_text_and_completions(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert wapo(["eval", str(trained), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert "checkpoint of step 4\n  5 held-out prompts, 2 completions each" in out
    assert out.count("\n>>> ") == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--checkpoint", "3"], "unknown checkpoint 3; allowed: 2, 4"),
        (["--temperature", "0"], "temperature must be positive"),
        (["--prompts", "0"], "prompts"),
    ],
)
def test_eval_refuses_in_one_line(
    arguments: list[str], line: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert wapo(["eval", str(trained), *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_set_takes_any_setting_and_named_options_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--set", "lr=2e-3", "--set", 'stop=["a", "b"]', "--set", "label=my run"]
    out = tmp_path / "run"
    assert wapo(["train", *SMALL, *given, "--set", "seed=5", "--seed", "3", "--out", str(out)]) == 0
    config = open_run(out).manifest["config"]
    assert (config["lr"], config["stop"], config["label"]) == (2e-3, ["a", "b"], "my run")
    assert config["seed"] == 3
    for bad, line in (("steps", "NAME=VALUE"), ("no=1", "unknown setting 'no'"), ("lr=x", "lr")):
        capsys.readouterr()
        assert wapo(["train", "--set", bad, "--out", str(tmp_path / "bad")]) == 2
        assert line in capsys.readouterr().err
