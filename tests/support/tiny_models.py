"""Models made on the spot: byte-level tokens, random weights, a chat template like SmolLM2's."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE, **options: Any) -> PreTrainedTokenizerFast:
    """One token per byte and three special ones; end of text is no end of a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        **options,
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny_llama(folder: Path, *, dropout: float = 0.0, window: int = 256) -> Path:
    """Two layers, width 32, in a folder that loads like any model of the hub."""
    return _save(
        folder,
        LlamaForCausalLM,
        LlamaConfig,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        attention_dropout=dropout,
    )


def save_tiny_gpt2(folder: Path, *, dropout: float = 0.0, window: int = 256) -> Path:
    """Two layers, width 32, absolute positions and a tied head; see `save_tiny_llama`."""
    return _save(
        folder,
        GPT2LMHeadModel,
        GPT2Config,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=window,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )


def _save(folder: Path, model: type, config: type, **sizes: float) -> Path:
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model(
            config(
                vocab_size=len(tokenizer),
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **sizes,
            )
        )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
