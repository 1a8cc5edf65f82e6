"""Statistics of a TRL pass, without a trainer: where they come from and what is trusted."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wapo_analysis.capture import Patches
from wapo_analysis.capture.trl.replace import TrlHead
from wapo_analysis.capture.trl.stats import StatsReader, _Call, _completion, richer_head
from wapo_analysis.stats import token_stats


def reader(weights: torch.dtype = torch.float32, vocabulary: int = 5) -> StatsReader:
    head = SimpleNamespace(weight=torch.zeros(vocabulary, 2, dtype=weights))
    watch = object.__new__(StatsReader)
    watch._model = SimpleNamespace(get_output_embeddings=lambda: head)
    watch._trusted, watch.source = True, "none"
    return watch


@pytest.mark.parametrize(
    ("weights", "dtype", "gap", "agrees"),
    [
        (torch.float32, torch.float32, 9e-4, True), (torch.float32, torch.float32, 1.1e-3, False),
        (torch.float64, torch.float64, 9e-7, True), (torch.float64, torch.float64, 1.1e-6, False),
        (torch.bfloat16, torch.bfloat16, 0.29, True), (torch.bfloat16, torch.bfloat16, 0.31, False),
        (torch.bfloat16, torch.float32, 0.29, True), (torch.float32, torch.float64, 0.31, False),
        (torch.float32, torch.float64, 0.29, True), (torch.float32, torch.float32, -1.1e-3, False),
    ],
)  # fmt: skip
def test_statistics_are_trusted_as_far_as_their_log_probabilities_are_the_trainer_s(
    weights: torch.dtype, dtype: torch.dtype, gap: float, agrees: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    watch, theirs = reader(weights), torch.zeros(3, dtype=torch.float64)
    ours = torch.tensor([0.0, gap, torch.nan], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        assert watch._agrees(ours, theirs, dtype) is agrees
        assert watch._agrees(ours, theirs, dtype) is agrees
    assert watch._trusted is agrees
    assert len(caplog.messages) == (not agrees), "told once"


def test_what_is_not_finite_on_both_sides_says_nothing() -> None:
    nothing = torch.tensor([torch.nan, torch.inf])
    assert reader()._agrees(nothing, torch.zeros(2), torch.float32)
    assert reader()._agrees(nothing[:0], torch.zeros(0), torch.float32)


def test_a_scoring_in_autocast_is_of_half_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert reader()._agrees(torch.tensor([0.2]), torch.zeros(1), torch.float32)
    assert not reader()._agrees(torch.tensor([0.2]), torch.zeros(1), torch.float32)


def call_of(*fused: Any) -> _Call:
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    call = _Call(mask, torch.zeros(2, 2, dtype=torch.long), True)
    call.fused = list(fused)
    return call


def test_completions_are_the_last_positions_under_the_mask() -> None:
    values = torch.arange(10.0).view(2, 5)
    assert _completion(values, call_of()).tolist() == [3.0, 4.0, 8.0]


def test_rollouts_of_a_pass_come_in_order_however_they_are_split() -> None:
    call = _Call(torch.eye(5).bool(), torch.arange(25).view(5, 5), False)
    parts = [call.next(count) for count in (2, 1, 2)]
    assert torch.equal(torch.cat([mask for mask, _ in parts]), call.mask_BT)
    assert torch.equal(torch.cat([ids for _, ids in parts]), call.ids_BT)


def test_a_sum_of_squares_of_single_precision_is_held_within_what_p_allows() -> None:
    """S - p^2 lies between (1-p)^2 / (V-1) and (1-p)^2, however it was rounded."""
    prob = torch.tensor([0.5, 0.9, 0.9999999], dtype=torch.float64)
    exact = prob**2 + torch.tensor([0.1, 5.0, 0.0], dtype=torch.float64)
    logs = torch.zeros(2, 3)
    logs[:, 1:] = torch.tensor([[exact[0], exact[1]], [exact[2], 1.0]]).log()
    top1 = torch.tensor([[0, 1, 0], [0, 1, 1]]).bool()
    watch = reader(vocabulary=5)
    halves = [
        SimpleNamespace(log_sum_sq_probs=logs[n : n + 1], is_top1=top1[n : n + 1]) for n in (0, 1)
    ]
    found = watch._from_fused(call_of(*halves), prob.log().float())
    assert watch.source == "fused head"
    assert found["top1"].tolist() == [True, False, True]  # type: ignore[union-attr]
    rest = found["collision_rest"]
    assert rest is not None
    spare = -torch.expm1(prob.log().float().double())
    assert rest[0].item() == pytest.approx(0.1, rel=1e-5)
    assert rest[1].item() == pytest.approx(spare[1].item() ** 2, rel=1e-6)
    assert rest[2].item() == pytest.approx(spare[2].item() ** 2 / 4, rel=1e-6)


def test_what_the_fused_head_does_not_give_is_missing() -> None:
    watch = reader()
    assert watch._from_fused(call_of(), torch.zeros(3)) == {}
    assert watch.source == "none"
    both = SimpleNamespace(log_sum_sq_probs=torch.zeros(2, 2)), SimpleNamespace()
    found = watch._from_fused(call_of(*both), torch.zeros(3))
    assert found == {"top1": None}


@pytest.mark.parametrize(("gap", "agrees"), [(1e-3, True), (1.0001e-3, False)])
def test_a_thousandth_of_a_nat_is_still_agreement(gap: float, agrees: bool) -> None:
    ours = torch.tensor([gap], dtype=torch.float64)
    assert reader()._agrees(ours, torch.zeros(1), torch.float32) is agrees


@pytest.mark.parametrize("vocabulary", [1, 2])
def test_of_two_tokens_the_other_one_has_all_that_is_left(vocabulary: int) -> None:
    watch, prob = reader(vocabulary=vocabulary), torch.tensor([0.25, 0.5, 0.75])
    out = SimpleNamespace(log_sum_sq_probs=torch.full((2, 2), -9.0), is_top1=None)
    rest = watch._from_fused(call_of(out), prob.log())["collision_rest"]
    assert rest is not None
    assert rest.tolist() == pytest.approx([0.75**2, 0.5**2, 0.25**2])


class Forward:
    """A reader whose model, richer head and takings only say that they were asked."""

    def __init__(self, **given: Any) -> None:
        self.ran: list[str] = []
        self.taken: list[Any] = []
        watch = self.watch = reader()
        head = SimpleNamespace(weight=torch.zeros(5, 2), bias=None)
        watch._model = SimpleNamespace(get_output_embeddings=lambda: head)
        call = None if given["call"] is None else call_of()
        if call is not None:
            call.exact = given["call"] == "exact"
        watch._call, watch.scheduled = call, given.get("scheduled", False)
        watch._head = SimpleNamespace(working=given.get("working", False))  # type: ignore[assignment]
        watch._trusted = given.get("trusted", True)
        watch._inside = False
        watch._richer = self.richer if given.get("richer", True) else None
        watch._guard = lambda action, *args: action(*args)
        watch._take = lambda out, tensors: self.taken.append(tensors is not None)  # type: ignore[method-assign]
        self.logps = given.get("logps", 1)

    def richer(self, **given: Any) -> Any:
        self.ran.append("richer")
        return SimpleNamespace(log_probs=self.logps)

    def original(self, **given: Any) -> Any:
        self.ran.append("original")
        return SimpleNamespace(log_probs=self.logps)


@pytest.mark.parametrize(
    ("given", "fused", "ran", "taken"),
    [
        ({"call": None}, True, "original", []),
        ({"call": None, "scheduled": True}, True, "original", [True]),
        ({"call": "plain"}, True, "richer", [False]),
        ({"call": "plain"}, None, "original", [False]),
        ({"call": "plain", "richer": False}, True, "original", [False]),
        ({"call": "plain", "working": True}, True, "original", [False]),
        ({"call": "exact", "scheduled": True}, True, "original", [True]),
        ({"call": "exact", "scheduled": True, "logps": None}, True, "original", [False]),
        ({"call": "exact", "trusted": False}, True, "richer", [False]),
    ],
)
def test_the_richer_head_is_asked_only_where_nothing_better_is_read(
    given: dict[str, Any], fused: Any, ran: str, taken: list[bool]
) -> None:
    """And the head is gathered, a step of all processes, on the schedule alone."""
    forward = Forward(**given)
    forward.watch._forward(forward.original, fused_lm_head=fused)
    assert (forward.ran, forward.taken) == ([ran], taken)
    assert not forward.watch._inside


L, T, V = 7, 3, 5
LOGITS = torch.randn(2, L, V, generator=torch.Generator().manual_seed(0))


def logits_reader(again: bool = False) -> tuple[StatsReader, _Call, list[Tensor]]:
    watch, looked = reader(), list[Tensor]()
    watch._head = SimpleNamespace(take=lambda: None)  # type: ignore[assignment]
    watch._trainer = SimpleNamespace(temperature=0.7, casts_head=True)  # type: ignore[assignment]
    mask, ids = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    place = mask.nonzero(as_tuple=True)
    top: Any = SimpleNamespace(read=lambda rows: looked.append(rows(place)))
    watch._call = _Call(mask, ids, True, top, again=again)
    return watch, watch._call, looked


def test_logits_of_a_completion_are_those_before_its_tokens() -> None:
    watch, call, looked = logits_reader()
    watch._take(SimpleNamespace(logits=LOGITS), None)
    before = LOGITS[:, 3:6]
    wanted = token_stats(before[call.mask_BT], call.ids_BT[call.mask_BT], 0.7)
    assert torch.equal(call.from_logits[0].logp, wanted.logp)
    assert torch.equal(looked[0], before[call.mask_BT])
    columns = watch.close(torch.zeros(2, 3).masked_scatter(call.mask_BT, wanted.logp), None)
    assert watch.source == "logits"
    assert columns["collision_rest"] is not None
    assert torch.equal(columns["collision_rest"], wanted.collision_rest)


@pytest.mark.parametrize(("again", "mixed"), [(False, False), (True, False), (False, True)])
def test_hidden_states_of_a_completion_are_those_before_its_tokens(
    again: bool, mixed: bool
) -> None:
    """A head that the trainer casts to float32 is read in it, also within its autocast."""
    watch, call, looked = logits_reader(again)
    weight = torch.randn(V, 2, generator=torch.Generator().manual_seed(1))
    watch._model.config = SimpleNamespace(get_text_config=SimpleNamespace)
    hidden = torch.randn(2, L, 2, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        watch._read_head((weight, None), hidden)
    before = (hidden @ weight.T)[:, 3:6]
    torch.testing.assert_close(looked[0], before[call.mask_BT])
    assert len(call.from_head) == (not again)
    if not again:
        wanted = token_stats(before[call.mask_BT], call.ids_BT[call.mask_BT], 0.7)
        torch.testing.assert_close(call.from_head[0].logp, wanted.logp)
        torch.testing.assert_close(call.from_head[0].entropy, wanted.entropy)


def test_a_part_of_a_pass_is_reduced_and_no_top_tokens_are_read_of_it() -> None:
    watch, call, looked = logits_reader()
    for part in (LOGITS[:1], LOGITS[1:]):
        watch._take(SimpleNamespace(logits=part), None)
    assert looked == []
    assert [len(part.logp) for part in call.from_logits] == [2, 2]


def test_a_second_look_reads_the_top_tokens_and_nothing_else() -> None:
    watch, call, looked = logits_reader(again=True)
    watch._take(SimpleNamespace(logits=LOGITS), None)
    assert len(looked) == 1
    assert call.from_logits == []
    call.top = None
    watch._take(SimpleNamespace(logits=LOGITS), None)
    assert len(looked) == 1


def test_a_second_look_needs_rows_whose_top_tokens_were_read() -> None:
    watch, mask = reader(), torch.ones(1, 2).bool()
    watch.scheduled = False
    read, unread = SimpleNamespace(ids=torch.zeros(2)), SimpleNamespace(ids=None)
    for given in ((None, read), (mask, None), (mask, unread), (None, None)):
        watch._call = None
        watch.open_again(*given)  # type: ignore[arg-type]
        assert watch._call is None
    watch.open_again(mask, read)  # type: ignore[arg-type]
    assert watch._call is not None
    assert watch._call.again


@pytest.mark.parametrize(
    ("scheduled", "hidden", "kept"),
    [(True, True, True), (False, True, False), (True, False, False)],
)
def test_hidden_states_are_kept_where_the_head_is_to_be_read(
    scheduled: bool, hidden: bool, kept: bool
) -> None:
    watch = reader()
    watch._hidden, watch.scheduled, watch._inside = None, scheduled, True
    states = torch.ones(1, 2, 3) if hidden else None
    watch._keep_hidden(None, None, SimpleNamespace(last_hidden_state=states))
    assert (watch._hidden is not None) is kept


def test_hidden_states_that_are_not_seen_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch, tensors = reader(), (torch.zeros(5, 2), None)
    watch._call = None
    watch._read_head(tensors, None)
    assert watch._trusted, "nothing is looked at"
    watch._call = call_of()
    for _ in range(2):
        watch._read_head(tensors, None)
    assert (watch._trusted, len(caplog.messages)) == (False, 1)
    watch._read_head(tensors, torch.ones(2, 4, 2))
    assert watch._call.from_head == [], "not trusted any more"


@pytest.mark.parametrize("backbone", ["inner", "itself", "none", "no module"])
def test_only_a_backbone_of_its_own_is_listened_to(backbone: str) -> None:
    model = nn.Linear(1, 1)
    inner = nn.Linear(1, 1)
    base = {"inner": inner, "itself": model, "no module": SimpleNamespace()}.get(backbone)
    if base is not None:
        object.__setattr__(model, "base_model", base)
    trainer: Any = SimpleNamespace(model=model, temperature=1.0, casts_head=False)
    assert richer_head(trainer, True) is None, "no fused head"
    patches = Patches()
    StatsReader(trainer, patches, lambda action, *given: action(*given), True, TrlHead())
    assert "forward" in vars(model)
    hooks = len(inner._forward_hooks), len(model._forward_hooks)
    assert hooks == ((1, 0) if backbone == "inner" else (0, 0))
    patches.close()
    assert "forward" not in vars(model)
    assert not inner._forward_hooks
