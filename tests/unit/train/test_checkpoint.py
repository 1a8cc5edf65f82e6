"""A stranger's run folder runs nothing: not its manifest's code, not its files, not its models."""

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.train.checkpoint import settings_of
from wapo_analysis.train.evaluate import evaluate_run

SMALL: dict[str, Any] = {"eval_prompts": 2, "eval_samples": 1, "device": "cpu"}


@pytest.fixture
def stranger(tiny_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A real run whose manifest names other settings, and code that leaves a mark."""

    def made(**config: Any) -> Path:
        run = Path(shutil.copytree(tiny_run, tmp_path / "r"))
        rows = ({"prompt": f"{n}+1="} for n in range(40))
        (run / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for place in (run, tmp_path):
            mark = tmp_path / "ran"
            code = f"open({str(mark)!r}, 'w').close()\ndef f(completion):\n    return 0.0\n"
            (place / "evil_reward.py").write_text(code)
        file = run / "manifest.json"
        entries = json.loads(file.read_text())
        entries["config"] |= {"data": str(run / "d.jsonl")} if "task" in config else {}
        entries["config"] |= config
        file.write_text(json.dumps(entries))
        return run

    return made


def refused(command: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert wapo(command) == 2
    told = capfd.readouterr().err
    assert "Traceback" not in told
    return told


def test_code_that_a_manifest_names_does_not_run(
    stranger: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = stranger(task=f"{tmp_path / 'evil_reward.py'}:f", max_new_tokens=6)
    for command in (["eval", str(run)], ["train", "--out", str(run), "--resume", "--steps", "4"],
                    ["fork", str(run), "--at", "0"]):  # fmt: skip
        told = refused(command, capfd)
        assert "names code to be run" in told
        assert "--trust-run" in told
        assert not (tmp_path / "ran").exists()
    assert evaluate_run(run, trust_run=True, **SMALL).rewards.sum() == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["file", "link", "dots", "module", "package"])
def test_no_file_of_the_run_folder_ever_runs(
    form: str, stranger: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stranger(task="chain-sum")
    (run / "pack").mkdir()
    shutil.copy(run / "evil_reward.py", run / "pack" / "__init__.py")
    (tmp_path / "link.py").symlink_to(run / "evil_reward.py")
    monkeypatch.chdir(run)
    task = {
        "file": f"{run}/evil_reward.py:f",
        "link": f"{tmp_path}/link.py:f",
        "dots": f"{run}/../r/pack/../evil_reward.py:f",
        "module": "evil_reward:f",
        "package": "pack.inner:f",
    }[form]
    file = run / "manifest.json"
    entries = json.loads(file.read_text())
    entries["config"] |= {"task": task, "data": "d.jsonl"}
    file.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="lies inside the run folder"):
        evaluate_run(run, trust_run=True, **SMALL)
    assert not (tmp_path / "ran").exists()


def test_a_task_the_user_names_is_the_users_word(
    stranger: Callable[..., Path], tmp_path: Path
) -> None:
    task = f"{tmp_path / 'evil_reward.py'}:f"
    assert settings_of(stranger(task=task), {"task": task}).task == task


def model_folder(folder: Path, pickled: bool, **config: Any) -> Path:
    base = Path(str(files("wapo_analysis") / "assets" / "base"))
    shutil.copytree(base, folder)
    if pickled:
        weights = folder / "model.safetensors"
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_models_that_a_manifest_names_are_safetensors(
    stranger: Callable[..., Path], tmp_path: Path
) -> None:
    run = stranger(model=str(model_folder(tmp_path / "pickled", True)))
    with pytest.raises(UserError, match="cannot load model"):
        evaluate_run(run, 0, **SMALL)
    assert evaluate_run(run, 0, trust_run=True, **SMALL).rewards.shape == (2, 1)


@pytest.mark.parametrize(
    "config",
    [{"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
     {"attn_implementation": "someone/kernel"},
     {"text_config": {"_attn_implementation": "someone/kernel:f"}}],
)  # fmt: skip
def test_models_that_name_code_are_not_loaded(
    config: dict[str, Any], stranger: Callable[..., Path], tmp_path: Path
) -> None:
    run = stranger(model=str(model_folder(tmp_path / "m", False, **config)))
    with pytest.raises(UserError, match=r"its config\.json names code"):
        evaluate_run(run, 0, **SMALL)
    checkpoint = max((run / "checkpoints").iterdir())
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(UserError, match=r"its config\.json names code"):
        evaluate_run(run, **SMALL)
