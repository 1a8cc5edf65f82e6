"""Parts of an official run: states alone, files that cannot be read, how large an array may be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.importers.test_import_official import SOURCE, official
from wapo_analysis.importers import import_run
from wapo_analysis.importers import official as module
from wapo_analysis.importers.official import OfficialTree, stored_arrays
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.store import open_run


def test_from_a_checkpoint_alone_its_completions_are_found(tmp_path: Path) -> None:
    report = import_run(SOURCE / "checkpoints", tmp_path / "out")
    assert (report.format, report.steps, report.rollouts) == ("official", 6, 64)
    assert "eval/reward" in open_run(tmp_path / "out").steps


def test_a_state_outside_of_the_layout_has_nothing_beside_it(tmp_path: Path) -> None:
    state = tmp_path / "run" / "step-6" / "trainer_state.json"
    tree = OfficialTree.of((state,))
    assert (tree.run, tree.states(), tree.bins(), tree.data("*")) == (None, [state], [], [])
    assert tree.texts("completions") == []
    assert not tree.shared


@pytest.mark.parametrize("logged", [True, False])
def test_entropies_by_sign_are_explained_where_they_are_logged(
    logged: bool, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoints" / "run" / "checkpoint-1" / "trainer_state.json"
    source.parent.mkdir(parents=True)
    more = ', "entropy_pos": 0.4, "entropy_neg": 0.3' if logged else ""
    row = f'{{"step": 1, "reward": 0.5, "mismatch_kl": 0.1{more}}}'
    source.write_text(f'{{"log_history": [{row}]}}')
    report, _ = official(tmp_path)
    assert any("means over sequences" in note for note in report.notes) is logged


def test_rewards_that_cannot_be_read_are_no_rewards(tmp_path: Path) -> None:
    folder = tmp_path / "plots" / "run" / "data" / "rewards"
    folder.mkdir(parents=True)
    (folder / "reward_step_0.npy").write_bytes(b"\x93NUMPY broken")
    report, run = official(tmp_path)
    assert "reward" not in run.steps.dropna(axis=1)
    assert "pass_rate" not in run.steps.dropna(axis=1)
    assert all(text.startswith("reward_step_0.npy:1: not ") for text in report.broken)


@pytest.mark.parametrize(("more", "read"), [(0, True), (-1, False)])
@pytest.mark.parametrize("packed", [True, False])
def test_an_array_may_be_as_large_as_the_limit(
    packed: bool, more: int, read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.zeros(1000)
    np.save(tmp_path / "a.npy", values)
    size = (tmp_path / "a.npy").stat().st_size
    np.savez_compressed(tmp_path / "a.npz", a=values)
    monkeypatch.setattr(module, "MAX_ARRAY_BYTES", size + more)
    report = ImportReport("official", "t")
    found = stored_arrays(tmp_path / ("a.npz" if packed else "a.npy"), report)
    assert [(name, len(array)) for name, array in found.items()] == ([("a", 1000)] if read else [])
    assert report.files == 1
    assert bool(report.broken) is not read
    assert all("not readable (larger than 0 MiB unpacked)" in text for text in report.broken)


@pytest.mark.parametrize(
    ("arrays", "read", "told"),
    [
        ({"a": np.ones(2)}, ["a"], []),
        ({"a": np.array(["x"]), "b": np.array([True])}, ["a", "b"], []),
        ({"a": np.ones(2), "when": np.array(["2026-01-01"], "M8[D]")}, ["a"],
         ["a.npz:1: when holds datetime64[D], no numbers"]),
    ],
)  # fmt: skip
def test_only_numbers_and_texts_of_an_archive_are_read(
    arrays: dict[str, Any], read: list[str], told: list[str], tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    report = ImportReport("official", "t")
    assert list(stored_arrays(tmp_path / "a.npz", report)) == read
    assert report.broken == told


@pytest.mark.parametrize(
    ("advantages", "told"),
    [([1.0, 0.5, -1.0], False), ([1.0, 0.0, -1.0], True), ([0.0] * 3, True), ([1.0, -1.0], True)],
)
def test_a_sample_of_all_tokens_shows_whether_any_has_no_advantage(
    advantages: list[float], told: bool, tmp_path: Path
) -> None:
    counts = {"pos_peak_eligible": 2, "pos_peak_kept": 2, "neg_peak_eligible": 1,
              "neg_peak_kept": 1}  # fmt: skip
    half = np.full(len(advantages), 0.5)
    sample = {"prob_train": half, "prob_inference": half, "advantages": np.array(advantages)}
    report, run = official(tmp_path, [{"step": 0, "counts": counts}], scatter_step_0=sample)
    said = "steps whose pos counts include tokens without advantage (A >= 0)"
    assert (report.counts[said] == 1) is told
    zero = run.classes.query("sign == 0")["tokens"].tolist()
    assert zero == ([] if told else [0, 0])
