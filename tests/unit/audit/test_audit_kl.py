"""The sign of a KL term, and what the weights of a loss sum to: both sides of each bound."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.audit_rows import checked, evidence, joined, only, token_rows
from wapo_analysis.audit import terms
from wapo_analysis.audit.coefficient import Coefficient, Core
from wapo_analysis.audit.declared import Known
from wapo_analysis.audit.evidence import Evidence, Findings, Sum

NAN = np.nan
KNOWN = Known(name="grpo", cores=frozenset({Core("plain")}), means=frozenset({"seq"}))


def extra(seen: Evidence, declared: Known | None = KNOWN, **coefficient: Any) -> Findings:
    return checked(terms.check_extra_terms, seen, Coefficient(**coefficient), declared)


# ---- the sign of a KL term ----------------------------------------------------------------------


def with_kl(
    push: Any, beta: float = 2.0, tokens: int = 120, level: float = 0.3,
    passes: int = 1, log_ratio: float = 0.0, **objective: Any,
) -> Findings:  # fmt: skip
    """Rollouts of ten tokens at ratio 1; the KL term pushes them by these multiples of beta."""
    number = tokens // 10
    advantage = np.where(np.arange(number) % 2, -level, level)
    parts = []
    for place in range(passes):
        rows = token_rows([10] * number, advantage=advantage, log_ratio=log_ratio, minibatch=place)
        rows["coef"] = (rows["advantage"] + beta * np.resize(push, tokens)) / 10 / number
        parts.append(rows)
    seen = evidence(joined(*parts), objective={"beta": beta, **objective}, config={})
    return extra(seen, form=("seq", 1 / number), fits={Core("plain"): {"seq"}})


def test_a_kl_term_that_pulls_to_its_reference_is_a_fact() -> None:
    found = with_kl([-0.9, -0.4, 0.2, 0.4])
    assert found.facts == {"other terms": "a KL term of 2, as declared"}
    assert not found.deviations


def test_a_kl_term_that_pushes_away_is_told() -> None:
    told = only(with_kl([0.4, 0.1, -0.2, 0.9]))
    assert told.name == "KL with the wrong sign"
    assert told.says == (
        "the KL term pushes the tokens of the policy up by 0.3 beta on average, so its sign is "
        "turned"
    )
    assert told.tokens == "120 tokens of first passes"


@pytest.mark.parametrize(
    ("push", "told"),
    [
        ([0.049], False), ([0.052], True),
        # A mean of 0.1 is sure beyond six of its standard errors: of 120 tokens, 0.1826 around it.
        ([0.1 - 0.19, 0.1 + 0.19], False), ([0.1 - 0.175, 0.1 + 0.175], True),
    ],
)  # fmt: skip
def test_a_mean_push_counts_once_it_is_sure(push: list[float], told: bool) -> None:
    assert bool(with_kl([push[0] * 0.999, *push[1:]] if len(push) == 1 else push).deviations) is (
        told
    )


def test_k3_never_pushes_down_by_more_than_beta() -> None:
    lows = np.zeros(120)
    lows[:5] = -3.1
    assert not with_kl(lows).deviations
    told = only(with_kl(lows, kl="k3"))
    assert told.says == (
        "the KL term pushes tokens down by up to 3.1 beta; k3 never pushes by more than beta, so "
        "its sign is turned"
    )
    few = np.where(np.arange(120) < 4, -3.1, 0.0)
    assert not with_kl(few, kl="k3").deviations
    both = lows.copy()
    both[-1] = 1.1
    assert not with_kl(both, kl="k3").deviations
    both[-1] = 1.01
    assert with_kl(both, kl="k3").deviations
    assert not with_kl(np.where(lows < 0, -1.01, 0.0), kl="k3").deviations
    assert with_kl(np.where(lows < 0, -1.03, 0.0), kl="k3").deviations


@pytest.mark.parametrize(
    ("objective", "config", "k3"),
    [({"kl": "k3"}, {}, True), ({}, {"use_bias_correction_kl": False}, True),
     ({}, {"use_bias_correction_kl": True}, False), ({"kl": "k2"}, {}, False), ({}, {}, False)],
)  # fmt: skip
def test_which_estimate_a_run_says_it_uses(
    objective: dict[str, Any], config: dict[str, Any], k3: bool
) -> None:
    seen = evidence(token_rows([3]), objective=objective, config=config)
    assert terms._is_k3(seen) is k3


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ({}, True),
        ({"tokens": 100}, True),
        ({"tokens": 90}, False),
        ({"tokens": 60, "passes": 2}, False),  # later passes follow an update
        ({"log_ratio": 7.8e-5}, True),
        ({"log_ratio": 8.4e-5}, False),
        ({"level": 8.7}, True),  # of 2 beta a hundredth: 8.75 (2e-3 + 8 coef_error)
        ({"level": 8.9}, False),
        ({"beta": -1.0}, False),
    ],
)
def test_a_kl_term_is_seen_where_it_stands_alone(changed: dict[str, Any], known: bool) -> None:
    found = with_kl(np.array([0.31, 0.27, 0.43]), **changed)
    assert bool(found.deviations) is known
    assert known or not found.facts


def test_a_kl_term_needs_the_weights_of_the_mean() -> None:
    rows = token_rows([10] * 12, advantage=0.3)
    rows["coef"] = (rows["advantage"] + np.resize([0.3, 0.5], 120) * 2) / 120
    seen = evidence(rows, objective={"beta": 2.0})
    assert not extra(seen).deviations
    assert not extra(seen).facts
    assert extra(seen, form=("seq", 1 / 12)).deviations


# ---- what the weights sum to --------------------------------------------------------------------


def scaled(
    form: str, totals: list[float], passes: list[float], declared: Known | None = None
) -> Findings:
    n = len(totals)
    total = Sum(np.array(totals), 1, np.array(passes), np.full(n, NAN))
    seen = evidence(token_rows([3]))
    return checked(terms.check_scale, seen, Coefficient(scale={form: total}), declared)


@pytest.mark.parametrize(
    ("form", "totals", "passes", "told"),
    [
        ("seq", [0.25, 0.25], [4, 4], "mean over each rollout's tokens"),
        ("seq of kept tokens", [0.5], [2], "mean over each rollout's tokens"),
        ("even", [0.5], [2], "token mean"),
        ("pass", [0.5], [2], "token mean over each gradient pass"),
        ("seq", [0.25 * 1.0009, 0.25], [4, 4], "mean over each rollout's tokens"),
        ("seq", [0.25 * 1.0012, 0.25], [4, 4], ""),
        ("seq", [0.25 * 0.9988, 0.25], [4, 4], ""),
        ("seq", [0.25, 0.5], [4, 4], ""),
        ("seq", [0.25, 1.0], [4, 1], "mean over each rollout's tokens"),
        ("seq", [1.0], [1], ""),
        ("group", [0.25], [4], ""),
    ],
)
def test_weights_of_one_over_the_passes_are_divided_twice(
    form: str, totals: list[float], passes: list[float], told: str
) -> None:
    found = scaled(form, totals, passes)
    assert len(found.deviations) == bool(told)
    if told:
        assert only(found).name == "loss divided twice by accumulation"
        assert only(found).says == (
            f"as a {told}, the weights of a step sum to {totals[0]:.3g} = 1 / {passes[0]}, the "
            "number of its gradient passes"
        )


BATCH = replace(KNOWN, name="dapo", means=frozenset({"batch"}))


@pytest.mark.parametrize(
    ("totals", "declared", "told"),
    [
        ([0.9, 0.8], BATCH, True),
        ([0.998, 0.8], BATCH, True),
        ([0.999, 0.8], BATCH, True),
        ([0.9995, 0.8], BATCH, False),  # one step is whole
        ([0.9], BATCH, False),
        ([0.9, 0.9005], BATCH, False),  # the same share in every step is a scale
        ([0.9, 0.8], KNOWN, False),
        ([0.9, 0.8], None, False),
        ([0.1, 0.2, 0.3, 0.4, 0.5], BATCH, True),
    ],
)
def test_a_token_mean_that_counts_more_tokens_than_it_has_is_told(
    totals: list[float], declared: Known | None, told: bool
) -> None:
    found = scaled("even", totals, [1.0] * len(totals), declared)
    assert len(found.deviations) == told
    if told:
        shown = ", ".join(f"{t:.3g}" for t in totals[:4])
        assert only(found).name == "another mean"
        assert f"the weights sum to {shown}, not to 1 as in dapo" in only(found).says
    assert not scaled("seq", totals, [1.0] * len(totals), declared).deviations


@pytest.mark.parametrize(
    ("totals", "passes", "updates", "ranks", "told"),
    [
        ([4, 4], [4, 4], [1, 1], 1, True),
        ([4, 4], [4, 4], [4, 4], 1, False),  # an update each
        ([4, 4], [4, 4], [1, 4], 1, False),
        ([4, 4], [4, 4], [1, NAN], 1, False),
        ([4, 4], [4, 4], [1, 1], 2, False),
        ([1, 1], [4, 4], [1, 1], 1, False),
        ([4, 4.003], [4, 4], [1, 1], 1, True),
        ([4, 4.005], [4, 4], [1, 1], 1, False),
        ([4, 3.995], [4, 4], [1, 1], 1, False),
    ],
)
def test_micro_batches_that_are_summed_are_told(
    totals: list[float], passes: list[float], updates: list[float], ranks: int, told: bool
) -> None:
    total = Sum(np.array(totals), ranks, np.array(passes), np.array(updates, float))
    found = checked(terms.check_scale, evidence(token_rows([3])), Coefficient(summed=total), None)
    assert len(found.deviations) == told
    if told:
        assert only(found).name == "micro-batches are summed"
        assert only(found).says == (
            "the weights of a step sum to 4, the number of its gradient passes, but updates are 1"
        )


def test_what_a_step_log_says_of_a_reference_counts() -> None:
    seen = evidence(token_rows([3]), steps=pd.DataFrame({"step": [1, 2], "kl_ref": [NAN, 0.1]}))
    assert terms._may_have_kl(seen)
