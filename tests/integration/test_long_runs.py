"""Runs that stop and go on: exact resume, interrupts, checkpoints, evaluation on the side."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run
from wapo_analysis.train import loop
from wapo_analysis.train.checkpoint import checkpoints, defect, last_checkpoint, save_checkpoint
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.evaluate import evaluate, ks, pass_at_k
from wapo_analysis.train.loop import train
from wapo_analysis.train.models import configured_policy
from wapo_analysis.train.policy import Policy
from wapo_analysis.train.tasks import get_task

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw, warm-up, cosine": {
        "warmup_steps": 3,
        "lr_schedule": "cosine",
        "weight_decay": 0.1,
        "epochs": 2,
    },
    "sgd, linear": {"optimizer": "sgd", "lr": 0.1, "lr_schedule": "linear"},
    "lora, checkpointing": {"lora_rank": 4, "lr": 1e-3, "gradient_checkpointing": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


def assert_same_weights(a: Policy, b: Policy) -> None:
    other = b.module.state_dict()
    for name, value in a.module.state_dict().items():
        assert torch.equal(value, other[name]), name


def interrupted_at(stop: int, config: TrainConfig, out: Path, number: int = signal.SIGINT) -> None:
    """Train until the signal arrives, in the middle of step ``stop``."""
    draw = loop.draw_batch

    def drawn(policy, task, config, step):
        if step == stop:
            os.kill(os.getpid(), number)
        return draw(policy, task, config, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_batch", drawn)
        with pytest.raises(KeyboardInterrupt):
            train(config, out)


SLOW = {"sgd, linear", "bf16-mixed", "lora, checkpointing"}


@pytest.mark.parametrize(
    "settings",
    [pytest.param(s, id=n, marks=[pytest.mark.slow] * (n in SLOW)) for n, s in SETTINGS.items()],
)
def test_an_interrupted_run_goes_on_bitwise(
    settings: dict[str, Any], tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = TrainConfig.from_dict(
        {"steps": 5, "eval_every": 2, "eval_prompts": 2, **settings}, tiny_config
    )
    whole = train(config, tmp_path / "whole")
    start = configured_policy(config)
    assert any(
        not torch.equal(value, start.trainable()[name]) for name, value in whole.trainable().items()
    ), "the run must have trained something"
    interrupted_at(2, config, tmp_path / "cut")
    cut = open_run(tmp_path / "cut")
    assert cut.manifest["status"] == "interrupted"
    assert cut.steps.step.tolist() == [1, 2], "the step in progress is finished first"
    assert last_checkpoint(tmp_path / "cut")[1] == 2
    assert_same_weights(train(config, tmp_path / "cut", resume=True), whole)
    a, b = open_run(tmp_path / "whole"), open_run(tmp_path / "cut")
    timing = [c for c in a.steps if "seconds" in c]
    assert a.steps.drop(columns=timing).equals(b.steps.drop(columns=timing))
    assert a.tokens().equals(b.tokens())
    assert b.manifest["status"] == "finished"


def test_sigterm_is_an_interrupt_too_and_handlers_are_given_back(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    interrupted_at(1, tiny_config, tmp_path / "run", signal.SIGTERM)
    assert last_checkpoint(tmp_path / "run")[1] == 1
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_interrupt_stops_at_once_and_leaves_a_valid_run(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = loop.draw_batch

    def impatient(policy, task, config, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return draw(policy, task, config, step)

    monkeypatch.setattr(loop, "draw_batch", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(replace(tiny_config, checkpoint_every=1), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "interrupted"
    assert run.steps.step.tolist() == [1, 2]
    assert last_checkpoint(tmp_path / "run")[1] == 2


def test_the_last_checkpoints_are_kept(tiny_config: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny_config, checkpoint_every=1, keep_checkpoints=1), tmp_path / "one")
    train(replace(tiny_config, checkpoint_every=1, keep_checkpoints=9), tmp_path / "all")
    assert [p.name for p in checkpoints(tmp_path / "one")] == ["step-00000003"]
    assert len(checkpoints(tmp_path / "all")) == 3


def test_a_checkpoint_is_whole_or_absent(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wapo_analysis.train import checkpoint

    policy = configured_policy(tiny_config)
    optimizer = torch.optim.AdamW(policy.module.parameters())
    save_checkpoint(tmp_path, 1, policy, optimizer)

    def killed(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, policy, optimizer)
    assert last_checkpoint(tmp_path)[1] == 1
    assert not list((tmp_path / "checkpoints").glob(".*")), "a full disk leaves no half folder"
    (tmp_path / "checkpoints" / ".step-00000002").mkdir()  # a killed process does
    monkeypatch.undo()
    save_checkpoint(tmp_path, 3, policy, optimizer)
    assert not list((tmp_path / "checkpoints").glob(".*")), "leftovers are removed"


def test_a_broken_checkpoint_is_named_and_an_older_one_offered(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = replace(tiny_config, checkpoint_every=1, keep_checkpoints=9)
    whole = train(config, run)
    *_, before, newest = checkpoints(run)
    damage = {
        "model.safetensors cannot be read": lambda: (newest / "model.safetensors").write_bytes(b""),
        "trainer.json cannot be read": lambda: (newest / "trainer.json").write_text("{"),
        "it has no optimizer.safetensors": lambda: (newest / "optimizer.safetensors").unlink(),
        "it is empty": lambda: [file.unlink() for file in newest.iterdir()],
    }
    for what, harm in damage.items():
        harm()
        with pytest.raises(UserError, match=rf"{newest} is broken \({what}.*\-\-checkpoint 2$"):
            train(config, run, resume=True)
    (before / "config.json").write_text("{}")  # only its model can tell
    with pytest.raises(UserError, match=rf"{before} is broken .*\-\-checkpoint 1$"):
        train(config, run, resume=True, checkpoint=2)
    assert_same_weights(train(config, run, resume=True, checkpoint=1), whole)
    assert [defect(folder) for folder in checkpoints(run)] == [None] * 3
    assert open_run(run).steps.step.tolist() == [1, 2, 3]


def test_folders_of_other_names_are_no_checkpoints(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    train(replace(tiny_config, steps=1), tmp_path / "run")
    for name in ("step-x", "step-00000009.bak", "step-"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    (tmp_path / "run" / "checkpoints" / "step-00000007").write_text("a file")
    assert last_checkpoint(tmp_path / "run")[1] == 1


@pytest.mark.parametrize("mode", [pytest.param("passive", marks=pytest.mark.slow), "replace"])
def test_adapters_are_watched_and_probed_like_weights(
    mode: str, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, lora_rank=4, lr=1e-3, probe_every=2, capture_mode=mode)
    watched = train(config, tmp_path / "run")
    assert_same_weights(watched, train(config))
    run = open_run(tmp_path / "run")
    assert not run.probes.empty
    assert (run.tokens().coef.abs() > 0).any()
    assert run.manifest["trainable_parameters"] == sum(
        p.numel() for p in watched.trainable().values()
    )
    saving = train(replace(config, gradient_checkpointing=True))
    assert_same_weights(watched, saving)


def test_a_checkpoint_of_adapters_holds_adapters_alone(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, steps=1, lora_rank=2)
    train(config, tmp_path / "run")
    folder, _ = last_checkpoint(tmp_path / "run")
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    with pytest.raises(UserError, match="written with LoRA"):
        configured_policy(tiny_config, folder)


@pytest.mark.parametrize("change", [{"objective": "wapo"}, {"lora_rank": 4}, {"temperature": 0.7}])
def test_a_resumed_run_keeps_what_made_it(
    change: dict[str, Any], tiny_config: TrainConfig, tmp_path: Path
) -> None:
    train(replace(tiny_config, steps=1), tmp_path / "run")
    name = next(iter(change))
    with pytest.raises(UserError, match=f"{name} .* cannot change"):
        train(replace(tiny_config, steps=2, **change), tmp_path / "run", resume=True)
    assert open_run(tmp_path / "run").manifest["status"] == "finished"


@pytest.mark.parametrize("model", ["base", "lora"])
def test_evaluation_leaves_training_alone(
    model: str, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, lora_rank=4 if model == "lora" else None)
    state = torch.get_rng_state()
    plain = train(config, tmp_path / "plain")
    evaluated = train(
        replace(config, eval_every=1, eval_prompts=3, eval_samples=2), tmp_path / "evaluated"
    )
    assert_same_weights(plain, evaluated)
    assert torch.equal(torch.get_rng_state(), state)
    a, b = open_run(tmp_path / "plain"), open_run(tmp_path / "evaluated")
    assert a.tokens().equals(b.tokens())
    assert not [name for name in a.steps if name.startswith("eval/")]
    assert b.steps["eval/pass@1"].notna().all()


def test_evaluation_comes_before_every_n_steps_and_last(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, steps=5, eval_every=2, eval_prompts=4, eval_samples=4)
    policy = train(config, tmp_path / "run")
    run = open_run(tmp_path / "run")
    evaluated = run.steps[run.steps["eval/reward"].notna()]
    assert evaluated.step.tolist() == [2, 4, 5]
    before = run.manifest["eval_before"]
    assert set(before) == {c for c in run.steps if c.startswith("eval/")}
    task = get_task(config.task)
    start = evaluate(configured_policy(config), task, config).columns()
    end = evaluate(policy, task, config).columns()
    for name in set(before) - {"eval/seconds"}:
        assert before[name] == pytest.approx(start[name])
        assert evaluated[name].iloc[-1] == pytest.approx(end[name])


def test_evaluation_counts_by_hand(tiny_config: TrainConfig) -> None:
    config = replace(tiny_config, eval_prompts=6, eval_samples=4)
    task = get_task(config.task)
    result = evaluate(configured_policy(config), task, config)
    assert [p.prompt for p in result.problems] == [p.prompt for p in task.held_out_problems(6)]
    by_hand = [
        task.reward(result.problems[i // 4], completion)
        for i, completion in enumerate(result.completions)
    ]
    assert result.rewards.ravel().tolist() == by_hand
    assert 0 < sum(by_hand) < len(by_hand), "the test must see right and wrong answers"
    columns = result.columns()
    assert columns["eval/reward"] == pytest.approx(sum(by_hand) / 24)
    assert columns["eval/pass@4"] == pytest.approx((result.rewards.max(axis=1) >= 1).mean())
    assert 0 < columns["eval/entropy"] < 3


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 5, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(
    samples: int, correct: int, k: int
) -> None:
    from itertools import combinations

    subsets = list(combinations(range(samples), k))
    share = sum(min(s) < correct for s in subsets) / len(subsets)
    assert pass_at_k(samples, correct, k) == pytest.approx(share)
    assert ks(samples)[-1] == samples


@pytest.mark.slow
def test_the_reward_figure_shows_evaluations(tiny_config: TrainConfig, tmp_path: Path) -> None:
    from wapo_analysis.plots import FIGURES, render

    config = replace(tiny_config, steps=5, eval_every=2, eval_prompts=4, eval_samples=2)
    train(config, tmp_path / "evaluated")
    train(replace(tiny_config, objective="wapo"), tmp_path / "plain")
    runs = [open_run(tmp_path / name) for name in ("evaluated", "plain")]
    frame = FIGURES["reward"].prepare(runs)
    held_out = frame.dropna(subset="eval/pass@1")
    assert held_out.step.tolist() == [0, 2, 4, 5]
    axes = FIGURES["reward"].plot(frame)
    assert axes[-1].get_ylabel() == "pass@1 on held-out prompts"
    (line,) = axes[-1].lines
    assert line.get_xdata().tolist() == [0, 2, 4, 5]
    assert axes[0].lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert len(render("reward", runs[1:]).axes) < len(axes)


def test_long_prompts_are_cut_and_counted_or_refused(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="do not fit the model's 64; set max_prompt_tokens"):
        train(replace(tiny_config, max_new_tokens=60), tmp_path / "refused")
    train(replace(tiny_config, max_prompt_tokens=6, max_new_tokens=20), tmp_path / "cut")
    run = open_run(tmp_path / "cut")
    assert (run.steps.prompts_cut == 1).all()
    assert (run.rollouts.prompt.str.len() == 6).all(), "the text recorded is what the model saw"
    assert run.rollouts.prompt.str.endswith("=").all(), "it is the beginning that is lost"
    train(replace(tiny_config, steps=1), tmp_path / "whole")
    assert open_run(tmp_path / "whole").steps.prompts_cut.tolist() == [0]


def test_sampling_in_chunks_is_the_same_run(tiny_config: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny_config, steps=1), tmp_path / "whole")
    train(replace(tiny_config, steps=1, sample_batch_size=3), tmp_path / "chunks")
    a, b = (open_run(tmp_path / name).rollouts for name in ("whole", "chunks"))
    assert a.completion.tolist() == b.completion.tolist()
    assert a.reward.tolist() == b.reward.tolist()


def test_no_logits_outlive_their_micro_batch(tiny_config: TrainConfig, tmp_path: Path) -> None:
    import gc

    def logits_alive() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return sum(t.ndim >= 2 and t.shape[-1] == 43 for t in tensors)  # 43 is the vocabulary

    seen: list[int] = []
    config = replace(tiny_config, microbatch_size=4, token_fraction=0.5)
    train(config, tmp_path / "run", progress=lambda row: seen.append(logits_alive()))
    assert set(seen) == {0}
