"""Tokens sampled a second, ours against transformers' ``generate``, same batch, one CPU thread.

    python -m experiments.bench.sampling

For the shipped base and a Llama of 6 layers, width 256 and V = 8192 with random weights: rollouts
that all reach the limit, and rollouts that end at random, those of the Llama after a third of it in
the mean. CPU time, the two take turns, best of the rounds; tokens after the end of a rollout do not
count.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wapo_analysis.train.models import load_policy
from wapo_analysis.train.policy import Policy
from wapo_analysis.train.rollout import pad_left, sample

Sampling = Callable[[], int]


def policies() -> dict[str, tuple[Policy, int, int]]:
    """Policies with rows and longest completions."""
    base = load_policy("base", torch.device("cpu"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    ).eval()
    return {"base": (base, 64, 40), "llama6": (replace(base, model=model), 32, 72)}


def both(
    policy: Policy, rows: int, tokens: int, ends: tuple[int, ...]
) -> tuple[Sampling, Sampling]:
    """Our sampling and transformers', each giving the tokens that count."""
    policy = replace(policy, eos_ids=ends)
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12][: 6 + row % 5] for row in range(rows)]
    ids, mask = pad_left(prompts, policy.pad_id)

    def ours() -> int:
        found = sample(policy, prompts, tokens, 1.0, torch.Generator().manual_seed(1))
        return int(found.mask.sum())

    def theirs() -> int:
        torch.manual_seed(1)
        made = policy.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=tokens,
            eos_token_id=list(ends),
            pad_token_id=policy.pad_id,
        )[:, ids.shape[1] :]
        ended = torch.isin(made, torch.tensor(ends)).long().cumsum(1)
        return int((ended - torch.isin(made, torch.tensor(ends)).long() == 0).sum())

    return ours, theirs


def speeds(pair: tuple[Sampling, Sampling], rounds: int) -> list[float]:
    """Best tokens per CPU second of each."""
    best = [0.0, 0.0]
    for _ in range(rounds + 1):  # the first warms up
        for place, work in enumerate(pair):
            began = time.process_time()
            count = work()
            best[place] = max(best[place], count / (time.process_time() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| policy | mean length of the longest | ours, tokens/s | generate, tokens/s | ratio |")
    print("|---|---|---|---|---|")
    for name, (policy, rows, tokens) in policies().items():
        vocabulary = policy.model.config.vocab_size
        third = tuple(range(10, 10 + max(1, 3 * vocabulary // tokens)))
        for ends in ((vocabulary,), third):
            pair = both(policy, rows, tokens, ends)
            ours, theirs = speeds(pair, options.rounds)
            share = pair[0]() / (rows * tokens)
            row = (name, f"{share:.0%}", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
