"""Token rows of other tools one by one: numbers, masks, counts, codes, lists, branches."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.import_sources import write_lines
from wapo_analysis.importers import import_run
from wapo_analysis.importers.prime_rl import _along, _padded, _paths, _score, _text
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import (
    StepCounts,
    class_rows,
    class_table,
    clean_tokens,
    filled_records,
    numbers,
)
from wapo_analysis.importers.tables import Codes, _are_codes, expanded, sequence_rows
from wapo_analysis.schema import TOKENS


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
