"""Settings of TRL that change what a model is given or how it runs: images, tools, compiling."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", minversion="1.15", reason="needs the extra [trl]")

from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    LogitsProcessor,
)

from tests.support.processes import ROOT, ended, started
from tests.support.trl_toy import (
    WatchedLoss,
    calling_tokenizer,
    mask_of,
    run,
    toy_config,
    toy_model,
    toy_tokenizer,
)
from wapo_analysis import attach, open_run

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def watched(build: Callable[[], Any], out: Path) -> tuple[Any, Any]:
    """Train twice, watched and not: weights bitwise equal, coef autograd's, nothing missing."""
    plain, trainer = run(build()), build()
    with attach(trainer, out, token_every=1, exact_every=1, rescore_every=1) as attachment:
        seen = run(trainer)
    assert attachment.recorder.failure is None
    assert all(torch.equal(value, seen[name]) for name, value in plain.items())
    found = open_run(out)
    rows = found.tokens()
    coef = torch.cat([c[mask_of(inputs)] for c, inputs in trainer.expected()])
    np.testing.assert_allclose(rows.coef, coef, rtol=1e-3, atol=1e-7)
    statistics = ["entropy", "collision_rest", "collision_logp_rest", "logp_after"]
    assert rows[statistics].notna().all(axis=None)
    assert "unknown" not in set(rows.cls)
    assert found.steps.tokens.tolist() == rows.groupby("step").size().tolist()
    return found, trainer


def looking_trainer(out: Path) -> Any:
    """A trainer of a tiny LLaVA that is shown a picture with every prompt."""
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.image_token = "<image>"
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, vision_feature_layer=-1,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_select_strategy="default",
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    from transformers import CLIPImageProcessor

    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}",
    )  # fmt: skip
    random = np.random.default_rng(0)
    image = {"type": "image"}
    prompts = [[image, {"type": "text", "text": f"{n}+1="}] for n in range(8)]
    data = {
        "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
        "image": [
            Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in prompts
        ],
    }
    return WatchedLoss(
        model, said_digits, args=toy_config(out), train_dataset=Dataset.from_dict(data),
        processing_class=processor,
    )  # fmt: skip


def said_digits(completions: list[Any], **_: Any) -> list[float]:
    return [sum(letter.isdigit() for letter in str(text)) / 8 for text in completions]


def test_a_model_that_is_shown_pictures(tmp_path: Path) -> None:
    _, trainer = watched(lambda: looking_trainer(tmp_path / "out"), tmp_path / "run")
    assert all(inputs["pixel_values"] is not None for _, inputs in trainer.expected())


CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'


def multiply(a: int, b: int) -> int:
    """Multiply two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    return a * b


class CallsFirst(LogitsProcessor):
    """Makes every other completion begin with a call of the tool; what follows it is sampled."""

    def __init__(self, tokenizer: Any) -> None:
        self.call, self.start = tokenizer.encode(CALL), None
        self.answered = tokenizer.convert_tokens_to_ids("</tool_response>")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.start = input_ids.shape[1] if self.start is None else self.start
        place = input_ids.shape[1] - self.start
        for row in range(0, len(input_ids), 2):
            answered = bool((input_ids[row, : self.start] == self.answered).any())
            if not answered and place < len(self.call):
                scores[row] = -torch.inf
                scores[row, self.call[place]] = 0.0
        return scores


def calling_trainer(out: Path) -> Any:
    """A trainer with a tool and Qwen3's chat template; its model spells letter by letter."""
    tokenizer = calling_tokenizer()
    model = toy_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    sample = model.generate
    model.generate = lambda *args, **kwargs: sample(
        *args, **kwargs, logits_processor=[CallsFirst(tokenizer)]
    )
    prompts = [[{"role": "user", "content": f"{n}*3?"}] for n in range(8)]
    return WatchedLoss(
        model, lambda completions, **_: [len(str(c)) % 7 / 7 for c in completions],
        args=toy_config(out, max_completion_length=140, max_tool_calling_iterations=2),
        train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
        tools=[multiply],
    )  # fmt: skip


def test_what_a_tool_answered_is_no_token_of_the_policy(tmp_path: Path) -> None:
    found, trainer = watched(lambda: calling_trainer(tmp_path / "out"), tmp_path / "run")
    answered = [
        int((inputs["completion_mask"].bool() & ~mask_of(inputs)).sum())
        for _, inputs in trainer.expected()
    ]
    assert min(answered) > 0, "every pass has answers of the tool in it"
    log = [line for line in trainer.state.log_history if "completions/mean_length" in line]
    assert log[0]["tools/call_frequency"] == 0.5
    assert found.steps.length.tolist() == [line["completions/mean_length"] for line in log]


COMPILED = """
import sys
from pathlib import Path
import torch
from tests.integration.test_trl_settings import watched
from tests.support.trl_toy import WatchedLoss, toy_trainer

out = Path(sys.argv[1])

def build():
    # What was compiled is kept by its code, not by its model: the second run begins anew.
    torch._dynamo.reset()
    return toy_trainer(
        out / "out", WatchedLoss, torch_compile=True, torch_compile_backend="eager", max_steps=1
    )
found, trainer = watched(build, out / "run")
assert found.manifest["statistics_from"] == "hidden states and head"
"""


def test_a_compiled_model(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", COMPILED, str(tmp_path)]
    ((code, _, errors),) = ended(started(command, places=None, cwd=ROOT))
    assert code == 0, errors[-3000:]
