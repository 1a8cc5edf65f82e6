"""What the GPU recipe starts from: word problems, a policy trained on them, a model in parts."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.pretrain_base import EOS, PAD, PEAK_LR, Row, collate, learning_rate, save
from wapo_analysis.errors import UserError
from wapo_analysis.train.policy import no_progress_bars

# ---- word problems ------------------------------------------------------------------------------

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("apples", "books", "coins", "pens", "shells", "stamps", "tickets", "marbles")
MORE = ("{n} buys {b} more.", "A friend brings {b} more.", "{n} finds another {b}.")
FEWER = ("{n} gives {b} away.", "{b} of them get lost.", "{n} sells {b}.")
ENDINGS = (" The answer is {x}.", " So {n} has {x} {t}.", " That makes {x}.")
ERROR_RATE = 0.3
"""Chance that a demonstrated operation comes out wrong; half of the problems then end right."""


@dataclass(frozen=True)
class Story:
    """A word problem: a start, then operations ``(sign, amount)``."""

    name: str
    thing: str
    start: int
    changes: tuple[tuple[int, int], ...]
    sentences: tuple[str, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, most: int = 3) -> "Story":
        """Draw a problem of one to ``most`` operations that never goes below zero."""
        name, thing = str(rng.choice(NAMES)), str(rng.choice(THINGS))
        start = now = int(rng.integers(10, 60))
        changes, told = [], []
        for _ in range(int(rng.integers(1, most + 1))):
            amount = int(rng.integers(2, 30))
            sign = -1 if amount <= now and rng.random() < 0.5 else 1
            told.append(str(rng.choice(MORE if sign > 0 else FEWER)).format(n=name, b=amount))
            changes.append((sign, amount))
            now += sign * amount
        return cls(name, thing, start, tuple(changes), tuple(told))

    @property
    def question(self) -> str:
        """The problem in words."""
        told = " ".join(self.sentences)
        ask = f"How many {self.thing} does {self.name} have now?"
        return f"{self.name} has {self.start} {self.thing}. {told} {ask}"

    def solve(self, rng: np.random.Generator | None = None) -> tuple[str, int]:
        """Steps and result; with ``rng``, each operation is wrong at `ERROR_RATE`."""
        now, steps = self.start, []
        for sign, amount in self.changes:
            result = now + sign * amount
            if rng is not None and rng.random() < ERROR_RATE:
                result = max(0, result + int(rng.choice((-10, -2, -1, 1, 2, 10))))
            steps.append(f"{now} {'+' if sign > 0 else '-'} {amount} = {result}.")
            now = result
        return " ".join(steps), now

    def prompt(self) -> str:
        """What the policy is asked."""
        return f"{self.question} Work in steps and end with the number. Answer:"

    def demonstrate(self, rng: np.random.Generator) -> str:
        """A completion as the pre-trained policy should write it, errors included."""
        steps, result = self.solve(rng)
        return f" {steps}" + str(rng.choice(ENDINGS)).format(x=result, n=self.name, t=self.thing)


def write_problems(file: Path, count: int = 4000, seed: int = 0) -> Path:
    """Write different problems, one JSON line each; in the form of GSM8K, with a prompt beside."""
    rng = np.random.default_rng(seed)
    stories: dict[str, Story] = {}
    while len(stories) < count:
        story = Story.draw(rng)
        stories[story.question] = story
    lines = []
    for question, story in stories.items():
        steps, result = story.solve()
        row = {"prompt": story.prompt(), "question": question, "answer": f"{steps}\n#### {result}"}
        lines.append(json.dumps(row) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
    return file


def last_number(completion: str, answer: str) -> float:
    """1 if the last number of the completion is that of the answer, after its ``####``."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion)
    wanted = float(answer.rpartition("####")[2].replace(",", ""))
    return float(bool(found) and float(found[-1].replace(",", "")) == wanted)


# ---- the start ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Sizes of the pre-trained policy and of its training."""

    width: int = 384
    layers: int = 8
    vocabulary: int = 512
    batch: int = 256
    steps: int = 2000
    peak_lr: float = 1e-3
    seed: int = 0


def pretrain(folder: Path, start: Start, device: torch.device) -> None:
    """Train a policy on demonstrations and write it to ``folder``, whole or not at all."""
    rng = np.random.default_rng(start.seed)
    torch.manual_seed(start.seed)
    tokenizer = _tokenizer(rng, start.vocabulary)
    model = _llama(start, tokenizer).to(device)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"pre-training {weights:.1f} million weights, {start.steps} steps", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    began = time.perf_counter()
    for step in range(start.steps):
        rows = _demonstrations(rng, tokenizer, start.batch)
        batch = {name: part.to(device) for name, part in rows.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = start.peak_lr * learning_rate(step, start.steps) / PEAK_LR
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == start.steps:
            seconds = time.perf_counter() - began
            print(f"  step {step + 1}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with no_progress_bars():
        save(model.cpu().eval(), tokenizer, unfinished)
    unfinished.rename(folder)


def _demonstrations(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, count: int
) -> dict[str, torch.Tensor]:
    """One batch; only completions carry loss."""
    stories = [Story.draw(rng) for _ in range(count)]
    prompts = tokenizer([story.prompt() for story in stories])["input_ids"]
    shown = tokenizer([story.demonstrate(rng) + EOS for story in stories])["input_ids"]
    rows = [
        Row(asked + told, [False] * len(asked) + [True] * len(told))
        for asked, told in zip(prompts, shown, strict=True)
    ]
    return collate(rows, tokenizer.pad_token_id)


def _tokenizer(rng: np.random.Generator, size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on word problems; digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    stories = [Story.draw(rng) for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((s.prompt() + s.demonstrate(rng) for s in stories), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _llama(start: Start, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    heads = max(1, start.width // 64)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=start.width,
            intermediate_size=start.width * 8 // 3,
            num_hidden_layers=start.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            **ends,
        )
    )
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, **ends)
    return model


def join_parts(folders: Sequence[Path], target: Path) -> Path:
    """Join ``part-*`` of the folders, in the order of their names, and check their SHA-256.

    Raises
    ------
    UserError
        If there are no parts or no ``sha256`` file, or the digest is another one.
    """
    parts = sorted((p for f in folders for p in f.glob("part-*")), key=lambda p: p.name)
    sums = [f / "sha256" for f in folders if (f / "sha256").is_file()]
    if not parts or not sums:
        raise UserError("--model-parts needs folders with files part-* and, in one, sha256")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}")
    digest = hashlib.sha256()
    with unfinished.open("wb") as whole:
        for part in parts:
            block = part.read_bytes()
            digest.update(block)
            whole.write(block)
    wanted = sums[0].read_text().split()[0]
    if digest.hexdigest() != wanted:
        raise UserError(
            f"{len(parts)} parts have SHA-256 {digest.hexdigest()[:12]}, not {wanted[:12]}"
        )
    unfinished.rename(target)
    return target
