"""Documentation that is generated stays generated; files and commands it names exist."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from wapo_analysis import open_run
from wapo_analysis.capture.seams import SEAMS
from wapo_analysis.cli import run

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]


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
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_named_in_docs_exist(page: Path, capfd: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"(?:^|[`\s])wapo ([a-z]+)\b(?= |`|$)", page.read_text(), re.M))
    for command in named:
        assert run([command, "--help"]) == 0, f"{page.name} names wapo {command}"
    capfd.readouterr()


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
