"""Parts of watching a TRL trainer that need no trainer: clip rule, loss scale, masks, gradient."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wapo_analysis.capture import Patches
from wapo_analysis.capture.trl.objective import _ObjectiveLoss
from wapo_analysis.capture.trl.passes import (
    SeenPass,
)
from wapo_analysis.capture.trl.trainer import (
    ClipRule,
    TrlTrainer,
    clip_rule,
    loss_mask,
)
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.record.recorder import TokenPass

RATIOS = (0.3, 0.79, 0.81, 1.0, 1.15, 1.19, 1.21, 1.45, 1.55, 4.0)


LOW, HIGH = 0.8, 1.2


def surrogate(log_ratio: Tensor, advantage: Tensor, delta: float | None, level: str) -> Tensor:
    """TRL's clipped surrogate, one loss per token, shape (B, T)."""
    if level == "mean":
        log_ratio = log_ratio.mean(1, keepdim=True).expand_as(log_ratio)
    if level == "sum":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    plain = log_ratio.exp()
    held = plain.clamp(LOW, HIGH)
    if delta is not None:
        plain = plain.clamp(max=delta)
    return -torch.minimum(plain * advantage, held * advantage)


@pytest.mark.parametrize("level", ["token", "mean", "sum"])
@pytest.mark.parametrize("delta", [None, 1.5, 1.1], ids=["no delta", "delta", "delta below high"])
def test_the_rule_stops_exactly_the_tokens_without_gradient(level: Any, delta: Any) -> None:
    pairs = list(product(RATIOS, RATIOS, (-0.7, 0.7)))
    log_ratio = torch.tensor([[a, b] for a, b, _ in pairs], dtype=torch.float64).log()
    advantage = torch.tensor([[a, a] for *_, a in pairs], dtype=torch.float64)
    leaf = log_ratio.clone().requires_grad_()
    # The loss of a token may hang on its whole rollout; it is stopped if nothing of it moves.
    surrogate(leaf, advantage, delta, level).sum().backward()
    assert leaf.grad is not None
    rule = ClipRule(LOW, HIGH, torch.inf if delta is None else delta, level)
    found = rule.clipped(log_ratio, torch.ones_like(log_ratio), advantage)
    assert 0 < found.float().mean() < 1
    assert torch.equal(found, leaf.grad == 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "delta", "stopped"),
    [
        (0.5, 1.0, None, False), (0.5, -1.0, None, True),
        (1.5, 1.0, None, True), (1.5, -1.0, None, False),
        (3.5, 1.0, 3.0, True), (3.5, -1.0, 3.0, True),
        (2.5, 1.0, 3.0, True), (2.5, -1.0, 3.0, False),
        (0.5, 1.0, 3.0, False), (1.0, 0.0, 3.0, False), (9.0, 0.0, 3.0, False),
        (0.5, 0.0, None, False), (0.5, -0.5, None, True), (1.5, 0.5, None, True),
        (3.5, -0.5, 3.0, True),
    ],
)  # fmt: skip
def test_the_rule_in_words(ratio: float, advantage: float, delta: Any, stopped: bool) -> None:
    one = torch.ones(1, 1)
    rule = ClipRule(LOW, HIGH, torch.inf if delta is None else delta)
    assert bool(rule.clipped((one * ratio).log(), one, one * advantage)) is stopped


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_ratio_at_its_bound_is_not_stopped(advantage: float) -> None:
    zero = torch.zeros(1, 1)
    assert not ClipRule(1.0, 1.0, 1.0).clipped(zero, zero + 1, zero + advantage)


def test_without_bounds_nothing_is_stopped() -> None:
    log_ratio = torch.tensor([[-50.0, 0.0, 50.0]]).repeat(2, 1)
    advantage = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    assert not ClipRule().clipped(log_ratio, torch.ones(2, 3), advantage).any()


def test_the_ratio_of_one_token_is_that_of_its_rollout_and_of_none_is_one() -> None:
    rule = ClipRule(LOW, HIGH, level="mean")
    log_ratio, mask = torch.tensor([[0.2], [0.2]]), torch.tensor([[1], [0]])
    assert rule.clipped(log_ratio, mask, torch.ones(2, 1)).tolist() == [[True], [False]]


def test_padding_has_no_part_in_the_ratio_of_a_sequence() -> None:
    log_ratio = torch.tensor([[0.15, 0.15, 99.0]])
    mask, advantage = torch.tensor([[1, 1, 0]]), torch.ones(1, 3)
    for level, stopped in (("mean", False), ("sum", True)):
        rule = ClipRule(LOW, HIGH, level=level)  # type: ignore[arg-type]
        assert rule.clipped(log_ratio, mask, advantage).tolist() == [[stopped, stopped, False]]


def trainer(**settings: Any) -> Any:
    args = SimpleNamespace(delta=settings.pop("delta", None))
    return SimpleNamespace(args=args, epsilon_low=0.1, epsilon_high=0.3, **settings)


def test_every_trainer_and_loss_has_its_own_rule() -> None:
    assert clip_rule(trainer(loss_type="dapo", delta=2.0), "GRPOTrainer") == ClipRule(0.9, 1.3, 2.0)
    assert clip_rule(trainer(loss_type="cispo"), "GRPOTrainer") == ClipRule()
    assert clip_rule(trainer(loss_type="sapo"), "GRPOTrainer") == ClipRule()
    sequence = trainer(loss_type="luspo", importance_sampling_level="sequence")
    assert clip_rule(sequence, "GRPOTrainer") == ClipRule(0.9, 1.3, level="mean")
    assert clip_rule(trainer(), "RLOOTrainer") == ClipRule(0.9, 1.3, level="sum")
    gmpo = clip_rule(trainer(loss_type="dapo", delta=2.0), "GMPOTrainer")
    assert (gmpo.low, gmpo.high) == pytest.approx((0.904837, 1.349859), rel=1e-5)
    assert gmpo.delta == torch.inf
    config = ObjectiveConfig(name="wapo", clip_eps=9.0, max_seq_len=8)
    wapo = clip_rule(trainer(loss_type="cispo", _wapo_objective=config), "GRPOTrainer")
    assert wapo == ClipRule(0.0, 10.0)
    gspo = ObjectiveConfig(name="gspo", clip_eps=0.25)
    assert clip_rule(trainer(_wapo_objective=gspo), "GRPOTrainer").level == "mean"
    rewarded = ObjectiveConfig(name="raft")
    assert clip_rule(trainer(_wapo_objective=rewarded), "GRPOTrainer") == ClipRule()
    plain = SimpleNamespace(args=SimpleNamespace())
    assert clip_rule(plain, "GRPOTrainer") == ClipRule(0.8, 1.2), "of a trainer that does not say"
    assert clip_rule(trainer(loss_type="dapo"), "GMPOTrainer").level == "token"


@pytest.mark.parametrize(
    ("processes", "scale", "expected"), [(1, None, 1.0), (2, None, 2.0), (1, 1024.0, 1024.0)]
)
def test_the_loss_scale_is_that_of_precision_and_processes(
    processes: int, scale: float | None, expected: float
) -> None:
    """DDP averages the gradients of processes; a GradScaler multiplies the loss."""
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    watched = object.__new__(TrlTrainer)
    watched.raw = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler))
    watched.processes = processes
    assert watched.loss_scale == expected
    seen = seen_pass()
    grad = torch.tensor([[0.5, 0.25, 8.0], [0.0, -1.0, 0.0]])
    seen.take_gradient(grad, watched.loss_scale, has_kl=False)
    assert seen.tokens is not None
    assert seen.tokens.coef is not None
    assert (seen.tokens.coef * expected).tolist() == [-0.5, -0.25, 0.0, 1.0]


MASK = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()


def seen_pass(clipped: tuple[bool, ...] = (False, False, False, False)) -> SeenPass:
    place = torch.arange(4)
    zeros = torch.zeros(4)
    tokens = TokenPass(
        group=place, rollout=place, position=place, token_id=place,
        advantage=torch.tensor([1.0, 1.0, -1.0, -1.0]), logp=zeros,
    )  # fmt: skip
    return SeenPass(lambda: None, tokens, MASK, torch.tensor(clipped))


def test_kept_is_what_every_mask_of_the_loss_leaves() -> None:
    seen = seen_pass(clipped=(True, True, False, False))
    seen.masks = [torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), torch.tensor([[1.0], [0.0]])]
    seen.take_gradient(torch.zeros(2, 3), 1.0, has_kl=False)
    assert seen.tokens is not None
    assert seen.tokens.kept is not None
    assert seen.tokens.clipped is not None
    assert seen.tokens.kept.tolist() == [True, False, False, False]
    assert seen.tokens.clipped.tolist() == [True, True, False, False]


def test_a_token_without_advantage_needs_no_gradient_to_be_kept() -> None:
    seen = seen_pass()
    assert seen.tokens is not None
    seen.tokens.advantage[1] = 0.0
    seen.take_gradient(torch.zeros(2, 3), 1.0, has_kl=False)
    assert seen.tokens.kept is not None
    assert seen.tokens.kept.tolist() == [False, True, False, False]


def test_a_rule_the_gradient_contradicts_stops_nothing() -> None:
    """A subclass may clip by a rule of its own; with a KL term the gradient does not tell."""
    for has_kl, clipped in (
        (False, [False, True, False, False]),
        (True, [True, True, False, False]),
    ):
        seen = seen_pass(clipped=(True, True, False, False))
        seen.take_gradient(torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.1, 0.0]]), 1.0, has_kl)
        assert seen.tokens is not None
        assert seen.tokens.clipped is not None
        assert seen.tokens.kept is not None
        assert seen.tokens.clipped.tolist() == clipped
        assert seen.tokens.kept.tolist() == [True, True, False, True]


def test_gradients_of_two_scorings_add_up() -> None:
    seen = seen_pass()
    for part in (0.5, 0.25):
        seen.take_gradient(torch.full((2, 3), part), 2.0, has_kl=False)
    assert seen.tokens is not None
    assert seen.tokens.coef is not None
    assert seen.tokens.coef.tolist() == [-0.375] * 4


def test_the_loss_mask_leaves_out_what_a_tool_wrote() -> None:
    completion = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert loss_mask({"completion_mask": completion}).sum() == 5
    tool = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]])
    inside = loss_mask({"completion_mask": completion, "tool_mask": tool})
    assert inside.tolist() == [[True, False, True, False], [False] * 4]


@pytest.mark.parametrize(
    ("kind", "scaled", "divisor"),
    [("MULTI_GPU", True, 4.0), ("DEEPSPEED", True, 1.0), ("MULTI_GPU", False, 12.0)],
)
def test_wapo_undoes_the_division_that_comes_after_it(
    kind: str, scaled: bool, divisor: float
) -> None:
    """Trainer divides unless the loss is scaled already; accelerate divides but with DeepSpeed."""
    accelerator = SimpleNamespace(
        distributed_type=f"DistributedType.{kind}", gradient_accumulation_steps=4
    )
    own = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator,
        loss_is_scaled_for_ga=scaled, current_gradient_accumulation_steps=3,
    )  # fmt: skip
    loss = _ObjectiveLoss(own, ObjectiveConfig(name="wapo", clip_eps=9.0, max_seq_len=8), Patches())
    assert loss._divisor() == divisor
    own.model.training = False
    assert loss._divisor() == 1.0
