"""What the classes do to the entropy and the gradient, and the levels of the entropy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import Columns, Flows, ramp, write_flows, write_steps
from wapo_analysis.diagnose import Diagnosis, Finding, diagnose
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.entropy import entropy_band
from wapo_analysis.series import Series
from wapo_analysis.store import open_run

N = 60
FLAT = np.full(N, 0.3)
WAVE = np.random.default_rng(5).normal(0, 1, N)
GAINS = ramp(0.2, 0.7, N, 5, 55)


def levels(*lengths_and_levels: tuple[int, float]) -> np.ndarray:
    """Levels one after the other, exactly."""
    return np.concatenate([np.full(length, float(level)) for length, level in lengths_and_levels])


LOST = levels((60, 0.6), (40, 0.1))


def told(diagnosis: Diagnosis, name: str) -> Finding | None:
    return next((f for f in diagnosis.findings if f.name == name), None)


ONE = np.ones(N)
PEAK, VALLEY, NEG_PEAK, NEG_VALLEY = (1, 1), (1, 0), (-1, 1), (-1, 0)
FLOW, MASS = "pred_dentropy_sum", "grad_mass"


def flowed(
    path: Path,
    steps: Columns,
    flows: Flows,
    column: str,
    objective: dict[str, object] | None = None,
) -> Diagnosis:
    write_flows(write_steps(path, steps), flows, column)
    run = open_run(path)
    if objective is not None:
        run = replace(run, manifest=run.manifest.changed({"objective": objective}))
    return diagnose(run)


def shift(start: float, end: float) -> dict[tuple[int, int], np.ndarray]:
    """Gradient mass that goes to the negative sign, or from it."""
    share = ramp(start, end, N, 20, 10)
    return {PEAK: 4 * (1 - share), NEG_PEAK: 4 * share}


def lately(count: float, early: float, late: float, records: int = N) -> Flows:
    """A share of one class, another one for the last records."""
    share = np.repeat([early, late], [records - int(count), int(count)])
    return {PEAK: share, NEG_PEAK: 1 - share}


UP, DOWN = {PEAK: 0.05 * ONE, NEG_PEAK: ONE}, {PEAK: -ONE, NEG_PEAK: 0.05 * ONE}
# A finding, its severity, step columns and class totals with one number in them, inside, beyond.
FLOW_BOUNDS: dict[
    str, tuple[str, str, str, Callable[[float], tuple[Columns, Flows]], float, float]
] = {
    "four fifths dominate": ("one_class_dominates", "info", FLOW,
        lambda x: ({"reward": GAINS}, {PEAK: x * ONE, NEG_PEAK: (x - 1) * ONE}), 0.7999, 0.8),
    "over the last quarter of the run": ("one_class_dominates", "info", FLOW,
        lambda x: ({"reward": GAINS}, lately(x, 0.9, 0.1)), 7, 8),
    "or over three records": ("one_class_dominates", "info", FLOW,
        lambda x: ({"reward": GAINS[:10]}, lately(x, 0.9, 0.1, 10)), 2, 3),
    "a rise that is unpaid alarms from half more": ("one_class_dominates", "warning", FLOW,
        lambda x: ({"reward": FLAT, "entropy": ramp(0.5, x, N, 20, 10)}, UP), 0.7499, 0.75),
    "and a fall from half": ("one_class_dominates", "warning", FLOW,
        lambda x: ({"reward": FLAT, "entropy": ramp(0.5, x, N, 20, 10)}, DOWN), 0.2501, 0.25),
    "from eight steps on": ("one_class_dominates", "warning", FLOW,
        lambda x: ({"reward": FLAT[: int(x)], "entropy": levels((3, 0.4), (int(x) - 3, 0.7))},
                   {key: flow[: int(x)] for key, flow in UP.items()}), 7, 8),
    "seven tenths take the gradient": ("one_class_takes_the_gradient", "warning", MASS,
        lambda x: ({"reward": FLAT}, shift(0.5, 1 - x)), 0.699, 0.701),
    "and a fifth more than at first": ("one_class_takes_the_gradient", "warning", MASS,
        lambda x: ({"reward": FLAT}, shift(0.4, 1 - x)), 0.799, 0.801),
    "over a tenth of the run": ("one_class_takes_the_gradient", "warning", MASS,
        lambda x: ({"reward": FLAT}, lately(x, 0.9, 0.1)), 3, 4),
    "or over three of its records": ("one_class_takes_the_gradient", "warning", MASS,
        lambda x: ({"reward": FLAT[:24]}, lately(x, 0.9, 0.1, 24)), 2, 3),
    "four fifths outweigh": ("negative_mass_outweighs", "warning", MASS,
        lambda x: ({"reward": FLAT}, shift(0.5, x)), 0.799, 0.801),
    "and a fifth more than at first, of a sign": ("negative_mass_outweighs", "warning", MASS,
        lambda x: ({"reward": FLAT}, shift(0.7, x)), 0.899, 0.901),
    "a fifth is outweighed": ("positive_mass_outweighs", "warning", MASS,
        lambda x: ({"reward": FLAT}, shift(0.5, x)), 0.201, 0.199),
    "and a fifth less than at first": ("positive_mass_outweighs", "warning", MASS,
        lambda x: ({"reward": FLAT}, shift(0.3, x)), 0.101, 0.099),
    "a sign that had a fiftieth at first is trained": ("negative_mass_outweighs", "warning", MASS,
        lambda x: ({"reward": FLAT}, shift(x, 0.95)), 0.0199, 0.0201),
    "and one that left a fiftieth": ("positive_mass_outweighs", "warning", MASS,
        lambda x: ({"reward": FLAT}, shift(x, 0.05)), 0.9801, 0.9799),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOW_BOUNDS)
def test_a_class_begins_at_its_bound(tmp_path: Path, case: str) -> None:
    name, severity, column, made, inside, beyond = FLOW_BOUNDS[case]
    within = told(flowed(tmp_path / "inside", *made(inside), column), name)
    found = told(flowed(tmp_path / "beyond", *made(beyond), column), name)
    assert within is None or within.severity != severity
    assert found is not None
    assert found.severity == severity


SOME = np.where(np.arange(N) < 50, 1.0, 0.0)
# Step columns, class totals, the finding, its severity, step, words and numbers.
FLOWED = {
    "a class that dominates from a step on": (
        {"reward": GAINS},
        {PEAK: np.repeat([0.5, 0.9], 30), NEG_PEAK: -np.repeat([0.5, 0.1], 30)}, FLOW,
        "one_class_dominates", "info", 31,
        "pos_peak alone makes up 90% of the predicted dH (a rise) from step 31 on.",
        {"class": "pos_peak", "share": 0.9, "predicted_dentropy": 27.0},
    ),
    "one that predicts a fall, where some steps predict nothing": (
        {"reward": GAINS}, {PEAK: 0.1 * SOME, NEG_VALLEY: -0.9 * SOME}, FLOW,
        "one_class_dominates", "info", 1,
        "neg_valley alone makes up 90% of the predicted dH (a fall) from step 1 on.",
        {"class": "neg_valley", "share": 0.9, "predicted_dentropy": -45.0},
    ),
    "a class of which the last steps have no gradient": (
        {"reward": FLAT}, {key: SOME * mass for key, mass in shift(0.5, 0.1).items()}, MASS,
        "one_class_takes_the_gradient", "warning", 26,
        "pos_peak tokens carry most of the gradient from step 26 on (50% at first, 90% "
        "at the end).",
        {"start": 0.5, "end": 0.9, "class": "pos_peak"},
    ),
    "a sign, and its class of late": (
        {"reward": FLAT},
        {PEAK: 1 - ramp(0.5, 0.9, N, 20, 10),
         NEG_PEAK: np.repeat([0.6, 0.1], [56, 4]) * ramp(0.5, 0.9, N, 20, 10),
         NEG_VALLEY: np.repeat([0.4, 0.9], [56, 4]) * ramp(0.5, 0.9, N, 20, 10)}, MASS,
        "negative_mass_outweighs", "warning", 29,
        "Tokens of negative advantage carry almost all of the gradient; the negative share is out "
        "of its range from step 29 on (50% at first, 90% at the end).",
        {"start": 0.5, "end": 0.9, "class": "neg_valley"},
    ),
    "the other sign, and its class over a tenth of the run": (
        {"reward": FLAT},
        {NEG_PEAK: 1 - ramp(0.5, 0.9, N, 20, 10),
         PEAK: np.repeat([0.8, 0.1], [58, 2]) * ramp(0.5, 0.9, N, 20, 10),
         VALLEY: np.repeat([0.2, 0.9], [58, 2]) * ramp(0.5, 0.9, N, 20, 10)}, MASS,
        "positive_mass_outweighs", "warning", 29,
        "Tokens of positive advantage carry almost all of the gradient; the negative share is out "
        "of its range from step 29 on (50% at first, 10% at the end).",
        {"start": 0.5, "end": 0.1, "class": "pos_peak"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOWED)
def test_all_that_is_told_of_a_class(tmp_path: Path, case: str) -> None:
    steps, flows, column, name, severity, step, message, numbers = FLOWED[case]
    found = told(flowed(tmp_path / "run", steps, flows, column), name)
    assert found is not None
    assert (found.severity, found.step, found.message) == (severity, step, message)
    assert found.evidence == pytest.approx(numbers)


def test_the_class_of_a_sign_is_that_of_three_records_at_least(tmp_path: Path) -> None:
    share = ramp(0.5, 0.9, 24, 8, 4)
    flows = {
        PEAK: 1 - share,
        NEG_PEAK: np.repeat([0.8, 0.1], [22, 2]) * share,
        NEG_VALLEY: np.repeat([0.2, 0.9], [22, 2]) * share,
    }
    found = told(
        flowed(tmp_path / "run", {"reward": FLAT[:24]}, flows, MASS), "negative_mass_outweighs"
    )
    assert found is not None
    assert found.evidence["class"] == "neg_valley"


@pytest.mark.parametrize("column", [FLOW, MASS])
def test_classes_without_any_gradient_say_nothing(tmp_path: Path, column: str) -> None:
    none = {PEAK: 0 * ONE, NEG_PEAK: 0 * ONE}
    assert not flowed(tmp_path / "run", {"reward": FLAT}, none, column).findings


MORE = ramp(0.4, 0.9, N, 20, 10)
ONLY_FEW = np.where(np.arange(N) < 7, 1.0, np.nan)


@pytest.mark.parametrize(
    ("steps", "severity"),
    [
        ({"entropy": MORE}, "warning"),
        ({"entropy": MORE, "reward": FLAT}, "warning"),
        ({"entropy": MORE, "reward": FLAT + 0.6}, "info"),  # solved
        ({"entropy": MORE, "reward": GAINS}, "info"),
        ({"entropy": MORE, "reward": ramp(0.3, 0.306, N, 0, 59) + 0.003 * WAVE}, "info"),
        ({"entropy": MORE, "reward": FLAT * ONLY_FEW}, "info"),
        ({"entropy": levels((3, 0.4), (57, 0.9)) * ONLY_FEW, "reward": FLAT}, "info"),
        ({"entropy": 0 * MORE, "reward": FLAT}, "info"),
        ({"entropy": ramp(0.4, 0.1, N, 20, 10), "reward": FLAT}, "info"),  # the other way
    ],
)
def test_a_class_that_dominates_alarms_where_the_entropy_goes_its_way_unpaid(
    tmp_path: Path, steps: Columns, severity: str
) -> None:
    found = told(flowed(tmp_path / "run", steps, UP, FLOW), "one_class_dominates")
    assert found is not None
    assert found.severity == severity


@pytest.mark.parametrize(
    ("entropy", "name", "net"),
    [
        (ramp(0.4, 1, N, 10, 49), "entropy_explosion", sum(range(19, 44))),  # steps 20 to 44
        (levels((20, 0.5), (40, 0.75)), "entropy_rise", sum(range(16, 21))),  # five up to 21
    ],
)
def test_the_predicted_change_is_that_up_to_the_warning_or_the_verdict(
    tmp_path: Path, entropy: np.ndarray, name: str, net: float
) -> None:
    steps = {"reward": FLAT, "entropy": entropy}
    rising = {PEAK: 2 * np.arange(N), NEG_PEAK: -np.arange(N)}
    found = told(flowed(tmp_path / "run", steps, rising, FLOW), name)
    assert found is not None
    assert found.evidence["predicted_dentropy"] == pytest.approx(net)
    assert "pos_peak tokens account for 100% of the predicted rise" in found.message


def test_an_entropy_that_ends_at_nothing_alarms_too(tmp_path: Path) -> None:
    steps = {"entropy": levels((20, 0.4), (40, 0)), "reward": FLAT}
    found = told(flowed(tmp_path / "run", steps, DOWN, FLOW), "one_class_dominates")
    assert found is not None
    assert found.severity == "warning"


@pytest.mark.parametrize(
    ("reward", "objective", "severity"),
    [
        (FLAT, {"name": "grpo"}, "warning"),
        (GAINS, {"name": "grpo"}, "info"),
        (FLAT + 0.6, {"name": "grpo"}, "info"),  # solved
        (FLAT, {"name": "grpo", "include_bins": ["neg_peak", "pos_peak"]}, "info"),
    ],
)
def test_a_class_takes_the_gradient_unpaid_and_unwanted(
    tmp_path: Path, reward: np.ndarray, objective: dict[str, object], severity: str
) -> None:
    d = flowed(tmp_path / "run", {"reward": reward}, shift(0.5, 0.9), MASS, objective)
    found = told(d, "one_class_takes_the_gradient")
    assert found is not None
    assert found.severity == severity
    outweighs = told(d, "negative_mass_outweighs")
    assert outweighs is not None
    assert outweighs.severity == ("info" if reward is not FLAT else "warning")
    unpaid = flowed(tmp_path / "up", {"reward": reward, "entropy": MORE}, UP, FLOW, objective)
    dominates = told(unpaid, "one_class_dominates")
    assert dominates is not None
    assert dominates.severity == severity


def test_levels_of_the_entropy_are_those_of_its_findings(tmp_path: Path) -> None:
    def band(name: str, **columns: np.ndarray) -> tuple[float, ...]:
        found = entropy_band(Context(open_run(write_steps(tmp_path / name, columns))))
        assert found is not None
        return (found.level, found.low, found.high, found.lowest, found.highest)

    entropy = np.full(N, 0.4)
    assert band("a", entropy=entropy, reward=FLAT) == pytest.approx((0.4, 0.2, 0.6, 0.08, 0.8))
    assert band("b", entropy=entropy) == pytest.approx((0.4, 0.2, 0.6, 0.02, 0.8))
    tiny = band("c", entropy=entropy / 20, reward=FLAT)
    assert tiny == pytest.approx((0.02, 0.01, 0.07, 0.004, 0.07))
    assert band("d", entropy=0 * entropy, reward=FLAT) == pytest.approx((0, 0, 0.05, 0, 0.05))
    lost = {"entropy": levels((40, 0.4), (60, 0.18)), "reward": LOST}
    assert band("e", **lost) == pytest.approx((0.4, 0.2, 0.6, 0.2, 0.8))
    noisy = Series(np.arange(N), 1 + 0.3 * WAVE)
    level, gap = noisy.level, noisy.gap_noise
    assert band("f", entropy=noisy.values, reward=FLAT) == pytest.approx(
        (level, level * np.exp(-3 * gap / level), level + 3 * gap,
         level * np.exp(-6 * gap / level), level + 6 * gap)
    )  # fmt: skip
