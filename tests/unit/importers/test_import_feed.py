"""Rows of a table on their way into a run: which are read, how they are counted and numbered."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run
from wapo_analysis.importers.run import ImportSettings
from wapo_analysis.importers.tables import Codes, expanded
from wapo_analysis.store import open_run

TOKEN = {"step": 1, "logp": -0.5, "advantage": 1.0}
ROLLOUT = {"step": 1, "prompt": "p", "completion": "c", "reward": 0.5}
LOGGED = "| step | reward |\n|---|---|\n| 1 | 0.125 |\n| 2 | 0.25 |\n"
OTHER = "| size | reward |\n|---|---|\n| 7 | 0.75 |\n| 8 | 1.0 |\n| 9 | 1.0 |\n"


@pytest.mark.parametrize(
    ("text", "rewards", "lines"),
    [(LOGGED, [0.125, 0.25], 2), (f"{LOGGED}\n{OTHER}", [0.125, 0.25], 2),
     (f"{OTHER}\n{LOGGED}", [0.125, 0.25], 2)],
)  # fmt: skip
def test_of_the_tables_of_a_text_those_with_steps_are_read_beside_others(
    text: str, rewards: list[float], lines: int, tmp_path: Path
) -> None:
    (tmp_path / "t.md").write_text(text)
    steps, report = read(tmp_path / "t.md", tmp_path / "out")
    assert steps["reward"].tolist() == rewards
    assert (report.lines, report.files, report.broken_lines) == (lines, 1, 0)


def test_a_table_of_a_text_without_steps_is_read_if_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "t.md").write_text(OTHER)
    steps, report = read(tmp_path / "t.md", tmp_path / "out", step="size")
    assert steps["reward"].to_dict() == {7: 0.75, 8: 1.0, 9: 1.0}
    assert report.lines == 3


def test_records_of_a_json_value_are_counted_from_one(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward": 0.5}, {"step": "x", "reward": 0.5}, {"reward": 0.5}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    _, report = read(tmp_path / "t.json", tmp_path / "out")
    assert sorted(report.broken) == ["t.json:2: no step", "t.json:3: no step"]
    assert (report.lines, report.files) == (3, 1)


def test_a_record_of_settings_alone_is_no_log_and_not_said_to_stand_beside_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "t.json").write_text('{"lr": 0.1}')
    with pytest.raises(UserError, match=r"its record has no step \(numbers: lr\)") as error:
        read(tmp_path / "t.json", tmp_path / "out")
    assert "holds settings" not in str(error.value)


# ---- tokens


@pytest.mark.parametrize("first", [None, [-0.5, -0.25]])
def test_lists_of_tokens_are_found_below_a_missing_one(first: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame({"step": [1, 1, 2], "prompt_id": ["a", "b", "a"],
                          "logp": [first, [-0.5, -0.25, -1.0], [-1.0]],
                          "advantage": [1.0, -1.0, 1.0]})  # fmt: skip
    frame.to_parquet(tmp_path / "t.parquet")
    report = import_run(tmp_path / "t.parquet", tmp_path / "out")
    found = open_run(tmp_path / "out").tokens(derived=False)
    whole = found[found["logp"].notna()]
    assert whole["logp"].tolist()[-4:] == pytest.approx([-0.5, -0.25, -1.0, -1.0], rel=1e-4)
    assert whole["position"].tolist()[-4:] == [0, 1, 2, 0]
    assert whole["group"].tolist()[-4:] == [1, 1, 1, 0]
    assert not report.broken_lines


def test_one_row_of_a_token_is_a_table_of_them(tmp_path: Path) -> None:
    report = import_run(write_lines(tmp_path / "t.jsonl", [TOKEN]), tmp_path / "out")
    assert (report.token_rows, report.steps) == (1, 1)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_names_that_are_not_in_the_run_are_counted_by_the_row(form: str, tmp_path: Path) -> None:
    rows = [TOKEN | {"colour": n} for n in range(3)]
    file = tmp_path / f"t.{form}"
    if form == "jsonl":
        write_lines(file, rows)
    else:
        pd.DataFrame(rows).to_parquet(file)
    assert import_run(file, tmp_path / "out").unknown_keys == {"colour": 3}
    lists = write_lines(tmp_path / "l.jsonl", [TOKEN | {"logp": [-1, -2], "colour": 1}] * 2)
    assert import_run(lists, tmp_path / "lists").unknown_keys == {"colour": 4}


def test_token_rows_need_a_step_of_some_name(tmp_path: Path) -> None:
    rows = [{"when": 3, "logp": -0.5, "advantage": 1.0}]
    with pytest.raises(UserError, match=r"no step; .* \(columns: when, logp, advantage\)"):
        import_run(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    settings = ImportSettings(mapping={"step": "when"})
    import_run(tmp_path / "t.jsonl", tmp_path / "out", settings)
    assert open_run(tmp_path / "out").tokens(derived=False)["step"].tolist() == [3]


# ---- rollouts


def test_rollouts_count_what_they_hold_beside_their_columns(tmp_path: Path) -> None:
    rows = [ROLLOUT | {"extra": "e"}, ROLLOUT | {"extra": "f", "reward": None},
            ROLLOUT | {"extra": 1, "reward": "x"}]  # fmt: skip
    report = import_run(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert report.unknown_keys == {"extra": 3}
    assert report.counts == {"values of reward that are no number, left out": 1}
    rewards = open_run(tmp_path / "out").rollouts["reward"]
    assert rewards.notna().tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("reason", "kept"),
    [("random", True), (None, True), ("top_k", False), ("bottom_k", False)],
)
def test_completions_that_were_kept_for_their_reward_are_no_fair_sample(
    reason: str | None, kept: bool, tmp_path: Path
) -> None:
    rows = [ROLLOUT, ROLLOUT | {"capture_reason": reason}]
    report = import_run(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert report.rollouts == 1 + kept
    told = {"completions kept for their reward, left out": ["t.jsonl:2"]}
    assert report.places == ({} if kept else told)


# ---- numbers for names


def test_a_name_keeps_its_number_whatever_comes_between() -> None:
    codes = Codes()
    given = [codes.code("group", 1, value) for value in ("a", 2, "b", 0, "a", "c", 1, "d", 7)]
    assert len(dict.fromkeys(given)) == 8, "no two names share a number"
    assert given[:5] == [0, 2, 3, 4, 0], "0 was taken by a name before it came"
    assert codes.code("group", 1, 7) == 7
    frame = pd.DataFrame({"step": [1, 1, 2], "group": [5, 3, 2**31 - 1]})
    assert Codes().apply(frame)["group"].tolist() == [5, 3, 2**31 - 1]
    beyond = frame.assign(group=[5, -1, 2**31])
    assert Codes().apply(beyond)["group"].tolist() == [5, 1, 0]


def test_a_mask_leaves_out_tokens_of_every_list() -> None:
    given = {"a": [1, 2, 3, 4], "b": 5, "loss_mask": [1, True, 0, None]}
    assert expanded(given) == {"a": [1, 2], "b": [5, 5], "position": [0, 1]}
    assert expanded({"a": [1, 2], "loss_mask": 1}) == {"a": [1, 2], "position": [0, 1]}
    assert expanded({"a": [], "b": 5}) == {"a": [], "b": [], "position": []}
