"""Odd but ordinary loops: what they show is exact, and nothing of ours can stop them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wapo_analysis import open_run, watched_loss
from wapo_analysis.capture.loss import WatchedLoss

VOCAB, PROMPT, WIDTH = 13, 2, 6
GENERATOR = torch.Generator().manual_seed(5)
IDS = torch.randint(VOCAB, (6, PROMPT + WIDTH), generator=GENERATOR)
MASK = torch.arange(WIDTH) < torch.tensor([6, 2, 5, 1, 4, 3])[:, None]
ADVANTAGES = torch.randn(6, 1, generator=GENERATOR)
NAMES = {"logp": "logp", "advantages": "advantages", "mask": "mask"}
Loss = Callable[..., Tensor]


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))


class Wrapped(nn.Module):
    """As DataParallel, DDP and PEFT wrap a model: it calls the module inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def plain(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(logp * advantages * mask).sum()


def logps(model: nn.Module, rows: slice) -> Tensor:
    logits = model(input_ids=IDS[rows]).logits[:, PROMPT - 1 : -1]
    picked: Tensor = logits.log_softmax(-1).gather(-1, IDS[rows, PROMPT:, None])[..., 0]
    return picked


def backward(model: nn.Module, loss: Loss, rows: slice, scale: float = 1.0) -> None:
    (loss(logps(model, rows), ADVANTAGES[rows], MASK[rows]) * scale).backward()


def uneven_micro_batches(model: nn.Module, loss: Loss) -> None:
    """Gradient accumulation over micro-batches of 3, 2 and 1 rollouts, the last step cut short."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for pieces in ([slice(0, 3), slice(3, 5), slice(5, 6)], [slice(0, 3), slice(3, 6)]):
        optimizer.zero_grad()
        for rows in pieces:
            backward(model, loss, rows, scale=1 / len(pieces))
        optimizer.step()


def two_optimizers(model: nn.Module, loss: Loss) -> None:
    """A critic's optimizer steps between the policy's loss and its backward pass."""
    critic = nn.Linear(1, 1)
    own = torch.optim.SGD(model.parameters(), lr=0.3)
    other = torch.optim.SGD(critic.parameters(), lr=0.7)
    for _ in range(2):
        value = loss(logps(model, slice(0, 6)), ADVANTAGES, MASK)
        critic(torch.ones(1)).backward()
        other.step()
        value.backward()
        own.step()
        own.zero_grad()


def logs_its_loss(model: nn.Module, loss: Loss) -> None:
    """The loss is called for logging: without gradients, and with a graph nobody goes back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(2):
        with torch.no_grad():
            loss(logps(model, slice(0, 6)), ADVANTAGES, MASK)
        with torch.inference_mode():
            loss(logps(model, slice(0, 6)), ADVANTAGES, MASK)
        loss(logps(model, slice(0, 6)), ADVANTAGES, MASK).item()
        backward(model, loss, slice(0, 6))
        optimizer.step()
        optimizer.zero_grad()


def wrapped(model: nn.Module, loss: Loss) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    outer = Wrapped(Wrapped(model))
    for _ in range(2):
        backward(outer, loss, slice(0, 6))
        optimizer.step()
        optimizer.zero_grad()


def raises_and_goes_on(model: nn.Module, loss: Loss) -> None:
    """A batch that fails after its loss is skipped, as one without memory is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(3):
        optimizer.zero_grad()
        try:
            value = loss(logps(model, slice(0, 6)), ADVANTAGES, MASK)
            if step == 1:
                raise MemoryError
            value.backward()
        except MemoryError:
            continue
        optimizer.step()


def compiled_step(model: nn.Module, loss: Loss) -> None:
    """Forward pass and loss stand in one compiled function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    @torch.compile(backend="eager")
    def forward(shift: Tensor) -> Tensor:
        return loss(logps(model, slice(0, 6)) + shift, ADVANTAGES, MASK)

    for _ in range(2):
        forward(torch.zeros(1)).backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def autograd(watched: Loss | None) -> Iterator[tuple[Loss, list[Tensor]]]:
    """The loss, and what autograd puts on the tokens of the passes that came back."""
    coefs: list[Tensor] = []

    def shown(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        if logp.requires_grad and torch.is_grad_enabled():
            logp.register_hook(lambda gradient: coefs.append(-gradient[mask]))
        return (watched or plain)(logp=logp, advantages=advantages, mask=mask)

    yield shown, coefs


LOOPS = [uneven_micro_batches, two_optimizers, logs_its_loss, wrapped, raises_and_goes_on]
LOOPS.append(compiled_step)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, at a break
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_rows_coef_and_weights_of_an_odd_loop(loop: Callable[..., None], tmp_path: Path) -> None:
    alone, seen = Policy(), Policy()
    loop(alone, plain)
    with watched_loss(plain, run=tmp_path / "r", names=NAMES, token_every=1) as watched:
        with autograd(watched) as (loss, coefs):
            loop(seen, loss)
        assert watched.failure is None
    assert torch.equal(alone.table.weight, seen.table.weight)
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == [1, 2]
    assert run.steps.lr.tolist() == [0.3, 0.3]
    rows = run.tokens()
    assert len(rows) == 2 * int(MASK.sum())
    np.testing.assert_allclose(rows.coef, torch.cat(coefs), rtol=4e-5, atol=1e-8)
    for _, step in rows.groupby("step"):
        assert step.groupby("rollout").size().tolist() == MASK.sum(1).tolist()
    classes = set(rows.cls)
    assert classes == {"unknown"} if loop is compiled_step else not classes & {"unknown", "none"}


def test_a_loss_of_the_same_tensor_twice_has_one_row_a_token(tmp_path: Path) -> None:
    """It is called once more for the log, or the loss is a sum of two terms; parts are parts."""
    model = Policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    better = MASK & (ADVANTAGES > 0)
    with watched_loss(plain, run=tmp_path / "r", names=NAMES, token_every=1) as watched:
        for masks in ((MASK, MASK), (better, MASK & ~better)):
            logp = logps(model, slice(0, 6))
            sum(watched(logp, ADVANTAGES, mask) for mask in masks).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert watched.failure is None
    rows = open_run(tmp_path / "r").tokens()
    for step, times in ((1, 2), (2, 1)):
        here = rows[rows.step == step].sort_values(["rollout", "position"])
        assert len(here) == int(MASK.sum())
        expected = sorted((times * ADVANTAGES).expand_as(MASK)[MASK].tolist())
        np.testing.assert_allclose(sorted(here.coef), expected, rtol=4e-5)


class Bare(nn.Module):
    """Returns a tuple, as models of one's own often do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.table(ids), None


@pytest.mark.parametrize("named", [True, False])
def test_logits_in_a_tuple_are_read_of_the_model_that_is_named(named: bool, tmp_path: Path) -> None:
    model = Bare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    head = {"head": model} if named else {}
    with watched_loss(plain, run=tmp_path / "r", names=NAMES, token_every=1, **head) as watched:
        logits = model(IDS)[0][:, PROMPT - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, IDS[:, PROMPT:, None])[..., 0]
        watched(logp, ADVANTAGES, MASK).backward()
        optimizer.step()
        assert watched.failure is None
    rows = open_run(tmp_path / "r").tokens()
    assert ("unknown" in set(rows.cls)) is not named
    assert (rows.token_id >= 0).all() == named


def test_rewards_belong_to_the_rollouts_that_were_trained_on(tmp_path: Path) -> None:
    model = Policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    rewards = [0.0, 1.0, 0.5, 0.0, 1.0, 0.25]
    with watched_loss(plain, run=tmp_path / "r", names=NAMES, token_every=1) as watched:
        for rows in (slice(0, 3), slice(3, 6)):
            watched(logps(model, rows), ADVANTAGES[rows], MASK[rows])  # for the log
            backward(model, watched, rows)
        watched.tell(reward=rewards)
        optimizer.step()
        assert watched.failure is None
    run = open_run(tmp_path / "r")
    assert run.rollouts.reward.tolist() == rewards
    assert run.rollouts.rollout.tolist() == sorted(set(run.tokens().rollout))
    top = run.topk()
    assert set(top.rollout) <= set(run.tokens().rollout)


def test_rewards_may_be_of_rollouts_that_no_gradient_reached_too(tmp_path: Path) -> None:
    """A micro-batch whose advantages are all 0 is often spared its backward pass."""
    model = Policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    rewards = [0.0, 1.0, 1.0, 1.0, 1.0, 0.25]
    with watched_loss(plain, run=tmp_path / "r", names=NAMES, token_every=1) as watched:
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
            value = watched(logps(model, rows), ADVANTAGES[rows], MASK[rows])
            if rows.start != 2:
                value.backward()
        watched.tell(reward=rewards)
        optimizer.step()
        assert watched.failure is None
    run = open_run(tmp_path / "r")
    assert run.rollouts.reward.tolist() == [rewards[n] for n in (0, 1, 4, 5)]
    assert run.rollouts.rollout.tolist() == sorted(set(run.tokens().rollout)) == [0, 1, 4, 5]
    assert run.steps.reward.tolist() == [np.mean(rewards)]


def test_an_update_that_a_grad_scaler_skips_leaves_no_row(tmp_path: Path) -> None:
    model = Policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    names = {**NAMES, "loss_scale": lambda call: scaler.get_scale()}
    with watched_loss(plain, run=tmp_path / "r", names=names, token_every=1) as watched:
        with autograd(watched) as (loss, coefs):
            for too_large in (1e10, 1e10, 1, 1):
                scale = scaler.get_scale()
                value = loss(logps(model, slice(0, 6)), ADVANTAGES, MASK)
                scaler.scale(value * too_large).backward()
                coefs[-1] /= scale
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert watched.failure is None
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == [1, 2]
    assert len(run.tokens()) == 2 * int(MASK.sum())
    np.testing.assert_allclose(run.tokens().coef, torch.cat(coefs[2:]), rtol=4e-5, atol=1e-8)


def test_a_scale_that_differs_between_micro_batches_loses_none(tmp_path: Path) -> None:
    """As of a loss divided by the tokens of its micro-batch: no update was skipped."""
    model = Policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scale = [1.0]
    names = {**NAMES, "loss_scale": lambda call: scale[0]}
    with watched_loss(plain, run=tmp_path / "r", names=names, token_every=1) as watched:
        with autograd(watched) as (loss, coefs):
            for factor in (3.0, 2.0, 0.7):
                scale[0] = factor
                value = loss(logps(model, slice(0, 6)), ADVANTAGES, MASK)
                (value * factor).backward()
                coefs[-1] /= factor
            optimizer.step()
        assert watched.failure is None
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == [1]
    assert len(run.tokens()) == 3 * int(MASK.sum())
    np.testing.assert_allclose(run.tokens().coef, torch.cat(coefs), rtol=4e-5, atol=1e-8)


def test_a_loss_that_raises_raises_the_same_and_is_watched_on(tmp_path: Path) -> None:
    def fails(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        if advantages.isnan().any():
            raise ZeroDivisionError("the user's own")
        return plain(logp, advantages, mask)

    model = Policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    watched: WatchedLoss = watched_loss(fails, run=tmp_path / "r", names=NAMES, token_every=1)
    with watched:
        with pytest.raises(ZeroDivisionError, match="the user's own"):
            watched(logps(model, slice(0, 6)), ADVANTAGES * torch.nan, MASK)
        backward(model, watched, slice(0, 6))
        optimizer.step()
        assert watched.failure is None
    assert len(open_run(tmp_path / "r").tokens()) == int(MASK.sum())


def test_tensors_of_no_shape_at_all_stop_watching_and_nothing_else(tmp_path: Path) -> None:
    model = Policy()
    with watched_loss(plain, run=tmp_path / "r", names=NAMES) as watched:
        odd = partial(watched, advantages=ADVANTAGES[:, 0].repeat(2)[None], mask=MASK.float())
        with pytest.raises(RuntimeError):  # torch's own: the loss cannot do it either
            odd(logps(model, slice(0, 6)))
        backward(model, watched, slice(0, 6))
    assert watched.failure is not None


def test_completions_of_a_list_may_have_no_gradient(tmp_path: Path) -> None:
    """Of three texts one was scored without a graph; the others have rows."""

    def loss(logps: list[Tensor], advs: list[Tensor]) -> Tensor:
        return -sum((logp * adv).sum() for logp, adv in zip(logps, advs, strict=True))

    table = torch.zeros(3, 2, requires_grad=True)
    optimizer = torch.optim.SGD([table], lr=0.5)
    names = {"logp": "logps", "advantages": "advs"}
    with watched_loss(loss, run=tmp_path / "r", names=names, head=False) as watched:
        scored = [table[0] - 1, (table[1] - 1).detach(), table[2] - 1]
        watched(scored, [torch.full((2,), value) for value in (1.0, 2.0, -3.0)]).backward()
        optimizer.step()
        assert watched.failure is None
    rows = open_run(tmp_path / "r").tokens()
    assert rows.coef.tolist() == [1.0, 1.0, -3.0, -3.0]


def scores(table: Tensor) -> Tensor:
    """The scorer of `scoring_loss`, a name of this module."""
    return table - 1


def scoring_loss(table: Tensor, advs: Tensor) -> Tensor:
    with torch.no_grad():
        old = scores(table * 5)
    first, second = scores(table), scores(table * 3)
    return -((first - old + 0 * second) * advs).sum()


def test_of_several_scorings_the_first_with_a_graph_is_the_loss_s(tmp_path: Path) -> None:
    table = torch.full((2, 2), -0.5, requires_grad=True)
    optimizer = torch.optim.SGD([table], lr=0.5)
    names = {"scorer": "scores", "logp": "scored", "advantages": "advs"}
    with watched_loss(scoring_loss, run=tmp_path / "r", names=names, head=False) as watched:
        watched(table, torch.tensor([[1.0], [-2.0]])).backward()
        optimizer.step()
        assert watched.failure is None
    rows = open_run(tmp_path / "r").tokens()
    assert rows.logp.tolist() == [-1.5] * 4
    assert rows.coef.tolist() == [1.0, 1.0, -2.0, -2.0]
