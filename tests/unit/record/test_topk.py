"""The most probable tokens of a few rollouts: which rows, which numbers, what it costs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wapo_analysis import TrainConfig
from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.record.topk import TOPK_ROLLOUTS, TopReader, chosen_rows, hashed
from wapo_analysis.store import Run, open_run
from wapo_analysis.train.loop import train

B, T, V = 12, 5, 40
KEYS = ["step", "minibatch", "rank", "rollout", "position"]
TINY = TrainConfig(
    steps=3, prompts_per_step=3, rollouts_per_prompt=4, minibatches=2, max_new_tokens=8,
    rescore_every=1, checkpoint_every=0, lr=1e-3, device="cpu",
)  # fmt: skip


def grid() -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    row, position = torch.ones(B, T, dtype=torch.bool).nonzero(as_tuple=True)
    return (row, position), row, position


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_four_rollouts_are_chosen_whose_rows_are_written(share: float) -> None:
    place, rollout, position = grid()
    reader = TopReader(8, 1, share, 1.0)
    top = reader.choose(3, place, rollout, position, 0)
    kept = set(rollout[torch.from_numpy(chosen_rows(rollout.numpy(), 3, share))].tolist())
    assert top is not None
    looked = set(top.rollout.tolist())
    assert looked <= kept
    assert len(looked) == min(TOPK_ROLLOUTS, len(kept))
    assert len(top.rollout) == len(looked) * T, "all their tokens"
    if len(looked) == TOPK_ROLLOUTS:
        assert reader.choose(3, place, rollout, position, 1) is None, "in the first pass alone"
    assert reader.taken() == [top]
    assert reader.choose(4, place, rollout, position, 0) is not None, "the next step begins anew"


def test_a_later_pass_looks_at_no_rollout_twice() -> None:
    row = torch.arange(2).repeat_interleave(T)
    position = torch.arange(T).repeat(2)
    reader = TopReader(8, 1, 1.0, 1.0)
    first = reader.choose(1, (row, position), row, position, 0)
    assert first is not None
    assert set(first.rollout.tolist()) == {0, 1}
    assert reader.wants(1), "two of four rollouts are left to find"
    assert reader.choose(1, (row, position), row, position, 1) is None, "the second epoch"
    assert reader.size_at(1) == 8
    other = 2 + torch.arange(2 * T) // 3  # a micro-batch of the rollouts 2 to 5
    second = reader.choose(1, (row, position), other, position, 2)
    assert second is not None
    assert len(set(second.rollout.tolist())) == TOPK_ROLLOUTS - 2, "four of a step in all"
    assert not TopReader(8, 10, 1.0, 1.0).wants(2)
    assert TopReader(8, 10, 1.0, 1.0).size_at(2) == 0


def test_nothing_is_read_off_schedule_or_when_switched_off() -> None:
    place, rollout, position = grid()
    assert TopReader(8, 10, 1.0, 1.0).choose(2, place, rollout, position, 0) is None
    assert TopReader(8, 0, 1.0, 1.0).choose(1, place, rollout, position, 0) is None
    assert TopReader(0, 1, 1.0, 1.0).choose(1, place, rollout, position, 0) is None
    with pytest.raises(UserError, match=r"topk must be 0 \(none\) to 127, got 128"):
        Recorder(None, topk=128)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_numbers_are_those_of_the_softmax_before_and_after(temperature: float) -> None:
    place, rollout, position = grid()
    g = torch.Generator().manual_seed(0)
    before, after = (torch.randn(B, T, V, generator=g) for _ in range(2))
    top = TopReader(6, 1, 1.0, temperature).choose(1, place, rollout, position, 0)
    assert top is not None
    top.read(before.__getitem__)
    top.read(after.__getitem__)
    at = top.rollout, top.position
    values, ids = (before[at] / temperature).log_softmax(-1).topk(6)
    later = (after[at] / temperature).log_softmax(-1).gather(-1, ids)
    assert top.ids is not None and torch.equal(top.ids, ids)  # noqa: PT018
    torch.testing.assert_close(top.before, values)
    torch.testing.assert_close(top.after, later)


def test_a_small_vocabulary_gives_all_of_it() -> None:
    place, rollout, position = grid()
    top = TopReader(8, 1, 1.0, 1.0).choose(1, place, rollout, position, 0)
    assert top is not None
    top.read(torch.randn(B, T, 3).__getitem__)
    assert set(top.given()["place"].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("packed", [False, True])
def test_a_loop_that_gives_logits_records_them(tmp_path: Path, packed: bool) -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(B, T, V, generator=g, requires_grad=True)
    ids = torch.randint(V, (B, T), generator=g)
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    mask, advantages = torch.ones(B, T), torch.randn(B, generator=g)
    with Recorder(tmp_path / "r", topk=4) as recorder:
        if packed:
            logp = logp.flatten()
            bounds = torch.arange(B + 1) * T
            recorder.watch(logp, ids.flatten(), mask.flatten(), advantages, None,
                           logits=logits.reshape(-1, V), cu_seqlens=bounds)  # fmt: skip
        else:
            recorder.watch(logp, ids, mask, advantages, None, logits=logits)
        logp.sum().backward()
        recorder.finish_step(1, reward=[0.0] * B, texts=lambda ids: [f"<{i}>" for i in ids])
    run = open_run(tmp_path / "r")
    found = run.topk()
    assert len(found) == TOPK_ROLLOUTS * T * 4
    assert found["prob_after"].isna().all()
    best = found[found.place == 0]
    rows, columns = best.rollout.tolist(), best.position.tolist()
    truth = logits.detach().log_softmax(-1).max(-1)
    assert best.token_id.tolist() == truth.indices[rows, columns].tolist()
    np.testing.assert_allclose(best.logp, truth.values[rows, columns], rtol=1e-4)
    assert set(found.token_id) <= set(run.vocab), "every token has its text"


def test_steps_that_have_token_rows_have_top_tokens_of_the_same_rollouts(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(V, (B, T), generator=g), torch.ones(B, T)
    with Recorder(tmp_path / "r", topk=2, token_every=2, token_fraction=0.5) as recorder:
        for step in range(1, 6):
            logits = torch.randn(B, T, V, generator=g)
            logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].requires_grad_()
            recorder.watch(logp, ids, mask, torch.ones(B), None, logits=logits)
            logp.sum().backward()
            recorder.finish_step(step)
    assert recorder.failure is None
    run = open_run(tmp_path / "r")
    top, rows = run.topk(), run.tokens()
    assert sorted(set(top.step)) == sorted(set(rows.step)) == [1, 3, 5]
    for step in (1, 3, 5):
        drawn = hashed(np.arange(B), step)
        chosen = [n for n in np.argsort(drawn)[:TOPK_ROLLOUTS].tolist() if drawn[n] < 0.5]
        assert set(top[top.step == step].rollout) == set(chosen)
        assert set(chosen) <= set(rows[rows.step == step].rollout)


@pytest.fixture(scope="module", params=["passive", "replace"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("topk") / "run"
    train(replace(TINY, capture_mode=request.param), folder)
    return open_run(folder)


def test_the_trainer_s_rows_agree_with_its_token_rows(trained: Run) -> None:
    both = trained.topk().merge(trained.tokens(), on=KEYS, suffixes=("", "_own"))
    assert set(both.step) == {1, 2, 3}
    assert (both.groupby("step").rollout.nunique() == TOPK_ROLLOUTS).all()
    own = both[both.token_id == both.token_id_own]
    np.testing.assert_allclose(own.logp, own.logp_own, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(own.logp_after, own.logp_after_own, rtol=2e-4, atol=1e-6)
    first = both[both.place == 0]
    assert (first.top1 == (first.token_id == first.token_id_own)).mean() > 0.99
    assert (both.groupby(KEYS).prob.sum() <= 1 + 1e-6).all()


def test_looking_changes_no_weight(tmp_path: Path) -> None:
    from dataclasses import replace

    weights = [train(replace(TINY, topk=k), tmp_path / str(k)).module.state_dict() for k in (0, 8)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert open_run(tmp_path / "0").topk().empty
