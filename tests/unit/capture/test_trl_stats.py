"""Statistics and rows of a TRL pass, without a trainer: what is trusted, bounded, probed."""

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wapo_analysis.capture.trl.passes import (
    SeenPass,
    TrlProber,
    check_probing,
    evaluating,
    score_again,
    token_pass,
)
from wapo_analysis.capture.trl.replace import OwnHead, TrlHead, _spread, check_replaceable
from wapo_analysis.capture.trl.stats import StatsReader, _Call, _completion
from wapo_analysis.capture.trl.trainer import ClipRule, TrlTrainer, kind_of
from wapo_analysis.capture.trl.watcher import TrlWatcher
from wapo_analysis.errors import UserError
from wapo_analysis.record.tokens import TokenPass
from wapo_analysis.stats import TokenStats


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


# ---- rows ---------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])
IDS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_keeps_the_trainer_s_ratio_beside_a_more_exact_logp(
    per_token: bool, sampled: bool
) -> None:
    watched = object.__new__(TrlTrainer)
    watched.raw, watched.clip = SimpleNamespace(), ClipRule(0.8, 1.2)
    logps = torch.full((2, 3), -1.0)
    old = logps - torch.tensor([[0.5, 0.0, 9.0], [9.0, -0.5, 0.1]])
    advantages = torch.tensor([1.0, -1.0])
    inputs = {
        "completion_mask": MASK, "completion_ids": IDS, "old_per_token_logps": old,
        "advantages": advantages[:, None].expand(2, 3) if per_token else advantages,
    }  # fmt: skip
    if sampled:
        inputs["sampling_per_token_logps"] = old - 0.25
    exact = torch.full((4,), -1.001)
    numbers = torch.tensor([6, 8]), torch.tensor([3, 4])
    tokens, clipped = token_pass(watched, inputs, logps, {"logp": exact}, numbers, 2)
    assert tokens.rollout.tolist() == [6, 6, 8, 8]
    assert tokens.group.tolist() == [3, 3, 4, 4]
    assert tokens.position.tolist() == [0, 1, 1, 2]
    assert tokens.token_id.tolist() == [0, 1, 4, 5]
    assert tokens.advantage.tolist() == [1.0, 1.0, -1.0, -1.0]
    assert tokens.minibatch == 2
    assert clipped.tolist() == [True, False, True, False]
    behaviour, proximal = tokens.logp_old, tokens.logp_prox
    assert behaviour is not None
    ratios = [0.5, 0.0, -0.5, 0.1]
    loss_old = proximal if sampled else behaviour
    assert loss_old is not None
    assert (tokens.logp - loss_old).tolist() == pytest.approx(ratios, abs=1e-6)
    if sampled:
        apart = (tokens.logp - behaviour).tolist()
        assert apart == pytest.approx([r + 0.25 for r in ratios], abs=1e-6)
    else:
        assert proximal is None


def test_scoring_without_dropout_leaves_every_module_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    model[1].eval()

    def fails() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [module.training for module in model.modules()] == [True, True, False]


def seen(rows: int | None) -> SeenPass:
    return SeenPass(lambda: None, None, None if rows is None else torch.ones(rows, 2).bool())


@pytest.mark.parametrize(
    ("asked", "every", "passes", "taken"),
    [
        (4, 1, [2, 2, 2], 2), (3, 1, [2, 2, 2], 2), (5, 1, [2, 2, 2], 3), (1, 1, [2, 2], 1),
        (9, 1, [2, 2], 2), (9, 0, [2, 2], 0), (9, 1, [2, None, 2], 1), (9, 1, [], 0),
    ],
)  # fmt: skip
def test_whole_micro_batches_are_probed_until_there_are_enough(
    asked: int, every: int, passes: list[Any], taken: int
) -> None:
    recorder: Any = SimpleNamespace(probe_every=every)
    prober = TrlProber(object.__new__(TrlTrainer), recorder, asked)
    given = [seen(rows) for rows in passes]
    assert prober._some(given) == given[:taken]


@pytest.mark.parametrize(
    ("every", "rows", "processes", "dtype", "said"),
    [
        (-1, 4, 1, torch.float32, "probe_every must be 0"), (1, 0, 1, torch.float32, "at least 1"),
        (1, 4, 2, torch.float32, "works with one process"),
        (1, 4, 1, torch.bfloat16, "needs float32 weights, got torch.bfloat16"),
        (0, 1, 2, torch.bfloat16, None), (1, 1, 1, torch.float32, None),
    ],
)  # fmt: skip
def test_what_can_be_probed(
    every: int, rows: int, processes: int, dtype: torch.dtype, said: str | None
) -> None:
    watched = object.__new__(TrlTrainer)
    watched.processes = processes
    frozen = nn.Linear(1, 1, dtype=torch.float16).requires_grad_(False)
    model = nn.ModuleList([nn.Linear(1, 1, dtype=dtype), frozen])
    watched.raw = SimpleNamespace(model=model)
    if said is None:
        check_probing(watched, every, rows)
    else:
        with pytest.raises(UserError, match=said):
            check_probing(watched, every, rows)


# ---- our head in place of TRL's -----------------------------------------------------------------


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


@pytest.mark.parametrize(("loss", "sums"), [(None, (0.0, 0.0)), (torch.tensor(0.25), (0.25, 1.0))])
def test_a_process_without_a_loss_adds_nothing_to_that_of_the_others(
    loss: Any, sums: tuple[float, float]
) -> None:
    watcher = object.__new__(TrlWatcher)
    watcher._loss = loss
    watcher._rollouts = SimpleNamespace(sums=lambda: {"length": 3.0})  # type: ignore[assignment]
    assert watcher._sums_beside_tokens() == {"length": 3.0, "loss": sums[0], "loss n": sums[1]}
    nothing = watcher._no_sums()
    assert set(nothing.values()) == {0.0}
    assert {"length", "loss", "loss n", "rows", "tokens/unknown"} <= nothing.keys()


def test_numbers_of_all_processes_are_added_in_one_call() -> None:
    calls: list[list[float]] = []

    def reduce(vector: Tensor, reduction: str) -> Tensor:
        calls.append(vector.tolist())
        assert (vector.dtype, reduction) == (torch.float64, "sum")
        return vector * 2

    watched = object.__new__(TrlTrainer)
    watched.raw = SimpleNamespace(accelerator=SimpleNamespace(device="cpu", reduce=reduce))
    assert watched.sum_over_processes({"b": 1.5, "a": 3.0}) == {"b": 3.0, "a": 6.0}
    assert calls == [[1.5, 3.0]]


@pytest.mark.parametrize("only_model", [False, True])
def test_a_checkpoint_holds_what_a_resume_of_the_trainer_needs(
    only_model: bool, tmp_path: Path
) -> None:
    done: list[Any] = []
    watched = object.__new__(TrlTrainer)
    watched.raw = SimpleNamespace(
        save_model=lambda place, _internal_call: done.append(("model", place, _internal_call)),
        args=SimpleNamespace(save_only_model=only_model),
        _save_optimizer_and_scheduler=lambda place: done.append("optimizer"),
        _save_rng_state=lambda place: done.append("random"),
        state=SimpleNamespace(save_to_json=lambda file: done.append(Path(file).name)),
    )
    watched.save(tmp_path)
    first, *rest = done
    assert first == ("model", str(tmp_path), True)
    assert rest == [*([] if only_model else ["optimizer", "random"]), "trainer_state.json"]


class Named:
    """Methods that a trainer is known by."""

    def _compute_loss(self) -> None: ...
    def _generate_and_score_completions(self) -> None: ...
    def training_step(self) -> None: ...
    def add_callback(self) -> None: ...


def class_of(name: str, module: str, *bases: type) -> Any:
    return type(name, bases or (Named,), {"__module__": module})


def test_which_trainer_it_is_or_derives_from() -> None:
    base = class_of("_BaseTrainer", "trl.trainer.base")
    grpo = class_of("GRPOTrainer", "trl.trainer.grpo", base)
    rloo = class_of("RLOOTrainer", "trl.trainer.rloo", base)
    assert kind_of(grpo()) == kind_of(class_of("Mine", "mine", grpo)()) == "GRPOTrainer"
    assert kind_of(rloo()) == "RLOOTrainer"
    assert kind_of(class_of("Own", "own")()) == "GRPOTrainer", "of its own, with all methods"
    dpo = class_of("DPOTrainer", "trl.trainer.dpo", base)
    for thing, why in (
        (dpo(), "the loss of DPOTrainer is not known"), (object(), "it has no _compute_loss"),
        (SimpleNamespace(_compute_loss=print), "it has no _generate_and_score_completions"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"cannot attach to {type(thing).__name__}: {why}"):
            kind_of(thing)


def test_a_guard_s_stop_waits_until_the_updates_on_a_batch_are_done() -> None:
    asked: list[str] = []
    for between in (False, True):
        watcher = object.__new__(TrlWatcher)
        watcher._trainer = SimpleNamespace(between_batches=between, save=None)  # type: ignore[assignment]
        watcher._recorder = SimpleNamespace(  # type: ignore[assignment]
            checkpoint=lambda save: asked.append("checkpoint"),
            asked=lambda action: bool(asked.append(action)) or True,
        )
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        watcher.obey(control)
        assert (control.should_save, control.should_training_stop) == (between, between)
        assert asked == ["checkpoint", "stop"] * between


def test_the_learning_rate_is_that_of_the_first_group() -> None:
    watcher = object.__new__(TrlWatcher)
    groups = [{"lr": 0.1}, {"lr": 0.2}]
    raw = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    told: list[int] = []
    watcher._trainer = SimpleNamespace(raw=raw, step=7)  # type: ignore[assignment]
    watcher._prober = SimpleNamespace(before_update=told.append)  # type: ignore[assignment]
    watcher._row = {}
    watcher.before_update()
    assert (watcher._row, told) == ({"lr": 0.1}, [7])


def test_a_pass_without_rows_is_scored_again_all_the_same() -> None:
    """The forward may be a collective of all processes."""
    scored: list[str] = []

    def score(name: str) -> Any:
        scored.append(name)
        return torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.ones(2, 2)

    def tokens() -> TokenPass:
        place = torch.arange(2)
        zeros = torch.zeros(2)
        return TokenPass(place, place, place, place, zeros, zeros)

    mask = torch.eye(2).bool()
    passes = [
        SeenPass(partial(score, name), rows, where)
        for name, rows, where in (
            ("whole", tokens(), mask), ("no rows", None, mask), ("no mask", tokens(), None)
        )
    ]  # fmt: skip
    looked: list[SeenPass] = []
    score_again(nn.Dropout(), passes, lambda seen: nullcontext(looked.append(seen)))
    assert scored == ["whole", "no rows", "no mask"]
    assert looked == passes
    first, last = passes[0].tokens, passes[2].tokens
    assert first is not None
    assert last is not None
    assert first.logp_after is not None
    assert first.entropy_after is not None
    assert (first.logp_after.tolist(), first.entropy_after.tolist()) == ([-1.0, -4.0], [1.0, 1.0])
    assert last.logp_after is None
