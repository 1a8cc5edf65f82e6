"""Which ratio and which mean the coefficients of made-up gradient passes tell."""

from typing import Any

import numpy as np
import pytest

from tests.support.audit_rows import Rows, evidence, joined, token_rows
from wapo_analysis.audit.coefficient import CORES, Coefficient, Core, read_coefficient
from wapo_analysis.audit.declared import settings_of
from wapo_analysis.audit.evidence import Evidence

NAN = np.nan
LENGTHS = np.array([3, 5, 4, 7, 6, 8, 5, 9])
LEVELS = np.array([-1.3, 0.7, 0.4, -1.1, 0.9, -0.2, 1.7, -0.6])
MOVED = np.random.default_rng(3).normal(0, 0.3, LENGTHS.sum())
MOVED[:3] += 2  # beyond CISPO's cap, as tokens and as a rollout
SETTINGS = settings_of({"objective": {"bounds": [0.8, 1.2]}})
SEQ, EVEN = 1 / (LENGTHS * 8), 1 / LENGTHS.sum()


def mean_of(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return (np.bincount(owner, x) / lengths)[owner]


def factor(core: Core, x: np.ndarray, lengths: np.ndarray, advantage: np.ndarray) -> np.ndarray:
    """f(ratio) of every token by the formulas of the losses, as their gradients have it."""
    if core.level != "token":
        x = mean_of(x, lengths) * (np.repeat(lengths, lengths) if core.level == "sum" else 1)
    ratio, up = np.exp(x), advantage > 0
    if core.kind == "sapo":
        heat = np.where(up, 1.0, 1.05)
        gate = 1 / (1 + np.exp(-heat * (ratio - 1)))
        return 4 * gate * (1 - gate) * ratio
    if core.kind == "vespo":
        k, rate = np.where(up, 2.0, 3.0), np.where(up, 3.0, 2.0)
        return np.exp(rate + k * x - rate * ratio)
    return {
        "plain": ratio, "none": np.ones_like(x), "unit": 1 / np.maximum(np.abs(advantage), 1e-9),
        "inverse": 1 / ratio, "cispo": np.minimum(ratio, 5.0),
    }[core.kind]  # fmt: skip


def batch(
    core: Core = CORES[0], weight: Any = SEQ, x: Any = MOVED, lengths: Any = LENGTHS,
    levels: Any = LEVELS, **given: Any,
) -> Rows:  # fmt: skip
    """A gradient pass over eight rollouts with coef = A f(ratio) weight."""
    rows = token_rows(lengths, advantage=levels, log_ratio=x, **given)
    weight = np.repeat(np.broadcast_to(weight, len(lengths)), lengths)
    made = factor(core, np.broadcast_to(x, len(weight)), np.asarray(lengths), rows["advantage"])
    return rows | {"coef": rows["advantage"] * made * weight}


def halves(**given: Any) -> Rows:
    """The same in two gradient passes, every second rollout in each."""
    return batch(minibatch=np.arange(8) % 2, **given)


def read(rows: Rows, steps: Any = None, **manifest: Any) -> Coefficient:
    return read_coefficient(evidence(rows, steps=steps, **manifest), SETTINGS)


# ---- ratios -------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", [c for c in CORES if c.kind != "gmpo"], ids=str)
def test_each_ratio_is_told_from_the_others(core: Core) -> None:
    found = read(batch(core))
    assert found.fits == {core: {"seq"}}
    assert found.why_not is None
    assert found.ratio_moves
    assert found.against == 0
    # VESPO puts nothing on a rollout that moved so far.
    assert found.pushed.sum() == LENGTHS.sum() - (3 if core.kind == "vespo" else 0)
    assert found.form == ("seq", pytest.approx(1 / 8))


@pytest.mark.parametrize("held", [True, False])
def test_a_mean_of_clipped_log_ratios_is_told_where_its_bounds_are_known(held: bool) -> None:
    rows = batch()
    up = rows["advantage"] > 0
    inner = np.where(up, np.minimum(MOVED, np.log(1.2)), np.maximum(MOVED, np.log(0.8)))
    coef = rows["advantage"] * np.exp(mean_of(inner, LENGTHS)) * np.repeat(SEQ, LENGTHS)
    rows["coef"] = coef
    if held:
        assert read(rows).fits == {Core("gmpo", "mean"): {"seq"}}
        return
    for bounds in ([None, 1.2], [0.8, None], None):
        settings = settings_of({"objective": {"bounds": bounds}})
        assert not read_coefficient(evidence(rows), settings).fits


def test_numbers_of_the_losses_are_those_of_the_run() -> None:
    config = {"epsilon_high": 1.5, "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0,
              "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5, "vespo_k_neg": 2.5,
              "vespo_lambda_neg": 0.5}  # fmt: skip
    settings = settings_of({"config": config})
    up = np.repeat(LEVELS, LENGTHS) > 0
    total = mean_of(MOVED, LENGTHS) * np.repeat(LENGTHS, LENGTHS)
    z = np.where(up, 2.0, 3.0) * (np.exp(MOVED) - 1)
    k, rate = np.where(up, 1.0, 2.5), np.where(up, 1.5, 0.5)
    for core, made in (
        (Core("cispo"), np.minimum(np.exp(MOVED), 1.5)),
        (Core("sapo"), np.exp(MOVED) / (1 + np.exp(-z)) / (1 + np.exp(z)) * 4),
        (Core("vespo", "sum"), np.exp(rate + k * total - rate * np.exp(total))),
    ):
        rows = batch()
        rows["coef"] = rows["advantage"] * made * np.repeat(SEQ, LENGTHS)
        assert read_coefficient(evidence(rows), settings).fits == {core: {"seq"}}


@pytest.mark.parametrize(
    ("core", "words"),
    [
        (Core("plain"), "token ratio"), (Core("plain", "mean"), "rollout ratio (mean)"),
        (Core("plain", "sum"), "rollout ratio (sum)"), (Core("none"), "no ratio"),
        (Core("unit"), "no ratio, size of A ignored"), (Core("inverse"), "inverted token ratio"),
        (Core("sapo", "mean"), "sapo of the rollout ratio (mean)"),
    ],
)  # fmt: skip
def test_each_ratio_has_words(core: Core, words: str) -> None:
    assert str(core) == words


@pytest.mark.parametrize(
    ("share", "by", "moves"),
    [(0.03, 0.3, True), (0.02, 0.3, False), (0.03, 0.0101, True), (0.03, 0.0099, False)],
)
def test_ratios_move_once_a_few_of_them_leave_1(share: float, by: float, moves: bool) -> None:
    x = np.where(np.arange(100) < share * 100, by + 8e-5, 0.0)
    rows = batch(x=x, lengths=[50, 50], levels=[1.3, -0.7], weight=0.01)
    assert read(rows).ratio_moves is moves


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
    same, other = (halves(weight=1 / (8 * c), step=2) for c in (16, 17))
    assert read(joined(first, same)).means == {"constant"}
    assert read(joined(first, other)).means == {"batch", "constant", "sum"}


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


# ---- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "fits"), [(2.0e-4, True), (4e-3, False)])
def test_a_coefficient_is_held_to_the_rounding_of_the_record(by: float, fits: bool) -> None:
    lengths = np.full(4, 300)
    x = np.resize(MOVED, 1200)
    rows = batch(weight=1 / 1200, lengths=lengths, levels=LEVELS[:4], x=x)
    rows["coef"][::100] *= 1 + by
    assert (Core("plain") in read(rows).fits) is fits


def test_the_rounding_of_a_sum_grows_with_its_tokens() -> None:
    lengths = np.tile([20, 90], 4)
    x = np.resize(0.1 * MOVED, lengths.sum())
    rows = batch(Core("plain", "sum"), 1 / (lengths * 8), x, lengths)
    assert read(rows).fits == {Core("plain", "sum"): {"seq"}}
    off = rows | {"logp_old": rows["logp_old"] - 1.5e-5}
    assert Core("plain", "sum") in read(off).fits
    far = rows | {"logp_old": rows["logp_old"] - 1.5e-4}
    assert Core("plain", "sum") not in read(far).fits


@pytest.mark.parametrize(("share", "fits"), [(0.9, True), (24.0, False)])
def test_the_rounding_of_a_steep_loss_is_wide_where_it_is_steep(share: float, fits: bool) -> None:
    """SAPO falls as the sixth power of a ratio of 7."""
    n = LENGTHS.sum()
    rows = batch(Core("sapo"), x=np.full(n, 2.0) + 0.01 * np.resize([1, -1, 2], n), logp=-20.0)
    bound = 1.1 * 2.0**-16 * 42 + 3e-6
    rows["logp_old"] = rows["logp_old"] + share * bound * np.resize([1.0, -1.0], n)
    assert (Core("sapo") in read(rows).fits) is fits


@pytest.mark.parametrize(("off", "fits"), [(2, True), (3, False)])
def test_two_tokens_of_a_thousand_may_lie_beyond(off: int, fits: bool) -> None:
    lengths = np.full(10, 100)
    rows = batch(weight=1e-3, lengths=lengths, levels=np.resize(LEVELS, 10),
                 x=np.resize(MOVED, 1000))  # fmt: skip
    rows["coef"][:off] *= 1.01
    assert (Core("plain") in read(rows).fits) is fits


# ---- what is not known --------------------------------------------------------------------------


def test_without_coefficients_nothing_is_known() -> None:
    rows = batch()
    found = read(rows | {"coef": np.full(len(MOVED), NAN)})
    assert found.why_not == "no coefficients were recorded"
    assert (len(found.pushed), found.offset, found.against) == (0, 0, 0.0)


@pytest.mark.parametrize(("left", "known"), [(7, False), (8, True)])
def test_eight_tokens_with_gradient_tell_something(left: int, known: bool) -> None:
    rows = batch()
    rows["coef"][left:] = 0
    found = read(rows)
    assert found.pushed.sum() == left
    assert (found.why_not is None) is known
    assert known or found.why_not == "only 7 tokens with an advantage carry gradient"


def test_tokens_without_advantage_or_coefficient_are_not_pushed() -> None:
    rows = batch()
    rows["coef"][0], rows["coef"][1], rows["advantage"][2], rows["advantage"][3] = NAN, 0, NAN, 0
    assert np.flatnonzero(~read(rows).pushed).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("turned", "against", "why"), [(2, 0.002, False), (3, 0.003, True), (997, 0.997, True),
                                   (998, 0.998, False)]
)  # fmt: skip
def test_tokens_pushed_both_ways_are_of_another_term(
    turned: int, against: float, why: bool
) -> None:
    rows = batch(weight=1e-3, lengths=np.full(10, 100), levels=np.resize(LEVELS, 10),
                 x=np.resize(MOVED, 1000))  # fmt: skip
    rows["coef"][:turned] *= -1
    found = read(rows)
    assert found.against == pytest.approx(against)
    told = f"{against:.0%} of the tokens are pushed against their advantage"
    assert bool(found.why_not and found.why_not.startswith(told)) is why


def test_the_first_pass_alone_may_tell() -> None:
    """A KL term has no gradient before the first update."""
    first, second = batch(), batch(x=MOVED[::-1], minibatch=1)
    second["coef"] = second["coef"] * np.where(np.arange(len(MOVED)) % 2, 1.3, 0.7)
    found = read(joined(first, second))
    assert found.fits == {Core("plain"): {"seq"}}
    assert found.why_not is None
    assert found.only_first == (
        "no known loss gives these coefficients from advantage, ratio and lengths"
    )
    assert found.pushed.tolist() == [True] * len(MOVED) + [False] * len(MOVED)
    stopped = second | {"coef": np.where(np.arange(len(MOVED)) < 2, 0.0, second["coef"])}
    assert read(joined(first, stopped)).only_first
    for later in (second | {"minibatch": np.zeros(len(MOVED), int), "step": np.full(len(MOVED), 2)},
                  second):  # fmt: skip
        assert read(joined(first, later)).only_first
    assert not read(second | {"minibatch": np.zeros(len(MOVED), int)}).fits
    assert not read(joined(second | {"minibatch": first["minibatch"]}, second)).fits


def test_without_old_log_probabilities_a_ratio_counts_as_1() -> None:
    rows = halves(weight=EVEN, x=0.0) | {"logp_old": np.full(len(MOVED), NAN)}
    found = read(rows)
    assert found.fits[Core("plain")] == found.fits[Core("none")] == {"batch"}
    assert not found.ratio_moves


def test_a_token_without_a_log_probability_widens_no_bound() -> None:
    rows = halves(x=0.0) | {"logp": np.where(np.arange(len(MOVED)) == 9, NAN, -0.5)}
    assert Core("plain") in read(rows).fits
    rows["coef"][10] *= 1.3  # of the same rollout
    assert Core("plain") not in read(rows).fits


def test_where_a_ratio_fits_all_passes_the_first_is_not_asked() -> None:
    rows = joined(batch(), batch(x=MOVED[::-1], minibatch=1))
    found = read(rows)
    assert found.only_first is None
    assert found.pushed.all()


# ---- weights ------------------------------------------------------------------------------------


def weights(rows: Rows, **given: Any) -> Any:
    return Coefficient(**given).weight(evidence(rows))


def test_the_weight_of_a_mean_over_rollouts() -> None:
    rows = batch()
    assert weights(rows, form=("seq", 0.5)) == pytest.approx(np.repeat(0.5 / LENGTHS, LENGTHS))
    assert weights(rows) is None
    assert weights(rows, form=("group", 0.5)) is None


def test_the_weight_of_a_token_mean_is_one_over_the_tokens_of_a_step() -> None:
    two = joined(batch(), batch(minibatch=1), batch(lengths=LENGTHS[:3], levels=LEVELS[:3],
                                                    x=MOVED[:12], weight=1, step=2))  # fmt: skip
    fits = {Core("plain"): {"batch"}}
    made = weights(two, form=("even", 1 / 47), fits=fits)
    assert made == pytest.approx(np.r_[np.full(94, 1 / 47), np.full(12, 1 / 12)])
    assert weights(two, form=("even", 1.0009 / 47), fits=fits) is not None
    assert weights(two, form=("even", 1.0012 / 47), fits=fits) is None
    assert weights(two, form=("even", 1 / 47), fits={Core("plain"): {"sum"}}) is None


def test_evidence_of_some_rows_keeps_the_rest() -> None:
    seen = evidence(batch(), store_bits=7)
    some = seen.where(seen["advantage"] > 0)
    assert isinstance(some, Evidence)
    assert (some.rounding, some.manifest) == (2.0**-8, seen.manifest)
    assert len(some) == LENGTHS[LEVELS > 0].sum()


def test_hardly_a_token_with_gradient_asks_no_first_pass() -> None:
    rows = joined(batch(), batch(minibatch=1))
    rows["coef"][7:] = 0
    found = read(rows)
    assert (found.only_first, found.pushed.sum()) == (None, 7)
