"""The taxonomy seen live: each class trained alone moves entropy its own way, 5 seeds of 5."""

from pathlib import Path

import pytest
from wapo_taxonomy import CLASSES

from experiments.class_ablation import run


@pytest.mark.slow
def test_each_class_alone_moves_entropy_as_the_taxonomy_says(tmp_path: Path) -> None:
    outcomes = run(tmp_path, seeds=5)
    for cls in CLASSES:
        mine = [o for o in outcomes if o.cls == cls]
        assert len(mine) == 5
        assert all(o.as_predicted for o in mine), mine
    for ruined in (o for o in outcomes if o.cls == "neg_peak"):
        assert ruined.reward_end < ruined.reward_start / 4, ruined
        assert ruined.entropy_end > 2 * ruined.entropy_start, ruined
