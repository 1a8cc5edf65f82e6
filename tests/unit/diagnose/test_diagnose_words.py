"""What a diagnosis says of tokens, classes and checks, word for word."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import judge
from wapo_analysis.diagnose.result import Culprits, Driver


@pytest.mark.parametrize(
    ("steps", "tokens", "rollouts", "said"),
    [
        ((3,), (("1", 0.21), ("x", 0.2)), ((3, 7, 0.4),),
         "at step 3 comes from tokens '1' 21%, 'x' 20%; rollouts 7 40%."),
        ((3, 5), (("1", 0.21),), ((3, 7, 0.4), (5, 0, 0.1)),
         "at steps 3, 5 comes from tokens '1' 21%; rollouts 7 of step 3 40%, 0 of step 5 10%."),
        ((3,), (), ((3, 7, 0.03),), "at step 3 comes from rollouts 7 3%."),
        ((3,), (), ((3, 7, 0.029),), "at step 3 comes from many rollouts, none above 2.9%."),
        ((3,), (), (), "at step 3 comes from tokens that the source does not name."),
    ],
)  # fmt: skip
def test_tokens_and_rollouts_in_words(
    steps: tuple[int, ...],
    tokens: tuple[tuple[str, float], ...],
    rollouts: tuple[tuple[int, int, float], ...],
    said: str,
) -> None:
    culprits = Culprits("entropy_explosion", "neg_peak", steps, tokens, rollouts)
    assert culprits.words() == f"Predicted dH of neg_peak {said}"


@pytest.mark.parametrize(("way", "sign"), [("rise", 1), ("fall", -1)])
def test_classes_stand_with_their_sum_and_what_was_measured(
    tmp_path: Path, way: str, sign: int
) -> None:
    healthy = judge(tmp_path, reward=np.full(20, 0.5))
    drivers = (
        Driver("neg_peak", sign * 2.0, None, 1.0),
        Driver("pos_peak", -sign * 0.5, None, -0.25),
    )
    lines = [line.split() for line in replace(healthy, drivers=drivers).to_text().splitlines()]
    assert ["class", "predicted", "dH", "of", "the", way] in lines
    assert ["neg_peak", f"{sign * 2:+}", "100%"] in lines
    assert ["sum", f"{sign * 1.5:+}"] in lines
    probed = (replace(drivers[0], counterfactual_dentropy=sign * 0.125), drivers[1])
    lines = [line.split() for line in replace(healthy, drivers=probed).to_text().splitlines()]
    assert ["neg_peak", f"{sign * 2:+}", "100%", f"{sign * 0.125:+}"] in lines


def test_how_many_checks_were_not_made(tmp_path: Path) -> None:
    found = judge(tmp_path, reward=np.full(20, 0.5))
    one = replace(found, skipped=found.skipped[:1])
    assert "1 check needs what is not here: " in one.to_text()
    assert f"{len(found.skipped)} checks need what is not here: " in found.to_text()
    last = found.to_text().splitlines()[-1]
    assert last.count("(") == 5, "five kinds are named"
    kinds = {lack for skipped in found.skipped for lack in skipped.missing}
    assert len(kinds) > 5
    assert " more. Each by name: --format json." in last
    assert "more" not in one.to_text().splitlines()[-1]
