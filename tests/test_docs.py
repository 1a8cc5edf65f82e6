"""Documentation that is generated stays generated; files and commands it names exist."""

import re
from pathlib import Path

import pytest

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
