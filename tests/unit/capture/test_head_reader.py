"""Which positions of a model's logits are read, and which of them a loss meant."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wapo_analysis.capture.lm_head import (
    HeadReader,
    Reading,
    _begins,
    _distance,
    _named_logits,
)
from wapo_analysis.record.batches import MATCH
from wapo_analysis.stats import TokenStats, token_stats


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
        (None, [1], [1.0]), (None, [-1, 2], None), (None, [0, 3], None),
        ([0, -1, 1, 2], [3, 2], [2.0, 1.0]), ([0, -1, 1, 2], [0, 1], None),
        ([0, -1, 1, 2], [4], None), ([0, -1, 1, 2], [0, 2], [0.0, 1.0]),
        ([0, -1, 1, 2], [-1, 2], None),
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

    def forward(self, input_ids: Any = None, **given: Any) -> Any:
        if "flat" in given:
            return (self.table[:, 0],)
        return {"logits": (self.table * 1)[:, -given.get("keep", 4) :]}


IDS = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])


@pytest.mark.parametrize(
    ("ids", "given", "reason"),
    [
        (None, {}, "the model was not given the token ids of its logits"),
        (IDS[0, :2], {}, "the model was not given the token ids of its logits"),
        (IDS, {"flat": True}, "the model was not given the token ids of its logits"),
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
        logp = torch.where(mask, logp, logp[0, 1])  # of another place that was read
        assert reader.take(logp, torch.ones(2, count)) is None, "padding was not read"
    assert reader.take(logp + 0.11, mask) is None
    assert "0.11 nats away on average" in reader.reason
    assert reader.take(logp + 0.09, mask) is not None, "half precision may be that far away"
    reader.close()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_loss_of_whole_texts_may_hold_each_token_s_own_probability_or_the_next_one_s(
    own: bool, scale: float
) -> None:
    """(B, L) log-probabilities of L logits: at each position those of its token, or the next.

    Of a policy that is nearly uniform both are near; the nearer ones are meant.
    """
    model = Head()
    with torch.no_grad():
        model.table.mul_(scale)
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
    assert found[0].top_ids is None, "not asked for"
    nothing = reader.take(shown, torch.zeros(2, 4))
    assert nothing is not None
    assert (len(nothing[0].logp), len(nothing[1])) == (0, 0)
    reader.close()


def test_a_forward_may_be_called_with_its_ids_first_and_a_mask_of_another_shape() -> None:
    model = Head()
    reader = HeadReader(1.0, model)
    logits = model(IDS, attention_mask=torch.zeros(2, 1, 4, 4))["logits"].detach()
    logp = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    found = reader.take(logp, torch.ones(2, 3))
    assert found is not None
    assert found[1].tolist() == IDS[:, 1:].flatten().tolist()
    reader.close()


class Silent(nn.Module):
    """Returns no logits, or a value for each position in their place."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, input_ids: Tensor) -> Any:
        return self.output


class Refuses:
    """An output that is asked for what it does not know."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_what_a_module_returns_may_refuse_to_be_asked_for_logits() -> None:
    class Odd(nn.Module):
        def forward(self, ids: Tensor) -> Any:
            return Refuses()

    reader = HeadReader(1.0)
    try:
        assert isinstance(Odd()(torch.zeros(1, 2)), Refuses)
        assert reader.failure is None
    finally:
        reader.close()


@pytest.mark.parametrize("known", [False, True], ids=["found", "given"])
def test_a_model_that_is_read_can_be_copied_and_its_copy_is_not_read(known: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Embedding(5, 5)

        def forward(self, ids: Tensor) -> Any:
            return SimpleNamespace(logits=self.head(ids))

    model, ids = Model(), torch.tensor([[1, 2, 3]])
    reader = HeadReader(1.0, model if known else True)
    try:
        model(ids)
        seen = reader._reading
        assert seen is not None
        average = copy.deepcopy(model)
        assert torch.equal(average(ids).logits, model(ids).logits)
        seen = reader._reading
        average(ids)
        assert reader._reading is seen
    finally:
        reader.close()


def test_a_forward_without_logits_or_without_a_graph_is_not_read() -> None:
    for output in ({}, {"logits": None}, (), SimpleNamespace(logits=torch.zeros(2, 4, 5))):
        silent = Silent(output)
        reader = HeadReader(1.0, silent)
        assert silent(IDS) is output
        assert (reader._reading, reader.failure) == (None, None)
        reader.close()
    model = Head()
    for reader in (HeadReader(1.0, model), HeadReader(1.0)):
        with torch.no_grad():
            model(IDS)
        assert (reader._reading, reader.failure) == (None, None)
        reader.close()


@pytest.mark.parametrize("own", [True, False])
def test_texts_of_one_row_are_given_to_the_loss_call_after_call(own: bool) -> None:
    """Packed log-probabilities (m,): each call goes on where the last one ended."""
    model = Head()
    reader = HeadReader(1.0, model)
    with torch.no_grad():
        model.table.set_(torch.randn(1, 9, 5))
    ids = torch.arange(9)[None] % 5
    logits = model(ids, keep=9)["logits"][0].detach()
    following = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    row = torch.cat([torch.zeros(1), following] if own else [following, torch.zeros(1)])
    real = torch.ones(9)
    real[0 if own else 8] = 0
    for part in (slice(0, 4), slice(4, 7), slice(7, 9)):
        found = reader.take(row[part], real[part])
        assert found is not None
        torch.testing.assert_close(found[0].logp, row[part][real[part].bool()])
    reader.close()


@pytest.mark.parametrize("together", [True, False])
def test_texts_of_a_packed_row_may_come_as_padded_ones(together: bool) -> None:
    """Three texts of 4, 3 and 5 tokens; the loss has the last two of each, or one text a call."""
    model = Head()
    reader = HeadReader(1.0, model)
    with torch.no_grad():
        model.table.set_(torch.randn(1, 12, 5))
    ids, lengths = torch.arange(12)[None] % 5, (4, 3, 5)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = model(ids, keep=12, position_ids=positions)["logits"][0].detach()
    following = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    texts = [following[end - n : end - 1] for n, end in zip(lengths, (4, 7, 12), strict=True)]
    if together:
        logp, mask = torch.stack([text[-2:] for text in texts]), torch.ones(3, 2)
        calls = [(logp, mask)]
    else:
        calls = [(text[None], torch.ones(1, len(text))) for text in texts]
    for logp, mask in calls:
        found = reader.take(logp, mask)
        assert found is not None
        torch.testing.assert_close(found[0].logp, logp[mask.bool()])
    assert reader.take(torch.zeros(4, 2), torch.ones(4, 2)) is None, "more than there are texts"
    again = reader.take(texts[0][None], torch.ones(1, 3))
    assert (again is None) is together, "after the last text the first may follow"
    assert reader.failure is None
    reader.close()


def test_logits_that_a_loss_was_given_are_read_where_they_agree() -> None:
    logits, ids = torch.randn(2, 3, 5), torch.arange(6).view(2, 3) % 5
    logp = (logits / 0.5).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    reader = HeadReader(0.5, False)
    reader.topk = 9
    found = reader.read(logits, ids, logp, mask)
    assert found is not None
    torch.testing.assert_close(found.logp, logp[mask.bool()])
    assert found.top_ids is not None
    assert found.top_ids.shape == (3, 5)
    reader.topk = 2
    again = reader.read(logits, ids, logp, mask)
    assert again is not None
    assert again.top_ids is not None
    assert again.top_ids.shape == (3, 2)
    assert reader.read(logits, ids, logp + 0.2, mask) is None


def test_log_probabilities_agree_up_to_a_tenth_of_a_nat_on_average() -> None:
    reader, zeros = HeadReader(1.0, False), torch.zeros(2, dtype=torch.float64)
    for gap, agrees in ((MATCH, True), (MATCH * 1.001, False), (-MATCH * 1.001, False)):
        assert reader._agrees(_distance(zeros + gap, zeros)) is agrees
    assert reader._agrees(_distance(torch.tensor([0, 2 * MATCH], dtype=torch.float64), zeros)), (
        "on average"
    )
    assert reader._agrees(_distance(zeros[:0], zeros[:0])), "nothing differs"


def test_a_reader_that_fails_says_why_and_reads_no_more() -> None:
    model = Head()
    reader = HeadReader(1.0, model)
    reader.fail(ValueError("no kernel"))
    assert reader.reason == "reading the logits failed (ValueError: no kernel)"
    model(input_ids=IDS)
    assert reader._reading is None
