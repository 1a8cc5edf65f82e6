"""Pre-train the base policy that ships inside the wheel, on noisy demonstrations of both tasks.

    python experiments/pretrain_base.py --out wapo_analysis/assets/base

One Llama-type causal language model (width 96, 3 layers, tied embeddings, character tokens)
imitates demonstrations that are wrong at a stated rate, so that at temperature 1 it is right about
half the time and still has entropy: the state reinforcement learning starts from. Only completions
carry loss.

Two-hop alone stays at chance for thousands of steps: a question gives too little signal to grow the
attention heads that look a fact up. So its share of the first steps goes to plain lookups, eight to
a row, and the two hops are then learned within a few hundred steps.

The same seed, thread count, machine and torch version give the same weights, bit for bit; elsewhere
the last digits differ while reward and entropy stay in the same bands. It takes five to ten minutes
on one core.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from wapo_analysis.train.tasks import TASKS, Problem, Task
from wapo_analysis.train.tasks.generated import DIGITS, LETTERS, SEPARATOR

ALPHABET = DIGITS + LETTERS + "+=;,"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CONTEXT = 64
PEAK_LR = 3e-3
LOOKUP_PAIRS = 8
HELD_OUT_SEED = 2**32
CHAIN_SUM_BATCH, TWO_HOP_BATCH, LOOKUP_BATCH = 64, 96, 64
#: Chance that a decision of a demonstration goes wrong; half of them then end right.
ERROR_RATES = {"chain-sum": 0.15, "two-hop": 0.3}
IGNORE = -100  # label of tokens without loss, the default of torch's cross-entropy


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the character tokenizer: one token per character of `ALPHABET`, pad, eos and unk.

    A BPE model without merges is a character model; the ``Fuse`` decoder joins without blanks, so
    decoding gives back exactly the text that was encoded.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *ALPHABET])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Make the untrained policy; its weights follow torch's global seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


class Row(NamedTuple):
    """Token ids of one training text and, for each, whether it carries loss."""

    ids: list[int]
    learn: list[bool]


def demonstrate(name: str, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
    """Completion of a problem of a task, wrong with a probability at each decision."""
    show = {"chain-sum": _running_sums, "two-hop": _hops}[name]
    return show(problem.prompt, rng, error_rate)


def _running_sums(prompt: str, rng: np.random.Generator, error_rate: float) -> str:
    """The running sums of a chain-sum.

    A wrong sum is any other number that many digits can add up to, all equally likely, and the
    error carries on into the sums that follow, as it does when a person slips.
    """
    total, *rest = map(int, prompt.removesuffix("=").split("+"))
    sums = []
    for count, digit in enumerate(rest, start=2):
        total += digit
        if rng.random() < error_rate:
            drawn = int(rng.integers(9 * count))  # any sum but the right one
            total = drawn + (drawn >= total)
        sums.append(str(total))
    return SEPARATOR.join(sums)


def _hops(prompt: str, rng: np.random.Generator, error_rate: float) -> str:
    """Bridge and answer of a two-hop.

    A wrong hop lands on another bridge or another digit of the prompt; after a wrong bridge the
    second hop starts from there.
    """
    facts, asked = prompt.split(";")
    follow = {fact[0]: fact[1] for fact in facts.split(",")}
    bridge = _slip(follow[asked], [b for b in follow.values() if b in follow], rng, error_rate)
    return bridge + _slip(
        follow[bridge], [v for v in follow.values() if v not in follow], rng, error_rate
    )


def _slip(right: str, choices: list[str], rng: np.random.Generator, error_rate: float) -> str:
    """Return ``right``, or with probability ``error_rate`` one of the other choices."""
    if rng.random() >= error_rate:
        return right
    return str(rng.choice([choice for choice in choices if choice != right]))


def demonstration(task: Task, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> Row:
    """Draw one problem and demonstrate it, errors included; the completion carries loss."""
    (problem,) = task.problems(rng, 1)
    prompt = tokenizer(problem.prompt)["input_ids"]
    text = demonstrate(task.name, problem, rng, ERROR_RATES[task.name])
    completion = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return Row(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def lookup(tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> Row:
    """Draw facts as in ``two-hop``, then all of them again in another order.

    The second character of each repeated fact carries loss: it can only be had by looking it up.
    """
    keys = rng.permutation(list(LETTERS))[:LOOKUP_PAIRS]
    values = rng.permutation(list(LETTERS + DIGITS))[:LOOKUP_PAIRS]
    facts = [f"{key}{value}," for key, value in zip(keys, values, strict=True)]
    repeated = [facts[i] for i in rng.permutation(LOOKUP_PAIRS)]
    ids = tokenizer("".join(facts + repeated))["input_ids"]
    return Row(ids, [False] * (len(ids) // 2) + [False, True, False] * LOOKUP_PAIRS)


def collate(rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right.

    Returns
    -------
    dict of torch.Tensor
        ``input_ids``, ``attention_mask``, ``labels``, each (rows, T) int64.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        tokens, stop = torch.tensor(row.ids), len(row.ids)
        ids[i, :stop] = tokens
        labels[i, :stop] = tokens.where(torch.tensor(row.learn), IGNORE)
        mask[i, :stop] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learning_rate(step: int, steps: int) -> float:
    """Warm up linearly over the first 5% of the steps, then fall to zero along a cosine."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int
) -> None:
    """Train ``model`` in place; a third of the steps prepares two-hop by lookups."""
    rng = np.random.default_rng(seed)
    chain_sum, two_hop = TASKS["chain-sum"], TASKS["two-hop"]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    start = time.perf_counter()
    for step in range(steps):
        first = [demonstration(chain_sum, tokenizer, rng) for _ in range(CHAIN_SUM_BATCH)]
        if step < steps // 3:
            second = [lookup(tokenizer, rng) for _ in range(LOOKUP_BATCH)]
        else:
            second = [demonstration(two_hop, tokenizer, rng) for _ in range(TWO_HOP_BATCH)]
        losses = []
        for rows in (first, second):
            loss = model(**collate(rows, tokenizer.pad_token_id)).loss
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            name = "lookup " if step < steps // 3 else "two-hop"
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1:5d}/{steps}  loss: chain-sum {losses[0]:.3f}"
                f"  {name} {losses[1]:.3f}  {seconds:5.0f} s",
                flush=True,
            )


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, size: int
) -> tuple[float, float]:
    """Sample one completion per held-out problem at temperature 1.

    Returns
    -------
    tuple of float
        Mean reward in [0, 1]; mean entropy per completion token, end-of-sequence included, in nats.
    """
    problems = task.problems(np.random.default_rng(HELD_OUT_SEED), size)
    prompt = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    sequences = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=task.max_new_tokens,
    )
    completion = sequences[:, prompt["input_ids"].shape[1] :]
    is_eos = completion == tokenizer.eos_token_id
    kept = is_eos.cumsum(1) - is_eos.long() == 0  # up to the first end-of-sequence, included
    mask = torch.cat([prompt["attention_mask"], kept.long()], dim=1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=sequences, attention_mask=mask, position_ids=position).logits
    logp = logits[:, -completion.shape[1] - 1 : -1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)[kept].mean().item()
    texts = tokenizer.batch_decode(completion, skip_special_tokens=True)
    rewards = [task.reward(p, t) for p, t in zip(problems, texts, strict=True)]
    return float(np.mean(rewards)), entropy


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights and tokenizer so that transformers 4 and 5 both read them, without network."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a new name
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "model.safetensors").chmod(0o644)  # written 0600; an installed file is for everyone


def positive(text: str) -> int:
    """Read a whole number of at least 1 from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def main() -> None:
    """Pre-train, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="folder to write")
    parser.add_argument("--steps", type=positive, default=1500, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and demonstrations")
    parser.add_argument(
        "--threads", type=positive, default=1, help="CPU threads; part of the result"
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pretrain(model, tokenizer, arguments.steps, arguments.seed)
    model.eval()
    save(model, tokenizer, arguments.out)  # before any use, which leaves settings in the tokenizer
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"wrote {arguments.out} ({size / 1e6:.2f} MB)")
    for task in TASKS.values():
        reward, entropy = evaluate(model, tokenizer, task, size=1024)
        print(f"{task.name:10s} reward {reward:.3f}  entropy {entropy:.3f} nats per token")


if __name__ == "__main__":
    main()
