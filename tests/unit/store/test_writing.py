"""Writing where it is rare: folders that take their name, several steps at once, a full disk."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.store.test_store import token_records, written_run
from wapo_analysis.errors import UserError
from wapo_analysis.store import RunWriter, is_run, open_run, parquet, read_manifest
from wapo_analysis.store import lock as locks
from wapo_analysis.store import manifest as manifests
from wapo_analysis.store import writer as writing
from wapo_analysis.store.check import check
from wapo_analysis.store.files import folder_when_whole, remove_folder, write_atomic
from wapo_analysis.store.merge import compact, replace_files
from wapo_analysis.store.parts import joined, list_parts, merged_name, part_name, read_rows
from wapo_analysis.store.summary import class_summary
from wapo_analysis.store.tail import Tail
from wapo_analysis.store.writer import copy_steps


def named(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with folder_when_whole(target) as folder:
        assert folder.name == ".b"
        (folder / "x").write_text("1")
        assert not target.exists()
    assert named(target) == ["x"]
    (tmp_path / "a" / ".b").mkdir()
    (tmp_path / "a" / ".b" / "half").write_text("of a process that was killed")
    with folder_when_whole(target) as folder:
        (folder / "y").write_text("2")
    assert named(target) == ["y"], "the old one is replaced"
    assert named(tmp_path / "a") == ["b"]


def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()

    def fails() -> None:
        with folder_when_whole(tmp_path / "b") as folder:
            (folder / "y").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert named(tmp_path) == ["b"]
    assert named(tmp_path / "b") == []
    remove_folder(tmp_path / "b")
    assert named(tmp_path) == []


def test_several_steps_are_one_file_and_one_is_a_part(tmp_path: Path) -> None:
    rows = {step: token_records(step, 3).with_columns({"rank": np.zeros(3)}) for step in (4, 2, 9)}
    writer = RunWriter(tmp_path / "r", {})
    writer.write_steps(rows)
    writer.write_steps({11: token_records(11, 2)})
    writer.close("finished")
    folder = tmp_path / "r" / "tokens"
    assert named(folder) == [merged_name(2, 9, 0), part_name(11, 0)]
    found = read_rows(folder)
    assert [(key, held.size) for key, held in found.items()] == [
        ((2, 0), 3), ((4, 0), 3), ((9, 0), 3), ((11, 0), 2)
    ]  # fmt: skip
    np.testing.assert_allclose(joined([found[4, 0]])[0]["logp"], rows[4]["logp"], rtol=2**-15)


def test_what_is_older_than_ten_seconds_outlasts_a_loss_of_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = [100.0], []
    monkeypatch.setattr(writing, "monotonic", lambda: now[0])
    writer = RunWriter(tmp_path / "r", {})
    monkeypatch.setattr(writing.os, "fsync", lambda handle: synced.append(now[0]))
    for wait in (0.0, 10.0, 0.1, 9.0, 1.1):
        now[0] += wait
        writer.append_step({"step": len(synced) + int(now[0])})
    assert sorted(set(synced)) == pytest.approx([110.1, 120.2])
    monkeypatch.undo()
    writer.close("finished")
    writer.close("failed")
    assert read_manifest(tmp_path / "r").status == "finished", "what came first counts"


def test_a_vocabulary_is_rewritten_for_new_tokens_alone(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "r", {})
    writer.add_vocab({5: "e", 2: "b"})
    file = tmp_path / "r" / "vocab.parquet"
    before = os.stat(file).st_ino
    writer.add_vocab({2: "other"})
    assert os.stat(file).st_ino == before
    writer.add_vocab({2: "b2", 9: "i"})
    assert writer.named() == [5, 2, 9]
    writer.close("finished")
    assert open_run(tmp_path / "r").vocab == {2: "b2", 5: "e", 9: "i"}
    assert pq.read_table(file)["token_id"].to_pylist() == [2, 5, 9]


def test_steps_are_copied_where_nothing_can_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written_run(tmp_path / "r", steps=4)
    for name, fails in (("linked", False), ("copied", True)):
        if fails:

            def link(*given: Any) -> None:
                raise OSError(errno.EXDEV, "Invalid cross-device link")

            monkeypatch.setattr(writing.os, "link", link)
        copy_steps(source, tmp_path / name, 2)
        files = [part.path for part in list_parts(tmp_path / name / "tokens")]
        assert [file.name for file in files] == [part_name(1, 0), part_name(2, 0)]
        assert {os.stat(file).st_nlink for file in files} == {1 if fails else 2}
        log = (tmp_path / name / "steps.jsonl").read_text().splitlines()
        assert len(log) == 2
        assert (tmp_path / name / "vocab.parquet").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_on_a_full_disk_the_manifest_is_written_in_place(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written_run(tmp_path / "r")
    manifest = read_manifest(path)

    def full(*given: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(manifests, "write_atomic", full)
    shorter = manifest.changed({"status": "failed", "objective": None})
    if code == errno.EACCES:
        with pytest.raises(PermissionError):
            manifests.write_manifest(path, shorter)
        return
    manifests.write_manifest(path, shorter)
    assert read_manifest(path).status == "failed"
    assert read_manifest(path).problems == (), "nothing of the longer one is left"
    with pytest.raises(OSError, match=os.strerror(code)):
        manifests.write_manifest(tmp_path, shorter)


def test_a_damaged_manifest_is_still_that_of_a_run(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    for content, ours in (
        ("{", True), ("[]", True), ('{"crc32": "x"}', True), ('{"source": 1}', True),
        ('{"objective": 1}', True), ('{"name": "x"}', False),
    ):  # fmt: skip
        (tmp_path / "manifest.json").write_text(content)
        assert is_run(tmp_path) is ours, content
    (tmp_path / "steps.jsonl").touch()
    assert is_run(tmp_path)


def test_a_check_goes_on_after_what_it_cannot_read(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r")
    (path / "manifest.json").write_text("{")
    (path / "classes").rmdir()
    (path / "classes").write_text("no folder")
    found = check(path)
    assert any(told.startswith("manifest.json cannot be read") for told in found.damage)
    assert any(told.startswith("classes cannot be listed") for told in found.damage)
    assert (found.lines, found.files) == (3, 3)
    assert found.to_dict()["whole"] is False
    (path / "steps.jsonl").unlink()
    (path / "steps.jsonl").mkdir()
    assert "steps.jsonl is no regular file" in check(path).damage


def test_columns_that_only_some_parts_have_are_null_in_the_merged_file(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r", steps=2)
    folder = path / "tokens"
    first, second = (part.path for part in list_parts(folder))
    table = pq.read_table(first, partitioning=None)
    more = table.append_column("mine", pa.array(range(len(table))))
    pieces = parquet.parquet_bytes(more.drop_columns(["logp_old"]))
    write_atomic(first, *pieces)
    assert replace_files(folder, list_parts(folder))
    (part,) = list_parts(folder)
    merged = pq.read_table(part.path, partitioning=None)
    assert merged["mine"].null_count == pq.read_metadata(part.path).num_rows - len(table)
    assert "logp_old" in merged.schema.names
    assert not second.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (
        lambda: RunWriter(tmp_path / "file" / "r", {}),
        lambda: copy_steps(tmp_path, tmp_path / "file" / "r", 1),
    ):
        with pytest.raises(UserError, match="cannot write run folder .*: Not a directory"):
            write()


def test_large_files_are_read_by_columns_and_checked_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written_run(tmp_path / "r")
    small = open_run(path).tokens()
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 100)
    assert open_run(path).tokens().equals(small)
    part = list_parts(path / "tokens")[0].path
    content = bytearray(part.read_bytes())
    content[-60] ^= 1
    part.write_bytes(bytes(content))
    with pytest.raises(UserError, match="is broken or truncated"):
        open_run(path).tokens()


def test_a_column_of_texts_where_numbers_belong_is_no_summary(tmp_path: Path) -> None:
    table = pa.table({"step": [1, 2], "logp": ["a", "b"]})
    names = ("advantage", "entropy", "collision_rest", "collision_logp_rest", "coef")
    for name in names:
        table = table.append_column(name, pa.array([0.5, 0.5]))
    pq.write_table(table, tmp_path / part_name(1, 0))
    with pytest.raises(UserError, match="where numbers are needed"):
        class_summary(tmp_path, engine="pyarrow")


def test_a_tail_waits_for_a_run_that_is_moved_away_and_comes_back(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r")
    tail = Tail(path)
    assert tail.poll()
    assert not tail.poll()
    (path / "steps.jsonl").rename(tmp_path / "log")
    assert tail.last_written() is None
    assert not tail.poll()
    (tmp_path / "log").rename(path / "steps.jsonl")
    with (path / "steps.jsonl").open("ab") as log:
        log.write(b"\n{broken\n")
    assert tail.poll()
    assert tail.run().steps["step"].tolist() == [1, 2, 3]
    assert [note.startswith("line 5 of steps.jsonl is no step record") for note in tail.notes] == [
        True
    ]
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="it has no manifest.json"):
        tail.poll()


@pytest.mark.parametrize(
    ("raised", "runs"),
    [(None, True), (ProcessLookupError, False), (PermissionError, True), (OverflowError, False)],
)
def test_where_there_is_no_proc_a_signal_tells_whether_a_process_runs(
    raised: Any, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(pid: int, signal: int) -> None:
        assert (pid, signal) == (77, 0)
        if raised is not None:
            raise raised

    monkeypatch.setattr(locks, "_stat", lambda pid: [])
    monkeypatch.setattr(locks.os, "kill", kill)
    assert locks._runs(77, 5) is runs
    assert locks._born(77) == 0


def test_compacting_a_run_merges_each_rank_and_clears_what_was_left(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r", steps=3)
    (path / "tokens" / f".{part_name(9, 0)}.abcd").write_bytes(b"half")
    done = compact(path)
    assert (done.files_before, done.files_after) == (3, 1)
    assert named(path / "tokens") == [merged_name(1, 3, 0)]
    assert compact(path).files_after == 1
