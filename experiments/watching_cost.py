"""What watching costs, measured side by side.

A GRPOTrainer on a model of two layers (width 128) with a vocabulary of 49152: plain, class totals
only, full token rows, full rows scored again after the update, and both with our head in place of
TRL's (mode="replace"). With ``--presets``: the values of ``attach(detail=...)`` on four layers.
With ``--loop``: a policy loss plain and inside `watched_loss`, four layers of width 512 with a
vocabulary of 32000. Arms take turns in one process; the time is that of an update without
generation. Needs the extra [trl]; minutes.

    python experiments/watching_cost.py --rounds 5
    python experiments/watching_cost.py --presets --rounds 3
    python experiments/watching_cost.py --loop --rounds 16
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable, Mapping
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
from wapo_analysis.capture.trl import attach
from wapo_analysis.errors import UserError

VOCABULARY = 49152
KNOBS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "class totals": {"token_every": 0, "rescore_every": 0},
    "full rows": {"token_every": 1, "rescore_every": 0},
    "full rows, scored again": {"token_every": 1, "rescore_every": 1},
    "replace, full rows": {"mode": "replace", "token_every": 1, "rescore_every": 0},
    "replace, scored again": {"mode": "replace", "token_every": 1, "rescore_every": 1},
}
"""The arms that are compared, and what `attach` is given in each."""
PRESETS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    **{f'detail="{name}"': {"detail": name} for name in ("totals", "sampled", "full")},
}
_PRESET_STEPS = 10  # one of them is on the schedule of "sampled"


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
    make_trainer: Callable[[str], Any],
    rounds: int = 7,
    steps: int = 3,
    arms: Mapping[str, dict[str, Any] | None] = KNOBS,
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
    arms : mapping
        What `attach` is given in each arm, None for the plain one.

    Returns
    -------
    dict of str to Cost
        Keys are those of the arms; without the replace arms where TRL has no fused head.
    """
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for arm in tuple(times):
                place = Path(folder) / f"{number}-{tuple(arms).index(arm)}"
                try:
                    seconds = _timed(make_trainer(str(place / "out")), place / "run", arms[arm])
                except UserError:
                    if "mode" not in (arms[arm] or {}):
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


def model(
    vocabulary: int = VOCABULARY, width: int = 128, layers: int = 2, heads: int = 2
) -> LlamaForCausalLM:
    """Two layers under a head as large as SmolLM2's."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def loop_cost(rounds: int, token_every: int) -> Cost:
    """Cost of a watched loss: four layers, 8 rollouts, prompts of 16 tokens, completions of 48."""
    torch.manual_seed(1)
    ids, advantages = torch.randint(2, 32_000, (8, 64)), torch.randn(8, 1)
    names = {"logp": "logp", "logp_old": "old", "advantages": "advantages"}
    policies = [model(32_000, 512, layers=4, heads=8) for _ in range(2)]
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


def odd(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of odd token ids; random weights write tokens that the tokenizer has no text for."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def preset_trainer(out: str) -> GRPOTrainer:
    """Four layers of width 512 under a head of 32000, ten steps, 8 completions of 16 tokens."""
    return trainer(out, model(32_000, 512, layers=4, heads=8), _PRESET_STEPS, batch=8, length=16)


def trainer(
    out: str,
    policy: LlamaForCausalLM | None = None,
    steps: int = 3,
    batch: int = 16,
    length: int = 32,
) -> GRPOTrainer:
    """A fresh trainer, the same one every time."""
    return GRPOTrainer(
        model=policy or model(),
        reward_funcs=odd,
        args=GRPOConfig(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=batch,
            num_generations=8,
            max_completion_length=length,
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
    parser.add_argument("--presets", action="store_true", help="the values of attach(detail=...)")
    parser.add_argument("--loop", action="store_true", help="a loop with a watched loss, not TRL")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.loop:
        arms = {"watched loss, totals": 0, "watched loss, sampled": 10}
        costs = {arm: loop_cost(options.rounds, every) for arm, every in arms.items()}
    elif options.presets:
        costs = watching_cost(preset_trainer, options.rounds, _PRESET_STEPS, PRESETS)
    else:
        costs = watching_cost(trainer, rounds=options.rounds)
    for arm, cost in costs.items():
        print(f"{arm:28} {cost.seconds:7.3f} s  {cost.overhead:+7.1%}")


if __name__ == "__main__":
    main()
