"""The embedded base policy: small, offline, right about half the time, with entropy to lose."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import wapo_analysis
from experiments import pretrain_base
from wapo_analysis.train.tasks import TASKS, Problem, get_task

BASE = Path(wapo_analysis.__file__).parent / "assets" / "base"
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz+=;,"
SAMPLES = 256  # standard error of the mean reward: 0.031
REWARD_BAND = {"chain-sum": (0.35, 0.57), "two-hop": (0.39, 0.61)}
ENTROPY_BAND = {"chain-sum": (0.29, 0.42), "two-hop": (0.70, 0.95)}


@cache
def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True).eval()


def generate(model: Any, tokenizer: Any, problems: list[Problem], seed: int, **options: Any) -> Any:
    """Sample completions (N, T) at temperature 1 unless told otherwise."""
    task = get_task("chain-sum" if "=" in problems[0].prompt else "two-hop")
    prompt = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=task.max_new_tokens, **options)
    return out[:, prompt["input_ids"].shape[1] :]


def completion_entropy(model: Any, tokenizer: Any, prompt: str, completion: list[int]) -> Any:
    """Entropy in nats at each completion token, one unpadded row at a time: slow and obvious."""
    ids = tokenizer(prompt)["input_ids"] + completion
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -len(completion) - 1 : -1]
    return torch.distributions.Categorical(logits=logits).entropy()


def test_folder_holds_weights_and_tokenizer_only() -> None:
    assert {file.name for file in BASE.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 2_000_000


def test_architecture(model: Any) -> None:
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 96, 3)
    assert config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_sampling_defaults_are_plain_temperature_one(model: Any) -> None:
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 1.0, 0)


def test_special_tokens(model: Any, tokenizer: Any) -> None:
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 3
    assert tokenizer.bos_token_id is None
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size == len(ALPHABET) + len(special)


@given(text=st.text(alphabet=ALPHABET))
def test_tokenizer_is_one_token_per_character_and_loses_nothing(text: str) -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_characters_outside_the_alphabet_become_unknown(tokenizer: Any) -> None:
    ids = tokenizer("1A?é 2")["input_ids"]
    assert ids[1:-1] == [tokenizer.unk_token_id] * 4
    assert tokenizer.decode([ids[0], ids[-1]]) == "12"


@pytest.mark.parametrize("name", TASKS)
def test_every_prompt_and_demonstration_is_in_the_alphabet(name: str, tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    for problem in get_task(name).problems(rng, 100):
        text = problem.prompt + pretrain_base.demonstrate(name, problem, rng, 0.5)
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", TASKS)
def test_reward_and_entropy_at_temperature_one(name: str, model: Any, tokenizer: Any) -> None:
    task = get_task(name)
    problems = task.problems(np.random.default_rng(2**20), SAMPLES)
    rows = generate(model, tokenizer, problems, seed=0).tolist()
    rewards, entropies = [], []
    for problem, row in zip(problems, rows, strict=True):
        stop = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row, skip_special_tokens=True)
        rewards.append(task.reward(problem, text))
        entropies.append(completion_entropy(model, tokenizer, problem.prompt, row[:stop]))
    low, high = REWARD_BAND[name]
    assert low < np.mean(rewards) < high
    low, high = ENTROPY_BAND[name]
    assert low < torch.cat(entropies).mean().item() < high


@pytest.mark.parametrize("name", TASKS)
def test_greedy_decoding_shows_there_is_something_to_learn(
    name: str, model: Any, tokenizer: Any
) -> None:
    task = get_task(name)
    problems = task.problems(np.random.default_rng(2**21), 128)
    rows = generate(model, tokenizer, problems, 0, do_sample=False, temperature=None, top_k=None)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    rewards = [task.reward(p, t) for p, t in zip(problems, texts, strict=True)]
    assert np.mean(rewards) > REWARD_BAND[name][1] + 0.1


def test_generation_is_decided_by_the_seed(model: Any, tokenizer: Any) -> None:
    problems = get_task("chain-sum").problems(np.random.default_rng(0), 16)
    first, again, other = (generate(model, tokenizer, problems, seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_script_describes_the_shipped_folder(model: Any, tokenizer: Any) -> None:
    assert pretrain_base.build_tokenizer().get_vocab() == tokenizer.get_vocab()
    fresh = pretrain_base.build_model(tokenizer)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    assert {name: weight.shape for name, weight in fresh.state_dict().items()} == shapes
    written = ("intermediate_size", "num_attention_heads", "initializer_range", "rms_norm_eps")
    for field in (*written, "max_position_embeddings", "eos_token_id", "pad_token_id"):
        assert getattr(fresh.config, field) == getattr(model.config, field), field


def test_pretraining_is_reproducible_and_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for run in ("first", "again"):
        torch.manual_seed(3)
        tokenizer = pretrain_base.build_tokenizer()
        model = pretrain_base.build_model(tokenizer)
        before = model.state_dict()["model.embed_tokens.weight"].clone()
        pretrain_base.pretrain(model, tokenizer, steps=3, seed=3)
        assert not torch.equal(before, model.state_dict()["model.embed_tokens.weight"])
        pretrain_base.save(model, tokenizer, tmp_path / run)
        weights.append((tmp_path / run / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "step     3/3" in capsys.readouterr().out
    shipped = {file.name: file for file in BASE.iterdir()}
    for file in (tmp_path / "first").iterdir():
        assert file.name in shipped
        if file.name.startswith("tokenizer"):
            assert file.read_text() == shipped[file.name].read_text()
