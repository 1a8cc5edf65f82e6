"""Passive and replace mode of the built-in trainer: same training, exact statistics, one rule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from wapo_analysis import UserError
from wapo_analysis.capture import (
    CaptureMode,
    choose_mode,
    earlier_mode,
    free_memory,
    lm_head,
    readable,
)
from wapo_analysis.capture.lm_head import LmHead, head_obstacle, logit_transform
from wapo_analysis.cli import run as command
from wapo_analysis.store import open_run, read_manifest
from wapo_analysis.train import loop, scoring
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train
from wapo_analysis.train.models import load_policy, pick_device
from wapo_analysis.train.policy import Policy
from wapo_analysis.train.rollout import Rollouts
from wapo_analysis.train.scoring import score

# peft asks transformers for something that has a new name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
CPU = pick_device("cpu")


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.module.state_dict().items()}


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["passive", "replace"])
def test_many_steps_are_bitwise_the_same_recorded_or_not(
    name: str, steps: int, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, steps=steps, capture_mode=name, temperature=0.9)
    plain, watched = weights(train(config)), weights(train(config, tmp_path / "run"))
    assert all(torch.equal(value, watched[key]) for key, value in plain.items())
    start = weights(load_policy("base", CPU))
    assert not all(torch.equal(value, start[key]) for key, value in plain.items())
    assert len(open_run(tmp_path / "run").steps) == steps


def test_both_modes_make_the_same_step_and_the_same_rows(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, steps=1, optimizer="sgd", lr=1e-2, epochs=2)
    passive = weights(train(config, tmp_path / "passive"))
    replaced = weights(train(replace(config, capture_mode="replace"), tmp_path / "replace"))
    start = weights(load_policy("base", CPU))
    moves = [
        torch.cat([(w[n] - start[n]).flatten() for n in sorted(start)]) for w in (passive, replaced)
    ]
    assert float(moves[0].abs().max()) > 1e-5
    assert (
        float((moves[1] - moves[0]).norm() / moves[0].norm()) < 2e-3
    )  # float32 weights, not steps
    a, b = (open_run(tmp_path / name).tokens() for name in ("passive", "replace"))
    for column in ("logp", "entropy", "collision", "pred_dentropy", "coef", "logp_after"):
        np.testing.assert_allclose(b[column], a[column], rtol=2e-3, atol=1e-4)
    assert (a.token_id == b.token_id).all()
    assert (a.top1 == b.top1).mean() > 0.99


def test_replace_makes_no_logits_while_training(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(*_: Any) -> None:
        raise AssertionError("logits were made")

    monkeypatch.setattr(scoring, "completion_logits", logits)
    with pytest.raises(AssertionError, match="logits were made"):
        train(replace(tiny_config, steps=1))
    train(replace(tiny_config, steps=1, capture_mode="replace"))


# Heads of all kinds -------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1, "attn_implementation": "eager",
}  # fmt: skip
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "soft cap": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "divided": ("Granite", {"logits_scaling": 7.0}),
    "multiplied": ("Cohere", {"logit_scale": 0.3}),
    "bias": ("Phi", {}),
    "its own norm": ("GPTNeoX", {}),
}


def model_with(head: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, extra = HEADS[head]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **extra)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model.to(dtype)


def policy_with(model: Any) -> Policy:
    return replace(load_policy("base", CPU), model=model)


def rollouts() -> Rollouts:
    """Five rollouts: left-padded prompts, right-padded completions."""
    generator = torch.Generator().manual_seed(1)
    prompts, ids = torch.randint(2, 60, (5, 11), generator=generator).split([4, 7], dim=1)
    prompt_mask = (torch.arange(4) >= torch.tensor([0, 2, 1, 0, 3]).unsqueeze(1)).long()
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 6, 2]).unsqueeze(1)
    return Rollouts(prompts, prompt_mask, ids, mask, torch.zeros(5, 7), torch.ones(5).bool())


def assert_modes_agree(policy: Policy, rtol: float = 1e-4) -> None:
    found = {}
    for name in ("passive", "replace"):
        stats = score(policy, rollouts(), 0.8, name)
        upstream = torch.linspace(-1, 1, len(stats.logp))
        named = policy.trainable()
        grads = torch.autograd.grad(stats.logp, list(named.values()), upstream)
        found[name] = stats, dict(zip(named, grads, strict=True))
    (passive, expected), (replaced, ours) = found["passive"], found["replace"]
    assert float(passive.logp.detach().min()) < -1
    for a, b in zip(passive[:4], replaced[:4], strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=rtol)
    assert any(float(grad.abs().max()) > 1e-2 for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=10 * rtol, atol=10 * rtol, msg=name)


@pytest.mark.parametrize("head", HEADS)
def test_every_kind_of_head_gives_the_models_own_numbers(head: str) -> None:
    model = model_with(head)
    assert head_obstacle(model, CPU) is None
    assert_modes_agree(policy_with(model))


def test_adapters_in_the_layers_are_in_both_modes() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra [lora]")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model_with("soft cap"), config).eval()
    assert head_obstacle(wrapped, CPU) is None
    policy = policy_with(wrapped)
    assert all("lora" in name for name in policy.trainable())
    assert_modes_agree(policy)
    with wrapped.disable_adapter():
        plain = score(policy, rollouts(), 0.8, "replace").logp
    assert not torch.allclose(plain, score(policy, rollouts(), 0.8, "replace").logp)


def test_an_adapter_on_the_head_is_an_obstacle() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra [lora]")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    wrapped = peft.get_peft_model(model_with("plain"), config).eval()
    assert "no plain linear layer" in str(head_obstacle(wrapped, CPU))


def test_a_head_that_does_more_than_we_know_is_an_obstacle(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with("soft cap")
    monkeypatch.setattr(lm_head, "logit_transform", lambda config: (1.0, None))
    obstacle = head_obstacle(model, CPU)
    assert (
        obstacle == "Gemma2ForCausalLM does more than head, scale and soft cap to make its logits"
    )
    monkeypatch.setattr(scoring, "head_obstacle", lambda *_: obstacle)
    with pytest.raises(UserError, match="replace cannot be used with this model: Gemma2"):
        train(replace(tiny_config, capture_mode="replace"))


def test_a_factor_is_read_by_its_first_name_and_hyperclovax_multiplies() -> None:
    def config(**values: Any) -> Any:
        return transformers.LlamaConfig(**values)

    assert logit_transform(config()) == (1.0, None)
    assert logit_transform(config(logit_scale=None, output_multiplier=0.5)) == (0.5, None)
    assert logit_transform(config(lm_head_multiplier=2.0, logits_scaling=9.0)) == (2.0, None)
    assert logit_transform(config(logits_scaling=4.0, final_logit_softcapping=30.0)) == (0.25, 30.0)
    other = config(logits_scaling=4.0)
    other.model_type = "hyperclovax"
    assert logit_transform(other) == (4.0, None)


def test_bfloat16_weights_agree_as_far_as_they_can() -> None:
    policy = policy_with(model_with("soft cap", torch.bfloat16))
    assert head_obstacle(policy.model, CPU) is None
    assert LmHead.of(policy.model).weight.dtype == torch.bfloat16
    stats = [score(policy, rollouts(), 0.8, name).logp for name in ("passive", "replace")]
    assert stats[0].dtype == stats[1].dtype == torch.float32
    # The model rounds its soft-capped logits, up to 2.0, to bfloat16; we do not.
    torch.testing.assert_close(stats[1], stats[0], rtol=0, atol=0.03)


# The rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "logits", "free", "obstacle", "expected"),
    [
        ("passive", 900, 1000, None, "passive"),
        ("replace", 1, 1000, None, "replace"),
        ("auto", 100, 1000, None, "passive"),
        ("auto", 101, 1000, None, "replace"),
        ("auto", 900, 1000, "its head is odd", "passive"),
        ("auto", 900, None, None, "passive"),
    ],
)
def test_auto_replaces_where_logits_take_more_than_a_tenth_of_free_memory(
    asked: str, logits: int, free: int | None, obstacle: str | None, expected: str
) -> None:
    chosen = choose_mode(asked, logits, free, obstacle)
    assert chosen.mode == expected
    assert chosen.logits_bytes == logits
    if asked == "auto" and free is not None:
        assert f"{logits} B, {logits / free:.1%} of the {free} B free" in chosen.rule
        assert (obstacle is not None) == ("its head is odd" in chosen.rule)


def test_wrong_modes_are_refused() -> None:
    with pytest.raises(UserError, match="passive, replace, auto, got 'fused'"):
        choose_mode("fused", 1, 1, None)
    with pytest.raises(UserError, match="replace cannot be used with this model: no"):
        choose_mode("replace", 1, 1, "no")
    with pytest.raises(UserError, match="capture_mode must be passive, replace or auto"):
        TrainConfig(capture_mode="fused")


def test_free_memory_is_a_plausible_number_or_unknown() -> None:
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**50
    assert [readable(n) for n in (5, 1536, 3 * 2**30)] == ["5 B", "1.5 KiB", "3 GiB"]


def test_the_manifest_and_one_printed_line_say_what_was_chosen_and_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "free_memory", lambda device: 10_000)
    sizes = ["--prompts", "2", "--rollouts", "2", "--minibatches", "2", "--threads", "1"]
    rest = ["--set", "capture_mode=auto", "--out", str(tmp_path / "run")]
    assert command(["train", "--steps", "1", *sizes, *rest]) == 0
    capture = read_manifest(tmp_path / "run")["capture"]
    vocab = load_policy("base", CPU).module.get_output_embeddings().weight.shape[0]
    task = TrainConfig().load_task()
    assert capture["logits_bytes"] == 2 * (task.max_new_tokens + 1) * vocab * 4
    assert capture["free_bytes"] == 10_000
    assert capture["mode"] == "replace"
    printed = capfd.readouterr().err
    assert printed.count("capture: ") == 1
    assert f"capture: replace ({capture['rule']})" in printed


def test_a_resumed_run_keeps_the_mode_that_auto_chose(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_config, capture_mode="auto", steps=2)
    monkeypatch.setattr(scoring, "free_memory", lambda device: 1)
    whole = weights(train(replace(config, steps=4), tmp_path / "whole"))
    train(config, tmp_path / "cut")
    monkeypatch.setattr(scoring, "free_memory", lambda device: 2**50)
    resumed = weights(train(replace(config, steps=4), tmp_path / "cut", resume=True))
    assert read_manifest(tmp_path / "cut")["capture"]["mode"] == "replace"
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_what_was_set_by_hand_is_not_what_auto_chose() -> None:
    entry = CaptureMode("passive", "as set").to_dict()
    assert earlier_mode("auto", {"capture": entry, "config": {"capture_mode": "passive"}}) is None
    assert earlier_mode("auto", {"config": {}}) is None
    kept = earlier_mode("auto", {"capture": entry, "config": {"capture_mode": "auto"}})
    assert kept == CaptureMode("passive", "as set")


def test_the_loop_scores_with_the_mode_it_has_chosen(tiny_config: TrainConfig) -> None:
    trainer = loop.Trainer(load_policy("base", CPU), replace(tiny_config, capture_mode="replace"))
    assert trainer.capture == CaptureMode(
        "replace", "as set", trainer.capture.logits_bytes, trainer.capture.free_bytes
    )
