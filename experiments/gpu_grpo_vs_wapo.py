"""GRPO against WAPO on a GPU, in commands of ten minutes: one start, same prompts, two settings.

``standard`` makes one pass over each batch. ``stress`` makes four, at four times the learning rate,
where the WAPO paper says that GRPO breaks. The policy starts from what travels with the command:

    python experiments/gpu_grpo_vs_wapo.py --pretrain --out runs/gpu --budget-seconds 540
    python experiments/gpu_grpo_vs_wapo.py --model SmolLM2.gguf --out runs/gpu --budget-seconds 540
    python experiments/gpu_grpo_vs_wapo.py --model-parts parts/1 parts/2 --out runs/gpu ...
    python experiments/gpu_grpo_vs_wapo.py --tiny --out runs/tiny       # under a minute on a CPU

When the budget runs out every run stops between two steps with a checkpoint, and the exit code is
75: the same command continues. Every command ends in a table of the runs and, per setting, a
comparison and a report. OUT/ship, or ``--ship DIR``, holds what is small: results.json and, per
setting, the report and the steps as CSV.

``--pretrain`` trains a Llama of 14 million weights on demonstrations of the word problems first,
wrong at a stated rate, so that it starts near half right and with entropy. bfloat16 weights would
round away most updates as small as ours, so weights are float32, and so are products; ``--lora``
trains float32 LoRA adapters beside bfloat16 weights. TF32 stays off.

A machine without network needs the wheel of this project (``make wheel``; taxonomy is in it) and,
for a .gguf file, that of gguf, beside torch, transformers, accelerate, numpy, pandas, pyarrow,
scipy, matplotlib, seaborn, typer, rich, jinja2 and safetensors; peft for --lora; math-verify with
latex2sympy2-extended and antlr4-python3-runtime for ``--task gsm8k``. Start it in the repository
root with PYTHONPATH=. there. A model larger than a transfer goes in parts, in several folders:

    split -b 14m SmolLM2.gguf part- && sha256sum SmolLM2.gguf > sha256
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import wapo_taxonomy as tax

from experiments.gpu_start import Start, join_parts, pretrain, write_problems
from wapo_analysis import TrainConfig, open_run
from wapo_analysis.cli import show
from wapo_analysis.cli.figures import write_figures
from wapo_analysis.compare import Comparison, compare
from wapo_analysis.errors import UserError
from wapo_analysis.report import build_report
from wapo_analysis.store import MANIFEST, Run, read_manifest
from wapo_analysis.train.checkpoint import checkpoints
from wapo_analysis.train.jobs import Job
from wapo_analysis.train.models import pick_device
from wapo_analysis.train.rollout import NonFiniteLogits

OBJECTIVES = ("grpo", "wapo")
SETTINGS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "standard": lambda base: base,
    "stress": lambda base: replace(base, epochs=4, lr=4 * base.lr),
}
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: try again
REPORT_SECONDS = 75.0
"""Kept back from the budget for tables and reports; at most a quarter of it."""
REWARD = "experiments.gpu_start:last_number"
DONE = ("finished", "diverged", "recording_failed")
FILE_LIMIT = 16 * 2**20
"""Bytes of a shipped file beyond which it is left behind."""

BASE = TrainConfig(steps=60, checkpoint_every=20, keep_checkpoints=1, eval_every=30)
RECIPES = {
    "base": BASE,
    "tiny": replace(
        BASE,
        steps=4,
        prompts_per_step=4,
        rollouts_per_prompt=4,
        minibatches=2,
        checkpoint_every=2,
        eval_every=4,
        eval_prompts=8,
        eval_samples=2,
    ),
    "pretrained": replace(
        BASE,
        steps=150,
        prompts_per_step=32,
        max_new_tokens=64,
        checkpoint_every=25,
        eval_every=50,
        eval_prompts=100,
        token_every=5,
    ),
    "language model": replace(
        BASE,
        steps=100,
        lr=5e-6,
        max_new_tokens=128,
        sample_batch_size=256,
        checkpoint_every=25,
        eval_every=50,
        token_every=5,
    ),
}
"""Settings by the kind of policy, before ``SETTINGS`` changes them."""
TINY_START = Start(width=32, layers=2, vocabulary=300, batch=8, steps=3)


def base_config(options: argparse.Namespace) -> TrainConfig:
    """Settings that all runs share; makes the problems and the start where they are missing.

    Raises
    ------
    UserError
        If the parts of a model do not make it up.
    """
    out: Path = options.out
    model, kind = options.model, "language model"
    if options.pretrain:
        model, kind = str(out / "pretrained"), "pretrained"
        if not Path(model).exists():
            start = TINY_START if options.tiny else Start()
            pretrain(Path(model), start, pick_device(options.device))
    elif options.model_parts:
        model = str(out / "model" / "model.gguf")
        if not Path(model).exists():
            join_parts(options.model_parts, Path(model))
    elif model == "base":
        kind = "base"
    found = replace(RECIPES["tiny" if options.tiny else kind], model=model, device=options.device)
    found = replace(found, precision="float32")
    if options.lora:
        found = replace(found, precision="bf16-mixed", lora_rank=32, lr=20 * found.lr)
    if options.steps is not None:
        found = replace(found, steps=options.steps)
    if options.task is not None:
        return replace(found, task=options.task, data=options.data)
    if model == "base":
        return found  # its 40 characters cannot spell a word problem; it keeps chain-sum
    data = out / "words.jsonl"
    if not data.exists():
        write_problems(data)
    longest = found.max_new_tokens or 64
    return replace(found, task=REWARD, data=str(data), max_new_tokens=longest)


def recipe_jobs(out: Path, base: TrainConfig, settings: Sequence[str], seeds: int) -> list[Job]:
    """Every run, in the order that completes a pair of objectives soonest."""
    return [
        Job(
            replace(SETTINGS[name](base), objective=objective, seed=seed),
            out / name / f"{objective}-{seed}",
        )
        for seed in range(seeds)
        for name in settings
        for objective in OBJECTIVES
    ]


def status(job: Job) -> str:
    """Status of the run in its manifest; ``new`` if there is none."""
    if not (job.out / MANIFEST).exists():
        return "new"
    return str(read_manifest(job.out).get("status", "running"))


def train_until(job: Job, deadline: float, threads: int) -> str:
    """Train one run, or go on with it, until it is done or the clock passes ``deadline``.

    Returns its status then; ``new`` if there was no time to begin it.
    """
    from wapo_analysis.train.loop import train

    last = status(job)
    done = last in DONE and (last == "diverged" or job.done_steps() >= job.config.steps)
    if done or time.time() >= deadline:
        return last
    resume = bool(checkpoints(job.out))
    if not resume:
        shutil.rmtree(job.out, ignore_errors=True)  # killed before its first checkpoint
    watch = _Watch(job, deadline)
    try:
        train(job.config, job.out, resume=resume, progress=watch, threads=threads)
    except KeyboardInterrupt:
        if not watch.asked:
            raise
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        print(f"{watch.name}: {type(error).__name__}: {error}", flush=True)
        return "diverged" if isinstance(error, NonFiniteLogits) else "failed"
    return status(job)


class _Watch:
    """Says every tenth step, and asks the run to stop once its time is over."""

    def __init__(self, job: Job, deadline: float) -> None:
        self.job, self.deadline, self.asked = job, deadline, False
        self.name = f"{job.out.parent.name} {job.out.name}"

    def __call__(self, row: dict[str, float]) -> None:
        step = int(row["step"])
        if step % 10 == 0 or step == self.job.config.steps:
            told = f"reward {row['reward']:.2f}  entropy {row['entropy']:.3f} nats"
            print(f"{self.name}: step {step}/{self.job.config.steps}  {told}", flush=True)
        if time.time() >= self.deadline and not self.asked:
            self.asked = True
            # The loop ends its next step and writes a checkpoint. Not SIGINT: a shell that starts
            # a command in the background has it ignored.
            signal.raise_signal(signal.SIGTERM)


def train_recipe(jobs: Sequence[Job], deadline: float, workers: int) -> list[str]:
    """Train the jobs in order, ``workers`` at a time; returns their status.

    One that fails does not stop the others.
    """
    threads = max(1, (os.cpu_count() or 1) // (2 * workers))
    if workers == 1:
        return [train_until(job, deadline, threads) for job in jobs]
    # spawn: CUDA cannot be used in a forked process.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        one = partial(train_until, deadline=deadline, threads=threads)
        try:
            return list(pool.map(one, jobs))
        except BrokenProcessPool:
            print("a worker was killed, by the system's memory limit perhaps", flush=True)
    return [status(job) for job in jobs]


def numbers(setting: str, comparison: Comparison) -> list[dict[str, Any]]:
    """One row per run: the table's columns, with everything `compare` knows of a run."""
    rows = comparison.per_run.to_dict("records")
    found = zip(comparison.runs, rows, strict=True)
    known = [{"setting": setting, **_numbers(run), **row} for run, row in found]
    return [{name: _known(value) for name, value in row.items()} for row in known]


def _known(value: Any) -> Any:
    """None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(run: Run) -> dict[str, Any]:
    steps = run.steps
    before = run.manifest.get("eval_before", {})
    passed = steps["eval/pass@1"].dropna() if "eval/pass@1" in steps else pd.Series(dtype=float)
    return {
        "steps": len(steps),
        "status": run.manifest.get("status"),
        "pass@1_before": before.get("eval/pass@1"),
        "pass@1": float(passed.iloc[-1]) if len(passed) else None,
        "entropy_max": float(steps["entropy"].max()),
        "grad_norm_max": float(steps["grad_norm"].max()),
        "seconds": float(steps["seconds"].sum()),
        "device": run.manifest.get("device"),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown table of the runs; ``first -> last`` are means over tenths of the steps."""
    shown = [
        {
            "setting": row["setting"],
            "run": f"{row['objective']} {row['seed']}",
            "steps": str(row["steps"]),
            "reward": _change(row["reward_first"], row["reward_last"]),
            "pass@1": _change(row["pass@1_before"], row["pass@1"]),
            "entropy (nats)": _change(row["entropy_first"], row["entropy_last"]),
            "grad norm, last (max)": _change(
                row["grad_norm_last"], row["grad_norm_max"], "{} ({})"
            ),
            " / ".join(tax.CLASSES): " / ".join(
                _shown(row[f"tokens_{name}"], ".0%") for name in tax.CLASSES
            ),
            "verdict": row["verdict"],
        }
        for row in rows
    ]
    header = list(shown[0])
    lines = [header, ["---"] * len(header), *([row[name] for name in header] for row in shown)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _change(first: float | None, last: float | None, words: str = "{} -> {}") -> str:
    return words.format(_shown(first), _shown(last))


def _shown(value: float | None, form: str = ".3f") -> str:
    return "n/a" if value is None else format(value, form)


def conclude(options: argparse.Namespace, jobs: Sequence[Job], finished: bool) -> None:
    """Print table and comparisons of the runs so far; write reports and what is shipped."""
    ship: Path = options.ship or options.out / "ship"
    ship.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    compared: dict[str, Any] = {}
    for setting in options.settings:
        mine = [job for job in jobs if job.out.parent.name == setting]
        runs = [open_run(job.out) for job in mine if job.done_steps() > 0]
        if not runs:
            continue
        comparison = compare(runs)
        rows += numbers(setting, comparison)
        compared[setting] = comparison.to_dict()
        print(f"\n{setting}")
        show(comparison, "text")
        report = options.out / setting / "report.html"
        build_report(runs, report)
        _ship(report, ship / f"{setting}.html")
        if finished:  # the report holds the same figures; files of their own only once
            write_figures(runs, options.out / setting / "figures", "png", None)
        steps = [run.steps.assign(setting=setting, run=run.path.name) for run in runs]
        pd.concat(steps).to_csv(ship / f"{setting}.csv", index=False, float_format="%.6g")
    if rows:
        print(f"\n{table(rows)}\n")
    results = {
        "command": " ".join(["python", *sys.argv]),
        "finished": finished,
        "device": _device(options.device),
        "torch": torch.__version__,
        "runs": rows,
        "compare": compared,
    }
    (ship / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False))


def _ship(file: Path, target: Path) -> None:
    if file.stat().st_size <= FILE_LIMIT:
        shutil.copyfile(file, target)
    else:
        print(f"{file} is too large to ship: {file.stat().st_size / 2**20:.0f} MiB")


def _device(name: str) -> str:
    device = pick_device(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model", default="base", help="base, a folder, a .gguf file, a hub name")
    start.add_argument("--model-parts", type=Path, nargs="+", metavar="DIR", help="its parts")
    start.add_argument("--pretrain", action="store_true", help="pre-train the start on the spot")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of all runs")
    parser.add_argument("--ship", type=Path, help="folder of the small files  [OUT/ship]")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="standard,stress")
    parser.add_argument("--seeds", type=int, default=2, help="runs per objective and setting")
    parser.add_argument("--steps", type=int, help="steps of a run")
    parser.add_argument("--task", help="another task of docs/tasks.md")
    parser.add_argument("--data", help="data of --task")
    parser.add_argument("--lora", action="store_true", help="adapters beside bfloat16 weights")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, help="runs at a time  [4 on a GPU, else 1]")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--tiny", action="store_true", help="a few small steps, to try it out")
    options = parser.parse_args(arguments)
    options.settings = options.settings.split(",")
    if unknown := set(options.settings) - set(SETTINGS):
        parser.error(f"unknown setting {min(unknown)!r}; allowed: {', '.join(SETTINGS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as far as the budget goes, then report; returns the exit code."""
    began = time.time()
    options = parse(arguments)
    budget = options.budget_seconds
    deadline = began + budget - min(REPORT_SECONDS, budget / 4)
    workers = options.workers or (4 if pick_device(options.device).type == "cuda" else 1)
    jobs = recipe_jobs(options.out, base_config(options), options.settings, options.seeds)
    found = train_recipe(jobs, deadline, workers)
    waiting, failed = sum(state not in DONE for state in found), found.count("failed")
    conclude(options, jobs, finished=not waiting)
    if failed:
        print(f"{failed} of {len(jobs)} runs failed", file=sys.stderr)
        return 1
    if waiting:
        print(f"{waiting} of {len(jobs)} runs are unfinished: the same command continues")
    return UNFINISHED if waiting else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"gpu_grpo_vs_wapo: {error}")
