"""Which tokens carry gradient: each check at both sides of its bounds."""

from typing import Any

import numpy as np
import pytest

from tests.support.audit_rows import checked, evidence, joined, only, token_rows
from wapo_analysis.audit import checks
from wapo_analysis.audit.evidence import Findings

NAN = np.nan
END = 7


# ---- outside the mask ---------------------------------------------------------------------------


def outside(**counts: list[float]) -> Findings:
    steps = {"step": [1, 2], **counts}
    return checked(checks.check_outside, evidence(token_rows([3]), steps=steps))


@pytest.mark.parametrize("counts", [{}, {"grad_outside": [NAN, NAN], "grad_before": [1.0, 1.0]}])
def test_without_a_count_nothing_is_said_of_masked_tokens(counts: dict[str, list[float]]) -> None:
    found = outside(**counts)
    assert list(found.missing) == ["tokens outside the mask"]
    assert not found.facts
    assert not found.deviations


@pytest.mark.parametrize(
    ("outer", "before", "after", "told"),
    [
        ([0, 0], [0, 0], [0, 0], {}),
        ([2, 3], [2, 3], [0, 0], {"prompt tokens": 5}),
        ([2, NAN], [2, NAN], [0, 0], {"prompt tokens": 2}),
        ([4, 3], [2, 0], [2, 3], {"prompt tokens": 2, "tokens after the end": 5}),
        # Between the tokens of a rollout: a tool's text, some of which may stand at the end.
        ([4, 5], [2, 0], [2, 3], {"prompt tokens": 2, "masked tokens": 7}),
        ([4, 5], [0, 0], [0, 0], {"masked tokens": 9}),
    ],
)
def test_gradient_outside_the_mask_is_told_by_place(
    outer: list[float], before: list[float], after: list[float], told: dict[str, int]
) -> None:
    found = outside(grad_outside=outer, grad_before=before, grad_after=after)
    assert [(d.name, d.says, d.tokens) for d in found.deviations] == [
        (f"gradient on {who}", f"{n} {who}, outside the loss mask, carry gradient",
         f"{n} positions of 2 steps")
        for who, n in told.items()
    ]  # fmt: skip
    total = sum(told.values())
    said = f"{total} carry gradient" if total else "carry no gradient"
    assert found.facts == {"tokens outside the mask": said}


def test_places_that_were_not_counted_are_none() -> None:
    assert only(outside(grad_outside=[1, 1])).name == "gradient on masked tokens"


# ---- the end token ------------------------------------------------------------------------------


def ended(own: int = 8, idle: int = 0, others: int = 100, long: int = 2) -> Findings:
    """Rollouts that end with END, which carries no gradient; of 100 other tokens some do not."""
    short = others // (own + 2 * long)
    lengths = np.r_[np.full(own, short + 1), np.full(long, 0)]
    rest = others - short * own
    lengths[own:] = rest // long + 1
    token = 100 + np.arange(lengths.sum())
    ends = np.cumsum(lengths) - 1
    token[ends[:own]] = END
    coef = np.ones(len(token))
    coef[ends[:own]] = 0
    inner = np.setdiff1d(np.arange(len(token)), ends)
    coef[inner[:idle]] = 0
    rows = token_rows(lengths, token_id=token, coef=coef)
    return checked(checks.check_end, evidence(rows))


@pytest.mark.parametrize(
    ("own", "idle", "told"),
    [(8, 0, True), (8, 9, True), (8, 10, False), (7, 0, True), (7, 1, False), (4, 0, True)],
)
def test_an_end_token_that_never_carries_gradient_is_told_where_others_do(
    own: int, idle: int, told: bool
) -> None:
    found = ended(own, idle)
    share = own / (own + 2)
    assert found.facts["end token"].startswith(f"token {END} ends {share:.0%} of the rollouts")
    if not told:
        assert not found.deviations
        assert found.facts["end token"].endswith("of the rollouts and carries none")
        return
    assert found.facts["end token"].endswith("of the rollouts")
    told_of = only(found)
    assert told_of.name == "end token left out"
    assert told_of.says == (
        f"the token that ends rollouts ({END}) never carries gradient, {1 - idle / 100:.0%} of the "
        "others do"
    )
    assert told_of.tokens == f"{own} last tokens"


def end_of(lengths: list[int], ends: list[int], coefs: Any = 1.0, **given: Any) -> Findings:
    """Rollouts with these last tokens, whose coefficients are given; all others carry gradient."""
    rows = token_rows(lengths, **given)
    last = np.cumsum(lengths) - 1
    rows["token_id"][last] = ends
    rows["coef"] = np.ones(len(rows["step"]))
    rows["coef"][last] = coefs
    return checked(checks.check_end, evidence(rows))


@pytest.mark.parametrize(("short", "known"), [(3, False), (4, True)])
def test_the_end_token_is_known_from_four_rollouts_below_the_limit(short: int, known: bool) -> None:
    found = end_of([3] * short + [5] * 6, [END] * short + [20, 21, 22, 23, 24, 25])
    if known:
        assert found.facts == {"end token": "token 7 ends 40% of the rollouts and carries gradient"}
    else:
        assert found.missing == {"end token": "hardly a rollout is shorter than the longest"}


@pytest.mark.parametrize(("same", "known"), [(9, True), (8, False)])
def test_rollouts_end_with_one_token_nine_times_of_ten(same: int, known: bool) -> None:
    ends = [END] * same + [50 + n for n in range(10 - same)]
    found = end_of([3] * 10 + [4], [*ends, 60])
    assert ("end token" in found.facts) is known
    four = end_of([4] + [3] * 4, [60, 1, 2, 3, 4])
    assert four.missing["end token"].startswith("rollouts end with different tokens")
    assert "token 7 ends 80%" in end_of([4] + [3] * 4, [60] + [END] * 4).facts["end token"]
    if not known:
        assert found.missing["end token"].startswith("rollouts end with different tokens")


def test_without_token_ids_the_end_is_not_known() -> None:
    rows = token_rows([3, 4], token_id=-1)
    assert checked(checks.check_end, evidence(rows)).missing == {
        "end token": "token ids were not recorded"
    }
    assert "end token" in end_of([3] * 4 + [5], [END] * 4 + [-1]).facts
    assert end_of([3] * 4 + [5], [0] * 5).facts["end token"].startswith("token 0 ends 100%")


def test_two_last_tokens_without_gradient_are_too_few() -> None:
    # Of the others the advantage is 0: what they lack is no sign.
    advantage = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    found = end_of([3] * 5 + [6], [END] * 5 + [30], [0, 0, 0, 0, 0, 1.0], advantage=advantage)
    assert found.facts == {"end token": "token 7 ends 83% of the rollouts and carries none"}
    assert not found.deviations
    three = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    found = end_of([3] * 5 + [6], [END] * 5 + [30], [0, 0, 0, 0, 0, 1.0], advantage=three)
    assert only(found).tokens == "3 last tokens"


def test_an_end_without_advantage_says_nothing_of_gradient() -> None:
    advantage = [0.0] * 5 + [1.0]
    found = end_of([3] * 5 + [6], [END] * 5 + [30], 0.0, advantage=advantage)
    assert found.facts == {"end token": "token 7 ends 83% of the rollouts"}


def test_an_end_token_with_gradient_now_and_then_is_trained_on() -> None:
    found = end_of([3] * 5 + [6], [END] * 5 + [30], [0, 0, 0, 0, 1.0, 1.0])
    assert found.facts["end token"].endswith("and carries gradient")
    assert not found.deviations


def test_rollouts_of_an_end_token_alone_have_no_others_to_compare_with() -> None:
    found = end_of([1] * 4 + [3] * 4, [END] * 4 + [30] * 4, 0.0,
                   advantage=[1.0] * 4 + [0.0] * 4)  # fmt: skip
    assert not found.deviations
    assert found.facts["end token"].endswith("carries none")


def test_the_end_token_counts_at_the_end_of_the_first_pass_alone() -> None:
    """In another place, or in a later pass, it may carry gradient; the order of rows is nothing."""
    lengths, last = [3] * 8 + [6], np.array([2, 5, 8, 11, 14, 17, 20, 23, 29])
    first = token_rows(lengths)
    first["token_id"][last[:8]] = END
    first["token_id"][1] = END  # within a rollout
    first["coef"][last[:8]] = 0.0
    later = first | {"minibatch": np.ones(30, int), "coef": np.ones(30)}
    rows = joined(first, later)
    mixed = np.random.default_rng(0).permutation(60)
    found = checked(checks.check_end, evidence({n: v[mixed] for n, v in rows.items()}))
    assert only(found).tokens == "8 last tokens"
    unknown = rows | {"coef": np.where(rows["token_id"] == END, NAN, rows["coef"])}
    found = checked(checks.check_end, evidence(unknown))
    assert not found.deviations
    assert found.facts["end token"] == "token 7 ends 89% of the rollouts"


# ---- the first token ----------------------------------------------------------------------------


def first_out(number: int, idle: int, of: int = 100, **given: Any) -> Findings:
    """Rollouts whose first tokens carry no gradient, and some of the other ones."""
    rows = token_rows([1 + of // number] * number)
    first = rows["position"] == 0
    rows["coef"][first] = 0
    rows["coef"][np.flatnonzero(~first)[:idle]] = 0
    rows |= given
    return checked(checks.check_first_token, evidence(rows))


@pytest.mark.parametrize(
    ("number", "idle", "of", "told"),
    [(8, 0, 800, True), (7, 0, 700, False), (10, 0, 100, True), (10, 1, 100, False),
     (10, 1, 200, True)],
)  # fmt: skip
def test_a_first_token_without_gradient_is_told(
    number: int, idle: int, of: int, told: bool
) -> None:
    found = first_out(number, idle, of)
    assert len(found.deviations) == told
    if told:
        assert only(found).name == "first token left out"
        assert only(found).tokens == f"{number} first tokens"


def test_first_tokens_tell_nothing_alone_or_where_one_of_them_has_gradient() -> None:
    assert not first_out(10, 0, 0).deviations
    rows = token_rows([4] * 10)
    rows["coef"][np.flatnonzero(rows["position"] == 0)[1:]] = 0
    assert not checked(checks.check_first_token, evidence(rows)).deviations


def test_only_first_passes_and_tokens_with_an_advantage_tell_of_the_first_token() -> None:
    rows = token_rows([4] * 12)
    rows["coef"][rows["position"] == 0] = 0
    for spoiled in (
        rows | {"minibatch": (rows["rollout"] >= 7).astype(int)},
        rows | {"advantage": np.where(rows["rollout"] >= 7, 0.0, 1.0)},
        rows | {"coef": np.where(rows["rollout"] >= 7, NAN, rows["coef"])},
    ):
        assert not checked(checks.check_first_token, evidence(spoiled)).deviations
    # What has no advantage may lack gradient everywhere.
    idle = np.where(rows["rollout"] >= 9, 0.0, rows["coef"])
    kept = rows | {"advantage": np.where(rows["rollout"] >= 9, 0.0, 1.0), "coef": idle}
    assert only(checked(checks.check_first_token, evidence(kept))).tokens == "9 first tokens"


# ---- whose advantage ----------------------------------------------------------------------------


def swapped(up: int, down: int, right: int, mixed: int = 0, size: int = 3, short: int = 0) -> Any:
    """Rollouts pushed as a whole up with A < 0, down with A > 0, rightly, and both ways."""
    number = up + down + right + mixed + short
    lengths = np.r_[np.full(number - short, size), np.full(short, 2)]
    advantage = np.where(np.arange(number) % 2, -1.0, 1.0)
    advantage[:up], advantage[up : up + down] = -1.0, 1.0
    rows = token_rows(lengths, advantage=advantage)
    wrong = rows["rollout"] < up + down
    rows["coef"] = np.where(wrong, -1, 1) * rows["advantage"]
    both = (rows["rollout"] >= number - mixed - short) & (rows["rollout"] < number - short)
    rows["coef"][both & (rows["position"] == 0)] *= -1
    return checked(checks.check_whose_advantage, evidence(rows))


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((3, 3, 3), True), ((2, 3, 3), False), ((3, 2, 3), False), ((3, 3, 2), False),
        ((5, 4, 10, 1), True), ((5, 4, 9, 1), False),
        ((3, 3, 3, 0, 2), False),  # two tokens may be pushed one way by chance
        ((3, 3, 3, 0, 3, 6), True),  # short rollouts are left aside
    ],
)  # fmt: skip
def test_advantages_of_other_rollouts_are_told_where_rollouts_go_as_a_whole(
    counts: tuple[int, ...], told: bool
) -> None:
    found = swapped(*counts)
    assert len(found.deviations) == told
    if told:
        up, down, right = counts[:3]
        assert only(found).says == (
            f"{up} rollouts with A < 0 are pushed up and {down} with A > 0 down, every token of "
            f"them; {right} are pushed as they should be"
        )
        assert only(found).tokens == f"{3 * (up + down)} tokens"


def test_tokens_without_gradient_or_advantage_do_not_say_whose_it_is() -> None:
    rows = token_rows([4] * 9, advantage=[-1.0] * 3 + [1.0] * 3 + [1.0] * 3)
    rows["coef"] = np.where(rows["rollout"] < 6, -1, 1) * rows["advantage"]
    for spoiled in (
        rows | {"coef": np.where(rows["position"] == 0, 0.0, rows["coef"])},
        rows | {"coef": np.where(rows["position"] == 0, NAN, rows["coef"])},
        rows | {"advantage": np.where(rows["position"] == 0, 0.0, rows["advantage"])},
    ):
        found = checked(checks.check_whose_advantage, evidence(spoiled))
        assert only(found).tokens == "18 tokens"
    none = rows | {"coef": np.zeros(len(rows["step"]))}
    assert not checked(checks.check_whose_advantage, evidence(none)).deviations


# ---- half precision -----------------------------------------------------------------------------

STEP = 2.0**-24


def underflown(coef: Any, advantage: Any = 1.0) -> Findings:
    rows = token_rows([len(coef)], coef=np.asarray(coef), advantage=advantage)
    return checked(checks.check_precision, evidence(rows))


def test_whole_multiples_of_the_smallest_half_are_underflow() -> None:
    told = only(underflown(STEP * np.r_[np.zeros(20), 1:20, -512]))
    assert told.says == (
        "coefficients are whole multiples of 6e-08, the smallest fp16 number, at most 512 of "
        "them; 50% of tokens with an advantage get exactly 0"
    )
    assert told.tokens == "40 tokens with an advantage"


@pytest.mark.parametrize(
    "coef",
    [
        STEP * np.arange(1, 20.0),  # nineteen are too few
        STEP * np.r_[1:20, 513],  # so many bits are no underflow
        STEP * np.r_[1:20, 20.002],  # not on the grid
        STEP * np.r_[1:20, 1024],  # 2^-14
        STEP * np.r_[1:20, 512.5],
    ],
)
def test_what_is_no_underflow(coef: np.ndarray) -> None:
    assert not underflown(coef).deviations
    assert underflown(STEP * np.r_[1:20, 20.0005]).deviations


def test_tokens_without_advantage_or_coefficient_are_no_underflow() -> None:
    coef = STEP * np.r_[np.zeros(10), 1:21]
    assert "; 0% of tokens" in only(underflown(coef, np.r_[np.zeros(10), np.ones(20)])).says
    assert only(underflown(np.r_[np.full(10, NAN), coef[10:]])).tokens.startswith("20 tokens")
    some = np.where(np.arange(30) % 30 == 29, 0.0, 1.0)
    assert not underflown(coef, some).deviations  # nineteen are left
