"""Two processes train as one would: same losses, weights and run folder; none waits for ever.

The two-process runs of the fast tests are made by one pair of processes.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import ended, started
from wapo_analysis import open_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.store import Run
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "prompts_per_step": 4,
    "rollouts_per_prompt": 4,
    "minibatches": 2,
    "steps": 3,
    "lr": 1e-4,
    "device": "cpu",
    "store_bits": 23,
}
KEPT = {"objective": "dapo", "normalize_by_kept_tokens": True, "exclude_bins": ["pos_peak"]}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"epochs": 2, "rescore_every": 1, "eval_every": 2, "eval_prompts": 5},
    "wapo": {"objective": "wapo", "microbatch_size": 3, "token_fraction": 0.5},
    "kept-seq": {**KEPT, "loss_mean_level": "seq", "microbatch_size": 3},
    "kept-group": {**KEPT, "loss_mean_level": "group", "epochs": 2},
    "kept-global": {**KEPT, "loss_mean_level": "global", "microbatch_size": 3},
    "bins": {"include_bins": ["neg_valley"], "normalize_by_kept_tokens": True},
    "gspo": {"objective": "gspo", "optimizer": "sgd", "lr": 0.01},
    "official": {"objective": "wapo", "official": True},
    "few": {
        "objective": "dr_grpo",
        "prompts_per_step": 2,
        "rollouts_per_prompt": 2,
        "minibatches": 1,
        "steps": 1,
        "lr": 2e-4,
        "seed": 2,
    },
}
FAST = ("grpo", "wapo", "few")
# Every test of the pair's runs reads what this script leaves behind.
PAIR = """
import json, os, sys
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
from safetensors.torch import save_file
from wapo_analysis.errors import UserError
from wapo_analysis.store.writer import PartWriter
from wapo_analysis.train import loop
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.launched import joined_processes
from wapo_analysis.train.rollout import NonFiniteLogits

torch.set_num_threads(1)
out, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
said = {}
second = os.fork()  # all that is imported by now is imported once
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(second == 0))


def told(name, do):
    try:
        said[name] = do()
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]


def save(policy, name):
    weights = {key: value.clone() for key, value in policy.module.state_dict().items()}
    save_file(weights, out / f"{name}-{world.rank}.safetensors")


with joined_processes("cpu") as world:
    for name, job in jobs.items():
        config, folder = TrainConfig.from_dict(job["settings"]), out / name
        policy = loop.train(
            config, folder if job["watched"] else None, resume=job["resume"], world=world
        )
        save(policy, name)

    def fails(error):
        with world.together():
            if world.rank == 1:
                raise error

    for error in (UserError("no"), NonFiniteLogits("nan"), KeyError("k")):
        told(f"together {type(error).__name__}", lambda: fails(error))
    told("turns", lambda: world.in_turn(lambda: world.rank))

    # Both have a gradient, one has, none has.
    parameters = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(3)]
    parameters[0].grad = torch.full((3,), 1.0 + world.rank)
    if world.rank == 1:
        parameters[1].grad = torch.full((3,), 5.0)
    world.sum_gradients(parameters)
    said["gradients"] = [None if p.grad is None else p.grad.tolist() for p in parameters]

    tensor = torch.full((2,), 1.0 + world.rank, dtype=torch.bfloat16)
    told("other weights", lambda: world.check_alike([tensor]))
    world.start_alike([tensor])
    told("same weights", lambda: world.check_alike([tensor]))
    said["tensor"] = tensor.tolist()

    draw = loop.draw_batch

    def poisoned(policy, task, config, step, world):
        if step == 2 and world.rank == 1:
            next(policy.module.parameters()).data.fill_(float("nan"))
        return draw(policy, task, config, step, world)

    loop.draw_batch = poisoned
    config = TrainConfig.from_dict(jobs["grpo"]["settings"])
    told("diverged", lambda: loop.train(config, out / "diverged", world=world))
    loop.draw_batch = draw

    def full(*_):
        raise OSError(28, "No space left on device")

    if world.rank == 1:
        PartWriter.write_part = full
    policy = loop.train(config, out / "full-disk", world=world)
    save(policy, "full-disk")
    told("old folder", lambda: loop.train(config, out / "grpo", world=world))
said["threads"] = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
(out / f"said-{world.rank}.json").write_text(json.dumps(said))
if second:
    sys.exit(os.waitpid(second, 0)[1] != 0)
"""


def settings_of(name: str) -> dict[str, Any]:
    return {**TINY, **CASES[name]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes made of the fast cases, and of everything that goes wrong."""
    return two_processes(tmp_path_factory.mktemp("pair"), FAST)


@pytest.fixture(scope="module")
def all_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every case."""
    return two_processes(tmp_path_factory.mktemp("all"), CASES)


@pytest.fixture
def of_pair(name: str, request: pytest.FixtureRequest) -> Path:
    """The folder that holds the case ``name``."""
    folder: Path = request.getfixturevalue("all_cases" if name in SLOW else "pair")
    return folder


SLOW = set(CASES) - set(FAST)
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]


def two_processes(out: Path, names: Iterable[str]) -> Path:
    """Train the cases in two processes, which also do all that the script says."""
    jobs = {
        name: {"settings": settings_of(name), "watched": True, "resume": False} for name in names
    }
    jobs["plain"] = {**jobs["grpo"], "watched": False}
    train(TrainConfig.from_dict({**settings_of("grpo"), "steps": 2}), out / "continued")
    jobs["continued"] = {**jobs["grpo"], "resume": True}
    script = [sys.executable, "-W", "ignore", "-c", PAIR, str(out), json.dumps(jobs)]
    ((code, _, errors),) = ended(started(script, processes=1))
    assert code == 0, errors[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, dict]]:
    """Run and weights that one process makes of a case."""
    out = tmp_path_factory.mktemp("alone")
    made: dict[str, tuple[Run, dict]] = {}

    def make(name: str) -> tuple[Run, dict]:
        if name not in made:
            policy = train(TrainConfig.from_dict(settings_of(name)), out / name)
            made[name] = open_run(out / name), dict(policy.module.state_dict())
        return made[name]

    return make


def weights(pair: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(pair / f"{name}-{rank}.safetensors")


def in_order(frame: pd.DataFrame, *keys: str) -> pd.DataFrame:
    return frame.sort_values([*keys]).reset_index(drop=True).drop(columns="rank", errors="ignore")


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(name: str, of_pair: Path, alone: Callable) -> None:
    pair = of_pair
    one, expected = alone(name)
    two = open_run(pair / name)
    taken = [c for c in one.steps if not c.startswith("seconds") and c != "eval/seconds"]
    pd.testing.assert_frame_equal(
        two.steps[taken], one.steps[taken], rtol=1e-4, atol=5e-7, check_dtype=False
    )
    np.testing.assert_allclose(two.steps["loss"], one.steps["loss"], rtol=0, atol=1e-5)
    assert one.steps["loss"].abs().max() > 1e-4
    ours = weights(pair, name)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-5)
    # Far less than training moved them, so the bound above means something.
    start = load_file(ROOT / "wapo_analysis" / "assets" / "base" / "model.safetensors")
    assert max((start[key] - ours[key]).abs().max() for key in start) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_reads_as_one_run(name: str, of_pair: Path, alone: Callable) -> None:
    one, two = alone(name)[0], open_run(of_pair / name)
    assert (two.manifest["status"], two.manifest["processes"]) == ("finished", 2)
    rollouts = [in_order(run.rollouts, "step", "rollout") for run in (one, two)]
    pd.testing.assert_frame_equal(*rollouts)
    keys = ["step", "minibatch", "rollout", "position"]
    expected, found = (in_order(run.tokens(), *keys) for run in (one, two))
    exact = [*keys, "group", "token_id", "advantage", "kept", "clipped"]
    pd.testing.assert_frame_equal(found[exact], expected[exact])
    for column in ("logp", "entropy", "coef", "grad_norm"):
        np.testing.assert_allclose(
            found[column], expected[column], rtol=1e-3, atol=1e-6, err_msg=column
        )
    assert set(two.tokens()["rank"]) == {0, 1}
    # A token on the border between two bins or regimes may fall on either side of it.
    for column in ("tokens", "grad_mass"):
        by_step = [run.classes.groupby("step")[column].sum() for run in (one, two)]
        np.testing.assert_allclose(*by_step, rtol=1e-4)
    sides = [run.classes.groupby(["step", "sign"])["tokens"].sum() for run in (one, two)]
    pd.testing.assert_series_equal(*sides)
    assert two.vocab == one.vocab
    assert set(found["token_id"]) <= set(two.vocab)


@pytest.mark.parametrize("name", [*NAMES, "plain", "continued"])
def test_processes_end_with_the_same_weights_bit_by_bit(name: str, of_pair: Path) -> None:
    first, second = weights(of_pair, name, 0), weights(of_pair, name, 1)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_tokens_that_only_another_process_saw_have_their_text(pair: Path) -> None:
    run = open_run(pair / "few")
    first, second = (set(rows["token_id"]) for _, rows in run.tokens().groupby("rank"))
    assert second - first
    assert second <= set(run.vocab)


def test_watching_two_processes_changes_nothing(pair: Path) -> None:
    plain, watched = weights(pair, "plain"), weights(pair, "grpo")
    assert all(torch.equal(plain[key], watched[key]) for key in plain)


def test_two_processes_continue_what_one_began(pair: Path, alone: Callable) -> None:
    expected, found = alone("grpo"), weights(pair, "continued")
    for key, value in expected[1].items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    run = open_run(pair / "continued")
    assert run.steps["step"].tolist() == [1, 2, 3]
    assert (run.manifest["processes"], len(run.manifest["resumed"])) == (2, 1)
    assert len(run.tokens()) == len(expected[0].tokens())


def test_one_process_continues_what_two_began(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "wapo", tmp_path / "run")
    longer = TrainConfig.from_dict({**settings_of("wapo"), "steps": 5})
    whole = train(longer, tmp_path / "whole")
    continued = train(longer, tmp_path / "run", resume=True)
    for a, b in zip(continued.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    tokens = open_run(tmp_path / "run").tokens()
    assert set(tokens[tokens["step"] <= 3]["rank"]) == {0, 1}
    assert set(tokens[tokens["step"] > 3]["rank"]) == {0}


def test_diagnosis_reads_a_run_of_two_processes(
    pair: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert wapo(["diagnose", str(pair / "grpo")]) == 0
    assert capfd.readouterr().out


def said(pair: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pair / f"said-{rank}.json").read_text())
    return found


def test_an_error_of_one_process_ends_all_with_its_words(pair: Path) -> None:
    first, second = said(pair, 0), said(pair, 1)
    assert first["together UserError"] == second["together UserError"] == ["UserError", "no"]
    assert first["together NonFiniteLogits"] == ["NonFiniteLogits", "nan"]
    assert first["together KeyError"] == ["ProcessFailed", "process 1 failed (KeyError: 'k')"]
    assert second["together KeyError"][0] == "KeyError"
    assert (first["turns"], second["turns"]) == (0, 1)
    for words in (first["old folder"], second["old folder"]):
        assert words[0] == "UserError"
        assert "already holds a run" in words[1]


def test_a_policy_that_breaks_on_one_process_closes_the_run_as_diverged(pair: Path) -> None:
    words = ["NonFiniteLogits", "the policy gives logits that are NaN or infinite"]
    assert said(pair, 0)["diverged"] == said(pair, 1)["diverged"] == words
    run = open_run(pair / "diverged")
    assert run.manifest["status"] == "diverged"
    assert run.steps["step"].tolist() == [1]


def test_a_full_disk_under_one_process_is_told_and_stops_no_training(pair: Path) -> None:
    run = open_run(pair / "full-disk")
    assert run.manifest["status"] == "recording_failed"
    assert run.steps["step"].tolist() == [1, 2, 3]
    assert set(run.tokens()["rank"]) == {0}
    found, expected = weights(pair, "full-disk", 1), weights(pair, "grpo")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_gradients_are_summed_and_none_stays_none(pair: Path) -> None:
    for rank in range(2):
        assert said(pair, rank)["gradients"] == [[3.0] * 3, [5.0] * 3, None]


def test_weights_that_differ_are_noticed_and_can_be_made_alike(pair: Path) -> None:
    for rank in range(2):
        found = said(pair, rank)
        words = ["ProcessFailed", "processes 0 and 1 no longer hold the same weights"]
        assert found["other weights"] == words
        assert found["same weights"] is None
        assert found["tensor"] == [1.0, 1.0]


def test_no_thread_of_the_group_is_left_to_abort_the_end(pair: Path) -> None:
    for rank in range(2):
        assert not [name for name in said(pair, rank)["threads"] if "gloo" in name]
