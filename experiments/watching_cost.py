"""What watching a TRL run costs, measured side by side.

A GRPOTrainer on a model of two layers (width 128) with a vocabulary of 49152: plain, class totals
only, full token rows, full rows scored again after the update, and both with our head in place of
TRL's (mode="replace"). Arms take turns in one process; the time is that of an update without
generation. Needs the extra [trl]; about three minutes.

    python experiments/watching_cost.py --rounds 5
"""

import argparse
import warnings
from importlib.resources import files
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from wapo_analysis.capture.trl.cost import watching_cost

VOCABULARY = 49152


def model() -> LlamaForCausalLM:
    """Two layers under a head as large as SmolLM2's."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def digits(completions: list[str], **_: Any) -> list[float]:
    """Share of digits in a completion."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def trainer(out: str) -> GRPOTrainer:
    """A fresh trainer of three steps, the same one every time."""
    return GRPOTrainer(
        model=model(),
        reward_funcs=digits,
        args=GRPOConfig(
            output_dir=out,
            max_steps=3,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=32,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1+2=", "3+4=", "5+6=", "7+8="] * 8}),
        processing_class=AutoTokenizer.from_pretrained(str(files("wapo_analysis") / "assets/base")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    for arm, cost in watching_cost(trainer, rounds=options.rounds).items():
        print(f"{arm:28} {cost.seconds:7.3f} s  {cost.overhead:+7.1%}")


if __name__ == "__main__":
    main()
