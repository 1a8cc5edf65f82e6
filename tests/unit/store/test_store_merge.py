"""Merged files: same rows, no moment without them, resume, compaction, readers meanwhile."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store.test_store import token_records, written_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.store import Run, RunWriter, merge, open_run
from wapo_analysis.store.merge import compact, merge_parts, replace_files
from wapo_analysis.store.parts import list_parts, merged_name, part_name, read_rows
from wapo_analysis.store.tail import Tail
from wapo_analysis.store.writer import MERGE_STEPS


def names(run: Path, table: str = "tokens") -> list[str]:
    return sorted(path.name for path in (run / table).iterdir())


def with_rows(path: Path, rows: dict[tuple[int, int], int]) -> Path:
    """A run with so many token rows at each (step, rank)."""
    writer = RunWriter(path, {"name": "r", "temperature": 1.0})
    for (step, rank), count in rows.items():
        records = token_records(step * 100 + rank, count)
        keys = {"step": np.full(count, step, np.int32), "rank": np.full(count, rank, np.int16)}
        writer.write_part(records.with_columns(keys), step, rank)
    for step in sorted({step for step, _ in rows}):
        writer.append_step({"step": step})
    writer.close("finished")
    return path


def merged(path: Path, at_least: int = 2) -> Path:
    for rank in {part.rank for part in list_parts(path / "tokens")}:
        merge_parts(path / "tokens", rank, at_least)
    return path


def test_fewer_parts_than_asked_for_and_a_single_one_stay(tmp_path: Path) -> None:
    path = with_rows(tmp_path / "r", {(step, 0): 3 for step in range(1, 5)})
    assert not merge_parts(path / "tokens", 0, 5)
    assert len(names(path)) == 4
    assert merge_parts(path / "tokens", 0, 4)
    assert len(names(path)) == 1
    one = with_rows(tmp_path / "one", {(1, 0): 3})
    assert not merge_parts(one / "tokens", 0, 1)
    assert names(one) == ["part-00000001-0.parquet"]


def test_merged_rows_are_the_rows_of_the_parts_in_the_same_order(tmp_path: Path) -> None:
    path = with_rows(tmp_path / "r", {(s, r): 30 + s + r for s in range(1, 9) for r in range(2)})
    before = open_run(path).tokens()
    merged(path)
    assert names(path) == [f"merged-00000001-00000008-{rank}.parquet" for rank in range(2)]
    run = open_run(path)
    assert run.tokens().equals(before)
    assert run.token_steps() == list(range(1, 9))
    some = before[before.step.isin([2, 7])].reset_index(drop=True)
    assert run.tokens([2, 7]).equals(some)


def test_a_merged_file_of_the_same_name_keeps_its_steps(tmp_path: Path) -> None:
    path = with_rows(tmp_path / "r", {(0, 0): 1, (1, 0): 1, (2, 0): 1})
    before = open_run(path).tokens()
    ends = [part.path for part in list_parts(path / "tokens") if part.first != 1]
    copies = [shutil.copy(file, tmp_path) for file in ends]
    merged(path)
    for copy in copies:
        shutil.copy(copy, path / "tokens")
    _, *loose = list_parts(path / "tokens")
    replace_files(path / "tokens", loose)
    assert open_run(path).tokens().equals(before)


@settings(max_examples=8, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 30), st.integers(0, 2)), st.integers(0, 40), min_size=1
    ),
    st.integers(1, 60),
    st.data(),
)
def test_any_mixture_of_parts_and_merged_files_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    rows: dict[tuple[int, int], int],
    group_rows: int,
    data: st.DataObject,
) -> None:
    path = with_rows(tmp_path_factory.mktemp("mix") / "r", rows)
    before = open_run(path).tokens(derived=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "GROUP_ROWS", group_rows)
        for _ in range(3):
            files = [p for p in list_parts(path / "tokens") if p.rank == 0]
            chosen = [p for p in files if data.draw(st.booleans())]
            if chosen:
                kept = path / "kept"
                kept.mkdir(exist_ok=True)
                back = [shutil.copy(p.path, kept) for p in chosen if data.draw(st.booleans())]
                replace_files(path / "tokens", chosen)
                for copy in back:  # as a crash before the deletion leaves them
                    if not (path / "tokens" / Path(copy).name).exists():
                        shutil.copy(copy, path / "tokens")
    assert open_run(path).tokens(derived=False).equals(before)
    wanted = sorted({step for (step, _), count in rows.items() if count})[::2]
    some = before[before.step.isin(wanted)].reset_index(drop=True)
    assert open_run(path).tokens(wanted, derived=False).equals(some)
    compact(path)
    assert open_run(path).tokens(derived=False).equals(before)


def test_a_part_left_by_a_crash_is_deleted_and_never_merged_again(tmp_path: Path) -> None:
    path = with_rows(tmp_path / "r", {(step, 0): 20 + step for step in range(1, 7)})
    before = open_run(path).tokens()
    tokens = path / "tokens"
    shutil.copy(tokens / part_name(2, 0), tmp_path / "left")
    replace_files(tokens, [part for part in list_parts(tokens) if part.first <= 3])
    shutil.copy(tmp_path / "left", tokens / part_name(2, 0))  # as if killed before the deletion
    assert open_run(path).tokens().equals(before)
    assert merge_parts(tokens, 0, 2)
    assert names(path) == [
        "merged-00000001-00000003-0.parquet",
        "merged-00000004-00000006-0.parquet",
    ]
    held = [step for part in list_parts(tokens) for step in part.steps()]
    assert sorted(held) == [1, 2, 3, 4, 5, 6], "every step in one file"
    assert open_run(path).tokens().equals(before)


def test_a_row_group_holds_whole_steps_and_others_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "GROUP_ROWS", 100)
    sizes = {(1, 0): 40, (2, 0): 70, (3, 0): 300, (4, 0): 10, (5, 0): 0, (6, 0): 5}
    path = merged(with_rows(tmp_path / "r", sizes))
    (part,) = list_parts(path / "tokens")
    assert part.groups() == [{1: 40, 2: 70}, {3: 300}, {4: 10, 5: 0, 6: 5}]
    assert [pq.read_metadata(part.path).row_group(n).num_rows for n in range(3)] == [110, 300, 15]
    from wapo_analysis.store import parts as module

    read: list[list[int]] = []
    real = module.read_part
    monkeypatch.setattr(module, "read_part", lambda p, c, g: read.append(g) or real(p, c, g))
    assert len(open_run(path).tokens([3])) == 300
    assert read == [[1]]


def test_a_run_merges_its_own_parts_while_it_is_written(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "r", {"name": "r"})
    tail = Tail(tmp_path / "r")
    for step in range(1, MERGE_STEPS + 4):
        writer.write_part(token_records(step, 20), step)
        writer.append_step({"step": step})
        writer.merge()
        assert len(open_run(tmp_path / "r").tokens()) == 20 * step
        tail.poll()
    writer.close("finished")
    loose = [part_name(step, 0) for step in range(MERGE_STEPS + 1, MERGE_STEPS + 4)]
    assert names(tmp_path / "r") == [f"merged-00000001-{MERGE_STEPS:08d}-0.parquet", *loose]
    assert tail.run().steps.step.tolist() == list(range(1, MERGE_STEPS + 4))


def test_parts_are_merged_each_time_there_are_so_many_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wapo_analysis.store.writer.MERGE_STEPS", 3)
    writer, there = RunWriter(tmp_path / "r", {"name": "r"}), []
    for step in range(1, 10):
        writer.write_part(token_records(step, 2), step)
        writer.append_step({"step": step})
        writer.merge()
        there.append(len(names(tmp_path / "r")))
    assert there == [1, 2, 1, 2, 3, 2, 3, 4, 3]
    writer.close("finished")


def test_a_failing_merge_leaves_the_parts_and_the_writing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wapo_analysis.store.writer.MERGE_STEPS", 3)
    monkeypatch.setattr("wapo_analysis.store.merge.parquet_writer", full)
    writer = RunWriter(tmp_path / "r", {"name": "r"})
    for step in range(1, 9):
        writer.write_part(token_records(step), step)
        writer.append_step({"step": step})
        writer.merge()
    writer.close("finished")
    assert names(tmp_path / "r") == [part_name(step, 0) for step in range(1, 9)]
    assert [r.message for r in caplog.records if "stay unmerged" in r.message] != []
    assert len(caplog.records) == 1
    assert len(open_run(tmp_path / "r").tokens()) == 8 * 50


def test_resume_over_a_merged_file_keeps_what_came_before(tmp_path: Path) -> None:
    path = merged(written_run(tmp_path / "r", steps=6))
    before = open_run(path).tokens(derived=False)
    writer = RunWriter(path, open_run(path).manifest, resume_after=4)
    assert names(path) == ["merged-00000001-00000004-0.parquet"]
    kept = before[before.step <= 4].reset_index(drop=True)
    assert open_run(path).tokens(derived=False).equals(kept)
    writer.write_part(token_records(5, 7), 5)
    writer.append_step({"step": 5})
    writer.close("finished")
    assert open_run(path).token_steps() == [1, 2, 3, 4, 5]
    assert (open_run(path).tokens().step == 5).sum() == 7
    writer = RunWriter(path, open_run(path).manifest, resume_after=0)
    writer.close("finished")
    assert names(path) == []


def vanishing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let something happen between the first listing of a folder and the first opening."""
    from wapo_analysis.store import parts as module

    real, waiting = module.read_part, [act]

    def read(*args: object) -> object:
        if waiting:
            waiting.pop()()
        return real(*args)

    monkeypatch.setattr(module, "read_part", read)


def test_a_part_that_vanishes_into_a_merged_file_is_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written_run(tmp_path / "r", steps=5)
    before = open_run(path).tokens()
    vanishing(monkeypatch, lambda: merge_parts(path / "tokens", 0, 2) and None)
    assert open_run(path).tokens().equals(before)
    assert names(path) == ["merged-00000001-00000005-0.parquet"]


def test_a_watched_run_survives_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.builders import write_fake_run

    source = write_fake_run(tmp_path / "r", steps=9, loose=True)
    expected = open_run(source).classes
    tail = Tail(source)
    vanishing(monkeypatch, lambda: merge_parts(source / "classes", 0, 2) and None)
    assert tail.poll()
    assert tail.run().classes.equals(expected)
    assert tail.notes == []
    assert [name[:6] for name in names(source, "classes")] == ["merged"]
    with (source / "steps.jsonl").open("a") as log:
        log.write('{"step": 10}\n')
    assert tail.poll()
    assert tail.run().classes.equals(expected), "nothing is read twice"


def test_a_broken_merged_file_is_named(tmp_path: Path) -> None:
    path = merged(written_run(tmp_path / "r", steps=3))
    (part,) = list_parts(path / "tokens")
    whole = part.path.read_bytes()
    part.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"merged-00000001-00000003-0\.parquet is broken"):
        open_run(path).tokens()
    broken: dict[str, UserError] = {}
    assert read_rows(path / "tokens", broken=broken) == {}
    assert list(broken) == [part.path.name]


def test_a_broken_part_stops_the_merge_and_loses_nothing(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r", steps=4)
    (path / "tokens" / part_name(2, 0)).write_bytes(b"PAR1")
    before = names(path)
    with pytest.raises(UserError, match="part-00000002-0"):
        merged(path)
    assert names(path) == before
    with pytest.raises(UserError, match="part-00000002-0"):
        compact(path)
    assert names(path) == before


def test_parts_of_another_layout_are_merged_too(tmp_path: Path) -> None:
    """A column that older parts lack is null there; one that this version lacks is kept."""
    path = written_run(tmp_path / "r", steps=3)
    first, last = (path / "tokens" / part_name(step, 0) for step in (1, 3))
    table = pq.read_table(first)
    pq.write_table(table.drop_columns(["top1"]), first)
    table = pq.read_table(last)
    pq.write_table(table.append_column("new", table["logp"]), last)
    before = open_run(path).tokens(derived=False)
    assert open_run(merged(path)).tokens(derived=False).equals(before)
    assert before.top1.isna().sum() == 50
    assert before.new.notna().sum() == 50


# ---- wapo compact -------------------------------------------------------------------------------


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = wapo(["compact", *arguments])
    out, err = capfd.readouterr()
    return code, out, err


def tables(run: Run) -> list[object]:
    return [run.tokens(), run.classes, run.rollouts, run.probes, run.steps]


def test_compact_says_what_it_did_and_changes_no_table(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(tiny_run, tmp_path / "r"))
    (path / "tokens" / ".part-00000009-0.parquet.0a1b2c3d").write_bytes(b"half")
    before = tables(open_run(path))
    code, out, err = said(capfd, str(path))
    assert (code, err) == (0, "")
    assert out.startswith(f"{path}: 12 files, ")
    assert "-> 4 files, " in out
    assert all(a.equals(b) for a, b in zip(before, tables(open_run(path)), strict=True))
    assert names(path) == ["merged-00000001-00000003-0.parquet"]
    assert said(capfd, str(path))[1].startswith(f"{path}: 4 files")


@pytest.mark.parametrize(("steps", "files"), [(1, [part_name(1, 0)]), (2, [merged_name(1, 2, 0)])])
def test_two_files_of_a_rank_become_one_and_one_stays(
    steps: int, files: list[str], tmp_path: Path
) -> None:
    path = written_run(tmp_path / "r", steps)
    compact(path)
    assert names(path) == files


def test_compact_refuses_a_run_that_is_being_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written_run(tmp_path / "r")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"running"'))
    code, out, err = said(capfd, str(path))
    assert (code, out) == (2, "")
    assert "is being written: its log changed in the last minute" in err
    assert err.count("\n") == 1
    assert said(capfd, str(path), "--force")[0] == 0
    assert names(path) == ["merged-00000001-00000003-0.parquet"]
    assert said(capfd, str(tmp_path / "absent"))[0] == 2


def test_a_crashed_run_is_compacted(tmp_path: Path) -> None:
    import os
    import time

    path = written_run(tmp_path / "r")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"running"'))
    os.utime(path / "steps.jsonl", (time.time() - 90,) * 2)
    done = compact(path)
    assert (done.files_before, done.files_after) == (3, 1)
    assert done.bytes_after < done.bytes_before
