"""What trainers print: TRL's dicts, verl's ``step:N - name:value`` and prime-rl's lines.

Prefixes (Ray's, a launcher's, colours, progress bars) are skipped. A dict may be spread over lines.
verl's and prime-rl's lines and slime's dicts carry their step. TRL's do not: they are numbered by
the progress bar where it moves with them, else counted from 1. A log without any of these is read
as people print: see `printed`.
"""

import ast
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from wapo_analysis.importers.jsonl import JsonLines, as_number, parse_json
from wapo_analysis.importers.mapping import VITAL, NameTable, is_supervised
from wapo_analysis.importers.printed import WRAPPED, PrintedLog, is_log, line_of
from wapo_analysis.importers.readers import LINE_BYTES
from wapo_analysis.importers.report import ImportReport, shown
from wapo_analysis.importers.shapes import trainer_names, unwrapped
from wapo_analysis.importers.sink import Sink
from wapo_analysis.store.files import open_regular

MAX_DICT_LINES = 400
#: Lines in which a log without dicts must show itself.
MAX_TELLING = 20_000
#: So many numbers of one name, without a step, may be anything that was printed.
FEW = 30
_MARKS = re.compile(rb"""[{}:\['"=|]|tep |ter |tion |pdate |poch |Error$|Exception$""")
_RAY = re.compile(r"\(\w+ pid=\d+(?:, ip=[\d.]+)?\) ?")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NUMBER = r"[-+]?(?:\d[\d_]*\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf)"
_VERL_STEP = re.compile(r"(?<!:)\bstep:(\d+) -(?: |$)")
_TIME = r"(?:Time: )?(\d[\d.]*(?:ms|[dhms])(?: \d+[hms])?) \| "
_PRIME_STEP = re.compile(rf"\bStep\s+(\d+) \|\s+{_TIME}")
_PRIME_EVAL = re.compile(rf"\bEvaluated (\S+) \(Step (\d+)\) \|.*?\|\s+{_TIME}Reward:? ({_NUMBER})")
_PRIME_ITEM = re.compile(rf"\s*([A-Z][\w. -]*?):? ({_NUMBER})(%?)(?![\w/])", re.IGNORECASE)
_UNITS = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
# prime-rl prints with units what it logs under these names (src/prime_rl/trainer, orchestrator).
_PRIME_NAMES = {
    "Reward": "reward/all/mean", "Val. Reward": "val_reward", "Loss": "loss/mean",
    "Entropy": "entropy/all/mean", "Mismatch KL": "mismatch_kl/all/mean",
    "Grad. Norm": "optim/grad_norm", "LR": "optim/lr", "Truncation": "is_truncated/all/mean",
}  # fmt: skip
_VERL_VALUE = re.compile(rf"(?:np\.\w+\()?({_NUMBER})(?![\w.])", re.IGNORECASE)
_BARE = re.compile(r"(?<=[:\s,\[(])(-?(?:nan|inf))(?=[\s,}\])])", re.IGNORECASE)
_BAR = re.compile(r"(\d+)/(\d+) \[")
_BEFORE = re.compile(
    r"(?:\b|_)(?:step|rollout|perf|eval|iter|iteration)[ :=#]*(\d+)\s*[:,]?\s*(?:\w+\s*[:=]\s*)?$",
    re.I,
)
_OPENS = re.compile(r"""\{\s*['"][^'"]+['"]\s*:""")
_ERROR = re.compile(
    r"(?:^|[\s)\]])((?:\w+\.)*\w*(?:Error|Exception)(?:: .*|$)|\w+ out of memory.*)"
)
_SUMMARY = "summary/train_runtime"
#: Line, record without a step, position of the progress bar, step of the heading above it.
Stepless = tuple[int, dict[str, Any], int | None, int | None]
_TAIL = re.compile(r"([^\s:=|,]+)\s*[:=\s]\s*([^\s:=|,]*)[\s|)\]]*$")


def tells(lines: Iterator[str], named: bool = True) -> bool:
    """Whether any of some lines holds a record of numbers; ``named``: or numbers by name."""
    names, held = NameTable({}), []

    def kept() -> Iterator[tuple[int, str]]:
        for number, line in enumerate(lines):
            if number < MAX_TELLING:
                held.append(line)
            yield number, line

    return any(
        len([v for v in record.values() if as_number(v) is not None]) >= 2
        for _, _, record, _ in _records(kept())
    ) or (named and is_log(held, lambda keys: bool(names.feeds(keys).keys() & set(VITAL))))


def holds_reward(lines: Iterator[tuple[int, str]]) -> bool:
    """Whether any record of a log holds a reward, in the first ``MAX_TELLING`` lines."""
    names = NameTable({})
    log = PrintedLog(lambda keys: bool(names.feeds(keys)))
    given = _also(islice(lines, MAX_TELLING), log, [])
    if any("reward" in names.feeds(tuple(record)) for _, _, record, _ in _records(given)):
        return True
    return any("reward" in names.feeds(tuple(record.values)) for record in log.records())


def of_prime_rl(lines: Iterator[tuple[int, str]]) -> bool:
    """Whether any of the first ``MAX_TELLING`` lines of a log is one of prime-rl's."""
    return any(_prime_line(line) is not None for _, line in islice(lines, MAX_TELLING))


def console_lines(file: Path, report: ImportReport | None = None) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; a carriage return, as progress bars write it, ends one too.

    An unfinished last line is left out, and said in the report if it holds numbers.
    """
    log = JsonLines(file)
    last = ""
    for number, _, data in log.lines():
        for part in data.split(b"\r"):
            if _MARKS.search(part) or b"\xe2\x94" in part:
                text = _RAY.sub("", _COLOUR.sub("", part.decode("utf-8", "replace")))
                last = text if _TAIL.search(text) else last
                yield number, text
    with open_regular(file) as stream:
        stream.seek(log.offset)
        *bars, rest = stream.read(LINE_BYTES).rstrip().split(b"\r")
    for part in bars:  # of a bar that is not done yet there is no line feed
        yield log.line + 1, _COLOUR.sub("", part.decode("utf-8", "replace"))
    text = _COLOUR.sub("", rest.decode("utf-8", "replace"))
    if text.endswith(("}", "]")) or _is_whole(text, last):  # whole but for its line feed
        yield log.line + 1, text
    elif report is not None and (half := line_of(text)) is not None and half.values:
        report.half_lines.append(shown(file.name))


def _is_whole(text: str, last: str) -> bool:
    """Whether a line without line feed ends with the name and the digits of the one before."""
    mine, other = _TAIL.search(text), _TAIL.search(last)
    if mine is None or other is None or mine[1] != other[1]:
        return False
    return len(mine[2]) >= len(other[2])


def read_console(files: tuple[Path, ...], sink: Sink, report: ImportReport) -> None:
    """Read the records that a trainer printed."""
    for file in files:
        stepless: list[Stepless] = []
        stepped = False
        printed = PrintedLog(lambda keys: bool(sink.names.feeds(keys)))
        errors: list[tuple[int, str]] = []
        last = 0
        at: Any = None
        lines = _also(console_lines(file, report), printed, errors)
        for number, bar, record, step in _records(lines):
            last = number
            named = trainer_names(record)
            key = sink.names.step_key(tuple(record))
            if key is not None:
                at = record[key]
            elif step is None and stepped and _is_eval(named):
                step = at  # it belongs to the step before
            if step is not None:
                at = step if key is None else at
                named["step"] = step
            elif key is None:
                stepless.append((number, named, bar, printed.heading))
                continue
            stepped = True
            report.lines += 1
            with report.record(file, number):
                sink.add_log(named, "console", (file, number))
        report.files += 1
        if not stepped and not _count_steps(file, stepless, sink, report):
            _read_printed(file, printed, sink, report)
        if errors and errors[-1][0] > last:
            report.told(_error(file, errors))


def _also(
    lines: Iterator[tuple[int, str]], log: PrintedLog, errors: list[tuple[int, str]]
) -> Iterator[tuple[int, str]]:
    """The same lines, given to a log of numbers by name on the way; errors since are noted."""
    for number, line in lines:
        if _VERL_STEP.search(line) or log.add(number, line):
            errors.clear()
        elif found := _ERROR.search(line):
            errors.append((number, found[1].strip()))
        yield number, line


def _error(file: Path, errors: Sequence[tuple[int, str]]) -> str:
    number, text = errors[-1]
    return f"{shown(file.name)} ends in an error (line {number}): {text[:200]}"


def end_in_error(file: Path) -> str:
    """The error that a text ends in, in a sentence; empty if there is none."""
    errors: list[tuple[int, str]] = []
    for _ in _also(console_lines(file), PrintedLog(lambda _: False), errors):
        pass
    return _error(file, errors) if errors else ""


def _read_printed(file: Path, log: PrintedLog, sink: Sink, report: ImportReport) -> None:
    """Hand over numbers printed by name; those without a step only where no other has one."""
    records = log.records()
    stepped = [record for record in records if record.step is not None]
    if not stepped and "step" not in sink.names.mapping:
        if len(records) < FEW and len({name for r in records for name in r.values}) < 2:
            return
        _count_steps(
            file, [(r.number, trainer_names(r.values), None, None) for r in records], sink, report
        )
        return
    if log.strays:
        report.told(
            f"lines left out that name a step other than the log around them, as completions do: "
            f"{log.strays}"
        )
    for record in stepped or records:
        named = trainer_names(record.values)
        if record.step is not None and "step" not in sink.names.mapping:
            named["step"] = record.step
        report.lines += 1
        with report.record(file, record.number):
            sink.add_log(named, "console", (file, record.number))


def _count_steps(file: Path, records: Sequence[Stepless], sink: Sink, report: ImportReport) -> bool:
    """Hand over printed records without a step, of training alone; whether there are any."""
    given = [entry for entry in records if not is_supervised(entry[1])]
    if any("reward" in sink.names.feeds(tuple(record)) for _, record, *_ in given):
        if len(given) < len(records):
            report.told(f"{len(records) - len(given)} records of supervised fine-tuning left out")
        records = given
    vital: dict[tuple[str, ...], bool] = {}

    def is_log(record: dict[str, Any]) -> bool:
        keys = tuple(record)
        if keys not in vital:
            vital[keys] = bool(sink.names.feeds(keys).keys() & set(VITAL))
        return vital[keys] or _is_eval(record)

    records = [entry for entry in records if is_log(entry[1])]
    counter = _Counter()
    counted = [entry for entry in records if not _is_eval(entry[1])]
    # The bar beside them counts, else the heading above them.
    by = next((n for n in (0, 1) if _bars_count([entry[2:][n] for entry in counted])), None)
    for entry in records:
        number, record = entry[:2]
        with report.record(file, number):
            step = counter.step(record, None if by is None else entry[2:][by])
            report.lines += 1
            sink.add_log({**record, "step": step}, "trl", (file, number))
    if records and by is None:
        transformers = any("summary/epoch" in record for _, record, *_ in records)
        report.told(
            f"the {counter.count} printed records carry no step, so they are counted from 1"
            + (": with logging_steps = n a step here is n of the trainer's" if transformers else "")
        )
    return bool(records)


def _records(
    lines: Iterator[tuple[int, str]],
) -> Iterator[tuple[int, int | None, dict[str, Any], int | None]]:
    """Line, position of the progress bar, record, and the step that is printed with it."""
    bar: int | None = None
    open_at, text, before = 0, "", ""
    for number, line in lines:
        for found in _BAR.finditer(line):
            bar = int(found[1])
        if text:
            text += "\n" + line
            if (end := _end_of(text)) is None and number - open_at < MAX_DICT_LINES:
                continue
            record, text = _dict(text[:end]), ""
            if record is not None:
                yield open_at, bar, record, _step_before(before)
            continue
        if (told := _verl_line(line) or _prime_line(line)) is not None:
            yield number, bar, told[1], told[0]
            continue
        start = _OPENS.search(line)
        while start is not None:
            rest = line[start.start() :]
            end = _end_of(rest)
            if end is None:
                open_at, text, before = number, rest, line[: start.start()]
                break
            record = _dict(rest[:end])
            if record is not None:
                yield number, bar, record, _step_before(line[: start.start()])
            start = _OPENS.search(line, start.start() + end)


def _step_before(text: str) -> int | None:
    found = _BEFORE.search(text.rstrip())
    return int(found[1]) if found else None


def _verl_line(line: str) -> tuple[int, dict[str, Any]] | None:
    found = _VERL_STEP.search(line)
    if found is None:
        return None
    record: dict[str, Any] = {}
    for item in line[found.end() :].split(" - "):
        name, _, value = item.strip().rpartition(":")
        number = _VERL_VALUE.match(value)
        if name and number is not None:
            record[name] = number[1]
    return (int(found[1]), record) if record else None


def _prime_line(line: str) -> tuple[int, dict[str, Any]] | None:
    if (held_out := _PRIME_EVAL.search(line)) is not None:
        return int(held_out[2]), {f"eval/{held_out[1]}/avg@1": held_out[4]}
    found = _PRIME_STEP.search(line)
    if found is None:
        return None
    times = re.findall(r"([\d.]+)(ms|[dhms])", found[2])
    record: dict[str, Any] = {"time/step": sum(float(n) * _UNITS[unit] for n, unit in times)}
    for item in map(_PRIME_ITEM.match, line[found.end() :].split("|")):
        if item is not None:
            name = _PRIME_NAMES.get(item[1], item[1])
            record[name] = float(item[2]) / 100 if item[3] else item[2]
    return int(found[1]), record


def _end_of(text: str) -> int | None:
    """Place after the brace that closes the one a text begins with, None if it stays open."""
    depth, quote, escaped = 0, "", False
    for place, character in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return place + 1
    return None


def _dict(text: str) -> dict[str, Any] | None:
    """A printed dict, Python's or JSON's, with numbers of numpy and torch; None if it is none."""
    for read in (_literal, _json):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            value = dict(unwrapped(value))
            return value if any(as_number(v) is not None for v in value.values()) else None
    return None


def _literal(text: str) -> Any:
    return ast.literal_eval(_BARE.sub(r"'\1'", WRAPPED.sub(r"\1", text)))


def _json(text: str) -> Any:
    return parse_json(text)


def _is_eval(record: dict[str, Any]) -> bool:
    """Whether a record holds an evaluation or the final summary: it belongs to the step before."""
    names = [key for key in record if key not in ("epoch", "step", "summary/epoch")]
    return _SUMMARY in record or all(key.startswith("eval/") for key in names)


def _bars_count(places: list[int | None]) -> bool:
    """Whether a progress bar, or a heading, moved on between nearly all records."""
    known = [place for place in places if place is not None]
    if len(known) < len(places) or len(known) < 2:
        return False
    moves = sum(b > a for a, b in zip(known, known[1:], strict=False))
    return moves >= 0.9 * (len(known) - 1)


@dataclass
class _Counter:
    """Numbers records that carry no step; a run that was started again goes back by its epoch."""

    count: int = 0
    _now: int = 0
    _epochs: list[float] = field(default_factory=list)

    def step(self, record: dict[str, Any], bar: int | None) -> int:
        """Step of the next record."""
        if _is_eval(record):
            return self._now if bar is None else max(bar, self._now)
        self.count += 1
        if bar is not None:
            self._now = bar
            return bar
        epoch = as_number(record.get("summary/epoch"))
        if epoch is not None and self._epochs and epoch < self._epochs[-1]:
            self._now = bisect_left(self._epochs, epoch)
            del self._epochs[self._now :]
        self._now += 1
        if epoch is not None and len(self._epochs) == self._now - 1:
            self._epochs.append(float(epoch))
        return self._now
