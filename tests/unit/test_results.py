"""One page, three written forms."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from wapo_analysis.errors import few
from wapo_analysis.results import (
    Block,
    Command,
    Grid,
    Items,
    Result,
    Say,
    Section,
    aligned,
    plain,
    short,
    spans,
    step_words,
)


class Page(Result):
    """A result with whatever is on its page."""

    def __init__(self, *parts: Block, title: str = "a run") -> None:
        self.parts: Sequence[Block] = parts
        self.title = title

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title}

    def page(self) -> Section:
        return Section(self.title, self.parts)


WHOLE = Page(
    Say("It fell."),
    Command("wapo fork runs/a --at 20"),
    Grid([["class", "share"], ["neg_peak", "7%"], ["all", "100%"]]),
    Section("finding", [Say("why"), Items(["first", "second"], numbered=True), Items(["also"])]),
)


def test_text_is_indented_and_aligned() -> None:
    assert WHOLE.to_text().splitlines() == [
        "a run",
        "  It fell.",
        "    wapo fork runs/a --at 20",
        "  class     share",
        "  neg_peak     7%",
        "  all        100%",
        "",
        "  finding",
        "    why",
        "    1. first",
        "    2. second",
        "    - also",
    ]


def test_markdown_holds_the_same_in_its_own_marks() -> None:
    lines = WHOLE.to_markdown().splitlines()
    assert lines[0] == "## a run"
    assert "    wapo fork runs/a --at 20" in lines
    table = lines.index("| class | share |")
    assert lines[table - 1 : table + 4] == [
        "", "| class | share |", "| --- | ---: |", "| neg_peak | 7% |", "| all | 100% |",
    ]  # fmt: skip
    assert lines[lines.index("### finding") :] == [
        "### finding", "", "why", "", "1. first", "1. second", "", "- also",
    ]  # fmt: skip


def test_html_holds_the_same_in_elements() -> None:
    html = WHOLE._repr_html_()
    assert html.startswith("<h3>a run</h3><p>It fell.</p><pre>wapo fork runs/a --at 20</pre>")
    assert "<thead><tr><th>class</th><th>share</th></tr></thead>" in html
    assert "<tr><td>neg_peak</td><td>7%</td></tr>" in html
    assert "<h4>finding</h4><p>why</p><ol><li>first</li><li>second</li></ol>" in html


def test_texts_of_a_run_steer_nothing() -> None:
    evil = Page(
        Say("<b>*x*</b>\x1b[31m"), Grid([["a|b"], ["<td>\n"]]), Items(["`c`"]), title="#1\x07"
    )
    assert not {"\x1b", "\x07"} & set(evil.to_text() + evil.to_markdown() + evil._repr_html_())
    assert "\\<b\\>\\*x\\*" in evil.to_markdown()
    assert "| a\\|b |" in evil.to_markdown()
    assert "&lt;b&gt;" in evil._repr_html_()
    assert "<b>" not in evil._repr_html_()


def test_plain_values_are_strict_json() -> None:
    found = plain({"n": np.int64(3), "x": 2 / 3, "bad": [np.nan, float("inf")], 5: None})
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "n": 3, "x": 2 / 3, "bad": [None, None], "5": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (7, "7"),
        ("up", "up"),
        (0.12345, "0.123"),
        (999.7, "1,000"),
        (12345.6, "12,346"),
        (2.5e6, "2.5e+06"),
    ],
)
def test_short_numbers(value: Any, text: str) -> None:
    assert short(value) == text


def test_columns_of_words_stand_left_and_numbers_right() -> None:
    assert aligned([["a", "bb", "c"], ["long", "b", "10"]], left=2) == [
        "a     bb   c",
        "long  b   10",
    ]


@pytest.mark.parametrize(
    ("steps", "said"),
    [([1], "1"), ([1, 2, 3, 7], "1 to 3, 7"), ([], ""), ([3, 1, 3], "1, 3"),
     ([1, 2, 7, 9, 10], "1 to 2, 7, 9 to 10"),
     (list(range(0, 24, 2)), "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22"),
     (list(range(0, 26, 2)), "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, ... (13 in all)")],
)  # fmt: skip
def test_steps_as_ranges(steps: list[int], said: str) -> None:
    assert spans(steps) == said


def test_one_step_and_several_in_a_sentence() -> None:
    assert step_words([8]) == "step 8"
    assert step_words([8, 9, 12]) == "steps 8 to 9, 12"
    assert step_words(range(0, 40, 2), most=2) == "steps 0, 2, ... (20 in all)"


@pytest.mark.parametrize(
    ("count", "said"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more")]
)
def test_a_long_list_of_names_ends_with_how_many_more_there_are(count: int, said: str) -> None:
    assert few(range(count), most=3) == said
