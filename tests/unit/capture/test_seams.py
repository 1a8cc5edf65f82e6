"""Where a loss finds its quantities, and what a head makes of hidden states: tables of cases."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wapo_analysis.capture import own_rank
from wapo_analysis.capture.lm_head import (
    HeadReader,
    LmHead,
    Reading,
    _begins,
    _named_logits,
    head_obstacle,
    inner_model,
    is_shard,
    logit_transform,
    rows_of,
    whole,
)
from wapo_analysis.capture.seams import SEAMS, Names, look_up, shaped
from wapo_analysis.errors import UserError
from wapo_analysis.stats import TokenStats, token_stats


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (None, None), ("a", 1), ("absent", None), ("b.c", 2), ("b.absent.d", None), ("d.1", 5),
        ("d.0.e", 4), ("f.g", 6), ("f.absent", None), ("n.x", None),
        (lambda call: call["a"] + 1, 2), ("b.n.x", None),
    ],
)  # fmt: skip
def test_a_path_goes_through_keys_attributes_and_indices(where: Any, found: Any) -> None:
    call = {
        "a": 1, "b": {"c": 2, "n": None}, "d": [{"e": 4}, 5], "f": SimpleNamespace(g=6), "n": None
    }  # fmt: skip
    assert look_up(where, call) == found


def test_names_are_a_row_a_changed_row_or_a_mapping() -> None:
    assert Names.of("verl") is SEAMS["verl"]
    own = Names(logp="a", advantages="b")
    assert Names.of(own) is own
    assert Names.of({"logp": "a", "advantages": "b"}) == own
    changed = Names.of({"like": "skyrl", "sampler": None})
    assert changed.sampler is None
    assert (changed.logp, changed.loss_scale) == ("log_probs", SEAMS["skyrl"].loss_scale)
    for wrong, said in (
        ("sky", "unknown trainer 'sky'"), ({"logp": "a"}, "where logp and advantages are"),
        ({"like": "skyrl", "lopg": "x"}, "unknown quantity 'lopg'"),
        ({"like": "skyr"}, "unknown trainer 'skyr'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            Names.of(wrong)  # type: ignore[arg-type]


def test_what_a_call_lacks_is_left_out_unless_nothing_goes_without() -> None:
    names = Names(logp="x", advantages="data.adv", mask="absent", entropy="data.h")
    assert names.find({"x": 1, "data": {"adv": 2, "h": None}}) == {"logp": 1, "advantages": 2}
    with pytest.raises(UserError, match=r"without advantages, which should be at 'data.adv'; its"):
        names.find({"x": 1, "data": {}})
    with pytest.raises(UserError, match="without logp, which should be at 'x'; its arguments were"):
        names.find({"data": {"adv": 1}})


LOGP, OLD, SAMPLED = (torch.full((2, 3), value) for value in (-1.0, -2.0, -3.0))


def test_quantities_get_the_names_and_shapes_of_the_recorder() -> None:
    plain = shaped({"logp": LOGP, "advantages": torch.ones(2, 1)})
    assert plain["mask"].tolist() == [[True] * 3] * 2
    assert plain["advantages"].tolist() == [1.0, 1.0]
    assert plain["loss_scale"] == 1.0
    assert not {"logp_prox", "kept", "cu_seqlens", "sampler", "weights"} & plain.keys()
    weights = torch.tensor([[0.0, 0.5, 1], [-1, 0, 2]])
    given = {"logp": LOGP, "advantages": LOGP, "logp_old": OLD, "sampler": SAMPLED,
             "mask": torch.eye(2, 3), "weights": weights,
             "loss_scale": torch.tensor(4)}  # fmt: skip
    full = shaped(given)
    assert full["logp_old"] is SAMPLED
    assert full["logp_prox"] is OLD
    assert full["kept"].tolist() == [[False, True, True], [True, False, True]]
    assert full["mask"].tolist() == torch.eye(2, 3).tolist()
    assert full["advantages"] is LOGP
    assert full["loss_scale"] == 4.0
    assert "weights" in given, "what was found stays as it was"
    assert shaped({"logp": LOGP, "advantages": LOGP, "sampler": SAMPLED})["logp_prox"] is None


def test_one_completion_of_a_call_is_a_packed_row() -> None:
    one = {"logp": torch.zeros(4), "advantages": torch.zeros(4)}
    assert shaped(one)["cu_seqlens"].tolist() == [0, 4]
    bounds = torch.tensor([0, 1, 4])
    assert shaped({**one, "cu_seqlens": bounds})["cu_seqlens"] is bounds
    assert "cu_seqlens" not in shaped({**one, "rollouts": torch.zeros(4)})


def test_tokens_of_areal_fit_or_are_not_known() -> None:
    tokens: Any = SEAMS["areal"].tokens
    call = {"input_data": {"input_ids": torch.tensor([5, 6, 7, 8])}, "logprobs": torch.zeros(4)}
    assert tokens(call).tolist() == [6, 7, 8, 5]
    assert tokens({**call, "logprobs": torch.zeros(2, 2)}).tolist() == [[6, 5], [8, 7]]
    assert tokens({**call, "logprobs": torch.zeros(3)}) is None
    assert tokens({**call, "input_data": {}}) is None


def test_logits_of_slime_are_those_before_each_token_of_a_completion() -> None:
    logits: Any = SEAMS["slime"].logits
    rows = torch.arange(9.0)[:, None]
    batch = {"unconcat_tokens": [torch.zeros(5), torch.zeros(4)], "response_lengths": [2, 3]}
    found = logits({"batch": batch, "logits": rows[None]})
    assert [part[:, 0].tolist() for part in found] == [[2, 3], [5, 6, 7]]
    assert logits({"batch": batch, "logits": rows[None, :8]}) is None, "a part of them"
    tokens: Any = SEAMS["slime"].tokens
    scored = (None, {"log_probs": [torch.zeros(2), torch.zeros(3)]})
    ids = {"unconcat_tokens": [torch.arange(5), torch.arange(10, 14)]}
    picked = tokens({"batch": ids, "scored": scored})
    assert [part.tolist() for part in picked] == [[3, 4], [11, 12, 13]]


def test_nemo_s_first_column_predicts_nothing() -> None:
    names, data = SEAMS["nemo-rl"], {"token_mask": torch.ones(2, 3), "sample_mask": torch.eye(2)[0]}
    call = {"data": {**data, "advantages": OLD}, "next_token_logprobs": LOGP[:, 1:]}
    found = names.find(call)
    assert found["mask"].tolist() == [[1, 1], [0, 0]]
    assert found["advantages"].tolist() == [[-2.0, -2.0]] * 2
    assert found["logp_old"].tolist() == LOGP[:, 1:].tolist(), "its own, where none were kept"
    assert "sampler" not in found
    call["data"]["prev_logprobs"] = SAMPLED
    assert names.find(call)["logp_old"].tolist() == [[-3.0, -3.0]] * 2


def test_a_process_alone_is_the_first() -> None:
    assert own_rank() == 0


# ---- the head -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("positions", "shape", "begins"),
    [
        ([[0, 1, 2, 0, 1]], (1, 5), [0, 3, 5]), ([[0, 1, 2, 3, 4]], (1, 5), [0, 5]),
        ([[0, 1], [0, 1]], (2, 2), None), ([[0, 1, 2]], (1, 5), None), (None, (1, 5), None),
    ],
)  # fmt: skip
def test_texts_of_a_packed_row_begin_where_positions_do(
    positions: Any, shape: tuple[int, int], begins: Any
) -> None:
    given = None if positions is None else torch.tensor(positions)
    found = _begins(given, torch.zeros(shape))
    assert (None if found is None else found.tolist()) == begins


def test_logits_go_by_their_name_and_a_value_model_has_none() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    for output in ({"logits": logits}, SimpleNamespace(logits=logits)):
        assert _named_logits(output) is logits
    for output in (
        {"logits": logits.detach()}, {"logits": logits[..., :1]}, {"logits": logits[0]}, {}, logits,
        SimpleNamespace(logits=None),
    ):  # fmt: skip
        assert _named_logits(output) is None


def reading(row: Any = None) -> Reading:
    numbers = torch.arange(3.0)
    stats = TokenStats(numbers, numbers, numbers, numbers, numbers > 1)
    index = None if row is None else torch.tensor(row)
    return Reading(stats, torch.arange(3 if row is None else len(row)), index, (1, 4), None)


@pytest.mark.parametrize(
    ("row", "index", "found"),
    [
        (None, [2, 0], [2.0, 0.0]), (None, [3], None), (None, [-1], None), (None, [], []),
        ([0, -1, 1, 2], [3, 2], [2.0, 1.0]), ([0, -1, 1, 2], [0, 1], None),
        ([0, -1, 1, 2], [4], None),
    ],
)  # fmt: skip
def test_statistics_at_places_that_were_read(row: Any, index: list[int], found: Any) -> None:
    stats = reading(row).at(torch.tensor(index, dtype=torch.long))
    assert (None if stats is None else stats.logp.tolist()) == found


class Head(nn.Module):
    """Makes logits (B, L, V) of its one table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Parameter(torch.randn(2, 4, 5))

    def forward(self, input_ids: Any = None, **given: Any) -> dict[str, Tensor]:
        return {"logits": self.table[:, -given.get("keep", 4) :]}


IDS = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])


@pytest.mark.parametrize(
    ("ids", "given", "reason"),
    [
        (None, {}, "the model was not given the token ids of its logits"),
        (IDS[0], {}, "the model was not given the token ids of its logits"),
        (IDS[:1], {}, "the model was not given the token ids of its logits"),
        (IDS[:, :3], {}, "the model made 4 logits of 3 tokens"),
    ],
)
def test_why_a_forward_was_not_read(ids: Any, given: dict[str, Any], reason: str) -> None:
    model = Head()
    reader = HeadReader(1.0, model)
    model(input_ids=ids, **given)
    assert reader.take(torch.zeros(2, 3), torch.ones(2, 3)) is None
    assert reader.reason == reason
    reader.close()


@pytest.mark.parametrize("keep", [4, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_the_last_positions_are_read_and_padding_is_not(keep: int, padded: bool) -> None:
    model = Head()
    reader = HeadReader(0.7, model)
    reader.topk = 9
    solid = torch.ones(2, 4, dtype=torch.long)
    solid[1, :2] = 0 if padded else 1
    logits = model(input_ids=IDS, keep=keep, attention_mask=solid)["logits"]
    count = keep - 1
    following = IDS[:, -count:]
    wanted = token_stats(logits[:, :-1].detach(), following, 0.7)
    mask = torch.ones(2, count, dtype=torch.bool)
    if padded:
        mask[1] = torch.arange(count) == count - 1
    logp = wanted.logp.view(2, count)
    found = reader.take(logp, mask)
    assert found is not None
    assert torch.equal(found[0].entropy, wanted.entropy.view(2, count)[mask])
    assert found[1].tolist() == following[mask].tolist()
    assert found[0].top_ids is not None
    assert found[0].top_ids.shape == (int(mask.sum()), 5), "no more than there are"
    if padded:
        assert reader.take(logp, torch.ones(2, count)) is None, "padding was not read"
    assert reader.take(logp + 0.2, mask) is None
    assert "0.2 nats away on average" in reader.reason
    reader.close()


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


@pytest.mark.parametrize("own", [True, False])
def test_a_loss_of_whole_texts_may_hold_each_token_s_own_probability_or_the_next_one_s(
    own: bool,
) -> None:
    """(B, L) log-probabilities of L logits: at each position those of its token, or the next."""
    model = Head()
    reader = HeadReader(1.0, model)
    logits = model(input_ids=IDS)["logits"].detach()
    logp = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    shown, mask = torch.zeros(2, 4), torch.zeros(2, 4)
    at = slice(1, None) if own else slice(0, 3)
    shown[:, at], mask[:, at] = logp, 1
    found = reader.take(shown, mask)
    assert found is not None
    torch.testing.assert_close(found[0].logp, logp.flatten())
    assert found[1].tolist() == IDS[:, 1:].flatten().tolist()
    reader.close()


def test_a_reader_that_fails_says_why_and_reads_no_more() -> None:
    model = Head()
    reader = HeadReader(1.0, model)
    reader.fail(ValueError("no kernel"))
    assert reader.reason == "reading the logits failed (ValueError: no kernel)"
    model(input_ids=IDS)
    assert reader._reading is None


class Small(nn.Module):
    """A causal model whose logits are those of its head, and a little more."""

    def __init__(self, size: float, more: float) -> None:
        super().__init__()
        self.base_model = Backbone()
        self.head = nn.Linear(1, 5, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-size, size, 5)[:, None])
        self.more = more
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, **inputs: Any) -> SimpleNamespace:
        hidden = self.base_model(**inputs).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden) + self.more)


class Backbone(nn.Module):
    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 1))


@pytest.mark.parametrize(
    ("size", "more", "fits"),
    [
        (0.5, 0.0, True), (0.5, 9e-5, True), (0.5, 1.2e-4, False), (1.0, 1.2e-4, False),
        (4.0, 3.6e-4, True), (4.0, 4.5e-4, False),
    ],
)  # fmt: skip
def test_a_head_fits_if_it_makes_the_model_s_own_logits(
    size: float, more: float, fits: bool
) -> None:
    """To 1e-4 of the largest logit, of at least 1."""
    reason = head_obstacle(Small(size, more), torch.device("cpu"))
    assert reason == (
        None if fits else "Small does more than head, scale and soft cap to make its logits"
    )


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
