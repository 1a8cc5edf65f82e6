"""What a source is taken for: one file by what it holds, a folder by what lies in it."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.support.import_sources import write_lines, write_prime_exports, write_trl, write_verl
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run
from wapo_analysis.importers.detect import _parquet_kind, detect
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.run import ImportSettings

ROWS = [{"step": n, "reward": n / 8, "entropy": 0.5} for n in range(1, 5)]
PRINTED = "".join(f"step={row['step']} reward={row['reward']} entropy=0.5\n" for row in ROWS)
TABLE = "step,reward\n1,0.125\n2,0.25\n"


def folder_of(path: Path, **files: str | list[dict[str, Any]]) -> Path:
    """A folder of files by name, ``__`` for the point; a list is written as JSON lines."""
    for name, content in files.items():
        file = path / name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            file.write_text(content)
        else:
            write_lines(file, content)
    return path


def names(files: tuple[Path, ...]) -> list[str]:
    return [file.name for file in files]


# ---- nothing, or too much


@pytest.mark.parametrize(
    ("name", "wanted", "told"),
    [
        ("absent", "auto", "nothing at .*absent"),
        ("t.csv", "cvs", r"unknown format 'cvs'.*table"),
        ("empty.csv", "auto", r"empty\.csv is empty: there is nothing"),
        ("hollow", "auto", "hollow is not a run, and is empty"),
        ("t.csv", "verl", r"nothing of format 'verl' in .*t\.csv; it looks like table"),
        ("words.txt", "verl", r"nothing of format 'verl' in .*words\.txt; looked for trainer"),
        ("hollow", "table", "is empty"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(
    name: str, wanted: str, told: str, tmp_path: Path
) -> None:
    folder_of(tmp_path, t__csv=TABLE, empty__csv="", words__txt="just words\n")
    folder_of(tmp_path / "hollow", a__csv="", b__log="")
    with pytest.raises(UserError, match=told):
        detect(tmp_path / name, wanted)


def test_a_folder_may_hold_as_many_files_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("wapo_analysis.importers.detect")  # not the function of that name
    monkeypatch.setattr(module, "MAX_FILES", 3)
    folder = folder_of(tmp_path / "f", a__csv=TABLE, b__csv="step,entropy\n1,2\n", c__txt="x")
    assert names(detect(folder).files) == ["a.csv", "b.csv"]
    (folder / "d.txt").touch()
    with pytest.raises(UserError, match="holds more than 3 files; name a part of it"):
        detect(folder)


def test_hidden_files_and_those_in_hidden_folders_are_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", t__csv=TABLE)
    (folder / ".t.csv").write_text(TABLE + "3,1\n")
    folder_of(folder / ".cache", t__csv=TABLE + "4,1\n")
    folder_of(folder / "a" / ".git" / "b", t__csv=TABLE + "5,1\n")
    assert [file.relative_to(folder).as_posix() for file in detect(folder).files] == ["t.csv"]


@pytest.mark.parametrize("suffix", [".xls", ".db", ".png", ".feather"])
def test_a_log_is_read_whatever_its_suffix_but_where_it_is_none_the_suffix_says_why(
    suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"log{suffix}"
    file.write_text(TABLE.replace(",", "\t"))
    if suffix != ".png":
        assert detect(file).format == "table"
    file.write_bytes(b"\0\1\2\3" * 9)
    with pytest.raises(UserError, match=r"is not read \(.*\): save it as CSV, JSON or Parquet"):
        detect(file)
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    file.rename(folder / file.name)
    with pytest.raises(UserError, match="no known file in .*; looked for"):
        detect(folder)


def test_three_tools_in_a_folder_are_told_by_the_first_two(tmp_path: Path) -> None:
    write_verl(tmp_path / "logs" / "a")
    write_trl(tmp_path / "logs" / "b")
    write_prime_exports(tmp_path / "logs" / "c", steps=1)
    told = r"formats: 1\.jsonl is verl, trainer_state\.json is trl; name one of the two"
    with pytest.raises(UserError, match=told):
        detect(tmp_path / "logs")


# ---- what a folder's files are


def test_tables_that_are_no_log_are_left_out_of_a_folder_unless_they_are_asked_for(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path / "f", log__csv=TABLE, prompts__csv="question,answer\n1,2\n3,4\n")
    assert names(detect(folder).files) == ["log.csv"]
    assert names(detect(folder, "table").files) == ["log.csv", "prompts.csv"]
    known = NameTable({"reward": "answer"})
    assert names(detect(folder, names=known).files) == ["log.csv", "prompts.csv"]
    (folder / "log.csv").unlink()
    assert names(detect(folder).files) == ["prompts.csv"], "what it lacks is said when it is read"


@pytest.mark.parametrize(
    ("files", "read", "told"),
    [
        ({"a__log": PRINTED, "b__log": "step=1 lr=0.5 loss=2\n" * 3}, ["a.log"], "b.log"),
        ({"a__log": PRINTED, "b__log": PRINTED}, ["a.log", "b.log"], None),
        ({"b__log": "step=1 lr=0.5 loss=2\n" * 3, "c__log": "step=1 lr=0.5 loss=3\n" * 3},
         ["b.log", "c.log"], None),
        ({"a__log": PRINTED, "b__log": "step=1 lr=0.5 loss=2\n" * 3, "x__csv": "q,a\n1,2\n"},
         ["a.log"], "b.log"),
        ({"a__log": PRINTED, "b__log": "step=1 lr=0.5 loss=2\n" * 3, "x__csv": TABLE},
         ["x.csv"], None),
        ({"a__log": PRINTED, **{f"b{n}__log": "step=1 lr=0.5 loss=2\n" * 3 for n in range(5)}},
         ["a.log"], "b0.log, b1.log, b2.log, b3.log and 1 more"),
    ],
)  # fmt: skip
def test_of_printed_logs_alone_those_with_a_reward_are_read(
    files: dict[str, str], read: list[str], told: str | None, tmp_path: Path
) -> None:
    found = detect(folder_of(tmp_path / "f", **files))
    assert names(found.files) == read
    said = [text for text in found.told if "without a reward" in text]
    assert said == ([] if told is None else [f"also there, without a reward, not read: {told}"])


@pytest.mark.parametrize(
    ("odd", "told"), [(4, "9.jsonl, 91.jsonl, 92.jsonl, 93.jsonl: named"),
                      (5, "9.jsonl, 91.jsonl, 92.jsonl, 93.jsonl and 1 more: named")],
)  # fmt: skip
def test_of_files_named_like_the_others_that_are_no_log_four_are_named(
    odd: int, told: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "f", **{f"{n}__jsonl": [{"step": n, "reward": 1}] for n in "12"})
    for n in ("9", "91", "92", "93", "94")[:odd]:
        (folder / f"{n}.jsonl").write_text(f'{{"foo": {n}}}\n')
    (said,) = detect(folder).told
    assert said.startswith(told)


@pytest.mark.parametrize(
    ("files", "format", "read", "left"),
    [
        ({"t__csv": TABLE, "a__log": PRINTED}, "table", ["t.csv"], ["a.log"]),
        ({"run__jsonl": [{"step": 1, "data": {"reward": 1}}], "t__csv": TABLE, "a__log": PRINTED,
          "s__json": '{"step": 1, "lr": 2}'}, "verl", ["run.jsonl"], ["t.csv", "a.log"]),
    ],
)  # fmt: skip
def test_beside_the_log_that_is_read_the_others_are_named(
    files: dict[str, Any], format: str, read: list[str], left: list[str], tmp_path: Path
) -> None:
    found = detect(folder_of(tmp_path / "f", **files))
    assert (found.format, names(found.files), names(found.left)) == (format, read, left)
    assert found.of("console") == ()
    with_console = detect(tmp_path / "f", "console")
    assert names(with_console.files) == names(with_console.of("console")) == ["a.log"]


def test_files_that_a_trainer_wrote_are_tables_where_these_are_asked_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", run__jsonl=[{"step": 1, "data": {"reward": 1}}],
                       empty__jsonl="", a__log=PRINTED)  # fmt: skip
    assert names(detect(folder, "table").files) == ["run.jsonl"]
    assert detect(folder, "verl").format == "verl"
    (folder / "run.jsonl").unlink()
    with pytest.raises(UserError, match="nothing of format 'table' in .*; it looks like console"):
        detect(folder, "table")
    with pytest.raises(UserError, match="nothing of format 'trl'"):
        detect(folder_of(tmp_path / "g", run__jsonl=ROWS), "trl")


def test_a_pair_of_the_same_files_is_read_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", a__csv=TABLE, b__csv=TABLE, c__csv=TABLE + "3,1\n")
    found = detect(folder)
    assert names(found.files) == ["a.csv", "c.csv"]
    assert found.told == ("b.csv holds the same bytes as another file: read once",)


# ---- what one file is


def test_a_text_that_mentions_events_of_tensorboard_is_none_of_them(tmp_path: Path) -> None:
    head = "INFO writing the first record of run 1 to its file on disk: ".ljust(70, ".")
    (tmp_path / "a.log").write_text(f"{head} brain.Event:2\n{PRINTED}")
    assert detect(tmp_path / "a.log").format == "console"


def test_a_log_that_begins_late_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("loading a shard of the model\n" * 300 + PRINTED)
    assert detect(tmp_path / "a.log").format == "console"


def test_a_binary_file_with_a_log_in_it_is_none(tmp_path: Path) -> None:
    (tmp_path / "core.bin2").write_bytes(b"\0\1\n" + PRINTED.encode())
    with pytest.raises(UserError, match="no known file"):
        detect(tmp_path / "core.bin2")
    (tmp_path / "b").write_bytes(b"\0\n| step | reward |\n| 1 | 0.5 |\n")
    with pytest.raises(UserError, match="no known file"):
        detect(tmp_path / "b")


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["step", "prompt", "completion"], "completions"),
        (["step", "prompt", "completion", "exact", "advantage"], "completions"),
        (["step", "prompt", "completion", "reward"], "table"),
        (["step", "prompt", "completion", "score"], "table"),
        (["step", "prompt", "reward"], "table"), (["step", "prompt"], "table"),
        (["step", "logp", "advantage"], "table"),
    ],
)  # fmt: skip
def test_completions_of_trl_are_told_by_their_columns(
    columns: list[str], kind: str, tmp_path: Path
) -> None:
    pd.DataFrame([[1] * len(columns)], columns=columns).to_parquet(tmp_path / "t.parquet")
    assert _parquet_kind(tmp_path / "t.parquet") == kind
    (tmp_path / "completions_00001.parquet").write_bytes(b"PAR1 cut")
    assert _parquet_kind(tmp_path / "completions_00001.parquet") == "completions"
    (tmp_path / "other.parquet").write_bytes(b"PAR1 cut")
    assert _parquet_kind(tmp_path / "other.parquet") == "table"


def test_the_history_of_a_trainer_may_stand_far_down_in_its_state(tmp_path: Path) -> None:
    state = {"args": "x" * 70_000, "log_history": [{"step": 1, "reward": 0.5}]}
    (tmp_path / "checkpoint.json").write_text(json.dumps(state))
    assert detect(tmp_path / "checkpoint.json").format == "trl"


def test_one_record_without_a_line_feed_is_known_by_its_names(tmp_path: Path) -> None:
    record = {"global_step/max_steps": "1/9", "reward": 0.5}
    (tmp_path / "logging.jsonl").write_text(json.dumps(record))
    assert detect(tmp_path / "logging.jsonl").kinds[tmp_path / "logging.jsonl"] == "swift-log"
    (tmp_path / "broken.jsonl").write_text('{"a": \n{"b"')
    assert detect(tmp_path / "broken.jsonl").format == "table"


@pytest.mark.parametrize(
    ("place", "kind"),
    [("files/wandb-summary.json", "wandb-file"), ("other/wandb-summary.json", "table"),
     ("files/other.json", "table"), ("files/output.log", "wandb-file"),
     ("other/output.log", "console")],
)  # fmt: skip
def test_what_wandb_keeps_is_known_by_its_folder_and_name(
    place: str, kind: str, tmp_path: Path
) -> None:
    file = tmp_path / place
    file.parent.mkdir()
    file.write_text(PRINTED if file.suffix == ".log" else '{"_step": 3, "reward": 0.5}')
    assert detect(file).kinds[file] == kind


@pytest.mark.parametrize(
    ("name", "alone", "within"),
    [("notes.md", "table", None), ("notes.txt", "table", "table"), ("notes.py", None, None)],
)
def test_a_table_in_a_text_for_people_is_read_where_it_is_named(
    name: str, alone: str | None, within: str | None, tmp_path: Path
) -> None:
    rows = "".join(f"| {row['step']} | {row['reward']} |\n" for row in ROWS)
    folder = folder_of(tmp_path / "f", other__jsonl=[{"step": 1, "entropy": 0.5}])
    (folder / name).write_text(f"# Run\n\n| step | reward |\n|---|---|\n{rows}")
    assert detect(folder).kinds.get(folder / name) == within
    if alone is None:
        with pytest.raises(UserError, match="no known file"):
            detect(folder / name)
    else:
        assert detect(folder / name).format == alone


def test_what_a_notebook_printed_is_a_printed_log_in_every_form(tmp_path: Path) -> None:
    records = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name, text in (("json", records), ("pairs", PRINTED)):
        cells = {"cells": [{"outputs": [{"text": text}]}]}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(cells))
        steps, report = read(tmp_path / f"{name}.ipynb", tmp_path / f"run-{name}")
        assert report.format == "console"
        assert steps["reward"].tolist() == [row["reward"] for row in ROWS]


def test_a_mapped_name_makes_a_table_of_a_folder_a_log(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", log__csv=TABLE, own__csv="mine,yours\n1,0.75\n2,0.5\n")
    settings = ImportSettings(mapping={"entropy": "yours"})
    report = import_run(folder, tmp_path / "out", settings)
    assert report.broken == ["own.csv:2: no step", "own.csv:3: no step"]


COMPLETIONS = {"step": [1], "prompt": ["p"], "completion": ["c"]}


@pytest.mark.parametrize(
    ("key", "completions", "format"),
    [("groups/with_correct", False, "official"), ("masking/neg_adv_seq_fraction", False,
     "official"), ("kl", False, "trl"), ("groups/with_correct", True, "trl")],
)  # fmt: skip
def test_states_of_the_official_trainer_are_told_by_a_name_of_its_own(
    key: str, completions: bool, format: str, tmp_path: Path
) -> None:
    for step, name in ((5, "reward"), (10, key)):
        state = {"log_history": [{"step": step, "loss": 0.5, name: 0.5}]}
        write_lines(tmp_path / "f" / f"checkpoint-{step}" / "trainer_state.json", [state])
    if completions:
        pd.DataFrame(COMPLETIONS).to_parquet(tmp_path / "f" / "completions_00001.parquet")
    found = detect(tmp_path / "f")
    assert (found.format, len(found.files)) == (format, 2 + completions)


def test_states_beside_the_official_trainer_s_arrays_are_its_own_unless_trl_kept_more(
    tmp_path: Path,
) -> None:
    arrays = tmp_path / "f" / "data" / "rewards"
    arrays.mkdir(parents=True)
    (arrays / "reward_step_0.npy").write_bytes(b"an array")
    for step in (5, 10):
        state = {"log_history": [{"step": step, "loss": 0.5}]}
        write_lines(tmp_path / "f" / f"checkpoint-{step}" / "trainer_state.json", [state])
    found = detect(tmp_path / "f")
    assert (found.format, names(found.files)) == ("official", ["reward_step_0.npy"])
    pd.DataFrame(COMPLETIONS).to_parquet(tmp_path / "f" / "completions_00001.parquet")
    with pytest.raises(UserError, match="mixes formats: .* is trl, .* is official"):
        detect(tmp_path / "f")
