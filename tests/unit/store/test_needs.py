"""What a run has and lacks, said the same way to detectors, figures and importers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.builders import write_fake_run
from tests.support.step_logs import write_steps
from tests.unit.store.test_store import token_records
from wapo_analysis.schema import CLASSES, ROLLOUTS
from wapo_analysis.store import Need, Run, RunWriter, open_run
from wapo_analysis.table import Records

REWARD = Need("steps", "reward")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "full"
    return open_run(write_fake_run(folder, steps=4, probe_every=2))


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "blind"
    absent = ("collision_rest", "entropy", "logp_old")
    return open_run(write_fake_run(folder, steps=4, rescore_every=0, missing=absent))


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("steps", "entropy"),
        ("classes", "grad_mass"),
        ("tokens", "logp_old"),
        ("tokens", "dentropy"),
        ("rollouts", "completion"),
        ("rollouts", "length"),
        ("probes", "measured_dentropy"),
    ],
)
def test_a_whole_run_lacks_nothing(full: Run, table: str, column: str) -> None:
    assert full.lacks(Need(table, column)) is None


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        (Need("steps", "entropy"), "no 'entropy' in its steps table"),
        (Need("classes", "grad_mass"), "no 'grad_mass' in its classes table"),
        (Need("tokens", "logp_old"), "no 'logp_old' in its tokens table"),
        (Need("tokens", "dprob"), "no token that was re-scored after its update"),
        (Need("probes", "scale"), "no probes (recorded with probe_every)"),
        (Need("steps", "rewards/*/mean"), "no 'rewards/*/mean' in its steps table"),
    ],
)
def test_the_reason_names_the_run_and_what_is_missing(blind: Run, need: Need, reason: str) -> None:
    assert blind.lacks(need) == f"blind has {reason}"


def test_one_of_several_is_enough_and_all_are_named(blind: Run) -> None:
    either = Need("steps", "entropy") | Need("tokens", "logp_old") | REWARD
    assert blind.lacks(either) is None
    assert str(either) == "entropy or tokens.logp_old or reward"
    assert blind.lacks(Need("steps", "entropy") | Need("tokens", "logp_old")) is not None


def test_patterns_meet_the_names_of_a_foreign_log(tmp_path: Path) -> None:
    log = {"reward": [0.5, 0.5], "rewards/format/mean": [float("nan"), 1.0]}
    run = open_run(write_steps(tmp_path / "run", log))
    assert run.lacks(Need("steps", "rewards/*/mean")) is None
    assert run.lacks(Need("steps", "rewards/*/std")) is not None


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "empty", steps=0))
    reasons = {table: run.lacks(Need(table, "reward")) for table in ("steps", "rollouts", "tokens")}
    assert reasons == {
        "steps": "empty has no steps yet",
        "rollouts": "empty has no completions",
        "tokens": "empty has no token rows (recorded with token_every and token_fraction above 0)",
    }


@pytest.mark.parametrize("step", [1, 3, 5])
def test_the_first_the_middle_and_the_last_step_of_the_rows_are_looked_at(
    step: int, tmp_path: Path
) -> None:
    """A text that stands at one step alone is found at each of the three places."""
    writer = RunWriter(tmp_path / "run", {"name": "run", "objective": {"name": "grpo"}})
    for number in range(1, 6):
        columns = {name: [number if name == "step" else 0] for name in ("step", "rank", "rollout")}
        columns |= {"group": [0], "reward": [1.0 if number == step else float("nan")]}
        columns |= {"completion": ["words" if number == step else None]}
        writer.write_part(Records.build(ROLLOUTS, columns), number)
        writer.append_step({"step": number})
    writer.close("finished")
    run = open_run(tmp_path / "run")
    assert run.lacks(Need("rollouts", "reward")) is None
    assert run.lacks(Need("rollouts", "completion")) is None
    assert run.lacks(Need("rollouts", "prompt")) == "run has no 'prompt' in its rollouts table"


def test_a_column_that_is_first_logged_late_is_there(tmp_path: Path) -> None:
    nothing = [float("nan")] * 1099
    log = {"reward": [0.5] * 1100, "eval_reward": [*nothing, 0.5], "entropy": [*nothing, np.inf]}
    run = open_run(write_steps(tmp_path / "run", log))
    assert run.lacks(Need("steps", "eval_reward")) is None
    assert run.lacks(Need("steps", "entropy")) == "run has no 'entropy' in its steps table"


@pytest.mark.parametrize(("rescored", "lacks"), [(0, True), (1, False)])
def test_one_token_that_was_rescored_is_looked_for_at_its_step(
    rescored: int, lacks: bool, tmp_path: Path
) -> None:
    """Of seven steps one, neither the first, the middle nor the last, has a re-scored token."""
    writer = RunWriter(tmp_path / "run", {"name": "run", "objective": {"name": "grpo"}})
    for step in range(1, 8):
        after = -0.5 if step == 2 else float("nan")
        tokens = token_records(step, 1).with_columns({"logp_after": np.array([after])})
        writer.write_part(tokens, step)
        cell = {"sign": [1], "regime": [1], "prob_bin": [4], "tokens": [1]}
        count = rescored if step == 2 else 0
        cells = {"step": [step], "rank": [0], **cell, "rescored": [count]}
        writer.write_part(Records.build(CLASSES, cells), step)
        writer.append_step({"step": step})
    writer.close("finished")
    assert (open_run(tmp_path / "run").lacks(Need("tokens", "logp_after")) is not None) is lacks


def test_a_column_of_lists_that_another_tool_wrote_holds_no_number(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", steps=1, prompts=1, rollouts=2, loose=True)
    (part,) = (path / "rollouts").iterdir()
    table = pq.read_table(part)
    pq.write_table(table.append_column("scores", pa.array([None, [0.5]])), part)
    assert open_run(path).lacks(Need("rollouts", "scores")) is not None
