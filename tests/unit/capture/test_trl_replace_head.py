"""Our head in place of TRL's, as TRL calls it: what it returns, its gradient, when it gives up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wapo_analysis.capture.trl.replace import (
    OwnHead,
    TrlHead,
    _spread,
    _StandIn,
    _Theirs,
    check_replaceable,
)
from wapo_analysis.errors import UserError
from wapo_analysis.stats import TokenStats, token_stats

D, V, M = 3, 7, 4


WEIGHT = torch.randn(V, D, generator=torch.Generator().manual_seed(0))


HIDDEN = torch.randn(M, D, generator=torch.Generator().manual_seed(1))


TARGETS = torch.tensor([0, 3, 6, 2])


class Function:
    """TRL's Function: log-probability and entropy of every position, and three more outputs."""

    calls = 0

    @classmethod
    def apply(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
    ) -> tuple[Tensor | None, ...]:
        cls.calls += 1
        logps = ((hidden @ weight.T) / settings[1]).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, settings[0][:, None])[:, 0], entropy, None, None, None


def settings(*outputs: str) -> tuple[Any, ...]:
    return TARGETS, 0.8, 256, None, 1.0, outputs or ("log_probs", "entropy")


def leaves() -> tuple[Tensor, Tensor]:
    return HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()


@pytest.mark.parametrize("scored", [[1, 1, 1, 1], [0, 1, 0, 1]])
def test_what_trl_gets_carries_gradient_through_logp_alone(scored: list[int]) -> None:
    head = OwnHead(lambda error: pytest.fail(str(error)))
    mask = torch.tensor([scored]).bool()
    head._scored = mask
    hidden, weight = leaves()
    logp, entropy, *rest = _StandIn(head, Function).apply(hidden, weight, None, *settings())
    assert rest == [None] * 3
    assert logp is not None
    assert entropy is not None
    assert logp.requires_grad
    assert not entropy.requires_grad
    theirs = leaves()
    expected, entropies, *_ = Function.apply(*theirs, None, *settings())
    assert expected is not None
    assert entropies is not None
    chosen = mask[0]
    torch.testing.assert_close(logp[chosen], expected[chosen])
    torch.testing.assert_close(entropy[chosen], entropies[chosen].detach())
    assert not logp[~chosen].any()
    logp[chosen].sum().backward()
    expected[chosen].sum().backward()
    torch.testing.assert_close(hidden.grad, theirs[0].grad)
    torch.testing.assert_close(weight.grad, theirs[1].grad)
    taken = head.take()
    assert taken is not None
    assert taken.collision_rest.shape == (1, M)
    exact = token_stats(HIDDEN @ WEIGHT.T, TARGETS, 0.8)
    torch.testing.assert_close(taken.collision_rest[0][chosen], exact.collision_rest[chosen])
    assert not taken.collision_rest[0][~chosen].any()


def test_on_a_gpu_trl_hands_over_the_scored_positions_alone() -> None:
    head = OwnHead(lambda error: pytest.fail(str(error)))
    head._scored = torch.tensor([[False, True, True, False, True, True]])
    logp, entropy, *_ = _StandIn(head, Function).apply(*leaves(), None, *settings())
    assert logp is not None
    assert entropy is not None
    assert logp.shape == entropy.shape == (M,)
    taken = head.take()
    assert taken is not None
    assert taken.logp.shape == (1, 6)
    assert taken.logp[0, [1, 2, 4, 5]].tolist() == logp.detach().tolist()
    assert taken.logp[0, [0, 3]].tolist() == [0.0, 0.0]


def test_an_output_we_do_not_make_leaves_trl_its_own_head() -> None:
    told: list[str] = []
    head = OwnHead(lambda error: told.append(str(error)))
    head._scored = torch.ones(1, M, dtype=torch.bool)
    before = Function.calls
    found = _StandIn(head, Function).apply(*leaves(), None, *settings("log_probs", "is_top1"))
    assert (Function.calls, told) == (before + 1, ["TRL asks its head for log_probs, is_top1"])
    assert found[0] is not None
    assert found[0].requires_grad
    assert (head.working, head.take()) == (False, None)


def test_if_our_gradient_fails_trl_s_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    head = OwnHead(lambda error: told.append(str(error)))
    head._scored = torch.tensor([[True, False, True, True]])
    hidden, weight = leaves()
    logp, *_ = _StandIn(head, Function).apply(hidden, weight, None, *settings())
    real, fails = torch.autograd.grad, [True]

    def grad(*given: Any, **how: Any) -> Any:
        if fails.pop() if fails else False:
            raise RuntimeError("no kernel")
        return real(*given, **how)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    assert logp is not None
    logp.sum().backward()
    assert (told, head.working) == (["no kernel"], False)
    theirs = leaves()
    expected = _Theirs(Function, settings())(*theirs, None)[0]
    assert expected is not None
    expected[torch.tensor([True, False, True, True])].sum().backward()
    torch.testing.assert_close(hidden.grad, theirs[0].grad)
    torch.testing.assert_close(weight.grad, theirs[1].grad)


def test_scored_positions_are_spread_over_all() -> None:
    scored = torch.tensor([False, True, True, False, True])
    found: Tensor = _spread(torch.tensor([1.0, 2.0, 3.0]), scored)
    assert found.tolist() == [0.0, 1.0, 2.0, 0.0, 3.0]


def test_statistics_of_a_forward_are_taken_once_and_none_after_the_scoring() -> None:
    head, stats = OwnHead(lambda error: None), TokenStats(*[torch.zeros(1)] * 5)
    with head.scoring():
        assert head._scoring
        head._stats = stats
        assert head.take() is stats
        assert head.take() is None
        head._stats = stats
    assert (head._scoring, head.take()) == (False, None)
    plain = TrlHead()
    assert (plain.working, plain.take()) == (False, None)


def test_a_failing_head_tells_once_and_hands_over(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Exception] = []
    head = OwnHead(told.append)
    head._stats = TokenStats(*[torch.zeros(1)] * 5)
    for number in range(2):
        head.fail(ValueError(str(number)))
    assert [str(error) for error in told] == ["0"]
    assert (head.working, head.take(), len(caplog.messages)) == (False, None, 1)


def test_replace_mode_needs_a_fused_head() -> None:
    with pytest.raises(UserError, match="stands in for the fused head of TRL 1.15 or newer"):
        check_replaceable(SimpleNamespace(), has_fused_head=False)


@pytest.mark.parametrize(
    ("working", "scoring", "given", "ours"),
    [
        (True, True, {"fused_lm_head": True}, True),
        (False, True, {"fused_lm_head": True}, False),
        (True, False, {"fused_lm_head": True}, False),
        (True, True, {}, False),
        (True, True, {"fused_lm_head": True, "shift_labels": TARGETS}, False),
        (True, True, {"shift_labels": TARGETS}, False),
        (True, True, {"fused_lm_head": True, "labels": None}, False),
    ],
)
def test_our_head_stands_in_for_a_fused_scoring_of_the_loss_alone(
    working: bool, scoring: bool, given: dict[str, Any], ours: bool
) -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="needs the extra [trl]")
    theirs = getattr(utils, "_ChunkedLogProbFunction", None)
    if theirs is None:
        pytest.skip("TRL before 1.15 has no fused head")
    head = OwnHead(lambda error: pytest.fail(str(error)))
    head.working, head._scoring = working, scoring
    stood: list[bool] = []

    def forward(**_: Any) -> str:
        stood.append(isinstance(utils._ChunkedLogProbFunction, _StandIn))
        return "out"

    labels = torch.tensor([[5, -100, 3, 0], [7, 2, -100, -100]])
    assert head._forward(forward, **{"labels": labels, **given}) == "out"
    assert stood == [ours]
    assert utils._ChunkedLogProbFunction is theirs, "put back"
    if ours:
        assert head._scored.tolist() == [[False, True, True], [True, False, False]]
