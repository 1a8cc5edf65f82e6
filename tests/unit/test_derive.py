"""Derived columns and class totals against the taxonomy and against plain sums."""

import numpy as np
import pandas as pd
import pytest
import torch
import wapo_taxonomy as tax

from wapo_analysis.derive import (
    class_codes,
    class_names,
    class_totals,
    derive,
    probability_bin,
    run_sums,
    with_class,
)
from wapo_analysis.schema import PROB_EDGES, TOKENS
from wapo_analysis.stats import token_stats
from wapo_analysis.table import Records


def recorded(rows: int = 600, seed: int = 0) -> Records:
    """Consistent token rows from softmaxes of random logits."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(rows, 30)) * rng.uniform(0.5, 4, (rows, 1)))
    targets = torch.multinomial(
        logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed)
    ).squeeze(1)
    stats = token_stats(logits, targets)
    advantage = rng.choice([-1.0, 0.0, 1.0], rows)
    keys = {k: rng.integers(0, 4, rows) for k in ("group", "rollout", "position", "minibatch")}
    return Records.build(
        TOKENS,
        {
            **keys,
            "step": np.full(rows, 1),
            "rank": np.zeros(rows),
            "token_id": targets.numpy(),
            "advantage": advantage,
            "coef": advantage * 0.01,
            "kept": np.ones(rows, bool),
            **{name: getattr(stats, name).numpy() for name in stats._fields if name in TOKENS},
            "logp_after": stats.logp.numpy() + 0.01,
            "entropy_after": stats.entropy.numpy() - 0.02,
        },
    )


def test_derived_columns_follow_the_taxonomy() -> None:
    rows = derive(recorded(), temperature=1.0)
    prob = np.exp(rows["logp"].astype(float))
    textbook = np.sqrt(1 - 2 * prob + prob**2 + rows["collision_rest"])
    np.testing.assert_allclose(rows["grad_norm"], np.abs(rows["coef"]) * textbook, rtol=1e-4)
    assert set(np.unique(rows["cls"])) <= {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(rows["cls"] == 4, rows["advantage"] == 0)
    np.testing.assert_allclose(rows["dprob"], prob * np.expm1(0.01), rtol=1e-4)
    np.testing.assert_allclose(rows["dentropy"], -0.02, rtol=1e-4)
    assert all(name in rows for name in TOKENS.names)


def test_prediction_scales_with_the_square_of_the_temperature() -> None:
    rows = recorded()
    one, two = (derive(rows, t)["pred_dentropy"] for t in (1.0, 2.0))
    np.testing.assert_allclose(one, 4 * two)


def test_totals_are_the_sums_of_the_rows() -> None:
    rows = derive(recorded(), 1.0)
    totals = with_class(class_totals(rows).to_frame())
    assert totals.tokens.sum() == len(rows)
    for code in range(5):
        mine = rows.select(rows["cls"] == code)
        cell = totals[totals.cls == tax.CLASS_NAMES[code]]
        assert cell.tokens.sum() == len(mine), tax.CLASS_NAMES[code]
        np.testing.assert_allclose(cell.grad_mass.sum(), mine["grad_norm"].sum())
        np.testing.assert_allclose(cell.pred_dentropy_sum.sum(), mine["pred_dentropy"].sum())
        np.testing.assert_allclose(cell.dentropy_sum.sum(), mine["dentropy"].sum())
    assert totals.rescored.sum() == len(rows)


@pytest.mark.parametrize("missing", [0.0, 0.2, 1.0])
def test_totals_equal_a_grouped_data_frame(missing: float) -> None:
    """The naive program: one data frame, grouped by its five keys, NaN left out of sums."""
    rng = np.random.default_rng(0)
    rows = recorded()
    gone = {n: np.where(rng.random(600) < missing, np.nan, rows[n]) for n in ("coef", "entropy")}
    gone |= {"clipped": rng.random(600) < 0.3, "kept": rng.random(600) < 0.8}
    keys = {"step": rng.integers(3, 900, 600), "rank": rng.integers(0, 3, 600)}
    derived = derive(rows.with_columns({**keys, **gone}), 0.9)
    frame = derived.to_frame().astype({"entropy": float, "coef": float})
    terms = {
        "tokens": 1,
        "clipped": frame.clipped & frame.kept,
        "entropy_sum": frame.entropy,
        "coef_abs_sum": frame.coef.abs(),
        "grad_mass": frame.grad_norm,
        "pred_dentropy_sum": frame.pred_dentropy,
        "rescored": frame.dentropy.notna(),
    }
    names = ["step", "rank", "sign", "regime", "prob_bin"]
    expected = frame[names].assign(**terms).groupby(names).sum(min_count=1).reset_index()
    found = class_totals(derived)
    assert len(found) == len(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name].astype(float), rtol=1e-12)


def test_no_tokens_give_no_cells() -> None:
    assert len(class_totals(derive(recorded().select(np.zeros(600, bool)), 1.0))) == 0


def test_a_missing_statistic_makes_the_class_unknown_and_no_total_zero() -> None:
    rows = recorded()
    blind = rows["collision_rest"].copy()
    blind[:100] = np.nan
    derived = derive(rows.with_columns({"collision_rest": blind}), 1.0)
    assert (derived["cls"][:100][rows["advantage"][:100] != 0] == -1).all()
    assert np.isnan(derived["pred_dentropy"][:100]).all()
    totals = with_class(class_totals(derived).to_frame())
    assert totals.tokens.sum() == len(rows)
    unknown = totals.regime < 0
    assert unknown.any()
    assert totals.grad_mass[unknown].isna().all()
    assert np.isfinite(totals.grad_mass[~unknown]).all()


@pytest.mark.parametrize(
    ("prob", "index"), [(0.0, 0), (0.0099, 0), (0.01, 1), (0.5, 4), (0.999, 8), (1.0, 8)]
)
def test_probability_bins_are_half_open_and_one_is_in_the_last(prob: float, index: int) -> None:
    assert probability_bin(np.array([prob]))[0] == index
    assert index < len(PROB_EDGES) - 1


def test_bins_of_a_tensor_are_those_of_an_array() -> None:
    """At every edge, a hair below and above it, and of what is missing."""
    edges = np.array(PROB_EDGES)
    probs = np.concatenate([edges, np.nextafter(edges, 2), np.nextafter(edges, -1)])
    assert probability_bin(torch.from_numpy(probs)).tolist() == probability_bin(probs).tolist()
    last = len(PROB_EDGES) - 2
    assert probability_bin(edges).tolist() == [*range(last + 1), last]
    assert probability_bin(np.array([np.nan])) == probability_bin(torch.tensor([torch.nan])) == last


def test_class_names_and_codes_are_each_others_inverse() -> None:
    codes = np.array([-1, 0, 1, 2, 3, 4, 2], np.int8)
    names = pd.Series(class_names(codes))
    assert names.tolist() == [tax.CLASS_NAMES[code] for code in codes]
    assert names.cat.categories.tolist() == [*tax.CLASSES, "none", "unknown"]
    np.testing.assert_array_equal(class_codes(names), codes)
    np.testing.assert_array_equal(class_codes(names.astype(str)), codes)


def test_the_class_of_totals_follows_sign_and_regime() -> None:
    cells = pd.DataFrame({"sign": [1, 1, -1, -1, 0, 0, 1], "regime": [1, 0, 1, 0, 1, -1, -1]})
    expected = ["pos_peak", "pos_valley", "neg_peak", "neg_valley", "none", "none", "unknown"]
    assert with_class(cells)["cls"].tolist() == expected


def test_every_total_of_the_class_table_is_the_sum_of_its_rows() -> None:
    """Each column against a plain sum over the rows of its cell, kept and clipped mixed."""
    rng = np.random.default_rng(3)
    rows = recorded()
    flags = {"kept": rng.random(600) < 0.7, "clipped": rng.random(600) < 0.3}
    logp_old = (rows["logp"] + rng.normal(0, 0.3, 600)).astype(np.float32)
    coef = (rows["advantage"] * rng.uniform(0.1, 2, 600)).astype(np.float32)
    rows = derive(rows.with_columns({**flags, "logp_old": logp_old, "coef": coef}), 0.8)
    frame = rows.to_frame().astype({"logp": float, "coef": float})
    complement = -np.expm1(frame.logp)
    np.testing.assert_allclose(frame.ratio, np.exp(frame.logp - logp_old), rtol=1e-6)
    breaks = frame.pred_dentropy * np.asarray(tax.rule_dentropy_sign(rows["cls"])) < 0
    assert breaks.any()
    terms = {
        "kept": frame.kept, "clipped": frame.kept & frame.clipped, "logp_sum": frame.logp,
        "coef_sum": frame.coef, "coef_abs_sum": frame.coef.abs(),
        "grad_mass_proxy": frame.coef.abs() * complement, "pred_dprob_sum": frame.pred_dprob,
        "dprob_sum": frame.dprob, "rule_breaks": breaks, "rescored": frame.dentropy.notna(),
    }  # fmt: skip
    totals = class_totals(rows).to_frame()
    keys = ["sign", "regime", "prob_bin"]
    found = totals.set_index(keys)
    expected = frame[keys].assign(**terms).groupby(keys).sum()
    for name in terms:
        np.testing.assert_allclose(found[name], expected.loc[found.index, name], rtol=1e-9)
    assert (found["coef_sum"] * found.index.get_level_values("sign") >= 0).all()
    assert found["coef_sum"].abs().sum() > 1


def test_the_ratio_is_to_the_proximal_policy_where_there_is_one() -> None:
    rows = recorded(4)
    old, prox = rows["logp"] - np.float32(0.5), np.array([-1, np.nan, -2, np.nan], np.float32)
    ratio = derive(rows.with_columns({"logp_old": old, "logp_prox": prox}), 1.0)["ratio"]
    plain = np.exp(rows["logp"].astype(float) - np.where(np.isnan(prox), old, prox))
    np.testing.assert_allclose(ratio, plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "starts", "sums"),
    [
        ([1.0, 2.0, 4.0], [0, 2], [3.0, 4.0]), ([1.0, np.nan, 4.0], [0, 2], [1.0, 4.0]),
        ([np.nan, np.nan, 4.0], [0, 2], [np.nan, 4.0]), ([np.nan], [0], [np.nan]),
        ([1, 2, 4], [0, 1], [1, 6]), ([], [], []), ([1.0, 2.0], [], []),
    ],
)  # fmt: skip
def test_sums_of_runs_leave_out_what_is_missing(
    values: list[float], starts: list[int], sums: list[float]
) -> None:
    found = run_sums(np.array(values), np.array(starts, np.int64))
    np.testing.assert_array_equal(found, sums)
