"""What an import says of itself, and what counts as a number or a step."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers import sink as sinks
from wapo_analysis.importers.boards import pick
from wapo_analysis.importers.jsonl import DOUBLED, REPAIRED, as_number, as_step, parse_json
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.report import ImportReport, say_penalty
from wapo_analysis.importers.rows import filled_records
from wapo_analysis.importers.sink import Sink, StepTotals
from wapo_analysis.schema import ROLLOUTS
from wapo_analysis.store import RunWriter

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
        "jsonl: 3 steps from 1 file of train.log (TRL's names)", f"  - not in the run: {names}",
    ]  # fmt: skip
    report.unknown_keys.update(["k12"])
    assert report.to_text().endswith(f"{names} and 1 more (all in manifest.json)")
    report.unknown_keys.update(["k13"])
    assert report.to_text().endswith(f"{names} and 2 more (all in manifest.json)")
    report.files, report.rollouts = 2, 8
    assert report.headline().startswith("jsonl: 3 steps, 8 rollouts from 2 files of train.log")
    report.steps = report.rollouts = report.files = 1
    assert report.headline().startswith("jsonl: 1 step, 1 rollout from 1 file of train.log")


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


NAN = float("nan")


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([(-1, -1.015)], None), ([(-1, -1.03)], "0.03"), ([(0.5, 0.485)], "0.015"),
        ([(-50, -51)], None), ([(-50, -51), (10, 8.5), (0, 0.25)], "1.5"), ([(0.5, 0.5)], None),
        ([(0, 1e-11)], None), ([(0, 3e-11)], "3e-11"), ([(NAN, 0.5)], None), ([], None),
    ],
)  # fmt: skip
def test_a_reward_with_a_penalty_is_told_where_it_differs_by_more_than_two_percent(
    pairs: list[tuple[float, float]], told: str | None
) -> None:
    names = {"reward": "score", "reward_penalised": "return"}
    report = ImportReport("jsonl", "train.log", mapped=names)
    rows = {step: dict(zip(names, pair, strict=True)) for step, pair in enumerate(pairs)}
    say_penalty(rows | {99: {"reward": 70.0}}, report)
    assert report.events == ([] if told is None else [
        "reward is score; return, which holds the KL penalty, differs from it by up to "
        f"{told} and is reward_penalised"
    ])  # fmt: skip


def test_of_the_broken_lines_of_two_files_twenty_are_named(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name, first in (("a", 1), ("b", 31)):
        rows = [f'{{"step": {step}, "reward": 0.{step}}}\n' for step in range(first, first + 30)]
        (tmp_path / "logs" / f"{name}.jsonl").write_text("{x\n" * 15 + "".join(rows))
    _, report = read(tmp_path / "logs", tmp_path / "out")
    assert (report.broken_lines, report.lines, report.files) == (30, 90, 2)
    assert [text.split(": ")[0] for text in report.broken] == [
        *(f"a.jsonl:{n}" for n in range(1, 16)), *(f"b.jsonl:{n}" for n in range(1, 6)),
    ]  # fmt: skip


def test_one_of_several_runs_is_chosen_by_its_name_or_a_part_of_it() -> None:
    runs = [f"seed-{n}" for n in range(1, 11)]
    assert pick(["only"], None, LOG) == "only"
    assert pick(runs, "seed-1", LOG) == "seed-1", "the name itself before seed-10"
    assert pick(runs, "10", LOG) == "seed-10"
    with pytest.raises(UserError, match="holds 10 runs; choose one .*seed-7, seed-8 and 2 more$"):
        pick(runs, None, LOG)
    with pytest.raises(UserError, match="holds 10 runs that fit 'seed'; "):
        pick(runs, "seed", LOG)
    with pytest.raises(UserError, match="seed-7, seed-8$"):
        pick(runs[:8], None, LOG)


# ---- what is held until it is written


def sink_of(folder: Path) -> Sink:
    writer = RunWriter(folder / "run", {"source": "import"})
    return Sink(writer, ImportReport("table", "t"), NameTable({}), 1.0)


def test_a_column_without_a_finite_number_is_not_held(tmp_path: Path) -> None:
    given = sink_of(tmp_path)
    given.add_step(1, {"reward": NAN, "entropy": None, "kl_ref": 0.5})
    given.add_step(3, {"reward": float("inf"), "loss": 0.25})
    given.finish()
    assert given.held["steps"] == {"step", "kl_ref", "loss"}
    assert given.report.steps == 2
    nothing = sink_of(tmp_path / "other")
    nothing.finish()
    assert "steps" not in nothing.held


def tokens(count: int) -> pd.DataFrame:
    return pd.DataFrame({"step": 1, "advantage": 1.0, "logp": [-0.5] * count})


@pytest.mark.parametrize(
    ("blocks", "held"), [((3,), 3), ((4,), 0), ((2, 2), 0), ((4, 3), 3), ((5, 4), 0)]
)
def test_token_rows_wait_until_there_is_a_part_of_them(
    blocks: tuple[int, ...], held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "CHUNK_ROWS", 4)
    given = sink_of(tmp_path)
    for count in blocks:
        given.add_tokens(tokens(count))
    assert sum(map(len, given._tokens)) == held
    assert given.report.token_rows == sum(blocks) - held


@pytest.mark.parametrize(
    ("lengths", "held"),
    [((3, 3, 3), 3), ((3, 3, 4), 0), ((0, 0, 0), 3), ((0, 0, 0, 0), 0), ((10, 3, 3, 3), 3)],
)
def test_completions_wait_until_there_is_a_part_of_them_or_of_their_text(
    lengths: tuple[int, ...], held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "CHUNK_ROWS", 4)
    monkeypatch.setattr(sinks, "CHUNK_TEXT", 10)
    given = sink_of(tmp_path)
    for length in lengths:
        given.add_rollout({"step": 1, "reward": 0.5, "completion": "x" * length})
    assert len(given._rollouts) == held
    assert given.report.rollouts == len(lengths) - held


@pytest.mark.parametrize(("counts", "held"), [((4,), 4), ((5,), 0), ((2, 3), 0), ((5, 4), 4)])
def test_records_of_few_steps_wait_for_more(
    counts: tuple[int, ...], held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "CHUNK_ROWS", 4)
    given = sink_of(tmp_path)
    for step, count in enumerate(counts):
        frame = pd.DataFrame({"step": step, "reward": [0.5] * count})
        given.write_records(filled_records(ROLLOUTS, frame, given.report), step)
    waiting = [len(rows) for steps in given._waiting.values() for rows in steps.values()]
    assert sum(waiting) == held


@pytest.mark.parametrize(
    ("group", "wrong"),
    [([0, 0, 1, 1], 0.5), ([0, 0, None, None], 1.0), ([None] * 4, None), (None, None)],
)
def test_completions_of_an_unknown_prompt_are_no_group(group: Any, wrong: float | None) -> None:
    totals = StepTotals()
    frame = pd.DataFrame({"step": 1, "reward": [0.0, 0.0, 1.0, 1.0]})
    totals.add_rollouts(frame if group is None else frame.assign(group=group))
    columns = totals.columns()[1]
    assert columns["reward"] == 0.5
    assert columns.get("groups_all_wrong") == wrong


KNOWN = {"reward": 0.5, "entropy": 0.4}


@pytest.mark.parametrize(
    ("rows", "steps", "told"),
    [
        ([KNOWN], None, "its record has no step"),
        ([KNOWN, KNOWN], [1, 2], "the 2 records are counted from 1"),
        ([KNOWN | {"epoch": n} for n in (3, 4, 5)], [3, 4, 5], "epoch is read as the step"),
        ([{"speed": 2.5, "epoch": n} for n in (3, 4, 5)], None, "no record has a step"),
        ([KNOWN | {"step": 7}, KNOWN], [7], "t.jsonl:2: no step"),
    ],
)
def test_records_without_a_step_are_counted_where_there_are_two_and_a_known_number(
    rows: list[dict[str, Any]], steps: list[int] | None, told: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "t.jsonl", rows)
    if steps is None:
        with pytest.raises(UserError, match=told):
            read(file, tmp_path / "out")
        return
    found, report = read(file, tmp_path / "out")
    assert found.index.tolist() == steps
    assert any(told in text for text in [*report.events, *report.broken])


def test_of_all_broken_lines_of_several_files_the_first_twenty_are_named(tmp_path: Path) -> None:
    for rank in (0, 1):
        lines = [{"step": s, "reward": rank / 2} for s in range(1, 5)]
        file = write_lines(tmp_path / "t" / f"rank_{rank}.jsonl", lines)
        file.write_text("oops\n" * 15 + file.read_text())
    _, report = read(tmp_path / "t", tmp_path / "out")
    assert (report.broken_lines, len(report.broken)) == (30, 20)
    names = [text.split(":")[0] for text in report.broken]
    assert names == ["rank_0.jsonl"] * 15 + ["rank_1.jsonl"] * 5


def test_a_report_begins_with_nothing() -> None:
    told = ImportReport("table", "t").to_dict()
    for name in ("files", "steps", "token_rows", "rollouts", "broken_lines"):
        assert told[name] == 0, name
    assert told["said"] == ["table:  from 0 files of t"]
