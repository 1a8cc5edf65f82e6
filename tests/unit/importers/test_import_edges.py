"""Both sides of what an import decides by a number: sources just below, at and above it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.import_sources import write_lines, write_prime_monitor, write_trl, write_verl
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.printed import PrintedLog, is_log
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import (
    StepCounts,
    class_rows,
    class_table,
    clean_tokens,
    filled_records,
    numbers,
)
from wapo_analysis.importers.shapes import json_rows
from wapo_analysis.importers.steplog import StepLog
from wapo_analysis.schema import TOKENS
from wapo_analysis.store import open_run

LOG = Path("logs/train.jsonl")


# ---- what is said


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"a": 1}], r"its record has no step \(numbers: a\)"),
        ([{"a": 1}, {"b": 2}], r"its 2 records have no step \(numbers: a, b\)"),
        ([{"a": "x"}, {"b": "y"}], "its 2 records have no step and no number"),
    ],
)
def test_records_without_a_step_are_counted_and_their_numbers_named(
    rows: list[dict[str, Any]], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "more"), [("reward", ""), ("mean_return", " --map reward=mean_return")]
)
def test_where_no_record_has_a_step_the_option_that_takes_one_is_told(
    name: str, more: str, tmp_path: Path
) -> None:
    rows = [{"my_count": n, name: 0.5, "my_iter": 5 * n} for n in range(4)]
    with pytest.raises(UserError) as error:
        read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert str(error.value).endswith(
        "no record has a step (looked for step, global_step, ...); --map step=my_iter"
        f"{more} takes my_iter (0, 5, 10, ...); or one of my_count"
    )


@pytest.mark.parametrize(
    ("place", "format"), [("files/train.log", "console"), ("output.log", "console"),
                          ("files/output.log", "wandb")],
)  # fmt: skip
def test_what_wandb_keeps_of_a_terminal_is_known_by_its_folder(
    place: str, format: str, tmp_path: Path
) -> None:
    file = tmp_path / "run" / place
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"step={s} reward=0.{s} entropy=0.4\n" for s in range(1, 9)))
    steps, report = read(tmp_path / "run", tmp_path / "out")
    assert (report.format, len(steps)) == (format, 8)


def test_a_step_of_the_mapping_that_is_not_there_is_told() -> None:
    names = NameTable({"step": "mine"})
    assert names.step_key(("a", "step")) is None
    assert names.never_seen() == ["step=mine"]
    assert names.step_key(("a", "mine")) == "mine"
    assert names.never_seen() == []


@pytest.mark.parametrize(
    ("each", "told"), [(3, "holds 2 runs, a row or two of each"), (4, r"holds 2 runs; choose one")]
)
def test_a_table_of_a_few_rows_a_run_and_no_step_is_a_summary(
    each: int, told: str, tmp_path: Path
) -> None:
    rows = [{"run": name, "reward": 0.1 * n} for name in ("first", "second") for n in range(each)]
    with pytest.raises(UserError, match=told):
        read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")


def test_two_tools_in_one_folder_are_named_by_the_first_file_of_each(tmp_path: Path) -> None:
    write_trl(tmp_path / "logs" / "a")
    write_verl(tmp_path / "logs" / "b")
    told = r"mixes formats: trainer_state\.json is trl, 1\.jsonl is verl; name one of the two"
    with pytest.raises(UserError, match=told):
        read(tmp_path / "logs", tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "alarm"), [((), False), (("rejected",), True), (("rejected", "margins"), True)]
)
def test_rewards_of_chosen_and_rejected_answers_are_of_no_policy(
    more: tuple[str, ...], alarm: bool, tmp_path: Path
) -> None:
    names = [f"rewards/{name}" for name in ("chosen", *more)]
    rows = [{"step": step, "loss": 0.5, **dict.fromkeys(names, 0.1 * step)} for step in range(1, 9)]
    _, report = read(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert any("preference objective" in text for text in report.alarms) is alarm


# ---- records in other shapes


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ({"1": {"a": 2}, "2": {"a": 3}}, [{"step": 1, "a": 2}, {"step": 2, "a": 3}]),
        ({"1": {"a": 2}, "2": 3}, None),
        ({"1": {"a": 2}, "x": {"a": 3}}, None),
    ],
)
def test_records_by_number_are_all_of_them(
    value: dict[str, Any], rows: list[dict[str, Any]] | None
) -> None:
    assert json_rows(value) == (rows or [value])


def test_a_completion_of_prime_rl_is_as_long_as_what_was_sampled(tmp_path: Path) -> None:
    write_prime_monitor(tmp_path / "runs", steps=2)
    read(tmp_path / "runs", tmp_path / "out")
    assert open_run(tmp_path / "out").rollouts["length"].tolist() == [5] * 8


# ---- what a column can hold


@pytest.mark.parametrize(
    ("name", "most"),
    [("token_id", 2.0**31 - 1), ("minibatch", 2.0**15 - 1), ("kept", 1.0),
     ("entropy", float(np.finfo(np.float32).max))],
)  # fmt: skip
def test_the_largest_number_of_a_column_is_kept_and_a_larger_one_is_not(
    name: str, most: float
) -> None:
    more = most + 1 if name != "entropy" else most * 1.01
    frame = pd.DataFrame({"step": 1, "advantage": 1.0, name: [most, -more, more, 0.0]})
    report = ImportReport("table", "t")
    found = filled_records(TOKENS, frame, report)[name]
    assert float(found[0]) == most
    missing = np.isnan(found) if name == "entropy" else np.ma.getmaskarray(found)
    assert missing.tolist() == [False, True, True, False]
    (what,) = report.counts
    assert what.startswith(f"{name} beyond")
    assert report.counts[what] == 2


def test_numbers_are_those_of_float32() -> None:
    most = float(np.finfo(np.float32).max)
    given = pd.Series([most, -most, 1.01 * most, np.inf])
    np.testing.assert_array_equal(numbers(given, 4), [most, -most, np.nan, np.nan])
    report = ImportReport("table", "t")
    frame = pd.DataFrame({"step": 1, "advantage": given, "logp": -1.0})
    assert clean_tokens(frame, report)["advantage"].tolist() == [most, -most]
    assert report.counts["numbers that were not finite, now null"] == 2


def test_values_that_are_no_number_are_counted_and_a_sum_of_squares_is_kept_in_its_bounds() -> None:
    """S - p^2 lies between 0 and (1 - p)^2, here a quarter."""
    frame = pd.DataFrame({"step": 1, "advantage": 1.0, "logp": np.log(0.5),
                          "entropy": ["x", "y", None, 1.0, 2.0],
                          "collision": [0.2, 0.25, 0.375, 0.5, 0.9]})  # fmt: skip
    report = ImportReport("table", "t")
    rows = clean_tokens(frame, report)
    np.testing.assert_allclose(rows["collision_rest"], [0, 0, 0.125, 0.25, 0.25], atol=1e-15)
    assert dict(report.counts) == {"values that are no number, now null": 2}


def test_a_flag_that_is_missing_once_has_no_total_and_leaves_the_other_whole() -> None:
    frame = pd.DataFrame({"step": 1, "advantage": 1.0, "logp": -0.1, "rank": [0, 0, None, 0],
                          "kept": [True, False, None, True],
                          "clipped": [True, True, True, False]})  # fmt: skip
    report = ImportReport("table", "t")
    totals = class_rows(filled_records(TOKENS, frame, report), 1.0)
    assert totals["tokens"].tolist() == [4], "a missing rank is the first"
    assert np.ma.getmaskarray(totals["kept"]).all()
    assert totals["clipped"].tolist() == [2], "of those not known to be dropped"
    whole = class_rows(filled_records(TOKENS, frame.assign(kept=True), report), 1.0)
    assert (whole["kept"].tolist(), whole["clipped"].tolist()) == ([4], [3])


def bins(**counts: int) -> StepCounts:
    return StepCounts(bins=counts)


DROPPED = bins(neg_peak_eligible=1)


@pytest.mark.parametrize(
    ("steps", "gated"),
    [
        ([], False), ([bins(pos_peak_eligible=3)], False), ([DROPPED], True),
        ([DROPPED, bins(pos_peak_eligible=3)], True),
        ([DROPPED, bins(neg_valley_eligible=2, neg_valley_kept=1)], False),
        ([StepCounts(bins=DROPPED.bins, filtered=True)], False),
        ([DROPPED, StepCounts(bins={"neg_peak_eligible": 2, "neg_peak_kept": 2}, filtered=True)],
         True),
    ],
)  # fmt: skip
def test_a_trainer_drops_bad_answers_where_no_token_of_one_is_ever_kept(
    steps: list[StepCounts], gated: bool
) -> None:
    assert StepCounts.gated(steps) is gated


@pytest.mark.parametrize(
    ("counts", "alone"),
    [
        (bins(pos_peak_eligible=1), False),
        (StepCounts(bins={"pos_peak_eligible": 1}, sampled=1), True),
        (StepCounts(bins={"pos_peak_eligible": 2, "neg_peak_eligible": 1}, sampled=3), True),
        (StepCounts(bins={"pos_peak_eligible": 2, "neg_peak_eligible": 1}, sampled=2), False),
        (StepCounts(bins={"pos_peak_eligible": 2}, sampled=2, zeros=1), False),
        (StepCounts(bins={"pos_peak_eligible": 2}, token_count={1: np.array([1, 1])}), True),
        (StepCounts(bins={"pos_peak_eligible": 2}, token_count={1: np.array([1, 0])}), False),
    ],
)
def test_when_no_token_of_a_step_is_without_advantage(counts: StepCounts, alone: bool) -> None:
    assert counts.without_zero() is alone


COUNTED = {"pos_peak_eligible": 10, "pos_peak_kept": 6, "pos_valley_eligible": 3,
           "pos_valley_kept": 3, "neg_peak_eligible": 4}  # fmt: skip
GOOD_AND_BAD = {(-1, 1): (4, 0), (-1, 0): (0, 0)}


@pytest.mark.parametrize(
    ("sampled", "gated", "filtered", "cells", "told"),
    [
        (0, True, False, {(1, 1): (6, 6), (0, 1): (4, 0), (1, 0): (3, 3), (0, 0): (0, 0)}, 0),
        (17, True, False, {(1, 1): (10, 6), (0, 1): (0, 0), (1, 0): (3, 3), (0, 0): (0, 0)}, 0),
        (0, True, True, {(1, 1): (10, 6), (1, 0): (3, 3)}, 1),
        (0, False, False, {(1, 1): (10, 6), (1, 0): (3, 3)}, 1),
    ],
)
def test_tokens_without_advantage_are_told_apart_where_the_files_can(
    sampled: int, gated: bool, filtered: bool, cells: dict[tuple[int, int], tuple[int, int]],
    told: int,
) -> None:  # fmt: skip
    """Of a trainer that drops bad answers what it kept is good; else all may be counted as good."""
    report = ImportReport("official", "run")
    counts = StepCounts(bins=COUNTED, sampled=sampled, filtered=filtered)
    rows = class_table(2, counts, gated, report)
    names = ("sign", "regime", "tokens", "kept", "prob_bin", "step")
    found = [tuple(int(rows[name][n]) for name in names) for n in range(len(rows))]
    assert {row[:2]: row[2:4] for row in found} == cells | GOOD_AND_BAD
    assert {row[4:] for row in found} == {(-1, 2)}
    assert sum(report.counts.values()) == told


# ---- the rows of a log


def rows_of(
    *records: dict[str, Any], trainer: str | None = None
) -> tuple[ImportReport, dict[int, dict[str, Any]]]:
    log = StepLog(ImportReport("table", "logs", trainer=trainer))
    for step, record in enumerate(records, start=1):
        log.add(record, step, "table", (LOG, step))
    return log.report, log.finish(NameTable({}))


def test_rewards_of_several_held_out_sets_are_kept_beside_their_mean() -> None:
    several = {"val-core/math/reward/mean@1": 0.2, "val-core/code/reward/mean@1": 0.6}
    report, rows = rows_of(several, {"reward": 0.5})
    assert rows == {
        1: {"eval_reward": pytest.approx(0.4), "eval_reward/math": 0.2, "eval_reward/code": 0.6},
        2: {"reward": 0.5},
    }
    assert report.events == []
    assert len(report.notes) == 1
    assert report.notes[0].startswith("eval_reward is the mean of val-core/math")
    report, rows = rows_of({"val-core/math/reward/mean@1": 0.2, "reward": 0.5})
    assert rows == {1: {"eval_reward": 0.2, "reward": 0.5}}
    assert report.notes == []


def test_steps_that_hold_nothing_but_times_and_epochs_are_none() -> None:
    _, rows = rows_of({"epoch": 1, "_runtime": 3.0}, {"epoch": 1, "speed": 2}, {"reward": 1})
    assert sorted(rows) == [2, 3]
    assert rows[2] == {"table/epoch": 1, "table/speed": 2}


@pytest.mark.parametrize(("told", "trainer"), [(None, "verl"), ("TRL", "TRL")])
def test_a_trainer_that_the_files_tell_is_not_guessed(told: str | None, trainer: str) -> None:
    verl = {"actor/entropy": 0.4, "critic/score/mean": 0.5, "response_length/mean": 9.0}
    assert rows_of(verl, trainer=told)[0].trainer == trainer


def test_a_text_where_numbers_are_looked_for_is_named_and_another_is_not_in_the_run() -> None:
    report, rows = rows_of({"reward": "high", "speed": "?", "note": "x"}, {"speed": 2, "note": "y"})
    assert rows == {2: {"table/speed": 2}}
    assert dict(report.counts) == {
        "values of reward that are no number, left out": 1,
        "values of speed that are no number, left out": 1,
    }
    assert dict(report.unknown_keys) == {"note": 2}


# ---- what people print


@pytest.mark.parametrize(
    ("lines", "log"),
    [
        (["reward: 0.5"], False),
        (["reward: 0.5", "reward: 0.25"], True),
        (["reward: 0.5", "step: 1 speed: 2"], False),
        (["step 1 speed=2 size=3", "step 2 speed=2 size=3"], False),
        (["step 1 speed=2 size=3", "step 2 speed=2 size=3", "step 3 speed=2 size=3"], True),
        (["step 1 speed=2 size=3", "step 2 speed=2 size=3", "step 2 speed=2 size=3"], False),
        (["step 3 speed=2 size=3", "step 1 speed=2 size=3", "step 2 speed=2 size=3"], False),
        (["step 1 speed=2", "step 2 speed=2", "step 3 speed=2"], False),
        (["step 1 speed=2 size=3", "step 2 speed=2 size=3", "step 3 speed=2 mass=3"], False),
    ],
)
def test_a_text_is_a_log_by_two_lines_of_known_names_or_three_steps(
    lines: list[str], log: bool
) -> None:
    assert is_log(lines, lambda keys: "reward" in keys) is log


def printed(*lines: str) -> list[tuple[int | None, dict[str, float]]]:
    log = PrintedLog(lambda keys: "reward" in keys)
    for number, line in enumerate(lines, start=1):
        log.add(number, line)
    return [(record.step, record.values) for record in log.records()]


@pytest.mark.parametrize(
    ("below", "steps"),
    [
        ([(1, 2), (2, 2)], [1, 1, 2, 2]),
        ([(1, 2), (2, 3)], [None] * 5),
        ([(1, 2), (2, 3), (3, 1)], [1, 1, 2, 2, 2, 3]),
        ([(1, 3)], [None] * 3),
        ([(1, 2)], [1, 1]),
    ],
)
def test_a_heading_gives_its_step_unless_a_whole_log_stands_below(
    below: list[tuple[int, int]], steps: list[int | None]
) -> None:
    lines = [line for step, times in below
             for line in (f"=== Step {step}/9 ===", *["reward: 0.5"] * times)]  # fmt: skip
    assert printed(*lines) == [(step, {"reward": 0.5}) for step in steps]


BAR = "{}/{} [00:01<00:02, 1.2it/s, reward=0.{}]"


@pytest.mark.parametrize(
    ("bars", "found"),
    [
        ([(1, 2), (2, 2)], [(1, 1), (2, 2)]),
        ([(1, 2), (2, 2), (1, 2)], [(2, 2), (1, 3)]),
        ([(1, 2), (2, 2), (1, 2), (2, 2), (1, 2)], [(None, 2), (None, 4)]),
        ([(1, 2), (2, 2), (1, 2), (2, 2), (1, 2), (2, 2)], [(None, 2), (None, 4), (None, 6)]),
        ([(1, 2), (2, 2), (1, 3), (2, 3), (3, 3), (1, 3)], [(None, 2), (None, 5)]),
        ([(1, 4), (2, 4), (1, 4), (2, 4), (1, 4)], [(2, 4), (1, 5)]),
    ],
)
def test_a_bar_that_was_filled_twice_counts_parts_of_a_step(
    bars: list[tuple[int, int]], found: list[tuple[int | None, int]]
) -> None:
    lines = [BAR.format(place, length, n) for n, (place, length) in enumerate(bars, start=1)]
    assert printed(*lines) == [(step, {"reward": n / 10}) for step, n in found]


def test_beside_lines_that_name_their_step_bars_within_it_are_left_out() -> None:
    bars = [BAR.format(place, 2, 9) for place in (1, 2)]
    lines = [line for step in (1, 2, 3) for line in (*bars, f"step {step}: reward=0.{step}")]
    assert printed(*lines) == [(step, {"reward": step / 10}) for step in (1, 2, 3)]
