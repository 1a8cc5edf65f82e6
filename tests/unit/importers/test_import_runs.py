"""Tables with rows of several runs: which rows are read, and what is said where none can be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.support.import_sources import write_lines
from wapo_analysis.errors import UserError
from wapo_analysis.importers import ImportReport, import_run
from wapo_analysis.importers.run import ImportSettings
from wapo_analysis.store import open_run

RUNS = {"seed-1": 0.1, "seed-12": 0.2, "seed-2": 0.3, None: 0.4}


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_csv(path.with_suffix(".csv"), index=False)
    return path.with_suffix(".csv")


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_lines(path.with_suffix(".jsonl"), rows)


FORMS = (as_csv, as_parquet, as_lines)
Form = Callable[[Path, list[dict[str, Any]]], Path]


def of(source: Path, chosen: str | None) -> ImportReport:
    return import_run(source, source.parent / "out", ImportSettings(run=chosen))


@pytest.mark.parametrize(
    ("chosen", "read"),
    [("seed-1", [0.1, 0.4]), ("seed-12", [0.2, 0.4]), ("seed-2", [0.3, 0.4]), ("12", [0.2, 0.4])],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_is_a_run_s_own_goes_before_those_that_hold_it(
    form: Form, chosen: str, read: list[float], tmp_path: Path
) -> None:
    """Rows of no run are of all."""
    tokens = [{"step": 1, "logp": -reward, "advantage": 1.0, "run": name}
              for name, reward in RUNS.items()]  # fmt: skip
    of(form(tmp_path / "t", tokens), chosen)
    found = open_run(tmp_path / "out").tokens(derived=False)
    assert found["logp"].tolist() == pytest.approx([-reward for reward in read], rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("files", [1, 2])
def test_of_the_steps_of_several_runs_those_of_the_chosen_one_are_read(
    form: Form, files: int, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    for part in range(files):
        rows = [{"step": 5 * part + step, "experiment": name, "reward": reward}
                for name, reward in RUNS.items() if name for step in range(1, 6)]  # fmt: skip
        form(folder / f"t{part}", rows)
    report = of(folder, "seed-1")
    steps = open_run(tmp_path / "out").steps
    assert steps["reward"].tolist() == [0.1] * 5 * files
    assert not report.events


@pytest.mark.parametrize(("chosen", "told"), [
    ("seed", r"{where} holds {runs} runs that fit 'seed'; choose one with --run NAME: {names}$"),
    ("x", r"unknown --run of \S*{where} 'x'; allowed: {names}$"),
])  # fmt: skip
@pytest.mark.parametrize("files", [1, 2])
def test_a_name_that_fits_none_or_several_is_refused_before_anything_is_read(
    chosen: str, told: str, files: int, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    for part in range(files):
        rows = [{"step": step + part, "run": f"seed-{part}{end}", "reward": 0.5}
                for end in "ab" for step in (1, 2)]  # fmt: skip
        as_csv(folder / f"t{part}", rows)
    names = ", ".join(f"seed-{part}{end}" for part in range(files) for end in "ab")
    source = folder if files > 1 else folder / "t0.csv"
    where = "logs" if files > 1 else "t0.csv"
    said = told.format(where=where, runs=2 * files, names=names)
    with pytest.raises(UserError, match=said):
        import_run(source, tmp_path / "out", ImportSettings(run=chosen))


def test_a_row_without_a_step_keeps_its_number_among_rows_of_other_runs(tmp_path: Path) -> None:
    row = {"step": 1.0, "logp": -0.5, "advantage": 1.0}
    rows = [row | {"run": run, "step": step} for run, step in
            (("b", 1), ("a", 1), ("b", None), ("a", 1.5), ("a", 2), ("a", None))]  # fmt: skip
    report = of(as_csv(tmp_path / "t", rows), "a")
    assert report.places == {"token rows without a step left out": ["t.csv:5", "t.csv:7"]}
    assert open_run(tmp_path / "out").tokens(derived=False)["step"].tolist() == [1, 2]


SUMMARY = "a row or two of each and no step: a summary of runs"
SEVERAL = "holds 2 runs; choose one with --run NAME: a, b"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("counts", "steps", "told"),
    [
        ((3, 3), False, SUMMARY), ((1, 4), False, SEVERAL), ((4, 1), False, SEVERAL),
        ((1, 1), True, SEVERAL), ((2,), False, None),
    ],
)  # fmt: skip
def test_a_few_rows_of_each_run_and_no_step_are_a_summary(
    form: Form, counts: tuple[int, ...], steps: bool, told: str | None, tmp_path: Path
) -> None:
    rows = [{"run": name, "reward": n / 8} | ({"step": n} if steps else {})
            for name, count in zip("ab", counts, strict=False)
            for n in range(1, count + 1)]  # fmt: skip
    source = form(tmp_path / "t", rows)
    if told is not None:
        with pytest.raises(UserError, match=told):
            of(source, None)
        return
    of(source, None)
    assert open_run(tmp_path / "out").steps["reward"].tolist() == [0.125, 0.25]


def test_settings_beside_a_table_name_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    rows = [{"step": step, "reward": 0.1, "run": "exp1-seed1"} for step in range(4)]
    as_csv(folder / "log", rows)
    (folder / "config.json").write_text('{"run_name": "exp1", "entropy": 0.01, "reward": 1}')
    assert of(folder, "exp1").steps == 4
