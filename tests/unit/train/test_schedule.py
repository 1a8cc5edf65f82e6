"""The learning rate of a step by hand."""

import pytest

from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.schedule import learning_rate


def rates(**settings: object) -> list[float]:
    config = TrainConfig.from_dict({"lr": 1.0, "steps": 6, **settings})
    return [learning_rate(config, step) for step in range(1, config.steps + 1)]


def test_warm_up_then_constant() -> None:
    assert rates(warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates() == [1.0] * 6


def test_linear_falls_towards_zero_and_the_last_step_still_moves() -> None:
    assert rates(lr_schedule="linear", warmup_steps=2) == pytest.approx(
        [0.5, 1, 1, 0.75, 0.5, 0.25]
    )


def test_cosine_halves_in_the_middle() -> None:
    assert rates(lr_schedule="cosine", steps=4) == pytest.approx([1, 0.8535534, 0.5, 0.1464466])


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert rates(lr_schedule="cosine", warmup_steps=12) == pytest.approx(
        [n / 12 for n in range(1, 7)]
    )
