"""Rows of a TRL pass, its second scoring and its probe, without a trainer."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.capture.test_trl_trainer import seen_pass
from tests.unit.capture.test_trl_watcher import bare
from wapo_analysis.capture.trl import passes
from wapo_analysis.capture.trl.passes import (
    SeenPass,
    TrlProber,
    check_probing,
    evaluating,
    score_again,
    token_pass,
)
from wapo_analysis.capture.trl.trainer import TrlTrainer
from wapo_analysis.capture.trl.watcher import TrlWatcher
from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import TokenPass

MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


IDS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_keeps_the_trainer_s_ratio_beside_a_more_exact_logp(
    per_token: bool, sampled: bool
) -> None:
    watched = object.__new__(TrlTrainer)
    watched.raw = SimpleNamespace(epsilon_low=0.2, epsilon_high=0.2, args=SimpleNamespace())
    watched.kind = "GRPOTrainer"
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
    watched.raw.epsilon_high = 0.7  # as a callback may do in mid-training
    clipped = token_pass(watched, inputs, logps, {"logp": exact}, numbers, 2)[1]
    assert clipped.tolist() == [False, False, True, False]
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


@pytest.mark.parametrize("scored", [(None, torch.ones(1, 2)), (torch.ones(1, 2), None)])
def test_a_scoring_without_entropies_cannot_be_probed(scored: Any) -> None:
    trainer: Any = SimpleNamespace(precision=nullcontext)
    prober = TrlProber(trainer, SimpleNamespace(probe_every=1), 1)  # type: ignore[arg-type]
    seen = SeenPass(lambda: scored, None, torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match="the trainer's scoring gives no entropies"):
        prober._score(seen, grad=False)


class Probed:
    """A prober whose updates are shown instead of being measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **raw: Any) -> None:
        self.updates: list[tuple[Any, list[Any]]] = []
        self.rows: list[Any] = []
        model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)])
        accelerator = SimpleNamespace(optimizer_step_was_skipped=raw.pop("skipped", False))
        args = SimpleNamespace(max_grad_norm=raw.pop("max_grad_norm", 1.0))
        self.trainer: Any = SimpleNamespace(
            raw=SimpleNamespace(model=model, accelerator=accelerator, args=args),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1), temperature=0.7,
        )  # fmt: skip
        self.recorder: Any = SimpleNamespace(
            wants_probe=lambda step: step % 2 == 1, probe_every=2, add_probe=self.rows.append
        )
        self.prober = TrlProber(self.trainer, self.recorder, 2)
        monkeypatch.setattr(passes, "take_apart", self.take_apart)

    def take_apart(self, update: Any, scored: Any) -> str | None:
        self.updates.append((update, list(scored)))
        return "rows"


@pytest.mark.parametrize(
    ("norm", "limit", "clip"),
    [(4.0, 1.0, 0.25), (4.0, 2.0, 0.5), (0.5, 1.0, 1.0), (4.0, None, 1.0), (4.0, 0.0, 1.0),
     (None, 1.0, 1.0)],
)  # fmt: skip
def test_a_probed_update_is_scaled_as_its_gradient_was_clipped(
    norm: float | None, limit: float | None, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = Probed(monkeypatch, max_grad_norm=limit)
    probed.prober.before_update(3)
    probed.prober.after_update(3, [seen(2)], norm)
    ((update, _),) = probed.updates
    assert update.clip == pytest.approx(clip, rel=1e-5)
    assert (update.step, update.minibatch, update.temperature) == (3, 0, 0.7)
    assert len(update.parameters) == 2, "the frozen layer is no part of it"
    assert probed.rows == ["rows"]


def test_what_is_scored_is_of_the_update_and_of_the_step_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probed = Probed(monkeypatch)
    passes_of = {step: [seen(2), seen(2)] for step in (1, 2, 3)}
    passes_of[3][0].tokens = object()  # type: ignore[assignment]
    for step, given in passes_of.items():
        probed.prober.before_update(step)
        probed.prober.after_update(step, given, 1.0)
    (_, first), (update, second) = probed.updates
    assert len(first) == 1, "nothing came before"
    assert [one.score.args[0] for one in second] == [passes_of[3][0], passes_of[2][0]]
    assert [one.tokens for one in second] == [passes_of[3][0].tokens, None]
    assert len(update.passes) == 1, "a pass without rows has no part"


def test_a_skipped_update_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = Probed(monkeypatch, skipped=True)
    probed.prober.before_update(3)
    probed.prober.after_update(3, [seen(2)], 1.0)
    assert probed.updates == []


def test_a_failed_probe_is_told_once_and_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probed = Probed(monkeypatch)

    def fails(update: Any, scored: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(passes, "take_apart", fails)
    for step in (1, 3, 5):
        probed.prober.before_update(step)
        assert (probed.prober._before is not None) is (step == 1)
        probed.prober.after_update(step, [seen(2)], 1.0)
    assert caplog.messages == ["probing stopped (RuntimeError: no room); training goes on"]


def test_a_pass_without_a_mask_cannot_be_scored() -> None:
    prober = TrlProber(SimpleNamespace(precision=nullcontext), SimpleNamespace(probe_every=1), 1)  # type: ignore[arg-type]
    whole = SeenPass(lambda: (torch.ones(1, 2), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="the trainer's scoring gives no entropies"):
        prober._score(whole, grad=False)


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


@pytest.mark.parametrize(
    ("inputs", "current", "kept"), [({}, True, 1), (None, True, 0), ({}, False, 0)]
)
def test_a_mask_of_the_loss_is_kept_with_its_pass(inputs: Any, current: bool, kept: int) -> None:
    seen = seen_pass()
    mask = torch.ones(2, 3, requires_grad=True)
    watcher = bare(inputs=inputs, current=seen if current else None)
    assert watcher._keep_mask(lambda: mask) is mask
    assert len(seen.masks) == kept
    assert not any(one.requires_grad for one in seen.masks)


@pytest.mark.parametrize("scored", [(None, None), (torch.zeros(2, 3), None)])
def test_a_scoring_without_a_graph_has_no_rows(scored: Any) -> None:
    """Nor is one that returns no log-probabilities; nothing is asked of the recorder."""
    watcher, whole = bare(saw_tokens=None, stats=None, recorder=None), SeenPass(lambda: None)
    watcher._take_pass({}, scored, whole)
    assert (whole.tokens, watcher._saw_tokens) == (None, None)
    seen = seen_pass()
    watcher._take_second({}, seen, scored, None)
    assert seen.tokens is not None
    assert seen.tokens.coef is None
