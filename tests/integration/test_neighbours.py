"""rl-doctor, rlprobe, martingale and this tool on one trainer: none disturbs another.

Needs ``rldoctor==0.2.0 rlprobe==0.1.0 martingale==0.2.0`` beside TRL; see tests/compat.
"""

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra [trl]")
pytest.importorskip("rl_doctor", reason="needs rldoctor==0.2.0")
pytest.importorskip("rlprobe", reason="needs rlprobe==0.1.0")
pytest.importorskip("martingale", reason="needs martingale==0.2.0")

from tests.compat.neighbours import STEPS, Result, train

# Warnings of four foreign packages about each other's versions are theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    out = tmp_path_factory.mktemp("neighbours")
    return {
        "plain": train(out / "plain", neighbours=False, ours=None),
        "alone": train(out / "alone", neighbours=False, ours="last"),
        "others": train(out / "others", neighbours=True, ours=None),
        "first": train(out / "first", neighbours=True, ours="first"),
        "last": train(out / "last", neighbours=True, ours="last"),
    }


@pytest.mark.parametrize("order", ["alone", "others", "first", "last"])
def test_training_is_bitwise_the_plain_one(order: str, results: dict[str, Result]) -> None:
    for name, value in results["plain"].weights.items():
        assert torch.equal(value, results[order].weights[name]), name


@pytest.mark.parametrize("order", ["first", "last"])
def test_ours_records_what_it_records_alone(order: str, results: dict[str, Result]) -> None:
    ours = results[order].ours
    assert ours == results["alone"].ours
    assert ours["failure"] is None
    assert ours["steps"] == STEPS
    assert ours["coef_missing"] == ours["unknown_class"] == 0
    assert ours["tokens"] > 0
    assert ours["logged"] > 0, "our numbers reach the trainer's own log"


@pytest.mark.parametrize("order", ["first", "last"])
def test_the_others_see_what_they_see_without_us(order: str, results: dict[str, Result]) -> None:
    together, without = results[order], results["others"]
    assert together.doctor == without.doctor
    assert together.probe == without.probe
    assert together.martingale == without.martingale
    assert together.doctor["records"] >= STEPS
    assert together.doctor["worst"] is not None, "rl-doctor judged the run"
    assert together.probe["entropies"] == STEPS
    assert together.probe["samples"] > 0
    assert together.martingale["unmatched_rows"] == 0
    assert together.martingale["scored_tokens"] == together.ours["tokens"]
