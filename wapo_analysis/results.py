"""What every result of an analysis can do: show itself as data, text, Markdown and HTML.

A result says once what is on its page, as blocks; the three written forms are made from these
blocks here, so they cannot differ in what they say. Texts of a run (names, tokens, completions) are
made harmless here as well.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from os.path import commonprefix
from typing import Any

from wapo_analysis.errors import printable

_MARKDOWN = "\\`*<>|#[]"


@dataclass(frozen=True, slots=True)
class Say:
    """One paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """Short lines, one below the other."""

    lines: Sequence[str]
    numbered: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A table; its first row names the columns, of which the first ``left`` hold words."""

    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True, slots=True)
class Command:
    """One line to type into a terminal."""

    line: str


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under a heading."""

    title: str
    parts: Sequence["Block"]


Block = Say | Items | Grid | Command | Section


class Result(ABC):
    """A result; subclasses say what its data are and what is on its page."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: no NaN, no infinity, no numpy."""

    @abstractmethod
    def page(self) -> Section:
        """Everything there is to say, in the order in which it is read."""

    def to_text(self) -> str:
        """Plain text for a terminal."""
        return "\n".join(_text(self.page(), ""))

    def to_markdown(self) -> str:
        """Markdown for an issue or a pull request."""
        return "\n".join(_markdown(self.page(), 2)).strip() + "\n"

    def _repr_html_(self) -> str:
        return "".join(_html(self.page(), 3))


def plain(value: Any, digits: int | None = None) -> Any:
    """Value for JSON: numpy scalars become Python's, what is not finite None.

    ``value``: numbers, texts, and dictionaries and lists of them; ``digits``: significant digits of
    floats; None keeps all.

    Examples
    --------
    >>> plain({"a": float("nan"), "b": [1, 2 / 3]}, digits=6)
    {'a': None, 'b': [1, 0.666667]}
    """
    if isinstance(value, dict):
        return {str(name): plain(part, digits) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, digits) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        shown = value if digits is None else float(f"{value:.{digits}g}")
        return shown if isfinite(value) else None
    return value


def short(value: Any) -> str:
    """Three significant digits, whole numbers from 1,000 to a million; ``n/a`` for no number."""
    if value is None:
        return "n/a"
    if isinstance(value, str | int):
        return str(value)
    return f"{value:,.0f}" if 999.5 <= abs(value) < 999_999.5 else f"{value:.3g}"


def percent(share: float) -> str:
    """Share as whole percent."""
    return "0%" if abs(share) < 0.005 else f"{share:.0%}"


def spans(steps: Iterable[int], most: int = 12) -> str:
    """Steps as ranges, of many ranges the first few.

    Examples
    --------
    >>> spans([1, 2, 3, 7])
    '1 to 3, 7'
    """
    ranges: list[list[int]] = []
    for step in (numbers := sorted(set(steps))):
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    more = f", ... ({len(numbers):,} in all)" if len(ranges) > most else ""
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in ranges[:most]) + more


def step_words(steps: Iterable[int], most: int = 12) -> str:
    """Steps in a sentence: "step 3", "steps 1 to 3, 7"."""
    text = spans(steps, most)
    return f"step {text}" if text.isdigit() else f"steps {text}"


def _text(block: Block, indent: str) -> list[str]:
    match block:
        case Say(text):
            return [indent + printable(text)]
        case Command(line):
            return [f"{indent}  {printable(line)}"]
        case Items(lines, numbered):
            marks = (
                (f"{n}. " for n in range(1, len(lines) + 1)) if numbered else ["- "] * len(lines)
            )
            return [indent + mark + printable(x) for mark, x in zip(marks, lines, strict=True)]
        case Grid(rows, left):
            return [indent + line for line in aligned(rows, left)]
        case Section(title, parts):
            lines = [indent + printable(title)]
            for part in parts:
                apart = isinstance(part, Section)
                lines += [""] * apart + _text(part, indent + "  ")
            return lines


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as lines with aligned columns; the first ``left`` columns to the left, others right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _markdown(block: Block, level: int) -> list[str]:
    match block:
        case Say(text):
            return ["", marked(text)]
        case Command(line):
            return ["", f"    {printable(line)}"]
        case Items(lines, numbered):
            return ["", *(f"{'1.' if numbered else '-'} {marked(line)}" for line in lines)]
        case Grid(rows, left):
            head, *body = [[marked(cell) for cell in row] for row in rows]
            rule = ["---"] * left + ["---:"] * (len(head) - left)
            return ["", *(f"| {' | '.join(row)} |" for row in (head, rule, *body))]
        case Section(title, parts):
            head_line = ["", f"{'#' * level} {marked(title)}"]
            return head_line + [line for part in parts for line in _markdown(part, level + 1)]


def marked(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no table cells, no emphasis, one line."""
    for mark in _MARKDOWN:
        text = text.replace(mark, f"\\{mark}")
    return printable(text.replace("\n", " "))


def _html(block: Block, level: int) -> Iterable[str]:
    match block:
        case Say(text):
            yield f"<p>{_safe(text)}</p>"
        case Command(line):
            yield f"<pre>{_safe(line)}</pre>"
        case Items(lines, numbered):
            kind = "ol" if numbered else "ul"
            yield f"<{kind}>{''.join(f'<li>{_safe(line)}</li>' for line in lines)}</{kind}>"
        case Grid(rows, _):
            head, *body = rows
            yield f"<table><thead>{_row(head, 'th')}</thead><tbody>"
            yield "".join(_row(row, "td") for row in body) + "</tbody></table>"
        case Section(title, parts):
            yield f"<h{level}>{_safe(title)}</h{level}>"
            for part in parts:
                yield from _html(part, min(level + 1, 6))


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{_safe(cell)}</{tag}>' for cell in cells)}</tr>"


def _safe(text: str) -> str:
    return escape(printable(text))


def distinguishing(prompts: Sequence[str]) -> list[str]:
    """What sets each prompt apart: the head and tail that all share are folded to an ellipsis.

    Cut at white space, so that no word is torn. A single prompt, or prompts that share nothing,
    stay as they are.

    Examples
    --------
    >>> distinguishing(["system Help. user What is 1+1? end", "system Help. user Is 7 odd? end"])
    ['... What is 1+1? ...', '... Is 7 odd? ...']
    """
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        return list(prompts)
    head = _whole_words(commonprefix(different))
    rest = [prompt[len(head) :] for prompt in different]
    tail = _whole_words(commonprefix([text[::-1] for text in rest]))[::-1]
    folded = {
        prompt: ("... " if head.strip() else "")
        + text[: len(text) - len(tail)].strip()
        + (" ..." if tail.strip() else "")
        for prompt, text in zip(different, rest, strict=True)
    }
    return [folded[prompt] for prompt in prompts]


def _whole_words(text: str) -> str:
    """The text up to and with its last white space; nothing of it if it has none."""
    kept = len(text)
    while kept and not text[kept - 1].isspace():
        kept -= 1
    return text[:kept]
