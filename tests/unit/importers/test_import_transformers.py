"""Trainers built on Transformers: ms-swift, LLaMA-Factory, states under any name."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import STEPS, read, records, trl
from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run
from wapo_analysis.store import open_run


def swift(step: int) -> dict[str, Any]:
    return trl(step) | {"global_step/max_steps": f"{step}/4389", "elapsed_time": "6m 50s"}


def test_swift_folder(tmp_path: Path) -> None:
    folder = tmp_path / "v0-20250921"
    write_lines(folder / "logging.jsonl", records(swift))
    (folder / "args.json").write_text('{"rlhf_type": "grpo"}')
    (folder / "checkpoint-9").mkdir()
    log = [trl(s) | {"step": s, "reward": 9.0} for s in range(1, 10)]
    state = {"log_history": log, "global_step": 9}
    (folder / "checkpoint-9" / "trainer_state.json").write_text(json.dumps(state))
    rows = [{"gen_step": s, "step": [str(s)] * 2, "prompt": ["p", "p"], "completion": ["a", "b"],
             "exact": [1.0, 0.0], "advantages": [1.0, -1.0]} for s in range(1, 5)]  # fmt: skip
    rows.append({"step": ["1"], "prompt": ["p", "q"], "completion": ["a", "b"], "exact": [1, 0]})
    write_lines(folder / "completions.jsonl", rows)
    steps, report = read(folder, tmp_path / "out")
    assert steps["reward"].tolist() == [s / 100 for s in range(1, STEPS + 1)]
    assert report.trainer == "ms-swift"
    rollouts = open_run(tmp_path / "out").rollouts
    assert rollouts["reward"].tolist() == [1.0, 0.0] * 4
    assert rollouts["advantage"].tolist() == [1.0, -1.0] * 4
    assert rollouts["group"].tolist() == [0] * 8
    assert any("trainer_state.json holds the same log up to step 9" in n for n in report.notes)
    assert "completions.jsonl:5: lists of different length" in report.broken[0]


def test_llama_factory(tmp_path: Path) -> None:
    rows = records(lambda s: {"current_steps": s, "total_steps": 90, "loss": 0.5, "lr": 1e-6,
                              "percentage": 1.0, "elapsed_time": "0:01:03"})  # fmt: skip
    steps, report = read(write_lines(tmp_path / "any.jsonl", rows), tmp_path / "out")
    assert steps["loss"].tolist() == [0.5] * STEPS
    assert report.trainer == "LLaMA-Factory"


def test_a_trainer_state_under_any_name_and_two_runs(tmp_path: Path) -> None:
    state = {"epoch": 1.0, "log_history": [trl(s) | {"step": 5 * s} for s in range(1, 9)]}
    for run in ("one", "two"):
        (tmp_path / run / "checkpoint-40").mkdir(parents=True)
        text = json.dumps(state, indent=2)
        (tmp_path / run / "checkpoint-40" / "trainer_state.json").write_text(text)
    (tmp_path / "training_logs.json").write_text(json.dumps(state, indent=2))
    steps, _ = read(tmp_path / "training_logs.json", tmp_path / "out")
    assert steps.index.tolist() == [5 * s for s in range(1, 9)]
    with pytest.raises(UserError, match=r"3 runs are here; name one of: .*one, .*two"):
        import_run(tmp_path, tmp_path.parent / "both")
