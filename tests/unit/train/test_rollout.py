"""Sampling: log-probs of the behaviour policy, left padding, chunks, stop texts, entropy."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.support.tiny_models import save_tiny_gpt2, save_tiny_llama
from wapo_analysis.errors import UserError
from wapo_analysis.stats import token_stats
from wapo_analysis.store import open_run
from wapo_analysis.train import sampler
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train
from wapo_analysis.train.models import load_policy
from wapo_analysis.train.policy import Policy, PromptFormat, PromptStyle
from wapo_analysis.train.rollout import (
    Exponentials,
    Rollouts,
    Uniforms,
    _first_like,
    completion_logits,
    inverse_cdf,
    pad_left,
    sample,
    sample_batched,
)
from wapo_analysis.train.sampler import Sampled, Sampler

CPU = torch.device("cpu")
PROMPTS = ["1+2+3=", "7+8=", "a=b;b=c;a?"]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gpt2(tmp_path_factory.mktemp("model") / "gpt2")


@pytest.fixture(scope="module", params=["base", "tiny_llama", "tiny_gpt2"])
def policy(request: pytest.FixtureRequest) -> Policy:
    name = request.param
    return load_policy(name if name == "base" else str(request.getfixturevalue(name)), CPU)


def draw(policy: Policy, prompts: list[str], temperature: float = 1.0, **options) -> Rollouts:
    encoded = [policy.encode(prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(3)
    return sample(policy, encoded, 24, temperature, generator, **options)


def recomputed(policy: Policy, rollouts: Rollouts, temperature: float):
    with torch.no_grad():
        flat = completion_logits(policy, rollouts)[rollouts.mask]
        return token_stats(flat, rollouts.completion_ids[rollouts.mask], temperature)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("padded", [False, True])
def test_ratio_of_recomputed_to_sampled_is_one(
    policy: Policy, temperature: float, padded: bool
) -> None:
    prompts = PROMPTS * 4 if padded else PROMPTS[:1] * 12
    rollouts = draw(policy, prompts, temperature)
    assert bool((rollouts.prompt_mask == 0).any()) == padded
    ratio = (
        recomputed(policy, rollouts, temperature).logp - rollouts.logp_old[rollouts.mask]
    ).exp()
    assert float((ratio - 1).abs().max()) <= 1e-4
    other = recomputed(policy, rollouts, temperature + 0.2).logp
    assert float((other - rollouts.logp_old[rollouts.mask]).abs().max()) > 1e-2


def test_padding_does_not_change_what_a_row_is_given(policy: Policy) -> None:
    rollouts = draw(policy, PROMPTS)
    short = rollouts.rows(torch.tensor([1]))
    length = int(short.prompt_mask.sum())
    alone = replace(
        short, prompt_ids=short.prompt_ids[:, -length:], prompt_mask=short.prompt_mask[:, -length:]
    )
    padded, bare = (recomputed(policy, r, 1.0).logp for r in (short, alone))
    torch.testing.assert_close(padded, bare, rtol=0, atol=2e-5)


@pytest.mark.parametrize("at_once", [1, 5, 12, 50])
def test_chunks_do_not_change_the_samples(policy: Policy, at_once: int) -> None:
    whole, split = draw(policy, PROMPTS * 4), draw(policy, PROMPTS * 4, at_once=at_once)
    assert torch.equal(whole.completion_ids, split.completion_ids)
    assert torch.equal(whole.prompt_ids, split.prompt_ids)
    assert torch.equal(whole.mask, split.mask)
    assert torch.equal(whole.stopped, split.stopped)
    torch.testing.assert_close(whole.logp_old, split.logp_old, rtol=0, atol=2e-5)


def plainly(policy: Policy, prompts: list[str], tokens: int, temperature: float) -> list[list[int]]:
    """Every token by a whole forward pass and `torch.multinomial`: no cache, no row leaves."""
    ids, mask = pad_left([policy.encode(prompt) for prompt in prompts], policy.pad_id)
    generator, alive = torch.Generator().manual_seed(3), torch.ones(len(ids), dtype=torch.bool)
    completions: list[list[int]] = [[] for _ in prompts]
    for _ in range(tokens):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = policy.model(input_ids=ids, attention_mask=mask, position_ids=places)
        probabilities = (out.logits[:, -1] / temperature).softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=generator)
        for row in alive.nonzero().flatten().tolist():
            completions[row].append(int(token[row]))
        alive &= ~torch.isin(token[:, 0], torch.tensor(policy.eos_ids))
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return completions


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("prompts", [PROMPTS * 4, PROMPTS[:1] * 12])
def test_samples_are_those_of_the_plain_program(
    policy: Policy, prompts: list[str], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sampler.BLOCK, "cpu", block)
    rollouts = draw(policy, prompts, 0.9)
    found = [ids[m].tolist() for ids, m in zip(rollouts.completion_ids, rollouts.mask, strict=True)]
    assert found == plainly(policy, prompts, 24, 0.9)
    ended = [ids[-1] in policy.eos_ids for ids in found]
    assert rollouts.stopped.tolist() == ended
    assert bool((rollouts.completion_ids[~rollouts.mask] == policy.pad_id).all())


def test_tokens_are_those_of_torch_multinomial() -> None:
    probabilities = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(7))
    noise, every = Exponentials(torch.Generator().manual_seed(7), 6), torch.arange(6)
    assert torch.equal(noise.pick(probabilities, every, 0), expected[:, 0])
    some = torch.tensor([4, 1])
    noise = Exponentials(torch.Generator().manual_seed(7), 6)
    assert torch.equal(noise.pick(probabilities[some], some, 0), expected[some, 0])


@pytest.mark.parametrize("vocabulary", [2, 3, 100, 1000])
def test_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    draws = torch.Generator().manual_seed(vocabulary)
    probabilities = torch.rand(400, vocabulary, generator=draws) ** 8
    probabilities[:, ::2] *= torch.rand(400, 1, generator=draws) < 0.5
    probabilities[:, -1] = 0
    uniform = torch.rand(400, generator=draws, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 0.0, 1 - 2**-53, 1 - 2**-53])
    probabilities[0, 0] = 0
    probabilities[:, vocabulary // 2] += 1e-9
    found = inverse_cdf(probabilities, uniform)
    sums = probabilities.double().cumsum(1)
    wanted = torch.searchsorted(sums, uniform.unsqueeze(1) * sums[:, -1:], right=True)[:, 0]
    assert bool((probabilities.gather(1, found.unsqueeze(1)) > 0).all())
    assert (found[4:] == wanted[4:]).double().mean() > 0.99, "but for ties in the last digit"
    assert found[2:4].tolist() == [int(p.nonzero().max()) for p in probabilities[2:4]]


def test_uniform_noise_samples_the_distribution_and_knows_its_row() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.2, 0.05]).expand(20_000, -1)
    rows = torch.arange(20_000)
    noise = Uniforms(torch.Generator().manual_seed(1), 20_000, 3)
    found = noise.pick(probabilities, rows, 1)
    share = found.bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, probabilities[0], atol=0.015, rtol=0)
    some = torch.tensor([7, 19_999, 3])
    assert torch.equal(noise.pick(probabilities[some], some, 1), found[some])
    assert not torch.equal(noise.pick(probabilities, rows, 2), found)


@pytest.mark.parametrize("selects", [True, False], ids=["", "a cache that cannot repeat rows"])
def test_a_prompt_is_read_once_for_its_whole_group(tiny_llama: Path, selects: bool) -> None:
    policy = load_policy(str(tiny_llama), CPU)
    encoded = [policy.encode(p) for p in PROMPTS for _ in range(4)]
    like = _first_like(encoded, torch.device("cuda"))
    assert like.tolist() == [0] * 4 + [4] * 4 + [8] * 4
    assert _first_like(encoded, CPU).tolist() == list(range(12))
    once, copies = torch.unique(like, return_inverse=True)
    ids, mask = pad_left(encoded, policy.pad_id)
    shapes, forward = [], policy.model.forward

    def seen(**inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    def drawn(rows: torch.Tensor, copies: torch.Tensor | None) -> Sampled:
        noise = Uniforms(torch.Generator().manual_seed(0), 12, 12)
        draw = Sampler(policy, policy.model, 12, 1.0, noise)
        return draw(ids[rows], mask[rows], torch.arange(12), True, copies)

    apart = drawn(torch.arange(12), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.model, "forward", seen)
        if not selects:
            patch.setattr(sampler._Context, "keep", lambda *_: False)
        whole = drawn(once, copies)
    length = ids.shape[1]
    assert shapes[:2] == [(3, length), (12, 1 if selects else length)]
    assert torch.equal(whole.ids, apart.ids)
    torch.testing.assert_close(whole.logp, apart.logp, rtol=0, atol=2e-5)


def test_rows_that_ended_leave_without_a_trace_in_the_others(tiny_llama: Path) -> None:
    policy = load_policy(str(tiny_llama), CPU)
    policy = replace(policy, eos_ids=tuple(range(20, 60)))  # most rows end early
    sampled = {}
    for leave in (8, 10**9):
        ids, mask = pad_left([policy.encode(p) for p in PROMPTS * 8], policy.pad_id)
        noise = Uniforms(torch.Generator().manual_seed(0), 24, 32)
        draw = Sampler(policy, policy.model, 32, 1.0, noise, block=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "_LEAVE", 0 if leave > 8 else leave)
            sampled[leave] = draw(ids, mask, torch.arange(24), padded=True)
    (one, other), lengths = sampled.values(), sampled[8].mask.sum(1)
    assert lengths.max() >= 3 * lengths.min()
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=2e-5)


def test_entropy_is_that_of_the_sampling_distribution(policy: Policy) -> None:
    rollouts = draw(policy, PROMPTS, 0.7, entropy=True, at_once=2)
    assert rollouts.entropy is not None
    stats = recomputed(policy, rollouts, 0.7)
    torch.testing.assert_close(rollouts.entropy[rollouts.mask], stats.entropy, rtol=1e-4, atol=1e-5)
    assert float(rollouts.entropy[~rollouts.mask].abs().sum()) == 0


def test_a_stop_text_ends_the_completion_after_the_token_that_completes_it() -> None:
    plain = load_policy("base", CPU)
    free = draw(plain, PROMPTS[:1] * 12)
    texts = [
        plain.decode(ids[m].tolist()) for ids, m in zip(free.completion_ids, free.mask, strict=True)
    ]
    stop = texts[0][1:3]
    stopping = load_policy("base", CPU, style=PromptStyle(stop=(stop, "never")))
    cut = draw(stopping, PROMPTS[:1] * 12)
    for before, ids, mask, stopped in zip(
        texts, cut.completion_ids, cut.mask, cut.stopped, strict=True
    ):
        text = plain.decode(ids[mask].tolist())
        assert text == (before[: before.index(stop) + len(stop)] if stop in before else before)
        if stop in before:
            assert bool(stopped)
            assert text.endswith(stop)


def test_a_turn_ends_with_the_token_of_the_chat_template(tiny_llama: Path) -> None:
    chat, plain = (load_policy(str(tiny_llama), CPU, style=PromptStyle(c)) for c in ("on", "off"))
    assert set(chat.eos_ids) - set(plain.eos_ids) == {2}
    rollouts = draw(chat, ["hi"] * 64)
    ended = rollouts.completion_ids == 2
    assert bool(ended.any()), "the model must have ended a turn"
    assert not bool((rollouts.mask & (ended.cumsum(1) - ended.long() > 0)).any())


@pytest.mark.parametrize("name", ["base", "tiny_llama"])
def test_a_whole_mask_says_what_the_mask_of_texts_says(
    name: str, request: pytest.FixtureRequest, tiny_gpt2: Path
) -> None:
    policy = load_policy(name if name == "base" else str(request.getfixturevalue(name)), CPU)
    rollouts = draw(policy, PROMPTS)
    assert sampler.takes_whole_masks(policy.model)
    assert not sampler.takes_whole_masks(load_policy(str(tiny_gpt2), CPU).model)
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    texts = torch.cat([rollouts.prompt_mask, rollouts.mask.long()], 1)
    given = {"input_ids": ids, "position_ids": sampler.positions(texts)}
    with torch.no_grad():
        one = policy.model(attention_mask=texts, **given).logits[texts.bool()]
        other = policy.model(attention_mask=sampler.whole_mask(texts), **given).logits
    assert bool(other.isfinite().all())
    torch.testing.assert_close(one, other[texts.bool()], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_continuous_batching_samples_the_policy_and_is_scored_once_more(
    lora_rank: int | None, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    settings = {"sampler": "continuous-batching", "lora_rank": lora_rank, "steps": 2, "seed": 4}
    config = replace(tiny_config, **settings, store_bits=23)
    runs = []
    for name in ("one", "two"):
        train(config, tmp_path / name)
        runs.append(open_run(tmp_path / name))
    rows, again = (run.tokens() for run in runs)
    pd.testing.assert_frame_equal(rows, again)
    first = rows[rows["minibatch"] == 0]
    assert first["logp"].tolist() == first["logp_old"].tolist()
    rollouts = runs[0].rollouts
    assert rollouts["completion"].nunique() > 3
    assert set(rollouts["finish_reason"]) <= {"stop", "length"}
    # Sampled from the policy: surprise is entropy on average, within four standard errors.
    gap = -first["logp"] - first["entropy"]
    assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5


def test_continuous_batching_is_refused_in_one_line(policy: Policy) -> None:
    given = ([[1, 2, 3]], 4, 1.0, 0)
    stopping = replace(policy, format=PromptFormat(policy.tokenizer, PromptStyle(stop=("x",))))
    with pytest.raises(UserError, match="stop cannot be used with sampler continuous-batching"):
        sample_batched(stopping, *given)
    other = replace(policy, model=torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="continuous-batching cannot be used here, set sampler"):
        sample_batched(other, *given)
