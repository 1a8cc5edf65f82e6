"""Documentation that is generated stays generated; files and commands it names exist."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from wapo_analysis import open_run
from wapo_analysis.capture.seams import SEAMS
from wapo_analysis.cli import application, run
from wapo_analysis.declare import assigned
from wapo_analysis.train.config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]

EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=300, kernel_name="python3").execute()
"""


def test_schema_page_is_what_the_command_prints(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "--format", "markdown"]) == 0
    printed = capfd.readouterr().out.strip()
    page = (ROOT / "docs" / "schema.md").read_text()
    assert page.split("\n\n", 2)[2].strip() == printed, (
        "write it anew: wapo schema --format markdown, below the two lines of heading"
    )


def test_settings_of_the_training_page_are_what_the_command_prints(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(["train", "--settings"]) == 0
    printed = capfd.readouterr().out
    page = (ROOT / "docs" / "training.md").read_text()
    assert f"\n\n{printed}\n## " in page, "write the table anew: wapo train --settings"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", page.read_text())  # what is code is no link
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_contents_of_the_site_name_pages_that_exist_once() -> None:
    docs = ROOT / "docs"
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", (docs / "index.md").read_text(), re.S)
    placed = [line for block in blocks for line in block.split("\n\n", 1)[1].split()]
    assert len(set(placed)) == len(placed) > 20
    absent = [name for name in placed if not list(docs.glob(f"{name}.*"))]
    assert not absent, "docs/index.md names pages that are not there"


@pytest.mark.slow
@pytest.mark.parametrize(
    "notebook", sorted(ROOT.glob("docs/notebooks/*.ipynb")), ids=lambda p: p.stem
)
def test_notebooks_run_from_top_to_bottom(notebook: Path) -> None:
    pytest.importorskip("nbclient")
    command = [sys.executable, "-W", "ignore", "-c", EXECUTE, str(notebook)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run(
        [*command, "docs", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert "coef" in (tmp_path / "glossary.html").read_text()
    assert (tmp_path / "search.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_named_in_docs_exist(page: Path, capfd: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"(?:^|[`\s])wapo ([a-z]+)\b(?= |`|$)", page.read_text(), re.M))
    for command in named:
        assert run([command, "--help"]) == 0, f"{page.name} names wapo {command}"
    capfd.readouterr()


def lines_to_paste(page: Path) -> list[list[str]]:
    """Commands of the code blocks of a page, as words; continued lines joined, comments gone."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    lines = "\n".join([*blocks, *re.findall(r"^    .*", text, re.M)]).splitlines()
    own = re.compile(r"^\s*(?:\$ )?(?:\w+=\S+ )*(wapo .*|python\S* .*|.*-m wapo_analysis .*)$")
    found = [match[1] for line in lines if (match := own.match(line)) and "[--" not in line]
    return [shlex.split(line.split(" && ")[0], comments=True) for line in dict.fromkeys(found)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_to_paste_have_arguments_that_are_taken(page: Path) -> None:
    """The command line itself parses each, without running it; settings after --set exist."""
    commands = typer.main.get_command(application()).commands  # type: ignore[attr-defined]
    for words in lines_to_paste(page):
        if "wapo_analysis" in words:
            words = words[words.index("wapo_analysis") :]
        elif words[0] != "wapo":
            continue
        context = commands[words[1]].make_context(words[1], words[2:])
        TrainConfig.from_dict(assigned(context.params.get("other") or []))


@pytest.mark.slow
def test_scripts_to_paste_have_the_options_they_are_given() -> None:
    lines = {tuple(words) for page in PAGES for words in lines_to_paste(page) if "-m" not in words}
    for script in {words[1] for words in lines if words[0] == "python" and len(words) > 1}:
        shown = subprocess.run(
            [sys.executable, "-W", "ignore", script, "--help"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        given = {w for words in lines if words[1:2] == (script,) for w in words if w[:2] == "--"}
        assert not {option for option in given if option not in shown.stdout}, script


def test_blocks_for_trainers_are_programs_and_name_rows_that_exist() -> None:
    """Blocks of other trainers need those; `python -m pytest tests/unit/capture` runs the calls."""
    page = (ROOT / "docs" / "watch_your_trainer.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    for block in blocks:
        compile(textwrap.dedent(block), "watch_your_trainer.md", "exec")
    named = set(re.findall(r'names="([^"]+)"|"like": "([^"]+)"', page))
    assert {a or b for a, b in named} == set(SEAMS) - {"verl"}, "verl is watched by its plug-in"
    table = [line for line in page.splitlines() if line.startswith("| ") and "`" in line]
    for trainer in SEAMS:
        assert any(line.lower().startswith(f"| {trainer} |") for line in table), trainer


def test_the_block_for_any_loss_runs_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "watch_your_trainer.md").read_text()
    (block,) = re.findall(r"```python\n([^`]*def policy_loss.*?)```", page, re.S)
    space: dict[str, Any] = {"torch": torch}
    exec(block.replace("runs/mine", str(tmp_path / "r")), space)
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with space["policy_loss"] as loss:
        logp = weight - 1
        loss(logp, logp.detach(), torch.tensor([[1.0], [-1.0]]), torch.ones(2, 3)).backward()
        optimizer.step()
    assert open_run(tmp_path / "r").tokens().coef.tolist() == pytest.approx(
        [1 / 6] * 3 + [-1 / 6] * 3, rel=1e-4
    )
