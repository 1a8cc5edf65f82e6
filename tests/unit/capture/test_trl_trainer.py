"""Parts of watching a TRL trainer that need no trainer: clip rule, loss scale, masks, gradient."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wapo_analysis.capture import Patches
from wapo_analysis.capture.trl.objective import _ObjectiveLoss
from wapo_analysis.capture.trl.passes import SeenPass
from wapo_analysis.capture.trl.trainer import (
    OLD_LOGPS,
    ClipRule,
    TrlTrainer,
    clip_rule,
    hidden_tensors,
    logps_and_entropies,
    loss_mask,
    most_dropout,
)
from wapo_analysis.capture.trl.watcher import TrlWatcher
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
    ],
)  # fmt: skip
def test_the_rule_in_words(ratio: float, advantage: float, delta: Any, stopped: bool) -> None:
    one = torch.ones(1, 1)
    rule = ClipRule(LOW, HIGH, torch.inf if delta is None else delta)
    assert bool(rule.clipped((one * ratio).log(), one, one * advantage)) is stopped


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


# ---- what is read off a trainer -----------------------------------------------------------------


def plain_trainer(**raw: Any) -> TrlTrainer:
    watched = object.__new__(TrlTrainer)
    watched.raw, watched.kind, watched._logged = SimpleNamespace(**raw), "GRPOTrainer", {}
    return watched


NOW, OLD = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
SAMPLED = torch.tensor([[-1.25, torch.nan]])


@pytest.mark.parametrize(
    ("inputs", "ours", "behaviour", "proximal"),
    [
        ({}, False, [-1.0, -2.0], None),
        ({"old_per_token_logps": OLD}, False, [-1.5, -1.0], None),
        ({"sampling_per_token_logps": SAMPLED}, False, [-1.25, -2.0], [-1.0, -2.0]),
        ({"old_per_token_logps": OLD, "sampling_per_token_logps": SAMPLED}, False,
         [-1.25, -1.0], [-1.5, -1.0]),
        ({"old_per_token_logps": OLD, "sampling_per_token_logps": SAMPLED}, True,
         [-1.25, -1.0], None),
        ({"old_logps": OLD.sum(1), OLD_LOGPS: OLD}, False, [-1.5, -1.0], None),
        ({"old_logps": OLD.sum(1)}, False, None, None),
    ],
)  # fmt: skip
def test_whose_log_probabilities_a_ratio_is_to(
    inputs: dict[str, Any], ours: bool, behaviour: Any, proximal: Any
) -> None:
    watched = plain_trainer(**({"_wapo_objective": 1} if ours else {}))
    found = watched.old_logps(inputs, NOW.clone().requires_grad_())
    assert [None if v is None else v[0].tolist() for v in found] == [behaviour, proximal]
    assert not any(v is not None and v.requires_grad for v in found)


def test_of_a_sum_alone_each_token_has_its_part_of_the_log_ratio() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    logps = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    inputs = {"old_logps": torch.tensor([-5.0, -1.5, 0.0])}
    found = plain_trainer().log_ratio(inputs, logps, None, mask)
    assert found.tolist() == [[1.0] * 3, [0.5] * 3, [0.0] * 3]
    assert plain_trainer().log_ratio({}, NOW, OLD, mask[:1, :2]).tolist() == [[0.5, -1.0]]


@pytest.mark.parametrize(
    ("uses", "corrects", "weighs"), [(1, 1, True), (1, 0, False), (0, 1, False), (0, 0, False)]
)
def test_importance_weights_count_where_the_loss_multiplies_by_them(
    uses: bool, corrects: bool, weighs: bool
) -> None:
    watched = plain_trainer(use_vllm=uses, vllm_importance_sampling_correction=corrects)
    ratio = torch.ones(1)
    assert (watched.weight({"importance_sampling_ratio": ratio}) is ratio) is weighs
    assert watched.weight({}) is None


def test_what_the_trainer_logged_since_last_time_is_averaged() -> None:
    lists: dict[str, list[float]] = {"kl": [1.0, 3.0], "reward": [5.0], "rewards/a/mean": [0.5]}
    watched = plain_trainer(_metrics={"train": lists}, model=SimpleNamespace(training=True))
    assert watched.logged() == {"kl_ref": 2.0, "rewards/a/mean": 0.5}
    assert watched.logged() == {}
    lists["kl"] += [float("nan"), 7.0]
    lists["sampling/x"] = [float("inf")]
    assert watched.logged() == {"kl_ref": 7.0}
    lists["kl"] = [9.0]
    watched.raw.model.training = False
    watched.forget_logged()
    assert watched.logged() == {}, "an evaluation's line empties no list of training"
    watched.raw.model.training = True
    watched.forget_logged()
    assert watched.logged()["kl_ref"] == 9.0


@pytest.mark.parametrize(
    ("step", "accumulation", "per_generation", "iterations", "between"),
    [
        (3, 2, 2, 1, True), (3, 2, 4, 1, False), (4, 2, 4, 1, True), (4, 1, 1, 3, False),
        (6, 1, 1, 3, True), (4, 1, 2, 3, False), (6, 1, 2, 3, True),
    ],
)  # fmt: skip
def test_a_checkpoint_may_come_between_two_generated_batches(
    step: int, accumulation: int, per_generation: int, iterations: int, between: bool
) -> None:
    args = SimpleNamespace(
        gradient_accumulation_steps=accumulation, steps_per_generation=per_generation,
        num_iterations=iterations,
    )  # fmt: skip
    watched = plain_trainer(args=args, state=SimpleNamespace(global_step=step))
    watched.done = 40
    assert watched.between_batches is between
    assert watched.step == 40 + step + 1


@pytest.mark.parametrize(
    ("kind", "raw", "has"),
    [
        ("GRPOTrainer", {"beta": 0.1}, True), ("GRPOTrainer", {"beta": 0.0}, False),
        ("GRPOTrainer", {"beta": None}, False), ("GRPOTrainer", {}, False),
        ("RLOOTrainer", {"beta": 0.1}, False), ("GMPOTrainer", {"beta": 0.1}, True),
        ("GRPOTrainer", {"beta": 0.1, "_wapo_objective": 1}, False),
    ],
)  # fmt: skip
def test_where_a_kl_term_puts_a_gradient_on_clipped_tokens(
    kind: str, raw: dict[str, Any], has: bool
) -> None:
    watched = plain_trainer(**raw)
    watched.kind = kind
    assert watched.has_kl is has


def test_what_keeps_tokens_to_itself_is_named() -> None:
    scorer = {"_get_per_token_logps_and_entropies": lambda: None}
    assert hidden_tensors(SimpleNamespace(**scorer)) is None
    liger = SimpleNamespace(**scorer, use_liger_kernel=True, liger_grpo_loss=1)
    assert "Liger's fused GRPO loss" in str(hidden_tensors(liger))
    assert hidden_tensors(SimpleNamespace(**scorer, use_liger_loss=True)) is None
    assert hidden_tensors(SimpleNamespace(**scorer, liger_grpo_loss=1)) is None
    assert "a trainer without _get_per" in str(hidden_tensors(SimpleNamespace()))
    unsloth = type("UnslothGRPOTrainer", (), {})()
    assert hidden_tensors(unsloth) == "Unsloth's compiled trainer"


def test_the_largest_dropout_is_that_of_modules_or_settings() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Dropout(0.25))
    assert most_dropout(model) == 0.25
    model.config = SimpleNamespace(attention_dropout=0.5, dropout_name="x", hidden=3)
    assert most_dropout(model) == 0.5
    assert most_dropout(torch.nn.Linear(1, 1)) == 0.0


def test_every_way_a_scoring_returns_is_understood() -> None:
    for scored in ((NOW, OLD), [NOW, OLD], {"logps": NOW, "entropies": OLD}):
        assert logps_and_entropies(scored)[0] is NOW
        assert logps_and_entropies(scored)[1] is OLD
    for scored in (NOW, (NOW,), {"logps": NOW}):
        assert logps_and_entropies(scored)[0] is NOW
        assert logps_and_entropies(scored)[1] is None


@pytest.mark.parametrize(
    ("ids", "added", "noted"),
    [
        (torch.tensor([[9, 1, 2], [9, 3, 4]]), True, False),
        (None, False, True),
        (torch.tensor([[9, 1, 2], [9, 3, 5]]), False, True),
    ],
    ids=["the same tokens", "unknown tokens", "other tokens"],
)
def test_a_second_scoring_adds_to_its_own_tokens_alone(
    ids: Tensor | None, added: bool, noted: bool
) -> None:
    notes: list[dict[str, Any]] = []
    watcher = object.__new__(TrlWatcher)
    watcher._trainer = SimpleNamespace(loss_scale=1.0, has_kl=False, beside_logp=["x"])  # type: ignore[assignment]
    watcher._recorder = SimpleNamespace(note=lambda **given: notes.append(given))  # type: ignore[assignment]
    watcher._guard = lambda action, *given: action(*given)  # type: ignore[method-assign, assignment]
    watcher._scores_others = False
    seen, logps = seen_pass(), torch.zeros(2, 3, requires_grad=True)
    inputs = {"completion_ids": torch.tensor([[1, 2], [3, 4]])}
    for _ in range(2):
        watcher._take_second(inputs, seen, (logps, None), ids)
    logps.sum().backward()
    assert seen.tokens is not None
    assert (seen.tokens.coef is not None) is added
    assert notes == [{"not_in_coef": ["x", "scoring of other tokens"]}] * noted
    watcher._take_second(inputs, seen, (logps.detach(), None), ids)
    assert len(notes) == noted
