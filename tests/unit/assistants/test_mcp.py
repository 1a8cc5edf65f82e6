"""wapo mcp: the protocol's own client reads runs, and nothing else."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import write_fake_run
from wapo_analysis import assistants
from wapo_analysis.assistants import TOOLS, Library, make_server
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError

mcp = pytest.importorskip("mcp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_fake_run(folder / "runs" / "good", steps=12)
    write_fake_run(folder / "runs" / "deep" / "bad", steps=30, drift="explosion")
    write_fake_run(folder / "secret", steps=3)
    (folder / "runs" / "link").symlink_to(folder / "secret")
    (folder / "runs" / "broken").mkdir()
    (folder / "runs" / "broken" / "manifest.json").write_text("{")
    return folder / "runs"


def call(folder: Path, name: str, **arguments: Any) -> tuple[bool, str]:
    async def ask() -> tuple[bool, str]:
        async with mcp.Client(make_server([folder])) as client:
            answer = await client.call_tool(name, arguments)
            return bool(answer.is_error), answer.content[0].text

    return asyncio.run(ask())


def answer(folder: Path, name: str, **arguments: Any) -> Any:
    failed, text = call(folder, name, **arguments)
    assert not failed, text
    return json.loads(text)


def test_every_tool_is_offered_with_its_meaning(runs: Path) -> None:
    async def ask() -> Any:
        async with mcp.Client(make_server([runs])) as client:
            return (await client.list_tools()).tools

    tools = asyncio.run(ask())
    assert [tool.name for tool in tools] == [tool.__name__ for tool in TOOLS]
    assert all(tool.description for tool in tools)
    assert all("library" not in json.dumps(tool.input_schema) for tool in tools)
    assert all(tool.annotations.read_only_hint for tool in tools)


def test_answers_are_those_of_the_commands(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    listed = {row["run"]: row for row in answer(runs, "list_runs")}
    assert set(listed) == {"good", "deep/bad", "broken"}
    assert "error" in listed["broken"]
    told = answer(runs, "diagnose", run="deep/bad")
    wapo(["diagnose", str(runs / "deep" / "bad"), "--format", "json"])
    printed = json.loads(capfd.readouterr().out)
    printed = printed[0] if isinstance(printed, list) else printed
    assert told["verdict"] == printed["verdict"] == "entropy_explosion"
    assert answer(runs, "step", run="good", step=3)
    assert answer(runs, "compare", runs=["good", "deep/bad"])
    assert set(answer(runs, "schema")) >= {"tokens", "steps", "topk"}


def test_large_answers_are_cut_and_say_so(runs: Path) -> None:
    few = answer(runs, "tokens", run="good", step=3, limit=5)
    assert len(few["rows"]) == 5
    assert few["cut"]
    assert few["of"] > 5
    many = answer(runs, "tokens", run="good", step=3, limit=10**9)
    assert len(many["rows"]) <= 500


@pytest.mark.parametrize(
    "name",
    ["../secret", "link", "/etc", "good/../../secret", "", ".", "broken", "a\0b", "x" * 5000],
)
def test_nothing_outside_the_folders_is_read(runs: Path, name: str) -> None:
    failed, text = call(runs, "diagnose", run=name)
    assert failed
    assert "\n" not in text.strip()
    assert len(text) < 500


def test_errors_are_one_line(runs: Path) -> None:
    failed, text = call(runs, "tokens", run="good", step=999)
    assert failed
    assert "no token rows" in text
    with pytest.raises(UserError, match="is no folder"):
        Library([runs / "nowhere"])
    failed, text = call(runs, "compare", runs=["good"] * 101)
    assert failed
    assert "at most 100 runs" in text


@pytest.mark.parametrize("part", ["steps.jsonl", "tokens", "vocab.parquet"])
def test_a_run_with_a_link_that_leads_out_is_refused(runs: Path, tmp_path: Path, part: str) -> None:
    served = tmp_path / "served"
    inner = write_fake_run(served / "inner", steps=12)
    (inner / part).rename(tmp_path / part)
    (inner / part).symlink_to(tmp_path / part)
    failed, text = call(served, "diagnose", run="inner")
    assert failed
    assert "leads out of the folders" in text
    (listed,) = answer(served, "list_runs")
    assert "leads out of the folders" in listed["error"]


def test_a_log_is_read_and_what_is_missing_is_null(tmp_path: Path) -> None:
    rows = [{"step": n, "reward": 0.1 + n / 100, "entropy": 0.5} for n in range(1, 30)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert answer(tmp_path, "diagnose", run="train.jsonl")["run"] == "train"
    write_fake_run(tmp_path / "runs" / "one", steps=3)
    log = tmp_path / "runs" / "one" / "steps.jsonl"
    log.write_text(json.dumps({"step": 1, "reward": None}) + "\n")
    (row,) = answer(tmp_path, "list_runs")
    assert row["last"]["reward"] is None


def test_a_huge_answer_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistants, "MOST_CHARACTERS", 100)
    failed, text = call(runs, "diagnose", run="good")
    assert failed
    assert "more than 100; ask for fewer" in text


@pytest.mark.slow
def test_the_command_serves_over_stdin_and_stdout(runs: Path) -> None:
    command = mcp.StdioServerParameters(
        command=sys.executable, args=["-m", "wapo_analysis", "mcp", str(runs)], env=dict(os.environ)
    )

    async def ask() -> str:
        async with mcp.Client(command) as client:
            return str((await client.call_tool("list_runs", {})).content[0].text)

    assert len(json.loads(asyncio.run(ask()))) == 3
