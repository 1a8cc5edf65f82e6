"""Seconds a step of our trainer beside TRL's GRPOTrainer: same policy, batch, loss and updates.

    python -m experiments.bench.against_trl

GRPO on one CPU thread, 4 prompts x 8 rollouts, one AdamW update a step, no KL. Ours runs twice:
alone, and recording every token. CPU time of a step, the two trainers take turns, median over all
rounds. The policies are those of `experiments.bench.sampling`; the reward counts different
characters, so that it differs within groups.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from experiments.bench.sampling import policies
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

PROMPTS, ROLLOUTS, STEPS = 4, 8, 12
Round = Callable[[], list[float]]


def reward(completion: str, answer: str) -> float:
    """Different characters of a completion; a task's reward takes the answer too."""
    return len(set(completion)) / 10


def rewards(completions: list[str], **columns: Any) -> list[float]:
    """The same, as TRL calls it."""
    return [reward(completion, "") for completion in completions]


class _Clock(TrainerCallback):  # type: ignore[misc]
    """CPU time at the end of every step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.at.append(time.process_time())


def _between(at: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip(at, at[1:], strict=False)]


def ours(model: Path, prompts: list[str], tokens: int, recorded: bool) -> list[float]:
    """Seconds of the steps after the first."""
    config = TrainConfig(
        model=str(model),
        task="experiments.bench.against_trl:reward",
        data=str(model / "prompts.jsonl"),
        prompts_per_step=PROMPTS,
        rollouts_per_prompt=ROLLOUTS,
        minibatches=1,
        max_new_tokens=tokens,
        steps=STEPS,
        chat="off",
        rescore_every=0,
        checkpoint_every=0,
    )
    at: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run" if recorded else None
        train(config, out, progress=lambda row: at.append(time.process_time()), threads=1)
    return _between(at)


def theirs(model: Path, prompts: list[str], tokens: int) -> list[float]:
    """Seconds of TRL's steps after the first."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=rewards,
            processing_class=AutoTokenizer.from_pretrained(model),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=PROMPTS * ROLLOUTS,
                num_generations=ROLLOUTS,
                max_completion_length=tokens,
                max_steps=STEPS,
                learning_rate=5e-5,
                beta=0.0,
                loss_type="grpo",
                top_k=0,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_steps=STEPS,
                disable_tqdm=True,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return _between(clock.at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| policy | tokens | ours, s | ours recording, s | TRL, s | ratio | ratio recording |")
    print("|---|---|---|---|---|---|---|")
    for name, (policy, _, tokens) in policies().items():
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder)
            policy.model.save_pretrained(model)
            policy.tokenizer.save_pretrained(model)
            prompts = [f"{i % 10}+{i % 7}+{i % 3}=" for i in range(64)]
            lines = (f'{{"prompt": "{prompt}", "answer": "0"}}\n' for prompt in prompts)
            (model / "prompts.jsonl").write_text("".join(lines))
            found: list[list[float]] = [[], [], []]
            for _ in range(options.rounds):
                found[0] += ours(model, prompts, tokens, recorded=False)
                found[2] += theirs(model, prompts, tokens)
                found[1] += ours(model, prompts, tokens, recorded=True)
        alone, recording, trl = (statistics.median(seconds) for seconds in found)
        row = [name, str(tokens), *(f"{seconds:.3f}" for seconds in (alone, recording, trl))]
        row += [f"{alone / trl:.2f}", f"{recording / trl:.2f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
