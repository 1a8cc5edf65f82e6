"""Run folders of any content: every reader says one line that names the file, or reads on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wapo_analysis.attribute import what_if
from wapo_analysis.errors import UserError
from wapo_analysis.store import files, open_run
from wapo_analysis.store.files import LineReader, step_line
from wapo_analysis.store.merge import compact
from wapo_analysis.store.parquet import read_part
from wapo_analysis.store.parts import STEPS_KEY
from wapo_analysis.store.tail import Tail

DEEP = "[" * 5000 + "]" * 5000
PART = "tokens/part-00000002-0.parquet"
MERGED = "tokens/merged-00000001-00000003-0.parquet"


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a real run of three steps."""
    ignored = shutil.ignore_patterns("checkpoints")
    return Path(shutil.copytree(tiny_run, tmp_path / "r", ignore=ignored))


def refused(run: Path, file: str, look: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        look()
    assert str(run / file) in str(told.value)
    assert "\n" not in str(told.value)
    return str(told.value)


def rewritten(file: Path, change: Callable[[pa.Table], pa.Table], **metadata: Any) -> None:
    """Another tool writes a table anew; checksums are not copied."""
    with pq.ParquetFile(file) as before:
        kept = {STEPS_KEY: (before.metadata.metadata or {}).get(STEPS_KEY, b"")}
        table = change(before.read().replace_schema_metadata(None))
    kept |= {STEPS_KEY: json.dumps(metadata["steps"]).encode()} if metadata else {}
    pq.write_table(table.replace_schema_metadata(kept), file)


def column(name: str, values: Callable[[int], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(
        table.schema.get_field_index(name), name, values(len(table))
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (column("position", lambda n: pa.array([{"a": 1}] * n)), "column position holds struct"),
        (column("token_id", lambda n: pa.array(["x"] * n)), "column token_id holds string"),
        (column("token_id", lambda n: pa.array([2**40] * n)), "column token_id holds int64"),
        (column("logp", lambda n: pa.array([[0.0]] * n)), "column logp holds list"),
        (column("step", lambda n: pa.nulls(n, pa.int32())), "a row has no step"),
        (column("step", lambda n: pa.array([7] * n)), "rows are of other steps than it says"),
        (lambda table: table.drop_columns(["logp"]), "lacks column logp"),
        (lambda table: table.append_column("step", table["step"]), "has twice column step"),
        (lambda table: table.select(["step"]), "lacks column"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit(
    run: Path, change: Callable[[pa.Table], pa.Table], told: str
) -> None:
    rewritten(run / PART, change)
    assert told in refused(run, PART, open_run(run).tokens)
    assert told in refused(run, PART, lambda: compact(run))
    open_run(run).tokens([1, 3])


@pytest.mark.parametrize("code", [-2, 9, 120])
def test_codes_without_meaning(run: Path, code: int) -> None:
    name = "classes/part-00000001-0.parquet"
    rewritten(run / name, column("sign", lambda n: pa.array([code] * n, pa.int8())))
    assert "column sign is not -1 to 1" in refused(run, name, lambda: open_run(run).classes)
    tail = Tail(run)
    tail.poll()
    assert any(name in note for note in tail.notes)


@pytest.mark.parametrize(
    "steps",
    [None, 1, {}, [[1]], [[[1, "x"]]], [[[1, 2, 3]]], [[[[], 1]]], [[[1.5, 2]]], [[[1, -1]]],
     [[[1, 10**30]]], [[[1, 1]], [[2, 1]]], DEEP],
)  # fmt: skip
def test_a_merged_file_that_lies_about_its_steps(run: Path, steps: Any) -> None:
    compact(run)
    rewritten(run / MERGED, lambda table: table, steps=steps)
    refused(run, MERGED, open_run(run).token_steps)
    refused(run, MERGED, open_run(run).tokens)
    refused(run, MERGED, open_run(run).summary)


LINES = (
    "nonsense", DEEP, "[1]", '{"step": true}', '{"step": 1e3}', '{"step": -1}',
    '{"step": 99999999999}', '{"step": 1, "reward": [1]}', '{"step": 1, "reward": "high"}',
    '{"step": 1, "reward": 1' + "0" * 400 + "}", '{"step": 1' + "0" * 5000 + "}", "\udc80",
)  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_step(run: Path, line: str) -> None:
    log = run / "steps.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(line.encode(errors="surrogateescape") + b"\n" + b"".join(whole))
    told = refused(run, "steps.jsonl", lambda: open_run(run).steps)
    assert "line 1 is not a step record" in told
    tail = Tail(run)
    tail.poll()
    assert tail.run().steps.step.tolist() == [1, 2, 3]
    assert tail.notes[0].startswith("line 1 of steps.jsonl is no step record")


def test_numbers_that_are_not_finite_are_missing(run: Path) -> None:
    (run / "steps.jsonl").write_text('{"step": 1, "reward": Infinity, "loss": NaN, "lr": 1e999}\n')
    row = open_run(run).steps.iloc[0]
    assert row[["reward", "loss", "lr"]].isna().all()


def test_numbers_of_a_line_are_those_of_31_and_64_bits() -> None:
    row = LineReader().row(b'{"step": 2147483647, "a/n": 9223372036854775807, "reward": 1e300}')
    assert row == {"step": 2**31 - 1, "a/n": 2**63 - 1, "reward": 1e300}
    large = LineReader().row(b'{"step": 0, "reward": 9223372036854775808, "loss": -1e999}')
    assert (large["step"], large["reward"], large["loss"]) == (0, 2.0**63, None)
    assert type(large["reward"]) is float, "beyond 64 bits no table holds an integer"
    with pytest.raises(ValueError, match="no integer 'step'"):
        LineReader().row(b'{"step": 2147483648}')


def test_a_line_without_a_checksum_among_those_that_have_one_is_damaged() -> None:
    reader = LineReader()
    assert reader.row(b'{"step": 1}\n') == {"step": 1}, "of version 0.1"
    assert reader.row(step_line({"step": 2, "reward": np.nan})) == {"step": 2, "reward": None}
    with pytest.raises(ValueError, match="its checksum is missing"):
        reader.row(b'{"step": 3}\n')


@pytest.mark.parametrize("file", ["manifest.json", "steps.jsonl", "vocab.parquet", PART])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_only_regular_files_are_opened(run: Path, file: str, kind: str) -> None:
    (run / file).unlink()
    make: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path.name),
        "folder": lambda path: path.mkdir(),
    }
    make[kind](run / file)

    def look() -> None:
        opened = open_run(run)
        for read in (lambda: opened.steps, lambda: opened.vocab, opened.tokens):
            read()

    if (file, kind) == ("manifest.json", "loop"):
        file = ""  # as good as absent
    refused(run, file, look)


def test_a_link_to_nothing_is_named(run: Path) -> None:
    (run / PART).unlink()
    (run / PART).symlink_to("nowhere")
    refused(run, PART, open_run(run).tokens)


def test_a_copied_part_is_told_once_and_left_out(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = open_run(run).tokens()
    shutil.copy(run / PART, run / "tokens/part-00000002-0 (1).parquet")
    assert open_run(run).tokens().equals(before)
    assert open_run(run).tokens().equals(before)
    assert caplog.text.count("part-00000002-0 (1).parquet is not named as a part") == 1


def test_a_small_file_cannot_flood_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = pa.table({"step": np.full(1 << 24, 2, np.int32)})
    pq.write_table(constant, run / PART, compression="zstd")
    assert (run / PART).stat().st_size < 100_000
    monkeypatch.setattr("wapo_analysis.store.parquet.LEAST_ROOM_BYTES", 1 << 26)
    assert "would take 134,217,728 in memory" in refused(run, PART, open_run(run).tokens)


def test_a_text_repeated_a_million_times_is_not_unfolded(run: Path) -> None:
    name, rows = "rollouts/part-00000002-0.parquet", 1 << 17
    prompt = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * 20_000])
    columns = {n: pa.array([2 if n == "step" else 0] * rows) for n in ("step", "rank", "group")}
    columns |= {"rollout": pa.array([0] * rows), "reward": pa.array([0.0] * rows), "prompt": prompt}
    pq.write_table(pa.table(columns), run / name, compression="zstd")
    assert (run / name).stat().st_size < 1 << 20
    assert "in memory" in refused(run, name, lambda: open_run(run).rollouts)


def test_a_manifest_of_any_size_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (run / "manifest.json").open("ab") as stream:
        stream.truncate(files.JSON_BYTES + 1)
    assert "more than the" in refused(run, "manifest.json", lambda: open_run(run))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "\x00"), ("epochs", [1]), ("epochs", 2**62), ("minibatches", 0), ("beta1", 1.0),
     ("beta1", "x"), ("max_grad_norm", -1.0), ("optimizer", 3)],
)  # fmt: skip
def test_settings_that_make_no_sense(run: Path, name: str, value: Any) -> None:
    from wapo_analysis.attribute.whatif import _Settings

    file = run / "manifest.json"
    entries = json.loads(file.read_text())
    entries["config"][name] = value
    file.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"setting {name} of run"):
        _Settings.of(open_run(run))
    with pytest.raises(UserError, match="probes"):
        what_if(open_run(run), ["neg_peak"])


@pytest.mark.parametrize(
    ("label", "shown"),
    [("a\x00b", r"a\x00b"), ("\x1b[31mred", r"\x1b[31mred"), ("\ud800", r"\ud800"),
     ("\u202eevil", r"\u202eevil"), ("é 漢", "é 漢")],
)  # fmt: skip
def test_names_are_shown_escaped_and_draw(run: Path, label: str, shown: str) -> None:
    file = run / "manifest.json"
    entries = json.loads(file.read_text()) | {"label": label, "name": label, label: {label: label}}
    file.write_text(json.dumps(entries | {"objective": {"name": label}}))
    opened = open_run(run)
    assert (opened.name, opened.label, opened.objective) == (shown, shown, shown)
    json.dumps(dict(opened.manifest), ensure_ascii=False).encode()


def test_halves_of_characters_in_a_line_are_escaped(run: Path) -> None:
    (run / "steps.jsonl").write_text('{"step": 1, "x/\\uD800": "\\udfff", "reward": 1}\n')
    row = open_run(run).steps.iloc[0]
    assert row["x/\\ud800"] == "\\udfff"
    for half in (b"\\ud800", b"\\uDFFF"):  # as JSON may write them
        read = LineReader().row(b'{"step": 1, "x/a": "' + half + b'"}')
        assert read["x/a"] == half.decode().lower()


def test_a_small_file_of_many_cells_is_refused_by_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,000 rows of equal numbers take little on disk; in memory 8 bytes a cell."""
    monkeypatch.setattr("wapo_analysis.store.parquet.LEAST_ROOM_BYTES", 600_000)
    cells = pa.array(np.zeros(60_000, np.int32))
    for columns in (1, 2):
        file = tmp_path / f"{columns}.parquet"
        pq.write_table(pa.table({f"x{n}": cells for n in range(columns)}), file)
        assert file.stat().st_size < 2000
    assert len(read_part(tmp_path / "1.parquet")) == 60_000
    with pytest.raises(UserError, match="would take 960,000 in memory"):
        read_part(tmp_path / "2.parquet")


def test_class_totals_are_read_by_column_and_where_a_step_has_none(run: Path) -> None:
    columns = open_run(run).table("classes", columns=["step", "tokens"])
    assert list(columns) == ["step", "tokens"]
    name = "classes/part-00000002-0.parquet"
    rewritten(run / name, lambda table: table.slice(0, 0))
    assert sorted(set(open_run(run).classes["step"])) == [1, 3]


def test_of_a_merged_file_the_rows_of_one_step_are_scanned(run: Path) -> None:
    whole = open_run(run).table("tokens")
    compact(run)
    for step in (1, 2, 3):
        found = open_run(run).scan_tokens(step, ["logp"], lambda block: block)["logp"]
        np.testing.assert_array_equal(found, whole.loc[whole.step == step, "logp"])


def test_a_part_that_holds_rows_of_another_step_too_is_not_scanned(run: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        steps = np.full(len(table), 2)
        steps[-1] = 3
        place = table.schema.get_field_index("step")
        return table.set_column(place, "step", pa.array(steps, table.schema.field("step").type))

    rewritten(run / PART, change)
    with pytest.raises(UserError, match="its rows are of other steps than it says"):
        open_run(run).scan_tokens(2, ["logp"], lambda block: block)
