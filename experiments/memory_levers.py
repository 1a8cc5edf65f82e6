"""Peak memory of one training step of a real model under each of the settings that lower it.

    python experiments/memory_levers.py --model smollm2

Every setting trains one step in a process of its own and prints the most memory that process held
(resident set) and the seconds of the update without sampling.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train
from wapo_analysis.train.models import load_policy
from wapo_analysis.train.policy import no_progress_bars

SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "microbatch_size 2": {"microbatch_size": 2},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "capture_mode replace": {"capture_mode": "replace"},
    "lora_rank 16": {"lora_rank": 16},
    "token_fraction 0.1": {"token_fraction": 0.1},
    "all of these": {
        "microbatch_size": 2,
        "gradient_checkpointing": True,
        "capture_mode": "replace",
        "lora_rank": 16,
    },
}
# glibc then gives freed blocks back instead of keeping them in a heap full of holes, so that the
# peak is what the step held. LoRA's many small temporaries otherwise cost 1.5 GiB that nobody uses.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
COMMON = {
    "steps": 1,
    "prompts_per_step": 2,
    "rollouts_per_prompt": 4,
    "minibatches": 1,
    "max_new_tokens": 128,
    "rescore_every": 0,
    "checkpoint_every": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", help="one setting, in this process; prints JSON")
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measure(options.model, SETTINGS[options.only])))
        return
    print(f"{'setting':24} {'peak':>9} {'update':>9}")
    with tempfile.TemporaryDirectory() as folder:
        _save_plain(options.model, folder)
        for name in SETTINGS:
            command = [sys.executable, __file__, "--model", folder, "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
            if done.returncode:
                print(f"{name:24} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:24} {row['peak']:5.2f} GiB {row['update']:7.1f} s", flush=True)


def _save_plain(model: str, folder: str) -> None:
    """Save the model as a plain folder: unpacking a GGUF file takes memory of its own."""
    policy = load_policy(model, torch.device("cpu"))
    with no_progress_bars():
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)


def measure(model: str, settings: dict[str, object]) -> dict[str, float]:
    """Train one step; peak memory in GiB, seconds of scoring, backward and update."""
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.from_dict({**COMMON, "model": model, **settings})
        train(config, Path(folder) / "run", progress=rows.append)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"peak": peak, "update": rows[0]["seconds"] - rows[0]["seconds_rollout"]}


if __name__ == "__main__":
    main()
