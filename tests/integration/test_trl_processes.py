"""Two processes write one run: each its own parts, sums over both, no process waits for ever."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra [trl]")

from wapo_analysis import open_run
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.store.files import MANIFEST

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.support.trl_toy import run, toy_trainer
from wapo_analysis import attach

out = Path(sys.argv[1])
trainer = toy_trainer(out / "out", max_steps=3, loss_type="grpo", num_iterations=1)
mode = "replace" if sys.argv[2] == "replace" else "passive"
with attach(trainer, out / "run", mode=mode, token_every=1, rescore_every=1) as attachment:
    if sys.argv[2] == "fail" and trainer.accelerator.process_index == 1:
        def full(*_):
            raise OSError(28, "No space left on device")
        attachment.recorder._writer.write_part = full
    weights = run(trainer)
torch.save(weights, out / f"weights-{trainer.accelerator.process_index}.pt")
torch.save(trainer.state.log_history, out / f"log-{trainer.accelerator.process_index}.pt")
"""


def two_processes(out: Path, mode: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        env = {**os.environ, **{k: str(v) for k, v in place.items()}, "MASTER_ADDR": "127.0.0.1"}
        env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'taxonomy'}", "OMP_NUM_THREADS": "1"}
        env |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(out), mode]
        workers.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE))
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors.decode()[-2000:]


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path: Path) -> None:
    two_processes(tmp_path, "work")
    found = open_run(tmp_path / "run")
    tokens, rollouts = found.tokens(), found.rollouts
    assert set(tokens["rank"]) == {0, 1}
    assert found.manifest["processes"] == 2
    assert not rollouts.duplicated(["step", "rollout"]).any()
    assert len(rollouts) == 3 * 2 * 2 * 4
    assert (rollouts.groupby(["step", "group"])["prompt"].nunique() == 1).all()
    steps = found.steps.set_index("step")
    assert steps["tokens"].tolist() == tokens.groupby("step").size().tolist()
    np.testing.assert_allclose(
        steps["entropy"], tokens.groupby("step")["entropy"].mean(), rtol=1e-4
    )
    assert set(tokens["token_id"]) <= set(found.vocab)
    # Every completion weighs the same in this loss, so coef is A / (rollouts * own length).
    counted = tokens.groupby(["step", "rollout"])["coef"].sum()
    advantage = rollouts.set_index(["step", "rollout"])["advantage"]
    np.testing.assert_allclose(counted, advantage.loc[counted.index] / 16, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_one_process_that_cannot_record_does_not_stop_the_other(tmp_path: Path) -> None:
    two_processes(tmp_path, "fail")
    found = open_run(tmp_path / "run")
    assert set(found.tokens()["rank"]) == {0}
    assert found.manifest["status"] == "finished"
    assert len(found.steps) == 3


@pytest.mark.slow
def test_replace_mode_in_two_processes_stays_one_model(tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.15", reason="needs a fused head")
    two_processes(tmp_path, "replace")
    found = open_run(tmp_path / "run")
    assert found.manifest["statistics_from"] == "our head in place of the trainer's"
    tokens = found.tokens()
    assert set(tokens["rank"]) == {0, 1}
    assert np.isfinite(tokens[["coef", "collision_logp_rest", "logp_after"]]).all(axis=None)
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_other_ranks_leave_manifest_and_step_log_to_the_first(tmp_path: Path) -> None:
    other = Recorder(tmp_path / "run", {"name": "x"}, rank=1)
    other.finish_step(1, rollouts={"group": [0], "rollout": [4], "reward": [1.0]})
    other.close("finished")
    assert other.failure is None
    assert not (tmp_path / "run" / MANIFEST).exists()
    first = Recorder(tmp_path / "run", {"name": "x"}, rank=0)
    first.finish_step(1, rollouts={"group": [0], "rollout": [0], "reward": [0.0]})
    first.close("finished")
    found = open_run(tmp_path / "run")
    assert found.rollouts["rollout"].tolist() == [0, 4]
    assert found.steps["step"].tolist() == [1]
