"""A resume while the old process still lives: refused, or the old process stops recording."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

SMALL = {"prompts_per_step": 2, "rollouts_per_prompt": 2, "minibatches": 1, "max_new_tokens": 6,
         "checkpoint_every": 2, "keep_checkpoints": 9, "rescore_every": 0}  # fmt: skip


def test_a_resume_of_a_live_run_is_refused_and_a_take_over_wins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = TrainConfig.from_dict({**SMALL, "steps": 7}), tmp_path / "r"
    seen: dict[str, Any] = {}

    def intrude(row: dict[str, float]) -> None:
        """At step 4 of the first training a second one comes."""
        if row["step"] != 4 or seen:
            return
        with pytest.raises(UserError, match="r is being written by pid .*, last step 4"):
            train(config, run, resume=True)
        with caplog.at_level(logging.WARNING):
            seen["second"] = train(config, run, resume=True, take_over=True)
        seen["log"] = (run / "steps.jsonl").read_bytes()
        seen["checkpoints"] = sorted((run / "checkpoints").iterdir())

    first = train(config, run, progress=intrude)
    opened = open_run(run)
    assert opened.steps.step.tolist() == list(range(1, 8))
    assert (opened.status, len(opened.manifest.resumed or [])) == ("finished", 1)
    assert (run / "steps.jsonl").read_bytes() == seen["log"]
    assert sorted((run / "checkpoints").iterdir()) == seen["checkpoints"]
    assert "another process has taken over" in caplog.text
    # The loser's training went on and is bitwise the same.
    ours, theirs = (policy.model.state_dict() for policy in (first, seen["second"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
