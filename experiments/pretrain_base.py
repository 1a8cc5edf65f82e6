"""Pre-train the base policy that ships inside the wheel, on noisy demonstrations of both tasks.

    python experiments/pretrain_base.py --out wapo_analysis/assets/base

One Llama-type causal language model (width 96, 3 layers, tied embeddings, character tokens) imitates
demonstrations that are wrong at a stated rate, so that at temperature 1 it is right about half the
time and still has entropy: the state reinforcement learning starts from. The prompt carries no loss.
The same seed, thread count, machine and torch version give the same weights; elsewhere the last digits
differ, and so do the sampled texts, while reward and entropy stay in the same bands.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

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

from wapo_analysis.train.tasks import TASKS, EmbeddedTask

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz+=;>,?"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CONTEXT = 64
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
        initializer_range=INIT,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def demonstration_batch(
    task: EmbeddedTask, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, size: int
) -> dict[str, torch.Tensor]:
    """Draw problems, demonstrate them, encode them.

    Returns
    -------
    dict of torch.Tensor
        ``input_ids``, ``attention_mask``, ``labels``, each (size, T), padded on the right; labels
        are `IGNORE` on prompt and padding.
    """
    problems = task.problems(rng, size)
    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems]
    texts = [task.demonstrate(p, rng, task.error_rate) for p in problems]
    completions = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    rows = list(zip(prompts, completions, strict=True))
    length = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((size, length), tokenizer.pad_token_id)
    labels = torch.full((size, length), IGNORE)
    mask = torch.zeros((size, length), dtype=torch.long)
    for row, (prompt, completion) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(completion)
        ids[row, :stop] = torch.tensor(prompt + completion)
        labels[row, start:stop] = ids[row, start:stop]
        mask[row, :stop] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: EmbeddedTask, size: int
) -> tuple[float, float]:
    """Sample one completion per held-out problem at temperature 1.

    Returns
    -------
    tuple of float
        Mean reward in [0, 1]; mean entropy per completion token, end-of-sequence included, in nats.
    """
    problems = task.problems(np.random.default_rng(10**6), size)
    prompt = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    sequences = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=task.max_new_tokens,
    )
    width = prompt["input_ids"].shape[1]
    completion = sequences[:, width:]
    ended = (completion == tokenizer.eos_token_id).cumsum(1)
    kept = ended - (completion == tokenizer.eos_token_id).long() == 0
    mask = torch.cat([prompt["attention_mask"], kept.long()], dim=1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=sequences, attention_mask=mask, position_ids=position).logits
    logp = logits[:, width - 1 : -1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)[kept].mean().item()
    texts = tokenizer.batch_decode(completion, skip_special_tokens=True)
    rewards = [task.reward(p, t) for p, t in zip(problems, texts, strict=True)]
    return float(np.mean(rewards)), entropy


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up linearly for the first 5% of the steps, then fall to zero along a cosine."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
