"""Where what is told of a reward or an entropy begins, and of which courses nothing is told."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.courses import (
    CALM,
    CONTENT,
    FLAT,
    OTHER,
    WAVE,
    N,
    functions,
    levels,
    parts,
    summed,
    then,
    told,
)
from tests.support.step_logs import Bound, Columns, judge, ramp, said_on_both_sides

LONG = np.random.default_rng(7).normal(0, 1, 100)
LOST = levels((60, 0.6), (40, 0.1))
SLOWLY_LOST = np.r_[np.full(40, 0.6), ramp(0.6, 0.1, 60, 0, 20)]
# A finding, its severity, a log with one number in it, a value just inside and one just beyond.
BOUNDS: dict[str, Bound] = {
    "form rises by four sigma": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.2 + x) + 0.1 * WAVE,
                            correct=FLAT + 0.2), 0.108, 0.109),
    "form rises by a fifth of the most it gave": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 2, 2 + x), correct=FLAT + 0.2),
        0.498, 0.5),
    "form that stood by the middle rises late enough": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(int(x), 0.2, 0.8), correct=FLAT + 0.2), 17, 18),
    "content stands within two sigma": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.8),
                            correct=then(40, 0.5, 0.5 + x) + 0.05 * WAVE), 0.0028, 0.0024),
    "content stands by a share of the most it gave": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.8),
                            correct=np.r_[3, then(40, 2, 2 + x)[1:]]), 0.17, 0.168),
    "or of the share alone": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.8),
                            correct=np.r_[3, then(40, 2, 2 + x)[1:]] + CALM[:N]), 0.092, 0.0905),
    "content is unsolved by the most it gave": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.8),
                            correct=np.r_[3, np.full(N - 1, x)]), 2.41, 2.39),
    "weights are told where they explain three quarters": ("one_reward_takes_over", "warning",
        lambda x: functions(0.9 + 0.15 * WAVE + 0.5 * CONTENT + x * LONG[:N],
                            format=0.3 + 0.05 * WAVE, correct=CONTENT), 0.1025, 0.101),
    "and four records a function": ("one_reward_takes_over", "warning",
        lambda x: functions((0.9 + 0.06 * WAVE + 0.14 + 0.01 * OTHER)[: int(x)],
                            format=(0.3 + 0.02 * WAVE)[: int(x)],
                            correct=(0.28 + 0.02 * OTHER)[: int(x)]), 7, 8),
    "three fifths are most": ("one_reward_takes_over", "warning",
        lambda x: functions(np.ones(N), format=np.full(N, x), correct=np.full(N, 0.25)),
        0.374, 0.375),
    "content that gained a quarter of it is learned": ("one_reward_takes_over", "warning",
        lambda x: summed(format=0.75 + CALM[:N], correct=then(30, 0.25 - x, 0.25)), 0.251, 0.248),
    "also if two have": ("one_reward_takes_over", "warning",
        lambda x: summed(format=1 + CALM[:N], correct=then(30, 0.2 - x, 0.2),
                         sql=then(20, 0.25 - x, 0.25)), 0.183, 0.179),
    "what pays now has paid for three records": ("one_reward_takes_over", "warning",
        lambda x: summed(format=then(int(x), 0.5, -0.5), correct=0.25 + CALM[:N]), 59, 60),
    "form rises by four sigma of what wanders": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, correct=FLAT + 0.2,
                            format=then(40, 0.2, 0.2 + x) + 0.25 * np.sin(np.arange(N) / 3)
                            + 0.02 * WAVE), 0.433, 0.4365),
    "a function that moves at all is not silent": ("reward_function_silent", "info",
        lambda x: functions(FLAT, a=np.r_[FLAT[1:], 0.3 + x], b=FLAT + 0.1 * WAVE), 1e-6, 0),
    "an entropy rises by three sigma": ("entropy_rise", "warning",
        lambda x: {"reward": FLAT, "entropy": np.abs(ramp(1, x, N, 25, 5) + 0.2 * WAVE)},
        1.355, 1.365),
    "by six sigma it explodes": ("entropy_explosion", "critical",
        lambda x: {"reward": FLAT, "entropy": np.abs(ramp(1, x, N, 25, 5) + 0.3 * WAVE)},
        3.37, 3.39),
    "an entropy falls by a factor of three sigma": ("entropy_fall", "warning",
        lambda x: {"reward": FLAT,
                   "entropy": np.abs(ramp(1, x, N, 25, 5) + 0.3 * WAVE * ramp(1, 0.1, N, 25, 5))},
        0.302, 0.3),
    "by a factor of six sigma it collapses": ("entropy_collapse", "critical",
        lambda x: {"reward": FLAT,
                   "entropy": np.abs(ramp(1, x, N, 25, 5) + 0.3 * WAVE * ramp(1, 0.02, N, 25, 5))},
        0.134, 0.131),
    "a loss of the reward is eight records old": ("entropy_collapse", "critical",
        lambda x: {"reward": levels((100 - int(x), 0.6), (int(x), 0.1)),
                   "entropy": levels((40, 0.4), (60, 0.18))}, 7, 8),
    "the entropy has been low since": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST,
                   "entropy": levels((40, 0.4), (53 - int(x), 0.18), (3, 0.3), (4 + int(x), 0.18))},
        1, 2),
    "it has been half at most": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST, "entropy": levels((40, 0.5), (30, 0.25), (30, x))},
        0.2501, 0.25),
    "it does not rise since the reward falls": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST, "entropy": levels((40, 0.4), (30, 0.15), (30, x))},
        0.1501, 0.15),
    "it fell a tenth of the run after the reward at most": ("entropy_collapse", "critical",
        lambda x: {"reward": levels((50, 0.6), (50, 0.1)),
                   "entropy": levels((50 + int(x), 0.4), (50 - int(x), 0.15))}, 10, 9),
    "to half of its baseline": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST, "entropy": levels((40, 0.5), (35, x), (25, 0.12))},
        0.251, 0.25),
    "by a tenth of the run after the reward was lost": ("entropy_collapse", "critical",
        lambda x: {"reward": SLOWLY_LOST, "entropy": levels((int(x), 0.4), (100 - int(x), 0.15))},
        62, 61),
    "it rises since the reward began to fall": ("entropy_collapse", "critical",
        lambda x: {"reward": SLOWLY_LOST,
                   "entropy": levels((30, 0.4), (int(x), 0.14), (70 - int(x), 0.16))}, 14, 13),
    "an entropy that is no longer logged was low by then": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST,
                   "entropy": np.r_[levels((int(x) - 10, 0.4), (10, 0.18)),
                                    np.full(100 - int(x), np.nan)]}, 78, 77),
    "a gain pays for two records more": ("entropy_collapse", "critical",
        lambda x: {"reward": np.r_[ramp(0.2, 0.4, 60 - int(x), 0, 59 - int(x)),
                                   np.full(int(x), 0.4)] + 0.003 * WAVE,
                   "entropy": parts((20, 0.4), (40, 0.06))}, 14, 15),
    "a rise of little entropy": ("entropy_explosion", "critical",
        lambda x: {"reward": FLAT, "entropy": ramp(0.02, x, N, 20, 15)}, 0.0699, 0.0701),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDS)
def test_it_begins_at_its_bound(tmp_path: Path, case: str) -> None:
    assert said_on_both_sides(tmp_path, BOUNDS[case]) == [False, True]


LATE_LOSS = np.r_[np.full(88, 0.6), 0.1, 0.1]
STOOD_LOWER = np.r_[parts((70, 0.6), (20, 0.44)), 0.1, 0.1]


@pytest.mark.parametrize(
    ("reward", "more", "names"),
    [
        (LATE_LOSS, {}, []),
        (LATE_LOSS, {"clip_low": np.full(90, 0.3)}, ["reward_collapse", "clip_saturation_low"]),
        (LATE_LOSS, {"length": np.repeat([100, 300], [40, 50])}, ["length_drift"]),
        (LATE_LOSS, {"grad_norm": np.r_[np.ones(30), 3.2, np.ones(59)]}, ["gradient_spikes"]),
        (STOOD_LOWER, {}, ["reward_drop"]),
        (STOOD_LOWER, {"clip_low": np.full(92, 0.3)}, ["reward_collapse", "clip_saturation_low"]),
    ],
)
def test_two_records_are_a_loss_where_a_warning_says_that_the_steps_are_too_large(
    tmp_path: Path, reward: np.ndarray, more: Columns, names: list[str]
) -> None:
    found = judge(tmp_path, reward=reward, **more).findings
    assert [f.name for f in found] == names
    assert all(f.step == len(reward) - 1 for f in found if f.name == "reward_collapse")


NOTHING_TOLD = {
    "one function alone": ("one_reward_takes_over", functions(FLAT, format=FLAT)),
    "functions that pay nothing": (
        "one_reward_takes_over", functions(np.zeros(N), format=np.zeros(N), correct=np.zeros(N))),
    "functions that pay nothing any more": (
        "one_reward_takes_over",
        functions(np.zeros(N), format=then(30, 0.2, 0), correct=then(30, 0.2, 0))),
    "content that pays more than form": (
        "one_reward_takes_over",
        functions(np.ones(N), format=np.full(N, 0.2), correct=np.full(N, 0.8))),
    "one content that is rare, and one that is not": (
        "one_reward_takes_over",
        functions(FLAT, format=np.ones(N), correct=np.full(N, 0.4), sql=np.full(N, 0.1))),
    "form alone": (
        "form_rises_alone", functions(FLAT, format=then(40, 0.2, 0.8), xml=then(40, 0.2, 0.8))),
    "form that has taken over": (
        "form_rises_alone",
        summed(format=then(40, 0.2, 0.8), correct=0.25 + CALM[:N])),
    "content of which a part rises": (
        "form_rises_alone",
        functions(FLAT, format=then(40, 0.2, 0.8), correct=then(40, 0.2, 0.8), sql=FLAT)),
    "a plateau that is solved": ("plateau", {"reward": ramp(0.2, 0.9, 100, 5, 20)}),
    "a reward that never rose": ("plateau", {"reward": np.full(100, 0.4)}),
    "a first record below all others": ("plateau", {"reward": np.r_[0.2, np.full(99, 0.6)]}),
    "a reward that fell a little": (
        "plateau",
        {"reward": np.r_[ramp(0.2, 0.7, 140, 5, 15), np.full(60, 0.66)] + CALM}),
    "a reward that still gains": (
        "plateau",
        {"reward": ramp(0.2, 0.5, 300, 5, 50) + ramp(0, 0.047, 300, 200, 99)
         + 0.05 * np.random.default_rng(12).normal(0, 1, 300)}),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING_TOLD)
def test_nothing_is_told_of_it(tmp_path: Path, case: str) -> None:
    name, columns = NOTHING_TOLD[case]
    assert told(judge(tmp_path, **columns), name) is None


def test_of_two_forms_the_one_that_rose_most_is_named(tmp_path: Path) -> None:
    noisy, clear = then(40, 0.2, 0.5) + 0.04 * WAVE, then(40, 0.2, 0.8)
    columns = functions(FLAT + 0.2, format=noisy, xml=clear, correct=FLAT + 0.2)
    found = told(judge(tmp_path, **columns), "form_rises_alone")
    assert found is not None
    assert found.evidence["function"] == "xml"


@pytest.mark.parametrize("reward", [parts((60, 0.6), (30, 0.1)), None])
def test_a_loss_that_is_clear_needs_no_other_warning(
    tmp_path: Path, reward: np.ndarray | None
) -> None:
    columns = {} if reward is None else {"reward": reward}
    found = judge(tmp_path, **columns, clip_low=np.full(90, 0.3)).findings
    lost = [] if reward is None else [("reward_collapse", 61)]
    assert [(f.name, f.step) for f in found] == [*lost, ("clip_saturation_low", 1)]


def test_an_entropy_that_is_logged_after_the_loss_alone_did_not_fall_before(tmp_path: Path) -> None:
    entropy = np.r_[np.full(75, np.nan), levels((10, 0.4), (15, 0.15))]
    names = [f.name for f in judge(tmp_path, reward=LOST, entropy=entropy).findings]
    assert "entropy_fall" in names
    assert "entropy_collapse" not in names


def test_a_fall_that_is_paid_is_judged_from_eight_records_on(tmp_path: Path) -> None:
    reward, entropy = np.linspace(0.2, 0.8, 9), levels((3, 0.4), (6, 0.06))
    for count in (8, 9):
        d = judge(tmp_path / str(count), reward=reward[:count], entropy=entropy[:count])
        (found,) = [f for f in d.findings if f.name.startswith("entropy")]
        assert (found.name, found.severity) == ("entropy_decline", "info")
        assert str(found.advice).startswith("Normal while the reward rises")


def test_a_function_that_varies_within_a_step_is_not_silent(tmp_path: Path) -> None:
    columns = functions(FLAT, a=FLAT, b=FLAT + 0.1 * WAVE)
    d = judge(tmp_path, **columns, **{"rewards/a/std": np.full(N, 0.1)})
    assert told(d, "reward_function_silent") is None
    d = judge(tmp_path / "still", **columns, **{"rewards/a/std": np.zeros(N)})
    assert told(d, "reward_function_silent") is not None


def test_a_little_more_of_little_entropy_is_no_rise(tmp_path: Path) -> None:
    assert not judge(tmp_path / "up", reward=FLAT, entropy=ramp(0.02, 0.069, N, 20, 15)).findings
    none = judge(tmp_path / "none", reward=FLAT, entropy=np.zeros(N))
    assert not none.findings, "what was nothing all along"
