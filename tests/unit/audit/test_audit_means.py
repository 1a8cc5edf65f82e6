"""Which mean the coefficients of made-up gradient passes tell: by rollouts, passes, processes."""

from typing import Any

import numpy as np
import pytest

from tests.support.audit_losses import (
    EVEN,
    LENGTHS,
    LEVELS,
    MOVED,
    SEQ,
    batch,
    halves,
    read,
)
from tests.support.audit_rows import Rows, joined
from wapo_analysis.audit.coefficient import Core

# ---- means --------------------------------------------------------------------------------------

PER_GROUP = np.repeat([LENGTHS[:4].sum(), LENGTHS[4:].sum()], 4)


@pytest.mark.parametrize(
    ("weight", "means"),
    [
        (1 / (LENGTHS * 8), {"seq"}),
        (EVEN, {"batch"}),
        (1 / PER_GROUP / 2, {"group"}),
        (1 / (8 * 16), {"constant"}),
        (1 / (8 * 10), {"constant"}),
        (1 / (8 * 9), {"constant"}),
        (1 / (8 * 16.3), {"batch", "constant", "sum"}),  # of no size that is known
        (1 / (8 * 8), {"constant"}),  # of 16, in two passes that are a mean each
        (1 / (8 * 4), {"batch", "constant", "sum"}),  # a rollout is longer than 8
        (1 / 8, {"sum"}),
        (LENGTHS / 8, {"long"}),
        (LENGTHS / 3, {"long"}),
        (1 / (LENGTHS + 2) / 8, {"offset"}),
        (1 / LENGTHS**2, set()),
        (1 / (LENGTHS * 8) * 1.0009, {"seq"}),
        (1 / (LENGTHS * 3.0), {"seq"}),
    ],
)
def test_each_mean_is_told_from_the_others(weight: Any, means: set[str]) -> None:
    found = read(halves(weight=weight))
    assert found.fits == ({Core("plain"): means} if means else {})
    assert found.means == means
    assert (found.why_not is None) is bool(means)


def test_what_no_loss_gives_is_told_so() -> None:
    found = read(halves(weight=1 / LENGTHS**2))
    assert found.why_not == (
        "no known loss gives these coefficients from advantage, ratio and lengths"
    )


@pytest.mark.parametrize(
    ("size", "told"),
    [(1.0, True), (1.0009, True), (0.9991, True), (1.0012, False), (0.9988, False)],
)
def test_the_size_of_the_weights_is_that_of_a_mean_to_a_thousandth(size: float, told: bool) -> None:
    found = read(halves(weight=size * EVEN))
    assert (found.fits[Core("plain")] == {"batch"}) is told
    assert bool(found.scale) is not told
    if told:
        assert found.summed is not None
        assert found.summed.totals == pytest.approx([size])
        assert found.summed.ranks == 1
        assert found.summed.passes.tolist() == [2.0]
    else:
        assert found.scale["even"].totals == pytest.approx([size])
        assert found.summed is None


def test_what_the_weights_sum_to_is_kept_for_two_means_alone() -> None:
    assert read(halves(weight=SEQ)).summed.totals == pytest.approx([1.0])  # type: ignore[union-attr]
    assert read(halves(weight=1 / 8)).summed is None
    assert read(halves(weight=1 / PER_GROUP / 2)).summed is None


@pytest.mark.parametrize(
    ("length", "constant"),
    [(16.003, True), (16.0036, False), (3000.19, True), (3000.21, False), (9.0, True),
     (8.0, False)],
)  # fmt: skip
def test_a_constant_length_is_whole_and_no_rollout_is_longer(length: float, constant: bool) -> None:
    means = read(batch(weight=1 / (8 * length))).means
    assert ("constant" in means and "batch" not in means) is constant


def test_a_constant_length_is_the_same_in_every_step() -> None:
    first = halves(weight=1 / (8 * 16))
    for length, means in (
        (16, {"constant"}),
        (17, {"batch", "constant", "sum"}),
        (16.3, {"batch", "constant", "sum"}),
    ):
        second = halves(weight=1 / (8 * length), step=2)
        assert read(joined(first, second)).means == means


def test_a_constant_length_is_of_rollouts_that_are_counted() -> None:
    """No advantage is positive, and none divides by the number of those that are."""
    assert read(halves(weight=1 / 16, levels=-np.abs(LEVELS))).means == {"batch", "constant", "sum"}


def test_groups_without_an_advantage_may_be_left_out_of_a_constant_length() -> None:
    levels = np.where(np.arange(8) < 4, 0.0, LEVELS)
    assert read(batch(weight=1 / (4 * 17), levels=levels)).means == {"constant"}
    assert "batch" in read(batch(weight=1 / (4 * 17), levels=LEVELS)).means


@pytest.mark.parametrize(
    ("counted", "known"), [(8, True), (6, True), (4, True), (7, True), (5, False), (3, False)]
)
def test_a_mean_over_rollouts_may_leave_out_those_without_effect(counted: int, known: bool) -> None:
    """Two have no advantage, two more a negative one, and of one no token is kept."""
    levels = np.array([-1.3, 0.0, 0.4, 1.1, 0.0, -0.2, 1.7, 0.6])
    rows = batch(weight=1 / (LENGTHS * counted), levels=levels)
    rows["kept"] = rows["rollout"] != 4
    found = read(rows)
    assert found.fits == {Core("plain"): {"seq"}}
    assert bool(found.scale) is not known


@pytest.mark.parametrize("c", [-2, -1, 1, 2, 7])
def test_a_whole_number_that_is_counted_too_is_told(c: int) -> None:
    found = read(halves(weight=1 / (LENGTHS + c) / 8))
    assert (found.fits, found.offset) == ({Core("plain"): {"offset"}}, c)


def test_an_offset_leaves_something_of_each_rollout() -> None:
    assert not read(halves(weight=1 / (LENGTHS - 3 + 1e-9) / 8)).fits


@pytest.mark.parametrize("c", [0.5, 1.5])
def test_part_of_a_token_is_no_offset(c: float) -> None:
    assert not read(halves(weight=1 / (LENGTHS + c) / 8)).fits


@pytest.mark.parametrize(("c", "told"), [(1.0, True), (1.3, False), (-1.3, False)])
def test_an_offset_of_long_rollouts_is_a_whole_number(c: float, told: bool) -> None:
    lengths = np.array([500, 700, 900, 1100])
    x = np.resize(MOVED, lengths.sum())
    found = read(batch(weight=1 / (lengths + c) / 4, lengths=lengths, levels=LEVELS[:4], x=x))
    assert ("offset" in found.means) is told


def test_an_offset_needs_rollouts_of_four_lengths() -> None:
    for lengths, told in (([3, 5, 7, 3, 5, 7, 3, 5], False), ([3, 5, 7, 9, 5, 7, 3, 5], True)):
        x = np.resize(MOVED, sum(lengths))
        found = read(halves(weight=1 / (np.array(lengths) + 2) / 8, lengths=lengths, x=x))
        assert bool(found.fits) is told


def test_kept_tokens_are_what_a_mean_may_count() -> None:
    kept = np.arange(LENGTHS.sum()) % 3 != 0
    owner = np.repeat(np.arange(8), LENGTHS)
    counts = np.bincount(owner, kept)
    for weight, mean in (
        (1 / counts / 8, "seq"),
        (1 / np.repeat([counts[:4].sum(), counts[4:].sum()], 4) / 2, "group"),
        (np.full(8, 1 / counts.sum()), "pass"),
    ):
        rows = batch(weight=weight)
        rows["kept"] = kept
        rows["coef"] = np.where(kept, rows["coef"], 0.0)
        assert read(rows).fits[Core("plain")] >= {mean}
        assert read(rows | {"coef": rows["coef"] * 3.3}).fits[Core("plain")] >= {mean}


def test_kept_tokens_of_a_group_are_those_of_a_pass() -> None:
    """Which tokens are kept may change from update to update."""
    owner = np.repeat(np.arange(8), LENGTHS)
    kept = (owner + np.arange(LENGTHS.sum())) % 4 != 0
    counts, turn = np.bincount(owner, kept), np.arange(8) % 2
    cells = 2 * turn + np.arange(8) // 4
    rows = halves(weight=1 / np.bincount(cells, counts)[cells])
    rows |= {"kept": kept, "coef": np.where(kept, rows["coef"], 0.0)}
    assert read(rows).fits == {Core("plain"): {"group"}}


def test_rollouts_without_push_may_be_left_out_of_a_group() -> None:
    levels = np.where(np.arange(8) % 4 == 1, 0.0, LEVELS)
    active = np.repeat([LENGTHS[[0, 2, 3]].sum(), LENGTHS[[4, 6, 7]].sum()], 4)
    found = read(halves(weight=1 / active / 2, levels=levels))
    assert found.fits == {Core("plain"): {"group"}}
    assert found.pushed.sum() == LENGTHS.sum() - 5 - 8


def test_groups_that_are_not_known_are_no_mean() -> None:
    rows = halves(weight=1 / PER_GROUP / 2) | {"group": np.repeat([0, -1], [19, 28])}
    assert not read(rows).fits


@pytest.mark.parametrize("steps", [[1, 1], [1, 2]])
def test_groups_of_steps_and_of_processes_of_a_loop_are_their_own(steps: list[int]) -> None:
    same = np.repeat([0], 8)
    parts = [
        batch(weight=1 / LENGTHS.sum() / (2 if steps[0] == steps[1] else 1), group=same,
              step=steps[0]),
        batch(weight=1 / LENGTHS[:7].sum() / (2 if steps[0] == steps[1] else 1), group=same[:7],
              lengths=LENGTHS[:7], levels=LEVELS[:7], x=MOVED[:38], step=steps[1],
              rank=int(steps[0] == steps[1])),
    ]  # fmt: skip
    assert "group" in read(joined(*parts)).fits[Core("plain")]


def test_each_rollout_counts_once_in_its_group_whatever_its_passes() -> None:
    size = int(LENGTHS[:4].sum())
    again = batch(weight=1 / 19 / 2, lengths=LENGTHS[:4], levels=LEVELS[:4], x=MOVED[:size],
                  minibatch=1)  # fmt: skip
    found = read(joined(batch(weight=1 / PER_GROUP / 2), again))
    assert found.fits == {Core("plain"): {"group"}}


@pytest.mark.parametrize(("off", "fits"), [(1, True), (2, False)])
def test_one_rollout_of_five_hundred_may_weigh_something_else(off: int, fits: bool) -> None:
    weight = np.where(np.arange(500) < off, 1.05, 1.0) / 1000
    rows = batch(weight=weight, lengths=np.full(500, 2), levels=np.resize(LEVELS, 500),
                 x=np.resize(MOVED, 1000))  # fmt: skip
    assert bool(read(rows).fits) is fits


# ---- passes, steps, processes -------------------------------------------------------------------


def passes(weights: Any, **given: Any) -> Rows:
    """Two gradient passes over four rollouts each, with these weights."""
    parts = []
    for number, weight in enumerate(weights):
        half = slice(4 * number, 4 * number + 4)
        size = int(LENGTHS[:4].sum())
        x = MOVED[:size] if number == 0 else MOVED[size:]
        parts.append(
            batch(weight=weight, lengths=LENGTHS[half], levels=LEVELS[half], x=x,
                  rollout=np.arange(8)[half], group=number, minibatch=number, **given)
        )  # fmt: skip
    return joined(*parts)


TOKENS = np.array([LENGTHS[:4].sum(), LENGTHS[4:].sum()])


@pytest.mark.parametrize(
    ("weights", "means"),
    [
        (1 / TOKENS / 2, {"pass", "group"}),
        (1 / TOKENS, {"pass", "group"}),
        (1 / TOKENS / 3, {"pass", "group"}),
        ([1 / (8 * 7), 1 / (8 * 9)], {"padded"}),
        ([EVEN, EVEN], {"batch"}),
        ([2 * EVEN, 2 * EVEN], {"batch"}),
        ([1 / LENGTHS[:4] / 4, 1 / LENGTHS[4:] / 4], {"seq"}),
    ],
)
def test_means_of_passes(weights: Any, means: set[str]) -> None:
    assert read(passes(weights)).fits == {Core("plain"): means}


def test_a_pass_of_its_own_weight_is_a_mean_whose_size_is_not_known() -> None:
    """Weights that differ from pass to pass without a length."""
    found = read(passes([1 / LENGTHS[:4], 0.6 / LENGTHS[4:]]))
    assert found.fits == {Core("plain"): {"seq"}}
    assert found.pushed.all()
    assert found.only_first is None


def test_passes_over_the_same_rollouts_count_each_token_once() -> None:
    second = batch(weight=EVEN, x=MOVED[::-1], minibatch=2 + np.arange(8) % 2)
    found = read(joined(halves(weight=EVEN), second), {"step": [1], "updates": [4]})
    assert found.fits == {Core("plain"): {"batch"}}
    assert found.summed is not None
    assert found.summed.totals == pytest.approx([1.0])
    assert found.summed.passes.tolist() == [2.0]
    assert found.summed.updates.tolist() == [2.0]


@pytest.mark.parametrize(
    ("scale", "updates", "told"),
    [(1, 1, True), (2, 1, True), (2, 2, True), (3, 3, True), (3, 1, False)],
)
def test_weights_may_sum_to_the_passes_or_updates_of_a_step(
    scale: int, updates: int, told: bool
) -> None:
    found = read(passes([scale * EVEN] * 2), {"step": [1], "updates": [updates]})
    assert (found.fits[Core("plain")] == {"batch"}) is told


@pytest.mark.parametrize(("scale", "told"), [(2, True), (3, False)])
def test_updates_of_a_step_that_was_logged_twice_are_not_known(scale: int, told: bool) -> None:
    """Then its gradient passes count: here two."""
    steps = {"step": [1, 1, 2], "updates": [3, 3, 3]}
    found = read(passes([scale * EVEN] * 2), steps)
    assert (found.fits[Core("plain")] == {"batch"}) is told


def test_steps_have_sizes_of_their_own() -> None:
    short = LENGTHS[:5]
    second = batch(weight=1 / short.sum(), lengths=short, levels=LEVELS[:5],
                   x=MOVED[: short.sum()], step=2, minibatch=np.arange(5) % 2)  # fmt: skip
    found = read(joined(halves(weight=EVEN), second))
    assert found.fits == {Core("plain"): {"batch"}}
    assert found.summed is not None
    assert found.summed.totals == pytest.approx([1.0, 1.0])
    wrong = batch(weight=3 / short.sum(), lengths=short, levels=LEVELS[:5],
                  x=MOVED[: short.sum()], step=2, minibatch=np.arange(5) % 2)  # fmt: skip
    found = read(joined(halves(weight=EVEN), wrong))
    assert found.fits == {Core("plain"): {"batch", "constant", "sum"}}
    assert found.scale["even"].totals == pytest.approx([1.0, 3.0])


def of_two_processes(weights: Any) -> Rows:
    rows = passes(weights)
    return rows | {"rank": rows["minibatch"], "minibatch": np.zeros(len(rows["step"]), int)}


@pytest.mark.parametrize(
    ("weights", "means"),
    [
        (1 / TOKENS / 2, {"rank", "group"}),
        (1 / TOKENS, {"rank", "pass", "group"}),
        ([EVEN, EVEN], {"batch"}),
        ([2 * EVEN, 2 * EVEN], {"batch"}),
        ([3 * EVEN, 3 * EVEN], {"batch", "constant", "sum"}),
    ],
)
def test_means_of_processes(weights: Any, means: set[str]) -> None:
    assert read(of_two_processes(weights)).fits == {Core("plain"): means}


def test_sampled_rollouts_say_nothing_of_the_size_of_weights() -> None:
    found = read(halves(weight=1 / 8), token_fraction=0.5)
    assert found.fits == {Core("plain"): {"batch", "constant", "sum"}}
    assert not found.scale
    assert read(halves(weight=EVEN), token_fraction=0.5).summed is None
    assert read(halves(weight=SEQ), token_fraction=0.5).fits == {Core("plain"): {"seq"}}
    told = {"step": [1], "token_fraction": [0.5]}
    assert read(halves(weight=1 / 8), told).fits[Core("plain")] == {"batch", "constant", "sum"}
