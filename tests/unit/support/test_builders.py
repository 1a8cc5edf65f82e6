"""The fake runs are what they claim: consistent statistics, known courses, the same every time."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.builders import DRIFTS, write_fake_run
from wapo_analysis.store import open_run
from wapo_analysis.store.files import PART_TABLES
from wapo_analysis.store.merge import compact


def test_prediction_and_measurement_agree_but_for_the_noise(tmp_path: Path) -> None:
    tokens = open_run(write_fake_run(tmp_path / "a", steps=20)).tokens()
    moved = tokens[tokens["coef"] != 0]
    for predicted, measured in (("pred_dprob", "dprob"), ("pred_dentropy", "dentropy")):
        assert np.corrcoef(moved[predicted], moved[measured])[0, 1] > 0.5


def test_statistics_belong_to_one_softmax(tmp_path: Path) -> None:
    tokens = open_run(write_fake_run(tmp_path / "a", steps=3, vocab=16)).tokens()
    assert tokens["collision"].between(1 / 16 - 1e-6, 1 + 1e-6).all()
    assert tokens["entropy"].between(0, np.log(16) + 1e-6).all()
    # Renyi entropy of order two is a lower bound of the Shannon entropy.
    assert (tokens["entropy"] >= -np.log(tokens["collision"]) - 1e-4).all()
    assert (tokens.loc[tokens["top1"], "regime"] == 1).all(), "the mode is never a valley"


def test_class_totals_are_those_of_the_token_rows(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=3))
    tokens, cells = run.tokens(), run.classes
    assert cells["tokens"].sum() == len(tokens)
    got = cells.groupby("cls")["pred_dentropy_sum"].sum()
    expected = tokens.groupby("cls")["pred_dentropy"].sum()
    np.testing.assert_allclose(got, expected[got.index], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("drift", "entropy_ratio"),
    [("healthy", (0.3, 0.9)), ("noise", (0.8, 1.25)), ("explosion", (3, 20)),
     ("collapse", (0, 0.3)), ("reward_collapse", (0.8, 1.25)), ("stalled", (0.8, 1.25)),
     ("diverged", (0.8, 1.25))],
)  # fmt: skip
def test_courses(tmp_path: Path, drift: str, entropy_ratio: tuple[float, float]) -> None:
    steps = open_run(write_fake_run(tmp_path / "a", drift=drift)).steps
    ratio = steps["entropy"].tail(8).mean() / steps["entropy"].head(8).mean()
    assert entropy_ratio[0] <= ratio <= entropy_ratio[1]
    assert steps["grad_norm"].isna().any() == (drift == "diverged")
    if drift in ("explosion", "reward_collapse", "stalled"):
        assert steps["reward"].tail(5).max() == 0
    assert set(DRIFTS) >= {drift}


def test_same_seed_same_run(tmp_path: Path) -> None:
    one, two, other = (
        open_run(write_fake_run(tmp_path / f"{i}", seed=seed, steps=3)).steps
        for i, seed in enumerate((1, 1, 2))
    )
    assert one.equals(two)
    assert not one.equals(other)


def test_include_bins_leaves_one_class_its_gradient(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=3, include_bins=("neg_peak",)))
    mass = run.classes.groupby("cls")["grad_mass"].sum()
    assert mass["neg_peak"] > 0
    assert (mass.drop("neg_peak") == 0).all()


def test_unknown_drift(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown drift 'up'; allowed: healthy"):
        write_fake_run(tmp_path / "a", drift="up")


def test_a_run_is_merged_as_compact_merges_it(tmp_path: Path) -> None:
    options = {"steps": 5, "probe_every": 2, "missing": ("entropy",), "rescore_every": 2}
    whole = write_fake_run(tmp_path / "a", **options)
    loose = write_fake_run(tmp_path / "b", **options, loose=True)
    compact(loose)
    for name in PART_TABLES:
        assert [f.name for f in (whole / name).iterdir()] == [
            f.name for f in (loose / name).iterdir()
        ]
        assert open_run(whole).table(name).equals(open_run(loose).table(name))
