"""The board: runs below its folders, nothing else; new steps at the next question."""

import gzip
import json
from pathlib import Path

import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.report.board import Shelf, application
from wapo_analysis.report.data import run_id
from wapo_analysis.store.files import step_line

pytest.importorskip("starlette", reason="needs the extra [board]")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_fake_run(tmp_path / "runs" / "one", drift="explosion", steps=20)
    write_fake_run(tmp_path / "runs" / "two", steps=12, seed=1)
    return tmp_path / "runs"


def client(folder: Path, token: str | None = None):  # type: ignore[no-untyped-def]
    from starlette.testclient import TestClient

    return TestClient(application([folder], token))


def test_it_lists_tells_and_compares(folder: Path) -> None:
    ask = client(folder)
    listed = ask.get("/api/runs").json()
    assert [one["name"] for one in listed] == ["one", "two"]
    told = ask.get(f"/api/runs/{listed[0]['id']}").json()
    assert told["verdict"] == "entropy_explosion"
    step = ask.get(f"/api/runs/{listed[0]['id']}/steps/9")
    raw = gzip.decompress(step.content)
    assert json.loads(raw[4 : 4 + int.from_bytes(raw[:4], "little")])["step"] == 9
    both = ask.get(f"/api/compare/{listed[0]['id']},{listed[1]['id']}").json()
    assert set(both["settings"]) == {one["id"] for one in listed}
    assert "page-data" in ask.get("/").text


def test_new_steps_show_at_the_next_question(folder: Path) -> None:
    shelf = Shelf([folder])
    number = run_id(folder / "one")
    before = shelf.run(number)["steps"]["values"]["step"]
    log = folder / "one" / "steps.jsonl"
    last = json.loads(log.read_text().splitlines()[-1])
    with log.open("ab") as out:
        out.write(step_line({"step": 21, "reward": last["reward"], "entropy": 2.0}))
    after = shelf.run(number)["steps"]["values"]
    assert after["step"] == [*before, 21]
    assert after["entropy"][-1] == 2.0


def test_it_serves_nothing_beside_its_runs(folder: Path, tmp_path: Path) -> None:
    write_fake_run(tmp_path / "secret", steps=12)
    ask = client(folder)
    for path in (
        f"/api/runs/{run_id(tmp_path / 'secret')}",
        "/api/runs/..%2Fsecret",
        "/../secret/manifest.json",
        "/api/runs/x/steps/1",
    ):
        assert ask.get(path).status_code == 404


def test_a_token_is_asked_for_where_there_is_one(folder: Path) -> None:
    ask = client(folder, token="word")
    assert ask.get("/").status_code == 403
    assert ask.get("/api/runs?token=wrong").status_code == 403
    assert ask.get("/api/runs?token=word").status_code == 200


def test_it_writes_nothing(folder: Path) -> None:
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    ask = client(folder)
    for one in ask.get("/api/runs").json():
        ask.get(f"/api/runs/{one['id']}")
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before


def test_a_missing_folder_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert wapo(["board", str(tmp_path / "no"), "--port", "0"]) == 2
    said = capsys.readouterr()
    assert "no folder at" in said.err
    assert not said.out, "no address where nothing is served"
