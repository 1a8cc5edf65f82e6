"""What step columns tell of completions and of how far the policy moves: bounds, words, numbers."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.courses import FLAT, GAINS, WAVE, N, then, told
from tests.support.step_logs import Bound, Columns, judge, ramp, said_on_both_sides


def by_position(count: int, top: int, high: np.ndarray, low: float) -> Columns:
    """KL to the reference in parts of the completions: one is high, the others rise slowly."""
    return {
        f"kl_positional/{n}": high if n == top else np.full(N, low * (n + 1)) for n in range(count)
    }


# A log, the finding looked at, its severity and step, words, and numbers.
TOLD = {
    "more are cut": (
        {"reward": FLAT, "truncated": then(40, 0.1, 0.8)}, "truncation_drift", "warning", 41,
        "Many completions are cut at the limit from step 41 on (10% at first, 80% at the end).",
        {"start": 0.1, "end": 0.8},
    ),
    "in each third half are cut": (
        {"reward": FLAT, "truncated": np.repeat([0.4, 0.7, 0.6], [10, 10, 40])},
        "truncation_drift", "warning", 1,
        "Many completions are cut at the limit from step 1 on (40% at first, 60% at the end).",
        {"start": 0.4, "end": 0.6},
    ),
    "just half of them": (
        {"reward": FLAT, "truncated": np.tile([0.25, 0.75], 30)}, "truncation_drift", "warning", 1,
        "Many completions are cut at the limit from step 1 on (25% at first, 50% at the end).",
        {"start": 0.25, "end": 0.5},
    ),
    "they repeat themselves": (
        {"reward": FLAT, "repetition": then(40, 0.1, 0.8)}, "repetition_drift", "warning", 41,
        "Completions repeat themselves from step 41 on (10% at first, 80% at the end).",
        {"start": 0.1, "end": 0.8},
    ),
    "longer": (
        {"reward": FLAT, "length": then(40, 100, 160)}, "length_drift", "warning", 41,
        "Completions are longer from step 41 on (100 at first, 160 at the end).",
        {"start": 100, "end": 160, "ratio": 1.6},
    ),
    "longer and longer": (
        {"reward": FLAT, "length": ramp(100, 220, N, 20, 40)}, "length_drift", "warning", 38,
        "Completions keep getting longer from step 38 on (100 at first, 210 at the end).",
        {"start": 100, "end": 209.5, "ratio": 2.095},
    ),
    "longer without a reward": (
        {"length": then(40, 100, 160)}, "length_drift", "warning", 41,
        "Completions are longer from step 41 on (100 at first, 160 at the end).",
        {"start": 100, "end": 160, "ratio": 1.6},
    ),
    "shorter, which the reward pays for": (
        {"reward": GAINS, "length": then(40, 150, 90)}, "length_drift", "info", 41,
        "Completions are shorter from step 41 on (150 at first, 90 at the end).",
        {"start": 150, "end": 90, "ratio": 0.6},
    ),
    "longer, which the training reward alone pays for": (
        {"reward": GAINS, "length": then(40, 100, 160), "eval_reward": np.full(N, 0.4)},
        "length_drift", "warning", 41,
        "Completions are longer, which the training reward pays for and the held-out "
        "score does not, from step 41 on (100 at first, 160 at the end).",
        {"start": 100, "end": 160, "ratio": 1.6},
    ),
    "less diverse": (
        {"reward": FLAT, "distinct": then(40, 1, 0)}, "diversity_falls", "warning", 41,
        "Completions resemble each other more (their diversity as logged) from step 41 "
        "on (100% at first, 0% at the end).",
        {"start": 1, "end": 0},
    ),
    "both clips, of the column that is long enough": (
        {"reward": FLAT, "clip_any": then(40, 0.02, 0.3),
         "clip_ratio/region_mean": np.where(np.arange(N) < 7, 0.3, np.nan)},
        "clip_saturation", "warning", 41,
        "The clip takes the gradient from a fifth of the tokens or more from step 41 on (2% at "
        "first, 30% at the end).",
        {"start": 0.02, "end": 0.3},
    ),
    "far from the reference": (
        {"reward": FLAT, "kl_ref": then(40, 0.01, 0.7)}, "kl_drift", "warning", 41,
        "The policy is far from the reference model (KL in nats per token) from step 41 on (0.01 "
        "at first, 0.7 at the end).",
        {"start": 0.01, "end": 0.7, "reward_start": 0.3, "reward_peak": 0.3, "reward_end": 0.3},
    ),
    "far from it without a reward, and below nothing at first": (
        {"kl_ref": then(40, -0.01, 0.7)}, "kl_drift", "warning", 41,
        "The policy is far from the reference model (KL in nats per token) from step 41 on (-0.01 "
        "at first, 0.7 at the end).",
        {"start": -0.01, "end": 0.7},
    ),
    "far at the beginning": (
        by_position(4, 0, then(40, 0.01, 0.9), 0.05), "kl_by_position", "warning", 41,
        "The policy leaves the reference model at the beginning of completions: 0.9 nats a token "
        "in part 1 of 4, 0.15 in the others (from step 41 on).",
        {"part": 1, "end": 0.9, "others": 0.15},
    ),
    "far in the middle": (
        by_position(4, 2, then(40, 0.01, 0.9), 0.05), "kl_by_position", "warning", 41,
        "The policy leaves the reference model at part 3 of 4 of completions: 0.9 nats a token "
        "in part 3 of 4, 0.1 in the others (from step 41 on).",
        {"part": 3, "end": 0.9, "others": 0.1},
    ),
    "far at the end": (
        by_position(3, 2, then(40, 0.01, 0.9), 0.05), "kl_by_position", "warning", 41,
        "The policy leaves the reference model at the end of completions: 0.9 nats a token in "
        "part 3 of 3, 0.075 in the others (from step 41 on).",
        {"part": 3, "end": 0.9, "others": 0.075},
    ),
    "two engines, by the measure that is off first": (
        {"reward": FLAT, "engine_kl": then(40, 0.001, 0.05),
         "engine_logp_diff": then(20, 0.001, 0.2), "engine_prob_diff": np.full(N, 0.01)},
        "train_inference_mismatch", "warning", 21,
        "The sampling engine and the trainer give different probabilities (mean difference in "
        "nats) from step 21 on (0.001 at first, 0.2 at the end).",
        {"start": 0.001, "end": 0.2, "engine_kl": 0.05, "engine_logp_diff": 0.2,
         "engine_prob_diff": 0.01},
    ),
    "older and older samples": (
        {"reward": FLAT, "staleness": then(40, 1, 6)}, "staleness", "warning", 41,
        "The samples come from an older policy than the one they train (updates behind) from step "
        "41 on (1 at first, 6 at the end).",
        {"start": 1, "end": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_all_that_is_told_of_it(tmp_path: Path, case: str) -> None:
    columns, name, severity, step, message, numbers = TOLD[case]
    found = told(judge(tmp_path, **columns), name)
    assert found is not None
    assert (found.severity, found.step, found.message) == (severity, step, message)
    assert found.evidence == pytest.approx(numbers)


@pytest.mark.parametrize(
    "columns",
    [
        {"length": then(30, 0, 100)},
        {"distinct": np.r_[-0.1, then(39, 0.8, 0.3, N - 1)]},  # no share
        {"distinct": np.r_[1.2, then(39, 0.8, 0.3, N - 1)]},
        by_position(2, 0, then(40, 0.01, 0.9), 0.05),
        {"engine_kl": np.full(N, 0.009), "engine_logp_diff": np.full(N, 0.04)},
    ],
)
def test_nothing_is_told_of_it(tmp_path: Path, columns: Columns) -> None:
    assert not judge(tmp_path, reward=FLAT, **columns).findings


# A finding, its severity, a log with one number in it, a value just inside and one just beyond.
BOUNDS: dict[str, Bound] = {
    "half are cut, wherever it began": ("truncation_drift", "warning",
        lambda x: {"reward": FLAT, "truncated": ramp(0.4, x, N, 30, 10)}, 0.499, 0.5),
    "half repeat themselves, wherever it began": ("repetition_drift", "warning",
        lambda x: {"reward": FLAT, "repetition": ramp(0.4, x, N, 30, 10)}, 0.499, 0.5),
    "half of the diversity is left": ("diversity_falls", "warning",
        lambda x: {"reward": FLAT, "distinct": then(40, 0.5, x)}, 0.251, 0.25),
    "the diversity fell by six sigma": ("diversity_falls", "warning",
        lambda x: {"reward": FLAT, "distinct": np.clip(then(30, 0.6, x) + 0.04 * WAVE, 0, 1)},
        0.136, 0.132),
    "a gain before the distance doubled pays for nothing": ("kl_drift", "info",
        lambda x: {"reward": np.r_[ramp(0.2, 0.5, 40, 0, 39), np.full(20, 0.5)],
                   "kl_ref": ramp(0.01, 1.5, N, int(x), 59 - int(x))}, 22, 21),
    "the distance doubled from where it was half": ("kl_drift", "info",
        lambda x: {"reward": then(35, 0.2, 0.2 + x),
                   "kl_ref": ramp(0.01, 1.5, N, 0, 59)}, 0.0057, 0.0059),
    "a part is half of all": ("kl_by_position", "warning",
        lambda x: {f"kl_positional/{n}": then(40, 0.01, x) if n == 0 else np.full(N, 0.125)
                   for n in range(9)}, 0.999, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDS)
def test_it_begins_at_its_bound(tmp_path: Path, case: str) -> None:
    assert said_on_both_sides(tmp_path, BOUNDS[case]) == [False, True]


def test_a_clip_that_is_logged_by_sides_is_told_by_sides(tmp_path: Path) -> None:
    sides = {"clip_low": then(40, 0.02, 0.3), "clip_high": then(30, 0.02, 0.3)}
    d = judge(tmp_path, reward=FLAT, **sides, clip_any=np.full(N, 0.6))
    assert [(f.name, f.step) for f in d.findings] == [
        ("clip_saturation_high", 31), ("clip_saturation_low", 41)
    ]  # fmt: skip
    low, high = (told(d, f"clip_saturation_{side}") for side in ("low", "high"))
    assert low is not None
    assert high is not None
    assert (low.message[:14], high.message[:14]) == ("The lower clip", "The upper clip")


def test_a_clip_is_judged_from_eight_records_on(tmp_path: Path) -> None:
    for count, names in ((7, []), (8, ["clip_saturation"])):
        columns = {"reward": FLAT[:10], "clip_any": np.where(np.arange(10) < count, 0.3, np.nan)}
        found = judge(tmp_path / str(count), **columns).findings
        assert [f.name for f in found if f.name.startswith("clip")] == names


def test_a_length_that_the_training_reward_alone_pays_for_is_not_fine(tmp_path: Path) -> None:
    columns = {"reward": GAINS, "length": then(40, 100, 160)}
    fine = told(judge(tmp_path / "fine", **columns), "length_drift")
    alone = judge(tmp_path / "alone", **columns, eval_reward=np.full(N, 0.4))
    warned = told(alone, "length_drift")
    assert fine is not None
    assert warned is not None
    assert str(fine.advice).startswith("Fine while the reward rises")
    assert str(warned.advice).startswith("Read the longest completions")


def test_what_the_reward_gained_before_the_distance_was_half_pays_for_nothing(
    tmp_path: Path,
) -> None:
    columns = {"reward": then(30, 0.2, 0.5), "kl_ref": np.repeat([0.1, 0.5, 1.0], 20)}
    found = told(judge(tmp_path, **columns), "kl_drift")
    assert found is not None
    assert found.severity == "warning"


PARTS = ("kl_positional/0", "kl_positional/1", "kl_positional/2", "kl_positional/3")
JUST_SO_MUCH: dict[str, tuple[str, str, Columns]] = {
    "ten times the drift": ("off_policy_drift", "warning", {"kl_old": then(40, 0.001, 0.01)}),
    "lengths of a token or two": ("length_drift", "warning", {"length": then(40, 0.9, 2)}),
    "half again as long": ("length_drift", "warning", {"length": then(40, 100, 150)}),
    "two thirds of the length": ("length_drift", "warning", {"length": then(40, 150, 100)}),
    "a fifth is clipped": ("clip_saturation", "warning", {"clip_any": np.full(N, 0.2)}),
    "five times as far": ("kl_drift", "warning", {"kl_ref": then(40, 0.125, 0.625)}),
    "far": ("kl_drift", "warning", {"kl_ref": then(40, 0.01, 0.5)}),
    "far, which is paid": ("kl_drift", "info", {"reward": GAINS, "kl_ref": then(40, 0.01, 1)}),
    "too far": ("kl_drift", "warning", {"reward": GAINS, "kl_ref": then(40, 0.01, 2)}),
    "a gain of just what counts pays for nothing": ("kl_drift", "warning",
        {"reward": then(60, 150, 153, 200), "kl_ref": then(50, 0.01, 0.75, 200)}),
    "five times as far in one part": ("kl_by_position", "warning",
        dict(zip(PARTS[:3], [then(40, 0.125, 0.625), *[np.full(N, 0.125)] * 2], strict=True))),
    "far in one part": ("kl_by_position", "warning",
        dict(zip(PARTS[:3], [then(40, 0.01, 0.2), *[np.full(N, 0.01)] * 2], strict=True))),
    "four times as far as in the others": ("kl_by_position", "warning",
        dict(zip(PARTS, [then(40, 0.01, 1), *[np.full(N, 0.25)] * 3], strict=True))),
    "four updates behind": ("staleness", "warning", {"staleness": then(40, 1, 4)}),
    "twice as far behind": ("staleness", "warning", {"staleness": then(40, 3, 6)}),
    "a KL of two engines": ("train_inference_mismatch", "warning", {"engine_kl": 0 * FLAT + 0.01}),
}  # fmt: skip


@pytest.mark.parametrize("case", JUST_SO_MUCH)
def test_just_so_much_is_told(tmp_path: Path, case: str) -> None:
    name, severity, columns = JUST_SO_MUCH[case]
    found = told(judge(tmp_path, **({"reward": FLAT} | dict(columns))), name)
    assert found is not None
    assert found.severity == severity
