"""Groups without a difference in reward, and runs in which nothing is learned."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import Columns, found_by, judge, ramp, seen
from wapo_analysis.diagnose import Finding

N = 60
FLAT = np.full(N, 0.3)
MIDDLE = np.full(N, 0.5)
SAW = np.where(np.arange(N) % 2, 1.0, -1.0)
LATE = np.arange(N) >= 30


def moved(start: float, end: float) -> np.ndarray:
    return ramp(start, end, N, 20, 15)


def check(name: str, path: Path, columns: Columns) -> list[Finding]:
    return found_by(name, seen(path / "run", columns))


# ---- groups without a difference in reward -------------------------------------------------------


def groups(flat: float | np.ndarray, reward: np.ndarray | None = FLAT, **more: np.ndarray) -> dict:
    columns = {"groups_flat": np.zeros(N) + flat, **more}
    return columns | ({} if reward is None else {"reward": reward})


COIN = np.tile([1.0, 1.0, 1.0, 0.0], 15)

BEGINS: dict[str, tuple[np.ndarray, int | None, float | None]] = {
    # (share of flat groups, step they are flat from, share told)
    "half": (np.full(N, 0.5), 1, 0.5),
    "less": (np.full(N, 0.499), None, None),
    "from a step on": (np.where(LATE, 0.8, 0.2), 31, 0.8),
    "still rising, by the mean of the last two": (ramp(0, 0.6, N, 0, 60), 51, 0.585),
    # A share that is all or nothing is known over 25 records, and counts from two thirds on.
    "one group a step": (np.where(LATE, COIN, np.arange(N) % 3 == 0), 39, 9 / 13),
    "one group a step, three in five": (
        np.where(LATE, np.tile([1, 1, 1, 0, 0], 12), 0), None, None,
    ),
    "one group in ten steps": (np.r_[0, 0, 0, np.ones(7)], None, None),
    "half or all": (np.where(np.arange(N) % 12 == 0, 1.0, 0.5), 1, 0.5),
    "none or nearly all": (np.where(np.arange(N) < 20, 0, 0.9), 21, 0.9),
    # Shares that jump, alike in both halves, are judged by their mean.
    "jumping around more than half": (0.6 + 0.2 * SAW, 1, 0.6),
    "jumping in eight records": (np.array([1, 1, 0.48, 0.48, 0.48, 0.8, 0.8, 0.8]), 1, 0.73),
    "jumping, and more in the end": (np.where(LATE, 0.7, 0.55) + 0.2 * SAW, 29, 0.7),
    "jumping, and half in one half only": (np.where(LATE, 0.58, 0.49) + 0.06 * SAW, 29, 0.58),
    "swinging slowly": (0.62 - 0.2 * np.sin(2 * np.pi * np.arange(N) / 30), 43, 0.68),
    "jumping around less": (0.4 + 0.2 * SAW, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BEGINS)
def test_groups_are_flat_from_a_step_on(tmp_path: Path, case: str) -> None:
    flat, step, share = BEGINS[case]
    reward = np.full(len(flat), 2.0)
    found = check("zero_signal", tmp_path, {"groups_flat": flat, "reward": reward})
    told = [(f.step, f.evidence["end"]) for f in found]
    assert told == ([(step, pytest.approx(share, abs=0.006))] if step else [])


@pytest.mark.parametrize("groups_a_step", [2, 3, 8])
def test_a_share_below_half_that_is_noise_is_not_told_where_it_ends_high(
    tmp_path: Path, groups_a_step: int
) -> None:
    rng = np.random.default_rng(11)
    for n, shares in enumerate(rng.binomial(groups_a_step, 0.42, (25, 60)) / groups_a_step):
        assert not check("zero_signal", tmp_path / str(n), {"groups_flat": shares, "reward": FLAT})


def test_a_share_that_falls_and_stays_above_half_is_told_from_its_first_step(
    tmp_path: Path,
) -> None:
    shares = np.random.default_rng(4).binomial(2, np.linspace(0.9, 0.57, 300)) / 2
    (found,) = check("zero_signal", tmp_path, {"groups_flat": shares, "reward": 0 * shares + 0.1})
    assert found.step == 1
    assert found.evidence["end"] == pytest.approx(shares.mean())


SIDES: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "a quarter all wrong": (groups(0.6, MIDDLE, groups_all_wrong=np.full(N, 0.25)), "_too_hard"),
    "fewer": (groups(0.6, MIDDLE, groups_all_wrong=np.full(N, 0.24)), ""),
    "a quarter all right": (groups(0.6, MIDDLE, groups_all_right=np.full(N, 0.25)), "_too_easy"),
    "twice as many wrong": (
        groups(0.6, MIDDLE, groups_all_wrong=np.full(N, 0.4), groups_all_right=np.full(N, 0.2)),
        "_too_hard",
    ),
    "twice as many right": (
        groups(0.6, MIDDLE, groups_all_wrong=np.full(N, 0.2), groups_all_right=np.full(N, 0.4)),
        "_too_easy",
    ),
    "nearly as many": (
        groups(0.6, MIDDLE, groups_all_wrong=np.full(N, 0.3), groups_all_right=np.full(N, 0.35)),
        "",
    ),
    "all wrong at last": (
        groups(0.6, MIDDLE, groups_all_wrong=np.r_[np.zeros(57), 0.1, 0.2, 0.35]), "_too_hard",
    ),
    "all right at last": (
        groups(0.6, MIDDLE, groups_all_right=np.r_[np.zeros(57), 0.1, 0.2, 0.35]), "_too_easy",
    ),
    "no longer all wrong": (
        groups(0.6, MIDDLE, groups_all_wrong=np.r_[np.ones(57), 0.4, 0.3, 0.1]), "",
    ),
    "no longer all right": (
        groups(0.6, MIDDLE, groups_all_right=np.r_[np.ones(57), 0.4, 0.3, 0.1]), "",
    ),
    "a low reward": (groups(0.6, np.full(N, 0.25)), "_too_hard"),
    "a reward between": (groups(0.6, MIDDLE), ""),
    "a high reward": (groups(0.6, np.full(N, 0.75)), "_too_easy"),
    "a reward of its own scale": (groups(0.6, np.full(N, 2.0)), ""),
    "a penalty": (groups(0.6, np.full(N, -1.0)), ""),
    "solved, on its own scale": (
        groups(0.6, np.full(N, 2.0), pass_rate=np.full(N, 0.9)), "_too_easy"
    ),
    "low held out too": (
        groups(0.6, np.full(N, 0.2), eval_reward=np.full(N, 0.25)), "_too_hard"
    ),
    "not low held out": (groups(0.6, np.full(N, 0.2), eval_reward=np.full(N, 0.26)), ""),
    "without a reward": (groups(0.6, None), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", SIDES)
def test_flat_groups_are_too_hard_or_too_easy(tmp_path: Path, case: str) -> None:
    columns, side = SIDES[case]
    (found,) = check("zero_signal", tmp_path, columns)
    assert found.name == f"zero_signal{side}"
    assert ("by the mean reward" in found.message) == bool(side and "all_" not in str([*columns]))


def first(count: int, columns: Columns) -> Columns:
    return {name: values[:count] for name, values in columns.items()}


def late(flat_from: int, reward: float = 2.0, records: int = 300) -> Columns:
    """Groups that are flat from a record on, fewer before; the reward climbed and stands."""
    flat = np.where(np.arange(records) < flat_from, 0.4, 0.6)
    return {"groups_flat": flat, "reward": ramp(reward / 4, reward, records, 5, 50)}


SEVERITIES: dict[str, tuple[Columns, str]] = {
    "solved, for 49 records": (first(49, groups(0.7, np.full(N, 0.9))), "info"),
    "solved, for 50": (first(50, groups(0.7, np.full(N, 0.9))), "warning"),
    "solved, for a third of a long run": (late(200, 0.9), "warning"),
    "solved, for less of it": (late(201, 0.9), "info"),
    "solved, and it gains": (groups(0.7, ramp(0.8, 0.95, N, 0, N)), "info"),
    "solved, and they have become flat": (
        first(49, groups(moved(0.2, 0.7), np.full(N, 0.9))), "info",
    ),
    "they have become flat": (first(49, groups(moved(0.25, 0.66), ramp(1, 3, N, 0, N))), "warning"),
    "they have become flat, by less": (
        first(49, groups(moved(0.3, 0.69), ramp(1, 3, N, 0, N))), "info",
    ),
    "they have become flat, not two thirds": (
        first(49, groups(moved(0.2, 0.65), ramp(1, 3, N, 0, N))), "info",
    ),
    "by just as much": (first(49, groups(moved(0.35, 0.75), ramp(1, 3, N, 0, N))), "warning"),
    "two thirds just": (first(49, groups(moved(0.2, 0.66), ramp(1, 3, N, 0, N))), "warning"),
    "the reward gains": (first(49, groups(0.55, ramp(1, 3, N, 0, N))), "info"),
    "the reward stands": (first(49, groups(0.55, np.full(N, 2.0))), "warning"),
    "much was gained": (first(49, groups(0.55, ramp(0.2, 0.6, N, 2, 10))), "info"),
    "too hard, though it gains": (
        first(49, groups(0.6, ramp(0.05, 0.2, N, 0, N), groups_all_wrong=np.full(N, 0.6))),
        "warning",
    ),
    "without a reward": (first(49, groups(0.6, None)), "warning"),
}  # fmt: skip


@pytest.mark.parametrize("case", SEVERITIES)
def test_flat_groups_are_a_warning_where_something_is_lost(tmp_path: Path, case: str) -> None:
    columns, severity = SEVERITIES[case]
    (found,) = check("zero_signal", tmp_path, columns)
    assert found.severity == severity


@pytest.mark.parametrize(("spread", "told"), [(0.0, None), (0.5, "style, tone")])
def test_functions_that_vary_are_evidence(tmp_path: Path, spread: float, told: str | None) -> None:
    stds = {f"rewards/{name}/std": np.full(N, spread) for name in ("style", "tone")}
    (found,) = check("zero_signal", tmp_path, groups(0.7, **stds))
    assert found.evidence.get("functions_that_vary") == told


# ---- nothing is learned --------------------------------------------------------------------------

QUIET = np.r_[np.ones(20), np.zeros(40)]
CLIMB = ramp(1.0, 3.0, N, 2, 15)


def stall(path: Path, reward: np.ndarray, **more: np.ndarray) -> list[Finding]:
    return check("stalled", path, {"reward": reward, **more})


STALLS: dict[str, tuple[np.ndarray, dict[str, np.ndarray], int | None]] = {
    "no gradient": (FLAT, {"grad_norm": QUIET}, 21),
    "next to none": (FLAT, {"grad_norm": 100 * np.r_[np.ones(20), np.full(40, 1e-3)]}, 21),
    "more than none": (FLAT, {"grad_norm": 100 * np.r_[np.ones(20), np.full(40, 1.1e-3)]}, None),
    "next to none of a small one": (
        FLAT, {"grad_norm": 0.5 * np.r_[np.ones(20), np.full(40, 1e-3)]}, 21,
    ),
    "of what is usual in the first third": (
        FLAT, {"grad_norm": np.r_[np.full(8, 10), np.ones(12), np.full(40, 5e-3)]}, None,
    ),
    "of the first five of a short run": (
        FLAT[:12], {"grad_norm": np.r_[np.ones(4), np.full(8, 1e-4)]}, 5,
    ),
    "of steps that have a gradient": (
        FLAT, {"grad_norm": np.r_[np.tile([0, 1.0], 15), np.full(30, 8e-4)]}, 31,
    ),
    "nine in ten groups are flat": (FLAT, {"groups_flat": np.where(LATE, 0.9, 0)}, 31),
    "fewer": (FLAT, {"groups_flat": np.where(LATE, 0.89, 0)}, None),
    "both, since the first of them": (
        FLAT, {"grad_norm": QUIET, "groups_flat": np.where(LATE, 1.0, 0)}, 21,
    ),
    "solved": (FLAT + 0.5, {"grad_norm": QUIET}, None),
    "while the reward rose": (ramp(1, 2, N, 25, 10), {"grad_norm": QUIET}, None),
    "while the reward fell": (ramp(2, 1.5, N, 25, 10), {"grad_norm": QUIET}, None),
    "won, on its own scale": (CLIMB, {"grad_norm": QUIET}, None),
    # A quarter of what counts as a change, 0.022, may be lost from its best, 2.99.
    "won, and a little back": (CLIMB - ramp(0, 0.032, N, 17, 3), {"grad_norm": QUIET}, None),
    "won, and back by more": (CLIMB - ramp(0, 0.034, N, 17, 3), {"grad_norm": QUIET}, 21),
    "won, but for a function that varies": (
        CLIMB, {"grad_norm": QUIET, "rewards/tone/std": FLAT}, 21
    ),
    "never higher": (FLAT + 1.2, {"grad_norm": QUIET}, 21),
    "climbed, within 0 and 1": (CLIMB / 5, {"grad_norm": QUIET}, 21),
    "climbed, and back a little": (CLIMB - ramp(0, 0.5, N, 17, 3), {"grad_norm": QUIET}, 21),
}  # fmt: skip


@pytest.mark.parametrize("case", STALLS)
def test_nothing_is_learned_from_a_step_on(tmp_path: Path, case: str) -> None:
    reward, more, step = STALLS[case]
    assert [f.step for f in stall(tmp_path, reward, **more)] == ([step] if step else [])


GONE = {"grad_norm": QUIET}
NO_DIFFERENCE = {"groups_flat": np.where(LATE, 1.0, 0)}
WHY: dict[str, tuple[np.ndarray, dict[str, np.ndarray], str]] = {
    "no gradient": (
        FLAT, GONE, "the gradient is zero; reward did not clearly change (0.30 to 0.30)",
    ),
    "no difference": (
        FLAT, NO_DIFFERENCE,
        "there is no difference in reward within the groups; reward did not clearly change (0.30 "
        "to 0.30)",
    ),
    "hardly any difference": (
        FLAT, {"groups_flat": np.where(LATE, 0.93, 0)},
        "93% of the groups have no difference in reward; reward did not clearly change (0.30 to "
        "0.30)",
    ),
    "nothing earned": (0 * FLAT, GONE, "the gradient is zero; no completion earns a reward"),
    "a penalty all along": (
        0 * FLAT - 1, GONE, "the gradient is zero; no completion earns a reward",
    ),
    "a penalty that got less": (
        ramp(-1, -0.7, N, 5, 8) - ramp(0, 0.1, N, 15, 4), GONE,
        "the gradient is zero; reward rose from -1.00 to -0.80",
    ),
    "a function varies": (
        FLAT, NO_DIFFERENCE | {"rewards/tone/std": FLAT},
        "there is no difference in reward within the groups, although tone varies between prompts; "
        "reward did not clearly change (0.30 to 0.30)",
    ),
    "all are cut": (
        FLAT, GONE | {"truncated": FLAT + 0.7},
        "every completion is cut at the limit, so groups do not differ",
    ),
    "99% are cut": (
        0 * FLAT, GONE | {"truncated": 0 * FLAT + 0.99},
        "99% of completions is cut at the limit, so none earns a reward and there is no gradient",
    ),
    "nine in ten are cut": (
        FLAT, GONE | {"truncated": 0 * FLAT + 0.9},
        "90% of completions is cut at the limit, so groups do not differ",
    ),
    "fewer are cut": (
        FLAT, GONE | {"truncated": 0 * FLAT + 0.89},
        "the gradient is zero; reward did not clearly change (0.30 to 0.30)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WHY)
def test_why_nothing_is_learned(tmp_path: Path, case: str) -> None:
    reward, more, why = WHY[case]
    (found,) = stall(tmp_path, reward, **more)
    assert found.message == f"Nothing is learned from step {found.step} on: {why}."
    cut = "cut" in why
    assert ("truncated" in found.evidence) is cut
    assert ("{max_new_tokens}" in str(found.advice)) is cut
    assert found.evidence["grad_norm_end"] == (0.0 if "grad_norm" in more else None)


def test_a_full_reward_for_the_form_alone_is_no_solved_task(tmp_path: Path) -> None:
    ones, zeros = np.ones(60), np.zeros(60)
    columns = {
        "reward": ones, "grad_norm": zeros, "groups_flat": ones,
        "rewards/format_reward/mean": ones, "rewards/accuracy_reward/mean": zeros,
    }  # fmt: skip
    d = judge(tmp_path / "a", **columns)
    assert d.verdict == "stalled"
    assert not any(f.name == "zero_signal_too_easy" for f in d.findings)
    solved = judge(tmp_path / "b", **columns | {"rewards/accuracy_reward/mean": ones})
    assert solved.verdict == "healthy"


@pytest.mark.parametrize(
    ("value", "records", "last", "told"),
    [(0.0, 20, 0.0, True), (-1.0, 20, -1.0, True), (0.0, 19, 0.0, False), (0.0, 20, 0.1, False),
     (0.5, 20, 0.5, False)],
)  # fmt: skip
def test_a_reward_that_was_never_earned_is_told(
    tmp_path: Path, value: float, records: int, last: float, told: bool
) -> None:
    d = judge(tmp_path, reward=np.r_[np.full(records - 1, value), last])
    assert any(f.name == "reward_silent" for f in d.findings) is told


@pytest.mark.parametrize("column", ["reward_std", "groups_flat"])
def test_a_reward_that_is_0_by_its_mean_alone_may_be_earned(tmp_path: Path, column: str) -> None:
    differs = np.r_[np.full(20, {"reward_std": 0.0, "groups_flat": 1.0}[column]), 0.4]
    d = judge(tmp_path, reward=np.zeros(21), **{column: differs})
    assert not any(f.name == "reward_silent" for f in d.findings)
