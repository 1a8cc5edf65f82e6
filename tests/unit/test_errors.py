"""Text that is shown: nothing of a run steers the terminal or the page."""

import pytest

from wapo_analysis.errors import counted, first_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢字 👩\u200d🔬 می\u200cخواهم", None),
        ("no\u00a0break\u3000space", None),
        ("\x00", r"\x00"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("\ud800", r"\ud800"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\x85\u2028", r"\x85\u2028"),
        ("\U000e0041hidden", r"\U000e0041hidden"),
    ],
)
def test_what_steers_or_hides_is_shown_escaped(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)
    printable(text).encode("utf-8")


def test_lines_stay_lines_where_they_are_wanted() -> None:
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (OSError("\n  one"), "one"),
        (NotImplementedError(), "NotImplementedError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_of_an_exception_the_first_line_is_told_else_its_name(error: Exception, said: str) -> None:
    assert first_line(error) == said


def test_one_thing_and_several() -> None:
    said = [counted(n, "token row") for n in (0, 1, 2)]
    assert said == ["0 token rows", "1 token row", "2 token rows"]
