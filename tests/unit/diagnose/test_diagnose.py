"""Verdicts on synthetic series, each direction, with broken, missing and half-written data."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.builders import DRIFTS, write_fake_run
from tests.support.step_logs import judge, names, noisy, ramp, write_flows, write_steps
from wapo_analysis.diagnose import DETECTORS, Diagnosis, diagnose
from wapo_analysis.errors import UserError
from wapo_analysis.series import Series, departure, episodes
from wapo_analysis.store import STEP_LOG, RunWriter, open_run

VERDICTS = {
    "healthy",
    "entropy_explosion",
    "entropy_collapse",
    "reward_collapse",
    "stalled",
    "diverged",
    "insufficient_data",
}

# ---- entropy, both ways -------------------------------------------------------------------------


def test_explosion_that_other_tools_call_healthy(tmp_path: Path) -> None:
    entropy = noisy(ramp(0.35, 4.35, 200, 60, 80), 0.02)
    reward = noisy(ramp(0.7, 0.2, 200, 60, 80), 0.03, 1)
    d = judge(tmp_path, entropy=entropy, reward=reward)
    assert d.verdict == "entropy_explosion"
    assert 55 <= d.onset_step <= 66
    assert d.onset_step <= d.first_warning_step <= 70
    finding = d.findings[0]
    assert finding.severity == "critical"
    assert finding.evidence["entropy_start"] == pytest.approx(0.35, abs=0.03)
    assert finding.evidence["entropy_end"] == pytest.approx(4.35, abs=0.05)
    assert "0.3" in d.sentence
    assert "nats" in d.sentence


def test_collapse_below_one_nat_that_absolute_floors_miss(tmp_path: Path) -> None:
    entropy = 0.40 * np.exp(np.linspace(0, math.log(0.01), 150))
    reward = noisy(np.full(150, 0.45), 0.04)
    d = judge(tmp_path, entropy=entropy, reward=reward)
    assert d.verdict == "entropy_collapse"
    assert d.onset_step < 30
    assert d.first_warning_step >= d.onset_step


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [(0.54, 0.10, 0.46, 0.90), (0.35, 0.07, 0.46, 0.85), (0.34, 0.05, 0.46, 0.94)],
)
def test_entropy_that_falls_while_the_reward_is_solved_is_learning(
    tmp_path: Path, start: float, end: float, first: float, last: float
) -> None:
    entropy = noisy(np.linspace(start, end, 200), 0.01)
    d = judge(tmp_path, entropy=entropy, reward=noisy(np.linspace(first, last, 200), 0.04, 1))
    assert d.verdict == "healthy"
    assert d.onset_step is None
    assert d.first_warning_step is None
    assert d.worst_severity in (None, "info")


def test_entropy_that_dies_before_the_reward_is_solved_is_a_collapse(tmp_path: Path) -> None:
    entropy = noisy(ramp(0.5, 0.01, 200, 20, 60), 0.005)
    reward = noisy(ramp(0.3, 0.45, 200, 10, 50), 0.02, 1)
    assert judge(tmp_path, entropy=np.abs(entropy), reward=reward).verdict == "entropy_collapse"


def test_entropy_that_rises_while_the_reward_gains_is_a_warning(tmp_path: Path) -> None:
    entropy = noisy(ramp(0.2, 0.6, 200, 40, 60), 0.01)
    d = judge(tmp_path, entropy=entropy, reward=noisy(np.linspace(0.3, 0.7, 200), 0.03, 1))
    assert d.verdict == "healthy"
    assert names(d) == {"entropy_rise"}
    assert d.worst_severity == "warning"
    assert d.first_warning_step is not None


def test_an_excursion_that_comes_back_is_no_explosion(tmp_path: Path) -> None:
    entropy = ramp(0.4, 2.0, 200, 50, 10) - ramp(0.0, 1.6, 200, 90, 20)
    d = judge(tmp_path, entropy=noisy(entropy, 0.02), reward=noisy(np.full(200, 0.5), 0.03, 1))
    assert d.verdict == "healthy"
    assert names(d) == {"entropy_excursion"}
    assert d.first_warning_step == pytest.approx(52, abs=4)


@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
@pytest.mark.parametrize(
    ("factor", "verdict"), [(6, "entropy_explosion"), (0.02, "entropy_collapse")]
)
def test_judged_by_ratio_at_any_scale(
    tmp_path: Path, scale: float, factor: float, verdict: str
) -> None:
    entropy = ramp(0.4, 0.4 * factor, 120, 40, 30) * scale
    reward = noisy(ramp(0.5, 0.1, 120, 40, 30), 0.03)
    assert judge(tmp_path, entropy=entropy, reward=reward).verdict == verdict


@pytest.mark.parametrize(
    ("ratio", "paid", "said"),
    [
        (1.3, False, None),
        (1.9, False, ("entropy_rise", "warning")),
        (1.9, True, ("entropy_rise", "warning")),
        (2.2, False, ("entropy_explosion", "critical")),
        (2.2, True, ("entropy_rise", "warning")),
    ],
)
def test_twice_the_beginning_is_an_explosion_unless_the_reward_pays(
    tmp_path: Path, ratio: float, paid: bool, said: tuple[str, str] | None
) -> None:
    reward = noisy(ramp(0.3, 0.7 if paid else 0.3, 120, 30, 60), 0.02, 1)
    d = judge(tmp_path, entropy=noisy(ramp(0.4, 0.4 * ratio, 120, 40, 30), 0.01), reward=reward)
    told = {(f.name, f.severity) for f in d.findings if f.name.startswith("entropy")}
    assert told == ({said} if said else set())
    assert d.verdict == (said[0] if said and said[1] == "critical" else "healthy")


@pytest.mark.parametrize("steps", [20, 60, 200])
def test_an_explosion_from_the_very_first_step_is_seen(tmp_path: Path, steps: int) -> None:
    early = 1 - np.exp(-np.arange(steps) / 8)
    d = judge(
        tmp_path,
        entropy=noisy(0.38 + 1.4 * early, 0.02),
        reward=noisy(0.46 * (1 - early), 0.03, 1),
    )
    assert d.verdict == "entropy_explosion"
    assert d.onset_step <= 6
    assert d.findings[0].evidence["entropy_start"] == pytest.approx(0.38, abs=0.15)


def test_entropy_alone_is_judged_too(tmp_path: Path) -> None:
    d = judge(tmp_path, entropy=ramp(0.4, 3.0, 60, 20, 20))
    assert d.verdict == "entropy_explosion"
    assert "no reward was recorded" in d.sentence
    assert {s.name: s.missing for s in d.skipped}["reward_collapse"] == ("reward",)


# ---- reward, stall, divergence -------------------------------------------------------------------


def test_losing_half_of_the_gain_is_a_reward_collapse(tmp_path: Path) -> None:
    reward = ramp(0.4, 0.9, 200, 10, 60) - ramp(0, 0.4, 200, 120, 30)
    d = judge(tmp_path, entropy=noisy(np.full(200, 0.4), 0.01), reward=noisy(reward, 0.03))
    assert d.verdict == "reward_collapse"
    assert 112 <= d.onset_step <= 140


def test_losing_a_little_of_the_gain_is_not(tmp_path: Path) -> None:
    reward = ramp(0.4, 0.9, 200, 10, 60) - ramp(0, 0.08, 200, 120, 30)
    d = judge(tmp_path, entropy=noisy(np.full(200, 0.4), 0.01), reward=noisy(reward, 0.03))
    assert d.verdict == "healthy"
    assert not d.findings


def test_a_reward_dip_that_recovers_is_only_a_warning(tmp_path: Path) -> None:
    reward = ramp(0.7, 0.1, 200, 60, 10) + ramp(0, 0.6, 200, 100, 20)
    d = judge(tmp_path, reward=noisy(reward, 0.03))
    assert d.verdict == "healthy"
    assert names(d) == {"reward_drop"}


@pytest.mark.parametrize(
    "quiet",
    [
        {"groups_all_wrong": np.full(60, 0.97), "groups_all_right": np.zeros(60)},
        {"groups_all_wrong": np.full(60, 0.5), "groups_all_right": np.full(60, 0.45)},
        {"grad_norm": ramp(1.0, 0.0, 60, 10, 1)},
    ],
)
def test_no_gradient_and_no_progress_is_stalled(
    tmp_path: Path, quiet: dict[str, np.ndarray]
) -> None:
    d = judge(tmp_path, reward=np.full(60, 0.3), entropy=np.full(60, 0.4), **quiet)
    assert d.verdict == "stalled"
    assert d.onset_step <= 13


def test_no_gradient_once_solved_is_not_stalled(tmp_path: Path) -> None:
    flat = {"groups_all_right": ramp(0.1, 1, 60, 10, 30), "groups_all_wrong": np.zeros(60)}
    d = judge(tmp_path, reward=ramp(0.4, 1, 60, 10, 30), entropy=np.full(60, 0.4), **flat)
    assert d.verdict == "healthy"
    assert {f.name: f.severity for f in d.findings} == {"zero_signal_too_easy": "info"}


def test_nan_to_the_end_is_diverged_and_names_the_step(tmp_path: Path) -> None:
    loss = np.where(np.arange(60) >= 41, np.nan, 0.1)
    d = judge(tmp_path, loss=loss, entropy=np.full(60, 0.4), reward=np.full(60, 0.5))
    assert (d.verdict, d.onset_step, d.first_warning_step) == ("diverged", 42, 42)


def test_skipped_updates_to_the_end_are_diverged_even_in_a_short_run(tmp_path: Path) -> None:
    d = judge(tmp_path, skipped_updates=np.ones(3), loss=np.full(3, np.nan), reward=np.ones(3))
    assert d.verdict == "diverged"


def test_a_single_nan_step_is_a_warning_that_names_it(tmp_path: Path) -> None:
    grad = np.ones(60)
    grad[16] = np.nan
    d = judge(tmp_path, grad_norm=grad, entropy=np.full(60, 0.4), reward=np.full(60, 0.5))
    assert d.verdict == "healthy"
    (finding,) = d.findings
    assert (finding.name, finding.severity, finding.step) == ("nonfinite_step", "warning", 17)
    assert finding.evidence["grad_norm"] == 1


def test_a_column_logged_on_every_tenth_step_has_no_holes(tmp_path: Path) -> None:
    sparse = np.where(np.arange(200) % 10 == 0, 0.5, np.nan)
    d = judge(tmp_path, reward=sparse, entropy=np.full(200, 0.4), loss=np.full(200, 0.1))
    assert d.verdict == "healthy"
    assert not d.findings


# ---- whole runs, forms and robustness ------------------------------------------------------------


EXPECTED = {
    "healthy": "healthy",
    "noise": "healthy",
    "explosion": "entropy_explosion",
    "collapse": "entropy_collapse",
    "reward_collapse": "reward_collapse",
    "stalled": "stalled",
    "diverged": "diverged",
}


@pytest.mark.parametrize("drift", sorted(DRIFTS))
@pytest.mark.parametrize("objective", ["grpo", "wapo"])
def test_every_course_of_a_whole_run(tmp_path: Path, drift: str, objective: str) -> None:
    path = write_fake_run(tmp_path / "run", drift=drift, objective=objective, prompts=8)
    d = diagnose(open_run(path))
    assert d.verdict == EXPECTED[drift]
    check_form(d)


def check_form(d: Diagnosis) -> None:
    """The JSON form that is promised, and what must agree inside it."""
    form = json.loads(json.dumps(d.to_dict(), allow_nan=False))
    promised = [
        "run",
        "verdict",
        "onset_step",
        "first_warning_step",
        "drivers",
        "findings",
        "skipped",
    ]
    assert list(form) == [*promised, "sentence", "best_step", "best_checkpoint", "command"]
    assert form["verdict"] in VERDICTS
    for driver in form["drivers"]:
        numbers = ["predicted_dentropy", "counterfactual_dentropy", "share"]
        assert list(driver) == ["class", *numbers, "steps"]
        assert driver["steps"][0] <= driver["steps"][1]
    shares = [driver["share"] for driver in form["drivers"]]
    assert shares == sorted(shares, reverse=True)
    assert not shares or sum(s for s in shares if s > 0) == pytest.approx(1, abs=1e-5)
    for finding in form["findings"]:
        promised = ["name", "severity", "step", "evidence", "advice", "reference"]
        assert list(finding) == [*promised, "steps"]
        assert finding["severity"] in ("info", "warning", "critical")
        assert isinstance(finding["step"], int)
        assert finding["evidence"]
        assert isinstance(finding["advice"], str)
        assert finding["advice"]
        assert all(isinstance(step, str) for step in finding["steps"])
        assert finding["reference"]
    for skipped in form["skipped"]:
        assert list(skipped) == ["name", "missing"]
        assert skipped["missing"]
    calm = form["verdict"] in ("healthy", "insufficient_data")
    assert calm == (form["onset_step"] is None)
    critical = {f["name"] for f in form["findings"] if f["severity"] == "critical"}
    assert calm or form["verdict"] in critical
    assert calm or form["findings"][0]["name"] == form["verdict"]
    assert d.reaches("critical") == (not calm)
    for text in (d.to_text(), d.to_markdown()):
        assert d.run in text
        assert all(f["name"] in text for f in form["findings"])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_short_runs_have_insufficient_data(tmp_path: Path, steps: int) -> None:
    path = write_fake_run(tmp_path / "run", steps=steps)
    d = diagnose(open_run(path))
    assert d.verdict == "insufficient_data"
    assert not d.findings
    check_form(d)


def test_a_folder_with_a_manifest_alone(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.close("failed")
    d = diagnose(open_run(tmp_path / "run"))
    assert d.verdict == "insufficient_data"
    assert {s.name for s in d.skipped} >= {detector.name for detector in DETECTORS}


def test_a_half_written_last_line_changes_nothing(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", drift="explosion", status="running")
    before = diagnose(open_run(path)).to_dict()
    with (path / STEP_LOG).open("a") as log:
        log.write('{"step": 41, "entro')
    assert diagnose(open_run(path)).to_dict() == before


def test_a_broken_line_in_the_middle_is_one_clear_error(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run")
    text = (path / STEP_LOG).read_text().replace('"step": 20', '"ste', 1)
    (path / STEP_LOG).write_text(text)
    with pytest.raises(UserError, match="line 20"):
        diagnose(open_run(path))


def test_infinities_and_nulls_in_the_log_are_missing_values(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "run", {"entropy": np.full(30, 0.4), "reward": np.full(30, 0.5)})
    lines = (path / STEP_LOG).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[4]["entropy"] = math.inf
    rows[9]["reward"] = None
    for row in rows:
        del row["crc32"]
    (path / STEP_LOG).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (finding,) = diagnose(open_run(path)).findings
    assert finding.evidence["steps"] == "5, 10"


def test_markdown_escapes_what_comes_from_the_run(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", manifest={"name": "<script>|*x*"})
    text = diagnose(open_run(path)).to_markdown()
    assert "<script>" not in text.replace("\\<", "")
    assert "\\|" in text


def test_unknown_severity_is_a_user_error(tmp_path: Path) -> None:
    d = judge(tmp_path, reward=np.full(10, 0.5))
    assert not d.reaches("info")
    with pytest.raises(UserError, match="info, warning, critical"):
        d.reaches("fatal")


@pytest.mark.slow
def test_cost_is_linear_in_the_steps(tmp_path: Path) -> None:
    steps = 100_000
    columns = {
        "entropy": noisy(ramp(0.4, 3, steps, 60_000, 10_000), 0.02),
        "reward": noisy(ramp(0.6, 0.1, steps, 60_000, 10_000), 0.03, 1),
        "grad_norm": np.exp(noisy(np.zeros(steps), 0.3, 2)),
        "loss": noisy(np.zeros(steps), 1, 3),
    }
    rows = np.round(np.column_stack(list(columns.values())), 5).tolist()
    path = write_steps(tmp_path / "run", {name: values[:1] for name, values in columns.items()})
    lines = (
        json.dumps({"step": i + 1, **dict(zip(columns, row, strict=True))})
        for i, row in enumerate(rows)
    )
    (path / STEP_LOG).write_text("\n".join(lines) + "\n")
    flows = {key: np.ones(steps) for key in ((1, 1), (1, 0), (-1, 1), (-1, 0))}
    write_flows(path, flows)
    began = time.process_time()
    d = diagnose(open_run(path))
    assert time.process_time() - began < 5
    assert d.verdict == "entropy_explosion"
    assert abs(d.onset_step - 60_000) < 1500


# ---- the statistics underneath ------------------------------------------------------------------


def test_episodes_and_departures() -> None:
    mask = np.array([0, 1, 1, 1, 0, 0, 1, 1, 1, 1], bool)
    assert episodes(mask, 3) == [(1, 4), (6, 10)]
    assert episodes(mask, 4) == [(6, 10)]
    home = np.array([1, 0, 0, 0, 1, 0, 0, 0, 0, 0], bool)
    found = departure(mask, np.zeros(10, bool), home, 3)
    assert (found.onset, found.warned, found.crossed, found.ongoing) == (5, 6, None, True)
    assert departure(mask[:6], np.zeros(6, bool), home[:6], 3) is None
    severe = departure(mask[:6], mask[:6], home[:6], 3)
    assert (severe.onset, severe.crossed, severe.ongoing) == (1, 1, False)


def test_noise_ignores_a_trend_but_not_slow_wandering() -> None:
    steps = np.arange(400)
    white = np.random.default_rng(0).normal(0, 0.1, 400)
    assert Series(steps, white).noise == pytest.approx(0.1, rel=0.2)
    assert Series(steps, white + steps * 0.05).noise == pytest.approx(0.1, rel=0.2)
    wander = Series(steps, white + np.sin(steps / 20))
    assert wander.smooth_noise > 5 * Series(steps, white).smooth_noise
