"""What a diagnosis says of tokens, classes and checks, word for word."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import finding, judge, ramp
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


def test_a_short_run_is_told_what_a_verdict_needs(tmp_path: Path) -> None:
    short = np.full(4, 0.5)
    needs = "a verdict needs at least 8"
    assert judge(tmp_path / "a", loss=short).sentence == (
        f"None of 4 steps has entropy or reward; {needs}."
    )
    for number, columns in enumerate(({"reward": short}, {"entropy": short})):
        found = judge(tmp_path / str(number), **columns)
        assert found.sentence == f"Only 4 steps; {needs} with entropy or reward."
    assert judge(tmp_path / "one", reward=short[:1]).sentence.startswith("Only 1 step; ")


@pytest.mark.parametrize(
    ("part", "where"), [(0, "the beginning"), (3, "part 4 of 8"), (7, "the end")]
)
def test_the_part_of_the_completions_that_left_the_reference_is_named(
    tmp_path: Path, part: int, where: str
) -> None:
    parts = {f"kl_positional/{n}": np.full(60, 0.05) for n in range(8)}
    parts[f"kl_positional/{part}"] = ramp(0.05, 0.6, 60, 20, 15)
    found = finding(judge(tmp_path, **parts), "kl_by_position")
    assert f"leaves the reference model at {where} of completions" in found.message
    assert f"0.6 nats a token in part {part + 1} of 8, 0.05 in the others" in found.message
    assert (found.evidence["part"], found.evidence["others"]) == (part + 1, pytest.approx(0.05))


@pytest.mark.parametrize(
    ("before", "after", "severity"),
    [(0.5, 0.7, "info"), (0.1, 0.64, "info"), (0.1, 0.75, "warning")],
)
def test_problems_that_split_into_learned_and_out_of_reach_are_a_warning_while_the_reward_gains(
    tmp_path: Path, before: float, after: float, severity: str
) -> None:
    flat, reward = ramp(before, after, 60, 20, 15), ramp(0.2, 0.7, 60, 5, 55)
    found = judge(tmp_path, reward=reward, groups_flat=flat)
    assert finding(found, "zero_signal").severity == severity
