"""wapo check: a whole run passes, and whatever is damaged or missing is named."""

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.store import Run, RunWriter, open_run
from wapo_analysis.store.check import check
from wapo_analysis.store.merge import compact

OLD_RUN = Path(__file__).parents[2] / "data" / "run_0_1"


def copied(source: Path, target: Path) -> Path:
    ignored = shutil.ignore_patterns("checkpoints")
    return Path(shutil.copytree(source, target, ignore=ignored))


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a real run of three steps."""
    return copied(tiny_run, tmp_path / "r")


def lines(path: Path) -> list[bytes]:
    return (path / "steps.jsonl").read_bytes().splitlines(keepends=True)


def test_whole_runs_are_whole(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert wapo(["check", str(run)]) == 0
    assert capfd.readouterr().out == f"{run}: whole (3 step lines and 12 files of tables read)\n"
    compact(run)
    assert (check(run).damage, check(run).files) == ([], 4)
    old = check(OLD_RUN)
    assert old.damage == []
    assert "have no checksums" in old.notes[0]


def flip(file: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        content = bytearray((path / file).read_bytes())
        content[len(content) // 3] ^= 4
        (path / file).write_bytes(content)

    return act


def without(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).unlink()


def log(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    return lambda path: (path / "steps.jsonl").write_bytes(b"".join(change(lines(path)))) and None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip("tokens/part-00000003-0.parquet"), "tokens/part-00000003-0.parquet is broken or "
         "truncated (its content does not match its checksum); its rows of step 3 are lost"),
        (flip("vocab.parquet"), "vocab.parquet is broken or truncated"),
        (flip("steps.jsonl"), "steps.jsonl: line 2 is lost (it does not match its checksum)"),
        (flip("manifest.json"), "manifest.json"),
        (without("classes/part-00000002-0.parquet"), "classes: no rows of step 2"),
        (without("tokens/part-00000003-0.parquet"), "tokens: no rows of step 3"),
        (without("steps.jsonl"), "steps.jsonl: 0 of 3 lines can be read"),
        (log(lambda all: all[:1] + all[2:]), "steps.jsonl: no line of step 2"),
        (log(lambda all: all[:-1]), "steps.jsonl: 2 of 3 lines can be read"),
        (log(lambda all: [*all[:-1], all[-1][:40]]), "steps.jsonl: line 3 is lost"),
        (log(lambda all: [*all, all[1]]), "steps.jsonl: two lines of step 2; the last counts"),
    ],
)  # fmt: skip
def test_damage_is_named(
    run: Path, damage: Callable[[Path], None], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    assert wapo(["check", str(run), "-f", "json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert not found["whole"]
    assert any(told in line for line in found["damage"]), found["damage"]


def test_a_merged_file_says_which_steps_are_lost(run: Path) -> None:
    compact(run)
    flip("rollouts/merged-00000001-00000003-0.parquet")(run)
    (told,) = check(run).damage
    assert told.endswith("its rows of steps 1 to 3 are lost")


def test_what_costs_nothing_is_a_note(run: Path) -> None:
    tokens = run / "tokens"
    shutil.copy(tokens / "part-00000003-0.parquet", tokens / "part-00000003-0 (1).parquet")
    before = shutil.copytree(tokens, run / "before")
    compact(run)
    shutil.copy(before / "part-00000002-0.parquet", tokens)  # as a crash in a merge leaves it
    found = check(run)
    assert found.damage == []
    assert found.notes == [
        "tokens: part-00000003-0 (1).parquet is not named as a part; left out",
        "tokens: step 2 in two files, as an interrupted merge leaves them; one is read",
    ]


def test_a_run_that_is_being_written_is_whole_up_to_its_last_step(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "r", {"source": "built-in"})
    writer.append_step({"step": 1})
    with (tmp_path / "r" / "steps.jsonl").open("ab") as stream:
        stream.write(b'{"step": 2, "rew')
    found = check(tmp_path / "r")
    assert found.damage == []
    assert found.notes[0] == "the run has not ended"
    assert "line 2 is lost" in found.notes[1]
    del writer
    assert "probably dead" in check(tmp_path / "r").notes[0]


def logged(path: Path, source: str, steps: Iterable[int], processes: int = 1) -> RunWriter:
    """A run without tables, of some steps."""
    writer = RunWriter(path, {"source": source, "processes": processes})
    for step in steps:
        writer.append_step({"step": step})
    return writer


def test_lost_steps_are_named_as_ranges(tmp_path: Path) -> None:
    logged(tmp_path / "nine", "trl", [1, 10]).close("finished")
    assert check(tmp_path / "nine").damage == ["steps.jsonl: no line of steps 2 to 9"]
    logged(tmp_path / "more", "trl", [1, 1202]).close("finished")
    (told,) = check(tmp_path / "more").damage
    assert told == "steps.jsonl: no line of steps 2 to 1201"


def test_a_loop_of_ones_own_may_count_its_steps_by_tens(tmp_path: Path) -> None:
    logged(tmp_path / "r", "recorder", [10, 20]).close("finished")
    found = check(tmp_path / "r")
    assert found.damage == []
    assert found.notes == ["steps.jsonl: no line of steps 11 to 19"]


def test_class_totals_that_another_process_left_out_are_lost(run: Path) -> None:
    """Up to the last of its steps: a process may end a step later than the first."""
    classes = run / "classes"
    edit = json.loads((run / "manifest.json").read_bytes()) | {"processes": 2}
    (run / "manifest.json").write_text(json.dumps({n: v for n, v in edit.items() if n != "crc32"}))
    assert check(run).damage == [], "of one that recorded nothing"
    for step in (1, 3):
        table = pq.read_table(classes / f"part-0000000{step}-0.parquet")
        rank = pa.array([1] * len(table), table.schema.field("rank").type)
        table = table.set_column(table.schema.get_field_index("rank"), "rank", rank)
        pq.write_table(table, classes / f"part-0000000{step}-1.parquet")
    assert check(run).damage == ["classes: no rows of process 1 of step 2"]
    (classes / "part-00000003-1.parquet").unlink()
    assert check(run).damage == []


def test_rows_of_a_step_without_a_line_are_told(run: Path) -> None:
    """A writer that was killed between the parts of a step and its line."""
    whole = json.loads((run / "manifest.json").read_bytes())
    edit = {n: v for n, v in whole.items() if n not in ("crc32", "step_lines")}
    (run / "manifest.json").write_text(json.dumps(edit))
    log(lambda all: all[:-1])(run)
    found = check(run)
    assert found.damage == []
    assert "rows of step 3 without a line in steps.jsonl" in found.notes


def test_what_is_no_run_is_a_mistake(tmp_path: Path) -> None:
    assert wapo(["check", str(tmp_path / "absent")]) == 2
    assert wapo(["check", str(tmp_path)]) == 2


READERS: dict[str, Callable[[Run], object]] = {
    "manifest.json": lambda run: sorted(run.manifest.items(), key=str),
    "steps.jsonl": lambda run: run.steps.to_csv(),
    "vocab.parquet": lambda run: run.vocab,
    "tokens": lambda run: run.tokens(derived=False).to_csv(),
    "classes": lambda run: run.table("classes").to_csv(),
    "rollouts": lambda run: run.rollouts.to_csv(),
}


@pytest.mark.parametrize("name", READERS)
def test_no_bit_can_flip_unseen(
    name: str, tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is read after a flip is what was written, or an error, a problem or a warning says so.

    The last byte is flipped too: of the step log it is the end of a line, without which the line
    counts as half written.
    """
    rng, run = random.Random(0), copied(tiny_run, tmp_path / "r")
    files = [run / name] if (run / name).is_file() else sorted((run / name).iterdir())
    truth, noticed = READERS[name](open_run(run)), 0
    for file in files * (60 // len(files)):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.choice((rng.randrange(len(content)), -1))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        caplog.clear()
        try:
            opened = open_run(run)
            same = READERS[name](opened) == truth
            told = bool(opened.manifest.problems or caplog.records)
            noticed += told
            assert told or same
        except UserError:
            noticed += 1
        file.write_bytes(content)
    assert noticed > 30
