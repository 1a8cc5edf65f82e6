"""What is read of completions and tokens, at both sides of each bound and number for number."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.step_logs import reopened, write_steps
from wapo_analysis.diagnose.samples import (
    SAMPLED_STEPS,
    answer_shares,
    find_culprits,
    first_pass_gap,
    is_noise,
    length_pay,
    noise_share,
    shared_answers,
)
from wapo_analysis.diagnose.trainers import has_setting
from wapo_analysis.schema import TOKENS
from wapo_analysis.series import evenly
from wapo_analysis.store import Run, open_run
from wapo_analysis.table import Records

NAN = np.nan


@pytest.mark.parametrize(
    ("count", "number", "first", "second"), [(40, 40, 1, 2), (41, 40, 1, 2), (80, 40, 1, 3)]
)
def test_forty_steps_are_read_evenly(count: int, number: int, first: int, second: int) -> None:
    chosen = evenly(range(1, count + 1), SAMPLED_STEPS)
    assert (len(chosen), *chosen[:2], chosen[-1]) == (number, first, second, count)
    assert evenly([3, 5, 9], 3) == [3, 5, 9]
    assert evenly([3, 5, 9, 11], 3) == [3, 9, 11]


# ---- noise --------------------------------------------------------------------------------------

CYRILLIC, HAN, KANA, THAI = "\u0442\u0443\u0442", "\u7684\u662f", "\u3042\u30a2", "\u0e01\u0e02"


@pytest.mark.parametrize(
    ("text", "noise"),
    [
        ("!" * 16, True),
        ("!" * 15, False),
        ("! " * 15, False),
        ("!" * 12 + "abcdefgh", True),  # 12 of 20
        ("!" * 11 + "abcdefghi", False),
        ("abcdefgh" + "!" * 12, True),
        ("\ufffd\ufffd" + "abcdefghijklmnopqr", True),  # 2 of 20
        ("\ufffd" + "abcdefghijklmnopqrs", False),
        ("\ufffd\ufffd" + "abcdefghijklmnopqrs", False),  # 2 of 21
        (f"some latin words {CYRILLIC} and {HAN}", True),
        (f"some latin words {CYRILLIC} and {HAN[0]}", False),  # a letter may be a symbol
        (f"some latin words {CYRILLIC[:2]} and {HAN}", True),
        (f"some latin words {CYRILLIC} and no more", False),
        (f"some latin words {HAN} and {KANA} here", False),  # Japanese
        (f"some latin words {KANA} and {THAI} here", True),
        (
            "some latin words \u03b1\u03b2 and \u0442\u0443\u0442",
            False,
        ),  # Greek letters are symbols
        ("some latin words \u0442\u0443\u0442 \u00aa\u00aa \u00ba\u00ba", False),
        (f"some latin {CYRILLIC} \U0001d400\U0001d401 words", False),  # bold mathematics
        (f"some latin {CYRILLIC} \u02b0\u02b1 words", False),
        (f"12345 67890 {CYRILLIC} {HAN} {THAI} 12345", True),
        (f"12345 67890 {CYRILLIC} {HAN} 12345 \u2460\u2461", False),
        ("a1b2c3d4e5f6g7h8" * 125 + "!" * 4000, False),  # beyond what is looked at
        ("a1b2c3d4e5f6g7h8" * 124 + f" {CYRILLIC} {HAN}" + "ab", True),
    ],
)
def test_where_noise_begins(text: str, noise: bool) -> None:
    assert is_noise(text) is noise


def test_the_share_of_noise_is_of_the_first_completions_of_a_step() -> None:
    good, bad = "the answer is forty-two", "!" * 40
    rows = pd.DataFrame({"step": np.repeat([1, 2, 4], [4, 65, 2]),
                         "completion": [bad, good, good, None, *[bad] * 32, *[good] * 32, bad,
                                        good, good]})  # fmt: skip
    share = noise_share(rows)
    assert share.steps.tolist() == [1, 2, 4]
    assert share.values.tolist() == pytest.approx([1 / 3, 0.5, 0.0])


# ---- the same answers, the answer of the reference ----------------------------------------------


def asked(prompts: list[Any], texts: list[Any], group: Any = None, step: Any = 1) -> pd.DataFrame:
    n = len(prompts)
    return pd.DataFrame({"step": step, "group": np.arange(n) if group is None else group,
                         "prompt": prompts, "completion": texts})  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "shares"),
    [
        (asked(["p", "q"], ["x", "x"]), {1: 1.0}),
        (asked(["p", "q"], ["x", "y"]), {1: 0.0}),
        (asked(["p", "p", "q", "q"], ["x", "x", "x", "y"]), {1: 0.75}),
        (asked(["p", "p"], ["x", "x"]), {}),  # one prompt
        (asked([None, None], ["x", "x"]), {1: 1.0}),  # by their groups
        (asked([None, None], ["x", "x"], group=[3, 3]), {}),
        (asked(["p", "p"], ["x", "x"], group=[0, 1]), {}),
        (asked(["p", "q", "p", "q"], ["x", "x", "x", None], step=[1, 1, 2, 2]), {1: 1.0}),
        (asked(["p", "q"], ["x", "x"], step=[1, 2]), {}),
        (asked(["p", "q"], [None, None]), {}),
    ],
)
def test_a_completion_of_another_prompt_word_for_word_is_the_same(
    rows: pd.DataFrame, shares: dict[int, float]
) -> None:
    found = shared_answers(rows)
    assert found.steps.tolist() == list(shares)
    assert found.values.tolist() == list(shares.values())


LONG = "x" * 98


@pytest.mark.parametrize(
    ("answer", "text", "held"),
    [
        ("42", "it is 42", True), ("42", "it is 421", False), ("42", "it is 1.42.", True),
        ("42", "it is x42", False), (" 42 ", "42", True), ("Paris", "PARIS!", True),
        ("4.2", "it is 4x2", False), ("(a)", "so (a)", True), ("42", "421 or 42", True),
        ("42", "42" + " " + LONG[:97], True), ("42", "42" + " " + LONG, False),
        ("42", f"{LONG} 42", True),
    ],
)  # fmt: skip
def test_a_completion_holds_the_answer_as_a_word_at_its_end(
    answer: str, text: str, held: bool
) -> None:
    rows = pd.DataFrame({"step": [1], "completion": [text], "answer": [answer], "reward": [1.0]})
    with_it, without = answer_shares(rows)
    assert with_it.values.tolist() == [float(held)]
    assert without.values.tolist() == [float(not held)]


def test_rewarded_is_the_highest_reward_of_all_steps() -> None:
    rows = pd.DataFrame({
        "step": [1, 1, 1, 2, 2, 3, 3], "answer": ["42"] * 5 + [" ", None],
        "completion": ["42", "7", "42", "42", "7", "42", "42"],
        "reward": [1.0, 1.0, 0.5, 0.5, 0.0, 1.0, 1.0],
    })  # fmt: skip
    held, without = answer_shares(rows)
    assert held.steps.tolist() == [1, 2]
    assert held.values.tolist() == pytest.approx([2 / 3, 0.5])
    assert (without.steps.tolist(), without.values.tolist()) == ([1], [0.5])
    for name in ("completion", "answer", "reward"):
        assert not len(answer_shares(rows.assign(**{name: None}))[0])


# ---- pay for length -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "length", "group", "pay"),
    [
        ([0, 1, 0, 1], [10, 20, 10, 20], [0, 0, 1, 1], 1.0),
        ([1, 0, 1, 0], [10, 20, 10, 20], [0, 0, 1, 1], -1.0),
        ([0, 1, 5, 6], [10, 20, 90, 100], [0, 0, 1, 1], 1.0),  # the prompt decides the level
        ([0, 1, 1, 0], [10, 20, 10, 20], [0, 0, 1, 1], 0.0),
        ([0, 1, 0, 0], [10, 20, 10, 40], [0, 0, 1, 1], 5 / math.sqrt(0.5 * 500)),
        ([0, 0, 1, 1], [10, 20, 10, 20], [0, 0, 1, 1], None),
        ([0, 1, 0, 1], [10, 10, 20, 20], [0, 0, 1, 1], None),
        ([0, 0.1, 0, 0.1], [10, 10.5, 10, 10.5], [0, 0, 1, 1], 1.0),
        ([0, 1, NAN, 3], [10, 20, 10, NAN], [0, 0, 0, 0], 1.0),
    ],
)
def test_pay_for_length_is_pearsons_within_groups(
    reward: list[float], length: list[float], group: list[int], pay: float | None
) -> None:
    rows = pd.DataFrame({"step": 3, "group": group, "reward": reward, "length": length})
    found = length_pay(rows)
    assert found.values.tolist() == pytest.approx([] if pay is None else [pay], abs=1e-12)
    assert found.steps.tolist() == ([] if pay is None else [3])


# ---- the first pass -----------------------------------------------------------------------------


def with_tokens(path: Path, step: int, **columns: Any) -> Run:
    """A loop's run with token rows of one step; columns that are not given are zeros."""
    if not path.exists():
        write_steps(path, {"reward": [0.5] * 60}, source="loop")
    n = max(len(np.atleast_1d(values)) for values in columns.values())
    keys = ("minibatch", "rank", "group", "rollout", "token_id")
    usual = {name: np.zeros(n) for name in keys}
    usual |= {"step": np.full(n, step), "position": np.arange(n), "advantage": np.ones(n)}
    given = {name: np.broadcast_to(values, n) for name, values in columns.items()}
    writer = reopened(path)
    writer.write_part(Records.build(TOKENS, usual | given), step)
    writer.close("finished")
    return open_run(path)


def test_the_gap_of_a_first_pass_number_for_number(tmp_path: Path) -> None:
    logp, old = np.array([-1.0, -2.0, -0.5]), np.array([-1.5, -1.5, -0.5])
    run = with_tokens(tmp_path / "run", 4, logp=logp, logp_old=old)
    gap = first_pass_gap(run).loc[4]
    ratio = np.exp(logp - old)
    assert gap["k3"] == pytest.approx(np.mean(ratio - 1 - (logp - old)), rel=1e-3)
    assert gap["ess"] == pytest.approx(ratio.sum() ** 2 / (3 * (ratio**2).sum()), rel=1e-3)
    assert gap["max_dp"] == pytest.approx(np.abs(np.exp(logp) - np.exp(old)).max(), rel=1e-3)
    assert gap["tokens"] == 3


def test_only_first_passes_with_both_logs_count(tmp_path: Path) -> None:
    run = with_tokens(
        tmp_path / "run", 4, logp=[-1.0, NAN, -1.0, -1.0], logp_old=[-1.0, -1.0, NAN, -3.0],
        minibatch=[0, 0, 0, 1],
    )  # fmt: skip
    gap = first_pass_gap(run).loc[4]
    assert (gap["tokens"], gap["k3"], gap["ess"]) == (1, 0.0, 1.0)
    assert gap["max_dp"] == 0


@pytest.mark.parametrize(("size", "held"), [(19.0, 19.0), (20.0, 20.0), (80.0, 20.0)])
def test_an_impossible_token_is_held(tmp_path: Path, size: float, held: float) -> None:
    run = with_tokens(tmp_path / "run", 4, logp=[0.0], logp_old=[-size])
    assert first_pass_gap(run)["k3"].item() == pytest.approx(math.expm1(held) - held, rel=1e-2)


def test_a_token_that_one_policy_rules_out_tells_nothing_of_the_others(tmp_path: Path) -> None:
    run = with_tokens(
        tmp_path / "run", 4, logp=[-1.0, -np.inf, -2.0], logp_old=[-1.5, -1.0, -np.inf]
    )
    gap = first_pass_gap(run).loc[4]
    assert gap["tokens"] == 1
    assert gap["k3"] == pytest.approx(math.expm1(0.5) - 0.5, rel=1e-3)


# ---- tokens behind a class ----------------------------------------------------------------------

P, REST = 0.8, 0.2**2
PEAK = {"logp": math.log(P), "entropy": -(P * math.log(P) + 0.2 * math.log(0.2)),
        "collision_rest": REST, "collision_logp_rest": REST * math.log(0.2)}  # fmt: skip


def pushed(path: Path, step: int, coef: Any, **columns: Any) -> Run:
    """Token rows of class neg_peak, whose predicted dH goes with -coef."""
    coef = np.asarray(coef, float)
    return with_tokens(path, step, coef=coef, advantage=np.sign(coef), **PEAK, **columns)


@pytest.mark.parametrize(
    ("recorded", "read"),
    [
        ([20], [20]), ([30], [30]), ([10], [10]), ([9], None), ([40], [40]), ([41], None),
        ([19, 31], [19]), ([18, 31], [31]), ([20, 22, 24, 26], [20, 22, 24]), ([10, 25], [25]),
        ([20, 25], [20, 25]), ([25, 30], [25, 30]),
        ([], None),
    ],
)  # fmt: skip
def test_steps_of_the_window_or_the_nearest_one_are_read(
    tmp_path: Path, recorded: list[int], read: list[int] | None
) -> None:
    path = write_steps(tmp_path / "run", {"reward": [0.5] * 60}, source="loop")
    for step in recorded:
        pushed(path, step, [-1.0])
    found = find_culprits(open_run(path), "x", "neg_peak", 20, 30, 1)
    assert (list(found.steps) if found else None) == read


def test_three_tokens_and_rollouts_with_the_largest_sums_are_named(tmp_path: Path) -> None:
    run = pushed(
        tmp_path / "run", 20, [-1.0, -0.4, -2.0, -3.0, -0.9, -1.0, -1.7],
        token_id=[0, 5, 0, 2, 3, -1, 5], rollout=[0, 1, 2, 3, 4, 0, -1],
    )  # fmt: skip
    found = find_culprits(run, "x", "neg_peak", 20, 30, 1)
    assert found is not None
    assert [text for text, _ in found.tokens] == ["#0", "#2", "#5"]
    assert [share for _, share in found.tokens] == pytest.approx([0.3, 0.3, 0.21], rel=1e-3)
    assert [place[:2] for place in found.rollouts] == [(20, 3), (20, 0), (20, 2)]
    assert [share for *_, share in found.rollouts] == pytest.approx([0.3, 0.2, 0.2], rel=1e-3)


def test_small_pushes_count_and_those_of_other_classes_or_ways_do_not(tmp_path: Path) -> None:
    run = pushed(tmp_path / "run", 20, [-0.003, -0.001, 0.5], token_id=[1, 2, 3])
    up = find_culprits(run, "x", "neg_peak", 20, 20, 1)
    assert up is not None
    assert [share for _, share in up.tokens] == pytest.approx([0.75, 0.25], rel=1e-3)
    assert find_culprits(run, "x", "neg_peak", 20, 20, -1) is None
    down = find_culprits(run, "x", "pos_peak", 20, 20, -1)
    assert down is not None
    assert down.tokens == (("#3", 1.0),)
    assert find_culprits(run, "x", "neg_valley", 20, 20, 1) is None


def test_a_setting_needs_a_trainer_that_has_it() -> None:
    assert has_setting("exclude_bins", "built-in")
    assert not has_setting("exclude_bins", "trl")
    assert not has_setting("exclude_bins", None)
