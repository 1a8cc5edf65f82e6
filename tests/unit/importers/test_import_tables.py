"""Plain tables: token, rollout and step rows, by alias or mapping, in every file type."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.import_sources import STEPS, token_columns, write_lines
from wapo_analysis.derive import derived_columns
from wapo_analysis.errors import UserError
from wapo_analysis.importers import ImportReport, import_run, sink
from wapo_analysis.importers.run import ImportSettings
from wapo_analysis.store import open_run


def _csv(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_csv(path.with_suffix(".csv"), index=False)
    return path.with_suffix(".csv")


def _tsv(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_csv(path.with_suffix(".tsv"), index=False, sep="\t")
    return path.with_suffix(".tsv")


def _parquet(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def _jsonl(frame: pd.DataFrame, path: Path) -> Path:
    return write_lines(path.with_suffix(".jsonl"), frame.to_dict("records"))


def _json(frame: pd.DataFrame, path: Path) -> Path:
    path.with_suffix(".json").write_text(json.dumps(frame.to_dict("records")))
    return path.with_suffix(".json")


WRITERS: dict[str, Callable[[pd.DataFrame, Path], Path]] = {
    "csv": _csv, "tsv": _tsv, "parquet": _parquet, "jsonl": _jsonl, "json": _json,
}  # fmt: skip


def mapped(source: Path, out: Path, **mapping: str) -> ImportReport:
    return import_run(source, out, ImportSettings(mapping=mapping))


@pytest.mark.parametrize("kind", WRITERS)
def test_token_tables_of_every_type_give_the_same_run(kind: str, tmp_path: Path) -> None:
    columns = token_columns()
    report = import_run(WRITERS[kind](pd.DataFrame(columns), tmp_path / "t"), tmp_path / "out")
    run = open_run(tmp_path / "out")
    rows = run.tokens()
    assert rows["step"].tolist() == columns["global_step"].tolist()
    np.testing.assert_allclose(rows["logp"], columns["logprobs"], rtol=2e-5)
    np.testing.assert_allclose(rows["logp_old"], columns["old_logprobs"], rtol=2e-5)
    assert rows["rollout"].tolist() == [int(name == "y") for name in columns["sample_id"]]
    rest = columns["sum_p_sq"] - np.exp(2 * columns["logprobs"])
    np.testing.assert_allclose(rows["collision_rest"], rest, rtol=1e-3, atol=1e-7)
    assert (rows["regime"] >= 0).all(), "with a collision sum every token has a class"
    assert rows["kept"].isna().all()
    assert run.classes["tokens"].sum() == len(rows) == 200
    assert run.classes["kept"].isna().all()
    assert set(report.unknown_keys) == {"colour"}
    assert len(run.steps) == STEPS


def test_class_totals_are_those_of_the_rows(tmp_path: Path) -> None:
    columns = token_columns()
    mapped(_csv(pd.DataFrame(columns), tmp_path / "t"), tmp_path / "out")
    run = open_run(tmp_path / "out")
    rows = run.tokens()
    found = run.classes.groupby(["step", "cls"])["tokens"].sum()
    assert found.to_dict() == rows.groupby(["step", "cls"]).size().to_dict()


def test_names_of_the_users_own(tmp_path: Path) -> None:
    frame = pd.DataFrame(token_columns()).rename(
        columns={"logprobs": "lp", "advantages": "credit", "global_step": "when"}
    )
    source = _csv(frame, tmp_path / "t")
    with pytest.raises(UserError, match="nothing to import"):
        mapped(source, tmp_path / "a")
    report = mapped(source, tmp_path / "b", logp="lp", advantage="credit", step="when")
    assert report.token_rows == 200
    with pytest.raises(UserError, match="--map step=NAME"):
        mapped(source, tmp_path / "c", logp="lp", advantage="credit")
    with pytest.raises(
        UserError, match="unknown name of .* in --map 'absent'; allowed: colour, credit"
    ):
        mapped(source, tmp_path / "d", logp="lp", advantage="credit", step="when", coef="absent")
    with pytest.raises(UserError, match="unknown column 'lgop'; did you mean 'logp'"):
        mapped(source, tmp_path / "e", lgop="lp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "t.csv"], "failures leave nothing"


def test_a_mapping_goes_before_the_known_name(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward": 1.0, "true_reward": 0.25, "entropy": 1.0}]
    mapped(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out", reward="true_reward")
    steps = open_run(tmp_path / "out").steps
    assert steps["reward"].tolist() == [0.25]
    assert steps["table/reward"].tolist() == [1.0]


def test_completions_with_aligned_lists(tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "step": 1, "prompt_id": "p", "token_ids": [5, 6, 7, 8], "mask": [0, 1, 1, 1],
        "logprobs": [-9.0, -0.5, float("nan"), -0.25], "advantages": -0.5,
    }  # fmt: skip
    bad = record | {"logprobs": [-1.0]}
    source = write_lines(tmp_path / "t.jsonl", [record, bad, record])
    report = mapped(source, tmp_path / "out")
    rows = open_run(tmp_path / "out").tokens()
    assert rows["token_id"].tolist() == [6, 7, 8, 6, 7, 8]
    assert rows["position"].tolist() == [0, 1, 2, 0, 1, 2]
    assert rows["rollout"].nunique() == 2
    assert rows["group"].tolist() == [0] * 6
    assert rows["logp"].isna().tolist() == [False, True, False] * 2
    assert report.broken_lines == 1
    assert "t.jsonl:2: lists of different length" in report.broken[0]
    frame = pd.DataFrame([record, record])
    frame.to_parquet(tmp_path / "t2.parquet")
    assert mapped(tmp_path / "t2.parquet", tmp_path / "out2").token_rows == 6


def test_impossible_and_missing_numbers_become_null_and_are_counted(tmp_path: Path) -> None:
    frame = pd.DataFrame({
        "step": [1, 1, 1, 1, 1, 1, "x"],
        "logp": ["-0.5", "inf", "oops", "0.5", "1e-7", "-1", "-1"],
        "advantage": [1, 1, 1, 1, 1, None, 1],
    })  # fmt: skip
    report = mapped(_csv(frame, tmp_path / "t"), tmp_path / "out")
    run = open_run(tmp_path / "out")
    rows = run.tokens()
    np.testing.assert_array_equal(rows["logp"], [-0.5, np.nan, np.nan, np.nan, 0.0])
    assert dict(report.counts) == {
        "numbers that were not finite, now null": 1,
        "values that are no number, now null": 1,
        "logp above 0, now null": 1,
        "token rows without an advantage left out": 1,
        "token rows without a step left out": 1,
    }
    assert run.classes.query("prob_bin == -1")["tokens"].sum() == 3
    assert set(run.classes["regime"]) == {-1}


def test_probabilities_become_log_probabilities(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"step": [1, 1, 1], "prob": [0.5, 1.0, 0.0], "prob_old": [0.25, 1.0, 0.5], "adv": [1, 1, 1]}
    )
    report = mapped(_csv(frame, tmp_path / "t"), tmp_path / "out")
    rows = open_run(tmp_path / "out").tokens()
    np.testing.assert_allclose(rows["logp"], [np.log(0.5), 0.0, np.nan], rtol=2e-5)
    assert report.counts["prob of 0 or less, logp null"] == 1


@pytest.mark.parametrize("prob", [0.999999, 1.0, 0.5, 0.01])
def test_a_collision_sum_with_rounding_keeps_near_certain_tokens_peaks(prob: float) -> None:
    from wapo_analysis.importers.rows import clean_tokens

    total = float(np.float32(prob**2)) - 3e-8  # as float32 leaves it, below p^2
    frame = pd.DataFrame({"logp": [np.log(prob)], "collision": [total], "advantage": [1.0]})
    (rest,) = clean_tokens(frame, ImportReport("table", "x"))["collision_rest"]
    assert 0.0 <= rest <= (1 - prob) ** 2 * (1 + 1e-9)
    names = ("logp", "entropy", "collision_rest", "collision_logp_rest", "coef", "advantage",
             "logp_old", "logp_after", "entropy_after")  # fmt: skip
    columns = {name: np.full(1, np.nan) for name in names}
    columns |= {"logp": np.log([prob]), "collision_rest": np.array([rest]), "advantage": np.ones(1)}
    assert derived_columns(columns, 1.0)["regime"].tolist() == [1]


@pytest.mark.parametrize("kind", WRITERS)
def test_step_tables(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({
        "_step": [1, 2, 3, 2], "train/reward": [0.1, 0.2, 0.3, 0.9],
        "train/entropy": [1.0, None, 0.8, 0.7], "my/number": [1, 2, 3, 4],
    })  # fmt: skip
    report = mapped(WRITERS[kind](frame, tmp_path / "t"), tmp_path / "out")
    steps = open_run(tmp_path / "out").steps
    assert steps["reward"].tolist() == [0.1, 0.9, 0.3], "the last record of a step wins"
    np.testing.assert_array_equal(steps["entropy"], [1.0, 0.7, 0.8])
    assert steps["my/number"].tolist() == [1, 4, 3]
    assert report.repeated_steps == {2}
    assert report.mapped == {"reward": "train/reward", "entropy": "train/entropy"}


def test_rows_of_one_step_that_complete_each_other_are_merged(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward": 0.5}, {"step": 1, "entropy": 1.0}, {"reward": 1.0}]
    report = mapped(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert open_run(tmp_path / "out").steps[["reward", "entropy"]].values.tolist() == [[0.5, 1.0]]
    assert not report.repeated_steps
    assert report.broken == ["t.jsonl:3: no step"]


def test_rollout_tables(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "prompt": p, "response": r, "reward": x, "extra": "e"}
        for p, r, x in (("a", "1", 1.0), ("a", "2", 1.0), ("b", "3", 0.0), ("b", "4", 0.0))
    ]
    report = mapped(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    run = open_run(tmp_path / "out")
    assert run.rollouts["group"].tolist() == [0, 0, 1, 1]
    step = run.steps.iloc[0]
    assert (step["reward"], step["groups_all_right"], step["groups_all_wrong"]) == (0.5, 0.5, 0.5)
    assert set(report.unknown_keys) == {"extra"}


def test_a_csv_still_being_written_loses_only_its_half_line(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("step,reward,entropy\n1,0.5,1.25\n2,0.5\n3,0.25,1.0\n4,0.125,0.9")
    report = mapped(file, tmp_path / "out")
    steps = open_run(tmp_path / "out").steps
    assert steps["step"].tolist() == [1, 3]
    assert report.half_lines == ["t.csv"]
    assert report.broken_lines == 1
    assert "2 fields, not 3" in report.broken[0]


def test_types_that_change_late_in_a_csv_do_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wapo_analysis.importers import readers

    monkeypatch.setattr(readers, "_BLOCK", 256)
    rows = [f"{n},{n if n < 50 else f'{n}.5'}" for n in range(1, 100)]
    (tmp_path / "t.csv").write_text("\n".join(["step,reward", *rows]) + "\n")
    mapped(tmp_path / "t.csv", tmp_path / "out")
    assert open_run(tmp_path / "out").steps["reward"].tolist()[-1] == 99.5


def test_parts_add_up_however_small_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _csv(pd.DataFrame(token_columns()).sample(frac=1, random_state=0), tmp_path / "t")
    mapped(source, tmp_path / "whole")
    from wapo_analysis.importers import readers

    monkeypatch.setattr(sink, "CHUNK_ROWS", 16)
    monkeypatch.setattr(readers, "_BLOCK", 512)
    mapped(source, tmp_path / "parts")
    whole, parts = open_run(tmp_path / "whole"), open_run(tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "tokens").iterdir())) > STEPS
    pd.testing.assert_frame_equal(whole.classes, parts.classes, rtol=1e-12)
    pd.testing.assert_frame_equal(whole.steps, parts.steps, rtol=1e-12)
    assert len(whole.tokens()) == len(parts.tokens())


def test_several_files_of_one_folder_are_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    frame = pd.DataFrame(token_columns())
    _csv(frame[:120], folder / "a")
    _parquet(frame[120:], folder / "b")
    write_lines(folder / "c.jsonl", [{"step": 1, "reward": 0.75}])
    report = mapped(folder, tmp_path / "out")
    assert (report.token_rows, report.files) == (200, 3)
    assert open_run(tmp_path / "out").steps["reward"].tolist()[0] == 0.75


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.json", b"[1, 2]", "holds no records: looked for a list of objects"),
        ("t.json", b"{", "is no JSON"),
        ("t.parquet", b"PAR1 nonsense", "is broken or no Parquet"),
        ("t.csv", b"\x00\xff\xfe\n\xff\n", "t.csv"),
        ("t.jsonl", b'{"a": 1}\n', "nothing to import.*its record has no step .numbers: a."),
        ("t.jsonl", b"nonsense\n", "nothing to import.*t.jsonl:1"),
        ("t.csv", b"step,reward\n", "nothing to import"),
    ],
)
def test_a_file_that_gives_nothing_is_one_line(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        mapped(tmp_path / name, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("text", "entropy"),
    [
        ("step;reward;entropy\n1;0,25;1.234,5\n2;0,5;0,125\n", [1234.5, 0.125]),
        ('step,reward,entropy\n"1",0.25,"1,234.5"\n"2",0.5,0.125\n', [1234.5, 0.125]),
        ("step\treward\tentropy\n1\t25 %\t1.5\n2\t50%\t0.125\n", [1.5, 0.125]),
    ],
)
def test_numbers_as_other_countries_and_spreadsheets_write_them(
    tmp_path: Path, text: str, entropy: list[float]
) -> None:
    file = tmp_path / "t.csv"
    file.write_text("\ufeff" + text)
    report = mapped(file, tmp_path / "out")
    steps = open_run(tmp_path / "out").steps
    assert steps["reward"].tolist() == [0.25, 0.5]
    assert steps["entropy"].tolist() == entropy
    assert any("read as" in event for event in report.events)


def test_a_table_that_names_several_runs_asks_for_one(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    rows = [f"{run},{step},{reward}" for run, reward in (("a", 0.2), ("b", 0.8)) for step in (1, 2)]
    file.write_text("\n".join(["run,step,reward", *rows]) + "\n")
    with pytest.raises(UserError, match="holds 2 runs; choose one with --run NAME: a, b"):
        mapped(file, tmp_path / "out")
    import_run(file, tmp_path / "b", ImportSettings(run="b"))
    assert open_run(tmp_path / "b").steps["reward"].tolist() == [0.8, 0.8]


@pytest.mark.parametrize(("end", "read"), [("0.875", 4), ("0.8", 3), ("0.875\n", 4)])
def test_a_last_line_without_line_feed_counts_if_its_number_is_whole(
    tmp_path: Path, end: str, read: int
) -> None:
    file = tmp_path / "t.csv"
    file.write_text("step,reward\n1,0.125\n2,0.250\n3,0.375\n4," + end)
    report = mapped(file, tmp_path / "out")
    assert len(open_run(tmp_path / "out").steps) == read
    assert bool(report.half_lines) == (read == 3)


@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_as_powershell_writes_it(tmp_path: Path, encoding: str, mark: str) -> None:
    text = "\r\n".join(f"step:{n} - critic/score/mean:0.{n} - actor/lr:1e-6" for n in range(1, 9))
    file = tmp_path / "train.log"
    file.write_bytes((mark + text).encode(encoding))
    mapped(file, tmp_path / "out")
    assert open_run(tmp_path / "out").steps["reward"].tolist()[-1] == 0.8


def test_lines_that_end_in_returns_alone(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"step,reward\r1,0.125\r2,0.25\r3,0.375")
    mapped(file, tmp_path / "out")
    assert open_run(tmp_path / "out").steps["reward"].tolist() == [0.125, 0.25, 0.375]


def test_rows_of_an_evaluation_are_not_averaged_into_the_training(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("step,split,reward\n1,train,0.25\n1,Val,0.75\n2,train,0.5\n2,val,1.0\n")
    report = mapped(file, tmp_path / "out")
    steps = open_run(tmp_path / "out").steps
    assert steps["reward"].tolist() == [0.25, 0.5]
    assert steps["eval_reward"].tolist() == [0.75, 1.0]
    assert not report.events


def test_one_number_a_row(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    rows = [f"{step},{name},0.{step}" for step in (1, 2) for name in ("reward", "actor/entropy")]
    file.write_text("\n".join(["step,metric,value", *rows]) + "\n")
    mapped(file, tmp_path / "out")
    steps = open_run(tmp_path / "out").steps
    assert steps["reward"].tolist() == steps["entropy"].tolist() == [0.1, 0.2]


def test_numbers_that_complete_each_other_are_not_said_to_be_averaged(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("_step,_runtime,global_step,reward,eval/reward\n0,5,1,0.5,\n1,6,1,,0.25\n")
    assert not mapped(file, tmp_path / "out").events


@pytest.mark.parametrize(
    "text",
    [
        "Step\tTraining Loss\treward\n1\t0.1\t0.5\n2\t0.2\t0.75\n",
        '{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.75}\n',
        '[{"step": 1, "reward": 0.5},\n {"step": 2, "reward": 0.75}]\n',
        "[rank0]: {'step': 1, 'reward': 0.5}\n[rank0]: {'step': 2, 'reward': 0.75}\n",
        "[2026-03-01 12:00:00] step:1 - critic/score/mean:0.5 - actor/lr:1e-6\n"
        "[2026-03-01 12:01:00] step:2 - critic/score/mean:0.75 - actor/lr:1e-6\n",
    ],
)
def test_what_a_file_is_does_not_hang_on_its_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "train.log"
    file.write_text(text)
    mapped(file, tmp_path / "out")
    assert open_run(tmp_path / "out").steps["reward"].tolist() == [0.5, 0.75]
