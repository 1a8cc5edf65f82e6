"""The bench of watching runs every arm, and its numbers are times."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra [trl]")

from experiments.watching_cost import KNOBS, watching_cost
from tests.support.trl_toy import toy_trainer

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_every_arm_is_timed_against_the_plain_one() -> None:
    made = []

    def make(out: str) -> Any:
        made.append(out)
        return toy_trainer(Path(out), max_steps=3)

    costs = watching_cost(make, rounds=2)
    assert costs.keys() == KNOBS.keys()
    assert len(made) == 3 * len(KNOBS)
    assert costs["plain"].overhead == 0
    assert all(cost.seconds > 0 for cost in costs.values())
    # The toy does next to nothing itself, so watching must show.
    assert costs["full rows, scored again"].overhead > 0.05
