"""Which ratio the coefficients of made-up gradient passes tell, and up to which rounding."""

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
    mean_of,
    read,
)
from tests.support.audit_rows import Rows, evidence, joined
from wapo_analysis.audit.coefficient import CORES, Coefficient, Core, read_coefficient
from wapo_analysis.audit.declared import settings_of
from wapo_analysis.audit.evidence import Evidence

NAN = np.nan


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


@pytest.mark.parametrize("kind", ["plain", "none"])
def test_rollouts_that_moved_far_as_a_whole_are_not_vespo_s(kind: str) -> None:
    """VESPO holds a rollout's ratio at e^20, so no rounding beyond it explains other losses."""
    lengths = np.arange(120, 200, 10)
    rows = batch(Core(kind), 1 / (8 * lengths), np.full(lengths.sum(), 0.15), lengths)
    assert "vespo" not in {core.kind for core in read(rows).fits}


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
    [(0.03, 0.3, True), (0.02, 0.3, False), (0.03, 0.01005, True), (0.03, 0.0099, False)],
)
def test_ratios_move_once_a_few_of_them_leave_1(share: float, by: float, moves: bool) -> None:
    x = np.where(np.arange(100) < share * 100, by + 8e-5, 0.0)
    rows = batch(x=x, lengths=[50, 50], levels=[1.3, -0.7], weight=0.01)
    assert read(rows).ratio_moves is moves


# ---- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "fits"), [(2.0e-4, True), (4e-3, False)])
def test_a_coefficient_is_held_to_the_rounding_of_the_record(by: float, fits: bool) -> None:
    lengths = np.full(4, 300)
    x = np.resize(MOVED, 1200)
    rows = batch(weight=1 / 1200, lengths=lengths, levels=LEVELS[:4], x=x)
    rows["coef"][::100] *= 1 + by
    assert (Core("plain") in read(rows).fits) is fits


@pytest.mark.parametrize(
    ("by", "fits"),
    [(2.7e-4, ["plain", "none"]), (2.8e-4, ["plain"]), (3.5e-4, ["plain"]), (3.6e-4, [])],
)
def test_a_ratio_is_rounded_beside_its_coefficient(by: float, fits: list[str]) -> None:
    """4.4 roundings and 2e-6 for the coefficient, twice and against a mean that has them too."""
    rows = batch(x=0.0, weight=1 / 32, lengths=np.full(8, 4))
    rows["coef"] = rows["coef"] * np.exp(by * np.resize([1.0, -1.0], 32))
    found = read(rows).fits
    assert [kind for kind in ("plain", "none") if Core(kind) in found] == fits


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


def test_one_token_far_out_tells_a_plain_ratio_from_one_that_is_held() -> None:
    """SAPO would put nothing on it, and no rounding makes that something."""
    x = np.where(np.arange(LENGTHS.sum()) == 0, 20.0, 0.0)
    assert set(read(batch(x=x)).fits) == {Core("plain")}


@pytest.mark.parametrize(("share", "fits"), [(0.9, True), (6.0, False)])
def test_the_rounding_of_a_whole_rollout_is_wide_where_the_loss_is_steep(
    share: float, fits: bool
) -> None:
    """VESPO falls as the 19th power of a rollout's ratio of 7."""
    lengths = np.full(8, 3)
    rows = batch(Core("vespo", "sum"), 1 / 24, np.full(24, np.log(7) / 3), lengths,
                 np.abs(LEVELS), logp=-20.0)  # fmt: skip
    bound = 1.1 * 2.0**-16 * 40 + 3e-6
    rows["logp_old"] = rows["logp_old"] + share * bound * np.repeat([1.0, -1.0] * 4, 3)
    assert (Core("vespo", "sum") in read(rows).fits) is fits


@pytest.mark.parametrize(("by", "fits"), [(0.03, True), (0.045, False)])
def test_one_minus_a_gate_next_to_1_has_lost_its_digits(by: float, fits: bool) -> None:
    """A ratio of 11 has the gate 1 - e^-10, of which float32 keeps three digits."""
    rows = batch(Core("sapo"), 1 / 32, np.full(32, np.log(11)), np.full(8, 4), np.abs(LEVELS),
                 logp=0.0)  # fmt: skip
    rows["coef"] = rows["coef"] * np.exp(by * np.resize([1.0, -1.0], 32))
    assert (Core("sapo") in read(rows).fits) is fits


def test_the_rounding_is_as_wide_as_the_settings_make_a_loss_steep() -> None:
    settings = settings_of({"config": {"vespo_lambda_pos": 12.0}})
    x = np.full(24, np.log(7) / 3)
    rows = batch(x=x, lengths=np.full(8, 3), levels=np.abs(LEVELS), logp=-20.0)
    made = np.exp(12 + 2 * np.log(7) - 12 * 7)
    rows["coef"] = rows["advantage"] * made / 24
    bound = 1.1 * 2.0**-16 * 40 + 3e-6
    rows["logp_old"] = rows["logp_old"] + 0.9 * bound * np.repeat([1.0, -1.0] * 4, 3)
    assert Core("vespo", "sum") in read_coefficient(evidence(rows), settings).fits


@pytest.mark.parametrize("total", [-18.0, -19.0, -25.0])
def test_vespo_holds_a_ratio_that_is_next_to_nothing(total: float) -> None:
    """At 1e-8: it goes on as the square of the ratio, and no further."""
    x = np.resize(0.1 * MOVED, 24)
    x[:3] = total / 3
    rows = batch(x=x, lengths=np.full(8, 3), levels=np.abs(LEVELS))
    held = np.maximum(np.bincount(rows["rollout"], x), np.log(1e-8))[rows["rollout"]]
    rows["coef"] = rows["advantage"] * np.exp(3 + 2 * held - 3 * np.exp(held)) / 24
    assert set(read(rows).fits) == {Core("vespo", "sum")}


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


@pytest.mark.parametrize("name", ["logp", "logp_old"])
@pytest.mark.parametrize("nothing", [NAN, -np.inf])
def test_a_token_without_a_log_probability_widens_no_bound(name: str, nothing: float) -> None:
    """Such a token counts as one of ratio 1."""
    rows = halves(x=0.0) | {name: np.where(np.arange(len(MOVED)) == 9, nothing, -0.5)}
    assert Core("plain") in read(rows).fits
    assert Core("plain", "sum") in read(rows).fits
    rows["coef"][10] *= 1.3  # of the same rollout
    assert not read(rows).fits


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
