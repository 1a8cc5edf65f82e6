"""Damaged and strange values: one bad value costs one value, counted and named by its place."""

import json
import os
import re
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.import_sources import (
    write_lines,
    write_prime_exports,
    write_prime_monitor,
    write_trl,
    write_verl,
)
from wapo_analysis.cli import run
from wapo_analysis.diagnose import diagnose
from wapo_analysis.errors import UserError
from wapo_analysis.importers import ImportReport, import_run
from wapo_analysis.store import open_run

OFFICIAL = Path(__file__).parents[2] / "data" / "official_run"
DEEP = "[" * 4000 + "]" * 4000
HUGE = 10**400


def text_of(source: Path, out: Path) -> tuple[str, ImportReport]:
    """What the import says, which every terminal must be able to show."""
    report = import_run(source, out)
    said = report.to_text()
    said.encode()
    return said, report


# ---- tables


def test_every_value_that_no_column_can_hold_is_counted(tmp_path: Path) -> None:
    given = [(1.0, 5), ([1.0, 2], 2.5), ("good", "five"), (1e300, -(2**31) - 1), (None, None)]
    rows = [{"step": 1, "prompt": "p", "completion": "c", "reward": r, "length": n}
            for r, n in given]  # fmt: skip
    said, _ = text_of(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    found = open_run(tmp_path / "out").rollouts
    assert found["reward"].notna().tolist() == [True, False, False, False, False]
    assert found["length"].notna().tolist() == [True, False, False, False, False]
    assert "values of reward that are no number, left out: 2 (t.jsonl:2, t.jsonl:3)" in said
    assert "values of length that are no number, left out: 1 (t.jsonl:3)" in said
    assert "length that is no whole number, now null: 1" in said
    assert "reward beyond float32, now null: 1" in said
    assert "length beyond int32, now null: 1" in said
    tokens = [{"step": 1, "logp": -0.5, "advantage": a, "token_id": i}
              for a, i in ((1.0, 1), (-1e308, 2), (1.0, "the"))]  # fmt: skip
    said, _ = text_of(write_lines(tmp_path / "k.jsonl", tokens), tmp_path / "k")
    assert open_run(tmp_path / "k").tokens(derived=False)["token_id"].isna().tolist() == [0, 1]
    assert "values of token_id that are no number, left out: 1" in said
    assert "numbers that were not finite, now null: 1" in said


def test_a_missing_list_in_the_first_row_costs_that_row_alone(tmp_path: Path) -> None:
    rows = 9000
    lists: list[list[float] | None] = [[-0.5, -0.25]] * rows
    lists[0] = None
    frame = {"step": [1] * rows, "logp": lists, "advantage": [[1.0, -1.0]] * rows}
    pq.write_table(pa.table(frame), tmp_path / "l.parquet")
    _, report = text_of(tmp_path / "l.parquet", tmp_path / "out")
    assert report.token_rows == 2 * rows  # of the first both tokens have an advantage and no logp
    assert open_run(tmp_path / "out").tokens(derived=False)["logp"].isna().sum() == 2


def test_names_that_occur_twice_and_names_with_spaces(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(" step, advantage, logp , logp\n1, 1.0, -0.5, -9.0\n1, 1.0, -0.7, -9.0\n")
    said, _ = text_of(file, tmp_path / "out")
    assert "t.csv has 2 columns 'logp': the first is read, the rest is logp.2" in said
    rows = open_run(tmp_path / "out").tokens(derived=False)
    np.testing.assert_allclose(rows["logp"], [-0.5, -0.7], rtol=1e-4)
    table = pa.Table.from_arrays([pa.array([1]), pa.array([0.5]), pa.array([9.0])], names=[
        "step", "reward", "reward"])  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    said, _ = text_of(tmp_path / "t.parquet", tmp_path / "p")
    assert "2 columns 'reward'" in said
    assert open_run(tmp_path / "p").steps["reward"].tolist() == [0.5]
    (tmp_path / "t.jsonl").write_text('{"step": 1, "reward": 0.5, "reward": 0.75}\n')
    said, _ = text_of(tmp_path / "t.jsonl", tmp_path / "j")
    assert "records that give a name twice, the last is read: 1 (t.jsonl:1)" in said


def test_very_many_columns_of_one_name_take_no_time(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("step,reward" + ",x" * 5_000 + "\n1,0.5" + ",2" * 5_000 + "\n")
    said, _ = text_of(file, tmp_path / "out")
    assert "t.csv has 5000 columns 'x': the first is read, the rest are x.2 to x.5000" in said
    assert open_run(tmp_path / "out").steps["reward"].tolist() == [0.5]


def test_ids_beyond_the_column_are_numbered_and_never_merged(tmp_path: Path) -> None:
    ids = [2**40, 2**40 + 1, 7, 0]
    rows = [{"step": 1, "logp": -0.5, "advantage": 1.0, "rollout": r, "group": str(2**70), "pos": 0,
             "token_id": 2**33} for r in ids]  # fmt: skip
    said, _ = text_of(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    found = open_run(tmp_path / "out").tokens(derived=False)
    assert found["rollout"].nunique() == 4
    assert found["rollout"].tolist()[2] == 7
    assert found["group"].tolist() == [0] * 4
    assert found["token_id"].isna().all()
    assert "token_id beyond int32, now null: 4" in said


def test_numbers_of_any_size(tmp_path: Path) -> None:
    text = [f'{{"step": {n}, "reward": 0.5, "entropy": 1.0, "x": 1}}' for n in range(1, 4)]
    text += [f'{{"step": 4, "reward": {HUGE}, "entropy": 1.0, "x": {2**64}}}']
    text += ['{"step": 1e400, "reward": 1}', f'{{"step": {HUGE}, "reward": 1}}']
    text += [f'{{"step": 5, "reward": {"9" * 5000}}}']
    (tmp_path / "t.jsonl").write_text("\n".join(text) + "\n")
    said, report = text_of(tmp_path / "t.jsonl", tmp_path / "out")
    steps = open_run(tmp_path / "out").steps.set_index("step")
    assert steps["reward"].dropna().to_dict() == {1: 0.5, 2: 0.5, 3: 0.5}
    assert steps.loc[4, "table/x"] == 2.0**64
    assert report.broken == ["t.jsonl:5: no step", "t.jsonl:6: no step"]
    assert "values of reward that are no number, left out: 1 (t.jsonl:4)" in said
    assert "numbers that were not finite, now null: 1 (t.jsonl:7)" in said


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_texts_with_half_a_surrogate_pair(suffix: str, tmp_path: Path) -> None:
    rows = [{"step": 1, "prompt": "p\ud83d\ude00", "completion": f"a{c}", "reward": 1.0}
            for c in ("\ud83d", "b")]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) + "\n" if suffix == "jsonl" else f"[{','.join(lines)}]"
    (tmp_path / f"t.{suffix}").write_text(text)
    said, _ = text_of(tmp_path / f"t.{suffix}", tmp_path / "out")
    assert open_run(tmp_path / "out").rollouts["completion"].tolist() == ["a\ufffd", "ab"]
    assert open_run(tmp_path / "out").rollouts["prompt"].tolist() == ["p\U0001f600"] * 2
    assert f"texts with half a surrogate pair, now U+FFFD: 1 (t.{suffix}:1)" in said


def test_deep_json(tmp_path: Path) -> None:
    good = json.dumps({"step": 1, "reward": 0.5})
    (tmp_path / "t.jsonl").write_text(
        f'{good}\n{{"step": 2, "x": {DEEP}}}\n{good[:-1]}, "y": {DEEP}}}'
    )
    _, report = text_of(tmp_path / "t.jsonl", tmp_path / "out")
    assert report.broken == ["t.jsonl:2: nested deeper than 64 levels"]
    assert report.half_lines == ["t.jsonl"]
    (tmp_path / "t.json").write_text(f'[{{"step": 1, "x": {DEEP}}}]')
    follow = tmp_path / "two.json"
    follow.write_text('{\n "step": 1\n}\n' + DEEP * 2)
    with pytest.raises(UserError, match="is no JSON: nested deeper than 64 levels"):
        import_run(follow, tmp_path / "of-two")
    with pytest.raises(UserError, match="is no JSON: nested deeper than 64 levels"):
        import_run(tmp_path / "t.json", tmp_path / "no")


STRANGE: list[Any] = [
    None,
    {},
    [],
    [1, 2],
    {"a": [1]},
    "text",
    True,
    -1,
    2**64,
    "nan",
    "\ud800",
    1e999,
]


@pytest.mark.parametrize("column", ["step", "logp", "advantage", "rollout", "group", "entropy"])
def test_strange_values_in_token_rows_cost_their_row_or_value(column: str, tmp_path: Path) -> None:
    row: dict[str, Any] = {"step": 1, "logp": -0.5, "advantage": 1.0, "rollout": 0, "group": 0,
                           "entropy": 0.5}  # fmt: skip
    rows = [row, *(row | {column: value} for value in STRANGE), row]
    _, report = text_of(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    found = open_run(tmp_path / "out").tokens(derived=False)
    kept = found.query("step == 1 and logp == -0.5 and advantage == 1.0")
    assert len(kept) >= 2
    lost = len(rows) - len(found)
    assert lost <= report.broken_lines + sum(report.counts.values())


@pytest.mark.parametrize("column", ["step", "prompt", "completion", "reward", "response_length"])
def test_strange_values_in_rollouts_cost_their_row_or_value(column: str, tmp_path: Path) -> None:
    row: dict[str, Any] = {"step": 1, "prompt": "p", "completion": "c", "reward": 0.5,
                           "response_length": 3}  # fmt: skip
    rows = [row, *(row | {column: value} for value in STRANGE), row]
    _, report = text_of(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert len(open_run(tmp_path / "out").rollouts) >= len(rows) - report.broken_lines


def test_a_table_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        b"step,reward,note\n1,0.5,caf\xe9\n2,0.\xff5,x\n3,0.25,y,too\n4,0.75,\xeb\xb3\n5,1.0,z\n"
    )
    said, report = text_of(tmp_path / "t.csv", tmp_path / "out")
    steps = open_run(tmp_path / "out").steps.set_index("step")
    assert steps["reward"].dropna().to_dict() == {1: 0.5, 4: 0.75, 5: 1.0}
    assert "lines with bytes that are not UTF-8, now U+FFFD: 3 (t.csv:2, t.csv:3, t.csv:5)" in said
    assert report.broken == ["t.csv:4: 4 fields, not 3"]


def test_a_file_whose_name_is_no_text_and_a_copy(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    pd.DataFrame({"step": [1, 1], "logp": [-0.5, -0.25], "advantage": [1.0, 1.0]}).to_parquet(
        folder / "l.parquet"
    )
    shutil.copy(folder / "l.parquet", os.fsencode(folder) + b"/l\xff.parquet")
    said, report = text_of(folder, tmp_path / "out")
    assert report.token_rows == 2
    assert "holds the same bytes as another file: read once" in said
    for copy in range(6):
        shutil.copy(folder / "l.parquet", folder / f"m{copy}.parquet")
    said, _ = text_of(folder, tmp_path / "of-many")
    assert said.count("same bytes") == 1
    assert "7 files hold the same bytes as another file, read once: " in said
    assert run(["import", str(folder), "--out", str(tmp_path / "again")]) == 0


# ---- trainers' own files


BREAKABLE = {
    "verl metrics": (write_verl, "run.jsonl", "data"),
    "verl input": (write_verl, "rollouts/1.jsonl", "input"),
    "verl uid": (write_verl, "rollouts/1.jsonl", "uid"),
    "prime-rl logp": (write_prime_exports, "rank_1.jsonl", "trainer_logprobs"),
    "prime-rl mask": (write_prime_exports, "rank_1.jsonl", "loss_mask"),
    "annotations": (write_prime_monitor, "orchestrator.jsonl", "info"),
    "branches": (write_prime_monitor, "trainer.jsonl", "branches"),
    "stream": (write_prime_monitor, "stream.jsonl", "traces"),
}


@pytest.mark.parametrize("kind", BREAKABLE)
def test_strange_values_in_some_records_cost_those_records(kind: str, tmp_path: Path) -> None:
    write, pattern, key = BREAKABLE[kind]
    source = write(tmp_path / "source", steps=2)
    file = sorted(source.rglob(pattern))[-1]
    lines = file.read_text().splitlines()
    record = json.loads(lines[-1])
    bad = [json.dumps(record | {key: value}) for value in STRANGE]
    bad.append(json.dumps(record | {key: "DEEP"}).replace('"DEEP"', DEEP))
    file.write_text("\n".join([*lines[:1], *bad, *lines[1:]]) + "\n")
    _, report = text_of(source, tmp_path / "out")
    assert 1 <= report.broken_lines <= len(bad)
    assert report.steps == 2


def test_strange_values_in_a_trainer_state(tmp_path: Path) -> None:
    source = write_trl(tmp_path / "t", steps=40)
    file = source / "checkpoint-40" / "trainer_state.json"
    state = json.loads(file.read_text())
    for place, value in enumerate(STRANGE):
        state["log_history"][place]["reward"] = value
    state["log_history"] += STRANGE
    file.write_text(json.dumps(state, default=str))
    said, report = text_of(source, tmp_path / "out")
    assert report.steps == 40
    assert "values of reward that are no number, left out: 4 (trainer_state.json:3" in said
    assert report.counts["numbers that were not finite, now null"] == 2
    file.write_text(json.dumps(state, default=str).replace('"text"', DEEP))
    _, report = text_of(source, tmp_path / "deep")
    assert report.steps == 40, "the completions and the older checkpoint"
    assert report.broken == ["trainer_state.json:1: not a trainer state"]


def arrays() -> dict[str, Any]:
    return {
        "infinite": np.array([np.inf] * 5), "empty": np.array([]), "texts": np.array(["a"] * 5),
        "bytes": np.array([b"a"] * 5), "dates": np.array(["2020-01-01"] * 5, "datetime64[D]"),
        "matrix": np.ones((5, 5)), "short": np.ones(3), "negative": -np.ones(5),
        "complex": np.ones(5, complex), "nothing": None,
    }  # fmt: skip


FILES = ("token_count/step_1.npz", "grad_mass/step_0.npz", "token_strength/coarse_step_1.npz",
         "scatter_step_1.npz", "rewards/reward_step_1.npy")  # fmt: skip


@pytest.mark.parametrize("name", arrays())
def test_strange_arrays_of_the_official_trainer(name: str, tmp_path: Path) -> None:
    source = tmp_path / "o"
    shutil.copytree(OFFICIAL, source)
    value = arrays()[name]
    for pattern in FILES:
        (file,) = source.rglob(f"data/{pattern}")
        if value is None:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif file.suffix == ".npy":
            np.save(file, value)
        else:
            stored = dict(np.load(file))
            first = "advantages" if "advantages" in stored else "pos"
            np.savez(file, **(stored | {first: value}))
    said, report = text_of(source, tmp_path / "out")
    assert report.steps == 6
    fine = {"negative": FILES, "short": FILES[-1:]}.get(name, ())
    for pattern in set(FILES) - set(fine):
        assert f"{Path(pattern).name}:1: " in said, "the file is named"


def test_an_archive_that_unpacks_to_more_than_it_may_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    from wapo_analysis.importers import official

    monkeypatch.setattr(official, "MAX_ARRAY_BYTES", 1 << 20)
    source = tmp_path / "o"
    shutil.copytree(OFFICIAL, source)
    (file,) = source.rglob("data/scatter_step_1.npz")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("advantages.npy", "w", force_zip64=True) as stream:
            stream.write(bytes(2 << 20))
    said, _ = text_of(source, tmp_path / "out")
    assert "scatter_step_1.npz:1: not readable (larger than 1 MiB unpacked)" in said


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        import_run(tmp_path / "pipe.jsonl", tmp_path / "out")
    write_lines(tmp_path / "m.jsonl", [{"step": 1, "reward": 0.5}])
    assert import_run(tmp_path, tmp_path.parent / "beside").steps == 1


def test_pipe_inside_a_folder_costs_that_file_alone(tmp_path: Path) -> None:
    source = tmp_path / "o"
    shutil.copytree(OFFICIAL, source)
    (file,) = source.rglob("data/scatter_step_1.npz")
    file.unlink()
    os.mkfifo(file)
    said, _ = text_of(source, tmp_path / "out")
    assert "scatter_step_1.npz:1: not readable" in said
    assert "no regular file" in said


def test_importers_open_regular_files_only() -> None:
    from wapo_analysis.importers import readers

    for module in Path(readers.__file__).parent.glob("*.py"):
        text = module.read_text()
        assert not re.findall(r'\.open\("rb"\)|\.read_bytes\(', text), module.name


def test_parquet_whose_names_are_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "l.parquet"
    pq.write_table(pa.table({"reward_mean": [0.1, 0.2]}), file)
    file.write_bytes(file.read_bytes().replace(b"reward_mean", b"\xe5eward_mean"))
    with pytest.raises(UserError, match="broken or no Parquet"):
        import_run(file, tmp_path / "out")


def test_numbers_whose_squares_overflow_are_judged_all_the_same(tmp_path: Path) -> None:
    rows = [{"step": n, "reward": (-1) ** n * 1e200, "loss": 1e300} for n in range(1, 30)]
    write_lines(tmp_path / "m.jsonl", rows)
    import_run(tmp_path / "m.jsonl", tmp_path / "out")
    assert diagnose(open_run(tmp_path / "out")).sentence


@pytest.mark.parametrize(("spelled", "known"), [("31.0%", True), ("n/a", False)])
def test_a_reward_written_as_text_is_read_or_told(
    tmp_path: Path, spelled: str, known: bool
) -> None:
    log = tmp_path / "log.jsonl"
    rows = [{"step": i, "reward": spelled, "entropy": 0.5} for i in range(1, 4)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = import_run(log, tmp_path / "run")
    steps = open_run(tmp_path / "run").steps
    told = "values of reward that are no number, left out: 3"
    assert (told in "\n".join(report.warnings())) is not known
    assert (steps["reward"].eq(0.31) if known else steps["reward"].isna()).all()


def test_decimals_of_a_database_are_numbers(tmp_path: Path) -> None:
    rows = [{"step": i, "reward": Decimal("0.25"), "entropy": 0.5} for i in range(1, 4)]
    pd.DataFrame(rows).to_parquet(tmp_path / "log.parquet")
    import_run(tmp_path / "log.parquet", tmp_path / "run")
    assert open_run(tmp_path / "run").steps["reward"].eq(0.25).all()
