"""What is told of a course in full: severity, steps, words and numbers, and what is not told."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import Columns, judge, ramp
from wapo_analysis.diagnose import Diagnosis, Finding

N = 60
FLAT = np.full(N, 0.3)
WAVE = np.random.default_rng(5).normal(0, 1, N)
LONG = np.random.default_rng(7).normal(0, 1, 100)
CALM = 0.002 * np.random.default_rng(3).normal(0, 1, 200)
GAINS = ramp(0.2, 0.7, N, 5, 55)
OTHER = np.random.default_rng(8).normal(0, 1, N)
FORMAT, CONTENT = ramp(0.2, 0.9, N, 20, 15) + 0.05 * WAVE, 0.25 + 0.05 * OTHER
CLIPPED = {"clip_low": np.full(N, 0.3)}


def parts(*lengths_and_levels: tuple[int, float]) -> np.ndarray:
    """Levels one after the other, with a little noise."""
    levels = np.concatenate([np.full(length, float(level)) for length, level in lengths_and_levels])
    return levels + CALM[: len(levels)]


def functions(reward: np.ndarray, **means: np.ndarray) -> Columns:
    return {"reward": reward, **{f"rewards/{name}/mean": values for name, values in means.items()}}


def then(count: int, before: float, after: float) -> np.ndarray:
    return np.r_[np.full(count, before), np.full(N - count, after)]


def told(diagnosis: Diagnosis, name: str) -> Finding | None:
    return next((f for f in diagnosis.findings if f.name == name), None)


# A log, the finding looked at, its severity and steps (first, warned, until), words, and numbers.
TOLD = {
    "a drop": (
        {"reward": parts((40, 0.6), (20, 0.42))},
        "reward_drop", "warning", (41, 41, None),
        "Reward fell from 0.60 at its best to 0.42 from step 41.",
        {"reward_start": 0.5991, "reward_peak": 0.6013, "reward_end": 0.42, "best_step": 39,
         "lost_share": 0.3015},
    ),
    "a drop below nothing": (
        {"reward": parts((40, -0.6), (20, -0.8))},
        "reward_drop", "warning", (41, 41, None),
        "Reward fell from -0.60 at its best to -0.80 from step 41.",
        {"reward_start": -0.6009, "reward_peak": -0.5987, "reward_end": -0.8, "best_step": 39,
         "lost_share": None},
    ),
    "a loss": (
        {"reward": parts((40, 0.6), (20, 0.2)), "entropy": then(40, 0.4, 0.5)},
        "reward_collapse", "critical", (41, 41, 41),
        "Reward fell from 0.60 at its best to 0.20 from step 41.",
        {"reward_start": 0.5991, "reward_peak": 0.6013, "reward_end": 0.2, "best_step": 39,
         "lost_share": 0.6674, "entropy_start": 0.4, "entropy_end": 0.5},
    ),
    "a loss that came back": (
        {"reward": parts((30, 0.6), (10, 0.2), (20, 0.6))},
        "reward_drop", "info", (31, 31, 31),
        "Reward fell from 0.60 at its best to 0.20 from step 31, then came back.",
        {"reward_start": 0.5991, "reward_peak": 0.6015, "reward_end": 0.6, "best_step": 30,
         "lost_share": 0.0025},
    ),
    "a climb of which a third is lost": (
        {"reward": np.r_[ramp(0.2, 0.8, 40, 5, 20), ramp(0.8, 0.6, 60, 5, 20)] + CALM[:100]},
        "fall_after_climb", "warning", (39, None, None),
        "Reward climbed from 0.25 to 0.80 around step 33 and has fallen to 0.60 since: 37% "
        "of the climb is lost.",
        {"reward_start": 0.2523, "reward_peak": 0.8003, "reward_end": 0.5998, "best_step": 33,
         "lost_share": 0.3658},
    ),
    "a plateau": (
        {"reward": ramp(0.2, 0.6, 100, 5, 20)},
        "plateau", "info", (24, None, None),
        "Reward rose from 0.20 and has stood at 0.60 since step 24, for 77 of 100 records.",
        {"reward_start": 0.2, "reward_end": 0.6},
    ),
    "one of two pays": (
        functions(np.ones(N), alpha=np.full(N, 0.9), beta=np.full(N, 0.1)),
        "one_reward_takes_over", "info", (1, None, None),
        "alpha supplies 90% of the reward from step 1 on; beta is rarely earned (beta 0.1).",
        {"function": "alpha", "share": 0.9, "rest": "beta"},
    ),
    "two forms pay": (
        functions(np.full(N, 1.05), format=np.full(N, 0.5), xml=np.full(N, 0.4),
         correct=np.full(N, 0.1), sql=np.full(N, 0.05)),
        "one_reward_takes_over", "warning", (1, None, None),
        "format and xml supply 86% of the reward from step 1 on; correct and sql are rarely"
        " earned (correct 0.1, sql 0.05).",
        {"function": "format and xml", "share": 0.8571, "rest": "correct and sql"},
    ),
    "one of two forms pays": (
        functions(np.ones(N), format=np.full(N, 0.9), xml=np.full(N, 0.1)),
        "one_reward_takes_over", "info", (1, None, None),
        "format supplies 90% of the reward from step 1 on; xml is rarely earned (xml 0.1).",
        {"function": "format", "share": 0.9, "rest": "xml"},
    ),
    "what costs is no part of it": (
        functions(np.zeros(N), format=np.full(N, 0.5), correct=np.full(N, -0.5)),
        "one_reward_takes_over", "warning", (1, None, None),
        "format supplies 100% of the reward from step 1 on; correct is rarely earned "
        "(correct -0.5).",
        {"function": "format", "share": 1.0, "rest": "correct"},
    ),
    "one is logged less often": (
        functions(np.ones(N), format=np.full(N, 0.9), correct=np.where(np.arange(N) % 2, 0.1,
         np.nan)),
        "one_reward_takes_over", "warning", (2, None, None),
        "format supplies 90% of the reward from step 2 on; correct is rarely earned "
        "(correct 0.1).",
        {"function": "format", "share": 0.9, "rest": "correct"},
    ),
    "two forms rise": (
        functions(FLAT + 0.2, format=then(40, 0.2, 0.8), xml=then(40, 0.2, 0.5),
         correct=np.full(N, 0.5), sql=np.full(N, 0.6)),
        "form_rises_alone", "warning", (31, None, None),
        "From step 31 on format rose by 0.6 to 0.8, while correct and sql stand (correct "
        "0.5, sql 0.6): what is gained is form.",
        {"function": "format", "gain": 0.6, "rest": "correct and sql"},
    ),
    "form rises early": (
        functions(FLAT + 0.2, format=then(20, 0.2, 0.8), correct=np.full(N, 0.5)),
        "form_rises_alone", "warning", (16, None, None),
        "From step 16 on format rose by 0.43 to 0.8, while correct stands (correct 0.5): "
        "what is gained is form.",
        {"function": "format", "gain": 0.4286, "rest": "correct"},
    ),
    "silent": (
        functions(FLAT, a=FLAT, b=FLAT + 0.1 * WAVE),
        "reward_function_silent", "info", (1, None, None),
        "The reward function a has been 0.3 at every step: it teaches nothing.",
        {"function": "a", "value": 0.3},
    ),
    "form pays by its weight": (
        functions(FORMAT + 2 * CONTENT, format=FORMAT, correct=CONTENT),
        "one_reward_takes_over", "warning", (38, None, None),
        "format supplies 62% of the reward from step 38 on; correct is rarely earned "
        "(correct 0.29).",
        {"function": "format", "share": 0.6195, "rest": "correct"},
    ),
    "a weight below nothing is none": (
        functions(FORMAT - CONTENT, format=FORMAT, correct=CONTENT),
        "one_reward_takes_over", "warning", (25, None, None),
        "format supplies 77% of the reward from step 25 on; correct is rarely earned "
        "(correct 0.29).",
        {"function": "format", "share": 0.765, "rest": "correct"},
    ),
    "form pays from a step": (
        functions(np.full(N, 5.0), format=then(20, 0.2, 0.5), correct=np.full(N, 0.25)),
        "one_reward_takes_over", "warning", (21, None, None),
        "format supplies 67% of the reward from step 21 on; correct is rarely earned "
        "(correct 0.25).",
        {"function": "format", "share": 0.6667, "rest": "correct"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_all_that_is_told_of_it(tmp_path: Path, case: str) -> None:
    columns, name, severity, steps, message, numbers = TOLD[case]
    found = told(judge(tmp_path, **columns), name)
    assert found is not None
    assert (found.severity, found.message) == (severity, message)
    assert (found.step, found.warned, found.until) == steps
    assert found.evidence == pytest.approx(numbers, abs=6e-5, nan_ok=True)


# A finding, its severity, a log with one number in it, a value just inside and one just beyond.
BOUNDS: dict[str, tuple[str, str, Callable[[float], Columns], float, float]] = {
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
        lambda x: functions(np.full(N, 5.0), format=np.full(N, x), correct=np.full(N, 0.25)),
        0.374, 0.375),
    "content that gained a quarter of it is learned": ("one_reward_takes_over", "warning",
        lambda x: functions(np.full(N, 5.0), format=np.full(N, 0.75),
                            correct=then(30, 0.25 - x, 0.25)), 0.25, 0.249),
    "also if two have": ("one_reward_takes_over", "warning",
        lambda x: functions(np.full(N, 5.0), format=np.ones(N), correct=then(30, 0.2 - x, 0.2),
                            sql=then(30, 0.25 - x, 0.25)), 0.182, 0.1805),
    "what pays now has paid for three records": ("one_reward_takes_over", "warning",
        lambda x: functions(np.full(N, 5.0), format=then(int(x), 0.5, -0.5),
                            correct=np.full(N, 0.25)), 59, 60),
    "a function that moves at all is not silent": ("reward_function_silent", "info",
        lambda x: functions(FLAT, a=np.r_[FLAT[1:], 0.3 + x], b=FLAT + 0.1 * WAVE), 1e-6, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDS)
def test_it_begins_at_its_bound(tmp_path: Path, case: str) -> None:
    name, severity, columns, inside, beyond = BOUNDS[case]
    within = told(judge(tmp_path / "inside", **columns(inside)), name)
    found = told(judge(tmp_path / "beyond", **columns(beyond)), name)
    assert within is None or within.severity != severity
    assert found is not None
    assert found.severity == severity


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


@pytest.mark.parametrize(
    "columns",
    [
        functions(np.full(N, 0.9), format=np.full(N, 0.9)),
        functions(np.zeros(N), format=np.zeros(N), correct=np.zeros(N)),
    ],
)
def test_one_function_alone_or_none_that_pays_takes_nothing_over(
    tmp_path: Path, columns: Columns
) -> None:
    assert told(judge(tmp_path, **columns), "one_reward_takes_over") is None


def test_a_function_that_varies_within_a_step_is_not_silent(tmp_path: Path) -> None:
    columns = functions(FLAT, a=FLAT, b=FLAT + 0.1 * WAVE)
    d = judge(tmp_path, **columns, **{"rewards/a/std": np.full(N, 0.1)})
    assert told(d, "reward_function_silent") is None
    d = judge(tmp_path / "still", **columns, **{"rewards/a/std": np.zeros(N)})
    assert told(d, "reward_function_silent") is not None
