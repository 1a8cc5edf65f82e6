"""Detectors of completions, and of another policy than the one that sampled."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.step_logs import finding, judge, names, noisy, ramp, reopened, write_steps
from wapo_analysis.diagnose import diagnose
from wapo_analysis.diagnose.samples import (
    SAMPLED_STEPS,
    _steps,
    answer_shares,
    completion_rows,
    first_pass_gap,
    is_noise,
    length_pay,
    noise_share,
    shared_answers,
)
from wapo_analysis.schema import ROLLOUTS, TOKENS
from wapo_analysis.series import evenly
from wapo_analysis.store import Run, open_run
from wapo_analysis.table import Records

STEPS = 60


# ---- completions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "reward", "severity", "advice"),
    [
        (ramp(20, 60, STEPS, 20, 20), np.full(STEPS, 0.3), "warning", "length bias"),
        (ramp(20, 60, STEPS, 20, 20), ramp(0.3, 0.7, STEPS, 20, 20), "info", "reward rises"),
        (ramp(20, 8, STEPS, 20, 20), np.full(STEPS, 0.3), "warning", "end-of-text"),
        (ramp(20, 8, STEPS, 20, 20), ramp(0.3, 0.9, STEPS, 20, 20), "info", "verifier"),
    ],
)
def test_length_drifts_both_ways(
    tmp_path: Path, length: np.ndarray, reward: np.ndarray, severity: str, advice: str
) -> None:
    d = judge(tmp_path, length=noisy(length, 0.5), reward=noisy(reward, 0.02, 1))
    found = finding(d, "length_drift")
    assert found.severity == severity
    assert advice in str(found.advice)
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
    assert "verifier" in str(found.advice)


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


@pytest.mark.parametrize(
    ("text", "noise"),
    [
        ("!" * 20, True),
        ("! " * 20, True),
        ("ation \u0442\u0443\u0442 \u7684 uckle \u0442\u0443\u0442 \u7684 ation", True),
        ("So x = 12, and \u03b1 + \u03b2 is \u03c0.", False),
        ("The word \u4f60\u597d means hello in Chinese.", False),
        ("\u3053\u308c\u306f\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 with English", False),
        ("1000000", False),
        ("", False),
    ],
)
def test_what_noise_is(text: str, noise: bool) -> None:
    assert is_noise(text) == noise


def test_completions_that_turn_into_noise_are_told(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "run", {"reward": [0.5] * 12})
    writer = reopened(path)
    for step in range(1, 13):
        texts = ["the answer is 42"] * 4 if step < 7 else ["!" * 40] * 3 + ["the answer is 42"]
        columns = {name: np.zeros(4) for name in ("rank", "group", "reward")}
        columns |= {"step": np.full(4, step), "rollout": np.arange(4)}
        writer.write_part(Records.build(ROLLOUTS, columns | {"completion": texts}), step)
    writer.close("finished")
    found = finding(diagnose(open_run(path)), "garbled_completions")
    assert (found.step, found.severity) == (7, "warning")
    assert found.evidence["end"] == pytest.approx(0.75)


def answered(tmp_path: Path, right: np.ndarray, reward: np.ndarray) -> Run:
    """Ten completions a step, of which a number end with the reference answer."""
    path = write_steps(tmp_path / "run", {"reward": reward})
    writer = reopened(path)
    for step, count in enumerate(right.astype(int), start=1):
        columns = {name: np.zeros(10) for name in ("rank", "group")}
        columns |= {"step": np.full(10, step), "rollout": np.arange(10)}
        texts = ["so it is 42"] * count + ["so it is 421"] * (10 - count)
        earned = np.arange(10) < round(10 * reward[step - 1])
        columns |= {"completion": texts, "answer": ["42"] * 10, "reward": earned.astype(float)}
        writer.write_part(Records.build(ROLLOUTS, columns), step)
    writer.close("finished")
    return open_run(path)


def test_a_reward_that_no_longer_asks_for_the_answer_is_told(tmp_path: Path) -> None:
    d = diagnose(answered(tmp_path, np.r_[np.full(10, 6), np.full(20, 1)], np.full(30, 0.6)))
    found = finding(d, "reward_without_answer")
    assert (found.step, found.severity) == (11, "critical")
    assert found.evidence["end"] == pytest.approx(0.1)
    assert (d.verdict, d.onset_step) == ("reward_without_answer", 11)


def test_a_reward_that_asks_for_the_answer_less_is_a_warning(tmp_path: Path) -> None:
    d = diagnose(answered(tmp_path, np.r_[np.full(10, 6), np.full(20, 4)], np.full(30, 0.6)))
    assert finding(d, "reward_without_answer").severity == "warning"
    assert d.verdict == "healthy"


@pytest.mark.parametrize(
    ("right", "reward"),
    [
        (np.full(30, 6), np.full(30, 0.6)),
        (np.r_[np.full(10, 6), np.full(20, 1)], np.r_[np.full(10, 0.6), np.full(20, 0.1)]),
        (np.zeros(30), np.full(30, 0.6)),  # the reference is written in another form
    ],
)
def test_an_answer_that_goes_with_the_reward_is_no_finding(
    tmp_path: Path, right: np.ndarray, reward: np.ndarray
) -> None:
    assert "reward_without_answer" not in names(diagnose(answered(tmp_path, right, reward)))


def test_at_most_forty_steps_are_read() -> None:
    assert evenly(range(1, 10), SAMPLED_STEPS) == list(range(1, 10))
    chosen = evenly(range(1, 1001), SAMPLED_STEPS)
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
    path = write_steps(tmp_path / "run", {"reward": np.full(len(shift), 0.5)}, source="loop")
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


def test_one_token_in_a_thousand_that_is_off_makes_the_ratio_uneven(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "run", {"reward": np.full(12, 0.5)}, source="loop")
    n, writer = 1000, reopened(path)
    for step in range(1, 13):
        keys = {name: np.zeros(n) for name in ("minibatch", "rank", "group", "rollout", "token_id")}
        logp = np.full(n, np.log(0.6))
        columns = keys | {"step": np.full(n, step), "position": np.arange(n), "logp": logp}
        columns |= {"advantage": np.ones(n), "logp_old": np.r_[np.log(0.05), logp[1:]]}
        writer.write_part(Records.build(TOKENS, columns), step)
    writer.close("finished")
    gap = first_pass_gap(open_run(path))
    assert gap["k3"].max() < 0.01
    assert gap["ess"].max() < 0.9
    assert finding(diagnose(open_run(path)), "train_inference_mismatch").step == 1


def test_a_run_without_a_second_engine_is_never_told_of_one(tmp_path: Path) -> None:
    run = off_policy(tmp_path, np.full(30, 0.3))
    alone = {"source": "trl", "config": {"use_vllm": False}}
    for described in ({"source": "built-in"}, alone):
        told = diagnose(replace(run, manifest=run.manifest.changed(described)))
        assert "train_inference_mismatch" not in names(told)
    engine = {"source": "trl", "config": {"use_vllm": True}}
    told = diagnose(replace(run, manifest=run.manifest.changed(engine)))
    assert "train_inference_mismatch" in names(told)


def test_only_fresh_rollouts_are_judged(tmp_path: Path) -> None:
    """Of a TRL run that trains four times on a batch, the first step of each batch."""
    run = off_policy(tmp_path, np.where(np.arange(40) % 4 == 0, 0.003, 0.4))
    config = {"num_iterations": 2, "steps_per_generation": 8, "gradient_accumulation_steps": 4}
    described = {"source": "trl", "config": config | {"use_vllm": True}}
    told = replace(run, manifest=run.manifest.changed(described))
    assert list(first_pass_gap(told).index) == list(range(1, 41, 4))
    assert not names(diagnose(told)) & {"train_inference_mismatch", "staleness"}
    assert len(first_pass_gap(run)) == 40


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
    columns = {"reward": np.full(STEPS, 0.5), "engine_logp_diff": ramp(0.01, 0.2, STEPS, 20, 10)}
    d = judge(tmp_path, **columns)
    assert 20 < finding(d, "train_inference_mismatch").step <= 30
    skipped = {s.name: s.missing for s in judge(tmp_path / "b", reward=[0.5] * 10).skipped}
    assert skipped["train_inference_mismatch"] == (
        "engine_kl or engine_logp_diff or engine_prob_diff or tokens.logp_old",
    )
    assert skipped["staleness"] == ("staleness or tokens.logp_old",)


def test_drift_within_the_batch_is_judged_against_its_beginning(tmp_path: Path) -> None:
    reward = np.full(STEPS, 0.5)
    d = judge(tmp_path, kl_old=ramp(0.002, 0.1, STEPS, 20, 20), reward=reward)
    assert 20 < finding(d, "off_policy_drift").step <= 40
    assert not judge(tmp_path / "always", kl_old=np.full(STEPS, 0.1), reward=reward).findings


def test_steps_are_read_evenly_and_the_nearest_to_a_window() -> None:
    assert evenly(range(5), 5) == [0, 1, 2, 3, 4]
    assert evenly(range(6), 2) == [0, 5]
    assert evenly(range(100), 3) == [0, 50, 99]
    recorded = [1, 5, 20, 21, 22, 23]
    assert _steps(recorded, 20, 23) == [20, 21, 22], "three at most"
    assert _steps(recorded, 6, 9) == [5]
    assert _steps(recorded, 33, 40) == [23]
    assert _steps(recorded, 34, 40) == []
    assert _steps([], 1, 2) == []


def test_shares_of_completions() -> None:
    rows = pd.DataFrame(
        {
            "step": [1, 1, 1, 1, 2, 2, 3],
            "group": [0, 0, 1, 1, 0, 1, 0],
            "prompt": ["p", "p", "q", "q", "p", "p", None],
            "completion": ["a", "b", "a", "c", "d", "d", "!" * 16],
            "answer": ["a", "x", " A ", "", "d", "e", None],
            "reward": [1.0, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0],
        }
    )
    shared = shared_answers(rows)
    assert (shared.steps.tolist(), shared.values.tolist()) == ([1], [0.5])
    assert not len(shared_answers(rows.assign(completion=None)))
    noise = noise_share(rows)
    assert (noise.steps.tolist(), noise.values.tolist()) == ([1, 2, 3], [0, 0, 1])
    held, missed = answer_shares(rows)
    assert held.values.tolist() == pytest.approx([2 / 3, 0.5])
    assert (missed.steps.tolist(), missed.values.tolist()) == ([1, 2], [0.5, 0.0])
    late = rows.assign(completion=["a" + " " * 100] + ["xay"] * 6)
    assert answer_shares(late)[0].values.tolist() == [0, 0]
