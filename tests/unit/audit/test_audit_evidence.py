"""What an audit looks at: rounding, units, groups, first passes, and what runs declare."""

from math import inf
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.audit_rows import evidence, joined, token_rows
from wapo_analysis.audit.coefficient import Core
from wapo_analysis.audit.declared import (
    ANY,
    OWN,
    TRL,
    Known,
    declared_of,
    library,
    look,
    settings_of,
)
from wapo_analysis.audit.evidence import Evidence, Findings, by_unit, exponential, first_of

NAN = np.nan
LENGTHS = [3, 5, 4]


# ---- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "rounding"),
    [({}, 2.0**-16), ({"store_bits": 7}, 2.0**-8), ({"store_bits": None}, 2.0**-16)],
)
def test_the_rounding_of_a_record_is_half_its_last_bit(
    manifest: dict[str, Any], rounding: float
) -> None:
    assert evidence(token_rows(LENGTHS), **manifest).rounding == rounding
    rows = token_rows([2])
    plain = Evidence.of(rows, pd.DataFrame(), pd.DataFrame(), {}, rounding=0.25)
    assert plain.rounding == 0.25
    assert Evidence(columns=rows, rollouts=pd.DataFrame(), steps=pd.DataFrame(),
                    manifest={}).rounding == 2.0**-16  # fmt: skip


def test_the_error_of_a_ratio_is_that_of_both_its_logs() -> None:
    seen = evidence(token_rows([1, 1, 1, 1], logp=[-2.0, -1.0, 0.0, -2.0],
                               logp_old=[-3.0, -1.0, -8.0, NAN]))  # fmt: skip
    bound = [1.1 * 2.0**-16 * size + 3e-6 for size in (5, 2, 8, 2)]
    assert seen.ratio_error == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize(("x", "one"), [(0.99, True), (1.0, True), (1.01, False), (NAN, True)])
def test_a_ratio_is_1_up_to_four_times_its_error(x: float, one: bool) -> None:
    bound = 4 * 3e-6 / (1 - 4 * 1.1 * 2.0**-16) * (1 - 1e-12)
    rows = token_rows([2], logp=0.0, log_ratio=np.array([x, -x]) * bound)
    assert evidence(rows).at_one.tolist() == [one, one]


def test_a_ratio_to_a_probability_of_0_counts_as_1() -> None:
    assert evidence(token_rows([2], logp_old=-inf)).at_one.tolist() == [True, True]
    assert evidence(token_rows([2], logp=-inf, logp_old=-inf)).at_one.all()


def test_the_ratio_is_of_the_proximal_policy_where_there_is_one() -> None:
    seen = evidence(token_rows([1, 1], logp=-1.0, logp_old=-3.0, logp_prox=[-1.5, NAN]))
    assert seen.log_ratio.tolist() == [0.5, 2.0]


BFLOAT = np.array([1.0078125, 0.5, 3.0, -1.25, 2.0, 0.75, 1.5, -6.0])
HALF = BFLOAT + 2.0**-10 * np.array([1, 0, 0, 1, 0, 1, 0, 0])
FULL = 2.2 * 2.0**-16 + 2e-6


@pytest.mark.parametrize(
    ("coef", "error"),
    [
        (BFLOAT, 0.025), (BFLOAT[:7], FULL), (HALF, 0.004), (HALF[:7], FULL),
        (HALF + 2.0**-11, FULL), (np.full(9, 0.1), FULL),
        (np.r_[BFLOAT, 0.0, NAN], 0.025), (np.r_[BFLOAT[:7], 0.0, NAN], FULL),
    ],
)  # fmt: skip
def test_coefficients_on_a_half_precise_grid_have_wide_bounds(coef: Any, error: float) -> None:
    seen = evidence(token_rows([len(coef)], coef=np.asarray(coef)))
    assert seen.coef_error == pytest.approx(error, rel=1e-12)


def test_logs_of_any_size_have_an_exp() -> None:
    assert exponential(np.array([-1e6, -700.0, 0.0, 700.0, 1e6])).tolist() == [
        np.exp(-700.0), np.exp(-700.0), 1.0, np.exp(700.0), np.exp(700.0),
    ]  # fmt: skip


# ---- units and groups ---------------------------------------------------------------------------


def test_a_unit_is_one_rollout_in_one_pass_of_a_process() -> None:
    keys = {"step": [1, 1, 1, 1, 2, 1], "rank": [0, 0, 1, 0, 0, 0], "minibatch": [0, 1, 0, 0, 0, 0],
            "rollout": [5, 5, 5, 7, 5, 5], "group": [0, 0, 0, 1, 0, -1]}  # fmt: skip
    rows = token_rows([1] * 6, **keys)
    seen = evidence(rows)
    assert seen.units.tolist() == [0, 2, 3, 1, 4, 0]
    assert seen.passes.tolist() == [0, 1, 2, 0, 3, 0]
    assert seen.members.tolist() == [0, 0, 2, 1, 3, 0]
    apart = seen.groups
    assert apart[5] == -1
    assert len(set(apart[:5])) == 4  # of a loop, processes count groups on their own
    assert apart[0] == apart[1]
    together = evidence(rows, source="trl").groups
    assert together[0] == together[1] == together[2]
    assert len(set(together[:5])) == 3


def test_numbers_that_a_source_cannot_tell_are_minus_1() -> None:
    rows = token_rows([1, 1], rollout=[NAN, 3.0], group=[2.0, NAN])
    table = {"step": [1], "group": [None], "rollout": [4.0], "reward": [0.5]}
    seen = evidence(rows, table)
    assert seen["rollout"].tolist() == [-1, 3]
    assert seen["group"].tolist() == [2, -1]
    assert seen.groups.tolist() == [1, -1]
    assert seen.rollouts[["group", "rollout"]].to_numpy().tolist() == [[-1, 4]]


def test_no_rows_have_no_units() -> None:
    rows = {name: values[:0] for name, values in token_rows([2]).items()}
    seen = evidence(rows)
    assert len(seen) == 0
    assert seen.units.tolist() == []


def test_means_by_number() -> None:
    assert first_of(np.array([1, 0, 1, 2, 0])).tolist() == [1, 0, 3]
    made = by_unit(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 2]), 3)
    assert made[[0, 2]].tolist() == [2.0, 5.0]
    assert np.isnan(made[1])


# ---- first passes -------------------------------------------------------------------------------


def test_a_first_pass_is_the_first_of_a_step_that_sampled_anew() -> None:
    rows = joined(*(
        token_rows([1], step=step, minibatch=n) for step in (1, 2, 3) for n in (0, 1)
    ))  # fmt: skip
    assert evidence(rows).first_passes().tolist() == [True, False] * 3
    config = {"num_iterations": 2}
    seen = evidence(rows, source="trl", config=config)
    assert seen.fresh_steps() == [1, 3]
    assert seen.first_passes().tolist() == [True, False, False, False, True, False]


def test_a_table_that_numbers_no_passes_may_hold_a_later_one() -> None:
    rows = token_rows([2])
    assert evidence(rows, source="import").first_passes().tolist() == [False, False]
    assert evidence(rows).first_passes().tolist() == [True, True]
    numbered = joined(rows, rows | {"minibatch": np.array([0, 1])})
    assert evidence(numbered, source="import").first_passes().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("manifest", "steps", "sampled"),
    [
        ({}, {}, False),
        ({"token_fraction": 1.0}, {}, False),
        ({"token_fraction": 0.99}, {}, True),
        ({}, {"token_fraction": [1.0, 1.0]}, False),
        ({}, {"token_fraction": [1.0, 0.5]}, True),
        ({"token_fraction": 0}, {}, False),  # not known
    ],
)
def test_some_rollouts_may_have_rows(
    manifest: dict[str, Any], steps: dict[str, Any], sampled: bool
) -> None:
    seen = evidence(token_rows([2]), steps={"step": [1, 2], **steps}, **manifest)
    assert seen.sampled is sampled


@pytest.mark.parametrize(("temperature", "scale"), [(None, 1.0), (2.0, 0.25)])
def test_derived_columns_are_at_the_temperature_of_the_run(
    temperature: float | None, scale: float
) -> None:
    rows = token_rows([2], collision_rest=0.1, entropy=1.0, collision_logp_rest=-0.2)
    one = evidence(rows, temperature=temperature).derived["pred_dentropy"]
    assert one == pytest.approx(scale * evidence(rows).derived["pred_dentropy"])


def test_a_kind_of_deviation_is_told_once() -> None:
    found = Findings()
    for says in ("first", "second"):
        found.deviates("a", says, tokens="", cause="", look="")
    found.deviates("b", "third", tokens="", cause="", look="")
    assert [d.says for d in found.deviations] == ["first", "third"]


# ---- what a run declares ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "changed"),
    [
        ({}, {}),
        ({"objective": {"bounds": [0.8, 1.2]}}, {"bounds": (0.8, 1.2)}),
        ({"objective": {"bounds": [None, 1.2]}}, {"bounds": (0.0, 1.2)}),
        ({"objective": {"bounds": [0.8, None]}}, {"bounds": (0.8, inf)}),
        ({"config": {"epsilon_high": 0.3}}, {"cap": 0.3}),
        ({"config": {"epsilon_high": 0}}, {}),
        ({"config": {"epsilon_high": 2}}, {"cap": 2.0}),
        ({"config": {"epsilon_high": None, "vespo_k_pos": "x"}}, {}),
        ({"config": {"sapo_temperature_neg": 2}}, {"sapo": (1.0, 2.0)}),
        ({"config": {"vespo_k_neg": 5, "vespo_lambda_neg": 6}}, {"vespo": (2.0, 3.0, 5.0, 6.0)}),
    ],
)
def test_numbers_of_the_losses_are_the_usual_ones_unless_told(
    manifest: dict[str, Any], changed: dict[str, Any]
) -> None:
    usual = {"bounds": (0.0, inf), "cap": 5.0, "sapo": (1.0, 1.05), "vespo": (2.0, 3.0, 3.0, 2.0)}
    assert settings_of(manifest) == usual | changed


def declared(source: str, config: dict[str, Any] | None = None, **objective: Any) -> Known | None:
    return declared_of({"source": source, "objective": objective, "config": config})


POPULATION, SAMPLE = "group mean, population std", "group mean, sample std"


@pytest.mark.parametrize(
    ("objective", "cores", "means", "advantages", "positive"),
    [
        ({"name": "grpo"}, {Core("plain")}, {"seq"}, {POPULATION}, False),
        ({"name": "grpo", "loss_mean_level": "global"}, {Core("plain")}, {"batch"}, {POPULATION},
         False),
        ({"name": "grpo", "loss_mean_level": "group"}, {Core("plain")}, {"group"}, {POPULATION},
         False),
        ({"name": "grpo", "loss_mean_level": "fixed_length"}, {Core("plain")}, {"constant"},
         {POPULATION}, False),
        ({"name": "grpo", "use_importance_sampling": True}, {Core("plain")}, {"seq"}, {POPULATION},
         False),
        ({"name": "grpo", "mask_negative_advantages": True}, {Core("plain")}, {"seq"}, {POPULATION},
         True),
        ({"name": "grpo", "include_bins": ["pos"]}, {Core("plain")}, {"seq"}, {POPULATION}, None),
        ({"name": "grpo", "exclude_bins": ["neg"]}, {Core("plain")}, {"seq"}, {POPULATION}, None),
        ({"name": "grpo", "normalize_by_kept_tokens": True}, {Core("plain")}, {"seq"},
         {POPULATION}, False),
        ({"name": "dapo", "normalize_by_kept_tokens": True, "loss_mean_level": "global"},
         {Core("plain")}, {"batch", "pass"}, {POPULATION}, False),
        ({"name": "gspo"}, {Core("plain", "mean")}, {"seq"}, {POPULATION}, False),
        ({"name": "raft++"}, OWN["raft++"].cores, OWN["raft++"].means, OWN["raft++"].advantages,
         OWN["raft++"].positive_only),
    ],
)  # fmt: skip
def test_settings_of_our_own_trainer_say_which_loss_is_meant(
    objective: dict[str, Any], cores: Any, means: Any, advantages: Any, positive: bool | None
) -> None:
    known = declared("built-in", **objective)
    assert known is not None
    assert (known.cores, known.means, known.positive_only) == (cores, means, positive)
    assert known.advantages == advantages
    assert known == declared("trl", **({"loss_mean_level": None} | objective))


@pytest.mark.parametrize(
    ("name", "config", "cores", "means", "advantages"),
    [
        ("grpo", {}, {Core("plain")}, {"seq"}, {SAMPLE}),
        ("GRPO", {"scale_rewards": True}, {Core("plain")}, {"seq"}, {SAMPLE}),
        ("grpo", {"scale_rewards": False}, {Core("plain")}, {"seq"}, {"group mean"}),
        ("grpo", {"scale_rewards": "none"}, {Core("plain")}, {"seq"}, {"group mean"}),
        ("grpo", {"scale_rewards": "batch"}, {Core("plain")}, {"seq"},
         {"group mean, sample std of the batch"}),
        ("grpo", {"scale_rewards": "other"}, {Core("plain")}, {"seq"}, None),
        ("rloo", {}, {Core("plain", "sum")}, {"sum"}, None),
        ("gmpo", {}, {Core("gmpo", "mean"), Core("plain", "mean")}, {"seq"}, None),
        ("luspo", {}, {Core("plain")}, {"sum"}, {SAMPLE}),
        ("luspo", {"importance_sampling_level": "sequence"}, {Core("plain", "mean")}, {"sum"},
         {SAMPLE}),
        ("grpo", {"importance_sampling_level": "sequence"}, {Core("plain", "mean")}, {"seq"},
         {SAMPLE}),
        ("vespo", {"importance_sampling_level": "sequence"}, {Core("vespo", "sum")}, {"batch"},
         {SAMPLE}),
        ("grpo", {"importance_sampling_level": "token"}, {Core("plain")}, {"seq"}, {SAMPLE}),
        ("dapo", {"use_vllm": True}, frozenset(), frozenset(), {SAMPLE}),
    ],
)  # fmt: skip
def test_settings_of_trl_say_which_loss_is_meant(
    name: str, config: dict[str, Any], cores: Any, means: Any, advantages: Any
) -> None:
    known = declared("trl", config, name=name, bounds=[0.8, 1.2])
    assert known is not None
    assert (known.cores, known.means, known.advantages) == (cores, means, advantages)
    assert known.bounds == (0.8, 1.2)


def test_a_loss_of_ours_in_trl_is_known_by_its_name() -> None:
    assert declared("trl", name="wapo") == OWN["wapo"]
    assert declared("trl", name="nothing of the kind") is None
    assert declared("built-in", name="nothing of the kind") is None
    assert declared("trl") is None


@pytest.mark.parametrize("name", [None, "", "unknown"])
def test_a_loop_that_names_no_loss_declares_none(name: str | None) -> None:
    assert declared("loop", name=name) is None


def test_a_loop_may_state_its_ratio_mean_and_advantage() -> None:
    other = declared("loop", name="mine")
    assert other == Known(name="mine", positive_only=None)
    known = declared("loop", name="grpo")
    assert known == ANY["grpo"]
    stated = declared("loop", name="mine", ratio="no ratio", mean="tokens", advantage="x")
    assert stated is not None
    assert (stated.cores, stated.means) == ({Core("none")}, {"batch"})
    assert stated.advantages == {"x"}
    several = declared("loop", name="mine", ratio=["token ratio", "rollout ratio (sum)"],
                       mean=["rollout", "group"], advantage=["a", "b"])  # fmt: skip
    assert several is not None
    assert several.cores == {Core("plain"), Core("plain", "sum")}
    assert several.means == {"seq", "group"}
    assert several.advantages == {"a", "b"}
    strange = declared("loop", name="grpo", ratio=["token ratio", "odd"], mean=["tokens", "odd"])
    assert strange == ANY["grpo"]


def test_names_that_sources_use_differently_mean_either() -> None:
    assert library("built-in") is OWN
    assert library("trl") is TRL
    assert library("loop") is library("import") is ANY
    assert ANY["dapo"].means == OWN["dapo"].means | TRL["dapo"].means
    assert ANY["dr_grpo"].means == OWN["dr_grpo"].means | TRL["dr_grpo"].means | {"padded"}
    assert ANY["reinforce"].cores == {Core("none")}
    assert ANY["sapo"] == TRL["sapo"]
    assert ANY["grpo"].mean == "mean over each rollout's tokens"


def test_where_to_look_is_by_trainer() -> None:
    assert look("verl", "ratio") == "core_algos.compute_policy_loss"
    assert look("loop", "ratio") == "the lines that make ratio and clipped ratio"
