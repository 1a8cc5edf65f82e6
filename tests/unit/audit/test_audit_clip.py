"""Where the clip of a loss bites: at both sides of its bounds."""

import math
from typing import Any

import numpy as np
import pytest

from tests.support.audit_rows import checked, evidence, joined, only, token_rows
from wapo_analysis.audit import checks
from wapo_analysis.audit.coefficient import Coefficient, Core
from wapo_analysis.audit.declared import Known
from wapo_analysis.audit.evidence import Findings

NAN = np.nan


PLAIN = Coefficient(fits={Core("plain"): {"seq"}}, ratio_moves=True)
CLIPPED = Known(name="grpo", cores=frozenset({Core("plain")}), bounds=(0.8, 1.2))
OPEN = Known(name="grpo", cores=frozenset({Core("plain")}))


def clipped(
    *bands: tuple[int, float, float, bool],
    coefficient: Coefficient = PLAIN,
    declared: Known | None = CLIPPED,
    calm: int = 40,
    **given: Any,
) -> Findings:
    """Bands of tokens (sign of A, lowest and highest ratio, with gradient), five tokens each.

    Beside them stand tokens of ratio 1, with gradient, of both signs.
    """
    sign = np.r_[np.repeat([s for s, *_ in bands], 5), np.tile([1, -1], calm // 2)]
    ratio = np.r_[*(np.linspace(low, high, 5) for _, low, high, _ in bands), np.ones(calm)]
    alive = np.r_[np.repeat([a for *_, a in bands], 5), np.ones(calm, bool)]
    n = len(sign)
    rows = token_rows([n], advantage=sign.astype(float), logp=0.0, log_ratio=np.log(ratio))
    rows["coef"] = np.where(alive, rows["coef"], 0.0)
    return checked(checks.check_clip, evidence(rows | given), coefficient, declared)


@pytest.mark.parametrize(
    ("bands", "fact"),
    [
        ([], "stops no token"),
        ([(1, 1.21, 1.5, False)], "stops A > 0 above 1.21"),
        ([(-1, 0.5, 0.79, False)], "stops A < 0 below 0.79"),
        ([(1, 1.21, 1.5, False), (-1, 0.5, 0.79, False)],
         "stops A > 0 above 1.21; stops A < 0 below 0.79"),
        ([(1, 1.05, 1.19, True), (-1, 0.81, 0.95, True)], "stops no token"),
    ],
)  # fmt: skip
def test_a_clip_within_its_bounds_is_a_fact(bands: Any, fact: str) -> None:
    found = clipped(*bands)
    assert found.facts == {"clip": fact}
    assert not found.deviations


@pytest.mark.parametrize(
    ("band", "says"),
    [
        ((1, 1.21, 1.5, True), "tokens with A > 0 keep their gradient beyond the clip bound 1.2 "
         "(ratio up to 1.5)"),
        ((-1, 0.5, 0.79, True), "tokens with A < 0 keep their gradient beyond the clip bound 0.8 "
         "(ratio up to 0.5)"),
    ],
)  # fmt: skip
def test_gradient_beyond_the_declared_bound_is_told(band: Any, says: str) -> None:
    told = only(clipped(band))
    assert (told.name, told.says, told.tokens) == ("clip does not act", says, "5 tokens")
    assert not clipped(band, declared=OPEN).deviations
    assert not clipped(band, declared=None).deviations
    other = Known(name="x", cores=frozenset({Core("none"), Core("plain", "mean")}),
                  bounds=(0.8, 1.2))  # fmt: skip
    assert not clipped(band, declared=other).deviations


@pytest.mark.parametrize(
    ("bounds", "told"),
    [((0.8, math.inf), [False, True]), ((0.0, 1.2), [True, False]), ((0.0, math.inf), [False] * 2)],
)
def test_only_a_bound_that_is_declared_is_held_against_the_loss(
    bounds: tuple[float, float], told: list[bool]
) -> None:
    stopped = ((1, 1.03, 1.1, False), (-1, 0.9, 0.97, False))
    known = Known(name="grpo", cores=frozenset({Core("plain")}), bounds=bounds)
    bands = ((1, 1.21, 1.5, True), (-1, 0.5, 0.79, True))
    assert [bool(clipped(band, declared=known).deviations) for band in bands] == told
    assert [bool(clipped(band, declared=known).deviations) for band in stopped] == told
    several = Known(name="x", cores=frozenset({Core("plain"), Core("none")}), bounds=bounds)
    assert [bool(clipped(band, declared=several).deviations) for band in bands] == told


@pytest.mark.parametrize(
    ("band", "says"),
    [
        ((1, 1.1, 1.19, False), "tokens with A > 0 lose their gradient before the clip bound 1.2"),
        ((-1, 0.81, 0.9, False), "tokens with A < 0 lose their gradient before the clip bound 0.8"),
    ],
)
def test_a_clip_before_its_bound_is_told(band: Any, says: str) -> None:
    told = only(clipped(band))
    assert (told.name, told.says, told.tokens) == ("clip acts too early", says, "5 tokens")


@pytest.mark.parametrize("sign", [1, -1])
def test_four_tokens_say_nothing_of_a_clip(sign: int) -> None:
    low, high = (1.21, 1.5) if sign > 0 else (0.5, 0.79)
    for alive in (True, False):
        rows = np.ones(45)
        rows[:4] = np.linspace(low, high, 4)
        advantage = np.r_[np.full(5, sign), np.tile([1, -1], 20)].astype(float)
        tokens = token_rows([45], advantage=advantage, log_ratio=np.log(rows))
        tokens["coef"] = np.where((np.arange(45) < 4) & (not alive), 0, tokens["coef"])
        found = checked(checks.check_clip, evidence(tokens), PLAIN, CLIPPED)
        assert found.facts == {"clip": "stops no token"}
        assert not found.deviations


@pytest.mark.parametrize(
    ("band", "says"),
    [
        ((1, 0.5, 0.8, False), "tokens with A > 0 are stopped where the ratio has moved against "
         "their push (ratio 0.5 to 0.8)"),
        ((-1, 1.2, 1.5, False), "tokens with A < 0 are stopped where the ratio has moved against "
         "their push (ratio 1.2 to 1.5)"),
    ],
)  # fmt: skip
def test_a_clip_on_the_wrong_side_is_told(band: Any, says: str) -> None:
    words = "A > 0" if band[0] > 0 else "A < 0"
    alone = only(clipped(band))
    assert (alone.name, alone.says) == (f"clip on the wrong side for {words}", says)
    assert alone.tokens == f"5 tokens with {words}"
    free = (1, 1.3, 1.5, True) if band[0] > 0 else (-1, 0.5, 0.7, True)
    assert only(clipped(band, free)).says == says + ", and pass where it has moved with it"
    stopped = (*free[:3], False)
    assert only(clipped(band, free, stopped)).says == says


def test_a_dual_clip_far_above_is_no_fault_and_ratios_far_out_vanish() -> None:
    assert not clipped((-1, 1.9, 3.7, False)).deviations
    assert not clipped((-1, 1.9, 1.9, False)).deviations
    assert only(clipped((-1, 1.2, 1.89, False))).tokens == "5 tokens with A < 0"
    assert only(clipped((1, 1e-4, 0.8, False))).name == "clip on the wrong side for A > 0"
    far = math.exp(-10)
    assert not clipped((1, 1e-8, far, False)).deviations
    assert only(clipped((1, 1.01 * far, 0.8, False))).tokens == "5 tokens with A > 0"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_rounding_of_a_ratio_is_no_side_and_no_bound(sign: int) -> None:
    """Stopped at 1 up to rounding is neither side; a bound has a thousandth more."""
    near = 4 * 3e-6  # of logp 0, up to 1.1 2^-16 of the ratio's own size
    for x, side in ((0.99 * near, False), (1.02 * near, True)):
        ratio = math.exp(-sign * x)
        rows = token_rows([8], advantage=float(sign), logp=0.0, log_ratio=math.log(ratio))
        rows["coef"][:5] = 0
        seen = evidence(rows)
        assert bool(checked(checks.check_clip, seen, PLAIN, OPEN).deviations) is side
        toward = token_rows([8], advantage=float(sign), logp=0.0, log_ratio=sign * x)
        toward["coef"][:5] = 0
        told = checked(checks.check_clip, evidence(toward), PLAIN, OPEN).facts["clip"]
        assert (told != "stops no token") is side
    bound = math.log(1.2) if sign > 0 else -math.log(0.8)
    slack = 4 * (1.1 * 2.0**-16 * bound + 3e-6) + 1e-3
    for away, alive, name in (
        (bound + 0.99 * slack, True, ""), (bound + 1.01 * slack, True, "clip does not act"),
        (bound - 0.99 * slack, False, ""), (bound - 1.01 * slack, False, "clip acts too early"),
    ):  # fmt: skip
        ratio = math.exp(sign * away)
        found = clipped((sign, ratio, ratio, alive))
        assert [d.name for d in found.deviations] == ([name] if name else [])


@pytest.mark.parametrize(
    ("coefficient", "why"),
    [
        (Coefficient(fits={Core("plain"): {"seq"}}), "ratios hardly leave 1, so no clip can act"),
        (Coefficient(fits={Core("none"): {"seq"}}, ratio_moves=True),
         "the loss has no ratio of each token that is known"),
        (Coefficient(fits={Core("plain", "mean"): {"seq"}}, ratio_moves=True),
         "the loss has no ratio of each token that is known"),
        (Coefficient(fits={Core("sapo"): {"seq"}}, ratio_moves=True),
         "the loss has no ratio of each token that is known"),
        (Coefficient(fits=PLAIN.fits, ratio_moves=True, against=0.6),
         "the loss has no ratio of each token that is known"),
    ],
)  # fmt: skip
def test_without_a_ratio_of_tokens_there_is_no_clip_to_judge(
    coefficient: Coefficient, why: str
) -> None:
    found = clipped((1, 1.21, 1.5, True), coefficient=coefficient)
    assert (found.missing, found.facts, found.deviations) == ({"clip": why}, {}, [])


def test_an_inverted_ratio_is_still_one_of_tokens() -> None:
    turned = Coefficient(fits={Core("inverse"): {"seq"}}, ratio_moves=True, against=0.5)
    assert clipped(coefficient=turned).facts == {"clip": "stops no token"}


def test_a_gate_on_a_sign_leaves_the_other_to_be_judged() -> None:
    """Tokens of ratio 1 without gradient: a mask or a gate, not the clip."""
    bands = ((1, 1.21, 1.5, True), (-1, 0.5, 0.79, True))
    n = 50
    ratio = np.r_[np.linspace(1.21, 1.5, 5), np.linspace(0.5, 0.79, 5), np.ones(40)]
    advantage = np.r_[np.ones(5), -np.ones(5), np.tile([1.0, -1.0], 20)]
    for gated, name in ((-1, "A > 0"), (1, "A < 0")):
        rows = token_rows([n], advantage=advantage, log_ratio=np.log(ratio))
        rows["coef"] = np.where(rows["advantage"] * gated > 0, 0.0, rows["coef"])
        found = checked(checks.check_clip, evidence(rows), PLAIN, CLIPPED)
        assert name in only(found).says
    assert len(clipped(*bands).deviations) == 1  # one of a kind


@pytest.mark.parametrize(("inside", "idle", "told"), [(500, 1, True), (499, 1, False)])
def test_one_token_of_five_hundred_at_ratio_1_may_lack_gradient(
    inside: int, idle: int, told: bool
) -> None:
    ratio = np.r_[np.linspace(1.21, 1.5, 5), np.ones(inside)]
    rows = token_rows([inside + 5], advantage=np.ones(inside + 5), log_ratio=np.log(ratio))
    rows["coef"][5 : 5 + idle] = 0
    assert bool(checked(checks.check_clip, evidence(rows), PLAIN, CLIPPED).deviations) is told


@pytest.mark.parametrize(
    ("inside", "x", "told"),
    [(19, 0.0199, True), (20, 0.0199, False), (20, 0.02, True), (20, 0.021, True)],
)
def test_fewer_than_twenty_tokens_near_ratio_1_show_no_gate(
    inside: int, x: float, told: bool
) -> None:
    away = np.r_[np.log(np.linspace(1.21, 1.5, 5)), np.full(inside, x)]
    rows = token_rows([inside + 5], advantage=np.ones(inside + 5), logp=0.0, log_ratio=away)
    rows["coef"][5:] = 0
    names = [d.name for d in checked(checks.check_clip, evidence(rows), PLAIN, OPEN).deviations]
    assert not names
    found = checked(checks.check_clip, evidence(rows), PLAIN, CLIPPED)
    assert bool(found.deviations) is told


def test_rollouts_that_a_mask_drops_say_nothing_of_the_clip() -> None:
    ratio = np.r_[np.linspace(0.5, 0.8, 5), np.ones(25)]
    dropped = token_rows([30], advantage=1.0, log_ratio=np.log(ratio), coef=0.0)
    alive = token_rows([30], advantage=1.0, log_ratio=np.log(ratio), rollout=1)
    found = checked(checks.check_clip, evidence(joined(dropped, alive)), PLAIN, CLIPPED)
    assert found.facts == {"clip": "stops no token"}
    assert not found.deviations


def test_tokens_whose_ratio_coefficient_or_advantage_is_unknown_are_left_out() -> None:
    ratio = np.r_[np.linspace(0.5, 0.8, 5), np.ones(25)]
    rows = token_rows([30], advantage=1.0, log_ratio=np.log(ratio))
    rows["coef"][:5] = 0
    assert checked(checks.check_clip, evidence(rows), PLAIN, CLIPPED).deviations
    for name, nothing in (
        ("logp_old", NAN), ("coef", NAN), ("advantage", 0.0), ("advantage", NAN),
    ):  # fmt: skip
        spoiled = rows | {name: np.where(np.arange(30) < 5, nothing, rows[name])}
        found = checked(checks.check_clip, evidence(spoiled), PLAIN, CLIPPED)
        assert not found.deviations
        assert found.facts == {"clip": "stops no token"}
