"""The shared part of prepare: runs to tidy frames."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.plots.frames import (
    MAX_TOKEN_STEPS,
    class_frame,
    finite,
    keep_labels,
    mean_over_runs,
    run_labels,
    step_frame,
    token_frame,
)
from wapo_analysis.series import evenly
from wapo_analysis.store import Run, open_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("frames")
    return [
        open_run(write_fake_run(folder / f"{name}{seed}", objective=name, seed=seed, steps=16))
        for name in ("grpo", "wapo")
        for seed in (0, 1)
    ]


def test_label_falls_back_to_the_objective(tmp_path: Path) -> None:
    named = open_run(write_fake_run(tmp_path / "a", steps=1, label="mine"))
    bare = open_run(write_fake_run(tmp_path / "b", steps=1, manifest={"label": None}))
    assert run_labels([named, bare]) == ["mine", "GRPO"]


def test_runs_of_one_label_and_two_settings_stay_apart(tmp_path: Path) -> None:
    runs = [
        open_run(write_fake_run(tmp_path / f"{lr}", steps=1, manifest={"config": {"lr": lr}}))
        for lr in (1e-4, 5e-5)
    ]
    assert run_labels(runs) == ["GRPO, lr 1e-4", "GRPO, lr 5e-5"]


def test_step_frame_keeps_every_run_apart(pair: list[Run]) -> None:
    frame = step_frame(pair, ("entropy", "reward"))
    assert list(frame.columns) == ["label", "seed", "run", "step", "entropy", "reward"]
    assert frame.groupby("run").size().tolist() == [16] * 4
    assert frame.loc[frame["run"] == 3, "seed"].unique().tolist() == [1]
    np.testing.assert_array_equal(
        frame.loc[frame["run"] == 1, "entropy"], pair[1].steps["entropy"].to_numpy()
    )


def test_infinite_and_broken_values_become_nan(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "a", steps=3)
    log = path / "steps.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[0]["entropy"], rows[1]["entropy"] = float("inf"), None
    for row in rows:
        del row["crc32"]  # as other trainers write it
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = step_frame([open_run(path)], ("entropy",))["entropy"]
    assert np.isnan(values.iloc[:2]).all()
    assert np.isfinite(values.iloc[2])
    assert finite(pd.Series(["x", 2, None])).tolist()[1] == 2.0


def test_class_frame_adds_up_to_the_table(pair: list[Run]) -> None:
    frame = class_frame(pair, ("tokens", "grad_mass"))
    for place, run in enumerate(pair):
        mine = frame[frame["run"] == place]
        assert mine["tokens"].sum() == run.classes["tokens"].sum()
        assert mine["grad_mass"].sum() == pytest.approx(run.classes["grad_mass"].sum())


def test_a_missing_statistic_stays_nan_and_never_turns_into_zero(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=2, missing=("collision_logp_rest",)))
    frame = class_frame([run], ("pred_dentropy_sum", "grad_mass"))
    assert frame["pred_dentropy_sum"].isna().all()
    assert frame["grad_mass"].notna().all()


@pytest.mark.parametrize("count", [1, 5, MAX_TOKEN_STEPS, 13, 1000])
def test_steps_spread_evenly_keep_both_ends(count: int) -> None:
    steps = list(range(1, count + 1))
    picked = evenly(steps, MAX_TOKEN_STEPS)
    assert len(picked) <= MAX_TOKEN_STEPS
    assert (picked[0], picked[-1]) == (1, count)
    assert picked == sorted(set(picked))


def test_token_frame_reads_few_steps_and_only_rescored_ones(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=30, rescore_every=10))
    assert token_frame([run], ("prob",))["step"].nunique() == MAX_TOKEN_STEPS
    scored = token_frame([run], ("dprob",), rescored=True)
    assert sorted(scored["step"].unique()) == [10, 20, 30]
    assert scored["dprob"].notna().all()


def test_token_rows_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wapo_analysis.plots.frames.MAX_TOKEN_ROWS", 100)
    run = open_run(write_fake_run(tmp_path / "a", steps=4))
    frame = token_frame([run], ("prob",))
    assert 50 < len(frame) <= 100
    assert frame["step"].nunique() == 4


def test_runs_without_rows_keep_their_label_and_place(pair: list[Run], tmp_path: Path) -> None:
    silent = open_run(write_fake_run(tmp_path / "a", steps=2, token_every=0, label="silent"))
    runs = [pair[0], silent, pair[2]]
    frame = keep_labels(token_frame(runs, ("prob",)), runs)
    assert list(dict.fromkeys(frame["label"])) == run_labels(runs)
    assert run_labels(runs) == ["GRPO", "silent", "WAPO"]
    assert frame.loc[frame["label"] == "silent", "prob"].isna().all()


def test_mean_over_runs_is_the_plain_mean(pair: list[Run]) -> None:
    frame = step_frame(pair, ("reward",))
    means = mean_over_runs(frame, ["step"])
    first = frame[(frame["label"] == "WAPO") & (frame["step"] == 5)]["reward"].mean()
    got = means[(means["label"] == "WAPO") & (means["step"] == 5)]["reward"].item()
    assert got == pytest.approx(first)


def test_shares_of_several_runs_add_up_to_one_where_some_have_no_row() -> None:
    rows = [("A", 0, 0, 0.25), ("A", 0, 1, 0.75), ("A", 1, 1, 1.0), ("A", 2, 1, np.nan)]
    frame = pd.DataFrame(rows, columns=["label", "run", "bin", "share"]).assign(seed=0, low=1.5)
    means = mean_over_runs(frame, ["bin"], ["share"]).set_index("bin")
    assert means["share"].to_dict() == {0: 0.125, 1: 0.875}, "a run without shares does not count"
    assert (means["low"] == 1.5).all()
    plain = mean_over_runs(frame, ["bin"]).set_index("bin")
    assert plain["share"][0] == 0.25


def test_no_runs_give_an_empty_frame() -> None:
    assert step_frame([], ("reward",)).empty
    assert token_frame([], ("prob",)).empty
