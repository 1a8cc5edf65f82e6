"""What an import says of itself, and what counts as a number or a step."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.importers.boards import pick
from wapo_analysis.importers.jsonl import DOUBLED, REPAIRED, as_number, as_step, parse_json
from wapo_analysis.importers.report import ImportReport, say_penalty

LOG = Path("logs/train.log")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1), (np.float32(0.5), 0.5), ("30.1%", 0.301), ("1e-3", 1e-3), (Decimal("2.5"), 2.5),
        (2**53, 2**53), (2**53 + 1, 2.0**53), (-(2**60), -(2.0**60)), (10**400, None),
        ("high", None), ("%", None), (None, None), ([1], None),
    ],
)  # fmt: skip
def test_what_is_a_number(value: Any, number: Any) -> None:
    found = as_number(value)
    assert found == pytest.approx(number) if isinstance(number, float) else found == number
    assert type(found) is type(number)


@pytest.mark.parametrize(
    ("value", "step"),
    [
        (0, 0), (3.0, 3), ("3.0", 3), ("3/100", 3), ("step_12", 12), ("Iteration: 7", 7),
        (2**31 - 1, 2**31 - 1), (2**31, None), (-1, None), (1.5, None), ("nan", None),
        ("inf", None), ("x", None),
    ],
)  # fmt: skip
def test_what_is_a_step(value: Any, step: int | None) -> None:
    assert as_step(value) == step


def test_json_of_bounded_depth_and_whole_characters() -> None:
    nested: Any = 1
    for _ in range(64):
        nested = [nested]
    assert parse_json(json.dumps(nested)) == nested
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        parse_json(json.dumps([nested]))
    flat = json.dumps([[n] for n in range(70)])
    assert len(parse_json(flat)) == 70, "many brackets, no depth"
    told: list[str] = []
    assert parse_json('{"a": 1, "a": 2, "b": "\\ud800x"}', told) == {"a": 2, "b": "\ufffdx"}
    assert told == [DOUBLED, REPAIRED]
    assert parse_json('{"a": "\\ud83d\\ude00"}', told) == {"a": "\U0001f600"}, "a whole pair"
    assert len(told) == 2


def test_a_long_list_of_names_ends_with_how_many_more_there_are() -> None:
    report = ImportReport("jsonl", "train.log", steps=3, files=1, trainer="TRL")
    report.unknown_keys.update(f"k{n:02}" for n in range(12))
    names = ", ".join(f"k{n:02}" for n in range(12))
    assert report.to_text().splitlines() == [
        "jsonl: 3 steps from 1 file of train.log (TRL's names)", f"not in the run: {names}",
    ]  # fmt: skip
    report.unknown_keys.update(["k12", "k13"])
    assert report.to_text().endswith(f"{names} and 2 more (all in manifest.json)")
    report.files, report.rollouts = 2, 8
    assert report.headline().startswith("jsonl: 3 steps, 8 rollouts from 2 files of train.log")


def test_of_many_broken_lines_and_changed_values_the_first_are_named() -> None:
    report = ImportReport("jsonl", "train.log")
    for number in range(1, 26):
        report.bad_line(LOG, number, "no number")
        report.count("steps out of order", LOG, number, times=2)
    with report.record(LOG, 9):
        raise ValueError("no step\nin it")
    with report.record(LOG, 10):
        raise KeyError("step")
    assert (report.broken_lines, len(report.broken)) == (27, 20)
    assert report.broken[0] == "train.log:1: no number"
    broken, changed = report.warnings()
    assert broken == f"broken lines left out: 27 ({'; '.join(report.broken)})"
    assert changed == "steps out of order: 50 (train.log:1, train.log:2, train.log:3)"
    fresh = ImportReport("jsonl", "train.log")
    with fresh.record(LOG, 9):
        raise ValueError("no step\nin it")
    with fresh.record(LOG, 10):
        raise KeyError("step")
    assert fresh.broken == [
        "train.log:9: no step", "train.log:10: its entries have another shape",
    ]  # fmt: skip
    with pytest.raises(UserError), fresh.record(LOG, 11):
        raise UserError("ends the import")


def test_a_reward_with_a_penalty_is_told_where_it_differs_by_more_than_two_percent() -> None:
    names = {"reward": "score", "reward_penalised": "return"}
    for gap, told in ((0.015, False), (0.03, True)):
        report = ImportReport("jsonl", "train.log", mapped=dict(names))
        rows = {1: {"reward": -1.0, "reward_penalised": -1.0 - gap}, 2: {"reward": 0.5}}
        say_penalty(rows, report)
        assert bool(report.events) is told
    assert report.events == [
        "reward is score; return, which holds the KL penalty, differs from it by up to 0.03 and is "
        "reward_penalised"
    ]


def test_one_of_several_runs_is_chosen_by_its_name_or_a_part_of_it() -> None:
    runs = [f"seed-{n}" for n in range(1, 11)]
    assert pick(["only"], None, LOG) == "only"
    assert pick(runs, "seed-1", LOG) == "seed-1", "the name itself before seed-10"
    assert pick(runs, "10", LOG) == "seed-10"
    with pytest.raises(UserError, match="holds 10 runs; choose one .*seed-7, seed-8, ...$"):
        pick(runs, None, LOG)
    with pytest.raises(UserError, match="--run seed is not one of the runs in logs/train.log"):
        pick(runs, "seed", LOG)
    with pytest.raises(UserError, match="seed-7, seed-8$"):
        pick(runs[:8], None, LOG)
