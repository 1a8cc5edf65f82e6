"""Detectors of the gradient, and what holds for all: needs, cost, a line in the docs."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import (
    Flows,
    finding,
    found_by,
    judge,
    noisy,
    ramp,
    reopened,
    seen,
    write_flows,
    write_steps,
)
from wapo_analysis.diagnose import DETECTORS, Diagnosis, Finding, detectors, diagnose
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors import Detector, lasting, risen
from wapo_analysis.series import Series
from wapo_analysis.store import RunWriter, open_run

STEPS = 60


# ---- gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "solved", "name", "severity"),
    [
        (0.005, False, "gradient_vanishes", "warning"),
        (0.005, True, "gradient_vanishes", "info"),
        (20.0, False, "gradient_grows", "warning"),
    ],
)
def test_the_gradient_vanishes_or_grows(
    tmp_path: Path, end: float, solved: bool, name: str, severity: str
) -> None:
    grad = np.exp(ramp(0.0, math.log(end), STEPS, 20, 25))
    reward = ramp(0.4, 0.95, STEPS, 5, 10) if solved else np.full(STEPS, 0.4)
    d = judge(tmp_path, grad_norm=grad, reward=reward)
    assert finding(d, name).severity == severity
    assert finding(d, name).evidence["end"] == pytest.approx(end, rel=0.05)


def test_a_run_that_its_trainer_gave_up_is_diverged(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "run", {"entropy": [0.4] * 12, "reward": [0.5] * 12})
    writer = reopened(path)
    writer.close("diverged")
    d = diagnose(open_run(path))
    assert (d.verdict, d.onset_step) == ("diverged", 12)
    assert "NaN" in d.sentence


def write_mass(path: Path, masses: Flows) -> None:
    """Class totals with the gradient mass of each (sign, regime) per step."""
    write_flows(path, masses, "grad_mass")


def massed(
    tmp_path: Path, masses: Flows, reward: np.ndarray | None = None, objective: str = "grpo"
) -> Diagnosis:
    steps = {"reward": np.full(STEPS, 0.4) if reward is None else reward}
    path = write_steps(tmp_path / "run", steps, objective=objective)
    write_mass(path, masses)
    return diagnose(open_run(path))


def test_a_class_that_takes_over_the_gradient_is_named(tmp_path: Path) -> None:
    even = np.full(STEPS, 1.0)
    masses = {(-1, 1): ramp(1, 12, STEPS, 20, 20), (1, 0): even, (1, 1): even, (-1, 0): even}
    d = massed(tmp_path, masses)
    found = finding(d, "one_class_takes_the_gradient")
    assert (found.severity, found.evidence["class"]) == ("warning", "neg_peak")
    assert found.evidence["end"] == pytest.approx(12 / 15, abs=0.01)
    assert "exclude_bins = neg_peak" in str(found.advice)
    outweighs = finding(d, "negative_mass_outweighs")
    assert outweighs.evidence["class"] == "neg_peak"
    assert outweighs.evidence["end"] == pytest.approx(13 / 15, abs=0.01)


@pytest.mark.parametrize(("objective", "severity"), [("grpo", "warning"), ("wapo", "info")])
def test_one_of_the_two_classes_of_a_positive_only_objective_is_no_warning(
    tmp_path: Path, objective: str, severity: str
) -> None:
    masses = {(1, 1): ramp(1, 12, STEPS, 20, 20), (1, 0): np.full(STEPS, 1.0)}
    found = finding(massed(tmp_path, masses, objective=objective), "one_class_takes_the_gradient")
    assert (found.severity, found.evidence["class"]) == (severity, "pos_peak")


def test_positive_mass_can_outweigh_too_and_is_an_info_if_the_reward_rose(tmp_path: Path) -> None:
    even = np.full(STEPS, 1.0)
    masses = {(-1, 1): ramp(1, 0.02, STEPS, 20, 20), (1, 1): even}
    d = massed(tmp_path, masses, reward=noisy(ramp(0.4, 0.9, STEPS, 10, 20), 0.01))
    found = finding(d, "positive_mass_outweighs")
    assert (found.severity, found.evidence["class"]) == ("info", "pos_peak")


@pytest.mark.parametrize(
    "masses",
    [
        {(1, 1): np.full(STEPS, 1.0), (1, 0): np.full(STEPS, 0.8)},  # one sign by design
        {(-1, 1): np.full(STEPS, 9.0), (1, 1): np.full(STEPS, 1.0)},  # lopsided from the start
    ],
)
def test_how_a_run_is_built_is_no_finding(tmp_path: Path, masses: Flows) -> None:
    assert not massed(tmp_path, masses).findings


# ---- conditions that last ------------------------------------------------------------------------

WAVE = np.random.default_rng(5).normal(0, 1, STEPS)


def series(*values: float) -> Series:
    return Series(np.arange(1, len(values) + 1), np.array(values, float))


def then(before: float | np.ndarray, after: float) -> Series:
    return series(*np.where(np.arange(STEPS) < 30, before, after))


@pytest.mark.parametrize(
    ("mask", "begin"),
    [
        ([0, 1, 1, 1, 0, 0, 1, 1, 1], 6),
        ([0, 1, 1, 1, 1, 1, 1, 1, 1], 1),
        ([1, 1, 1, 1, 1, 1, 1, 1, 1], 0),
        ([0, 1, 1, 1, 0, 0, 0, 1, 1], None),  # two are too few
        ([1, 1, 1, 1, 1, 1, 1, 1, 0], None),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0], None),
    ],
)
def test_what_lasts_to_the_end(mask: list[int], begin: int | None) -> None:
    assert lasting(series(*mask), np.array(mask, bool)) == begin


@pytest.mark.parametrize(
    ("before", "after", "least", "absolute", "begin"),
    [
        (0.25, 0.5, 0.25, 0.9, 30),  # by what counts
        (0.25, 0.499, 0.25, 0.9, None),
        (0.75, 0.9, 0.25, 0.9, 30),  # to what is high in itself
        (0.75, 0.899, 0.25, 0.9, None),
        (0.9, 0.9, 0.25, 0.9, 0),
        (0.4, 0.5, 0.25, 0.3, 30),  # which is twice the rise that counts, at least
        (0.4, 0.499, 0.25, 0.3, None),
        (0.1875 + 0.05 * (WAVE - np.median(WAVE[:5])), 0.55, 0.01, 2.0, 30),  # six times its noise
        (0.1875 + 0.05 * (WAVE - np.median(WAVE[:5])), 0.54, 0.01, 2.0, None),
        (0.125 + 0.1 * (WAVE - np.median(WAVE[:5])), 0.63, 0.01, 2.0, 30),  # but half at most
        (0.125 + 0.1 * (WAVE - np.median(WAVE[:5])), 0.62, 0.01, 2.0, None),
    ],
)
def test_a_share_that_has_risen(
    before: float | np.ndarray, after: float, least: float, absolute: float, begin: int | None
) -> None:
    assert risen(then(before, after), least, absolute) == begin


@pytest.mark.parametrize(("records", "told"), [(8, True), (7, False)])
def test_eight_records_are_judged_and_seven_are_not(
    tmp_path: Path, records: int, told: bool
) -> None:
    columns = {"lr": np.full(records, 1e-2), "clip_low": np.full(records, 0.5)}
    assert bool(found_by("lr_far_off", seen(tmp_path / "run", columns))) is told


@pytest.mark.parametrize(("records", "told"), [(8, True), (7, False)])
def test_each_column_that_a_check_needs_must_be_long_enough(
    tmp_path: Path, records: int, told: bool
) -> None:
    reward = [0.3] * records + [None] * (STEPS - records)
    columns = {"reward": reward, "groups_all_wrong": np.ones(STEPS)}
    assert bool(found_by("stalled", seen(tmp_path / "run", columns))) is told


def test_what_is_evidence_stands_beside_the_level(tmp_path: Path) -> None:
    seen(tmp_path / "run", {"grad_norm": np.repeat([1.0, 0.01], 30)})
    write_mass(tmp_path / "run", {(1, 1): np.full(STEPS, 3.0), (-1, 1): np.full(STEPS, 1.0)})
    (found,) = found_by("gradient_level", Context(open_run(tmp_path / "run")))
    assert found.evidence == {
        "start": 1.0, "end": 0.01, "heaviest_class": "pos_peak", "share": 0.75,
    }  # fmt: skip
    assert found.message == (
        "The gradient all but vanishes from step 31 on (1 at first, 0.01 at the end)."
    )


# ---- every detector -----------------------------------------------------------------------------


def test_every_detector_says_what_it_needs_and_none_is_listed_twice(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.close("finished")
    d = diagnose(open_run(tmp_path / "run"))
    listed = [s.name for s in d.skipped]
    assert sorted(set(listed)) == sorted(listed)
    assert {detector.name for detector in DETECTORS} <= set(listed)


def test_a_check_that_fails_leaves_the_others_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(context: Context) -> list[Finding]:
        raise IndexError("index 5 is out of bounds")

    monkeypatch.setattr(detectors, "FAULTS_RAISE", False)
    monkeypatch.setattr(detectors, "DETECTORS", [Detector("odd", broken, (), 0), *DETECTORS])
    d = judge(tmp_path, entropy=noisy(ramp(0.5, 2.5, STEPS, 20, 20), 0.01))
    assert d.verdict == "entropy_explosion"
    assert ["odd"] == [s.name for s in d.skipped if "repair" in s.missing[0]]
    assert "the check 'odd' failed (index 5 is out of bounds)" in caplog.text


@pytest.mark.slow
def test_cost_stays_linear_with_every_column(tmp_path: Path) -> None:
    import json
    import time

    from wapo_analysis.store import STEP_LOG

    steps, rng = 100_000, np.random.default_rng(0)
    columns = {
        "entropy": noisy(ramp(0.4, 3, steps, 60_000, 10_000), 0.02),
        "reward": noisy(ramp(0.6, 0.1, steps, 60_000, 10_000), 0.03, 1),
        "grad_norm": np.exp(noisy(np.zeros(steps), 0.3, 2)),
        **{
            name: np.abs(rng.normal(0.1, 0.02, steps))
            for name in ("kl_old", "clip_low", "clip_high", "truncated", "repetition", "length",
                         "groups_all_wrong", "groups_all_right")
        },
    }  # fmt: skip
    path = write_steps(tmp_path / "run", {name: values[:1] for name, values in columns.items()})
    rows = np.round(np.column_stack(list(columns.values())), 5).tolist()
    (path / STEP_LOG).write_text(
        "".join(
            json.dumps({"step": i + 1, **dict(zip(columns, row, strict=True))}) + "\n"
            for i, row in enumerate(rows)
        )
    )
    write_flows(path, {key: np.ones(steps) for key in ((1, 1), (1, 0), (-1, 1), (-1, 0))})
    began = time.process_time()
    d = diagnose(open_run(path))
    assert time.process_time() - began < 5
    assert d.verdict == "entropy_explosion"


def test_every_finding_is_documented() -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "diagnose.md").read_text()
    source = "".join(f.read_text() for f in (root / "wapo_analysis" / "diagnose").rglob("*.py"))
    named = set(re.findall(r'name="([a-z_]+)"', source)) | {
        "entropy_explosion", "entropy_rise", "entropy_excursion", "entropy_collapse",
        "entropy_fall", "entropy_decline", "reward_collapse", "reward_drop", "diverged",
        "nonfinite_step", "gradient_vanishes", "gradient_grows", "negative_mass_outweighs",
        "positive_mass_outweighs",
    }  # fmt: skip
    assert len(named) > 25
    for name in named:
        assert f"| {name} |" in page, name
