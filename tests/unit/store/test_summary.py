"""Totals by step and class from the files, against the rows read and derived the long way."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.derive import CLASS_ORDER
from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run, summary
from wapo_analysis.store.merge import compact, merge_parts
from wapo_analysis.store.summary import class_summary

ENGINES = ["pyarrow", "duckdb"]
_READ = ("step", *summary.UPDATE_STATISTICS)


def the_long_way(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    groups = rows.astype({"entropy": "float64"}).groupby(by, observed=True)
    return pd.DataFrame(
        {
            "tokens": groups.size(),
            "entropy": groups["entropy"].mean(),
            "pred_dentropy_sum": groups["pred_dentropy"].sum(min_count=1),
            "grad_mass": groups["grad_norm"].sum(min_count=1),
        }
    ).reset_index()


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(found) == list(expected)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every class, certain tokens, and statistics that are missing here and there."""
    path = write_fake_run(
        tmp_path_factory.mktemp("summary") / "r", steps=6, temperature=0.7, loose=True
    )
    for number, part in enumerate(sorted((path / "tokens").iterdir())):
        table = pq.read_table(part).to_pandas()
        rng = np.random.default_rng(number)
        certain = rng.random(len(table)) < 0.3
        table.loc[certain, "logp"] = np.float32(-1e-9)
        table.loc[certain, "collision_rest"] = np.float32(1e-19)
        for name in ("entropy", "collision_rest", "coef", "logp"):
            table.loc[rng.random(len(table)) < 0.1, name] = np.nan
        table.loc[table.step == 4, "collision_logp_rest"] = np.nan
        table.loc[rng.random(len(table)) < 0.1, "advantage"] = 0.0
        schema = pq.read_schema(part)
        pq.write_table(pa.Table.from_pandas(table, schema), part)
    return path


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("by", [["step", "cls"], ["cls"], ["step"]])
def test_sums_are_those_of_the_derived_rows(run: Path, engine: str, by: list[str]) -> None:
    if engine == "duckdb":
        pytest.importorskip("duckdb", reason="needs the extra [fast]")
    expected = the_long_way(open_run(run).tokens(), by)
    assert_same(open_run(run).summary(by, engine), expected)
    if "step" in by:
        assert expected[expected.step == 4].pred_dentropy_sum.isna().all()
    if by == ["cls"]:
        assert set(expected.cls) == set(CLASS_ORDER)


def test_one_minus_p_keeps_its_digits_in_sql(tmp_path: Path) -> None:
    """Steps from near certainty to near impossibility, both sides of where the query changes."""
    pytest.importorskip("duckdb", reason="needs the extra [fast]")
    logp = -np.r_[np.geomspace(1e-12, 80, 200), np.linspace(9.9e-4, 1.01e-3, 20)]
    row = {"entropy": 1e-9, "collision_rest": 0.0, "collision_logp_rest": 0.0, "coef": -1.0}
    columns = {name: np.full(len(logp), value) for name, value in row.items()}
    columns |= {"step": np.arange(len(logp)), "advantage": np.ones(len(logp)), "logp": logp}
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), file)
    found = class_summary(file, 0.7, "duckdb")
    expected = class_summary(file, 0.7, "pyarrow")
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=5e-13, atol=0)


@pytest.mark.parametrize("column", ["advantage", "logp", "entropy", "collision_rest", "coef"])
def test_nan_that_another_tool_wrote_counts_as_missing(
    run: Path, tmp_path: Path, column: str
) -> None:
    pytest.importorskip("duckdb", reason="needs the extra [fast]")
    rows = open_run(run).table("tokens")
    rows.loc[::7, column] = np.nan
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pydict({n: rows[n].to_numpy() for n in _READ}), file)
    assert pq.read_table(file)[column].null_count == 0
    assert_same(class_summary(file, 0.7, "duckdb"), class_summary(file, 0.7, "pyarrow"))


def test_blocks_row_groups_and_files_make_no_difference(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_run(run)
    expected = class_summary(run, opened.temperature, "pyarrow")
    one = tmp_path / "all.parquet"
    shuffled = opened.table("tokens").sample(frac=1, random_state=0)
    shuffled.to_parquet(one, row_group_size=150)
    monkeypatch.setattr(summary, "_BLOCK", 37)
    for source in (one, [one], run / "tokens", sorted((run / "tokens").glob("*.parquet"))):
        assert_same(class_summary(source, opened.temperature, "pyarrow"), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_two_files_hold_count_once(run: Path, tmp_path: Path, engine: str) -> None:
    if engine == "duckdb":
        pytest.importorskip("duckdb", reason="needs the extra [fast]")
    copy = Path(shutil.copytree(run, tmp_path / "r"))
    expected = class_summary(copy, 1.0, engine)
    parts = {part.name: part.read_bytes() for part in (copy / "tokens").iterdir()}
    merge_parts(copy / "tokens", 0, 2)
    assert_same(class_summary(copy, 1.0, engine), expected)
    for name in list(parts)[1:4]:
        (copy / "tokens" / name).write_bytes(parts[name])
    assert_same(class_summary(copy, 1.0, engine), expected)
    compact(copy)
    assert_same(class_summary(copy, 1.0, engine), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_that_two_merged_files_share_count_once(
    run: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "duckdb":
        pytest.importorskip("duckdb", reason="needs the extra [fast]")
    folders = []
    for name in ("early", "late"):
        folder = Path(shutil.copytree(run / "tokens", tmp_path / name / "tokens"))
        parts = sorted(folder.iterdir())
        for part in parts[-1:] if name == "early" else parts[:1]:
            part.unlink()
        assert merge_parts(folder, 0, 2)
        folders.append(folder)
    early, late = folders
    (merged,) = late.iterdir()
    shutil.copy(merged, early)
    assert len(list(early.iterdir())) == 2
    assert_same(class_summary(early, 1.0, engine), class_summary(run, 1.0, engine))


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    import tracemalloc

    table = pa.table(
        {
            "step": np.zeros(40_000, np.int32),
            **{name: np.full(40_000, -0.1, np.float32) for name in summary.UPDATE_STATISTICS},
        }
    )
    peaks = []
    for groups in (2, 12):
        file = tmp_path / f"{groups}.parquet"
        with pq.ParquetWriter(file, table.schema) as writer:
            for _ in range(groups):
                writer.write_table(table)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        found = class_summary(file, 1.0, "pyarrow")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.tokens.sum() == groups * 40_000
        assert pa.total_allocated_bytes() - before < 1 << 20
    assert peaks[1] < 1.5 * peaks[0]


def token_file(path: Path, **columns: list[float]) -> Path:
    """A file of token rows of step 1 without all that is not given."""
    rows = len(columns["logp"])
    filled = {name: columns.get(name, [np.nan] * rows) for name in summary.UPDATE_STATISTICS}
    table = {"step": np.ones(rows, np.int64), **{n: np.float64(v) for n, v in filled.items()}}
    pq.write_table(pa.Table.from_pandas(pd.DataFrame(table), preserve_index=False), path)
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_a_token_on_the_border_is_a_peak_and_one_without_entropy_counts(
    tmp_path: Path, engine: str
) -> None:
    """p (1 - p) = S - p^2 where two tokens share the probability; just above it is a valley."""
    if engine == "duckdb":
        pytest.importorskip("duckdb", reason="needs the extra [fast]")
    file = token_file(
        tmp_path / "rows.parquet", logp=[float(np.log(0.5))] * 3, advantage=[1.0, 1.0, -1.0],
        collision_rest=[0.25, 0.25 * (1 + 3e-6), 0.25], coef=[-1.0] * 3,
    )  # fmt: skip
    found = class_summary(file, engine=engine)
    assert list(found["cls"]) == ["pos_peak", "pos_valley", "neg_peak"]
    assert found["tokens"].tolist() == [1, 1, 1]
    assert found["entropy"].isna().all()
    np.testing.assert_allclose(found["grad_mass"], np.sqrt(0.25 + 0.25), rtol=1e-5)


@pytest.mark.parametrize(
    ("engine", "installed", "cpus", "chosen"),
    [("auto", True, 4, True), ("auto", True, 3, False), ("auto", False, 4, False),
     ("duckdb", True, 1, True), ("pyarrow", True, 8, False)],
)  # fmt: skip
def test_what_reads_is_chosen_by_the_cpus_unless_it_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, engine: str, installed: bool, cpus: int,
    chosen: bool,
) -> None:  # fmt: skip
    used: list[int] = []
    monkeypatch.setattr(summary, "_by_duckdb", lambda *_: used.append(1))  # None: arrow goes on
    monkeypatch.setattr(summary, "find_spec", lambda name: name if installed else None)
    monkeypatch.setattr(summary.os, "sched_getaffinity", lambda pid: range(0 if pid else cpus))
    assert len(class_summary(run, engine=engine))
    assert bool(used) is chosen
    monkeypatch.delattr(summary.os, "sched_getaffinity")
    for count in (None, cpus):
        used.clear()
        monkeypatch.setattr(summary.os, "cpu_count", lambda count=count: count)
        class_summary(run, engine=engine)
        assert bool(used) is (chosen and (count is not None or engine != "auto"))


def test_files_that_are_merged_while_they_are_summed_up_are_listed_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("duckdb", reason="needs the extra [fast]")
    folder = Path(shutil.copytree(run / "tokens", tmp_path / "tokens"))
    expected, verified = class_summary(folder, engine="duckdb"), []
    verify, last = summary.verify, max(folder.iterdir())

    def checked(file: Path) -> bool:
        verified.append(file.name)
        verify(file)
        return file == last and merge_parts(folder, 0, 2)

    monkeypatch.setattr(summary, "verify", checked)
    assert_same(class_summary(folder, engine="duckdb"), expected)
    assert len(verified) == 7
    assert verified[-1].startswith("merged")


def test_bad_requests_get_one_clear_line(run: Path, tmp_path: Path, monkeypatch) -> None:
    for given, message in (
        ({"engine": "polars"}, "unknown engine 'polars'"),
        ({"by": ["rank"]}, "by must be 'step', 'cls' or both"),
        ({"by": []}, "by must be"),
        ({"source": tmp_path / "absent"}, "no token rows at"),
        ({"source": tmp_path}, "no token rows in"),
        ({"source": []}, "no token rows in no files"),
    ):
        with pytest.raises(UserError, match=message):
            class_summary(**{"source": run, **given})
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"broken\.parquet is broken"):
        class_summary(broken, engine="pyarrow")
    monkeypatch.setattr(summary, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wapo-analysis\[fast\]"):
        class_summary(run, engine="duckdb")
    assert len(class_summary(run))
