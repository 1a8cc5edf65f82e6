"""A crash at every system call of a run's writer: the run opens, its steps are whole, it goes on.

The states come from `tests.support.power_loss`: the process is killed, or the power goes and what
was not fsynced is lost or comes in another order.
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.support.power_loss import Journal, State
from tests.support.recorder_passes import ROWS, record
from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.store import Run, open_run, writer
from wapo_analysis.store.lock import LOCK
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

STEPS, RECORDED = 6, 4
"""Steps of the training, and of the passes that are recorded without one."""
TABLES = ("tokens", "classes", "rollouts")


def journal_of(folder: Path, steps: int, write: Callable[[], object]) -> Journal:
    """Every state of a run folder while it is written; its parts merge after half the steps."""
    folder.mkdir(parents=True)
    journal = Journal(folder)
    with pytest.MonkeyPatch.context() as patch, journal.written():
        patch.setattr(writer, "MERGE_STEPS", steps // 2)
        write()
    return journal


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    folder = tmp_path_factory.mktemp("written") / "run"

    def write() -> None:
        recorder = Recorder(folder, {"name": "r"}, synchronous=True)
        for first in (1, 3):
            record(recorder, range(first, first + 2), passes=1)
            recorder.flush()
        recorder.close("finished")

    return journal_of(folder, RECORDED, write)


def in_steps(rows: pd.DataFrame) -> dict[int, bytes]:
    """Hashes of the rows of each step."""
    hashes = pd.util.hash_pandas_object(rows, index=False)
    return {int(step): part.to_numpy().tobytes() for step, part in hashes.groupby(rows["step"])}


def untimed(run: Run) -> pd.DataFrame:
    """Step table without what the clock decides."""
    return run.steps.drop(columns=[column for column in run.steps if "seconds" in column])


def begun(state: State) -> bool:
    """Whether the run had a manifest; before that there is no run to open."""
    return any(name == "manifest.json" and content for name, content in state.files)


def crashed(state: State, folder: Path) -> Path:
    """Folder after a crash, its writer gone: here it is this very process, which lives."""
    lock = state.write(folder) / LOCK
    if lock.exists():
        lock.write_bytes(lock.read_bytes().replace(f'"pid": {os.getpid()}'.encode(), b'"pid": 0'))
        os.utime(lock, (0, 0))
    return folder


def whole_steps(state: State, folder: Path, truth: dict[str, dict[int, bytes]]) -> int:
    """Steps in the log after a crash, each with all its rows as they were written."""
    crashed(state, folder)
    if not begun(state):
        with pytest.raises(UserError):
            open_run(folder)
        return 0
    run = open_run(folder)
    done = run.steps["step"].tolist()
    assert done == list(range(1, len(done) + 1)), (state.kind, state.after)
    for name, rows in truth.items():
        found = in_steps(run.table(name))
        for step in done:
            assert found.get(step) == rows[step], (state.kind, state.after, name, step)
    return len(done)


def test_every_crash_leaves_a_run_that_opens_with_whole_steps(
    journal: Journal, tmp_path: Path
) -> None:
    truth = {name: in_steps(open_run(journal.folder).table(name)) for name in TABLES}
    kinds: Counter[str] = Counter()
    longest: Counter[str] = Counter()
    for number, state in enumerate(journal.states.values()):
        done = whole_steps(state, tmp_path / str(number), truth)
        kinds[state.kind] += 1
        longest[state.kind] = max(longest[state.kind], done)
    assert longest["killed"] == RECORDED
    assert min(longest.values()) >= RECORDED / 2, longest
    assert all(kinds[kind] > 3 for kind in ("killed", "unsynced", "names only", "reordered")), kinds


def test_what_was_closed_outlives_a_loss_of_power(journal: Journal, tmp_path: Path) -> None:
    for kind, state in journal.last.items():
        run = open_run(state.write(tmp_path / kind))
        assert run.steps["step"].tolist() == list(range(1, RECORDED + 1))
        assert run.manifest["status"] == "finished"
        assert len(run.tokens()) == RECORDED * ROWS


@pytest.mark.slow
def test_after_every_crash_a_run_goes_on_bitwise(tmp_path: Path) -> None:
    config = TrainConfig(
        steps=STEPS, prompts_per_step=2, rollouts_per_prompt=2, minibatches=1, max_new_tokens=8,
        checkpoint_every=2, rescore_every=2, lr=1e-4, device="cpu",
    )  # fmt: skip
    weights = train(config, tmp_path / "whole").module.state_dict()
    whole = open_run(tmp_path / "whole")
    truth = {name: in_steps(whole.table(name)) for name in TABLES}
    journal = journal_of(tmp_path / "run", STEPS, lambda: train(config, tmp_path / "run"))
    resumed = 0
    for number, state in enumerate(journal.states.values()):
        folder = tmp_path / str(number)
        whole_steps(state, folder, truth)
        if not any(name.startswith("checkpoints/step-") for name, _ in state.files):
            with pytest.raises(UserError, match="no checkpoint|no run folder"):
                train(config, folder, resume=True)
            continue
        policy = train(config, folder, resume=True)
        resumed += 1
        assert all(
            torch.equal(value, weights[name]) for name, value in policy.module.state_dict().items()
        ), (state.kind, state.after)
        run = open_run(folder)
        assert run.manifest["status"] == "finished"
        for name, rows in truth.items():
            assert in_steps(run.table(name)) == rows, (state.kind, state.after, name)
        assert untimed(run).equals(untimed(whole)), (state.kind, state.after)
    print(f"{len(journal.states)} states, {resumed} went on")
    assert resumed > 50
