import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gold.__main__ import main as command
from tests.gold.compare import EXACT, Tolerance, check
from tests.gold.folders import SMALL, Case, case_paths, read_case
from tests.gold.replay import Replay, objective_config, replay_case
from tests.gold.report import GoldReport, check_folder
from wapo_analysis.errors import UserError

CASE = "s12_wapo_kept_mb1"


def gold_folder() -> Path:
    """The larger set beside the repository (or in WAPO_GOLD) where it is, else the small copy."""
    named = os.environ.get("WAPO_GOLD")
    beside = Path(named) if named else Path(__file__).parents[3] / "shared" / "gold"
    return beside if named or beside.is_dir() else SMALL


@pytest.fixture(scope="module")
def small_report() -> GoldReport:
    return check_folder(SMALL)


def test_the_small_copy_passes(small_report: GoldReport) -> None:
    assert small_report.failures == ()
    assert small_report.passed
    assert small_report.counts == "6/6 cases, 72/72 advantage rows, 16/16 hazards"


@pytest.mark.skipif(gold_folder() == SMALL, reason="no larger set here; the small one is tested")
def test_the_full_set_passes() -> None:
    report = check_folder(gold_folder())
    assert report.failures == ()
    assert report.passed
    assert len(report.groups["cases"]) == len(case_paths(gold_folder())) >= 6


def test_every_documented_quantity_is_compared(small_report: GoldReport) -> None:
    compared = {(w.quantity, w.precision) for w in small_report.worst}
    arrays = {
        tuple(name.rpartition("__")[::2])
        for case in case_paths(SMALL)
        for name in read_case(case).arrays
        if "__" in name
    }
    precision = {"f64": "float64", "f32": "float32"}
    assert {(name, precision[suffix]) for name, suffix in arrays} <= compared
    values = {
        "advantages",
        "loss_normalizer",
        "loss_multiplier_per_rank",
        "step_loss_per_rank",
        "rank0_logged_metrics",
        "rank0_bin_counts",
        "batch_metrics",
    }
    assert values <= {quantity for quantity, _ in compared}


def test_report_as_text_and_data(small_report: GoldReport) -> None:
    text = small_report.to_text()
    assert small_report.counts in text
    assert "FAILED" not in text
    assert all(w.error <= w.limit for w in small_report.worst)
    assert all(w.quantity in text and w.item in text for w in small_report.worst)


def test_the_command_tells_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([str(SMALL)]) == 0
    assert "6/6 cases, 72/72 advantage rows, 16/16 hazards" in capsys.readouterr().out
    one_case(tmp_path, nudge("mb_loss__f64", 1.1))
    assert command([str(tmp_path)]) == 1
    assert "0/1 cases" in capsys.readouterr().out
    assert command([str(tmp_path / "nowhere")]) == 2
    assert command([]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_where_nothing_is_kept_no_clipped_number_is_logged() -> None:
    case = read_case(SMALL / "s01_grpo.json")
    kept = replay_case(case, torch.float64).values["rank0_logged_metrics"]
    gates = {"mask_negative_advantages": True, "mask_positive_advantages": True}
    meta = {**case.meta, "settings": {**case.settings, **gates}}
    replay = replay_case(Case(case.name, meta, case.arrays), torch.float64)
    assert not replay.arrays["keep_mask"].any()
    names = {"clipped_tokens", "clipped_fraction", "clipped_fraction_pos", "clipped_fraction_neg"}
    assert set(kept) - set(replay.values["rank0_logged_metrics"]) == names


# --- it notices ----------------------------------------------------------------------------------


def one_case(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> GoldReport:
    """Report on a copy of one case whose arrays were changed."""
    shutil.copy(SMALL / f"{CASE}.json", folder / "renamed.json")
    with np.load(SMALL / f"{CASE}.npz") as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    change(arrays)
    np.savez(folder / "renamed.npz", **arrays)
    return check_folder(folder)


def test_file_names_are_free(tmp_path: Path) -> None:
    report = one_case(tmp_path, lambda arrays: None)
    assert report.passed
    assert report.counts == "1/1 cases"


def nudge(name: str, factor: float) -> Callable[[dict[str, np.ndarray]], None]:
    """Scale the largest number of an array a little."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        flat = arrays[name].reshape(-1)
        flat[np.abs(flat).argmax()] *= factor

    return change


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("advantages", 1 + 1e-9),
        ("seq_loss_weights", 1 + 1e-9),
        ("trainer_logprobs__f64", 1 + 1e-7),
        ("per_token_loss__f64", 1 + 1e-4),
        ("dloss_dlogp__f64", 1 + 1e-4),
        ("grad_logits__f64", 1 + 1e-2),
        ("mb_loss__f32", 1.01),
        ("mb_summary_sum__f64", 1.001),
        ("mb_counts__f64", 2),
        ("mb_token_count__f32", 2),
        ("step_token_strength_fine__f64", 1.001),
    ],
)
def test_a_wrong_number_fails_under_its_name(tmp_path: Path, name: str, factor: float) -> None:
    report = one_case(tmp_path, nudge(name, factor))
    assert not report.passed
    quantity = name.partition("__")[0]
    assert any(f"renamed: {quantity} (" in line for line in report.failures)
    assert report.counts == "0/1 cases"
    assert "FAILED renamed" in report.to_text()


@pytest.mark.parametrize("name", ["keep_mask__f64", "is_valley__f32", "is_clipped__f64"])
def test_a_wrong_mask_fails(tmp_path: Path, name: str) -> None:
    def flip(arrays: dict[str, np.ndarray]) -> None:
        row, column = arrays["shifted_loss_mask"].nonzero()
        arrays[name][row[0], column[0]] ^= 1

    assert not one_case(tmp_path, flip).passed


def test_a_missing_or_misshapen_result_fails(tmp_path: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        del arrays["mb_loss__f64"]
        arrays["entropies__f64"] = arrays["entropies__f64"][:, :-1]

    failures = one_case(tmp_path, change).failures
    assert any("mb_loss (float64): missing from the golden file" in line for line in failures)
    assert any("entropies (float64): shape" in line for line in failures)


def test_wrong_rows_fail(tmp_path: Path) -> None:
    content = json.loads((SMALL / "advantages.json").read_text())
    content["rows"][3]["out"]["advantages"][0] += 1e-6
    content["rows"][5]["out"]["loss_normalizer"] += 1
    (tmp_path / "advantages.json").write_text(json.dumps(content))
    hazards = json.loads((SMALL / "hazards.json").read_text())
    hazards["rows"][0]["out"]["loss"] = 0.0
    hazards["rows"][4]["out"]["bin_counts"]["pos_peak_kept"] += 1
    (tmp_path / "hazards.json").write_text(json.dumps(hazards))
    report = check_folder(tmp_path)
    assert report.counts == "70/72 advantage rows, 14/16 hazards"
    assert len(report.failures) == 4


# --- broken folders ------------------------------------------------------------------------------


def copy_case(folder: Path) -> tuple[Path, Path]:
    paths = folder / f"{CASE}.json", folder / f"{CASE}.npz"
    for path in paths:
        shutil.copy(SMALL / path.name, path)
    return paths


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no case"):
        check_folder(tmp_path)


@pytest.mark.parametrize(("removed", "missing"), [(0, ".json"), (1, ".npz")])
def test_half_a_case(tmp_path: Path, removed: int, missing: str) -> None:
    copy_case(tmp_path)[removed].unlink()
    with pytest.raises(UserError, match=f"'{CASE}' .* has no {missing} file"):
        check_folder(tmp_path)


def test_broken_json(tmp_path: Path) -> None:
    description, _ = copy_case(tmp_path)
    text = description.read_text()
    for broken in (text[: len(text) // 2], "[]", '{"settings": NaN}', '{"settings": {}}', "\x00"):
        description.write_text(broken)
        with pytest.raises(UserError, match=f"golden file .*{CASE}.json"):
            check_folder(tmp_path)


def test_broken_arrays(tmp_path: Path) -> None:
    _, stored = copy_case(tmp_path)
    whole = stored.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a zip file"):
        stored.write_bytes(broken)
        with pytest.raises(UserError, match=f"cannot read golden file .*{CASE}.npz"):
            check_folder(tmp_path)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    _, stored = copy_case(tmp_path)
    np.savez(stored, input_ids=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=f"cannot read golden file .*{CASE}.npz"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logits", None, "lacks logits"),
        ("rewards", lambda a: a[:-1], "shapes do not agree"),
        ("input_ids", lambda a: a[0], "shapes do not agree"),
        ("input_ids", lambda a: a + 10_000, r"targets must be in 0\.\.59"),
        ("rewards", lambda a: a * np.nan, "is not usable"),
    ],
)
def test_unusable_inputs(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray] | None, message: str
) -> None:
    def apply(arrays: dict[str, np.ndarray]) -> None:
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name])

    with pytest.raises(UserError, match=message) as caught:
        one_case(tmp_path, apply)
    assert "renamed" in str(caught.value)


def test_unknown_objective_in_a_case(tmp_path: Path) -> None:
    description, _ = copy_case(tmp_path)
    description.write_text(
        description.read_text().replace('"loss_type": "wapo"', '"loss_type": "x"')
    )
    with pytest.raises(UserError, match=f"{CASE}: unknown objective 'x'"):
        check_folder(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"rows": 3}', '{"rows": [1]}'])
@pytest.mark.parametrize("name", ["advantages.json", "hazards.json"])
def test_row_files_without_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} holds no list 'rows'"):
        check_folder(tmp_path)


def test_a_row_that_lacks_a_field(tmp_path: Path) -> None:
    (tmp_path / "hazards.json").write_text('{"rows": [{"name": "x"}]}')
    with pytest.raises(UserError, match=r"hazards.json row 0 cannot be replayed: KeyError"):
        check_folder(tmp_path)


def test_progress_names_every_item(tmp_path: Path) -> None:
    copy_case(tmp_path)
    seen: list[str] = []
    check_folder(tmp_path, progress=seen.append)
    assert seen == [CASE]


def test_errors_are_measured_against_the_tolerance() -> None:
    limit = Tolerance(1e-6, 1e-8)
    assert limit.error([1.0, 0.0], [1.0, 0.0]) == 0
    assert limit.error([1 + 0.9e-6], [1.0]) < 1e-6 < limit.error([1 + 1.1e-6], [1.0])
    assert limit.error([0.9e-8], [0.0]) < 1e-6 < limit.error([1.1e-8], [0.0])
    assert limit.error([np.nan, np.inf], [np.nan, np.inf]) == 0
    assert limit.error([np.inf], [-np.inf]) == np.inf
    assert limit.error([1.0], [np.nan]) == np.inf
    assert EXACT.error([1], [2]) == np.inf
    assert not check("mb_loss", "float64", [np.nan], [0.0]).passed


# --- safe defaults against parity ----------------------------------------------------------------


def quirk_of(case: Case, official: Replay) -> str | None:
    """Why the safe default may differ from the published code on this case, or None."""
    settings, config = case.settings, objective_config(case.settings)
    bins = config.included_classes is not None or bool(config.excluded_classes)
    advantages = official.arrays["advantages"]
    if settings["normalize_by_kept_tokens"]:
        return "kept-token normalisation"
    if bins and config.name == "gspo":
        return "GSPO gradient reaches excluded tokens"
    if bins and (advantages == 0).any():
        return "zero advantage counts as positive in bins"
    if ((advantages != 0) & (np.abs(advantages) < 1e-7)).any():
        return "rounding residue of a flat group"
    if official.values["loss_normalizer"] < settings["num_processes"]:
        return "normaliser held at one unit per rank"
    return None


SAME = ("advantages", "seq_loss_weights", "keep_mask", "grad_logits", "dloss_dlogp", "mb_loss")


def differences(folder: Path) -> tuple[dict[str, str | None], dict[str, float]]:
    """Quirk and largest difference between the two modes, per case."""
    quirks, gaps = {}, {}
    for path in case_paths(folder):
        case = read_case(path)
        official = replay_case(case, torch.float64)
        quirks[case.name] = quirk_of(case, official)
        safe = replay_case(case, torch.float64, official=False)
        tolerance = Tolerance(1e-6, 1e-8)
        errors = [tolerance.error(safe.arrays[k], official.arrays[k]) for k in SAME]
        step = "step_loss_per_rank"
        gaps[case.name] = max(*errors, tolerance.error(safe.values[step], official.values[step]))
    return quirks, gaps


@pytest.mark.skipif(gold_folder() == SMALL, reason="half of the small set has a quirk")
def test_safe_defaults_equal_parity_where_there_is_no_quirk() -> None:
    quirks, gaps = differences(gold_folder())
    plain = {name: gap for name, gap in gaps.items() if quirks[name] is None}
    assert len(plain) > len(quirks) / 2
    assert {name: gap for name, gap in plain.items() if not gap <= 1e-6} == {}


def test_quirks_of_the_small_copy_are_real() -> None:
    quirks, gaps = differences(SMALL)
    assert {name for name, quirk in quirks.items() if quirk} == {
        "s12_wapo_kept_mb1",
        "s16_wapo_flat_rounding",
        "s24_gspo_exclude",
    }
    for name, quirk in quirks.items():
        assert (gaps[name] > 1e-6) == (quirk is not None), name
