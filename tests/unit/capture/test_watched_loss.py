"""Watched losses: rows, coef and weights of every trainer's call, and what holds for all."""

import pickle
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wapo_analysis
from tests.support.trainer_batch import (
    ADVANTAGES,
    IDS,
    LENGTHS,
    MASK,
    OLD,
    PROMPT,
    SAMPLER,
    SOLID,
    WIDTH,
    Policy,
    responses,
)
from tests.support.trainer_losses import TRAINERS, train
from wapo_analysis import open_run
from wapo_analysis.capture import loss as loss_module
from wapo_analysis.capture.seams import SEAMS
from wapo_analysis.errors import UserError

watched_loss = partial(wapo_analysis.watched_loss, token_every=1)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_watched_loss_trains_the_same_and_every_token_has_its_row(
    name: str, tmp_path: Path
) -> None:
    trainer = TRAINERS[name]
    alone, coef = train(trainer, trainer.loss)
    with watched_loss(trainer.loss, run=tmp_path / "r", names=trainer.names) as watched:
        seen, _ = train(trainer, watched)
        assert watched.failure is None
    assert torch.equal(alone.table.weight, seen.table.weight)
    run = open_run(tmp_path / "r")
    assert run.manifest["source"] == trainer.names
    assert run.manifest["statistics_from"] == "logits"
    assert run.steps.step.tolist() == [1, 2]
    assert run.steps.lr.tolist() == [0.5, 0.5]
    rows = run.tokens()
    np.testing.assert_allclose(rows.coef, coef, rtol=4e-5, atol=1e-8)
    chosen = MASK.clone()
    if trainer.names == "nemo-rl":
        chosen[2] = False  # its sample mask
    assert len(rows) == 2 * int(chosen.sum())
    first = rows[rows.step == 1]
    assert first.token_id.tolist() == IDS[:, PROMPT:][chosen].tolist()
    full = Policy().table(IDS).log_softmax(-1)[:, PROMPT - 1 : -1][chosen].detach()
    np.testing.assert_allclose(first.entropy, -(full.exp() * full).sum(-1), rtol=4e-5)
    own = full.gather(-1, IDS[:, PROMPT:][chosen][:, None])[:, 0]
    rest = full.exp().square().sum(-1) - own.exp().square()
    np.testing.assert_allclose(first.collision_rest, rest, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first.advantage, ADVANTAGES[chosen], rtol=4e-5)
    np.testing.assert_allclose(first.ratio, (own - OLD[chosen]).exp(), rtol=2e-4)
    given = SAMPLER if trainer.sampler else OLD
    np.testing.assert_allclose(first.logp_old, given[chosen], rtol=4e-5)
    assert first.rollout.tolist() == chosen.nonzero()[:, 0].tolist()
    assert set(rows.cls) <= {"pos_peak", "pos_valley", "neg_peak", "neg_valley"}
    top = run.topk([1])
    logp, ids = full.topk(8)
    assert top.token_id.tolist() == ids.flatten().tolist()
    np.testing.assert_allclose(top.logp, logp.flatten(), rtol=4e-5, atol=1e-6)
    totals = run.classes.groupby(["step", "cls"], observed=True)[["tokens", "grad_mass"]].sum()
    sums = rows.assign(tokens=1, grad_mass=rows.grad_norm).groupby(["step", "cls"], observed=True)
    for key, total in sums[["tokens", "grad_mass"]].sum().iterrows():
        np.testing.assert_allclose(totals.loc[key], total, rtol=1e-4)


@pytest.mark.parametrize("given", ["attention_mask", "logits_to_keep", "both", "eos is padding"])
def test_padding_is_not_read_and_logits_may_be_of_the_last_positions(
    given: str, tmp_path: Path
) -> None:
    whole = SOLID.clone()
    if given == "eos is padding":  # a mask that hides the last token, which the loss has
        whole[range(4), PROMPT + LENGTHS - 1] = False
    arguments: dict[str, Any] = {"attention_mask": whole.long()} if given[:1] != "l" else {}
    if given in ("logits_to_keep", "both"):
        arguments["logits_to_keep"] = WIDTH + 1

    def train_one(policy: Policy, loss: Callable[..., Any]) -> None:
        logits = policy(input_ids=IDS, **arguments).logits[:, -WIDTH - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, IDS[:, PROMPT:, None])[..., 0]
        loss(logp, ADVANTAGES, MASK).backward()
        torch.optim.SGD(policy.parameters(), lr=0.5).step()

    with watched_loss(plain_loss, run=tmp_path / "r", names=PLAIN) as watched:
        train_one(Policy(), watched)
        assert watched.failure is None
    full = Policy().table(IDS).log_softmax(-1)[:, PROMPT - 1 : -1][MASK].detach()
    rows = open_run(tmp_path / "r").tokens()
    np.testing.assert_allclose(rows.entropy, -(full.exp() * full).sum(-1), rtol=4e-5)
    assert rows.token_id.tolist() == IDS[:, PROMPT:][MASK].tolist()


def test_every_trainer_of_the_table_is_called_here() -> None:
    assert {trainer.names for trainer in TRAINERS.values()} == set(SEAMS)


# ---- what holds for all of them -----------------------------------------------------------------

PLAIN = {"logp": "logp", "advantages": "adv", "mask": "mask"}


def plain_loss(logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    return -(logp * adv * mask).sum()


def step(policy: Policy, loss: Callable[..., Any], *optimizers: Any, part: Any = slice(4)) -> None:
    loss(responses(policy)[part], ADVANTAGES[part, :1], MASK[part]).backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"head": False}, "no head is read"),
        ({"temperature": 0.5}, "log-probabilities at temperature 0.5, "),
        ({"head": nn.Linear(1, 1)}, "no model has returned logits"),
    ],
    ids=["no head", "temperature", "another model"],
)
def test_without_sum_p_squared_the_class_is_unknown_and_that_is_said_once(
    given: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with watched_loss(plain_loss, run=tmp_path / "r", names=PLAIN, **given) as watched:
        for _ in range(2):
            step(policy, watched, optimizer)
    run = open_run(tmp_path / "r")
    assert set(run.tokens().cls) == {"unknown"}
    assert run.tokens().coef.notna().all()
    assert len(run.tokens()) == 2 * int(MASK.sum())
    assert [reason in line for line in caplog.messages] == [True]
    assert reason in run.manifest["statistics_from"]


def test_the_optimizer_ends_a_step_and_no_other_one(tmp_path: Path) -> None:
    policy = Policy()
    critic = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    own = torch.optim.Adam(policy.parameters(), lr=0.1)
    watched = watched_loss(plain_loss, run=tmp_path / "r", names=PLAIN, optimizer=own)
    critic.step()
    for part in (slice(0, 2), slice(2, 4)):  # two micro-batches of an update
        step(policy, watched, critic, part=part)
    with torch.no_grad():
        watched(responses(policy), ADVANTAGES, MASK)
    watched.tell(reward=[1.0, 0.0, 1.0, 0.0], grad_norm=2.0)
    own.step()
    own.step()
    step(policy, watched, own)
    watched.close()
    step(policy, watched, own)
    assert watched.failure is None
    assert watched._watch.recorder.returned() is None, "nothing is kept once closed"
    run = open_run(tmp_path / "r")
    assert run.steps.step.tolist() == [1, 2]
    assert run.steps.grad_norm.tolist()[0] == 2.0
    assert run.steps.reward.tolist()[0] == 0.5
    rows = run.tokens([1])
    assert rows.rollout.tolist() == MASK.nonzero()[:, 0].tolist(), "counted on over micro-batches"
    assert sorted(set(rows.minibatch)) == [0, 1]
    assert run.manifest["status"] == "finished"


def test_any_optimizer_ends_a_step_in_which_a_loss_was_watched(tmp_path: Path) -> None:
    policy = Policy()
    critic = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    own = torch.optim.SGD(policy.parameters(), lr=0.1)
    given = {"names": PLAIN, "token_every": 2, "texts": lambda ids: [f"<{i}>" for i in ids]}
    with watched_loss(plain_loss, run=tmp_path / "r", **given) as watched:
        for _ in range(3):
            step(policy, watched, own, critic)
    run = open_run(tmp_path / "r")
    assert run.steps.lr.tolist() == [0.1] * 3
    assert run.steps.updates.tolist() == [1] * 3
    assert run.token_steps() == [1, 3]
    assert run.vocab[int(IDS[0, PROMPT])] == f"<{IDS[0, PROMPT]}>"


def test_an_optimizer_that_is_not_torchs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loss_module, "MOST_CALLS", 2)
    policy = Policy()
    with watched_loss(plain_loss, run=tmp_path / "told", names=PLAIN) as watched:
        for told in (False, False, True, True):
            step(policy, watched)
            assert bool(watched.failure) is told
    assert caplog.messages == [
        "watching the loss stopped (UserError: no torch optimizer has stepped in 2 calls of the "
        "loss: call end_step() of the watched loss after each update); training goes on"
    ]
    assert open_run(tmp_path / "told").manifest["status"] == "recording_failed"
    with watched_loss(plain_loss, run=tmp_path / "by hand", names=PLAIN) as watched:
        for _ in range(4):
            step(policy, watched)
            watched.end_step(lr=0.3)
    assert open_run(tmp_path / "by hand").steps.lr.tolist() == [0.3] * 4


def get_log_probs_and_entropy() -> None:
    """slime's scorer is a name of the loss's own module."""


def no_scorer(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    return logits.mean(), {}


def broken_names(policy: Policy, loss: Callable[..., Any]) -> Tensor:
    return loss(responses(policy), ADVANTAGES, MASK)  # type: ignore[no-any-return]


FAULTS: dict[str, tuple[Callable[..., Any], Any, Callable[..., Any], str]] = {
    "an argument that is not there": (
        plain_loss, PLAIN | {"advantages": "adv.scores"}, broken_names,
        "the loss was called without advantages, which should be at 'adv.scores'; its arguments "
        "were logp, adv, mask",
    ),
    "a scorer that is not called": (
        no_scorer, "slime", lambda p, f: f(None, {}, p(input_ids=IDS).logits, None)[0],
        "the loss did not call get_log_probs_and_entropy, so its tokens are not seen",
    ),
    "a scorer that is nowhere": (
        partial(no_scorer), "slime", lambda p, f: f(None, {}, p(input_ids=IDS).logits, None)[0],
        "watching the loss stopped",
    ),
    "a shape": (
        lambda logp, adv, mask: plain_loss(logp, adv, mask[:, :5]), PLAIN,
        lambda p, f: f(responses(p), ADVANTAGES, torch.ones(4, 7)),
        "mask must have the shape of logp, (4, 5), got (4, 7)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_watching_is_one_line_and_training_goes_on(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loss, names, call, message = FAULTS[fault]
    grads = []
    with watched_loss(loss, run=tmp_path / "r", names=names, head=False) as watched:
        for function in (loss, watched, watched):
            policy = Policy()
            call(policy, function).backward()
            grads.append(policy.table.weight.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert sum(message in line for line in caplog.messages) == 1
    assert message.removeprefix("watching the loss stopped") in str(watched.failure)
    assert watched.failure


def test_a_folder_that_holds_a_run_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = TRAINERS["openrlhf"]
    for _ in range(2):
        with watched_loss(trainer.loss, run=tmp_path / "r", names="openrlhf") as watched:
            seen, _ = train(trainer, watched)
    alone, _ = train(trainer, trainer.loss)
    assert torch.equal(alone.table.weight, seen.table.weight)
    assert ["already holds a run" in line for line in caplog.messages] == [True]
    assert len(open_run(tmp_path / "r").steps) == 2


def test_a_folder_is_where_it_was_when_the_loss_was_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = Policy()
    with watched_loss(plain_loss, run="r", names=PLAIN, head=False) as watched:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        step(policy, watched, torch.optim.SGD(policy.parameters(), lr=0.1))
    assert len(open_run(tmp_path / "r").steps) == 1


def test_a_loss_that_was_sent_to_a_worker_goes_on_with_the_run(tmp_path: Path) -> None:
    trainer = TRAINERS["nemo-rl"]
    with watched_loss(trainer.loss, run=tmp_path / "r", names="nemo-rl") as watched:
        policy = Policy()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        for _ in range(3):  # sent with every batch
            arrived = pickle.loads(pickle.dumps(watched))
            assert arrived.input_type == "logprob"
            trainer.call(policy, arrived)[0].backward()
            optimizer.step()
    assert open_run(tmp_path / "r").steps.step.tolist() == [1, 2, 3]


def test_a_twin_process_records_nothing(tmp_path: Path) -> None:
    policy = Policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    names = PLAIN
    with watched_loss(plain_loss, run=tmp_path / "r", names=names, rank=lambda: None) as watched:
        step(policy, watched, optimizer)
        assert watched.failure is None
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": "slim"}, "did you mean 'slime'"),
        ({"names": {"logp": "p"}}, "names must say where logp and advantages are"),
        ({"names": PLAIN | {"advantage": "a"}}, "did you mean 'advantages'"),
        ({"names": PLAIN, "token_fractoin": 2}, "did you mean 'token_fraction'"),
        ({"names": PLAIN, "loss": max}, "the arguments of <built-in function max> have no names"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_closest(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        watched_loss(**{"loss": plain_loss, "run": tmp_path / "r", **given})


@pytest.mark.parametrize(
    ("resume_after", "step", "topk"), [(None, 1, 5), (9, 10, 0), (10, 11, 5), (11, 12, 0)]
)
def test_the_first_step_reads_top_tokens_if_its_rows_are_written(
    resume_after: int | None, step: int, topk: int, tmp_path: Path
) -> None:
    """Rows are written of every tenth step unless said."""
    settings = {"resume_after": resume_after, "topk": 5}
    watched = wapo_analysis.watched_loss(plain_loss, run=tmp_path / "r", names=PLAIN, **settings)
    try:
        assert watched._watch._step == step
        assert watched._watch._head is not None
        assert watched._watch._head.topk == topk
    finally:
        watched.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "set WAPO_RUN to the run folder"),
        ({"WAPO_RUN": "r", "WAPO_TOKEN_EVERY": "x"}, "must be numbers"),
        ({"WAPO_RUN": "r", "WAPO_TOKEN_FRACTION": "x"}, "must be numbers"),
        ({"WAPO_RUN": "r"}, ("r", {}, {"token_every": 10, "token_fraction": 1.0})),
        (
            {"WAPO_RUN": "r", "WAPO_TOKEN_EVERY": "3", "WAPO_TOKEN_FRACTION": "0.5",
             "WAPO_LABEL": "mine"},
            ("r", {"label": "mine"}, {"token_every": 3, "token_fraction": 0.5}),
        ),
    ],
)  # fmt: skip
def test_verl_is_watched_by_the_settings_of_the_environment(
    given: dict[str, str], said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module that verl's processes import is one line there; what it calls is looked at."""
    calls = []

    def watch_verl(path: str, described: dict[str, str], **settings: Any) -> SimpleNamespace:
        calls.append((path, described, settings))
        return SimpleNamespace(close=lambda status: None)

    monkeypatch.setattr("wapo_analysis.capture.verl.watch_verl", watch_verl)
    for name in ("WAPO_RUN", "WAPO_TOKEN_EVERY", "WAPO_TOKEN_FRACTION", "WAPO_LABEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "wapo_analysis.capture.verl_plugin", raising=False)
    if isinstance(said, str):
        with pytest.raises(UserError, match=said):
            import_module("wapo_analysis.capture.verl_plugin")
    else:
        import_module("wapo_analysis.capture.verl_plugin")
        assert calls == [said]
    sys.modules.pop("wapo_analysis.capture.verl_plugin", None)
