"""Damaged inputs that once ended in a traceback, and as many new ones as a fast test can have."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.damage import DEEP
from tests.fuzz.sources import SOURCES, make_all
from tests.fuzz.target import Fuzz
from tests.support.builders import write_fake_run
from wapo_analysis.cli import run
from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run
from wapo_analysis.plots import FIGURES, unavailable
from wapo_analysis.store import open_run
from wapo_analysis.train.config import TrainConfig

DATA = Path(__file__).parents[1] / "data"
FOUND = DATA / "faults"
"""Files as they were found; of a run or an official source only the damaged one is kept."""


def cases(start: str) -> list[str]:
    return sorted(path.name for path in FOUND.glob(f"{start}*"))


def handled(*arguments: str | Path, capfd: pytest.CaptureFixture[str]) -> int:
    """Exit code of a command: success or a finding, or one line of a user's error."""
    code = run([str(argument) for argument in arguments])
    errors = capfd.readouterr().err
    assert code in (0, 1, 2)
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    if code == 2:
        assert errors.splitlines()[-1].startswith("wapo: ")
    return code


@pytest.mark.parametrize("name", cases("imp-"))
def test_a_damaged_source_is_imported_or_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, official = tmp_path / "src", name.startswith("imp-official")
    if official:
        shutil.copytree(DATA / "official_run", source)
    shutil.copytree(FOUND / name / "o" if official else FOUND / name, source, dirs_exist_ok=True)
    if handled("import", source, "--out", tmp_path / "run", capfd=capfd) == 0:
        handled("diagnose", tmp_path / "run", capfd=capfd)
    else:
        assert not (tmp_path / "run").exists(), "a refused import leaves nothing"


@pytest.mark.parametrize("file", sorted(p.name for p in (FOUND / "tables").iterdir()))
def test_odd_tables_are_imported_or_refused(
    file: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handled("import", FOUND / "tables" / file, "--out", tmp_path / "run", capfd=capfd)


def test_a_name_that_is_no_text_is_imported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    SOURCES["lists"](folder)
    (folder / "l.parquet").rename(folder / "l\udcff.parquet")
    assert handled("import", folder, "--out", tmp_path / "run", capfd=capfd) == 0


@pytest.mark.parametrize("kind", ["json", "jsonl", "rollouts", "verl", "prime-rl exports", "trl"])
def test_json_nested_without_end_is_left_out_or_refused(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    SOURCES[kind](folder)
    for file in sorted(folder.rglob("*.json*"))[:2]:
        content = file.read_bytes()
        place = content.rindex(b":")
        file.write_bytes(content[: place + 1] + DEEP.encode() + content[place + 1 :])
    handled("import", folder, "--out", tmp_path / "run", capfd=capfd)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(
        tmp_path_factory.mktemp("whole") / "r", steps=12, probe_every=3, loose=True
    )


COMMANDS: tuple[Callable[[Path, Path], list[str | Path]], ...] = (
    lambda path, other: ["diagnose", path],
    lambda path, other: ["diagnose", path, "--step", "5", "-f", "json"],
    lambda path, other: ["compare", path, other],
    lambda path, other: ["whatif", path, "--exclude-bins", "neg_peak"],
    lambda path, other: ["watch", path, "--once"],
    lambda path, other: ["check", path],
    lambda path, other: ["compact", path],
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (i % 4 > 0)) for i, n in enumerate(cases("run-"))],
)
def test_a_damaged_run_is_read_or_refused_by_every_command(
    name: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(whole, tmp_path / "r")
    shutil.copytree(FOUND / name, path, dirs_exist_ok=True)
    for command in COMMANDS:
        handled(*command(path, whole), capfd=capfd)


@pytest.mark.parametrize("file", sorted(p.name for p in (FOUND / "toml").iterdir()))
def test_settings_beyond_all_measure_are_refused(file: str) -> None:
    with pytest.raises(UserError):
        TrainConfig.from_toml(FOUND / "toml" / file)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.binary(min_size=40, max_size=200))
def test_whatever_is_damaged_is_handled(fuzz: Fuzz, data: bytes) -> None:
    outcome = fuzz.play(data)
    assert not outcome.fault, f"{outcome.call}: {outcome.input}\n{outcome.trace}"


def test_what_an_import_says_of_its_figures_is_what_its_run_folder_gives(tmp_path: Path) -> None:
    for kind, source in make_all(tmp_path / "whole").items():
        if kind not in SOURCES:
            continue
        report = import_run(source, tmp_path / kind)
        run = open_run(tmp_path / kind)
        lacking = {name for name, figure in FIGURES.items() if unavailable(figure, [run])}
        assert set(report.cannot_feed) == lacking, kind
