"""Token rows of other tools one by one: numbers, masks, counts, codes, lists, branches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.import_sources import write_lines
from wapo_analysis.importers import import_run, readers, tables
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.prime_rl import _along, _padded, _paths, _score, _text
from wapo_analysis.importers.readers import _WholeLines, csv_frames, parquet_frames
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import (
    StepCounts,
    class_rows,
    class_table,
    clean_tokens,
    filled_records,
    numbers,
)
from wapo_analysis.importers.sink import Sink
from wapo_analysis.importers.tables import (
    Codes,
    TableFeed,
    _are_codes,
    expanded,
    read_tables,
    sequence_rows,
)
from wapo_analysis.schema import TOKENS
from wapo_analysis.store import RunWriter


def fresh() -> ImportReport:
    return ImportReport("table", "t")


NAN = float("nan")


def test_numbers_that_a_column_cannot_hold_are_null_and_counted() -> None:
    frame = pd.DataFrame({"step": [1, 1, 1, 1], "token_id": [5, 2.5, 2**40, "x"],
                          "advantage": [1.0, np.inf, NAN, -1e39]})  # fmt: skip
    report = fresh()
    records = filled_records(TOKENS, frame, report)
    assert np.ma.getmaskarray(records["token_id"]).tolist() == [False, True, True, True]
    assert records["advantage"][0] == 1
    assert np.isnan(records["advantage"][1:]).all()
    assert dict(report.counts) == {
        "token_id that is no whole number, now null": 1,
        "token_id beyond int32, now null": 1,
        "values of token_id that are no number, left out": 1,
        "advantage beyond float32, now null": 2,
    }
    assert (records["rank"] == 0).all()
    assert np.ma.getmaskarray(records["kept"]).all()


@pytest.mark.parametrize(
    ("given", "found"),
    [([1, "2", None, "x"], [1, 2, NAN, NAN]), ([np.inf, 1e38, 4e38], [NAN, 1e38, NAN])],
)
def test_values_as_numbers(given: list[Any], found: list[float]) -> None:
    np.testing.assert_array_equal(numbers(pd.Series(given, dtype=object), len(given)), found)
    assert np.isnan(numbers(None, 2)).tolist() == [True, True]


def test_rows_outside_of_the_mask_go_and_log_probabilities_end_at_zero() -> None:
    frame = pd.DataFrame({"step": 1, "advantage": [1, 2, 3, 4, NAN], "loss_mask": [1, 0, 1, 1, 1],
                          "logp": [-1, -1, 1e-5, 2e-5, -1],
                          "entropy": [np.inf, 1, 1, 1, 1]})  # fmt: skip
    report = fresh()
    rows = clean_tokens(frame, report)
    assert rows["advantage"].tolist() == [1, 3, 4]
    np.testing.assert_array_equal(rows["logp"], [-1, 0, NAN])
    np.testing.assert_array_equal(rows["entropy"], [NAN, 1, 1])
    assert dict(report.counts) == {
        "numbers that were not finite, now null": 1, "logp above 0, now null": 1,
        "token rows without an advantage left out": 1,
    }  # fmt: skip


def test_class_totals_leave_out_what_the_source_does_not_tell() -> None:
    frame = pd.DataFrame({"step": [1] * 3, "advantage": [1.0, 1, -1], "logp": [-0.1, NAN, -3]})
    totals = class_rows(filled_records(TOKENS, frame, fresh()), 1.0)
    assert np.ma.getmaskarray(totals["kept"]).all()
    assert np.ma.getmaskarray(totals["clipped"]).all()
    assert np.ma.getmaskarray(totals["rule_breaks"]).all()
    assert sorted(totals["tokens"].tolist()) == [1, 1, 1]
    assert -1 in totals["prob_bin"].tolist()


def test_bins_of_the_official_files() -> None:
    counts = StepCounts(
        token_count={1: np.array([4, 0, 2, 0, 3]), -1: np.array([0, 0, 0, 0, 5])},
        grad_mass={1: np.array([0.5, 9, 0.25, 9, 0.1])},
    )
    rows = class_table(3, counts, False, fresh())
    found = [
        (int(s), int(b), int(t), float(m))
        for s, b, t, m in zip(rows["sign"], rows["prob_bin"], rows["tokens"],
                              rows["grad_mass_proxy"], strict=True)
    ]  # fmt: skip
    assert [f[:1] + f[2:3] for f in found] == [(1, 4), (1, 2), (1, 3), (-1, 5)]
    np.testing.assert_allclose([f[3] for f in found], [2, 0.5, 0.3, NAN])
    assert found[0][1] < found[1][1] < found[2][1] == found[3][1]
    counts.bins = {"pos_peak_eligible": 9}
    rows = class_table(3, counts, False, fresh())
    bins = np.asarray(rows["regime"]) == -1
    assert np.ma.getmaskarray(rows["tokens"])[bins].all(), "counted by class already"
    assert bins.sum() == 3
    assert counts.without_zero()
    assert not StepCounts(bins={"pos_peak_eligible": 8}, sampled=8, zeros=1).without_zero()
    assert StepCounts(
        bins={"pos_peak_eligible": 5, "neg_peak_eligible": 3}, sampled=8
    ).without_zero()


def test_codes_are_numbers_of_their_own_else_the_next_free_one() -> None:
    codes = Codes()
    assert [codes.code("group", 1, v) for v in (3, "a", "b", 3.0, "a", None, NAN)] == [
        3, 1, 2, 3, 1, None, None,
    ]  # fmt: skip
    assert codes.code("group", 1, "c") == 4, "3 is taken"
    assert codes.code("group", 2, "c") == codes.next("rollout", 1) == 0
    assert [codes.next("rollout", 1), codes.code("rollout", 1, -5)] == [1, 2]
    frame = pd.DataFrame({"step": [1, 1, 2], "group": ["x", "y", "x"], "rollout": [0, 1, 5]})
    applied = Codes().apply(frame)
    assert applied["group"].tolist() == [0, 1, 0]
    assert applied["rollout"].tolist() == [0, 1, 5]


@pytest.mark.parametrize(
    ("values", "codes"),
    [([0, 1], True), ([0.5], False), ([-1], False), ([2**31], False), ([2**31 - 1], True),
     (["x"], False), ([[1]], False)],
)  # fmt: skip
def test_what_is_a_code(values: list[Any], codes: bool) -> None:
    assert _are_codes(pd.Series(values)) is codes


def test_lists_of_a_completion_become_rows() -> None:
    rows = expanded({"logp": [1, 2, 3], "step": 7, "loss_mask": [1, 0, NAN]})
    assert rows == {"logp": [1], "step": [7], "position": [0]}
    assert expanded({"step": 7}) == {"step": [7], "position": [0]}
    assert expanded({"a": [1, 2], "position": [5, 6]})["position"] == [5, 6]
    with pytest.raises(ValueError, match="lists of different length"):
        expanded({"a": [1], "b": [1, 2]})
    assert sequence_rows({"a": [1, None], "b": ["x", 1]}).dtypes.astype(str).tolist() == [
        "float64", "object", "int64",
    ]  # fmt: skip


# ---- branches of prime-rl


def test_paths_tokens_and_scores_of_a_trace() -> None:
    nodes: list[dict[str, Any]] = [
        {"token_ids": [1, 2], "mask": [0, 0]},
        {"parent": 0, "token_ids": [3, 4], "mask": [1, 1], "logprobs": [-0.1]},
        {"parent": 0, "token_ids": [5], "mask": [1, 1], "message": {"content": "said"}},
    ]
    assert _paths(nodes) == [[nodes[0], nodes[1]], [nodes[0], nodes[2]]]
    assert _along([nodes[0], nodes[1]]) == {
        "token_id": [1, 2, 3, 4], "loss_mask": [False, False, True, True],
        "logp_old": [None, None, -0.1, None],
    }  # fmt: skip
    assert _paths([{"parent": 0}]) == []
    assert (_padded([1, 2, 3], 2), _padded([1], 3, 0)) == ([1, 2], [1, 0, 0])
    assert [_score(r) for r in ({"score": 2}, {"score": 2, "weight": 0.5}, {"weight": 0})] == [
        2, 1, 0,
    ]  # fmt: skip
    assert _text(nodes) == "said"


def test_a_step_of_no_number_is_a_broken_line_of_its_table(tmp_path: Path) -> None:
    rows = [{"step": "x", "reward": 1.0}, {"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.25}]
    report = import_run(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert report.broken == ["t.jsonl:1: no step"]
    assert (report.steps, report.lines, report.files) == (2, 3, 1)


# ---- rows of tables


def feed_of(folder: Path) -> TableFeed:
    writer = RunWriter(folder / "run", {"source": "import"})
    sink = Sink(writer, fresh(), NameTable({}), 1.0)
    return TableFeed(sink, sink.report, Path("t.jsonl"))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("step", "logp", "advantage"), "tokens"), (("step", "prob", "advantage"), "tokens"),
        (("step", "logp", "reward"), "steps"), (("step", "advantage"), "steps"),
        (("step", "completion", "reward"), "rollouts"), (("completion", "reward"), "steps"),
        (("step", "completion"), "steps"), (("step", "reward"), "steps"),
    ],
)  # fmt: skip
def test_what_a_row_is_by_its_columns(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    assert feed_of(tmp_path)._kind(names)[0] == kind


TOKEN = {"step": 1, "logp": -0.5, "advantage": 1.0}


@pytest.mark.parametrize(
    ("rows", "held", "given"),
    [
        ([TOKEN] * 2, 2, 0), ([TOKEN] * 3, 0, 3), ([TOKEN] * 5, 2, 3),
        ([TOKEN, TOKEN | {"kept": 1}], 1, 1), ([TOKEN, TOKEN | {"step": "x"}, TOKEN], 2, 0),
        ([TOKEN | {"logp": [-1, -2]}], 2, 0), ([TOKEN | {"logp": [-1, -2, -3]}], 0, 3),
        ([TOKEN | {"logp": [-1, -2]}, TOKEN | {"logp": [-1], "kept": [1]}], 1, 2),
    ],
)  # fmt: skip
def test_token_rows_are_handed_over_by_the_block_or_where_the_columns_change(
    rows: list[dict[str, Any]], held: int, given: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tables, "_BATCH", 3)
    feed = feed_of(tmp_path)
    for number, row in enumerate(rows, start=1):
        feed.record(row, number)
    assert len(feed._held) + len(feed._lists.get("position", ())) == held
    assert feed.sink._token_rows == given
    feed.close()
    assert feed.sink._token_rows == given + held
    assert feed.report.places == (
        {"token rows without a step left out": ["t.jsonl:2"]} if len(rows) == 3 > held > 0 else {}
    )


def test_rows_without_a_step_are_named_by_their_number_in_the_file(tmp_path: Path) -> None:
    feed = feed_of(tmp_path)
    feed.frame(pd.DataFrame([TOKEN, TOKEN | {"step": None}, TOKEN | {"step": 1.5}, TOKEN]), 7)
    assert feed.report.places == {"token rows without a step left out": ["t.jsonl:8", "t.jsonl:9"]}
    assert feed.sink._token_rows == 2


def test_codes_of_the_512_steps_seen_last_are_remembered() -> None:
    codes = Codes()
    assert [codes.code("group", 0, name) for name in ("a", "b")] == [0, 1]
    for step in range(1, 512):
        codes.code("group", step, "a")
    assert codes.code("group", 0, "b") == 1
    codes.code("group", 512, "a")
    assert codes.code("group", 0, "b") == 0


@pytest.mark.parametrize(
    ("settings", "broken"), [([{"lr": 0.1}], 0), ([{"lr": 0.1}, {"lr": 0.2}], 2)]
)
def test_one_record_without_a_step_beside_a_log_is_settings(
    settings: list[dict[str, float]], broken: int, tmp_path: Path
) -> None:
    sink = feed_of(tmp_path).sink
    log = write_lines(tmp_path / "log.jsonl", [{"step": 1, "reward": 0.5}])
    (tmp_path / "other.json").write_text(json.dumps(settings))
    (tmp_path / "one.json").write_text(json.dumps([{"step": 2, "reward": 0.25}]))
    read_tables((log, tmp_path / "other.json", tmp_path / "one.json"), sink, sink.report)
    sink.finish()
    assert (sink.report.steps, sink.report.broken_lines, sink.report.files) == (2, broken, 3)
    assert sink.report.lines == 2 + broken
    assert sink.report.notes == (["other.json holds settings, no log"] if not broken else [])


# ---- lines of tables


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("step,reward\n1,123\n2,456", 0), ("step,reward\n1,123\n2,45", 4),
        ("step,reward\n1,123", 5), ("step,reward\n1,123\n2", 1), ("step,reward\n1,123\n2,4,5", 5),
        ("step,reward\n1,1\n2,123\n3,45", 0), ("step,reward\n1,1\n2,123\n3,4", 3),
        ('step,reward\n1,123\n2,"4"', 0), ("step,reward\r\n1,12\r\n2,45", 0),
        ("step,reward\n1,123456\n2,3,4\n3,456", 5), ("step,reward", 11), ("step,reward\n", 0),
        ("a,b\n" + "1,123456\n" * 150 + "1,2\n" * 100 + "3,4", 0),
        ("a,b\n" + "1,123456\n" * 150 + "1,2\n" * 99 + "3,4", 3),
    ],
)  # fmt: skip
def test_a_last_line_is_whole_if_its_last_number_is_as_long_as_half_of_those_before(
    text: str, cut: int, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode())
    source = _WholeLines(tmp_path / "t.csv", fresh(), 2, ",")
    read = source.readall()
    source.close()
    assert (source.cut, read) == (cut, text.encode()[: len(text) - cut])


@pytest.mark.parametrize(
    ("inside", "told"),
    [(["1,2"] * 2, 0), (["1,2"] * 3, 3), (["1,2"] * 3 + ["x"] * 2, 3), (["1,2"] * 3 + ["x"] * 3, 0),
     (["x,y"] * 3, 0), (["1,2,3"] * 3, 0)],
)  # fmt: skip
def test_three_lines_like_rows_most_of_a_text_are_a_quotation_mark_left_open(
    inside: list[str], told: int, tmp_path: Path
) -> None:
    text = "\n".join(["a", *inside])
    (tmp_path / "t.csv").write_text(f'step,note\n1,b\n2,"{text}"\n')
    report = fresh()
    assert [first for first, _ in csv_frames(tmp_path / "t.csv", report)] == [2]
    what = "lines in quotation marks that look like rows, read as text"
    assert dict(report.counts) == ({what: told} if told else {})
    assert report.places == ({what: ["t.csv:3"]} if told else {})


@pytest.mark.parametrize(("place", "read"), [(199, "0.5"), (200, "50%")])
def test_how_a_column_spells_its_numbers_is_seen_in_its_first_200_rows(
    place: int, read: str, tmp_path: Path
) -> None:
    cells = ["0.25"] * place + ["50%"]
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"1,{cell}\n" for cell in cells))
    ((_, frame),) = csv_frames(tmp_path / "t.csv", fresh())
    assert frame["b"].tolist()[-1] == read


def test_blocks_of_a_table_begin_where_the_last_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_BLOCK", 64)
    monkeypatch.setattr(readers, "_ROWS", 4)
    frame = pd.DataFrame({"step": range(1000, 1030), "reward": 0.125})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    for read, name, first in ((csv_frames, "t.csv", 2), (parquet_frames, "t.parquet", 1)):
        report = fresh()
        blocks = list(read(tmp_path / name, report))
        assert len(blocks) > 5
        assert [int(part["step"].iloc[0]) - 1000 + first for _, part in blocks] == [
            number for number, _ in blocks
        ]
        assert (report.lines, report.files) == (30, 1)
