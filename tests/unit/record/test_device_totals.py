"""Class totals made where the tokens are: the sums of the host, and the way of a NaN."""

import numpy as np
import pytest

from tests.support.recorder_passes import tokens
from wapo_analysis.derive import class_totals
from wapo_analysis.record.step import pass_sums, token_records
from wapo_analysis.record.tokens import DeviceTotals, HostPass, given_in_all


@pytest.mark.parametrize("sequence_level", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 60, 5000])
def test_totals_and_sums_equal_those_of_the_rows(
    rows: int, sequence_level: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wapo_analysis.record.tokens._BLOCK", 700)
    given = tokens(3, rows)
    given.entropy_after, given.logp_prox = given.entropy + 0.1, given.logp_old - 0.02
    given.logp[::7] = given.collision_rest[::11] = given.entropy[::20] = float("nan")
    names = given_in_all([given])
    found, sums = DeviceTotals(given, 0.8, names, sequence_level).arrived(5, 0)
    (table,) = token_records([HostPass(given)], 5, 0, 0.8)
    expected = class_totals(table)
    assert len(found) == len(expected)
    for name in expected.columns:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, err_msg=name)
    plain = pass_sums(table, names, sequence_level)
    assert sums.keys() == plain.keys()
    for name, value in plain.items():
        assert sums[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_statistics_a_source_lacks_are_missing_in_the_totals() -> None:
    given = tokens(1)
    given.coef = given.entropy = given.collision_rest = given.kept = None
    found, sums = DeviceTotals(given, 1.0, given_in_all([given])).arrived(1, 0)
    assert found["tokens"].sum() == found["kept"].sum() == len(given.logp)
    assert set(found["regime"]) == {-1}
    assert np.isnan(found["entropy_sum"]).all()
    assert sums["entropy n"] == sums["kept_tokens n"] == 0


def test_a_cell_of_which_no_token_was_kept_is_there() -> None:
    given = tokens(1)
    given.kept = given.kept & False  # type: ignore[operator]
    found, _ = DeviceTotals(given, 1.0, None).arrived(1, 0)
    assert found["tokens"].sum() == len(given.logp)
    assert found["kept"].sum() == 0
