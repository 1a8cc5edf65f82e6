"""What an audit says of right trainers, of wrong ones, and of what it cannot see."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.bug_bench import flat, loop, recipes
from tests.support.audit_rows import evidence, token_rows
from tests.support.step_logs import reopened, write_steps
from wapo_analysis import TrainConfig, open_run, schema
from wapo_analysis.audit import Audit, audit, first_audit, judge
from wapo_analysis.audit.evidence import Evidence
from wapo_analysis.cli import run as wapo
from wapo_analysis.objectives.table import OBJECTIVES
from wapo_analysis.store import Run
from wapo_analysis.table import Records
from wapo_analysis.train.loop import train

QUICK = (
    "padding in the loss", "end token left out of the loss", "mean over the padded length",
    "sample std", "ratio inverted", "duplicated rollouts",
)  # fmt: skip


def audited(folder: Path, bug: str = "", steps: int = 1, **settings: object) -> Audit:
    recorder = loop.train(folder, bug, steps=steps, **settings)  # type: ignore[arg-type]
    assert recorder.failure is None
    return audit(open_run(folder))


def names(found: Audit) -> list[str]:
    return [deviation.name for deviation in found.deviations]


def test_the_own_trainer_does_what_it_says(tiny_run: Path) -> None:
    found = audit(open_run(tiny_run))
    assert found.fits[0] == "grpo"
    assert not found.deviations
    assert "behaves as grpo (mean over each rollout's tokens), as declared" in found.summary
    assert found.facts["advantages"] == "(reward - group mean) / population std of the group"


def test_a_run_without_any_gradient_is_judged(tiny_config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(tiny_config, max_new_tokens=1, steps=3), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.steps["reward"].tolist() == [0.0, 0.0, 0.0]
    found = audit(run)
    assert names(found) == []
    assert found.facts["other terms"].startswith("none: tokens of advantage 0 carry no gradient")


@pytest.mark.parametrize("other", ["dr_grpo", "dapo", "raft++", "wapo"])
def test_a_wrong_declaration_is_told(tiny_run: Path, other: str) -> None:
    from wapo_analysis.objectives.config import ObjectiveConfig

    seen = Evidence.of_run(open_run(tiny_run), 1)
    declared = dataclasses.asdict(ObjectiveConfig(name=other, max_seq_len=64))
    found = judge(dataclasses.replace(seen, manifest={**seen.manifest, "objective": declared}), "x")
    assert found.fits[0] == "grpo"
    assert found.deviations
    assert f"behaves as grpo (mean over each rollout's tokens), declared {other}" in found.summary


@pytest.mark.parametrize("bug", QUICK)
def test_a_bug_of_a_loop_is_named_after_one_step(tmp_path: Path, bug: str) -> None:
    found = audited(tmp_path / "run", bug)
    assert loop.BUGS[bug] in names(found)
    assert all(d.says and d.tokens and d.cause and d.look for d in found.deviations)


@pytest.mark.parametrize("mean", ["rollout", "token"])
def test_nothing_is_said_of_a_right_loop(tmp_path: Path, mean: str) -> None:
    found = audited(tmp_path / "run", steps=2, mean=mean)
    assert not found.deviations
    assert found.fits[0] == {"rollout": "grpo", "token": "dapo"}[mean]


def test_a_ratio_of_1_tells_no_core_and_says_so(tmp_path: Path) -> None:
    found = audited(tmp_path / "run", epochs=1, pieces=1)
    assert {"grpo", "gspo", "sapo"} <= set(found.fits)
    assert "cannot be told apart" in found.summary
    assert "no clip can act" in found.missing["clip"]


def test_the_command_prints_text_json_and_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audited(tmp_path / "run", "sample std")
    assert wapo(["audit", str(tmp_path / "run"), "--format", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["deviations"][0]["name"] == "another advantage"
    assert wapo(["audit", str(tmp_path / "run"), "--format", "markdown"]) == 1
    assert "usual cause" in capsys.readouterr().out


def test_a_run_without_token_rows_says_what_is_missing(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokens")
    assert wapo(["audit", str(tmp_path / "run")]) == 0
    assert "no token rows were recorded" in capsys.readouterr().out


def audited_flat(folder: Path, bug: str = "", steps: int = 1, **settings: Any) -> Audit:
    recorder = flat.train(folder, bug, steps=steps, **settings)
    assert recorder.failure is None
    return audit(open_run(folder))


@pytest.mark.parametrize(
    "bug", ["prompt counted in the length", "advantages normalised twice", "one advantage for all"]
)
def test_a_bug_of_a_flat_loop_is_named_after_one_step(tmp_path: Path, bug: str) -> None:
    assert recipes.BUGS[bug] in names(audited_flat(tmp_path / "run", bug))


@pytest.mark.parametrize("recipe", ["KL", "dropout", "GAE", "engine with correction"])
def test_nothing_is_said_of_a_right_flat_loop(tmp_path: Path, recipe: str) -> None:
    assert not audited_flat(tmp_path / "run", recipe=recipes.RECIPES[recipe]).deviations


def test_a_loop_names_no_other_loss_for_its_advantages(tmp_path: Path) -> None:
    recipe = recipes.RECIPES["rollouts picked by reward, leave one out"]
    assert audited_flat(tmp_path / "run", recipe=recipe).fits[0] == "dapo"


def test_an_imported_table_without_passes_tells_no_first_pass(tmp_path: Path) -> None:
    flat.train(tmp_path / "run", steps=1)
    rows = open_run(tmp_path / "run").tokens()
    names_few = ["step", "rollout", "position", "advantage", "logp", "logp_old", "coef"]
    rows[names_few].to_parquet(tmp_path / "few.parquet")
    assert wapo(["import", str(tmp_path / "few.parquet"), "--out", str(tmp_path / "imported")]) == 0
    found = audit(open_run(tmp_path / "imported"))
    assert not found.deviations
    assert found.declared == "nothing"
    assert "first pass" in found.missing


@pytest.mark.slow
@pytest.mark.parametrize("second", [{}, {"prompts": 2, "size": 6}, {"prompts": 2, "cut": True}])
def test_nothing_is_said_of_two_processes(tmp_path: Path, second: dict[str, Any]) -> None:
    one = recipes.Recipe(prompts=4)
    flat.train_ranks(tmp_path / "run", [one, dataclasses.replace(one, **second)])
    found = audit(open_run(tmp_path / "run"))
    assert not found.deviations
    assert found.fits[0] == "dapo"


@pytest.mark.slow
def test_a_token_mean_over_each_process_is_named(tmp_path: Path) -> None:
    given = [recipes.Recipe(prompts=4), recipes.Recipe(prompts=3, size=6)]
    flat.train_ranks(tmp_path / "run", given, "every rank divides by its own tokens")
    found = audit(open_run(tmp_path / "run"))
    assert names(found) == ["another mean"]
    assert "token mean over each process" in found.deviations[0].says


@pytest.mark.slow
@pytest.mark.parametrize("bug", sorted(recipes.BUGS))
def test_a_bug_of_a_flat_loop_is_named_within_three_steps(tmp_path: Path, bug: str) -> None:
    audited_flat(tmp_path / "run", bug, steps=3)
    run = open_run(tmp_path / "run")
    assert any(recipes.BUGS[bug] in names(audit(run, steps)) for steps in (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES))
def test_nothing_is_said_of_right_flat_loops(tmp_path: Path, recipe: str, seed: int) -> None:
    audited_flat(tmp_path / "run", steps=3, recipe=recipes.RECIPES[recipe], seed=seed)
    run = open_run(tmp_path / "run")
    assert not any(audit(run, steps).deviations for steps in (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("bug", sorted(set(loop.BUGS) - set(QUICK)))
def test_a_bug_of_a_loop_is_named_within_three_steps(tmp_path: Path, bug: str) -> None:
    mean = "token" if bug == "micro-batch token means averaged" else "rollout"
    assert loop.BUGS[bug] in names(audited(tmp_path / "run", bug, steps=3, mean=mean))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("mean", "epochs", "pieces"), [
    ("rollout", 1, 1), ("rollout", 3, 4), ("token", 2, 2), ("token", 1, 4), ("rollout", 2, 1),
])  # fmt: skip
def test_nothing_is_said_of_right_loops(
    tmp_path: Path, seed: int, mean: str, epochs: int, pieces: int
) -> None:
    found = audited(tmp_path / "run", steps=3, seed=seed, mean=mean, epochs=epochs, pieces=pieces)
    assert not found.deviations


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_all_nine_objectives_are_told_from_one_step(objective: str, tmp_path: Path) -> None:
    config = TrainConfig(
        objective=objective, steps=1, prompts_per_step=4, rollouts_per_prompt=8, minibatches=2,
        epochs=2, lr=1e-3, checkpoint_every=0, rescore_every=0, device="cpu", seed=1,
    )  # fmt: skip
    train(config, tmp_path / "r", threads=1)
    found = audit(open_run(tmp_path / "r"))
    assert found.fits[0] == objective
    assert not found.deviations


TRL_LOSSES = (
    *({"loss_type": loss} for loss in ("grpo", "dr_grpo", "dapo", "bnpo", "sapo", "vespo")),
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
)
TRL_RIGHT = (
    *TRL_LOSSES,
    *({**loss, "per_device_train_batch_size": 8, "num_generations": 4} for loss in TRL_LOSSES),
    {"loss_type": "dapo", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 16, "steps_per_generation": 2, "num_iterations": 1},
    {"importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "top_entropy_quantile": 0.4},
    {"scale_rewards": "batch"},
    {"off_policy_mask_threshold": 0.01},
    {"loss_type": "dapo", "mask_truncated_completions": True},
    {"beta": 2.0, "num_iterations": 1, "learning_rate": 5e-2},
    {"beta": 0.1, "use_bias_correction_kl": False},
    {"bf16": True, "dtype": "bfloat16"},
    {"dropout": 0.1},
    {"lora": 0.1},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"entropy_coef": 0.01},
    {"engine": 0.05},
)


@pytest.mark.slow
@pytest.mark.parametrize("settings", TRL_RIGHT, ids=lambda s: "-".join(map(str, s.values())))
def test_trl_losses_are_told_and_nothing_else(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from experiments.bug_bench import with_trl

    with_trl.train(tmp_path / "run", **settings)
    for steps in (1, 3):
        found = audit(open_run(tmp_path / "run"), steps)
        assert not found.deviations
        if "engine" not in settings:  # its weights are part of every coefficient
            assert found.fits[0] == settings.get("loss_type", "grpo")


@pytest.mark.slow
def test_bugs_of_trl_are_named_within_three_steps(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from experiments.bug_bench import with_trl

    missed = []
    for number, (bug, expected) in enumerate(with_trl.BUGS.items()):
        with_trl.train(tmp_path / str(number) / "run", bug)
        run = open_run(tmp_path / str(number) / "run")
        if not any(expected in names(audit(run, steps)) for steps in (1, 2, 3)):
            missed.append(bug)
    assert not missed


def test_a_run_without_token_rows_is_told_why() -> None:
    rows = {name: values[:0] for name, values in token_rows([2]).items()}
    found = judge(evidence(rows, objective={"name": "grpo"}), "r")
    why = "no token rows were recorded (token_every, attach, or an import of token tables)"
    assert found.summary == f"cannot be audited: {why}"
    assert found.missing == {"everything": why}
    assert (found.steps, found.tokens, found.fits) == ((), 0, ())
    assert "No deviation found." not in found.to_text()
    assert "no steps, 0 tokens" in found.to_text()


@pytest.mark.parametrize(
    ("steps", "said"), [([1], "step 1"), ([1, 2], "2 steps from 1 to 2"), ([3, 7, 9],
                                                                           "3 steps from 3 to 9")]
)  # fmt: skip
def test_the_page_says_what_was_looked_at(steps: list[int], said: str) -> None:
    rows = token_rows([2] * len(steps), step=np.array(steps))
    found = judge(evidence(rows), "my run")
    assert f"Audit of my run, {said}, {2 * len(steps)} tokens" in found.to_text()
    assert found.summary.startswith("the objective cannot be told, because only")
    assert "No deviation found." in found.to_text()
    assert "not available here, because" in found.to_text()


def recorded(path: Path, steps: int, **columns: Any) -> Run:
    """A loop's run with token rows of some steps."""
    write_steps(path, {"reward": [0.5] * max(steps, 1)}, source="loop")
    writer = reopened(path)
    for step in range(1, steps + 1):
        rows = token_rows([4, 4], step=step) | columns
        writer.write_part(Records.build(schema.TOKENS, rows), step)
    writer.close("finished")
    return open_run(path)


def test_ten_steps_are_looked_at_and_three_beside_other_things(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", 12)
    assert audit(run).steps == tuple(range(1, 11))
    assert audit(run, 2).steps == (1, 2)
    first = first_audit(run)
    assert first is not None
    assert first.steps == (1, 2, 3)


def test_without_token_rows_or_gradients_there_is_no_first_audit(tmp_path: Path) -> None:
    assert first_audit(recorded(tmp_path / "none", 0)) is None
    assert first_audit(recorded(tmp_path / "bare", 2, coef=np.full(8, np.nan))) is None
    assert audit(recorded(tmp_path / "empty", 0)).summary.startswith("cannot be audited")
