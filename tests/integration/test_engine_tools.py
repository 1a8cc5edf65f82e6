"""Task ``hotpotqa-search`` on engine trl: a policy that searches and reads in several turns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", minversion="1.15", reason="needs the extra [trl]")
pytest.importorskip("bm25s", reason="needs the extra [search]")

import torch
from transformers import LogitsProcessor

from tests.support.trl_toy import calling_tokenizer, toy_model
from wapo_analysis import open_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.engines import recipe, trl

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PEOPLE = ("Ines", "Omar", "Lena", "Ravi", "Yuki", "Nora", "Teo", "Mia")
TURNS = (
    '<tool_call>\n{"name": "search", "arguments": {"query": "%s"}}\n</tool_call><|im_end|>',
    '<tool_call>\n{"name": "read", "arguments": {"title": "%s"}}\n</tool_call><|im_end|>',
    "Answer: %s<|im_end|>",
)


class Speaks(LogitsProcessor):
    """Makes every other rollout search, read and answer; the others are sampled freely."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.start = tokenizer, None
        self.answered = tokenizer.convert_tokens_to_ids("</tool_response>")
        self.said: dict[int, list[int]] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
            for row, ids in enumerate(input_ids):
                text, turn = self.tokenizer.decode(ids), int((ids == self.answered).sum())
                person = next(name for name in PEOPLE if f"was {name} born" in text)
                if turn or row % 2 == 0:
                    words = f"{person}ville" if turn == 2 else person
                    self.said[row] = self.tokenizer.encode(TURNS[turn] % words)
        place = input_ids.shape[1] - self.start
        for row, ids in self.said.items():
            if place < len(ids):
                scores[row] = -torch.inf
                scores[row, ids[place]] = 0.0
        return scores


class Searches(recipe.Recipe):
    """The recipe, with a policy that cannot but use the tools."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        model, tokenizer = self.policy.model, self.policy.tokenizer
        generate = model.generate
        model.generate = lambda *args, **options: generate(
            *args, **options, logits_processor=[Speaks(tokenizer)]
        )


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """A model with a chat template for tools, and questions in HotpotQA's form."""
    torch.manual_seed(0)
    tokenizer = calling_tokenizer()
    model = toy_model(
        vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "question": f"Where was {name} born?",
            "answer": f"{name}ville",
            "context": [[name, [f"{name} comes from {name}ville."]], ["Sea", ["Blue."]]],
            "supporting_facts": [[name, 0]],
        }
        for name in PEOPLE
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return {name: tmp_path / name for name in ("model", "data.json", "run")}


def train(paths: dict[str, Path], *more: str) -> int:
    return wapo(
        [
            "train", "--engine", "trl", "--task", "hotpotqa-search", "--data",
            str(paths["data.json"]), "--model", str(paths["model"]), "--prompts", "2",
            "--rollouts", "4", "--minibatches", "1", "--steps", "2", "--device", "cpu", "--lr",
            "1e-3", "--max-new-tokens", "300", "--out", str(paths["run"]), *more,
        ]
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["grpo", "wapo"])
def test_a_policy_that_searches_reads_and_answers(
    objective: str, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl, "Recipe", Searches)
    assert train(paths, "--objective", objective) == 0
    run = open_run(paths["run"])
    assert run.manifest["data"]["paragraphs"] == 9
    rollouts = run.rollouts
    searched = rollouts["completion"].str.contains('"search"')
    assert searched.sum() == 8
    assert rollouts["reward"].tolist() == searched.astype(float).tolist()
    for _, row in rollouts[searched].iterrows():
        name = row["answer"].removesuffix("ville")
        # Both tools answered, and nothing of that is a token of the policy.
        assert row["completion"].count(f"{name} comes from {name}ville.") == 2
        said = [calling_tokenizer().encode(turn % name) for turn in TURNS]
        assert row["length"] == sum(map(len, said)) + len("ville")
    tokens = run.tokens()
    counted = tokens.groupby(["step", "rollout"]).size()
    assert counted.tolist() == rollouts.set_index(["step", "rollout"])["length"].tolist()
    written = "".join(run.vocab[i] for i in tokens["token_id"])
    assert "comes from" not in written
    assert np.abs(tokens["coef"]).max() > 0


def test_a_model_without_a_template_for_tools_is_refused(
    paths: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(paths, "--model", "base") == 2
    told = "needs a model with a chat template that knows tools, chat not off"
    assert told in capfd.readouterr().err
    assert not paths["run"].exists()
