"""What watching costs, measured side by side.

A model of four layers (width 512) with a vocabulary of 32000. In TRL: plain, `attach` with each
``detail``, and with our head in place of TRL's (mode="replace"). With ``--loop``: a loop of one's
own, its policy loss plain and inside `watched_loss`. Arms take turns in one process; the time is
that of an update without generation. Needs the extra [trl]; about ten minutes.

    python experiments/watching_cost.py --rounds 3
    python experiments/watching_cost.py --loop --rounds 30
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from wapo_analysis import watched_loss
from wapo_analysis.capture.trl.attachment import attach
from wapo_analysis.errors import UserError

VOCABULARY, WIDTH, LAYERS, STEPS = 32_000, 512, 4, 10
KNOBS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "totals": {"detail": "totals"},
    "sampled": {"detail": "sampled"},
    "full": {"detail": "full"},
    "full, replace": {"detail": "full", "mode": "replace"},
}
"""The arms that are compared, and what `attach` is given in each."""


@dataclass(frozen=True)
class Cost:
    """Time of one arm.

    Attributes
    ----------
    seconds : float
        Median of one optimizer step without generation: forward, backward, update, watching. On a
        CPU that is CPU time, so waiting for the disk is not in it.
    overhead : float
        Median over rounds of this arm's step time over the plain one's of the same round, minus 1.
    """

    seconds: float
    overhead: float


def watching_cost(
    make_trainer: Callable[[str], Any], rounds: int = 7, steps: int = STEPS
) -> dict[str, Cost]:
    """Measure all arms side by side.

    Every round trains each arm in turn, so a slow minute of the machine hits all of them; the first
    round warms up and is dropped. Generation, which watching does not touch, is taken out of the
    time, so the overhead is that of the update alone and an upper bound for the whole step.

    Parameters
    ----------
    make_trainer : callable
        ``make_trainer(output_dir)`` gives a fresh trl GRPOTrainer, the same each time, that runs
        ``max_steps`` steps; its own settings decide sizes.
    rounds : int
        Rounds that count.
    steps : int
        Optimizer steps the trainer makes, to divide by.

    Returns
    -------
    dict of str to Cost
        Keys are those of `KNOBS`; without the replace arms where TRL has no fused head.
    """
    times: dict[str, list[float]] = {arm: [] for arm in KNOBS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for arm in tuple(times):
                place = Path(folder) / f"{number}-{arm.replace(' ', '-')}"
                try:
                    seconds = _timed(make_trainer(str(place / "out")), place / "run", KNOBS[arm])
                except UserError:
                    if "mode" not in (KNOBS[arm] or {}):
                        raise
                    del times[arm]  # before TRL 1.15 there is no head to replace
                    continue
                if number:
                    times[arm].append(seconds / steps)
    plain = times["plain"]
    return {
        arm: Cost(
            median(seconds),
            median(own / base for own, base in zip(seconds, plain, strict=True)) - 1,
        )
        for arm, seconds in times.items()
    }


def _timed(trainer: Any, run: Path, knobs: dict[str, Any] | None) -> float:
    """Seconds inside training steps and what follows them, without generation."""
    # On a CPU the time this process used, whatever else runs; a GPU needs the clock on the wall.
    on_gpu = trainer.accelerator.device.type == "cuda"
    clock = perf_counter if on_gpu else process_time
    generation, inner = [0.0], trainer._generate_and_score_completions

    def generate(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        batch = inner(*args, **kwargs)
        _wait(trainer)
        generation[0] += clock() - started
        return batch

    trainer._generate_and_score_completions = generate
    attachment = attach(trainer, run, **knobs) if knobs is not None else None
    started = clock()
    trainer.train()
    _wait(trainer)
    seconds = clock() - started - generation[0]
    if attachment is not None:
        attachment.close()
        if attachment.recorder.failure is not None:
            raise RuntimeError(f"watching failed: {attachment.recorder.failure}")
    return seconds


def _wait(trainer: Any) -> None:
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def model() -> LlamaForCausalLM:
    """Four layers under a head of 32000 tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def loop_cost(rounds: int, token_every: int) -> Cost:
    """Cost of a watched loss in a loop: 8 rollouts, prompts of 16 tokens, completions of 48."""
    torch.manual_seed(1)
    ids, advantages = torch.randint(2, VOCABULARY, (8, 64)), torch.randn(8, 1)
    names = {"logp": "logp", "logp_old": "old", "advantages": "advantages"}
    policies = [model(), model()]
    optimizers = [torch.optim.AdamW(policy.parameters(), lr=1e-5) for policy in policies]
    times: tuple[list[float], list[float]] = ([], [])
    with (
        tempfile.TemporaryDirectory() as folder,
        watched_loss(
            _surrogate, run=f"{folder}/run", names=names, optimizer=optimizers[1],
            head=policies[1], token_every=token_every, synchronous=True,
        ) as watched,
    ):  # fmt: skip
        for number in range(2 * rounds + 4):  # each arm goes first every other time
            arm = (number + number // 2) % 2
            started = process_time()
            logits = policies[arm](input_ids=ids, use_cache=False).logits[:, 15:-1]
            logp = logits.log_softmax(-1).gather(-1, ids[:, 16:, None])[..., 0]
            loss = watched if arm else _surrogate
            loss(logp, logp.detach(), advantages).backward()
            optimizers[arm].step()
            optimizers[arm].zero_grad()
            times[arm].append(process_time() - started)
        if watched.failure is not None:
            raise RuntimeError(f"watching failed: {watched.failure}")
    pairs = list(zip(*times, strict=True))[2:]
    return Cost(median(own for _, own in pairs), median(own / base for base, own in pairs) - 1)


def _surrogate(logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def digits(completions: list[str], **_: Any) -> list[float]:
    """Share of digits in a completion."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def trainer(out: str) -> GRPOTrainer:
    """A fresh trainer of ten steps, the same one every time."""
    return GRPOTrainer(
        model=model(),
        reward_funcs=digits,
        args=GRPOConfig(
            output_dir=out,
            max_steps=STEPS,
            per_device_train_batch_size=8,
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
    parser.add_argument("--loop", action="store_true", help="a loop with a watched loss, not TRL")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.loop:
        arms = {"watched loss, totals": 0, "watched loss, sampled": 10}
        costs = {arm: loop_cost(options.rounds, every) for arm, every in arms.items()}
    else:
        costs = watching_cost(trainer, rounds=options.rounds)
    for arm, cost in costs.items():
        print(f"{arm:28} {cost.seconds:7.3f} s  {cost.overhead:+7.1%}")


if __name__ == "__main__":
    main()
