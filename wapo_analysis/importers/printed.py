"""Numbers by name in lines that people print: ``step=12 reward=0.3``, ``Step 3/60 | loss: 0.1``.

Read are pairs with ``=``, with a colon, or a name and a number between commas or bars; the numbers
behind a progress bar; and a heading with the step and one number a line below it, as NeMo-RL
prints. A line's step is the one it names, else its bar's, else that of the heading above it.
"""

import re
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

Values = dict[str, float]
_NUMBER = r"[-+]?(?:\d[\d_]*\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)"
_END = r"(%?)(?![\w/:%]|-\w|\.\w|,\d)"
#: Numbers of numpy and torch as they are printed.
WRAPPED = re.compile(rf"(?:np\.\w+|tensor|array|float\d*|int\d*)\(\s*({_NUMBER})[^()]*\)", re.I)
_EQUALS = re.compile(rf"""(?<![\w./@-])([A-Za-z_][\w./@-]*)\s?=\s?["']?({_NUMBER}){_END}""", re.I)
_TIGHT = re.compile(
    rf"(?<![\w:./@-])([A-Za-z_][\w./@-]*):({_NUMBER})(%?)(?=[\s;|]|,(?!\d)|$)", re.I
)
_COLON = re.compile(
    r"([A-Za-z_][\w./@()-]*(?: [A-Za-z_(][\w./@()-]*)*)\s*:\s+"
    rf"({_NUMBER})(%?)(?=\s*(?:[,;|)\]}}]|\.?$|\.?\s))(?!,\d)",
    re.I,
)
# Thousands as Python groups them, but for the milliseconds of a time and places in brackets.
_GROUPED = re.compile(r"(?<![\w.,(\[])(?<!\d:)[1-9]\d{0,2}(?:,\d{3})+(?![\w,])")
_SPACE = re.compile(rf"\W*([A-Za-z_][\w./@() -]*?)\s+({_NUMBER})(%?)\W*", re.I)
_ONE = re.compile(rf"([A-Za-z_][\w./-]*)\s+({_NUMBER})(%?)(?=\s|$)", re.I)
_ROW = re.compile(rf"\s*(?:[A-Za-z_][\w./-]*\s+{_NUMBER}%?(?:\s+|$)){{2,}}", re.I)
_OPENS = re.compile(r"( *)([A-Za-z_][\w./-]*):\s*")
_LEAF = re.compile(rf"( +)([A-Za-z_][\w./-]*): ({_NUMBER})\s*", re.I)
_CELLS = re.compile("[|\u2502\u2503\u2551]")
_STEP_NAME = r"(?:(?:global|train|training)[ _])?step|iter(?:ation)?|update"
_STEP = re.compile(
    rf"(?<![\w/-])({_STEP_NAME})\s*[:=#]?\s*[\[(]?\s*(\d+)(?:\s*(?:/|of)\s*\d+)?(?![\w.%]|:\d)",
    re.I,
)
_HEADING = re.compile(rf"[\W_]*(?:{_STEP_NAME})\W*\d+(?:\s*/\s*\d+)?[\W_]*", re.I)
_FRAMED = re.compile(
    rf"[=*#-]{{3,}}.*(?:{_STEP_NAME})\W*\d+(?:\s*/\s*\d+)?\s*[=*#-]{{3,}}\s*", re.I
)
_BEGINS = re.compile(
    rf"\b(?:start|begin)\w* (?:{_STEP_NAME}) \d+\b|\b(?:{_STEP_NAME}) \d+ (?:start|begin)", re.I
)
_OF_ALL = re.compile(rf"(?:{_STEP_NAME})\W{{1,3}}\d+\s*/\s*\d+", re.I)
_BAR = re.compile(
    r"(\d+)/(\d+) \[[^\]]*?(?:\?|[\d.]+)(?: ?[a-z]+/s|s/[a-z]+)(?:,\s*([^\]]*))?\]?", re.I
)
# A word in front of the numbers that says that they are of held-out problems.
_HELD_OUT = re.compile(
    r"(?:^|[\s\[(|>*-])(?:eval(?:uat\w+)?|valid(?:ation)?|val|test)\b\s*"
    rf"(?=[\])|:>@]|-\s|at\b|(?:{_STEP_NAME}|epoch)\b|[A-Za-z_][\w./@]*\s?=)",
    re.I,
)
_OF_EVAL = re.compile(r"(?:eval|val|valid|validation|test)[/_]", re.I)
_SECTION = re.compile(
    r"\W*(train|valid|eval)\w*(?: (?:metrics|results?|scores?|timing)\W*|:\s*)", re.I
)
_EPOCH_ALONE = re.compile(r"[\W_]*epoch\W*(\d+)(?:\s*/\s*\d+)?[\W_]*", re.I)
_EPOCH = re.compile(r"\b(?:epoch|episode)\W{0,3}(\d+)", re.I)
# A batch of an epoch, as in Epoch:[1/1](7/9751) of minimind and Epoch: [0][ 10/500] of torch.
_BATCH = re.compile(
    r"\bepoch\W{0,3}\d+(?:\s*/\s*\d+)?\W{0,3}[\[(]\s*(\d+)\s*/\s*(\d+)\s*[\])]", re.I
)
_STATISTICS = ("mean", "avg", "average", "std", "min", "max", "median")
_WORD_WIDTH = 60
_WORD_BEFORE = re.compile(r"(?<![\w.])([A-Za-z_][\w./@-]*)[ :(\[]*$")


class Line(NamedTuple):
    """What a line says.

    Attributes
    ----------
    step : int or None
        The step it names; of a bar its position.
    values : dict of str to float
        Numbers by name; blanks in names are underscores.
    bar : tuple of (int, int) or None
        Position and length of a progress bar whose numbers these are.
    heading : bool
        It is nothing but a step.
    """

    step: int | None
    values: Values
    bar: tuple[int, int] | None = None
    heading: bool = False


def line_of(text: str) -> Line | None:
    """Read one line; None if it holds neither numbers by name nor a heading.

    Examples
    --------
    >>> line_of("INFO step=12 reward=0.5 time=3.1s lr=1e-6").values
    {'reward': 0.5, 'lr': 1e-06}
    >>> line_of("[10:01:02] Step 3/60 | Loss: 0.25 | Grad Norm: 1.5")[:2]
    (3, {'Loss': 0.25, 'Grad_Norm': 1.5})
    >>> line_of("iter 7: loss 2.5, reward 0.125")[:2]
    (7, {'loss': 2.5, 'reward': 0.125})
    """
    text = _GROUPED.sub(lambda found: found[0].replace(",", ""), WRAPPED.sub(r"\1", text))
    held_out = _HELD_OUT.search(text)
    if held_out is not None and not re.search("train", head := text[: held_out.start()], re.I):
        if not _pairs(head) and (line := _line(text)) is not None:
            return line._replace(values=_held_out(line.values)) if line.bar is None else None
    return _line(text)


def _held_out(values: Values) -> Values:
    return {n if _OF_EVAL.match(n) else f"eval/{n}": v for n, v in values.items()}


def _unmarked(values: Values) -> Values:
    return {name.removeprefix("eval/"): value for name, value in values.items()}


def _line(text: str) -> Line | None:
    bar = _BAR.search(text)
    if bar is not None:
        return _at_bar(bar, _pairs(bar[3] or ""))
    found = min(_STEP.finditer(text), key=_rank, default=None)
    if found is None and (batch := _BATCH.search(text)) is not None:
        return _at_bar(batch, _pairs(text[batch.end() :]))
    if found is None:
        values = _pairs(text)
        return Line(None, values) if values else None
    step = int(found[2])
    values = _pairs(text[: found.start()]) | _pairs(text[found.end() :])
    if not values:
        known = (_HEADING.fullmatch(text), _OF_ALL.search(text), _FRAMED.search(text),
                 _BEGINS.search(text))  # fmt: skip
        alone = any(known)
        return Line(step, {}, heading=True) if alone else None
    if (epoch := _EPOCH.search(text[: found.start()])) is not None:
        values.setdefault("epoch", int(epoch[1]))
    return Line(step, values)


def _at_bar(found: "re.Match[str]", values: Values) -> Line | None:
    place = int(found[1]), int(found[2])
    return Line(place[0], values, place) if values else None


def _rank(found: "re.Match[str]") -> int:
    """Of several counters in a line the run's own step goes first."""
    words = ("global", "train", "step", "iter")
    rank = next((n for n, word in enumerate(words) if word in found[1].lower()), len(words))
    # A place in a source, as loguru's module:function:line, comes last.
    place = ":" in found[0] and found.string[: found.start()].endswith(":")
    return rank + place * len(words)


def _pairs(text: str) -> Values:
    if "=" in text and (found := _named(_equals(text))):
        return found
    cells = [cell.strip() for cell in _CELLS.split(text)] if _CELLS.search(text) else []
    if cells and (found := _named(_beside(cells))):
        return found
    if ":" in text:
        tight = _TIGHT.findall(text)
        found = _named(tight if len(tight) > 1 else _COLON.findall(text))
        if found:
            return found
    items = re.split("[|;\u2502\u2503\u2551\u2013\u2014]|,(?!\\d)", text)
    fits = [fit.groups() for item in items if (fit := _SPACE.fullmatch(item))]
    if _ROW.fullmatch(text):  # without any of these between them
        fits = _ONE.findall(text)
    return _named(fits) if len(fits) > 1 else {}


def _equals(text: str) -> list[tuple[str, str, str]]:
    """Pairs with ``=``; one called mean or std belongs to the word before: reward mean=1 std=2."""
    pairs, word = [], ""
    for found in _EQUALS.finditer(text):
        name, number, percent = found.groups()
        if name.lower() in _STATISTICS:
            before = _WORD_BEFORE.search(text[: found.start()][-_WORD_WIDTH:])
            word = before[1] if before else word
            name = f"{word}_{name}" if word else name
        else:
            word = ""
        pairs.append((name, number, percent))
    return pairs


def _beside(cells: list[str]) -> list[tuple[str, str, str]]:
    """Cells of a printed table in which a name stands beside its number."""
    pairs = zip(cells, cells[1:], strict=False)
    whole = re.compile(_NUMBER, re.I)
    return [(a, b, "") for a, b in pairs if re.match("[A-Za-z_]", a) and whole.fullmatch(b)]


def _named(found: Sequence[tuple[str, ...]]) -> Values:
    values: Values = {}
    for name, number, percent in found:
        key = re.sub(r"\s+", "_", name.strip())
        if not re.fullmatch(_STEP_NAME, key, re.I):
            values.setdefault(key, float(number.replace("_", "")) / (100 if percent else 1))
    return values


class Printed(NamedTuple):
    """A record of a log: its line, its step if one is known, its numbers, whether we know any."""

    number: int
    step: int | None
    values: Values
    known: bool


@dataclass
class PrintedLog:
    """Lines of a log as records, once the whole of it was seen.

    ``known``: whether any of some names feeds a column.
    """

    known: Callable[[tuple[str, ...]], bool]
    _taken: list[Printed] = field(default_factory=list)
    _loose: list[Printed] = field(default_factory=list)
    _below: list[Printed] = field(default_factory=list)
    _bars: dict[int, Printed] = field(default_factory=dict)
    _done: list[Printed] = field(default_factory=list)
    _fits: dict[tuple[str, ...], bool] = field(default_factory=dict)
    _heading: int | None = None
    #: What stands in headings above a line: the epoch, whether held-out problems follow.
    _epoch: int | None = None
    _held_out: bool = False
    _before: tuple[int, int, int | None] = (0, 0, None)
    _offset: int = 0
    _above: list[tuple[int, str]] = field(default_factory=list)
    #: Lines that :meth:`records` left out: text that happens to name a step and a number.
    strays: int = 0

    @property
    def heading(self) -> int | None:
        """Step of the last line that was nothing but a step."""
        return self._heading

    def add(self, number: int, text: str) -> bool:
        """Take a line; whether it holds numbers by known names."""
        line = self._nested(text) or line_of(text)
        if line is None or line.heading:
            self._head(text, line)
            return False
        below = self._heading is not None and line.step is None and line.bar is None
        if self._held_out and below:
            line = line._replace(values=_held_out(line.values))
        keys = tuple(line.values)
        if keys not in self._fits:
            self._fits[keys] = self.known(keys)
        known = self._fits[keys]
        if line.bar is not None:
            at = self._bar_step(line.bar, text)
            self._bars[at] = Printed(number, at, line.values, known)
        elif line.step is not None:
            self._taken.append(Printed(number, line.step, line.values, known))
        elif known and self._taken and all(map(_OF_EVAL.match, keys)):  # of the step before
            self._taken.append(Printed(number, self._taken[-1].step, line.values, known))
        elif known and self._heading is not None:
            values = line.values | ({} if self._epoch is None else {"epoch": self._epoch})
            self._below.append(Printed(number, self._heading, values, known))
        elif known:
            self._gather(number, line.values)
        return known

    def _head(self, text: str, line: Line | None) -> None:
        """Take a line without numbers: a step, an epoch, or what the numbers below it are of."""
        epoch = _EPOCH_ALONE.fullmatch(text) if line is None else _EPOCH.search(text)
        self._epoch = int(epoch[1]) if epoch else self._epoch
        if line is not None:
            self._heading, self._held_out = line.step, False
        elif (section := _SECTION.fullmatch(text)) is not None:
            self._held_out = section[1].lower() != "train"

    def _nested(self, text: str) -> Line | None:
        """A number below names that are indented less, as YAML below a heading (EasyR1)."""
        if self._heading is None:
            return None
        opens, leaf = _OPENS.fullmatch(text), _LEAF.fullmatch(text)
        found = opens or leaf
        if found is None:
            self._above = []
            return None
        indent = len(found[1])
        self._above = [(n, name) for n, name in self._above if n < indent]
        if leaf is not None:
            path = "/".join([*(name for _, name in self._above), leaf[2]])
            return Line(None, {path: float(leaf[3].replace("_", ""))}) if self._above else None
        self._above.append((indent, found[2]))
        return None

    def _gather(self, number: int, values: Values) -> None:
        """Lines without a step are one record until a name comes again."""
        last = self._loose[-1] if self._loose else None
        if last is None or values.keys() & last.values.keys():
            self._loose.append(Printed(number, None, dict(values), True))
        else:
            last.values.update(values)

    def _bar_step(self, bar: tuple[int, int], text: str) -> int:
        """Position of a bar, past those of the epochs before; the last numbers at it count."""
        place, length = bar
        epoch = int(found[1]) if (found := _EPOCH.search(text)) else None
        last, long, before = self._before
        over = place < last or place == last == long
        if over and epoch is not None and before is not None and epoch > before:
            self._offset += long
        elif (place < last or length != long) and 0 < last == long:
            self._done.append(self._bars[self._offset + last])
        self._before = place, length, epoch
        return self._offset + place

    def records(self) -> list[Printed]:
        """Records of known names, if there are none those with a step.

        Where a heading stands above a whole log, its step is none of theirs.
        """
        below, bars = self._below, list(self._bars.values())
        if len(self._done) > 1:  # a bar within each step: it counts groups or batches
            bars = [] if any(r.known for r in self._taken) else self._each_bar()
        steps = {record.step for record in below}
        once = {(r.step, tuple(r.values)) for r in below}
        if len(steps) < 3 and len(below) > 2 * len(once):
            below = []
            for record in self._below:
                self._gather(record.number, record.values)
        found = [*self._taken, *self._loose, *below, *bars]
        known = [record for record in found if record.known]
        if known and all(_OF_EVAL.match(name) for record in known for name in record.values):
            # A word that stands in front of every line is a name, as of a run called "test".
            known = [r._replace(values=_unmarked(r.values)) for r in known]
        ordered = sorted(known or found, key=lambda record: record.number)
        strays = _strays(ordered)
        self.strays = len(strays)
        return [record for record in ordered if record.number not in strays]

    def _each_bar(self) -> list[Printed]:
        """The last numbers of each bar that was filled, without a step."""
        place, length, _ = self._before
        whole = [self._bars[place]] if place == length and not self._offset else []
        return [record._replace(step=None) for record in [*self._done, *whole]]


def _strays(records: Sequence[Printed]) -> set[int]:
    """Lines of text, as of a completion ("Step 2: the length = 5"), by their number.

    Their names are not those of the line that counts the steps of the log. Their steps go back and
    forth, or are one or two, and are not those of the log around them.
    """
    kinds: dict[tuple[str, ...], list[Printed]] = {}
    for record in records:
        if record.step is not None:
            kinds.setdefault(tuple(record.values), []).append(record)
    if len(kinds) < 2:
        return set()
    steps = {keys: [int(r.step or 0) for r in kind] for keys, kind in kinds.items()}
    main = max(kinds, key=lambda keys: len(set(steps[keys])))
    at, own = [r.number for r in kinds[main]], steps[main]
    found: set[int] = set()
    for keys, kind in kinds.items():
        mine = steps[keys]
        back = sum(b < a for a, b in pairwise(mine))
        if keys == main or (10 * back <= len(mine) and len(set(mine)) > 2):
            continue
        places = [bisect(at, record.number) for record in kind]
        around = [own[max(p - 1, 0) : p + 1] for p in places]
        far = [not min(a) <= n <= max(a) for a, n in zip(around, mine, strict=True)]
        if 2 * sum(far) > len(far):
            found |= {record.number for record in kind}
    return found


def is_log(lines: Iterable[str], vital: Callable[[tuple[str, ...]], bool]) -> bool:
    """Whether lines are those of a training run: two with vital names, or three steps in order."""
    told = 0
    steps: dict[tuple[str, ...], list[int]] = {}
    for text in lines:
        line = line_of(text)
        if line is None or not line.values:
            continue
        keys = tuple(line.values)
        told += vital(keys)
        seen = steps.setdefault(keys, [])
        if line.step is not None and (not seen or line.step > seen[-1]):
            seen.append(line.step)
        if told > 1 or (len(seen) > 2 and len(keys) > 1):
            return True
    return False
