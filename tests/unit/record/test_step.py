"""A step between training and disk: what came back, what is copied, what a caller must give."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.recorder_passes import ROWS, tokens
from wapo_analysis.errors import UserError
from wapo_analysis.record import step as step_module
from wapo_analysis.record.batches import BatchPass, Layout, batch_pass, outside_counts
from wapo_analysis.record.step import OpenStep, rollout_table, step_rollouts
from wapo_analysis.record.tokens import (
    DevicePass,
    DeviceTotals,
    HostPass,
    given_in_all,
    on_host,
    repetition,
)
from wapo_analysis.record.topk import chosen_rows, hashed


def a_batch(count: int = 2, first: int = 0, **given: Any) -> BatchPass:
    """A pass of some rollouts of three positions; the last of the first rollout is padding."""
    logp = torch.full((count, 3), -0.5, requires_grad=True)
    mask = torch.ones(count, 3)
    mask[0, 2] = 0
    advantages = torch.arange(count).float() - 0.5
    known: dict[str, Any] = {
        "rollouts": None, "first_rollout": first, "temperature": 1.0, "minibatch": 0, **given,
    }  # fmt: skip
    return batch_pass(
        known.pop("logp", logp), None, mask, advantages, known.pop("groups", None), **known
    )


def open_step(*came_back: bool) -> OpenStep:
    step = OpenStep()
    for number, came in enumerate(came_back):
        batch = a_batch(number + 1, step.rollouts)
        step.batches.append(batch)
        step.passes.append(batch.tokens)
        if came:
            batch.read_gradient(torch.ones(number + 1, 3), 1.0)
    return step


@pytest.mark.parametrize(
    ("came", "returned", "trained", "left"),
    [
        ((), True, [], 0), ((True, True), True, [], 2), ((False, False), False, [], 2),
        ((False, True), True, [False, True, True], 1),
        ((True, False, True), True, [True, False, False, True, True, True], 2),
    ],
)  # fmt: skip
def test_passes_that_no_gradient_reached_are_forgotten_if_another_was(
    came: tuple[bool, ...], returned: bool, trained: list[bool], left: int
) -> None:
    step = open_step(*came)
    assert step.rollouts == sum(range(len(came) + 1))
    assert step.returned() is returned
    assert step.trained == trained
    assert len(step.batches) == len(step.passes) == left
    assert bool([*step.gaps()]) is (bool(came) and not returned)


def test_a_pass_without_a_graph_and_one_with_two_gradients_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = set[str]()
    for _ in range(2):
        step = OpenStep(batches=[a_batch(logp=torch.full((2, 3), -0.5)), a_batch(first=2)])
        for gradient in (1.0, 2.0):
            step.batches[1].read_gradient(torch.full((2, 3), gradient), 2.0)
        step.tell(told)
    assert step.batches[1].tokens.coef.tolist() == [-1.5] * 5  # type: ignore[union-attr]
    assert sorted(message[:24] for message in caplog.messages) == [
        "several gradients came b", "the logp given to watch ",
    ]  # fmt: skip


def test_a_host_s_tokens_are_summed_up_by_the_writer_not_by_training() -> None:
    for share, sums in ((0.0, {}), (0.0, None), (1.0, {})):
        job = OpenStep([tokens(1), tokens(2)]).job({"step": 3}, {}, rank=0, share=share, sums=sums)
        assert (job.summed, len(job.passes), job.rows) == ([], 2, 2 * ROWS)
        job.condense()
        assert job.passes == job.tokens == []
        assert job.rows == (2 * ROWS if share else 0)
        assert job.row["token_fraction"] == share
        assert ("entropy" in job.row) is (sums is not None)


@pytest.mark.parametrize(
    ("kinds", "share", "settled", "summed"),
    [
        (["cuda", "cuda"], 0.0, False, 2), (["cuda"], 0.5, False, 0), (["cuda"], 0.0, True, 0),
        (["cuda"], 1.0, True, 0), (["cuda", "cpu"], 0.0, False, 0), (["cpu"], 0.0, False, 0),
    ],
)  # fmt: skip
def test_a_device_sums_up_a_step_of_which_no_row_is_written(
    kinds: list[str], share: float, settled: bool, summed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "DeviceTotals", lambda tokens, *how: (tokens, how))
    passes: Any = [
        SimpleNamespace(
            logp=SimpleNamespace(device=SimpleNamespace(type=kind)), outside=("counts",),
            given=lambda: {"logp": 1},
        )
        for kind in kinds
    ]  # fmt: skip
    step = OpenStep(passes, settled=[tokens(1)] * settled)  # type: ignore[list-item]
    settings = {"share": share, "temperature": 0.5, "sums": {}, "sequence_level": True}
    found: Any = step._summed_there(settings)
    assert [tokens for tokens, _ in found] == passes[:summed]
    assert all(how == (0.5, frozenset({"logp"}), True) for _, how in found)
    assert len(step.passes) == (0 if summed else len(kinds))
    assert step._outside == ["counts"] * summed


def test_sums_made_where_the_tokens_are_give_the_step_of_the_rows() -> None:
    given = [tokens(1), tokens(2, rows=35)]
    rows = OpenStep(list(given)).job({"step": 3, "lr": 0.5}, {}, rank=0, share=0.0, sums={})
    there = OpenStep().job({"step": 3, "lr": 0.5}, {}, rank=0, share=0.0, sums={})
    there.summed = [DeviceTotals(one, 1.0, given_in_all(given)) for one in given]
    for job in (rows, there):
        job.condense()
    assert there.summed == []
    assert there.row == pytest.approx(rows.row, rel=1e-12)
    assert there.row["token_fraction"] == 0.0
    (one,), (other,) = rows.records(), there.records()
    assert len(one) == len(other)
    for name, values in one.columns.items():
        np.testing.assert_allclose(other[name], values, rtol=1e-12, err_msg=name)


def test_a_pass_without_tokens_belongs_to_any_logits() -> None:
    empty = torch.zeros(1, 3)
    batch = batch_pass(
        empty, empty.long(), empty, torch.ones(1), None, rollouts=None, first_rollout=0,
        temperature=1.0, minibatch=0, logits=torch.ones(1, 3, 5),
    )  # fmt: skip
    assert len(batch.tokens.logp) == 0
    with pytest.raises(UserError, match="logits were given without the sampled tokens"):
        batch_pass(empty, None, empty, torch.ones(1), None, rollouts=None, first_rollout=0,
                   temperature=1.0, minibatch=0, logits=torch.ones(1, 3, 5))  # fmt: skip


def test_outside_the_mask_is_told_apart_by_its_side() -> None:
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, [3, 5]], mask[2] = True, True
    gradient = torch.tensor([[2.0, 2, 2, 2, 2, 2, 2, torch.nan, 0], [3.0] + [0] * 8, [4.0] * 9])
    assert outside_counts(gradient, mask).tolist() == [6, 3, 1]
    gradient[0, 7] = -1e-30
    assert outside_counts(gradient, mask).tolist() == [7, 3, 2]
    assert outside_counts(gradient[0], mask[0]).tolist() == [6]
    assert outside_counts(gradient * 0, mask).tolist() == [0, 0, 0]


def test_counts_outside_the_mask_are_columns_of_the_step() -> None:
    for passes, names in (
        ([(3, 1, 2), (1, 0, 0)], {"grad_outside": 4, "grad_before": 1, "grad_after": 2}),
        ([(3, 1, 2), (5,)], {"grad_outside": 8}),
    ):
        given = [tokens(number) for number in range(len(passes))]
        for one, counts in zip(given, passes, strict=True):
            one.outside = (torch.tensor(counts),)
        job = OpenStep(given).job({"step": 1}, {}, rank=0)
        job.condense()
        found = {name: value for name, value in job.row.items() if name.startswith("grad_")}
        assert found == names


LN = float(np.log(1.3))


@pytest.mark.parametrize(
    ("clip", "log_ratio", "advantage", "gradient", "clipped", "kept"),
    [
        (None, LN, 1.0, 0.0, True, True), (None, -LN, 1.0, 0.0, False, False),
        (None, -LN, -1.0, 0.0, True, True), (None, LN, -1.0, 0.0, False, False),
        (None, LN, 1.0, 0.5, False, True), (None, LN, 0.0, 0.0, False, True),
        ((0.8, 1.2), LN, 1.0, 0.0, True, True), ((0.8, 1.2), -LN, 1.0, 0.0, True, True),
        ((0.8, 1.4), LN, 1.0, 0.0, False, False), ((0.7, 1.2), -LN, -1.0, 0.0, False, False),
        ((0.0, 1.2), -9.0, -1.0, 0.0, False, False), ((0.0, 1.2), LN, -1.0, 0.0, True, True),
        ((0.8, 1.2), LN, 1.0, 0.5, False, True),
    ],
)  # fmt: skip
def test_what_an_idle_token_was_stopped_by(
    clip: Any, log_ratio: float, advantage: float, gradient: float, clipped: bool, kept: bool
) -> None:
    """No gradient: the clip, if the ratio is beyond it or went where the advantage pushes."""
    logp = torch.full((1, 1), -2.0, requires_grad=True)
    batch = batch_pass(
        logp, None, torch.ones(1, 1), torch.tensor([advantage]), None, rollouts=None,
        first_rollout=0, temperature=1.0, minibatch=0, logp_old=logp.detach() - log_ratio,
        clip=clip,
    )  # fmt: skip
    batch.read_gradient(torch.full((1, 1), -4 * gradient), 4.0)
    found = batch.tokens
    assert found.coef is not None
    assert (found.coef.item(), found.clipped.item(), found.kept.item()) == (  # type: ignore[union-attr]
        gradient, clipped, kept
    )  # fmt: skip


def test_of_tokens_that_are_known_to_be_kept_the_idle_ones_were_stopped() -> None:
    kept = torch.tensor([[1, 1, 0], [1, 0, 1]])
    batch = a_batch(kept=kept)
    batch.read_gradient(torch.tensor([[0.0, 1, 0], [0, 0, 1]]), 1.0)
    assert batch.tokens.kept.tolist() == [True, True, True, False, True]  # type: ignore[union-attr]
    assert batch.tokens.clipped.tolist() == [True, False, True, False, False]  # type: ignore[union-attr]


def test_without_old_log_probabilities_nothing_was_stopped() -> None:
    batch = a_batch()
    batch.read_gradient(torch.tensor([[0.0, 1, 0], [0, 0, 1]]), 1.0)
    assert not batch.tokens.clipped.any()  # type: ignore[union-attr]
    assert batch.tokens.kept.tolist() == [False, True, False, False, True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bounds", "rollouts", "which", "position"),
    [
        ([0, 2, 2, 5], None, [0, 0, 2, 2, 2], [0, 1, 0, 1, 2]),
        (None, [7, 4, 7, 4, 9], [1, 0, 1, 0, 2], [0, 0, 1, 1, 0]),
    ],
)
def test_positions_of_packed_tokens_count_within_their_rollout(
    bounds: Any, rollouts: Any, which: list[int], position: list[int]
) -> None:
    given = [None if v is None else torch.tensor(v) for v in (bounds, rollouts)]
    layout = Layout.of(torch.zeros(5), *given)
    assert layout.count == 3
    assert layout.rollout.tolist() == which
    assert layout.within(layout.rollout).tolist() == position
    numbers = None if layout.numbers is None else layout.numbers.tolist()
    assert numbers == (None if bounds else [4, 7, 9])


@pytest.mark.parametrize(
    ("shape", "given", "said"),
    [
        ((2, 3), {"cu_seqlens": [0, 6]}, r"packed tensors, but logp is \(rollouts, T\)"),
        ((1, 2, 3), {}, r"or \(positions,\) if packed, got \(1, 2, 3\)"),
        ((5,), {}, r"shape \(5,\), needs cu_seqlens or rollouts of the same shape"),
        ((5,), {"rollouts": [0, 1]}, r"shape \(5,\), needs cu_seqlens or rollouts"),
        ((5,), {"cu_seqlens": [0, 4]}, "rise from 0 to the 5 positions"),
        ((5,), {"cu_seqlens": [1, 5]}, "rise from 0 to the 5 positions"),
        ((5,), {"cu_seqlens": [0, 4, 3, 5, 5]}, r"got \[0, 4, 3, 5, \.\.\.\]"),
        ((5,), {"cu_seqlens": [5]}, r"one more entry than rollouts, got \[5\]"),
        ((5,), {"cu_seqlens": [[0, 5]]}, "rise from 0"),
    ],
)
def test_layouts_that_are_none_are_refused(shape: Any, given: Any, said: str) -> None:
    tensors = {name: torch.tensor(values) for name, values in given.items()}
    with pytest.raises(UserError, match=said):
        Layout.of(torch.zeros(shape), tensors.get("cu_seqlens"), tensors.get("rollouts"))


def test_values_of_rollouts_may_be_given_per_position_of_a_packed_row() -> None:
    packed = Layout.of(torch.zeros(5), torch.tensor([0, 2, 5]), None)
    padded = Layout.of(torch.zeros(2, 3), None, None)
    assert packed.per_rollout("groups", torch.tensor([3, 3, 8, 8, 8])).tolist() == [3, 8]
    assert packed.per_rollout("groups", torch.tensor([3, 8])).tolist() == [3, 8]
    with pytest.raises(UserError, match="groups must be the same at all positions of a rollout"):
        packed.per_rollout("groups", torch.tensor([3, 4, 8, 8, 8]))
    with pytest.raises(UserError, match=r"must have shape \(2,\), one per rollout, or \(5,\), one"):
        packed.per_rollout("groups", torch.tensor([3, 4, 8]))
    with pytest.raises(UserError, match=r"must have shape \(2,\), one per rollout, got \(2, 3\)"):
        padded.per_rollout("groups", torch.zeros(2, 3))


def test_an_advantage_per_token_is_averaged_for_the_rollout() -> None:
    logp = torch.full((3, 3), -0.5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    given = torch.tensor([[1.0, 3, 99], [1, 2, 6], [99, 99, 99]])
    batch = batch_pass(
        logp, None, mask, given, torch.tensor([4, 4, 5]), rollouts=torch.tensor([6, 2, 9]),
        first_rollout=0, temperature=1.0, minibatch=2,
    )  # fmt: skip
    assert batch.advantages.tolist() == [2.0, 3.0, 0.0]
    assert batch.lengths.tolist() == [2, 3, 0]
    assert batch.tokens.advantage.tolist() == [1.0, 3.0, 1.0, 2.0, 6.0]
    assert batch.tokens.rollout.tolist() == [6, 6, 2, 2, 2]
    assert batch.tokens.group.tolist() == [4] * 5
    assert batch.tokens.token_id.tolist() == [-1] * 5
    assert batch.tokens.minibatch == 2
    table = rollout_table([batch])
    assert {name: values.tolist() for name, values in table.items()} == {
        "rollout": [2, 6, 9], "group": [4, 4, 5], "advantage": [3.0, 2.0, 0.0], "length": [3, 2, 0],
    }  # fmt: skip
    with pytest.raises(UserError, match=r"must have shape \(3,\) or \(3, 3\), got \(2,\)"):
        batch_pass(logp, None, mask, torch.ones(2), None, rollouts=None, first_rollout=0,
                   temperature=1.0, minibatch=0)  # fmt: skip


def test_of_rollouts_passed_twice_each_has_one_row() -> None:
    numbers = torch.tensor([1, 0])
    batches = [a_batch(rollouts=numbers), a_batch(rollouts=numbers)]
    found = step_rollouts(batches, [1.0, 0.0], ["p", "q"], ["a", "b"])
    assert found.columns["rollout"].tolist() == [0, 1]
    assert found.columns["completion"] == ["a", "b"]
    assert found.columns["length"].tolist() == [3, 2]
    assert found.row["reward"] == 0.5
    assert found.row["tokens"] == 5
    assert found.sums == {"length": 5.0, "length n": 2}


def test_rewards_of_a_step() -> None:
    assert step_rollouts([], None).row == {}
    assert step_rollouts([], 0.25).row == {"reward": 0.25}
    alone = step_rollouts([], torch.tensor([1.0, 0.0, 0.5], dtype=torch.bfloat16))
    assert (alone.row["reward"], alone.columns) == (0.5, {})
    whole = step_rollouts([a_batch(groups=torch.tensor([3, 3]))], [1.0, 1.0])
    assert whole.row["groups_all_right"] == 1.0
    with pytest.raises(UserError, match="reward has 3 values, but 2 rollouts were watched"):
        step_rollouts([a_batch()], [1.0, 0.0, 1.0])
    with pytest.raises(UserError, match="completion has 1 values, but 2 rollouts"):
        step_rollouts([a_batch()], [1.0, 0.0], None, ["a"])
    trained = step_rollouts([a_batch(rollouts=torch.tensor([0, 2]))], [1.0, 0.5, 0.0],
                            ["p", "q", "r"], None, [True, False, True])  # fmt: skip
    assert trained.columns["reward"] == [1.0, 0.0]
    assert trained.columns["prompt"] == ["p", "r"]
    assert trained.row["reward"] == 0.5, "that of all"


def test_what_every_pass_gives() -> None:
    one, two = tokens(1), tokens(2)
    two.entropy = None
    assert "entropy" in given_in_all([one])
    assert given_in_all([one]) - given_in_all([one, two]) == {"entropy"}
    assert given_in_all([]) == frozenset()


@pytest.mark.parametrize("kind", [HostPass, DevicePass])
def test_columns_of_a_pass(kind: Any) -> None:
    given = tokens(4, rows=5, minibatch=3)
    given.kept = None
    found = kind(given).columns(7, 2)
    assert len(kind(given)) == 5
    assert (found["step"] == 7).all()
    assert (found["minibatch"] == 3).all()
    assert (found["rank"] == 2).all()
    assert found["kept"].tolist() == [True] * 5
    assert found["clipped"].tolist() == given.clipped.tolist()  # type: ignore[union-attr]
    assert found["top1"].tolist() == given.top1.tolist()  # type: ignore[union-attr]
    assert found["token_id"].tolist() == given.token_id.tolist()
    assert isinstance(on_host(given), HostPass)
    assert not isinstance(on_host(given), DevicePass)


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([], 4, 0.0), ([1, 2, 3], 4, 0.0), ([1, 2, 3, 4], 4, 0.0), ([5] * 4, 4, 0.0),
        ([5] * 5, 4, 0.5), ([5] * 8, 4, 0.8), ([1, 2, 1, 2, 1, 2], 2, 0.6), ([1, 1], 1, 0.5),
    ],
)  # fmt: skip
def test_the_share_of_n_grams_that_came_before(ids: list[int], n: int, share: float) -> None:
    assert repetition(ids, n) == pytest.approx(share)


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    rollout = np.arange(200)
    chosen = [set(np.flatnonzero(chosen_rows(rollout, 5, f))) for f in (0.0, 0.1, 0.4, 1.0)]
    assert chosen[0] == set()
    assert chosen[1] < chosen[2] < chosen[3] == set(range(200))
    assert set(np.flatnonzero(hashed(rollout, 5) < 0.1)) == chosen[1]
    assert chosen[2] != set(np.flatnonzero(chosen_rows(rollout, 6, 0.4)))


def test_numbers_a_column_cannot_hold_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollouts must be numbers below 2\^31, got"):
        a_batch(rollouts=torch.tensor([0, 2**31]))
    held: Tensor = a_batch(rollouts=torch.tensor([0, 2**31 - 1])).rollouts
    assert held.tolist() == [0, 2**31 - 1]
