"""Advice: in the names of the run's trainer, only what applies, nothing on a healthy run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.builders import DRIFTS, write_fake_run
from tests.support.step_logs import ramp, write_steps
from wapo_analysis.diagnose import Diagnosis, diagnose
from wapo_analysis.diagnose.advice import (
    CLASS_ADVICE,
    LOWER_LR,
    NO_CHANGE,
    Advice,
    Situation,
    fork_command,
    trained_classes,
)
from wapo_analysis.diagnose.trainers import BUILT_IN, SETTINGS, setting_name, trainer_of
from wapo_analysis.store import open_run

ALL = trained_classes({}, positive_only=False) | {"unrestricted"}
TRAINERS = sorted({name for setting in SETTINGS.values() for name in setting.names})


def told(advice: Advice, trainer: str | None = BUILT_IN, facts: frozenset[str] = ALL) -> str:
    return str(Situation(trainer, facts).told(advice))


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        (BUILT_IN, "Lower lr tenfold, or lower the updates per batch (epochs x minibatches)."),
        ("trl", "Lower learning_rate tenfold, or lower the updates per batch "
         "(num_iterations x steps_per_generation)."),
        ("openrlhf", "Lower --actor.adam.lr tenfold, or lower the updates per batch "
         "(--train.max_epochs x --rollout.batch_size x --rollout.n_samples_per_prompt / "
         "--train.batch_size)."),
        (None, "Lower the learning rate tenfold, or lower the updates per batch."),
    ],
)  # fmt: skip
def test_settings_are_called_as_the_trainer_calls_them(trainer: str | None, text: str) -> None:
    assert told(LOWER_LR, trainer) == text


def test_a_sentence_that_begins_with_a_setting_begins_with_a_capital() -> None:
    advice = Advice("{temperature} is too low.")
    assert told(advice, "trl") == "Temperature is too low."
    assert told(advice, None) == "The sampling temperature is too low."
    assert told(Advice("wapo is meant."), None) == "wapo is meant."


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_trainer_is_told_of_another_ones_settings(trainer: str) -> None:
    foreign = {
        name
        for setting in SETTINGS.values()
        for other, name in setting.names.items()
        if other != trainer and re.fullmatch(r"\w+_\w+", name)
    } - {setting.names.get(trainer, "") for setting in SETTINGS.values()}
    for cls, advice in CLASS_ADVICE.items():
        words = set(re.findall(r"\w+", told(advice, trainer))) - {cls, *ALL}
        assert not words & foreign, trainer
    assert "{" not in "".join(told(advice, trainer) for advice in CLASS_ADVICE.values())


def test_every_setting_has_plain_words_and_every_trainer_a_learning_rate() -> None:
    assert all(setting_name("lr", trainer) in SETTINGS["lr"].names.values() for trainer in TRAINERS)
    assert setting_name("kl", BUILT_IN) == "the KL coefficient"
    assert len(TRAINERS) == 12


@pytest.mark.parametrize(
    ("manifest", "trainer"),
    [
        ({"source": "built-in"}, BUILT_IN),
        ({"source": "trl", "trainer": "GRPOTrainer"}, "trl"),
        ({"source": "import", "import": {"trainer": "ms-swift"}}, "ms-swift"),
        ({"source": "import", "import": {"trainer": None, "format": "verl"}}, "verl"),
        ({"source": "import", "import": {"format": "NeMo_RL"}}, "nemo-rl"),
        ({"source": "import", "import": {"format": "table"}}, None),
        ({"source": "loop"}, None),
        ({}, None),
    ],
)
def test_the_trainer_is_read_off_the_manifest(
    manifest: dict[str, Any], trainer: str | None
) -> None:
    assert trainer_of(manifest) == trainer


# ---- what applies -------------------------------------------------------------------------------


def test_what_a_trainer_cannot_do_is_not_advised() -> None:
    assert "exclude_bins = neg_peak" in told(CLASS_ADVICE["neg_peak"])
    for trainer in ("trl", "verl", None):
        assert "tokens out of the loss" not in told(CLASS_ADVICE["neg_peak"], trainer)
    assert "wapo_analysis.use_wapo(trainer)" in told(CLASS_ADVICE["neg_peak"], "trl")
    assert "set negative advantages to 0" in told(CLASS_ADVICE["neg_peak"], "verl")


def test_an_objective_without_negatives_is_not_told_to_leave_them_out() -> None:
    facts = trained_classes({"name": "wapo"}, positive_only=True) | {"unrestricted"}
    assert facts == {"pos", "pos_peak", "pos_valley", "unrestricted"}
    assert "positive advantages alone" not in told(CLASS_ADVICE["neg_peak"], facts=facts)


def test_a_class_that_is_out_already_is_not_taken_out_again() -> None:
    facts = trained_classes({"exclude_bins": ["neg_peak"]}, positive_only=False)
    assert "neg_peak" not in facts
    assert "exclude_bins" not in told(CLASS_ADVICE["neg_peak"], facts=facts | {"unrestricted"})


def test_a_run_on_some_classes_is_told_to_train_on_all() -> None:
    facts = trained_classes({"include_bins": ["neg"]}, positive_only=False)
    assert facts == {"neg", "neg_peak", "neg_valley"}
    steps = Situation(BUILT_IN, facts | {"restricted"}).told(CLASS_ADVICE["neg_peak"]).steps
    assert [list(step.change) for step in steps] == [["include_bins"], ["lr"]]


def test_steps_that_are_too_large_come_first() -> None:
    usual = Situation(BUILT_IN, ALL).told(CLASS_ADVICE["neg_peak"]).steps
    large = Situation(BUILT_IN, ALL | {"large_steps"}).told(CLASS_ADVICE["neg_peak"]).steps
    assert usual[0].change == {"exclude_bins": ("neg_peak",)}
    assert large[0].change == {"lr": 0.1}
    assert sorted(map(str, large)) == sorted(map(str, usual))


def test_a_remark_never_changes_the_training() -> None:
    situation = Situation(BUILT_IN, ALL)
    for advice in (*CLASS_ADVICE.values(), LOWER_LR):
        assert not situation.told(advice, remark=True).steps
    assert situation.told(LOWER_LR, remark=True).text == NO_CHANGE
    kept = Advice("Read them.", steps=(Advice("Save more often ({checkpoint_every})."), LOWER_LR))
    assert (
        str(situation.told(kept, remark=True))
        == "Read them. 1. Save more often (checkpoint_every)."
    )


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.1}, "--set lr=2e-4"),
        ({"objective": "wapo"}, "--objective wapo"),
        ({"exclude_bins": ("neg_peak",)}, "--exclude-bins pos_valley,neg_peak"),
        ({"include_bins": ()}, "--set 'include_bins=[]'"),
        ({"epochs": 1}, "--set epochs=1"),
    ],
)
def test_the_command_changes_one_thing(change: dict[str, Any], words: str) -> None:
    config = {"lr": 2e-3, "exclude_bins": ["pos_valley"]}
    assert fork_command("runs/a", 20, change, config) == f"wapo fork runs/a --at 20 {words}"


def test_no_command_without_a_change_or_its_number() -> None:
    assert fork_command("runs/a", 20, {}, {"lr": 1e-4}) is None
    assert fork_command("runs/a", 20, {"lr": 0.1}, {}) is None


# ---- whole runs ---------------------------------------------------------------------------------


def exploding(path: Path, checkpoints: tuple[int, ...] = (), **manifest: Any) -> Diagnosis:
    config = {"config": {"lr": 1e-3, "steps": 40}}
    run = write_fake_run(path, drift="explosion", manifest=config | manifest, token_every=0)
    for step in checkpoints:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return diagnose(open_run(run))


def test_a_failed_run_names_the_command_that_tests_its_advice(tmp_path: Path) -> None:
    d = exploding(tmp_path / "a run", (4, 10, 30, 40))
    assert d.onset_step is not None
    assert 12 <= d.onset_step < 30
    assert d.command is not None
    assert d.command.startswith(f"wapo fork '{tmp_path}/a run' --at 10 --")
    assert f"    {d.command}" in d.to_text().splitlines()
    assert d.best_checkpoint in (4, 10)
    assert f"Best checkpoint: {d.best_checkpoint} (reward 0." in d.to_text()
    assert d.to_dict()["command"] == d.command


def test_the_best_checkpoint_before_a_failure_is_named_though_a_later_one_earned_more(
    tmp_path: Path,
) -> None:
    reward = np.r_[np.linspace(0.2, 0.6, 35), np.full(25, 0.05)]
    run = write_steps(tmp_path / "r", {"entropy": ramp(0.4, 2.0, 60, 25, 10), "reward": reward})
    words = diagnose(open_run(run)).best_words
    assert words == "The reward was best at step 35 (0.59).", "no word of checkpoints: it has none"
    (run / "checkpoints" / "step-00000033").mkdir(parents=True)
    failed = diagnose(open_run(run))
    assert failed.onset_step is not None
    assert 20 < failed.onset_step < 33
    assert f"No checkpoint is from before step {failed.onset_step}." in failed.to_text()
    (run / "checkpoints" / f"step-{failed.onset_step:08d}").mkdir()
    assert diagnose(open_run(run)).best_checkpoint is None
    (run / "checkpoints" / "step-00000010").mkdir()
    found = diagnose(open_run(run))
    assert found.best_checkpoint == 10
    assert "Best checkpoint: 10 (reward 0.3" in found.to_text()


def test_without_a_checkpoint_the_command_repeats_the_run_from_its_start(tmp_path: Path) -> None:
    d = exploding(tmp_path / "run", (30, 40))
    assert f"No checkpoint is from before step {d.onset_step}." in d.to_text()
    assert d.command is not None
    assert d.command.startswith(f"wapo fork {tmp_path}/run --at 0 --")


@pytest.mark.parametrize(
    ("checkpoints", "source", "said"),
    [
        ((), "trl", "Go back to the last checkpoint before step"),
        ((), "verl", "Go back to the last checkpoint before step"),
    ],
)
def test_another_trainers_run_is_told_where_to_go_back_to(
    tmp_path: Path, checkpoints: tuple[int, ...], source: str, said: str
) -> None:
    d = exploding(tmp_path / "run", checkpoints, source=source)
    assert d.command is None
    assert d.findings[0].advice.steps[0].text.startswith(said)


def test_checkpoints_beside_the_source_of_an_import_are_named(tmp_path: Path) -> None:
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-30", "checkpoint-x", "logs"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
    state = tmp_path / "theirs" / "checkpoint-30" / "trainer_state.json"
    state.write_text("{}")
    for place, source in enumerate((tmp_path / "theirs", state)):
        told = {"trainer": "TRL", "source": str(source)}
        d = exploding(tmp_path / str(place), source="import", **{"import": told})
        assert d.findings[0].advice.steps[0].text == "Go back to the checkpoint of step 10."
        assert d.best_checkpoint in (5, 10)


def test_an_imported_run_is_told_of_its_own_trainer(tmp_path: Path) -> None:
    d = exploding(tmp_path / "run", source="import", **{"import": {"trainer": "verl"}})
    text = d.to_text()
    assert "actor_rollout_ref.actor.optim.lr" in text
    assert not re.search(r"\b(lr tenfold|exclude_bins|minibatches)\b", text.replace(".lr", ""))


@pytest.mark.parametrize("objective", ["grpo", "wapo"])
@pytest.mark.parametrize("drift", sorted(DRIFTS))
def test_only_warnings_change_the_training(tmp_path: Path, drift: str, objective: str) -> None:
    d = diagnose(open_run(write_fake_run(tmp_path / "run", drift=drift, objective=objective)))
    for finding in d.findings:
        steps = finding.advice.steps
        assert finding.severity != "info" or not any(step.change for step in steps)
    if d.verdict == "healthy":
        assert d.command is None
