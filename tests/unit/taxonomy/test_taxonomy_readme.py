"""The programs of taxonomy/README.md print what it says, and it names every public function."""

import doctest
import re
from pathlib import Path

import pytest
import wapo_taxonomy as wt

from tests.support.rule_shares import run_observations

README = Path(wt.__path__[0]).parent / "README.md"
SOURCE = README.is_file()

pytestmark = pytest.mark.skipif(not SOURCE, reason="the README is not part of the wheel")


def test_examples_print_what_the_readme_says() -> None:
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted >= 8
    assert result.failed == 0


def test_every_public_function_is_derived() -> None:
    named = set(re.findall(r"`([A-Za-z_]+)(?:\(\.\.\.\))?`", README.read_text(encoding="utf-8")))
    functions = {name for name in wt.__all__ if name[0].islower()}
    assert functions - named == {"expand_bins", "regime_code"}


def test_quoted_shares_are_the_measured_ones() -> None:
    text = README.read_text(encoding="utf-8")
    shares = {o.name: 100 * o.value for o in run_observations(seed=0)}
    assert f"{shares['rule_wrong']:.1f}% of sampled tokens" in text
    assert f"{shares['rule_wrong_entropy']:.2f}% of all" in text
    # Shares of float32 failures shift a little with the processor's rounding.
    off, flipped = map(int, re.findall(r"on (\d+)%", text.split("Measured on 500")[1])[:2])
    assert shares["textbook_norm"] == pytest.approx(off, abs=3)
    assert shares["textbook_dentropy"] == pytest.approx(flipped, abs=3)


def test_section_numbers_in_docstrings_exist() -> None:
    sections = set(re.findall(r"^## (\d+)\.", README.read_text(encoding="utf-8"), flags=re.M))
    for path in Path(wt.__path__[0]).glob("*.py"):
        cited = re.findall(r"README\s+sections?\s+([\d, toand]+)", path.read_text(encoding="utf-8"))
        assert set(re.findall(r"\d+", " ".join(cited))) <= sections, path.name
