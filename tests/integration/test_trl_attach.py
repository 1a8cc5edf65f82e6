"""Attaching to a real trl GRPOTrainer: nothing else changes, also where something goes wrong."""

import contextlib
import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra [trl]")

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer

import wapo_analysis
from tests.support.trl_toy import run, toy_dataset, toy_model, toy_trainer
from tests.support.trl_watched import expected_coef, recorded, watched_run
from wapo_analysis import UserError, attach, open_run

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


# Watching changes nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_attached_run_is_bitwise_the_plain_run(tmp_path: Path, lora: bool) -> None:
    def build(name: str) -> Any:
        config = LoraConfig(**LORA) if lora else None
        torch.manual_seed(1)
        return toy_trainer(
            tmp_path / name, lora=config, max_steps=5, num_iterations=2, steps_per_generation=4,
            eval_dataset=toy_dataset().select(range(4)), eval_strategy="steps", eval_steps=2,
            per_device_eval_batch_size=4,
        )  # fmt: skip

    plain = build("plain")
    expected = run(plain)
    watched = build("watched")
    with attach(watched, tmp_path / "run", token_every=1, rescore_every=1) as attachment:
        weights = run(watched)
    assert attachment.recorder.failure is None
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert _shown(watched) == _shown(plain)
    run_folder = open_run(tmp_path / "run")
    assert run_folder.steps["step"].tolist() == [1, 2, 3, 4, 5]
    assert np.isfinite(run_folder.tokens()[["coef", "collision_logp_rest", "dprob"]]).all(axis=None)


def _shown(trainer: Any) -> list[dict[str, Any]]:
    """Log entries without ours and without clock times."""
    times = ("runtime", "per_second", "step_time")
    return [
        {k: v for k, v in row.items() if not k.startswith("wapo/") and not k.endswith(times)}
        for row in trainer.state.log_history
    ]


def our_hooks(trainer: Any) -> list[Any]:
    """Forward hooks of ours; transformers leaves some of its own."""
    hooks = [h for m in trainer.model.modules() for h in m._forward_hooks.values()]
    return [h for h in hooks if h.__module__.startswith("wapo_analysis")]


def _state(trainer: Any) -> dict[str, Any]:
    """Every attribute an attachment may touch, by identity."""
    objects = {"model": trainer.model, "accelerator": trainer.accelerator}
    names = (
        "_compute_loss", "_generate_and_score_completions", "_calculate_rewards",
        "training_step", "_get_per_token_logps_and_entropies", "scale_rewards",
        "_wapo_attachment", "_wapo_objective",
    )  # fmt: skip
    found = {name: vars(trainer).get(name) for name in names}
    for key, owner in objects.items():
        for name in ("forward", "clip_grad_norm_"):
            found[f"{key}.{name}"] = vars(owner).get(name)
    found["hooks"] = our_hooks(trainer)
    found["callbacks"] = [id(c) for c in trainer.callback_handler.callbacks]
    return found


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (RuntimeError, "failed"), (KeyboardInterrupt, "interrupted")],
)
def test_undo_is_complete_however_training_ends(
    tmp_path: Path, error: type[BaseException] | None, status: str
) -> None:
    calls = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if error is not None and len(calls) == 2:
            raise error("from the reward function")
        return [float(len(c)) for c in completions]

    trainer = toy_trainer(tmp_path / "out", reward=reward)
    before = _state(trainer)
    with contextlib.ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(error))
        stack.enter_context(attach(trainer, tmp_path / "run"))
        assert our_hooks(trainer)
        run(trainer)
    assert _state(trainer) == before
    found = open_run(tmp_path / "run")
    assert found.manifest["status"] == status
    assert len(found.steps) == (2 if error is None else 1)


@pytest.mark.parametrize("mode", ["passive", "replace"])
def test_a_copy_of_a_watched_trainer_or_its_model_is_an_unwatched_one(
    tmp_path: Path, mode: str
) -> None:
    trainer = toy_trainer(tmp_path / "out", max_steps=1)
    with attach(trainer, tmp_path / "run", mode=mode, token_every=1) as attachment:
        average, twin = copy.deepcopy(trainer.model), copy.deepcopy(trainer)
        pickle.dumps(trainer.model)
        assert not our_hooks(twin)
        assert vars(twin)["_wapo_attachment"] is None
        average(torch.arange(2, 6)[None])
        run(twin)
        assert attachment.recorder.returned() is None, "nothing of it was seen"
        run(trainer)
    assert attachment.recorder.failure is None
    assert open_run(tmp_path / "run").steps.step.tolist() == [1]


def test_close_leaves_a_later_wrapper_of_somebody_else_working(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    attachment = attach(trainer, tmp_path / "run")
    inner, seen = trainer._compute_loss, []
    trainer._compute_loss = lambda *a, **k: (seen.append(1), inner(*a, **k))[1]
    theirs = trainer._compute_loss
    attachment.close()
    attachment.close()
    assert trainer._compute_loss is theirs
    run(trainer)
    assert len(seen) == 4
    assert len(open_run(tmp_path / "run").steps) == 0


def test_mixed_precision_run_is_watched_and_undone(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, bf16=True)
    assert np.isfinite(recorded(steps, "coef")).all()
    np.testing.assert_allclose(recorded(steps, "coef"), expected_coef(trainer), atol=1e-6, rtol=0)
    assert "_compute_loss" not in vars(trainer)
    assert not our_hooks(trainer)


# What a user can do wrong, and what can go wrong on its own -------------------------------------


@pytest.mark.parametrize("thing", [object(), "trainer", toy_model])
def test_the_wrong_object_is_named_with_what_is_allowed(tmp_path: Path, thing: Any) -> None:
    with pytest.raises(UserError, match="GRPOTrainer .* and its subclasses"):
        attach(thing, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_attaching_twice_is_an_error_and_leaves_the_first_one_on(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    with attach(trainer, tmp_path / "run"):
        with pytest.raises(UserError, match="already watched"):
            attach(trainer, tmp_path / "second")
        run(trainer)
    assert len(open_run(tmp_path / "run").steps) == 2
    attach(trainer, tmp_path / "second").close()


@pytest.mark.parametrize("case", ["file in the way", "holds a run", "fraction", "exact_every"])
def test_bad_arguments_leave_the_trainer_untouched(tmp_path: Path, case: str) -> None:
    trainer = toy_trainer(tmp_path / "out")
    before, path, knobs = _state(trainer), tmp_path / "run", {}
    if case == "file in the way":
        path = tmp_path / "file"
        path.write_text("")
        path = path / "run"
    elif case == "holds a run":
        attach(trainer, path).close()
    elif case == "fraction":
        knobs = {"token_fraction": 0.0}
    else:
        knobs = {"exact_every": -1}
    with pytest.raises(UserError):
        attach(trainer, path, **knobs)
    assert _state(trainer) == before


def test_a_failing_recorder_warns_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(toy_trainer(tmp_path / "plain", max_steps=4))
    trainer = toy_trainer(tmp_path / "out", max_steps=4)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with attach(trainer, tmp_path / "run") as attachment:
        attachment.recorder._writer.write_part = full
        with caplog.at_level(logging.WARNING, logger="wapo_analysis"):
            weights = run(trainer)
    assert sum("training goes on" in r.message for r in caplog.records) == 1
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "recording_failed"


Unsloth = type("UnslothGRPOTrainer", (GRPOTrainer,), {})


@pytest.mark.parametrize("case", ["liger", "unsloth", "own loss"])
def test_hidden_tensors_leave_the_scalars(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = toy_trainer(tmp_path / "out", Unsloth if case == "unsloth" else GRPOTrainer)
    if case == "liger":
        trainer.use_liger_kernel, trainer.liger_grpo_loss = True, object()
    if case == "own loss":  # a loss that never asks the trainer for log-probabilities
        trainer._compute_loss = lambda model, inputs: (
            model(input_ids=inputs["completion_ids"], labels=inputs["completion_ids"]).loss
        )
    with caplog.at_level(logging.WARNING), attach(trainer, tmp_path / "run") as attachment:
        run(trainer)
    assert attachment.recorder.failure is None
    assert sum("tokens are not" in r.message for r in caplog.records) == 1
    found = open_run(tmp_path / "run")
    assert found.steps[["reward", "loss", "grad_norm", "lr", "length"]].notna().all(axis=None)
    assert found.steps["entropy"].isna().all()
    assert len(found.rollouts) == 16
    assert len(found.classes) == 0
    assert found.manifest["tokens_hidden_by"]


def test_attaching_in_the_middle_of_a_batch_records_tokens_without_groups(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out", steps_per_generation=8, max_steps=2)
    attachment = attach(trainer, tmp_path / "run", token_every=1)
    original = trainer._generate_and_score_completions

    def without_numbers(inputs: Any) -> Any:
        batch = original(inputs)
        del batch["wapo_rollout"]
        return batch

    trainer._generate_and_score_completions = without_numbers
    run(trainer)
    attachment.close()
    assert attachment.recorder.failure is None
    assert (open_run(tmp_path / "run").tokens()["group"] == -1).all()


def test_conversational_prompts_are_recorded_as_the_model_saw_them(tmp_path: Path) -> None:
    trainer = toy_trainer(
        tmp_path / "out", reward=lambda completions, **_: [1.0] * len(completions)
    )
    trainer.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [[{"role": "user", "content": f"{a}+1="}] for a in range(8)]
    trainer.train_dataset = Dataset.from_dict({"prompt": rows})
    with attach(trainer, tmp_path / "run") as attachment:
        run(trainer)
    assert attachment.recorder.failure is None
    prompts = open_run(tmp_path / "run").rollouts["prompt"].str.replace(" ", "")
    assert prompts.str.fullmatch(r"\d\+1=").all()


def test_attach_is_reached_from_the_package() -> None:
    assert wapo_analysis.attach is attach


def test_what_the_trainer_logs_itself_is_in_the_step_table(tmp_path: Path) -> None:
    class Drifted(GRPOTrainer):
        """Reports what an inference engine would have: other log-probabilities by a tenth."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            self._metrics["train"]["sampling/sampling_logp_difference/mean"].append(0.1)
            return batch

    trainer = toy_trainer(
        tmp_path / "out", Drifted, lora=LoraConfig(**{**LORA, "lora_dropout": 0.0}), beta=0.1,
        max_steps=3, logging_steps=2,
    )  # fmt: skip
    with attach(trainer, tmp_path / "run"):
        run(trainer)
    found = open_run(tmp_path / "run")
    assert found.manifest["config"]["output_dir"] == str(tmp_path / "out")
    steps = found.steps
    lines = [line for line in trainer.state.log_history if "kl" in line]
    # A line of the trainer's log is the mean of its steps.
    assert steps["kl_ref"][:2].mean() == pytest.approx(lines[0]["kl"], rel=1e-6)
    assert steps["kl_ref"][1] > 0
    assert steps["groups_flat"][:2].mean() == pytest.approx(lines[0]["frac_reward_zero_std"])
    assert steps["rewards/digits/mean"][:2].mean() == pytest.approx(lines[0]["reward"])
    assert steps["sampling/sampling_logp_difference/mean"].tolist() == [0.1] * 3
