"""What a head makes of hidden states, and whether it makes a model's own logits."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wapo_analysis.capture.lm_head import (
    LmHead,
    head_obstacle,
    inner_model,
    is_shard,
    logit_transform,
    rows_of,
    whole,
)


@pytest.mark.parametrize(
    ("settings", "scale", "softcap"),
    [
        ({}, 1.0, None), ({"logit_scale": 0.5}, 0.5, None), ({"output_multiplier": 3}, 3.0, None),
        ({"lm_head_multiplier": 2, "logits_scaling": 8}, 2.0, None),
        ({"logits_scaling": 8}, 0.125, None), ({"logits_scaling": 1}, 1.0, None),
        ({"logits_scaling": 8, "model_type": "hyperclovax"}, 8.0, None),
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"logit_scale": None, "output_multiplier": 4}, 4.0, None),
    ],
)  # fmt: skip
def test_scale_and_soft_cap_of_a_configuration(
    settings: dict[str, Any], scale: float, softcap: float | None
) -> None:
    text = SimpleNamespace(**settings)
    assert logit_transform(SimpleNamespace(get_text_config=lambda: text)) == (scale, softcap)


def test_a_head_scales_and_then_caps_in_float32() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.bfloat16)
    hidden = torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16)
    bias = torch.tensor([0.5, -0.5], dtype=torch.bfloat16)
    assert LmHead(weight, None).logits(hidden).tolist() == [[3.0, 2.0]]
    assert LmHead(weight, bias, 2.0).logits(hidden).tolist() == [[7.0, 3.0]]
    capped = LmHead(weight, bias, 2.0, 4.0).logits(hidden)
    assert capped.dtype == torch.float32
    assert capped[0].tolist() == pytest.approx([4 * math.tanh(7 / 4), 4 * math.tanh(3 / 4)])
    wide = LmHead(weight.double(), None).logits(hidden.double())
    assert wide.dtype == torch.float64
    found = LmHead(weight.float(), bias.float(), 2.0, 4.0).stats(
        hidden.float(), torch.tensor([1]), 0.5
    )
    assert found.logp.item() == pytest.approx((capped / 0.5).log_softmax(-1)[0, 1].item(), rel=1e-5)


def test_a_part_of_a_weight_is_known_as_one() -> None:
    whole = torch.zeros(7, 2)
    assert (is_shard(whole), rows_of(whole)) == (False, 7)
    zero = torch.zeros(0)
    zero.ds_id, zero.ds_shape = 1, (9, 2)  # type: ignore[attr-defined]
    assert (is_shard(zero), rows_of(zero)) == (True, 9)
    assert is_shard(SimpleNamespace(full_tensor=None))  # type: ignore[arg-type]
    plain = nn.Linear(1, 1)
    assert inner_model(plain) is plain
    assert inner_model(SimpleNamespace(get_base_model=lambda: plain)) is plain


def test_a_whole_head_is_that_of_a_module_or_is_gathered() -> None:
    plain = nn.Linear(2, 3)
    with whole(plain) as (weight, bias):
        assert weight is plain.weight
        assert bias is plain.bias
    shard = SimpleNamespace(full_tensor=lambda: torch.ones(3, 2))
    with whole(SimpleNamespace(weight=shard)) as (weight, bias):
        assert weight.tolist() == [[1.0, 1.0]] * 3
        assert bias is None
    both = SimpleNamespace(weight=shard, bias=SimpleNamespace(full_tensor=lambda: torch.zeros(3)))
    with whole(both) as (_, bias):
        assert bias is not None
        assert bias.tolist() == [0.0] * 3


class Small(nn.Module):
    """A causal model whose logits are those of its head, and at the last one a little more."""

    def __init__(
        self, size: float, more: float, dtype: torch.dtype = torch.float32, vocabulary: int = 5
    ) -> None:
        super().__init__()
        self.base_model = Backbone(dtype)
        self.head = nn.Linear(1, vocabulary, bias=False, dtype=dtype)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-size, size, vocabulary)[:, None])
        self.more = more
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, **inputs: Any) -> SimpleNamespace:
        logits = self.head(self.base_model(**inputs).last_hidden_state)
        logits[..., -1] += self.more
        return SimpleNamespace(logits=logits)


class Backbone(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.seen: list[list[list[int]]] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.seen.append(input_ids.tolist())
        hidden = torch.ones(*input_ids.shape, 1, dtype=self.dtype)
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize(
    ("size", "more", "dtype", "fits"),
    [
        (0.5, 0.0, torch.float32, True), (0.5, 9e-5, torch.float32, True),
        (0.5, 1.2e-4, torch.float32, False), (1.0, 1.2e-4, torch.float32, False),
        (4.0, 3.6e-4, torch.float32, True), (4.0, 4.5e-4, torch.float32, False),
        (0.5, 9e-7, torch.float64, True), (0.5, 1.2e-6, torch.float64, False),
        (0.5, 0.0195, torch.bfloat16, True), (0.5, 0.0235, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_a_head_fits_if_it_makes_the_model_s_own_logits(
    size: float, more: float, dtype: torch.dtype, fits: bool
) -> None:
    """To 1e-4 of the largest logit, of at least 1; 1e-6 in float64, 0.02 in half precision."""
    reason = head_obstacle(Small(size, more, dtype), torch.device("cpu"))
    assert reason == (
        None if fits else "Small does more than head, scale and soft cap to make its logits"
    )


@pytest.mark.parametrize(("vocabulary", "tokens"), [(5, 5), (8, 8), (30, 8)])
def test_a_head_is_tried_on_a_text_of_a_few_tokens(vocabulary: int, tokens: int) -> None:
    model = Small(0.5, 0.0, vocabulary=vocabulary)
    assert head_obstacle(model, torch.device("cpu")) is None
    assert model.base_model.seen == [[list(range(tokens))]] * 2, "theirs and ours"


def test_a_head_is_the_model_s_own_or_made_of_the_tensors_given() -> None:
    model, weight, bias = Small(0.5, 0.0), torch.ones(5, 1), torch.ones(5)
    assert LmHead.of(model).weight is model.head.weight
    assert LmHead.of(model).bias is None
    given = LmHead.of(model, (weight, bias))
    assert given.weight is weight
    assert given.bias is bias


def test_why_a_head_cannot_be_used() -> None:
    model = Small(1.0, 0.0)
    model.head = nn.Sequential(nn.Linear(1, 5))
    assert head_obstacle(model, torch.device("cpu")) == (
        "its head is no plain linear layer but Sequential"
    )
    whole_model = Small(1.0, 0.0)
    del whole_model.base_model
    object.__setattr__(whole_model, "base_model", whole_model)
    assert head_obstacle(whole_model, torch.device("cpu")) == "Small has no backbone of its own"
    wide = Small(1.0, 0.0)
    wide.forward = lambda **given: SimpleNamespace(logits=torch.zeros(1, 5, 7))  # type: ignore[method-assign]
    found = head_obstacle(wide, torch.device("cpu"))
    assert str(found).startswith("its head cannot be applied to hidden states (")


def test_a_backbone_that_fails_without_a_word_is_named_by_its_error() -> None:
    class Silent(Backbone):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            raise NotImplementedError

    model = Small(1.0, 0.0)
    model.forward = lambda **given: SimpleNamespace(logits=torch.zeros(1, 5, 5))  # type: ignore[method-assign]
    model.base_model = Silent(torch.float32)
    assert head_obstacle(model, torch.device("cpu")) == (
        "its head cannot be applied to hidden states (NotImplementedError)"
    )
