"""Several processes train as one run, on engine trl, and none of them waits for ever."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="needs the extra [trl]")

from tests.support.processes import ended, started, stop
from wapo_analysis import open_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.engines import check_gpus, launched
from wapo_analysis.errors import UserError
from wapo_analysis.train.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore")

PLACE = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
TRAIN = [sys.executable, "-W", "ignore", "-m", "wapo_analysis", "train"]
SMALL = ["--prompts", "4", "--rollouts", "4", "--minibatches", "2", "--device", "cpu"]
STOPPED = "stopped: another process of this run has ended or does not answer"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of one process among four, as a launcher tells it."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)


def test_only_a_launcher_makes_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == (0, 1)
    for name, value in {**PLACE, "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == (3, 4)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_gpus(TrainConfig(device="cpu"), 4)
    check_gpus(TrainConfig(), 1)
    with pytest.raises(UserError, match="4 processes on a machine with 1 GPU; start at most 1"):
        check_gpus(TrainConfig(), 4)


@pytest.mark.usefixtures("place")
def test_a_run_of_the_built_in_trainer_goes_on_in_one_process(
    tiny_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert wapo(["train", "--resume", "--out", str(tiny_run), "--steps", "9"]) == 2
    assert "goes on in one process, not in several" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_train_on_trl_and_say_so_in_a_line(launcher: str, tmp_path: Path) -> None:
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--nproc-per-node", "2"]
    else:
        start = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-W", "ignore", "-m", *start, "-m", "wapo_analysis", "train"]
    command += [*SMALL, "--steps", "2", "--out", str(tmp_path / "run")]
    [(code, printed, errors)] = ended(started(command, None))
    assert code == 0, errors[-3000:]
    assert printed.count("engine: TRL's GRPOTrainer, 2 processes") == 1
    assert printed.count("run: ") == 1
    run = open_run(tmp_path / "run")
    assert (run.manifest["status"], run.manifest["processes"]) == ("finished", 2)
    assert run.manifest["recipe"]["engine"] == "trl"
    assert wapo(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0


@pytest.mark.slow
def test_a_batch_that_cannot_be_split_is_told_once(tmp_path: Path) -> None:
    command = [*TRAIN, *SMALL, "--prompts", "3", "--minibatches", "4"]
    first, second = ended(started([*command, "--out", str(tmp_path / "run")]))
    assert (first[0], second[0]) == (2, 2)
    assert first[2].strip().splitlines()[-1] == (
        "wapo: a mini-batch of 3 rollouts (prompts_per_step 3 x rollouts_per_prompt 4 / "
        "minibatches 4) cannot be split evenly over 2 processes"
    )
    assert second[1] == second[2] == ""
    assert not (tmp_path / "run").exists()


# ---- on with another number of processes -------------------------------------------------------


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    recipe = [*TRAIN, *SMALL, "--engine", "trl", "--lr", "1e-4"]
    whole, one, two = (tmp_path / name for name in ("whole", "one", "two"))

    def trained(processes: int, *arguments: str) -> None:
        for code, _, errors in ended(started(list(arguments), 2 if processes > 1 else None)):
            assert code == 0, errors[-3000:]

    trained(1, *recipe, "--steps", "3", "--out", str(whole))
    trained(1, *recipe, "--steps", "2", "--out", str(one))
    trained(2, *recipe, "--steps", "2", "--out", str(two))
    begun = weights(one)
    trained(2, *TRAIN, "--resume", "--steps", "3", "--out", str(one))
    trained(1, *TRAIN, "--resume", "--steps", "3", "--out", str(two))
    expected = weights(whole)
    assert max(float((begun[name] - expected[name]).abs().max()) for name in expected) > 5e-5
    for run, before, after in ((one, {0}, {0, 1}), (two, {0, 1}, {0})):
        for name, value in weights(run).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
        tokens = open_run(run).tokens()
        assert set(tokens[tokens["step"] <= 4]["rank"]) == before
        assert set(tokens[tokens["step"] > 4]["rank"]) == after


# ---- ends that are not foreseen ----------------------------------------------------------------


@contextmanager
def training(out: Path, command: list[str], places: int | None) -> Iterator[list[subprocess.Popen]]:
    """A long run, once it has a checkpoint."""
    arguments = [*SMALL, "--steps", "100000", "--set", "checkpoint_every=1", "--out", str(out)]
    workers = started([*command, *arguments], places)
    try:
        before = monotonic()
        while not list((out / "trl").glob("checkpoint-*/trainer_state.json")):
            assert all(worker.poll() is None for worker in workers)
            assert monotonic() - before < 200
            sleep(0.1)
        yield workers
    finally:
        stop(workers)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_other(rank: int, tmp_path: Path) -> None:
    with training(tmp_path / "run", TRAIN, 2) as workers:
        workers[rank].kill()
        code, _, errors = ended([workers[1 - rank]], timeout=60)[0]
    assert code == 1
    assert STOPPED in errors
    assert "Traceback" not in errors
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == ("failed" if rank == 1 else "running")
    assert len(run.steps) >= 1
    assert len(run.tokens()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("through", ["torchrun", "one process"])
def test_an_interrupt_ends_all_after_a_whole_batch(through: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "wapo_analysis", "train"] if through == "torchrun" else TRAIN
    places = None if through == "torchrun" else 2
    with training(tmp_path / "run", command, places) as workers:
        workers[-1].send_signal(signal.SIGINT)
        found = ended(workers, timeout=60)
    if through == "one process":
        assert [code for code, *_ in found] == [130, 130]
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "interrupted"
    last = int(run.steps["step"].max())
    assert last % 2 == 0
    for table in (run.tokens(), run.rollouts):
        assert set(table[table["step"] == last]["rank"]) == {0, 1}
    assert (tmp_path / "run" / "trl" / f"checkpoint-{last}").is_dir()
    steps = str(last // 2 + 1)
    assert wapo(["train", "--out", str(tmp_path / "run"), "--resume", "--steps", steps]) == 0
    assert open_run(tmp_path / "run").manifest["status"] == "finished"


# What goes wrong in the second process alone; all that is imported is imported once, for both.
PAIR = """
import json, os, sys
from pathlib import Path
import torch
import trl.trainer.grpo_trainer
import transformers.models.llama.modeling_llama
from wapo_analysis.engines import recipe
from wapo_analysis.engines.trl import train_with_trl
from wapo_analysis.errors import UserError
from wapo_analysis.store.writer import PartWriter
from wapo_analysis.train.config import TrainConfig

torch.set_num_threads(1)
out, settings, said = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
second = os.fork()
rank = int(second == 0)
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
config = TrainConfig.from_dict(settings)


def told(name):
    try:
        policy = train_with_trl(config, out / name)
        state = policy.module.state_dict()
        said[name] = {key: float(value.double().sum()) for key, value in state.items()}
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]


sample, task = recipe.sample, config.load_task()
calls = []

def poisoned(policy, *args, **options):
    calls.append(1)
    if rank and len(calls) == 2:
        next(policy.module.parameters()).data.fill_(float("nan"))
    return sample(policy, *args, **options)

recipe.sample = poisoned
told("diverged")
recipe.sample = sample

reward = type(task).reward

def strict(self, problem, completion):
    if rank:
        raise UserError("the reward is no number")
    return reward(self, problem, completion)

type(task).reward = strict
told("reward")
type(task).reward = reward
told("plain")


def full(*_):
    raise OSError(28, "No space left on device")

if rank:
    PartWriter.write_part = full
told("full-disk")
(out / f"said-{rank}.json").write_text(json.dumps(said))
if second:
    sys.exit(os.waitpid(second, 0)[1] != 0)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder with the runs of two processes, and what each of them said."""
    out = tmp_path_factory.mktemp("pair")
    settings = {
        "prompts_per_step": 4, "rollouts_per_prompt": 4, "steps": 3, "device": "cpu",
        "minibatches": 1, "engine": "trl", "lr": 1e-4,
    }  # fmt: skip
    script = [sys.executable, "-W", "ignore", "-c", PAIR, str(out), json.dumps(settings)]
    ((code, _, errors),) = ended(started(script, processes=1))
    assert code == 0, errors[-3000:]
    return out, [json.loads((out / f"said-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_a_policy_that_breaks_on_one_process_closes_the_run_as_diverged(pair: Any) -> None:
    out, said = pair
    words = ["NonFiniteLogits", "the policy gives logits that are NaN or infinite"]
    assert said[0]["diverged"] == said[1]["diverged"] == words
    run = open_run(out / "diverged")
    assert run.manifest["status"] == "diverged"
    assert run.steps["step"].tolist() == [1]


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_words(pair: Any) -> None:
    out, said = pair
    assert said[0]["reward"] == said[1]["reward"] == ["UserError", "the reward is no number"]
    assert not (out / "reward").exists()


@pytest.mark.slow
def test_a_full_disk_under_one_process_is_told_and_stops_no_training(pair: Any) -> None:
    out, said = pair
    assert isinstance(said[0]["plain"], dict)
    assert said[0]["plain"] == said[1]["plain"] == said[0]["full-disk"] == said[1]["full-disk"]
    run = open_run(out / "full-disk")
    assert run.manifest["status"] == "recording_failed"
    assert run.steps["step"].tolist() == [1, 2, 3]
    assert set(run.tokens()["rank"]) == {0}
