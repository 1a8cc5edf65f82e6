"""wapo audit: bugs are named, right loops are told nothing, what is missing is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.bug_bench import BUGS, RIGHT, judge, train
from tests.support.builders import write_fake_run
from wapo_analysis import TrainConfig
from wapo_analysis.audit import audit
from wapo_analysis.audit.making import first_pass, making
from wapo_analysis.cli import run as wapo
from wapo_analysis.store import open_run
from wapo_analysis.train.loop import train as train_own

QUICK = {
    "prompt": "outside the loss mask", "no_end": "the last token of every rollout",
    "top_p": "ratios are not 1", "shifted": "neighbour's reward", "inverted": "ratio is inverted",
    "clip_side": "wrong side", "micro_means": "declared is a mean over each rollout",
    "divided_twice": "add up to 1/4", "frozen": "no log-probability changes",
    "duplicates": "are copies",
}  # fmt: skip
OWN = ("grpo", "dr_grpo", "dapo", "dr_dapo", "dr_dapo_seq", "gspo", "raft", "raft++", "wapo")


@pytest.mark.parametrize("bug", QUICK)
def test_bugs_are_named(bug: str, tmp_path: Path) -> None:
    steps, found = judge(bug, tmp_path / "r")
    assert steps == 1
    assert any(QUICK[bug] in s.says for s in found.deviations), [s.says for s in found.deviations]
    assert all(s.cause and s.place for s in found.deviations)


@pytest.mark.parametrize("variant", RIGHT)
def test_right_loops_are_told_nothing(variant: str, tmp_path: Path) -> None:
    steps, found = judge(variant, tmp_path / "r")
    assert steps == 0
    assert found.deviations == ()
    assert found.behaves_as.startswith("grpo (")


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values())
def test_every_bug_is_named_within_three_steps(bug: str, tmp_path: Path) -> None:
    steps, _ = judge(bug, tmp_path / "r")
    assert 1 <= steps <= 3


def own_run(objective: str, folder: Path, **settings: Any) -> Any:
    config = TrainConfig(
        objective=objective, steps=1, prompts_per_step=4, rollouts_per_prompt=8, minibatches=2,
        epochs=2, lr=3e-4, checkpoint_every=0, rescore_every=0, device="cpu", **settings,
    )  # fmt: skip
    train_own(config, folder, threads=1)
    return open_run(folder)


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_the_objective_is_told_from_one_step(objective: str, tmp_path: Path) -> None:
    found = audit(own_run(objective, tmp_path / "r"), 1)
    assert found.behaves_as.startswith(f"{objective} (")
    assert found.deviations == ()


@pytest.mark.slow
@pytest.mark.parametrize("objective", OWN)
def test_all_nine_objectives_are_told(objective: str, tmp_path: Path) -> None:
    run = own_run(objective, tmp_path / "r")
    found = audit(run)
    assert found.behaves_as.startswith(f"{objective} (")
    assert found.deviations == ()
    # And without being told what it is:
    manifest = json.loads((run.path / "manifest.json").read_text())
    del manifest["crc32"]
    (run.path / "manifest.json").write_text(json.dumps({**manifest, "objective": {}}))
    told = audit(open_run(run.path)).behaves_as
    expected = {"gspo": "rollout ratio (mean)", "raft": "no ratio"}.get(objective, "token ratio")
    assert told.startswith(expected)


def test_another_objective_than_declared_is_named(tmp_path: Path) -> None:
    run = own_run("dapo", tmp_path / "r")
    manifest = json.loads((run.path / "manifest.json").read_text())
    del manifest["crc32"]
    manifest["objective"]["name"] = "grpo"
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    found = audit(open_run(run.path))
    (deviation,) = found.deviations
    assert deviation.check == "mean"
    assert "over the tokens of each group, declared is a mean over each rollout" in deviation.says


def test_the_command_prints_and_its_exit_code_tells(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train("", tmp_path / "right")
    train("sign", tmp_path / "wrong")
    assert wapo(["audit", str(tmp_path / "right")]) == 0
    assert "no deviation found" in capfd.readouterr().out
    assert wapo(["audit", str(tmp_path / "wrong"), "-f", "json"]) == 1
    found = json.loads(capfd.readouterr().out)
    sign = next(s for s in found["statements"] if s["check"] == "sign")
    assert sign["kind"] == "deviates"
    assert len(sign["tokens"]) == 3


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    bare = audit(open_run(write_fake_run(tmp_path / "r", steps=3, missing=["coef", "logp_old"])))
    kinds = {s.check: s.kind for s in bare.statements}
    assert bare.deviations == ()
    assert kinds["gradient"] == kinds["first pass"] == "unknown"
    none = audit(open_run(write_fake_run(tmp_path / "s", steps=3, token_every=0)))
    assert "no token rows" in none.statements[0].says


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25])
def test_a_forgotten_temperature_is_told_from_noise(scale: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 30)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sampled = (q := np.exp(logits / scale)) / q.sum(1, keepdims=True)
    token = np.array([rng.choice(30, p=row) for row in sampled])
    rows = np.arange(400)
    entropy = -(p * np.log(p)).sum(1)
    found = first_pass(
        np.log(p[rows, token]), np.log(sampled[rows, token]), entropy, np.full(400, 1e-3)
    )
    assert found is not None
    assert (found.temperature > 1) == (scale > 1)
    noisy = first_pass(
        np.log(p[rows, token]), np.log(p[rows, token]) + rng.normal(0, 0.1, 400), entropy,
        np.full(400, 1e-3),
    )  # fmt: skip
    assert noisy is not None
    assert np.isnan(noisy.temperature)
    assert not noisy.one_sided


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("group mean", lambda r: r - r.mean()),
        ("group mean, sample std", lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4)),
        ("group mean, population std", lambda r: (r - r.mean()) / (r.std() + 1e-6)),
        ("leave one out", lambda r: (r - r.mean()) * len(r) / (len(r) - 1)),
        ("the reward itself", lambda r: r),
    ],
)
def test_how_advantages_were_made(name: str, make: Any) -> None:
    rng = np.random.default_rng(1)
    reward = rng.random((5, 6))
    table = pd.DataFrame({
        "step": 1, "group": np.repeat(np.arange(5), 6), "rollout": np.arange(30),
        "reward": reward.ravel(), "advantage": np.concatenate([make(row) for row in reward]),
    })  # fmt: skip
    found = making(table)
    assert found is not None
    assert found.names == (name,)
    moved = (
        table.assign(advantage=np.roll(table.advantage, 1)) if name == "the reward itself" else None
    )
    if moved is not None:
        assert making(moved).shifted in (1, -1)  # type: ignore[union-attr]
    shuffled = table.assign(advantage=rng.permutation(table.advantage.to_numpy()))
    assert making(shuffled).names == ()  # type: ignore[union-attr]
