"""The suite's labels, its step-by-step replay and its scores."""

from pathlib import Path

import numpy as np
import pytest

from experiments.suite.judging import Alarms, Beginning, Judged, score
from experiments.suite.runs import (
    FAULTS,
    RECIPES,
    STEPS,
    Outcome,
    SuiteRun,
    faulty,
    finished,
    outcome,
    suite,
)
from tests.support.builders import write_fake_run
from tests.support.step_logs import ramp
from wapo_analysis.diagnose import diagnose
from wapo_analysis.schema import ROLLOUTS
from wapo_analysis.store import Run, RunWriter, open_run
from wapo_analysis.table import Records

PROMPT, RIGHT, WRONG = "1+2+3=", "3;6", "3;7"


def graded_run(
    path: Path,
    true: np.ndarray,
    entropy: np.ndarray,
    seen: np.ndarray | None = None,
    **steps: float,
) -> Run:
    """A run whose stored completions earn ``true`` from the real verifier, ``seen`` in the log."""
    writer = RunWriter(path, {"task": "chain-sum"})
    for step, share in enumerate(true, start=1):
        right = round(share * 20)
        columns = {
            "step": [step] * 20,
            "rank": [0] * 20,
            "group": [0] * 20,
            "rollout": list(range(20)),
            "prompt": [PROMPT] * 20,
            "completion": [RIGHT] * right + [WRONG] * (20 - right),
            "answer": ["6"] * 20,
            "reward": [0.0] * 20,
        }
        writer.write_part(Records.build(ROLLOUTS, columns), step)
        reward = float(share if seen is None else seen[step - 1])
        flat = {"groups_all_wrong": 0.0, "groups_all_right": 0.0, "skipped_updates": 0}
        row = {"step": step, "reward": reward, "entropy": float(entropy[step - 1])}
        writer.append_step(row | flat | steps)
    writer.close("finished")
    return open_run(path)


LEVEL, UP, DOWN = np.full(40, 0.4), ramp(0.4, 0.9, 40, 5, 20), ramp(0.4, 0.0, 40, 15, 10)
LOST = UP - ramp(0.0, 0.6, 40, 28, 4)
DIPPED = UP - np.where((np.arange(40) >= 26) & (np.arange(40) < 31), 0.5, 0.0)


@pytest.mark.parametrize(
    ("label", "true", "entropy", "extra"),
    [
        ("healthy", UP, ramp(0.4, 0.05, 40, 5, 20), {}),
        ("explosion", DOWN, ramp(0.4, 1.5, 40, 15, 10), {}),
        ("collapse", LOST, ramp(0.4, 0.15, 40, 5, 20), {}),
        ("collapse", LEVEL, ramp(0.4, 0.05, 40, 5, 20), {}),
        ("reward_collapse", LOST, LEVEL, {}),
        ("reward_hacking", DOWN, LEVEL, {"seen": UP}),
        ("stalled", LEVEL, LEVEL, {"groups_all_wrong": 1.0}),
        ("diverged", UP, LEVEL, {"skipped_updates": 2}),
        ("unclear", ramp(0.4, 0.3, 40, 5, 20), LEVEL, {}),
        ("unclear", DIPPED, LEVEL, {}),
    ],
)
def test_labels_come_from_the_outcome(
    tmp_path: Path, label: str, true: np.ndarray, entropy: np.ndarray, extra: dict[str, float]
) -> None:
    assert outcome(graded_run(tmp_path / "run", true, entropy, **extra)).label == label


def test_the_loss_is_timed_where_half_of_the_gain_is_gone(tmp_path: Path) -> None:
    found = outcome(graded_run(tmp_path / "run", LOST, LEVEL))
    assert 30 <= found.lost_at <= 33  # 0.9 falls through 0.65 at step 30; three steps are averaged
    assert found.reward_peak == pytest.approx(0.9, abs=0.03)
    assert outcome(graded_run(tmp_path / "up", UP, LEVEL)).lost_at is None


def test_a_beginning_shows_nothing_of_what_came_later(tmp_path: Path) -> None:
    whole = open_run(write_fake_run(tmp_path / "run", drift="explosion", steps=40))
    early = Beginning(whole.path, whole.manifest.changed({"status": "running"}), whole, 12)
    short = open_run(write_fake_run(tmp_path / "short", drift="explosion", steps=40))
    for table in (early.steps, early.classes, early.rollouts, early.tokens()):
        assert table["step"].max() == 12
    some = early.table("rollouts", [3, 30], ["step", "reward"])
    assert set(some["step"]) == {3}
    assert list(some) == ["step", "reward"]
    assert diagnose(early).verdict == "healthy"
    assert diagnose(short).verdict == "entropy_explosion"


def judged(name: str, label: str, lost_at: int | None) -> Judged:
    run = SuiteRun(RECIPES[0], 1, Path(name))
    return Judged(
        run, Outcome(label, lost_at, 0, 0, 0, 0, 0), Alarms(None, None, {}), "healthy", None, ()
    )


def test_scores_count_late_missed_and_false_alarms() -> None:
    runs = [
        judged("early", "explosion", 20),
        judged("late", "collapse", 10),
        judged("missed", "explosion", 10),
        judged("untimed", "stalled", None),
        judged("calm", "healthy", None),
        judged("noisy", "healthy", None),
        judged("odd", "unclear", None),
    ]
    steps = {"early": 12, "late": 14, "missed": None, "untimed": 9, "calm": None, "noisy": 30,
             "odd": 3}  # fmt: skip
    alarms = {name: Alarms(step, None, {}) for name, step in steps.items()}
    found = score(runs, alarms, "warning")
    assert (found.caught, found.bad, found.false, found.healthy) == (3, 4, 1, 2)
    assert sorted(found.leads) == [-4, 8]
    assert found.cells()[2:] == ["+2.0 (n=2)", "1/3"]
    assert score(runs, alarms, "critical").caught == 0


def test_the_suite_is_split_by_seed_and_large_enough() -> None:
    runs = suite(Path("runs"))
    assert len(runs) >= 60
    assert len({run.out for run in runs}) == len(runs)
    assert {run.recipe.name for run in runs if run.test} == {recipe.name for recipe in RECIPES}
    assert all(run.config.steps == STEPS for run in runs)
    assert {recipe.fault for recipe in RECIPES} == set(FAULTS)


def test_faults_are_undone_and_stale_batches_come_from_an_older_policy() -> None:
    from wapo_analysis.train import loop

    plain = loop.draw_batch
    with faulty("stale"):
        assert loop.draw_batch is not plain
    assert loop.draw_batch is plain
    drawn = FAULTS["stale"](lambda policy, task, config, step: (policy, step))
    batches = [drawn(f"policy {step}", None, None, step) for step in range(1, 20)]
    assert batches[0] == ("policy 1", 1)
    assert batches[18] == ("policy 7", 19)  # the batch of step 19, sampled twelve steps before


def test_a_half_done_run_is_not_finished(tmp_path: Path) -> None:
    assert not finished(tmp_path / "none")
    assert not finished(write_fake_run(tmp_path / "half", status="running"))
    assert finished(write_fake_run(tmp_path / "whole"))
