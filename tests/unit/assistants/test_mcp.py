"""wapo mcp: the protocol's own client reads runs, and nothing else."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import write_fake_run
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


@pytest.mark.parametrize("name", ["../secret", "link", "/etc", "good/../../secret", "", "broken"])
def test_nothing_outside_the_folders_is_read(runs: Path, name: str) -> None:
    failed, text = call(runs, "diagnose", run=name)
    assert failed
    assert "\n" not in text.strip()


def test_errors_are_one_line(runs: Path) -> None:
    failed, text = call(runs, "tokens", run="good", step=999)
    assert failed
    assert "no token rows" in text
    with pytest.raises(UserError, match="is no folder"):
        Library([runs / "nowhere"])
