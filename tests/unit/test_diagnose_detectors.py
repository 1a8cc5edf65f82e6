"""The detectors beside the verdicts: each fires on what it is for, and on nothing else."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.step_logs import judge, names, noisy, ramp, write_flows, write_steps
from wapo_analysis.diagnose import DETECTORS, Diagnosis, Finding, diagnose
from wapo_analysis.diagnose.forecast import TREND_WINDOW, rolling_trend
from wapo_analysis.diagnose.samples import (
    SAMPLED_STEPS,
    completion_rows,
    evenly,
    first_pass_gap,
    length_pay,
    shared_answers,
)
from wapo_analysis.schema import CLASSES, ROLLOUTS, TOKENS
from wapo_analysis.store import Run, RunWriter, open_run
from wapo_analysis.table import Records

STEPS = 60
Flows = Mapping[tuple[int, int], np.ndarray]


def finding(diagnosis: Diagnosis, name: str) -> Finding:
    return next(f for f in diagnosis.findings if f.name == name)


def reopened(path: Path) -> RunWriter:
    return RunWriter(path, open_run(path).manifest, resume_after=10**6)


# ---- completions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "reward", "severity", "advice"),
    [
        (ramp(20, 60, STEPS, 20, 20), np.full(STEPS, 0.3), "warning", "length bias"),
        (ramp(20, 60, STEPS, 20, 20), ramp(0.3, 0.7, STEPS, 20, 20), "info", "reward rises"),
        (ramp(20, 8, STEPS, 20, 20), np.full(STEPS, 0.3), "warning", "end-of-text"),
        (ramp(20, 8, STEPS, 20, 20), ramp(0.3, 0.9, STEPS, 20, 20), "warning", "verifier"),
    ],
)
def test_length_drifts_both_ways(
    tmp_path: Path, length: np.ndarray, reward: np.ndarray, severity: str, advice: str
) -> None:
    d = judge(tmp_path, length=noisy(length, 0.5), reward=noisy(reward, 0.02, 1))
    found = finding(d, "length_drift")
    assert found.severity == severity
    assert advice in found.advice
    assert 20 < found.step <= 45
    assert found.evidence["ratio"] == pytest.approx(length[-1] / 20, rel=0.1)


def test_a_length_that_wanders_within_its_noise_is_silent(tmp_path: Path) -> None:
    length = np.random.default_rng(0).normal(20, 6, STEPS)
    assert not judge(tmp_path, length=length, reward=np.full(STEPS, 0.3)).findings


def write_answers(path: Path, same_from: int, prompts: int = 4, rollouts: int = 4) -> None:
    """Completions that depend on the prompt until a step, and no longer from it on."""
    writer = reopened(path)
    for step in range(1, STEPS + 1):
        cells = [(g, r) for g in range(prompts) for r in range(rollouts)]
        texts = ["7" if step >= same_from else f"{g}:{r}:{step}" for g, r in cells]
        columns = {
            "step": [step] * len(cells),
            "rank": [0] * len(cells),
            "group": [g for g, _ in cells],
            "rollout": list(range(len(cells))),
            "prompt": [f"question {g}" for g, _ in cells],
            "completion": texts,
            "reward": [0.5] * len(cells),
        }
        writer.write_part(Records.build(ROLLOUTS, columns), step)
    writer.close("finished")


def test_the_same_answer_to_every_prompt_is_found_and_voids_the_reward(tmp_path: Path) -> None:
    columns = {
        "reward": noisy(ramp(0.4, 0.95, STEPS, 20, 15), 0.01),
        "entropy": noisy(ramp(0.4, 0.01, STEPS, 20, 15), 0.001, 1),
    }
    path = write_steps(tmp_path / "run", columns)
    assert diagnose(open_run(path)).verdict == "healthy"
    write_answers(path, same_from=30)
    d = diagnose(open_run(path))
    assert d.verdict == "entropy_collapse"
    found = finding(d, "degenerate_completions")
    assert found.evidence == {"start": 0.0, "end": 1.0}
    assert 28 <= found.step <= 34
    assert "verifier" in found.advice


def test_answers_that_depend_on_the_prompt_are_fine_also_if_repeated_within_it(
    tmp_path: Path,
) -> None:
    path = write_steps(tmp_path / "run", {"reward": np.full(STEPS, 0.5)})
    write_answers(path, same_from=STEPS + 1)
    assert "degenerate_completions" not in names(diagnose(open_run(path)))
    series = shared_answers(completion_rows(open_run(path)))
    assert len(series) == SAMPLED_STEPS
    assert series.values.max() == 0


def write_lengths(path: Path, lengths: np.ndarray, pays: bool) -> None:
    """Groups of four rollouts of differing length; the shorter half earns, or a random one."""
    writer, rng = reopened(path), np.random.default_rng(0)
    for step, mean in enumerate(lengths, start=1):
        offset = np.tile([-1, 0, 1, 2], 4)
        reward = (offset < 1) if pays else rng.random(16) < 0.5
        columns = {
            "step": np.full(16, step),
            "rank": np.zeros(16),
            "group": np.repeat(np.arange(4), 4),
            "rollout": np.arange(16),
            "reward": reward.astype(float),
            "length": (mean + offset).astype(int),
        }
        writer.write_part(Records.build(ROLLOUTS, columns), step)
    writer.close("finished")


@pytest.mark.parametrize("pays", [True, False])
def test_shorter_answers_that_earn_more_are_a_warning(tmp_path: Path, pays: bool) -> None:
    length = noisy(ramp(30, 26, STEPS, 20, 20), 0.1)
    path = write_steps(tmp_path / "run", {"length": length, "reward": np.full(STEPS, 0.5)})
    write_lengths(path, length, pays)
    d = diagnose(open_run(path))
    assert ("reward_pays_for_length" in names(d)) == pays
    if pays:
        found = finding(d, "reward_pays_for_length")
        assert found.severity == "warning"
        assert found.evidence["correlation"] == pytest.approx(-0.894, abs=0.01)
        assert 25 < found.step < 42


def test_the_pay_for_length_leaves_out_what_the_prompt_decides(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "run", {"reward": np.full(3, 0.5)})
    columns = {
        "step": np.ones(4),
        "rank": np.zeros(4),
        "group": [0, 0, 1, 1],  # the hard prompt is long and earns little, whatever the rollout
        "rollout": np.arange(4),
        "reward": [1.0, 0.8, 0.2, 0.0],
        "length": [10, 12, 101, 99],
    }
    writer = reopened(path)
    writer.write_part(Records.build(ROLLOUTS, columns), 1)
    writer.close("finished")
    assert length_pay(completion_rows(open_run(path))).values == pytest.approx([0.0], abs=1e-4)


def test_at_most_forty_steps_are_read() -> None:
    assert evenly(np.arange(1, 10)) == list(range(1, 10))
    chosen = evenly(np.arange(1, 1001))
    assert (len(chosen), chosen[0], chosen[-1]) == (SAMPLED_STEPS, 1, 1000)


# ---- another policy than the one that sampled ---------------------------------------------------


def write_tokens(path: Path, shift: np.ndarray, tokens: int = 200) -> None:
    """Token rows whose behaviour log-probability is off by a normal of the step's spread."""
    writer, rng = reopened(path), np.random.default_rng(0)
    for step, sigma in enumerate(shift, start=1):
        logp = np.log(rng.uniform(0.2, 0.9, tokens))
        # Centred so that the ratio has mean 1, as that of two distributions has.
        old = logp + rng.normal(0, sigma, tokens) + sigma**2 / 2
        late = np.arange(tokens) % 2
        columns = {
            "step": np.full(tokens, step),
            "minibatch": late,
            "rank": np.zeros(tokens),
            "group": np.zeros(tokens),
            "rollout": np.zeros(tokens),
            "position": np.arange(tokens),
            "token_id": np.zeros(tokens),
            "advantage": np.ones(tokens),
            "logp": logp,
            "logp_old": np.where(late == 0, old, logp + 1.0),  # later passes may drift
        }
        writer.write_part(Records.build(TOKENS, columns), step)
    writer.close("finished")


def off_policy(tmp_path: Path, shift: np.ndarray) -> Run:
    path = write_steps(tmp_path / "run", {"reward": np.full(len(shift), 0.5)})
    write_tokens(path, shift)
    return open_run(path)


def test_a_gap_from_the_first_step_on_is_a_mismatch_of_engines(tmp_path: Path) -> None:
    d = diagnose(off_policy(tmp_path, np.full(30, 0.3)))
    found = finding(d, "train_inference_mismatch")
    assert "staleness" not in names(d)
    assert found.step == 1
    assert found.evidence["start"] == pytest.approx(0.3**2 / 2, rel=0.3)
    assert found.evidence["ess"] == pytest.approx(math.exp(-(0.3**2)), abs=0.05)
    assert 0.05 < found.evidence["max_dp"] < 1


def test_a_gap_that_grows_from_nothing_is_staleness(tmp_path: Path) -> None:
    d = diagnose(off_policy(tmp_path, ramp(0.0, 0.4, 30, 10, 10)))
    assert "train_inference_mismatch" not in names(d)
    assert 11 <= finding(d, "staleness").step <= 20


def test_on_policy_first_passes_are_silent(tmp_path: Path) -> None:
    run = off_policy(tmp_path, np.full(30, 0.003))
    assert not names(diagnose(run)) & {"train_inference_mismatch", "staleness"}
    gap = first_pass_gap(run)
    assert gap["tokens"].tolist() == [100.0] * 30
    assert gap["k3"].max() < 1e-4
    assert gap["ess"].min() > 0.999


def test_a_logged_gap_serves_where_there_are_no_token_rows(tmp_path: Path) -> None:
    column = "sampling/sampling_logp_difference/mean"
    columns = {"reward": np.full(STEPS, 0.5), column: ramp(0.01, 0.2, STEPS, 20, 10)}
    d = judge(tmp_path, **columns)
    assert 20 < finding(d, "train_inference_mismatch").step <= 30
    skipped = {s.name: s.missing for s in judge(tmp_path / "b", reward=[0.5] * 10).skipped}
    assert skipped["train_inference_mismatch"] == (f"tokens.logp_old or {column}",)
    assert skipped["staleness"] == ("tokens.logp_old",)


def test_drift_within_the_batch_is_judged_against_its_beginning(tmp_path: Path) -> None:
    reward = np.full(STEPS, 0.5)
    d = judge(tmp_path, kl_old=ramp(0.002, 0.1, STEPS, 20, 20), reward=reward)
    assert 20 < finding(d, "off_policy_drift").step <= 40
    assert not judge(tmp_path / "always", kl_old=np.full(STEPS, 0.1), reward=reward).findings


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
    cells = [(s, k, v) for k, values in masses.items() for s, v in enumerate(values, start=1)]
    columns = {
        "step": [step for step, _, _ in cells],
        "rank": [0] * len(cells),
        "sign": [key[0] for _, key, _ in cells],
        "regime": [key[1] for _, key, _ in cells],
        "prob_bin": [4] * len(cells),
        "tokens": [10] * len(cells),
        "grad_mass": [float(value) for _, _, value in cells],
    }
    writer = reopened(path)
    writer.write_part(Records.build(CLASSES, columns), 1)
    writer.close("finished")


def massed(tmp_path: Path, masses: Flows, reward: np.ndarray | None = None) -> Diagnosis:
    path = write_steps(
        tmp_path / "run", {"reward": np.full(STEPS, 0.4) if reward is None else reward}
    )
    write_mass(path, masses)
    return diagnose(open_run(path))


def test_a_class_that_takes_over_the_gradient_is_named(tmp_path: Path) -> None:
    even = np.full(STEPS, 1.0)
    masses = {(-1, 1): ramp(1, 12, STEPS, 20, 20), (1, 0): even, (1, 1): even, (-1, 0): even}
    d = massed(tmp_path, masses)
    found = finding(d, "one_class_takes_the_gradient")
    assert (found.severity, found.evidence["class"]) == ("warning", "neg_peak")
    assert found.evidence["end"] == pytest.approx(12 / 15, abs=0.01)
    assert "exclude_bins = neg_peak" in found.advice
    outweighs = finding(d, "negative_mass_outweighs")
    assert outweighs.evidence["class"] == "neg_peak"
    assert outweighs.evidence["end"] == pytest.approx(13 / 15, abs=0.01)


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


# ---- forecast -----------------------------------------------------------------------------------


def test_rolling_trend_is_theil_sen_and_kendall() -> None:
    line = 0.5 * np.arange(20.0)
    trend = rolling_trend(line)
    assert np.isnan(trend.slope[: TREND_WINDOW - 1]).all()
    assert trend.slope[TREND_WINDOW - 1 :] == pytest.approx(0.5)
    assert trend.agree[TREND_WINDOW - 1 :] == pytest.approx(1)
    line[10] = 100.0  # one outlier moves neither far
    assert rolling_trend(line).slope[TREND_WINDOW - 1 :] == pytest.approx(0.5, abs=0.2)
    assert not rolling_trend(np.ones(3)).agree.any()


def test_every_detector_says_what_it_needs_and_none_is_listed_twice(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.close("finished")
    d = diagnose(open_run(tmp_path / "run"))
    listed = [s.name for s in d.skipped]
    assert sorted(set(listed)) == sorted(listed)
    assert {detector.name for detector in DETECTORS} <= set(listed)


def rising(steps: int, onset: int, rate: float, flow: float) -> tuple[np.ndarray, Flows]:
    """Entropy that grows by a rate from a step on, and the net flow of two classes."""
    entropy = 0.4 * np.exp(rate * np.clip(np.arange(steps) - onset, 0, None))
    return noisy(entropy, 0.002), {(-1, 1): np.full(steps, 1.0 + flow), (1, 1): np.full(steps, -1)}


def early(tmp_path: Path, entropy: np.ndarray, flows: Flows, reward: np.ndarray) -> Diagnosis:
    path = write_steps(tmp_path / "run", {"entropy": entropy, "reward": reward})
    write_flows(path, flows)
    return diagnose(open_run(path))


def test_the_early_warning_comes_before_the_entropy_leaves_its_band(tmp_path: Path) -> None:
    entropy, flows = rising(28, 20, 0.04, flow=1.0)
    assert entropy.max() < 1.5 * 0.4
    d = early(tmp_path, entropy, flows, np.full(28, 0.5))
    found = finding(d, "early_warning")
    assert not names(d) & {"entropy_rise", "entropy_explosion"}
    assert found.severity == "warning"
    assert 21 <= found.step <= 27
    assert found.evidence["class"] == "neg_peak"
    assert found.evidence["flow_agrees"] == 1
    assert "exclude_bins = neg_peak" in found.advice
    assert d.first_warning_step == found.step


def test_against_the_flow_it_blames_the_step_size(tmp_path: Path) -> None:
    entropy, flows = rising(30, 20, 0.04, flow=-0.5)
    found = finding(early(tmp_path, entropy, flows, np.full(30, 0.5)), "early_warning")
    assert found.evidence["flow_agrees"] == 0
    assert "too large" in found.message
    assert found.advice.startswith("Lower lr")


def test_a_rise_that_comes_to_nothing_is_taken_back(tmp_path: Path) -> None:
    entropy, flows = rising(28, 20, 0.04, flow=1.0)
    settled = np.r_[entropy, noisy(np.full(40, 0.42), 0.002, 1)]
    flows = {key: np.r_[values, np.zeros(40)] for key, values in flows.items()}
    assert "early_warning" not in names(early(tmp_path, settled, flows, np.full(68, 0.5)))


@pytest.mark.parametrize("end", [0.9, 0.1])
def test_a_fall_warns_early_only_if_the_reward_falls_with_it(tmp_path: Path, end: float) -> None:
    entropy = noisy(0.4 * np.exp(-0.05 * np.clip(np.arange(30) - 18, 0, None)), 0.001)
    flows = {(1, 1): np.full(30, -1.0), (-1, 0): np.full(30, -2.0)}
    d = early(tmp_path, entropy, flows, noisy(ramp(0.5, end, 30, 18, 10), 0.005, 1))
    assert ("early_warning" in names(d)) == (end < 0.5)
    if end < 0.5:
        assert finding(d, "early_warning").evidence["class"] == "neg_valley"


@pytest.mark.parametrize(
    ("rate", "onset", "reward", "severity"),
    [
        (0.038, 30, 0.5, "warning"),
        (0.038, 30, 0.95, "info"),  # the reward pays
        (0.02, 20, 0.5, "info"),  # due late
        (-0.03, 20, 0.5, "info"),
        (0.0, 20, 0.5, None),
    ],
)
def test_the_step_of_arrival_is_projected(
    tmp_path: Path, rate: float, onset: int, reward: float, severity: str | None
) -> None:
    steps = 40
    entropy = 0.4 * np.exp(rate * np.clip(np.arange(steps) - onset, 0, None))
    entropy = entropy * np.exp(noisy(np.zeros(steps), 0.003))
    d = judge(tmp_path, entropy=entropy, reward=noisy(ramp(0.5, reward, steps, 5, 20), 0.01, 1))
    assert ("entropy_arrival" in names(d)) == (severity is not None)
    if severity is not None:
        found = finding(d, "entropy_arrival")
        factor = 2 if rate > 0 else 0.2
        due = onset + 1 + math.log(factor) / rate
        assert found.evidence["arrival_step"] == pytest.approx(due, rel=0.1)
        assert found.evidence["target"] == pytest.approx(0.4 * factor, rel=0.02)
        assert found.severity == severity


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
    root = Path(__file__).parents[2]
    page = (root / "docs" / "diagnose.md").read_text()
    source = "".join(f.read_text() for f in (root / "wapo_analysis" / "diagnose").glob("*.py"))
    named = set(re.findall(r'name="([a-z_]+)"', source)) | {
        "entropy_explosion", "entropy_rise", "entropy_excursion", "entropy_collapse",
        "entropy_fall", "entropy_decline", "reward_collapse", "reward_drop", "diverged",
        "nonfinite_step", "gradient_vanishes", "gradient_grows", "negative_mass_outweighs",
        "positive_mass_outweighs",
    }  # fmt: skip
    assert len(named) > 25
    for name in named:
        assert f"| {name} |" in page, name
