"""Of the logs that a trainer on Transformers leaves in its folder: which is read, what is said."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read, trl
from wapo_analysis.errors import UserError
from wapo_analysis.importers import ImportReport, import_run
from wapo_analysis.importers.logs import newest_state
from wapo_analysis.importers.run import ImportSettings
from wapo_analysis.store import open_run


def state(folder: Path, steps: int, **more: Any) -> Path:
    """A checkpoint's trainer state that logged some steps."""
    log = [trl(s) | {"step": s, **more} for s in range(1, steps + 1)]
    file = folder / f"checkpoint-{steps}" / "trainer_state.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"log_history": log, "global_step": steps}))
    return file


@pytest.mark.parametrize(
    ("own", "other", "kept"), [(6, 12, 6), (5, 12, 12), (4, 12, 12), (12, 4, 12), (2, 12, 12)]
)
def test_a_state_goes_before_the_trainers_own_log_if_it_holds_more_than_twice_the_steps(
    own: int, other: int, kept: int, tmp_path: Path
) -> None:
    rows = [trl(s) | {"global_step/max_steps": f"{s}/99"} for s in range(1, own + 1)]
    write_lines(tmp_path / "t" / "logging.jsonl", rows)
    state(tmp_path / "t", other)
    steps, report = read(tmp_path / "t", tmp_path / "out")
    assert len(steps) == kept
    left = {own: "logging.jsonl", other: "trainer_state.json"}
    (said,) = [note for note in report.notes if "holds the same log" in note]
    last = own + other - kept
    assert said == f"{left[last]} holds the same log up to step {last}: not read"
    assert report.trainer == ("ms-swift" if kept == own else "TRL")


@pytest.mark.parametrize("logged", [True, False])
def test_the_deviation_of_rewards_is_explained_where_it_is_logged(
    logged: bool, tmp_path: Path
) -> None:
    rows = [{n: v for n, v in trl(s).items() if logged or n != "reward_std"} | {"step": s}
            for s in range(1, 5)]  # fmt: skip
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({"log_history": rows}))
    _, report = read(file, tmp_path / "out")
    assert any("reward_std is TRL's" in note for note in report.notes) is logged


@pytest.mark.parametrize("runs", [2, 7])
def test_several_runs_in_one_folder_are_refused_and_the_first_six_are_named(
    runs: int, tmp_path: Path
) -> None:
    for n in range(runs):
        state(tmp_path / "t" / f"run{n}", 4)
    with pytest.raises(UserError, match=f"{runs} runs are here; name one of") as raised:
        import_run(tmp_path / "t", tmp_path / "out")
    assert [f"run{n}" in str(raised.value) for n in range(runs)] == [n < 6 for n in range(runs)]


def test_two_checkpoints_of_a_run_are_one_run_and_the_newest_is_read(tmp_path: Path) -> None:
    state(tmp_path / "t", 4, reward=0.1)
    state(tmp_path / "t", 8, reward=0.2)
    steps, report = read(tmp_path / "t", tmp_path / "out")
    assert steps["reward"].tolist() == [0.2] * 8
    assert report.files == 2
    assert report.lines == 12, "the records of both were looked through"


def test_a_record_of_a_state_that_cannot_be_used_is_named_by_its_place(tmp_path: Path) -> None:
    log: list[Any] = [trl(s) | {"step": s} for s in range(1, 6)]
    log[1] = "no record"
    log[3] = {"step": -1, "reward": 0.5}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    steps, report = read(tmp_path / "trainer_state.json", tmp_path / "out")
    assert steps.index.tolist() == [1, 3, 5]
    assert report.broken == ["trainer_state.json:4: no step"]


def test_a_state_without_a_log_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "trainer_state.json"
    file.write_text('{"global_step": 4}')
    with pytest.raises(UserError, match="is no trainer state: no log_history"):
        newest_state([file], ImportReport("trl", "t"))
    assert newest_state([], ImportReport("trl", "t")) == []


def completions(folder: Path, rows: list[dict[str, Any]], **log: Any) -> ImportReport:
    """Import completions, beside a log that names their reward functions if there is one."""
    lists = [{key: [value] for key, value in row.items()} for row in rows]
    write_lines(folder / "t" / "completions.jsonl", lists)
    if log:
        state(folder / "t", 1, **log)
    return import_run(folder / "t", folder / "out")


CHAT = {"step": 1, "prompt": "p", "completion": "c"}


def test_a_completion_without_any_reward_or_a_step_is_left_out(tmp_path: Path) -> None:
    rows = [CHAT | {"exact": 1.0}, CHAT | {"exact": None}, CHAT | {"step": None, "exact": 1.0},
            CHAT | {"exact": 0.0}]  # fmt: skip
    report = completions(tmp_path, rows)
    assert report.broken == [f"completions.jsonl:{n}: no step or no reward" for n in (2, 3)]
    assert open_run(tmp_path / "out").rollouts["reward"].tolist() == [1.0, 0.0]


def test_reward_functions_are_those_of_the_log(tmp_path: Path) -> None:
    """Other names with three parts, or of another statistic, name none."""
    rows = [CHAT | {"exact": 1.0, "mean": 5.0, "spread": 7.0, "note": "x"}]
    log = {"rewards/spread/std": 0.5, "rewards/mean": 1.0, "profit/spread/mean": 1.0,
           "rewards/spread/all/mean": 1.0}  # fmt: skip
    report = completions(tmp_path, rows, **log)
    assert open_run(tmp_path / "out").rollouts["reward"].tolist() == [1.0]
    assert not any("every numeric column" in note for note in report.notes)
    assert not any("plain sum" in note for note in report.notes), "of one function"
    assert dict(report.unknown_keys) == {"mean": 1, "spread": 1, "note": 1}


def test_without_a_log_every_number_of_a_completion_is_a_reward(tmp_path: Path) -> None:
    rows = [CHAT | {"a": 1.0, "b": 0.5, "advantage": 9.0, "note": "x"} for _ in range(2)]
    rows.append(CHAT | {"a": 2, "advantages": 8.0})
    report = completions(tmp_path, rows)
    found = open_run(tmp_path / "out").rollouts
    assert found["reward"].tolist() == [1.5, 1.5, 2.0]
    assert found["advantage"].tolist() == [9.0, 9.0, 8.0]
    assert any("plain sum of a, b" in note for note in report.notes)
    assert any("every numeric column" in note for note in report.notes)
    assert report.unknown_keys["note"] == 2


def test_columns_of_a_line_that_are_no_lists_hold_for_all_its_completions(tmp_path: Path) -> None:
    line = {"step": 3, "prompt": ["p", "q"], "completion": ["a", "b"], "exact": [1.0, 0.5]}
    empty = {"step": 3, "prompt": [], "completion": [], "exact": []}
    uneven = line | {"exact": [1.0]}
    write_lines(tmp_path / "t" / "completions.jsonl", [line, empty, uneven])
    report = import_run(tmp_path / "t", tmp_path / "out")
    found = open_run(tmp_path / "out").rollouts
    assert (found["step"].tolist(), found["reward"].tolist()) == ([3, 3], [1.0, 0.5])
    told = "lists of different length (completion 2, exact 1, prompt 2)"
    assert report.broken == [f"completions.jsonl:3: {told}"]


def test_what_a_verl_reward_function_added_is_a_mean_of_the_step(tmp_path: Path) -> None:
    rows = [{"input": "q", "output": "a", "gts": "a", "score": 1.0, "step": s, "acc": s + n,
             "note": "x"} for s in (1, 2) for n in (0, 1, 5)]  # fmt: skip
    rows.append({"input": "q", "output": "a", "step": 2})
    report = import_run(write_lines(tmp_path / "v" / "1.jsonl", rows), tmp_path / "out")
    assert open_run(tmp_path / "out").steps["rollouts/acc"].tolist() == [3.0, 4.0]
    assert (report.kept_keys["acc"], report.unknown_keys["note"]) == (6, 6)
    assert report.broken == ["1.jsonl:7: no step or no score"]
    assert report.mapped["reward"] == "score"


def test_a_verl_metrics_line_needs_a_step_and_its_data(tmp_path: Path) -> None:
    data = {"critic/score/mean": 0.5}
    rows = [{"step": 1, "data": data}, {"step": 2, "data": [1]}, {"data": data},
            {"step": 3, "data": data}]  # fmt: skip
    file = write_lines(tmp_path / "m.jsonl", rows)
    report = import_run(file, tmp_path / "out", ImportSettings(format="verl"))
    assert open_run(tmp_path / "out").steps["step"].tolist() == [1, 3]
    assert report.broken == [f"m.jsonl:{n}: no step or no data" for n in (2, 3)]


def test_a_log_without_a_step_reaches_none(tmp_path: Path) -> None:
    rows = [trl(s) | {"global_step/max_steps": f"{s}/99"} for s in (1, 2)]
    write_lines(tmp_path / "t" / "logging.jsonl", rows)
    for name, log in (("a", []), ("b", [{"loss": 0.5}])):
        file = tmp_path / "t" / "trainer_state.json"
        file.write_text(json.dumps({"log_history": log}))
        steps, report = read(tmp_path / "t", tmp_path / name)
        assert len(steps) == 2
        assert "trainer_state.json holds the same log up to step 0: not read" in report.notes


@pytest.mark.parametrize("name", ["completions_00001.parquet", "completions.jsonl"])
def test_completions_are_one_file_and_their_rows_count_from_one(name: str, tmp_path: Path) -> None:
    rows = {"step": [1] * 3, "prompt": ["p"] * 3, "completion": ["a", "b", "c"],
            "exact": [1.0, None, 0.5]}  # fmt: skip
    file = tmp_path / "t" / name
    file.parent.mkdir()
    if file.suffix == ".parquet":
        pq.write_table(pa.table(rows), file)
    else:
        single = {key: values[0] for key, values in rows.items()} | {"completion": "d"}
        write_lines(file, [rows, single])
    report = import_run(tmp_path / "t", tmp_path / "out")
    place = 2 if file.suffix == ".parquet" else 1
    assert (report.files, report.broken) == (1, [f"{name}:{place}: no step or no reward"])
    found = open_run(tmp_path / "out").rollouts["completion"].tolist()
    assert found == (["a", "c"] if file.suffix == ".parquet" else ["a", "c", "d"])
