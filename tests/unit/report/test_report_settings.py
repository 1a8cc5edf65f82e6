"""The page says how a run of the built-in trainer was made."""

import shlex
from pathlib import Path

from tests.support.builders import write_fake_run
from wapo_analysis.report.data import run_data
from wapo_analysis.store import open_run
from wapo_analysis.train.config import TrainConfig


def facts(path: Path) -> dict[str, str]:
    return dict(run_data(open_run(path))["facts"])


def test_settings_off_their_default_and_the_command_that_gives_them(tmp_path: Path) -> None:
    config = TrainConfig(objective="wapo", lr=1e-4, lr_schedule="cosine", prompts_per_step=4)
    about = {"source": "built-in", "config": config.to_dict()}
    path = write_fake_run(tmp_path / "r", steps=3, manifest=about)
    told = facts(path)
    assert (told["lr"], told["lr_schedule"], told["prompts_per_step"]) == ("1e-4", "cosine", "4")
    assert "epochs" not in told
    assert shlex.split(told["made by"]) == [
        "wapo", "train", *config.options(), "--out", str(path)
    ]  # fmt: skip
    assert "--set lr_schedule=cosine" in told["made by"]


def test_what_this_version_does_not_know_is_left_out(tmp_path: Path) -> None:
    for number, about in enumerate(
        ({"source": "built-in", "config": {"of_another_version": 1}}, {"source": "trl"})
    ):
        told = facts(write_fake_run(tmp_path / str(number), steps=3, manifest=about))
        assert "made by" not in told
