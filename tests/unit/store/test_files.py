"""Files, lines and names of a run at their bounds: what is read, what is refused, what is kept."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.unit.store.test_store import token_records, written_run
from wapo_analysis.errors import UserError
from wapo_analysis.schema import PROBES, ROLLOUTS, TOKENS
from wapo_analysis.store import RunWriter, merge, open_run, parquet, parts, round_mantissa
from wapo_analysis.store.files import (
    JSON_DEPTH,
    LineReader,
    encodable,
    log_lines,
    open_regular,
    parse_json,
    read_json,
    step_line,
    step_lines,
    steps_frame,
)
from wapo_analysis.store.needs import Need, holds
from wapo_analysis.store.parquet import (
    arrow_table,
    arrow_type,
    check_seal,
    current_names,
    encoding,
    fitted,
    parquet_bytes,
    texts_array,
)
from wapo_analysis.store.parts import (
    Rows,
    joined,
    list_parts,
    merged_name,
    part_name,
    read_rows,
    scan_step,
)
from wapo_analysis.store.writer import LAST_STEPS, PartWriter
from wapo_analysis.table import Records

# ---- files and JSON -----------------------------------------------------------------------------


def test_a_file_of_the_limit_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    with open_regular(file, 5) as stream:
        assert stream.read() == b"12345"
    with pytest.raises(UserError, match="has 5 bytes, more than the 4 that are read"):
        open_regular(file, 4)
    assert read_json(file, 5) == 12345


@pytest.mark.parametrize("opening", ['{"a": ', "["])
def test_nesting_is_read_to_its_bound(opening: str) -> None:
    closing = "}" if opening[0] == "{" else "]"
    levels = JSON_DEPTH
    deep = opening * levels + "1" + closing * levels
    value = parse_json(deep)
    for _ in range(levels):
        value = value["a"] if isinstance(value, dict) else value[0]
    assert value == 1
    with pytest.raises(ValueError, match=f"nested more than {JSON_DEPTH} deep"):
        parse_json(opening + deep + closing)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_lines_of_a_log_are_numbered_and_broken_ones_given_with_their_reason(
    tmp_path: Path,
) -> None:
    log = tmp_path / "steps.jsonl"
    log.write_bytes(b'{"step": 1}\n\n   \n{"step": "x"}\n{"step": 4}\n{"step"')
    found = [(n, row if isinstance(row, dict) else str(row)) for n, _, row in log_lines(log)]
    assert found[0] == (1, {"step": 1})
    assert found[1] == (4, "no integer 'step'")
    assert found[2] == (5, {"step": 4})
    assert found[3][0] == 6
    with pytest.raises(UserError, match=r"line 4 is not a step record \(no integer 'step'\)"):
        list(step_lines(log))
    log.write_bytes(b'{"step": 1}\n{"step"')
    assert [row["step"] for row in step_lines(log)] == [1], "the last one is being written"
    log.write_bytes(b'{"step": 1}\n{"step"\n')
    with pytest.raises(UserError, match="line 2 is not a step record"):
        list(step_lines(log))


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (2**63 - 1, 2**63 - 1), (-(2**63), -(2**63)), (2**63, 2.0**63), (-(2**63) - 1, -(2.0**63)),
        (1.5, 1.5), (float("nan"), None), (True, True), (None, None), (10**400, ValueError),
        ("text", ValueError), ([1], ValueError),
    ],
)  # fmt: skip
def test_values_of_a_line(value: Any, kept: Any) -> None:
    line = json.dumps({"step": 1, "x": value}).encode()
    if kept is ValueError:
        with pytest.raises(ValueError, match="x is not a number"):
            LineReader().row(line)
        return
    found = LineReader().row(line)["x"]
    assert (found, type(found)) == (kept, type(kept))


def test_a_text_stands_under_a_name_of_the_trainer_s_own_alone() -> None:
    assert LineReader().row(b'{"step": 1, "a/b": "text"}')["a/b"] == "text"
    assert b'"a/b": "t"' in step_line({"step": 1, "a/b": "t"})
    with pytest.raises(UserError, match="step column 'ab' must be a number, got 't'"):
        step_line({"step": 1, "ab": "t"})


def test_one_flipped_bit_of_a_line_is_noticed() -> None:
    line = step_line({"step": 12, "reward": 0.5, "n": np.int64(3), "x": np.float32(np.inf)})
    assert LineReader().row(line) == {"step": 12, "reward": 0.5, "n": 3, "x": None}
    for place in range(len(line) - 1):
        damaged = bytearray(line)
        damaged[place] ^= 1
        reader = LineReader()
        reader.row(step_line({"step": 1}))
        with pytest.raises(ValueError):  # noqa: PT011 (of many reasons)
            reader.row(bytes(damaged))


def test_halves_of_characters_are_escaped_and_all_else_is_kept() -> None:
    assert encodable("aé\U0001f600") == "aé\U0001f600"
    assert encodable("a\ud83db") == "a\\ud83db"
    row = LineReader().row(b'{"step": 1, "a/\\ud83d": "\\uD83Dx"}')
    assert row == {"step": 1, "a/\\ud83d": "\\ud83dx"}
    assert texts_array(["é", None, "\ud83d"]).to_pylist() == ["é", None, "\\ud83d"]


def test_a_step_table_tells_null_from_absent_and_the_last_record_counts() -> None:
    rows = [
        {"step": 3, "reward": 1.0, "mine/x": 2}, {"step": 1, "reward": None, "mine/x": "t"},
        {"step": 3, "reward": 0.5}, {"step": 2, "entropy": None},
    ]  # fmt: skip
    frame = steps_frame(rows)
    assert frame["step"].tolist() == [1, 2, 3]
    assert frame["reward"].isna().tolist() == [True, True, False]
    assert frame["reward"].iloc[2] == 0.5
    assert frame.attrs["null"] == {"reward": {1}, "mine/x": {1}, "entropy": {2}}
    assert list(frame.columns)[-1] == "mine/x"
    ordered = steps_frame([{"step": 1}, {"step": 2}])
    assert (ordered["step"].tolist(), ordered.attrs["null"]) == ([1, 2], {})


# ---- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 7, 15, 22, 23])
def test_rounding_is_to_the_nearest_value_of_so_many_bits(bits: int) -> None:
    values = np.random.default_rng(bits).normal(size=500).astype(np.float32)
    found = round_mantissa(values, bits)
    mantissa, exponent = np.frexp(values.astype(np.float64))
    steps = np.abs(mantissa) * 2 ** (bits + 1)
    expected = np.sign(mantissa) * np.floor(steps + 0.5) * 2.0 ** (exponent - bits - 1)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert len(np.unique(found)) <= len(np.unique(values))


def test_a_nan_of_any_bits_stays_one_beside_numbers() -> None:
    """Rounded as a number, that of all ones would become -0."""
    values = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x3F800000], np.uint32).view(np.float32)
    found = round_mantissa(values)
    assert np.isnan(found).tolist() == [True, True, True, False]
    assert found[3] == 1.0


def test_columns_keep_their_types_and_what_is_missing_is_null() -> None:
    table = arrow_table(token_records(1, 4).with_columns({"entropy": np.full(4, np.nan)}))
    for column in TOKENS.stored:
        assert table.schema.field(column.name).type == arrow_type(column), column.name
    assert table["entropy"].null_count == 4
    assert table["logp"].null_count == 0
    assert arrow_type(TOKENS["kept"]) == pa.bool_()
    keys = ("step", "rank", "group", "rollout", "reward")
    rollouts = {name: [0, 1] for name in keys}
    texts = Records.build(ROLLOUTS, {**rollouts, "completion": ["a", None], "length": [3, 4]})
    found = arrow_table(texts)
    assert found["completion"].to_pylist() == ["a", None]
    assert found["length"].to_pylist() == [3, 4]


def test_every_column_has_the_encoding_that_suits_it() -> None:
    schema = pa.schema(
        [("step", pa.int32()), ("group", pa.int32()), ("rollout", pa.int64()),
         ("logp", pa.float32()), ("wide", pa.float64()), ("text", pa.string())]
    )  # fmt: skip
    found = encoding(schema)
    assert found["column_encoding"] == {
        "logp": "BYTE_STREAM_SPLIT", "wide": "BYTE_STREAM_SPLIT", "group": "DELTA_BINARY_PACKED",
    }  # fmt: skip
    assert found["use_dictionary"] == ["step", "rollout", "text"]
    assert found["write_statistics"] == ["step"]


def test_a_seal_covers_every_byte() -> None:
    import io

    whole = b"".join(parquet_bytes(arrow_table(token_records(1, 3))))
    assert check_seal(io.BytesIO(whole), whole=True)
    head, footer = 20, len(whole) - 60
    body = bytearray(whole)
    body[head] ^= 1
    assert check_seal(io.BytesIO(bytes(body))), "the metadata alone are whole"
    with pytest.raises(ValueError, match="its content does not match its checksum"):
        check_seal(io.BytesIO(bytes(body)), whole=True)
    end = bytearray(whole)
    end[footer] ^= 1
    with pytest.raises(ValueError, match="its metadata do not match their checksum"):
        check_seal(io.BytesIO(bytes(end)))
    assert not check_seal(io.BytesIO(b"PAR1" + bytes(8) + b"PAR1"))
    assert not check_seal(io.BytesIO(b"x"))


def test_columns_of_version_0_1_get_their_name_of_today() -> None:
    assert current_names(["step", "cls", "tokens_of"], PROBES) == ["step", "part", "tokens_of"]
    assert current_names(["step", "cls"], TOKENS) == ["step", "cls"]


def test_columns_that_were_not_asked_for_need_not_be_there() -> None:
    table = pa.table({"step": pa.array([1, 2], pa.int64()), "mine": ["a", "b"]})
    found = fitted(table, TOKENS, ["step", "logp_old"])
    assert found.schema.field("step").type == pa.int32()
    assert found["mine"].to_pylist() == ["a", "b"]
    with pytest.raises(ValueError, match="it lacks column"):
        fitted(table, TOKENS)
    with pytest.raises(ValueError, match="a row has no step"):
        fitted(pa.table({"step": pa.array([1, None])}), TOKENS, ["step"])


@pytest.mark.parametrize(
    ("texts", "size"), [(["abc", "de", "abc"], 8), ([None, "é"], 2), ([], 0), ([None], 0)]
)
def test_bytes_of_texts_that_stand_once_each_in_a_dictionary(texts: list[Any], size: int) -> None:
    column = pa.chunked_array([pa.array(texts, pa.string()).dictionary_encode()] * 2)
    assert parquet._text_bytes(column) == 2 * size


def test_room_is_a_gigabyte_or_256_times_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LEAST_ROOM_BYTES", 1000)
    for wanted, size in ((1000, 1), (2560, 10), (0, 0)):
        parquet._check_room(Path("f"), wanted, size)
    for wanted, size in ((1001, 1), (2561, 10)):
        with pytest.raises(UserError, match=f"f has {size} bytes and would take {wanted:,} in mem"):
            parquet._check_room(Path("f"), wanted, size)


@pytest.mark.parametrize(
    ("values", "held"),
    [
        (np.array([np.nan, np.inf]), False), (np.array([np.nan, 0.0]), True),
        (np.array([], np.float32), False), (np.array([0, 0]), True),
        (np.ma.masked_array([1, 2], [True, True]), False),
        (np.ma.masked_array([1, 2], [True, False]), True),
        (np.array([None, None], object), False), (np.array([None, ""], object), True),
        (np.array([False]), True),
    ],
)  # fmt: skip
def test_a_column_holds_something_or_nothing(values: Any, held: bool) -> None:
    assert holds(values) is held


def test_needs_read_as_they_are_made() -> None:
    need = Need("tokens", "a") | Need("steps", "b") | Need("classes", "c")
    assert str(need) == "tokens.a or b or classes.c"
    assert [other.column for other in need.others] == ["b", "c"]


# ---- parts --------------------------------------------------------------------------------------


def test_files_of_a_table_are_known_by_their_names(tmp_path: Path) -> None:
    names = [part_name(12, 3), part_name(2, 0), merged_name(3, 5, 1), merged_name(3, 4, 0),
             part_name(10**9, 99999)]  # fmt: skip
    for name in [*names, "part-1-0.parquet", "x.parquet", ".part-00000001-0.parquet.ab", "notes"]:
        (tmp_path / name).touch()
    found = [(p.first, p.last, p.rank, p.merged) for p in list_parts(tmp_path)]
    assert found == [
        (3, 4, 0, True), (3, 5, 1, True), (2, 2, 0, False), (12, 12, 3, False),
        (10**9, 10**9, 99999, False),
    ]  # fmt: skip
    assert list_parts(tmp_path / "none") == []
    assert list_parts(tmp_path)[2].steps() == [2]


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        ({1: 5}, [[1]]), ({1: 5, 2: 5}, [[1], [2]]), ({1: 4, 2: 1, 3: 4}, [[1, 2], [3]]),
        ({3: 1, 1: 1, 2: 1}, [[1, 2, 3]]), ({1: 9, 2: 0, 3: 0}, [[1, 2, 3]]),
        ({1: 0, 2: 7, 3: 2}, [[1, 2], [3]]), ({}, [[]]),
    ],
)  # fmt: skip
def test_a_row_group_holds_whole_steps_until_there_are_enough(
    rows: dict[int, int], groups: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "GROUP_ROWS", 5)
    assert list(merge._grouped(rows)) == groups


@pytest.mark.parametrize(
    ("group", "held"),
    [
        ([[1, 5], [3, 0]], {1: 5, 3: 0}), ([], {}), ([[1, 5], [1, 5]], None), ([[1, -1]], None),
        ([[-1, 1]], None), ([[1, 2.0]], None), ([["1", 2]], None), ([[True, 2]], None),
    ],
)  # fmt: skip
def test_steps_that_a_row_group_says_it_holds(group: Any, held: dict[int, int] | None) -> None:
    if held is None:
        with pytest.raises(ValueError, match="wapo_steps has no list of steps and rows"):
            parts._steps_of(group)
    else:
        assert parts._steps_of(group) == held


def test_parts_of_several_ranks_are_read_once_each_and_by_step(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, {})
    for step, rank in ((1, 0), (2, 0), (1, 1), (2, 1)):
        rows = token_records(10 * step + rank, 3)
        keys = {"step": np.full(3, step), "rank": np.full(3, rank)}
        writer.write_part(rows.with_columns(keys), step, rank)
    found = read_rows(tmp_path / "tokens", have=[(2, 0)])
    assert list(found) == [(1, 0), (1, 1), (2, 1)]
    only = read_rows(tmp_path / "tokens", lambda step: step == 2)
    assert [key for key, rows in only.items() if rows.size == 3] == [(2, 0), (2, 1)]
    scanned = scan_step(
        tmp_path / "tokens", 2, ["logp", "coef", "logp_old"],
        lambda block: {"logp": block["logp"], "old": np.isnan(block["logp_old"])},
    )  # fmt: skip
    both = np.concatenate([token_records(20 + rank, 3)["logp"] for rank in (0, 1)])
    np.testing.assert_allclose(scanned["logp"], both, rtol=2**-15)
    assert scanned["old"].tolist() == [True] * 6
    assert scan_step(tmp_path / "tokens", 3, ["logp"], lambda block: block) == {}
    (tmp_path / "tokens" / part_name(2, 1)).unlink()
    alone = scan_step(tmp_path / "tokens", 2, ["logp"], lambda block: block)
    np.testing.assert_allclose(alone["logp"], token_records(20, 3)["logp"], rtol=2**-15)


@pytest.mark.parametrize(("count", "files"), [(LAST_STEPS - 1, LAST_STEPS - 1), (LAST_STEPS, 1)])
def test_a_run_that_ends_merges_what_is_left_if_it_is_much(
    count: int, files: int, tmp_path: Path
) -> None:
    for rank, writer in ((0, RunWriter(tmp_path / "0", {})), (1, PartWriter(tmp_path / "1", {}))):
        for step in range(1, count + 1):
            rows = token_records(step, 2).with_columns({"rank": np.full(2, rank)})
            writer.write_part(rows, step, rank)
            writer.merge(rank)
        writer.close("finished")
        assert len(list_parts(tmp_path / str(rank) / "tokens")) == files


def test_a_writer_that_lost_its_run_merges_nothing_at_its_end(tmp_path: Path) -> None:
    first = RunWriter(tmp_path / "r", {})
    second = PartWriter(tmp_path / "r", {})
    second.check()
    taken = RunWriter(tmp_path / "r", {}, resume_after=0, take_over=True)
    assert first.lost
    assert second.lost
    assert not taken.lost
    second._loose = LAST_STEPS
    second.close("finished")
    taken.close("finished")


def test_resuming_leaves_a_file_that_ends_at_the_step_as_it_is(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r", steps=4)
    assert merge.merge_parts(path / "tokens", 0, 2)
    (file,) = (part.path for part in list_parts(path / "tokens"))
    before = os.stat(file).st_ino
    RunWriter(path, open_run(path).manifest, resume_after=4).close("finished")
    assert os.stat(file).st_ino == before
    RunWriter(path, open_run(path).manifest, resume_after=3).close("finished")
    (part,) = list_parts(path / "tokens")
    assert (part.first, part.last) == (1, 3)
    assert open_run(path).steps["step"].tolist() == [1, 2, 3]


def test_rows_of_neighbouring_steps_are_one_slice_of_their_table() -> None:
    a, b = (pa.table({"x": [10 * n + i for i in range(6)]}) for n in (1, 2))
    spans = [(a, 0, 2), (a, 2, 1), (a, 4, 2), (b, 4, 1), (b, 5, 1), (a, 3, 1), (b, 0, 4)]
    found = [table["x"].to_pylist() for table in joined([Rows(*span) for span in spans])]
    assert found == [[10, 11, 12], [14, 15], [24, 25], [13], [20, 21, 22, 23]]
    assert joined([]) == []
