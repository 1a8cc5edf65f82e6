"""Broken numbers, gradients, the learning rate and the pace: where each finding begins and ends."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.step_logs import Columns, found_by, ramp, seen, write_flows
from wapo_analysis.diagnose import Finding
from wapo_analysis.diagnose.context import Context
from wapo_analysis.store import open_run

N = 60
FLAT = np.full(N, 0.3)
LATE = np.arange(N) >= 30
WAVE = np.random.default_rng(5).normal(0, 1, N)


def moved(start: float, end: float) -> np.ndarray:
    return ramp(start, end, N, 20, 15)


def check(name: str, path: Path, columns: Columns, **described: Any) -> list[Finding]:
    return found_by(name, seen(path / "run", columns, **described))


def but(value: float | None, *places: int, usual: float = 0.5, count: int = 20) -> list:
    """A column that is the same in every record but some; NaN is a null, None is left out."""
    return [value if i in places else usual for i in range(count)]


# ---- what is not finite --------------------------------------------------------------------------

NAN, ONES = math.nan, [1.0] * 20
BROKEN: dict[str, tuple[dict[str, Any], list[tuple[str, int, str]]]] = {
    "a loss": (
        {"loss": but(NAN, 7)}, [("nonfinite_step", 8, "At step 8 loss was not finite.")],
    ),
    "a loss that is not in the record": ({"loss": but(None, 7)}, []),
    "a loss of every second step": ({"loss": [0.5, NAN] * 10}, []),
    "a loss of every fifth step, and a gap": (
        {"loss": [*[0.5, *[NAN] * 4] * 2, *[NAN] * 5, 0.5, *[NAN] * 4], "reward": ONES},
        [("nonfinite_step", 7, "At steps 7 to 15 loss was not finite.")],
    ),
    "a second record without a loss": (
        {"loss": [0.5, NAN], "reward": [1.0, 1.0]},
        [("nonfinite_step", 2, "At step 2 loss was not finite.")],
    ),
    "a loss of the first and the sixth": (
        {"loss": [0.5, *[NAN] * 4, 0.5, *[NAN] * 4], "reward": [1.0] * 10}, [],
    ),
    "a loss that never was": ({"loss": [NAN] * 20, "reward": ONES}, []),
    "two columns": (
        {"loss": but(NAN, 7), "grad_norm": but(NAN, 7, 9)},
        [("nonfinite_step", 8, "At steps 8, 10 loss and grad_norm were not finite.")],
    ),
    "an update that was skipped": (
        {"loss": but(NAN, 7), "skipped_updates": but(1, 7, 8, usual=0)},
        [("nonfinite_step", 8, "At steps 8 to 9 loss was not finite, updates were skipped.")],
    ),
    "tokens": (
        {"loss": but(0.5), "nonfinite": but(1, 3, usual=0)},
        [("nonfinite_step", 4, "At step 4 some tokens had a logp or entropy that was not finite.")],
    ),
    "two at the end": (
        {"loss": but(NAN, 18, 19)},
        [("nonfinite_step", 19, "At steps 19 to 20 loss was not finite.")],
    ),
    "three at the end": (
        {"loss": but(NAN, 17, 18, 19)},
        [("diverged", 18, "From step 18 to the end (3 steps) loss was not finite.")],
    ),
    "three at the end, and before": (
        {"loss": but(NAN, 4, 17, 18, 19), "nonfinite": but(2, 5, 18, usual=0)},
        [
            ("diverged", 18, "From step 18 to the end (3 steps) loss was not finite."),
            ("nonfinite_step", 5, "At steps 5 to 6 loss was not finite, some tokens had a logp or "
             "entropy that was not finite."),
        ],
    ),
    "tokens at the end": (
        {"loss": but(0.5), "nonfinite": but(1, 17, 18, 19, usual=0)},
        [("nonfinite_step", 18, "At steps 18 to 20 some tokens had a logp or entropy that was not "
          "finite.")],
    ),
    "all updates skipped": (
        {"loss": ONES, "skipped_updates": ONES},
        [("diverged", 1, "From step 1 to the end (20 steps) updates were skipped.")],
    ),
    "nothing": ({"loss": ONES, "skipped_updates": [0.0] * 20, "nonfinite": [0.0] * 20}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_was_not_finite(tmp_path: Path, case: str) -> None:
    columns, expected = BROKEN[case]
    found = check("nonfinite", tmp_path, columns)
    assert [(f.name, f.step, f.message) for f in found] == expected
    for one in found:
        assert one.severity == ("critical" if one.name == "diverged" else "warning")


def test_broken_steps_are_counted_by_what_broke(tmp_path: Path) -> None:
    columns = {
        "loss": but(NAN, 4, 6, 17, 18, 19), "grad_norm": but(NAN, 6, 19),
        "skipped_updates": but(2, 5, 18, usual=0), "nonfinite": but(3, 4, 7, 19, usual=0),
    }  # fmt: skip
    diverged, before = check("nonfinite", tmp_path, columns)
    assert diverged.evidence == {
        "steps": "18 to 20", "broken_steps": 3, "loss": 3, "grad_norm": 1, "skipped_updates": 1,
        "tokens_not_finite": 3.0,
    }  # fmt: skip
    assert before.evidence == {
        "steps": "5 to 8", "broken_steps": 4, "loss": 2, "grad_norm": 1, "skipped_updates": 1,
        "nonfinite": 2, "tokens_not_finite": 6.0,
    }  # fmt: skip


@pytest.mark.parametrize(("status", "names"), [("diverged", ["diverged"]), ("finished", [])])
def test_a_trainer_that_gave_up_says_so(tmp_path: Path, status: str, names: list[str]) -> None:
    columns = {"loss": ONES[:3], "grad_norm": [1.0, 2.0, 7.0]}
    found = check("nonfinite", tmp_path, columns, status=status)
    assert [f.name for f in found] == names
    assert all(f.step == 3 and f.evidence["last_step"] == 3 for f in found)


# ---- the gradient --------------------------------------------------------------------------------


def spiked(size: float, *places: int, usual: float = 1.0) -> np.ndarray:
    norms = usual * np.exp(0.03 * WAVE)
    norms[list(places)] = size * usual
    return norms


SPIKES: dict[str, tuple[np.ndarray, tuple[int, int, str, float] | None]] = {
    # (norms, (first step, largest step, severity, its ratio to its neighbours or the baseline))
    "one": (spiked(5, 30), (31, 31, "info", 5.03)),
    "of a small gradient": (spiked(5, 30, usual=0.1), (31, 31, "info", 5.03)),
    "of a large one": (spiked(5, 30, usual=100), (31, 31, "info", 5.03)),
    "ten times": (spiked(10.1, 30), (31, 31, "warning", 10.16)),
    "two": (spiked(5, 20, 30), (21, 31, "info", 5.03)),
    "three": (spiked(5, 20, 30, 40), (21, 31, "warning", 5.03)),
    "where some are zero": (
        np.where(np.arange(N) % 10 == 0, 0, spiked(5, 33)), (34, 34, "info", 5.05),
    ),
    "where all were zero at first": (
        np.where(np.arange(N) < 10, 0, spiked(5, 33)), (34, 34, "info", 5.05),
    ),
    "back to the old size": (
        np.where(LATE, 0.1, 1.0) * spiked(5, 40, usual=1.0), None,
    ),
    "too few are not zero": (np.where(np.arange(N) < 50, 0, spiked(5, 53)), None),
    "none": (spiked(1, 30), None),
}  # fmt: skip


@pytest.mark.parametrize("case", SPIKES)
def test_gradient_spikes(tmp_path: Path, case: str) -> None:
    norms, expected = SPIKES[case]
    found = check("gradient_spikes", tmp_path, {"grad_norm": norms})
    told = [(f.step, f.evidence["largest_step"], f.severity, f.evidence["ratio"]) for f in found]
    assert told == ([(*expected[:3], pytest.approx(expected[3], rel=0.01))] if expected else [])
    for one in found:
        assert one.evidence["largest"] == norms[int(one.evidence["largest_step"]) - 1]


LEVELS: dict[str, tuple[Columns, tuple[str, int, str] | None]] = {
    "a fiftieth": ({"grad_norm": np.where(LATE, 1.0, 50)}, ("gradient_vanishes", 31, "warning")),
    "more": ({"grad_norm": np.where(LATE, 1.01, 50)}, None),
    "a fiftieth of a small one": (
        {"grad_norm": np.where(LATE, 0.0025, 0.125)}, ("gradient_vanishes", 31, "warning"),
    ),
    "nothing left to learn": (
        {"grad_norm": np.where(LATE, 1.0, 50), "reward": FLAT + 0.6},
        ("gradient_vanishes", 31, "info"),
    ),
    "tenfold": ({"grad_norm": np.where(LATE, 5.0, 0.5)}, ("gradient_grows", 31, "warning")),
    "less than tenfold": ({"grad_norm": np.where(LATE, 4.99, 0.5)}, None),
    "tenfold of a large one": (
        {"grad_norm": np.where(LATE, 40.0, 4)}, ("gradient_grows", 31, "warning"),
    ),
    "grown, and solved": (
        {"grad_norm": np.where(LATE, 5.0, 0.5), "reward": FLAT + 0.6},
        ("gradient_grows", 31, "warning"),
    ),
    "zero all along": ({"grad_norm": np.zeros(N)}, None),
    "gone in the last five records": (
        {"grad_norm": np.r_[np.full(55, 2.5), np.full(5, 0.01)]},
        ("gradient_vanishes", 56, "warning"),
    ),
    "zeros that come and go": (
        {"grad_norm": np.r_[np.full(5, 2.5), np.tile([0, 2.5], 25), np.zeros(5)]}, None,
    ),
    "zeros that came, and a fiftieth since": (
        {"grad_norm": np.r_[np.full(20, 50), 0, np.full(9, 50), np.full(30, 1.0)]},
        ("gradient_vanishes", 31, "warning"),
    ),
    "zeros that came, and more than that since": (
        {"grad_norm": np.r_[np.full(20, 50), 0, np.full(9, 50), np.full(30, 1.01)]}, None,
    ),
    "silent but for the last two": (
        {"grad_norm": np.r_[np.full(20, 2.5), np.zeros(38), 2.5, 2.5]}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEVELS)
def test_the_gradient_against_its_own_baseline(tmp_path: Path, case: str) -> None:
    columns, expected = LEVELS[case]
    found = check("gradient_level", tmp_path, columns)
    assert [(f.name, f.step, f.severity) for f in found] == ([expected] if expected else [])
    for one in found:
        said = "Nothing is left" if one.severity == "info" else "Look "
        assert one.advice.text.startswith(said)
        assert ("groups" in one.advice.text) == (
            (one.name, one.severity) == ("gradient_vanishes", "warning")
        )


@pytest.mark.parametrize(
    ("masses", "told"),
    [
        ({(1, 1): np.full(N, 0.75), (-1, 0): np.full(N, 0.25)}, ("pos_peak", 0.75)),
        ({(1, 1): np.full(N, 0.125), (-1, 0): np.full(N, 0.375)}, ("neg_valley", 0.75)),
        ({(1, 1): np.zeros(N)}, None),
        ({(1, 1): np.where(np.arange(N) == 30, np.nan, 1.0)}, None),  # not of that step
    ],
)  # fmt: skip
def test_the_class_that_carries_a_spike(
    tmp_path: Path, masses: dict[tuple[int, int], np.ndarray], told: tuple[str, float] | None
) -> None:
    seen(tmp_path / "run", {"grad_norm": spiked(5, 30)})
    write_flows(tmp_path / "run", masses, "grad_mass")
    (found,) = found_by("gradient_spikes", Context(open_run(tmp_path / "run")))
    assert ("heaviest_class" in found.evidence) is bool(told)
    if told:
        assert (found.evidence["heaviest_class"], found.evidence["share"]) == told


# ---- the learning rate, and the pace -------------------------------------------------------------

E = 2.0**-17  # about 1e-5; products with small whole numbers are exact
SCHEDULES: dict[str, tuple[np.ndarray, tuple[int, str] | None]] = {
    "threefold": (E * np.repeat([1, 3], 50), (51, "jumped from 7.6e-06 to 2.3e-05 at step 51")),
    "less": (E * np.repeat([1, 2.9], 50), None),
    "threefold, to no more than half above": (E * np.repeat([2, 0.5, 3], [40, 30, 30]), None),
    "threefold, above that": (
        E * np.repeat([2, 0.5, 3.1], [40, 30, 30]),
        (71, "jumped from 3.8e-06 to 2.4e-05 at step 71"),
    ),
    "up again below the highest": (E * np.repeat([1, 2, 0.5, 2.5], 25), None),
    "out of nothing": (E * np.repeat([1, 0, 2], [40, 10, 50]), None),
    "in the warm-up": (E * np.repeat([0.1, 1], [9, 91]), None),
    "after a tenth": (E * np.repeat([0.1, 1], [10, 90]), (11, "jumped from 7.6e-07 to 7.6e-06")),
    "after three of twenty": (E * np.repeat([0.1, 1], [3, 17]), (4, "jumped from 7.6e-07")),
    "after two of twenty": (E * np.repeat([0.1, 1], [2, 18]), None),
    "twice, of which the first is told": (
        E * np.repeat([1, 4, 16], [40, 30, 30]), (41, "jumped from 7.6e-06 to 3.1e-05"),
    ),
    "of nineteen records": (E * np.repeat([1, 4], [10, 9]), None),
    "over for a fifth": (
        E * np.repeat([1, 1e-3], [80, 20]), (81, "has been next to zero since step 81"),
    ),
    "over for less": (E * np.repeat([1, 1e-3], [81, 19]), None),
    "not quite over": (E * np.repeat([1, 1.01e-3], [80, 20]), None),
    "over after one": (E * np.repeat([1, 0], [1, 99]), (2, "has been next to zero since step 2")),
    "none at all": (np.zeros(100), None),
    "came back": (E * np.repeat([1, 0, 1], [30, 40, 30]), None),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULES)
def test_the_schedule_of_the_learning_rate(tmp_path: Path, case: str) -> None:
    rates, expected = SCHEDULES[case]
    found = check("lr_schedule", tmp_path, {"lr": rates})
    assert [f.step for f in found] == ([expected[0]] if expected else [])
    for one in found:
        assert expected is not None
        assert one.message.startswith(f"The learning rate {expected[1]}")
        before, after = rates[one.step - 2], rates[one.step - 1]
        assert one.evidence == {"lr_before": before, "lr": after}


FAST = np.full(N, 2e-3)
RATES: dict[str, tuple[dict[str, Any], tuple[int, str, float] | None]] = {
    # (columns, (step, side, learning rate))
    "high, and clipped at one side": (
        {"lr": FAST, "clip_low": FLAT * 0, "clip_high": moved(0, 0.2)}, (1, "high", 2e-3),
    ),
    "high, and hardly clipped": (
        {"lr": FAST, "clip_low": moved(0, 0.19), "clip_high": FLAT * 0}, None,
    ),
    "high from a step on": (
        {"lr": np.where(LATE, 1e-3, 1e-4), "clip_low": FLAT}, (31, "high", 1e-3),
    ),
    "not as high": ({"lr": np.full(N, 9.9e-4), "clip_low": FLAT}, None),
    "high, and far from the batch": ({"lr": FAST, "kl_old": moved(0, 0.1)}, (1, "high", 2e-3)),
    "high, and near the batch": ({"lr": FAST, "kl_old": moved(0, 0.099)}, None),
    "high, and twice the entropy": (
        {"lr": FAST, "entropy": np.where(LATE, 0.5, 0.25)}, (1, "high", 2e-3),
    ),
    "high, and less entropy than that": ({"lr": FAST, "entropy": moved(0.25, 0.499)}, None),
    "high, and a fifth of the entropy": (
        {"lr": FAST, "entropy": np.where(LATE, 0.1, 0.5)}, (1, "high", 2e-3),
    ),
    "high, and more of it": ({"lr": FAST, "entropy": np.where(LATE, 0.101, 0.5)}, None),
    "high, and no entropy at all": ({"lr": FAST, "entropy": np.zeros(N)}, None),
    "high, and the reward is lost": ({"lr": FAST, "reward": moved(0.8, 0.1)}, (1, "high", 2e-3)),
    "high, and the reward stands": ({"lr": FAST, "reward": FLAT}, None),
    "high, and nothing else is known": ({"lr": FAST}, None),
    "low": ({"lr": np.full(N, 1e-8), "reward": FLAT}, (1, "low", 1e-8)),
    "not as low": ({"lr": np.full(N, 1.1e-8), "reward": FLAT}, None),
    "low, and not at last": ({"lr": np.where(LATE, 1e-5, 0), "reward": FLAT}, None),
    "low, and the reward rose": ({"lr": np.full(N, 1e-8), "reward": moved(0.2, 0.6)}, None),
    "low, and solved": ({"lr": np.full(N, 1e-8), "reward": FLAT + 0.6}, None),
    "low, and the reward was lost": ({"lr": np.zeros(N), "reward": moved(0.6, 0.01)}, None),
    "low, and no reward is known": ({"lr": np.full(N, 1e-8)}, None),
    "low for thirty records": (
        {"lr": np.full(30, 1e-9), "reward": FLAT[:30]}, (1, "low", 1e-9),
    ),
    "low for fewer": ({"lr": np.full(29, 1e-9), "reward": FLAT[:29]}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", RATES)
def test_a_learning_rate_that_is_far_off(tmp_path: Path, case: str) -> None:
    columns, expected = RATES[case]
    found = check("lr_far_off", tmp_path, columns)
    told = [(f.step, f.evidence["side"], f.evidence["lr"]) for f in found]
    assert told == ([expected] if expected else [])
    for one in found:
        high = one.evidence["side"] == "high"
        assert ("reaches" in one.message) is high
        assert ("Lower {lr} tenfold." in str(one.advice)) is high


PACES: dict[str, tuple[Columns, tuple[int, str] | None]] = {
    "twice": ({"seconds": np.where(LATE, 8, 4.0)}, (31, "A step takes 2.0 times as long")),
    "less": ({"seconds": np.where(LATE, 7.9, 4.0)}, None),
    "of half a second": ({"seconds": np.where(LATE, 1, 0.5)}, (31, "A step takes 2.0 times")),
    "without a pace": ({"seconds": np.zeros(N)}, None),
    "in eight records after a first that is no baseline": (
        {"seconds": 4.0 * np.arange(9) + 2}, (4, "A step takes 5.0 times"),
    ),
    "in seven": ({"seconds": 4.0 * np.arange(8) + 2}, None),
    "and longer": (
        {"seconds": np.where(LATE, 8, 4.0), "length": np.where(LATE, 121, 100.0)},
        (31, "A step takes 2.0 times as long as at first; completions are 1.2 times as long"),
    ),
    "and hardly longer": (
        {"seconds": np.where(LATE, 8, 4.0), "length": np.where(LATE, 120, 100.0)},
        (31, "A step takes 2.0 times as long as at first (seconds)"),
    ),
    "and longer than one word": (
        {"seconds": np.where(LATE, 8, 4.0), "length": np.where(LATE, 2, 0.8)},
        (31, "A step takes 2.0 times as long as at first; completions are 2.5 times as long"),
    ),
    "and longer than none": (
        {"seconds": np.where(LATE, 8, 4.0), "length": np.where(LATE, 2, 0.0)},
        (31, "A step takes 2.0 times as long as at first (seconds)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PACES)
def test_steps_that_slow_down(tmp_path: Path, case: str) -> None:
    columns, expected = PACES[case]
    found = check("steps_slow_down", tmp_path, columns)
    assert [f.step for f in found] == ([expected[0]] if expected else [])
    assert all(expected and f.message.startswith(expected[1]) for f in found)
