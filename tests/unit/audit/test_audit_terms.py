"""What else is in the loss: each check at both sides of its bounds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.audit_rows import checked, evidence, joined, only, token_rows
from wapo_analysis.audit import terms
from wapo_analysis.audit.coefficient import Coefficient, Core
from wapo_analysis.audit.declared import Known
from wapo_analysis.audit.evidence import Evidence, Findings

NAN = np.nan
KNOWN = Known(name="grpo", cores=frozenset({Core("plain")}), means=frozenset({"seq"}))
LEVELS = np.array([-1.3, -0.7, 0.4, 1.1, 0.9, -0.2])
"""Advantages of rollouts, none a power of 2: such coefficients would pass for half-precise."""


def extra(seen: Evidence, declared: Known | None = KNOWN, **coefficient: Any) -> Findings:
    return checked(terms.check_extra_terms, seen, Coefficient(**coefficient), declared)


def flat_and_moved(idle: int, touched: int = 0, by: float = 0.013) -> dict[str, Any]:
    """Rollouts whose ratio has moved, and one of advantage 0, some of whose tokens are pushed."""
    moved = token_rows([7] * 6, advantage=LEVELS, log_ratio=0.3)
    still = token_rows([idle], advantage=0.0, log_ratio=0.3, rollout=6)
    still["coef"][:touched] = by
    return joined(moved, still)


# ---- gradient without advantage -----------------------------------------------------------------


@pytest.mark.parametrize(("idle", "known"), [(19, False), (20, True)])
def test_twenty_tokens_of_advantage_0_tell_of_other_terms(idle: int, known: bool) -> None:
    found = extra(evidence(flat_and_moved(idle)))
    assert not found.deviations
    if known:
        assert found.facts == {"other terms": "none: tokens of advantage 0 carry no gradient"}
    else:
        assert found.missing == {
            "other terms": "hardly a token has advantage 0, and hardly a rollout ratio 1 on every "
            "token"
        }


def test_twenty_idle_tokens_with_gradient_are_told() -> None:
    assert only(extra(evidence(flat_and_moved(20, 5)))).tokens == "5 of 20 tokens of advantage 0"
    assert not extra(evidence(flat_and_moved(19, 5))).deviations


def test_tokens_whose_coefficient_is_unknown_do_not_count() -> None:
    rows = flat_and_moved(25)
    rows["coef"][-6:] = NAN
    assert "other terms" in extra(evidence(rows)).missing


@pytest.mark.parametrize(("rollouts", "known"), [(4, False), (5, True)])
def test_five_rollouts_of_ratio_1_tell_of_other_terms(rollouts: int, known: bool) -> None:
    found = extra(evidence(token_rows([7] * rollouts, advantage=LEVELS[:rollouts])))
    assert not found.deviations
    assert not found.facts
    assert ("other terms" not in found.missing) is known


@pytest.mark.parametrize(("idle", "told"), [(100, True), (101, False)])
def test_one_pushed_token_of_a_hundred_is_told(idle: int, told: bool) -> None:
    rows = flat_and_moved(idle, 1, 0.5)
    found = extra(evidence(rows))
    assert len(found.deviations) == told
    if not told:
        assert found.facts["other terms"] == "none: tokens of advantage 0 carry no gradient"
        return
    share = 0.5 / np.abs(rows["coef"]).sum()
    assert found.facts["other terms"] == f"tokens of advantage 0 hold {share:.0%} of |coef|"
    assert only(found).name == "gradient without advantage"
    assert only(found).says == (
        f"tokens of advantage 0 carry {share:.0%} of |coef|, and no KL term is declared"
    )
    assert only(found).tokens == "1 of 100 tokens of advantage 0"


def test_a_batch_without_any_gradient_holds_no_other_term() -> None:
    found = extra(evidence(token_rows([5] * 8, advantage=0.0)))
    assert found.facts == {"other terms": "none: tokens of advantage 0 carry no gradient"}


@pytest.mark.parametrize(
    ("declared", "kl", "objective", "told"),
    [
        (KNOWN, None, {}, True),
        (None, None, {}, False),  # nothing says that there should be no KL term
        (None, None, {"beta": 0.0}, True),
        (KNOWN, [0.1], {}, False),
        (KNOWN, [NAN], {}, True),
        (KNOWN, [0.1], {"beta": 0.0}, True),
    ],
)
def test_a_term_that_may_be_meant_is_no_fault(
    declared: Known | None, kl: list[float] | None, objective: dict[str, Any], told: bool
) -> None:
    steps = {"step": [1]} | ({"kl_ref": kl} if kl else {})
    seen = evidence(flat_and_moved(50, 10), steps=steps, objective=objective)
    found = extra(seen, declared)
    assert bool(found.deviations) is told
    assert found.facts["other terms"].startswith("tokens of advantage 0 hold ")


def test_our_own_trainer_has_no_kl_term() -> None:
    seen = evidence(flat_and_moved(50, 10), source="built-in", objective={"beta": 0.5})
    assert only(extra(seen, None)).name == "gradient without advantage"


def pushed_apart(of: int, uneven: int, by: float, **given: Any) -> dict[str, Any]:
    """Rollouts at ratio 1, of some of which the first token is pushed by a share more."""
    rows = token_rows([7] * of, advantage=np.resize(LEVELS, of), **given)
    chosen = (rows["rollout"] < uneven) & (rows["position"] == 0)
    rows["coef"] = np.where(chosen, rows["coef"] * (1 + by), rows["coef"])
    return rows


@pytest.mark.parametrize(
    ("of", "uneven", "told"), [(8, 5, True), (8, 4, False), (500, 5, False), (490, 5, True)]
)
def test_rollouts_whose_tokens_are_pushed_apart_are_told(of: int, uneven: int, told: bool) -> None:
    found = extra(evidence(pushed_apart(of, uneven, 0.35), objective={"beta": 0.0}))
    assert len(found.deviations) == told
    if told:
        spread = (0.3 + 6 * 0.05) / 7 / 1.05
        assert only(found).says == (
            f"{uneven} of {of} rollouts push their tokens by different amounts though every ratio "
            "is 1, and no KL term is declared"
        )
        assert only(found).tokens == f"all tokens of these rollouts, {spread:.0%} apart"


@pytest.mark.parametrize(("by", "told"), [(1.5e-4, False), (1.9e-4, True)])
def test_what_the_rounding_of_the_record_explains_is_not_told(by: float, told: bool) -> None:
    # Four times 3.56e-5 of the mean, of which the first token holds a seventh.
    seen = evidence(pushed_apart(8, 6, by), objective={"beta": 0.0})
    assert bool(extra(seen).deviations) is told


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, True),
        ({"objective": {}}, False),  # a KL term may be meant
        ({"objective": {"beta": 0.1}}, False),
        ({"declared": None}, False),
        ({"declared": replace(KNOWN, cores=frozenset())}, False),
        ({"prox": -0.5}, True),
        ({"prox": -0.6}, False),  # a correction may weigh single tokens
        ({"prox": NAN}, True),
    ],
)
def test_weights_of_single_tokens_are_a_fault_where_none_is_declared(
    changed: dict[str, Any], told: bool
) -> None:
    rows = pushed_apart(8, 6, 0.35)
    if "prox" in changed:
        rows["logp_prox"] = np.full(len(rows["step"]), changed["prox"])
        rows["logp_old"] = np.full(len(rows["step"]), -0.5)
        rows["logp"] = np.where(np.isnan(rows["logp_prox"]), -0.5, rows["logp_prox"])
    seen = evidence(rows, objective=changed.get("objective", {"beta": 0.0}))
    assert bool(extra(seen, changed.get("declared", KNOWN)).deviations) is told


@pytest.mark.parametrize(("away", "told"), [(7.8e-5, True), (8.2e-5, False)])
def test_ratio_1_is_meant_up_to_rounding(away: float, told: bool) -> None:
    rows = pushed_apart(8, 6, 0.35)
    rows["logp_old"] = rows["logp_old"] - np.where(rows["position"] == 3, away, 0.0)
    assert bool(extra(evidence(rows, objective={"beta": 0.0})).deviations) is told


def test_only_rollouts_that_are_whole_and_have_one_advantage_are_compared() -> None:
    rows = pushed_apart(9, 6, 0.35)
    lost = (rows["rollout"] < 2) & (rows["position"] == 2)
    for name, value in (("coef", NAN), ("advantage", NAN)):
        seen = evidence(rows | {name: np.where(lost, value, rows[name])}, objective={"beta": 0.0})
        assert not extra(seen).deviations  # four are left
    every = np.where(rows["position"] == 2, 0.0, rows["coef"])
    assert only(extra(evidence(rows | {"coef": every}, objective={"beta": 0.0}))).says.startswith(
        "6 of 9 rollouts"
    )
    masked = evidence(rows | {"coef": np.where(lost, 0.0, rows["coef"])}, objective={"beta": 0.0})
    assert only(extra(masked)).says.startswith("6 of 9 rollouts")
    several = rows | {"advantage": np.where(rows["position"] == 2, 0.8, rows["advantage"])}
    assert "other terms" in extra(evidence(several, objective={"beta": 0.0})).missing
    unknown = rows | {"logp_old": np.full(len(rows["step"]), NAN)}
    assert extra(evidence(unknown, objective={"beta": 0.0})).deviations


def test_rollouts_without_any_push_are_not_counted() -> None:
    rows = pushed_apart(9, 6, 0.35)
    rows["coef"] = np.where(rows["rollout"] >= 7, 0.0, rows["coef"])
    seen = evidence(rows, objective={"beta": 0.0})
    assert only(extra(seen)).says.startswith("6 of 7 rollouts")
    idle = rows | {"advantage": np.where(rows["rollout"] >= 7, 0.0, rows["advantage"])}
    assert only(extra(evidence(idle, objective={"beta": 0.0}))).says.startswith("6 of 7 rollouts")


# ---- a constant push ----------------------------------------------------------------------------


def constant(
    c: float | tuple[float, ...], slope: float = 1.0, mean: str = "seq", levels: Any = LEVELS
) -> Findings:
    """Gradient passes with coef = w (slope A + c), c of each pass."""
    parts = []
    for number, more in enumerate(np.atleast_1d(c)):
        lengths = np.arange(3, 3 + len(levels))
        weight = np.repeat(1 / (lengths if mean == "seq" else np.full(len(lengths), 37)), lengths)
        rows = token_rows(lengths, advantage=levels, minibatch=number)
        parts.append(rows | {"coef": weight * (slope * rows["advantage"] + more)})
    return extra(evidence(joined(*parts)))


@pytest.mark.parametrize("mean", ["seq", "even"])
@pytest.mark.parametrize(
    ("c", "way", "cause"),
    [(0.25, "up", "an entropy bonus -log p with the wrong sign"),
     (-0.25, "down", "an entropy bonus on -log p of the sampled tokens")],
)  # fmt: skip
def test_the_same_push_on_every_token_is_told_in_units_of_the_advantage(
    c: float, way: str, cause: str, mean: str
) -> None:
    found = constant(c, mean=mean)
    told = only(found)
    assert told.name == f"constant push {'on' if c > 0 else 'against'} every token"
    assert told.says == found.facts["other terms"] == (
        f"beside its advantage, every token is pushed {way} by the same amount, that of an "
        f"advantage of {c:.2g}"
    )  # fmt: skip
    assert told.tokens == "all tokens of 6 rollouts, at ratio 1"
    assert told.cause.startswith(cause)


def test_a_push_is_in_units_of_an_advantage_of_its_own_size() -> None:
    assert constant(0.5, slope=2.0).facts["other terms"].endswith("an advantage of 0.25")
    assert constant(0.5, slope=-2.0).facts["other terms"].endswith("an advantage of -0.25")


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_push_without_any_advantage_is_told_so(way: str) -> None:
    found = constant(0.3 if way == "up" else -0.3, slope=0.0)
    assert only(found).says == (
        f"every token is pushed {way} by the same amount, whatever its advantage"
    )
    assert only(found).name == f"constant push {'on' if way == 'up' else 'against'} every token"


@pytest.mark.parametrize(("c", "told"), [(0.0070, False), (0.0078, True), (-0.0078, True)])
def test_a_push_that_rounding_may_be_is_not_told(c: float, told: bool) -> None:
    assert bool(constant(c).deviations) is told  # 160 times 3.56e-5 of (1.3 + c)


@pytest.mark.parametrize(
    ("slope", "said"), [(0.0040, "whatever its advantage"), (0.0047, "that of an advantage of 2.1")]
)
def test_an_advantage_with_hardly_an_effect_has_none(slope: float, said: str) -> None:
    told = only(constant(0.01 * 100 * 0.01 if slope > 0.0045 else 1.0, slope=slope))
    assert said in told.says


@pytest.mark.parametrize(("second", "told"), [(0.1009, True), (0.1012, False), (0.0985, False)])
def test_the_push_is_the_same_in_every_pass(second: float, told: bool) -> None:
    assert bool(constant((0.1, second)).deviations) is told


def test_the_push_of_three_passes_is_that_of_each() -> None:
    assert only(constant((0.1, 0.1, 0.1))).tokens == "all tokens of 18 rollouts, at ratio 1"
    assert not constant((0.1, 0.1, 0.2)).deviations


def test_two_advantages_make_no_line_and_a_bent_one_is_none() -> None:
    assert not constant(0.25, levels=np.resize([0.7, -0.9], 6)).deviations
    assert constant(0.25, levels=np.resize([0.7, -0.9, 0.1], 6)).deviations
    assert not constant(0.25, levels=np.resize([0.7, 0.70001, -0.9], 6)).deviations
    assert constant(0.25, levels=np.resize([0.7, 0.7002, -0.9], 6)).deviations
    lengths = np.arange(3, 9)
    rows = token_rows(lengths, advantage=LEVELS)
    bent = (LEVELS + 0.25) * (1 + np.array([0.0, 0.0, 0.002, 0.0, 0.0, 0.0]))
    rows["coef"] = np.repeat(bent / lengths, lengths)
    assert not extra(evidence(rows)).deviations


def test_a_push_with_an_effect_in_one_pass_alone_is_no_constant() -> None:
    lengths, parts = np.arange(3, 9), []
    for number, slope in enumerate((1.0, 0.0)):
        rows = token_rows(lengths, advantage=LEVELS, minibatch=number)
        weight = np.repeat(1 / lengths, lengths)
        parts.append(rows | {"coef": weight * (slope * rows["advantage"] + 0.25)})
    assert not extra(evidence(joined(*parts))).deviations
