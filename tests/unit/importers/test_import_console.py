"""What trainers print: which lines are records, of which step, and how a text ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers import console
from wapo_analysis.importers.console import (
    _bars_count,
    _Counter,
    _dict,
    end_in_error,
    holds_reward,
    tells,
)
from wapo_analysis.importers.report import ImportReport


def imported(tmp_path: Path, *lines: str, end: str = "\n", **mapping: str) -> Any:
    """Steps by their number, and the report, of lines that were printed."""
    (tmp_path / "t.log").write_text("\n".join(lines) + end)
    return read(tmp_path / "t.log", tmp_path / "out", **mapping)


def steps_of(tmp_path: Path, *lines: str, end: str = "\n") -> dict[int, float]:
    steps, _ = imported(tmp_path, *lines, end=end)
    return steps["reward"].dropna().to_dict()


# ---- whether a text is a log


@pytest.mark.parametrize(
    ("lines", "log"),
    [
        (["{'reward': 0.5, 'entropy': 0.4}"], True),
        (["{'reward': 0.5, 'note': 'x'}"], False),
        (["{'a': 1, 'b': 2, 'c': 'x'}"], True),
        (["reward=0.5 lr=1"] * 2, True),
        (["reward=0.5 lr=1"], False),
        (["a=1 b=2"] * 9, False),
        ([f"step={n} a=1 b=2" for n in range(3)], True),
        ([], False),
    ],
)
def test_what_shows_that_a_text_is_a_log(lines: Sequence[str], log: bool) -> None:
    assert tells(iter(lines)) is log


@pytest.mark.parametrize("lines", [3, 4])
def test_a_log_without_dicts_shows_itself_in_its_first_lines(
    lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "MAX_TELLING", 3)
    words = [f"word {n}" for n in range(lines - 2)]
    assert tells(iter([*words, "reward=0.5 lr=1", "reward=0.4 lr=1"])) is (lines == 3)
    late = [*words, "x", "{'reward': 0.5, 'entropy': 0.4}"]
    assert tells(iter(late)), "a dict may come at any line"
    assert holds_reward(iter(enumerate(late))) is (lines == 3)


def test_whether_a_log_holds_a_reward() -> None:
    assert holds_reward(enumerate(["{'loss': 0.5}", "{'reward': 0.5}"]))
    assert holds_reward(enumerate(["loss=0.5 lr=1", "reward=0.5 lr=1"]))
    assert not holds_reward(enumerate(["{'loss': 0.5}", "loss=0.5 lr=1"]))


# ---- records


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("{'loss': 0.5, 'note': 'x'}", {"loss": 0.5, "note": "x"}),
        ("{'loss': 0.5, 2: 3}", None),
        ("{'note': 'x', 'more': 'y'}", None),
        ("{'loss': (1, 2)}", None),
        ('{"loss": 0.5, "deep": {"a": null}}', {"loss": 0.5, "deep": {"a": None}}),
    ],
)
def test_a_printed_dict_is_a_record_if_it_holds_a_number(
    text: str, record: dict[str, Any] | None
) -> None:
    assert _dict(text) == record


def test_what_is_no_number_in_a_line_of_verl_is_left_out(tmp_path: Path) -> None:
    lines = [f"step:{n} - critic/score/mean:0.{n} - note:words - 7 - actor/entropy:0.4 - :3"
             for n in range(1, 5)]  # fmt: skip
    steps, report = imported(tmp_path, *lines)
    assert steps["reward"].to_dict() == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert steps["entropy"].tolist() == [0.4] * 4
    assert not report.broken
    assert not [name for name in steps.columns if "note" in name or name.endswith("/")]


def test_prime_rl_lines(tmp_path: Path) -> None:
    lines = [f"12:00:0{n} SUCCESS Step {n} | Time: {n}.5s | Reward: 0.{n} | Note: x | Entropy: 0.4"
             for n in range(1, 5)]  # fmt: skip
    steps, _ = imported(tmp_path, *lines)
    assert steps["reward"].to_dict() == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert steps["seconds"].tolist() == [1.5, 2.5, 3.5, 4.5]


def test_marks_of_ray_and_colours_are_no_part_of_a_line(tmp_path: Path) -> None:
    mark = "\x1b[36m(TaskRunner pid=4711, ip=10.0.0.1)\x1b[0m "
    assert steps_of(tmp_path, *(f"{mark}step={n} reward=0.{n} lr=1" for n in range(1, 5))) == {
        1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4,
    }  # fmt: skip


@pytest.mark.parametrize("noise", [0, 500])
def test_a_dict_over_some_lines_is_read_wherever_it_stands(noise: int, tmp_path: Path) -> None:
    words = [f"word: {n}" for n in range(noise)]
    lines = [f"step {n}: {{'reward': 0.{n},\n 'entropy':\n 0.4}}" for n in range(1, 5)]
    assert steps_of(tmp_path, *words, *lines) == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}


def test_a_dict_that_stays_open_for_too_long_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "MAX_DICT_LINES", 3)
    short = [f"step {n}: {{'reward': 0.{n}, 'entropy': 0.4}}" for n in range(2, 6)]
    never = ["step 1: {'reward': 0.1,", *(f"'x{n}': 1," for n in range(3))]
    assert list(steps_of(tmp_path, *never, *short)) == [2, 3, 4, 5]
    (tmp_path / "b").mkdir()
    closes = [*never[:3], "'entropy': 0.4", "}"]
    assert list(steps_of(tmp_path / "b", *closes[:3], closes[4], *short)) == [1, 2, 3, 4, 5]


def test_two_dicts_of_a_line_are_two_records(tmp_path: Path) -> None:
    line = "a {{'reward': 0.{0}, 'step': {0}}} b {{'note': 'x'}} c {{'reward': 0.{1}, 'step': {1}}}"
    assert steps_of(tmp_path, line.format(1, 2), line.format(3, 4)) == {
        1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4,
    }  # fmt: skip


# ---- numbers printed by name


def test_the_step_of_the_mapping_counts_records_that_name_another(tmp_path: Path) -> None:
    lines = [f"step={10 * n} tick={n} reward=0.{n} lr=1" for n in range(1, 5)]
    steps, _ = imported(tmp_path, *lines, step="tick")
    assert steps["reward"].to_dict() == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert "console/step" not in steps
    (tmp_path / "b").mkdir()
    bare = [f"tick={n} reward=0.{n} lr=1" for n in range(1, 5)]
    steps, report = imported(tmp_path / "b", *bare, step="tick")
    assert steps["reward"].to_dict() == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert (report.lines, report.events) == (4, [])


def test_records_of_fine_tuning_before_a_training_are_left_out(tmp_path: Path) -> None:
    tuning = ["{'loss': 2.5, 'mean_token_accuracy': 0.5}"] * 3
    training = [f"{{'reward': 0.{n}, 'entropy': 0.4}}" for n in range(1, 5)]
    steps, report = imported(tmp_path, *tuning, *training)
    assert steps["reward"].to_dict() == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert report.events[0] == "3 records of supervised fine-tuning left out"
    (tmp_path / "b").mkdir()
    steps, report = imported(tmp_path / "b", *tuning)
    assert len(steps) == 3
    assert not any("left out" in text for text in report.events)


def test_an_evaluation_among_training_numbers_is_a_record_of_training(tmp_path: Path) -> None:
    lines = [f"{{'reward': 0.{n}, 'eval_reward': 0.5}}" for n in range(1, 5)]
    assert steps_of(tmp_path, *lines) == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    alone = [
        line
        for n in range(1, 5)
        for line in (f"{{'reward': 0.{n}, 'kl': 0}}", "{'eval_reward': 1}")
    ]
    (tmp_path / "b").mkdir()
    steps, _ = imported(tmp_path / "b", *alone)
    assert steps["eval_reward"].to_dict() == {1: 1, 2: 1, 3: 1, 4: 1}


def test_a_record_of_settings_is_no_step(tmp_path: Path) -> None:
    lines = ["{'seed': 1, 'layers': 28}", *(f"{{'reward': 0.{n}}}" for n in range(1, 5))]
    assert steps_of(tmp_path, *lines) == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}


@pytest.mark.parametrize(
    ("bars", "count"), [([1, 2, 2], False), ([None, 1], False), ([*range(12), 11], True)]
)
def test_a_bar_may_stand_still_once_in_ten(bars: list[int | None], count: bool) -> None:
    assert _bars_count(bars) is count


def test_records_of_one_epoch_go_on() -> None:
    counter = _Counter()
    epochs = [0.1, 0.1, 0.2, 0.2, 0.1]
    steps = [counter.step({"reward": 1, "summary/epoch": e}, None) for e in epochs]
    assert steps == [1, 2, 3, 4, 1], "back where this epoch was first"


# ---- how a text ends


def test_records_in_a_last_line_of_bars_are_named_by_its_number(tmp_path: Path) -> None:
    lines = [f"{{'reward': 0.{n}, 'step': {n}}}" for n in range(1, 5)]
    last = "{'reward': 0.5, 'step': -1}\r{'reward': 0.5, 'step': 5}\r{'reward': 0.6, 'step': 6}"
    steps, report = imported(tmp_path, *lines, last, end="")
    assert steps["reward"].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert report.broken == ["t.log:5: no step"]


@pytest.mark.parametrize(
    ("last", "whole", "told"),
    [
        ("step=5 reward=0.5 lr=0.25", True, False), ("step=5 reward=0.5 lr=0.2", False, True),
        ("step=5 reward=0.5", False, True), ("step=5 reward=0.5 lr=", False, True),
        ("step=5 reward=0.5 lr=0.125", True, False), ("words", False, False),
        ("step 5", False, False),
    ],
)  # fmt: skip
def test_a_last_line_is_whole_if_it_ends_as_the_one_before(
    last: str, whole: bool, told: bool, tmp_path: Path
) -> None:
    lines = [f"step={n} reward=0.{n} lr=0.25" for n in range(1, 5)]
    steps, report = imported(tmp_path, *lines, last, end="")
    assert len(steps) == 4 + whole
    assert report.half_lines == (["t.log"] if told else [])


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["ValueError: bad"], 1), (["x", "ValueError: bad", "words: 3"], 2),
        (["ValueError: bad", "step:1 - a:1"], None), (["words"], None),
        (["RuntimeError: one", "KeyError: two"], 2),
    ],
)  # fmt: skip
def test_the_error_that_a_text_ends_in(lines: list[str], told: int | None, tmp_path: Path) -> None:
    (tmp_path / "t.log").write_text("".join(f"{line}\n" for line in lines))
    said = end_in_error(tmp_path / "t.log")
    assert said == (f"t.log ends in an error (line {told}): {lines[told - 1]}" if told else "")


def test_an_error_in_the_first_line_and_one_in_a_record(tmp_path: Path) -> None:
    lines = [f"{{'reward': 0.{n}, 'step': {n}, 'note': ' ValueError: x'}}" for n in range(1, 5)]
    _, report = imported(tmp_path, *lines)
    assert report.events == []
    (tmp_path / "t.log").write_text("ValueError: the only line\n")
    with pytest.raises(UserError, match=r"t\.log ends in an error \(line 1\): ValueError: the"):
        read(tmp_path / "t.log", tmp_path / "b")


def test_a_long_error_is_cut() -> None:
    assert len(console._error(Path("t.log"), [(1, "x" * 300)])) < 250


def test_an_unfinished_line_is_not_told_without_a_report(tmp_path: Path) -> None:
    (tmp_path / "t.log").write_text("step=1 reward=0.25\nstep=2 reward=0.")
    report = ImportReport("console", "t")
    assert len(list(console.console_lines(tmp_path / "t.log"))) == 1
    assert len(list(console.console_lines(tmp_path / "t.log", report))) == 1
    assert report.half_lines == ["t.log"]
