"""Steps of a watched TRL run: counted on, left unfinished, thinned by a preset, continued."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", minversion="1.0", reason="needs the extra [trl]")

from trl import GRPOTrainer

from tests.support.trl_toy import TEMPERATURE, run, toy_trainer
from wapo_analysis import UserError, attach, open_run
from wapo_analysis.capture.trl import DETAILS
from wapo_analysis.capture.trl.trainer import TrlTrainer
from wapo_analysis.record import on_schedule

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_second_training_counts_on(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    with attach(trainer, tmp_path / "run", token_every=1) as attachment:
        run(trainer)
        run(trainer)
    assert attachment.recorder.failure is None
    found = open_run(tmp_path / "run")
    assert found.steps["step"].tolist() == [1, 2, 3, 4]
    assert found.tokens().groupby("step").size().tolist() == [64] * 4
    assert not found.rollouts.duplicated(["step", "rollout"]).any()


class Interrupted(GRPOTrainer):
    """Its second micro-batch of the second step is one too many, once."""

    calls = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 4:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


def test_a_step_that_was_not_finished_is_no_part_of_the_next_training(tmp_path: Path) -> None:
    """Ctrl-C in a notebook, and then ``trainer.train()`` again."""
    trainer = toy_trainer(tmp_path / "out", Interrupted)
    attachment = attach(trainer, tmp_path / "run", token_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    run(trainer)
    attachment.close()
    assert attachment.recorder.failure is None
    found = open_run(tmp_path / "run")
    assert found.steps["step"].tolist() == [1, 2, 3]
    used = found.rollouts.groupby("step")
    assert used.size().tolist() == [8] * 3
    rows = found.tokens().groupby("step").size()
    assert rows.tolist() == used.length.sum().tolist() == found.steps["tokens"].tolist()
    assert not found.tokens().duplicated(["step", "rollout", "position"]).any()


@pytest.mark.parametrize(
    ("detail", "rows", "rescored"), [("totals", 0, 0), ("sampled", 1, 1), ("full", 3, 3)]
)
def test_detail_sets_what_is_written(tmp_path: Path, detail: Any, rows: int, rescored: int) -> None:
    trainer = toy_trainer(tmp_path / "out", max_steps=3)
    with attach(trainer, tmp_path / "run", detail) as attachment:
        run(trainer)
    assert attachment.recorder.failure is None
    found = open_run(tmp_path / "run")
    assert len(found.token_steps()) == rows
    assert (found.classes.groupby("step").rescored.sum() > 0).sum() == rescored
    assert found.classes.groupby("step").tokens.sum().tolist() == [64] * 3
    known = found.classes.groupby("step").pred_dentropy_sum.apply(lambda v: v.notna().all())
    assert known.tolist() == [True] + [detail == "full"] * 2


def test_before_training_the_first_step_comes_next(tmp_path: Path) -> None:
    watched = TrlTrainer(toy_trainer(tmp_path / "out"))
    assert (watched.done, watched.step, watched.rank, watched.processes) == (0, 1, 0, 1)
    assert watched.temperature == TEMPERATURE
    assert watched.loss_scale == 1.0
    assert not watched.casts_head
    assert watched.beside_logp == []
    manifest = watched.manifest(None, "mine")
    assert (manifest.name, manifest.label, manifest.seed) == ("dapo seed 3", "mine", 3)
    assert manifest.planned_steps == 2
    assert manifest.parameters == manifest.trainable_parameters
    assert manifest.vocabulary == watched.model.lm_head.weight.shape[0]
    assert manifest.objective["bounds"] == [0.8, 1.2]


@pytest.mark.parametrize(
    ("detail", "every", "rows"),
    [("totals", 0, []), ("sampled", 10, [1, 11, 21]), ("full", 1, list(range(1, 22)))],
)
def test_steps_with_rows_by_detail(detail: str, every: int, rows: list[int]) -> None:
    given = DETAILS[detail]
    assert (given["token_every"], given["rescore_every"]) == (every, every)
    assert given["exact_every"] == (every or 10)
    assert [step for step in range(1, 22) if on_schedule(step, given["token_every"])] == rows


def test_an_unknown_detail_names_those_there_are(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    with pytest.raises(UserError, match="totals, sampled, full"):
        attach(trainer, tmp_path / "run", "everything")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_run_is_continued_from_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    """The recipe of docs/trl.md: the same run as one that was never interrupted."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings["lr_scheduler_type"] = "constant"  # else the number of steps decides
    whole = toy_trainer(tmp_path / "whole", **settings)
    with attach(whole, tmp_path / "one", token_every=1):
        expected = run(whole)
    first = toy_trainer(tmp_path / "out", **{**settings, "max_steps": 3})
    with attach(first, tmp_path / "run", token_every=1):
        run(first)
    again = toy_trainer(tmp_path / "out", **settings)
    with pytest.raises(UserError, match="resume_after=N.*resume_from_checkpoint"):
        attach(again, tmp_path / "run")
    with attach(again, tmp_path / "run", token_every=1, resume_after=2) as attachment:
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert attachment.recorder.failure is None
    found = open_run(tmp_path / "run")
    assert found.steps["step"].tolist() == [1, 2, 3, 4]
    assert found.tokens().groupby("step").size().tolist() == [64] * 4
    weights = again.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    one = open_run(tmp_path / "one")
    np.testing.assert_array_equal(found.tokens()["coef"], one.tokens()["coef"])
    assert len(found.manifest["resumed"]) == 1
    assert found.manifest["started"] <= found.manifest["resumed"][0]


def test_continuing_without_the_checkpoint_is_told_and_recorded_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = toy_trainer(tmp_path / "out")
    with attach(trainer, tmp_path / "run", token_every=1):
        run(trainer)
    again = toy_trainer(tmp_path / "again", max_steps=3)
    with caplog.at_level(logging.WARNING):
        with attach(again, tmp_path / "run", resume_after=2) as attachment:
            run(again)
    assert attachment.recorder.failure is not None
    told = [r.getMessage() for r in caplog.records if "resume_from_checkpoint" in r.getMessage()]
    assert len(told) == 1
    assert open_run(tmp_path / "run").steps["step"].tolist() == [1, 2]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "recording_failed"
