"""What a file of JSON is, by the names of its first record."""

import json
from pathlib import Path
from typing import Any

import pytest

from wapo_analysis.importers.detect import _kinds, detect

LISTS = {"trainer_logprobs": [-1.0], "inference_logprobs": [-1.0], "loss_mask": [True]}
DUMP = {"input": "a", "output": "b", "score": 1.0}
TEXTS = {"step": 1, "prompt": ["a"], "completion": ["b"], "reward": [1.0]}
COUNTED = {"current_steps": 1, "total_steps": 9, "loss": 0.5}


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (LISTS, "prime-rl"),
        *((without(LISTS, name), "table") for name in LISTS),
        ({"step": 1, "data": {"a": 1}}, "verl-metrics"),
        ({"step": 1, "data": {}}, "table"), ({"step": 1, "data": 3}, "table"),
        ({"data": {"a": 1}}, "table"),
        (DUMP, "verl-rollouts"), *((without(DUMP, name), "table") for name in DUMP),
        (TEXTS, "completions"), (TEXTS | {"prompt": "a"}, "table"),
        (TEXTS | {"completion": "b"}, "table"),
        ({"global_step/max_steps": "1/9"}, "swift-log"),
        (COUNTED, "trainer-log"), (without(COUNTED, "total_steps"), "table"),
        (without(COUNTED, "current_steps"), "table"),
        ({"step": 1, "reward": 0.5}, "table"),
    ],
)  # fmt: skip
def test_lines_of_json_are_told_by_the_first(
    record: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(f"{json.dumps(record)}\n" * 2)
    assert detect(file).kinds[file] == kind


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("trainer_state.json", "{}", "state"),
        ("a.json", '{"x": 1, "log_history": []}', "state"),
        ("a.json", '{"x": 1, "log_history": []}\n', "state"),
        ("a.json", '{"x": 1,\n "log_history": []}', "state"),
        ("a", '{"x": 1, "log_history": []}', "state"),
        ("a", '{\n"log_history": []}', "state"),
        ("a.json", '{"x": 1}\n{"log_history": 2}\n', "table"),
        ("a.jsonl", '{"x": 1}\n{"log_history": 2}\n', "table"),
        ("a.json", '["log_history"]', "table"),
        ("a.json", "[[1760000000.5, 1, 0.5], [1760000001.5, 2, 0.25]]", "download"),
        ("a.json", "[[17, 1, 0.5]]", "table"),
        ("a", "[[1760000000.5, 1, 0.5], [1760000001.5, 2, 0.25]]", "download"),
        ("a.jsonl", "[[1760000000.5, 1, 0.5]]\n[[1760000001.5, 2, 0.25]]\n", "table"),
        ("a.json", '[{"step": 1}]', "table"),
        ("a.jsonl", '[{"step": 1}]', "table"),
        ("a", '{"input": "a", "output": "b", "score": 1}\n{"x": 1}\n', "verl-rollouts"),
        ("a.json", '{"input": "a", "output": "b", "score": 1}\n{"x": 1}\n', "verl-rollouts"),
        ("a.json", '{"input": "a", "output": "b", "score": 1}', "table"),
    ],
)
def test_a_json_value_is_told_from_lines_of_them(
    name: str, text: str, kind: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert detect(file).kinds[file] == kind


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("token_exports/step_1/rank_0.jsonl", "prime-rl"),
        ("token_exports/rank_0.jsonl", "prime-rl"),
        ("token_exports/a/b/rank_0.jsonl", "table"),
        ("token_exports/step_1/other.jsonl", "table"),
        ("monitors/file/metrics.jsonl", "prime-rl"),
        ("monitors/other/metrics.jsonl", "table"),
        ("other/file/metrics.jsonl", "table"),
        ("traces/stream.jsonl", "prime-rl"),
        ("traces/stream/00001.jsonl", "prime-rl"),
        ("traces/annotations/trainer.jsonl", "prime-rl"),
        ("traces/annotations/trainer/00001.jsonl", "prime-rl"),
        ("traces/other.jsonl", "table"),
        ("traces/a/b/c/stream.jsonl", "table"),
        ("annotations/trainer.jsonl", "table"),
        ("stream/00001.jsonl", "table"),
        ("run/data/rewards/reward_step_0.npy", "official"),
        ("run/rewards/reward_step_0.npy", None),
        ("run/data/scatter_step_0.npz", "official"),
        ("run/scatter_step_0.npz", None),
        ("run/data/other_step_0.npz", None),
        ("run/data/a/b/rewards/reward_step_0.npy", None),
    ],
)
def test_files_that_are_told_by_where_they_lie(
    place: str, kind: str | None, tmp_path: Path
) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 1, "reward": 0.5}\n' * 2)
    assert _kinds([file], named=False) == ({} if kind is None else {file: kind})
