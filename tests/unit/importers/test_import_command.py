"""``wapo import`` from the outside: what it prints, refuses, and what reads its runs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.support.builders import write_fake_run
from tests.support.import_sources import (
    token_columns,
    write_lines,
    write_prime_exports,
    write_prime_monitor,
    write_trl,
    write_verl,
)
from wapo_analysis.cli import run
from wapo_analysis.importers import detect
from wapo_analysis.plots import FIGURES
from wapo_analysis.store import open_run

OFFICIAL = Path(__file__).parents[2] / "data" / "official_run"


def _official(path: Path) -> Path:
    return OFFICIAL


def _table(path: Path) -> Path:
    path.mkdir()
    pd.DataFrame(token_columns()).to_csv(path / "tokens.csv", index=False)
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "official": _official,
    "prime-rl": write_prime_exports,
    "prime-rl traces": write_prime_monitor,
    "verl": write_verl,
    "trl": write_trl,
    "table": _table,
}


def digest(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_command_reads_an_imported_run(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = SOURCES[kind](tmp_path / "source")
    before = digest(source)
    out = str(tmp_path / "run")
    assert run(["import", str(source), "--out", out, "--label", "THEIRS"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith(f"{kind.split()[0]}: ")
    assert f"run: {out}" in printed
    assert digest(source) == before, "the source is only read"
    told = open_run(out).manifest["import"]
    assert run(["diagnose", out, "--format", "json"]) == 0
    assert json.loads(capfd.readouterr().out)["run"] == "run"
    assert run(["compare", out, "--format", "json"]) == 0
    assert json.loads(capfd.readouterr().out)["settings"][0]["label"] == "THEIRS"
    fed = [name for name in FIGURES if FIGURES[name].needs and name not in told["cannot_feed"]]
    assert fed, "every source feeds something"
    wanted = ",".join([fed[-1], *told["cannot_feed"]])
    assert run(["figures", out, "--out", str(tmp_path / "f"), "--only", wanted]) == 0
    assert [file.stem for file in (tmp_path / "f").iterdir()] == [fed[-1]]
    lines = [line for line in capfd.readouterr().err.splitlines() if "left out because" in line]
    left_out = {name for line in lines for name in line.rpartition(": ")[2].split(", ")}
    assert left_out == told["cannot_feed"].keys()


def test_one_report_of_all_kinds(tmp_path: Path) -> None:
    for number, (kind, write) in enumerate(SOURCES.items()):
        (tmp_path / "from").mkdir(exist_ok=True)
        source = write(tmp_path / "from" / str(number))
        out = tmp_path / "runs" / kind.replace(" ", "-")
        assert run(["import", str(source), "--out", str(out)]) == 0
    page = tmp_path / "report.html"
    assert run(["report", str(tmp_path / "runs"), "--out", str(page)]) == 0
    for kind in SOURCES:
        assert kind.replace(" ", "-") in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_report_of_each_kind(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(["import", str(SOURCES[kind](tmp_path / "source")), "--out", str(out)]) == 0
    assert run(["report", str(out)]) == 0
    assert "<svg" in (out / "report.html").read_text()


def test_an_imported_run_compares_with_one_of_ours(tmp_path: Path) -> None:
    ours = write_fake_run(tmp_path / "ours", steps=10)
    assert run(["import", str(OFFICIAL), "--out", str(tmp_path / "theirs"), "--seed", "0"]) == 0
    assert run(["compare", str(ours), str(tmp_path / "theirs")]) == 0


def test_options_reach_the_manifest(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--objective", "wapo", "--name", "paper", "--seed", "3", "--temperature", "0.7"]
    assert run(["import", str(OFFICIAL), "--out", str(out), *options]) == 0
    opened = open_run(out)
    assert (opened.name, opened.objective, opened.label) == ("paper", "wapo", "WAPO")
    assert (opened.seed, opened.temperature) == (3, 0.7)
    assert opened.manifest["status"] == "finished"


def test_the_run_lands_below_runs_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "log.jsonl", [{"step": 1, "reward": 1.0}])
    monkeypatch.chdir(tmp_path)
    assert run(["import", str(source)]) == 0
    assert open_run(tmp_path / "runs" / "log").steps["reward"].tolist() == [1.0]


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["import", *arguments]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def test_wrong_sources_and_options_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "nothing at" in refused(capfd, str(tmp_path / "absent"), "--out", out)
    assert "is empty" in refused(capfd, str(empty), "--out", out)
    (empty / "log.jsonl").touch()
    assert "is empty" in refused(capfd, str(empty), "--out", out)
    (empty / "picture.png").write_bytes(b"x")
    assert "no known file" in refused(capfd, str(empty), "--out", out)
    ours = write_fake_run(tmp_path / "ours", steps=3)
    assert "is a run already" in refused(capfd, str(ours), "--out", out)
    assert "unknown format 'vrel'; allowed: auto, official" in refused(
        capfd, str(OFFICIAL), "--out", out, "--format", "vrel"
    )
    assert "nothing of format 'verl'" in refused(
        capfd, str(OFFICIAL), "--out", out, "--format", "verl"
    )
    assert "--map wants ours=theirs" in refused(capfd, str(OFFICIAL), "--map", "x", "--out", out)
    assert "twice" in refused(
        capfd, str(OFFICIAL), "--map", "logp=a", "--map", "logp=b", "--out", out
    )
    assert "temperature must be positive" in refused(
        capfd, str(OFFICIAL), "--temperature", "0", "--out", out
    )
    assert not Path(out).exists()


def test_an_existing_folder_and_one_inside_the_source_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    taken = write_fake_run(tmp_path / "taken", steps=3)
    before = digest(taken)
    assert "exists and is not empty" in refused(capfd, str(OFFICIAL), "--out", str(taken))
    assert digest(taken) == before
    source = _table(tmp_path / "source")
    assert "lies inside the source" in refused(capfd, str(source), "--out", str(source / "run"))
    (tmp_path / "vacant").mkdir()
    assert run(["import", str(source), "--out", str(tmp_path / "vacant")]) == 0


@pytest.mark.parametrize(
    ("one", "two"), [("verl", "prime-rl"), ("trl", "verl"), ("prime-rl traces", "trl")]
)
def test_mixed_sources_name_both(
    one: str, two: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    SOURCES[one](tmp_path / "source")
    (tmp_path / "source" / "more").mkdir()
    SOURCES[two](tmp_path / "source" / "more")
    line = refused(capfd, str(tmp_path / "source"), "--out", str(tmp_path / "out"))
    assert "mixes formats" in line
    assert one.split()[0] in line
    assert two.split()[0] in line
    chosen = ["--format", two.split()[0]]
    assert run(["import", str(tmp_path / "source"), "--out", str(tmp_path / "o"), *chosen]) == 0


@pytest.mark.parametrize("kind", SOURCES)
def test_formats_are_told_from_the_files(kind: str, tmp_path: Path) -> None:
    assert detect(SOURCES[kind](tmp_path / "source").resolve()).format == kind.split()[0]
