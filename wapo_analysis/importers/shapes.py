"""Records in other shapes: JSON by columns or by name, tables as text."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from wapo_analysis.errors import UserError, printable
from wapo_analysis.importers.jsonl import JsonLines, as_number, as_step, flat
from wapo_analysis.importers.mapping import VITAL, NameTable
from wapo_analysis.importers.readers import csv_header, json_value, table_kind
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.store.files import open_regular

#: Names under which a record holds its numbers, beside its step, a time or a text.
WRAPPERS = ("metrics", "data", "scalars", "stats", "log", "logs", "context")
METRIC_KEYS = ("metric", "metric_name", "metricName", "key", "tag", "name")
#: Columns that name a number and that hold it, one a row.
VALUE_KEYS = ("value", "metricValue", "metric_value")
SPLIT_KEYS = ("split", "mode", "phase", "stage", "subset", "runContext", "type", "kind", "event")
HELD_OUT = ("eval", "evaluation", "evaluate", "val", "valid", "validate", "validation", "test")
#: Lists of numbers, one for each part of the completions.
BY_POSITION = ("kl_positional",)
MOST_PARTS = 64
Rows = list[dict[str, Any]]
_DEEP = 4
_PARTS = 2  # deeper steps and values lie in something (history, run) that is opened first
_FIRST_ROWS = 50


# ---- JSON


def json_rows(value: Any, told: Callable[[str], None] = lambda _: None) -> Rows | None:
    """Records of a JSON value.

    A list of objects, one object, lists by name, numbers by step, what pandas writes in any
    orientation but "values", ``{metric: {steps, values}}``, or one of these below a name. Returns
    None if it is nothing of the kind. ``value``: what the file holds; ``told``: is given what was
    chosen or left out, in a sentence.
    """
    rows = _rows(value, told)
    if rows is not None or not isinstance(value, dict) or not value:
        return rows
    inside = [(path, found) for path, found in _inside(value, "", 0) if len(found) > 1]
    if not inside:
        return [value]
    path, found = max(inside, key=lambda item: len(item[1]))
    others = f"; not {', '.join(p for p, _ in inside if p != path)}" if len(inside) > 1 else ""
    told(f"{printable(path)} of the file is read{printable(others)}")
    return found


def _rows(value: Any, told: Callable[[str], None]) -> Rows | None:
    """Records of a value by itself, None if it is no list of them."""
    if isinstance(value, list):
        return value if value and all(isinstance(row, dict) for row in value) else None
    if not isinstance(value, dict) or not value:
        return None
    for read in (_pandas, _by_step, _by_row, _series):
        if (rows := read(value)) is not None:
            return rows
    return _by_name(value, told)


def _inside(value: Mapping[str, Any], before: str, depth: int) -> Iterator[tuple[str, Rows]]:
    for name, part in value.items():
        if (rows := _rows(part, lambda _: None)) is not None:
            yield f"{before}{name}", rows
        elif isinstance(part, dict) and depth < _DEEP:
            yield from _inside(part, f"{before}{name}/", depth + 1)


def _pandas(value: Mapping[str, Any]) -> Rows | None:
    """Orientations "split" and "table" of pandas."""
    names, data = value.get("columns"), value.get("data")
    if isinstance(value.get("schema"), dict) and isinstance(data, list):
        return data if all(isinstance(row, dict) for row in data) else None
    if not isinstance(names, list) or not isinstance(data, list) or not data:
        return None
    if any(not isinstance(row, list) or len(row) != len(names) for row in data):
        return None
    rows = [dict(zip(map(str, names), row, strict=True)) for row in data]
    return _indexed(rows, value.get("index"))


def _indexed(rows: Rows, index: Any) -> Rows:
    """Rows with their index as the step, where it counts something that no column does."""
    if not isinstance(index, list) or len(index) != len(rows):
        return rows
    numbers = [n for label in index if (n := as_step(label)) is not None]
    if len(numbers) < len(rows) or numbers == list(range(len(rows))):
        return rows
    if NameTable({}).step_key(tuple(rows[0])) is not None:
        return rows
    return [{"step": n, **row} for n, row in zip(numbers, rows, strict=True)]


def _by_step(value: Mapping[str, Any]) -> Rows | None:
    """NeMo-RL's ``{metric: {step: number}}``, which is pandas's "columns" too."""
    if not all(isinstance(v, dict) and all(k.isdecimal() for k in v) for v in value.values()):
        return None
    rows: dict[int, dict[str, Any]] = {}
    for name, by_step in value.items():
        for step, number in by_step.items():
            rows.setdefault(int(step), {})[name] = number
    ordered = [rows[step] for step in sorted(rows)]
    return [
        row if NameTable({}).step_key(tuple(row)) else {"step": step, **row}
        for step, row in zip(sorted(rows), ordered, strict=True)
    ]


def _by_row(value: Mapping[str, Any]) -> Rows | None:
    """Records by number: pandas's "index", or a step to its record."""
    if not all(k.isdecimal() and isinstance(v, dict) for k, v in value.items()):
        return None
    order = sorted(value, key=int)
    return _indexed([value[key] for key in order], order)


def _series(value: Mapping[str, Any]) -> Rows | None:
    """``{metric: {"steps": [...], "values": [...]}}``, or pairs of step and number by metric.

    ClearML's scalars are such by two names, with "x" and "y".
    """
    found = dict(_all_pairs(value, "", 0))
    if None in found.values():
        return None
    return [
        {"step": step, name: number}
        for name, pairs in found.items()
        for step, number in pairs or ()
    ]


def _all_pairs(
    value: Mapping[str, Any], before: str, depth: int
) -> Iterator[tuple[str, list[tuple[Any, Any]] | None]]:
    for name, part in value.items():
        pairs = _step_pairs(part)
        if pairs is None and isinstance(part, dict) and part and depth < _PARTS:
            yield from _all_pairs(part, f"{before}{name}/", depth + 1)
        else:
            yield f"{before}{name}", pairs


def _step_pairs(part: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(part, dict):
        steps = part.get("steps", part.get("step", part.get("x")))
        values = part.get("values", part.get("value", part.get("y")))
        if isinstance(steps, list) and isinstance(values, list) and len(steps) == len(values):
            return list(zip(steps, values, strict=True))
        return None
    if isinstance(part, list) and len(part) > 1:
        if all(isinstance(p, list) and len(p) == 2 for p in part):
            return [(step, number) for step, number in part]
        if all(isinstance(p, dict) and {"step", "value"} <= p.keys() for p in part):
            return [(p["step"], p["value"]) for p in part]
    return None


def _by_name(value: Mapping[str, Any], told: Callable[[str], None]) -> Rows | None:
    """Lists of numbers by name, nested names joined; lists of another length are left out."""
    lists_of = list(value.values())
    if len(lists_of) == 1 and _rows(lists_of[0], told) is not None:
        return None  # records below a name
    if all(isinstance(v, list) for v in lists_of) and len(set(map(len, lists_of))) == 1:
        columns = zip(*lists_of, strict=True)
        return [dict(zip(value, row, strict=True)) for row in columns] or None
    scalars = [name for name, v in value.items() if as_number(v) is not None]
    if NameTable({}).feeds(scalars).keys() & set(VITAL):
        return None  # one record, with lists in it
    lists = dict(_lists(value, "", 0))
    first = {name.partition("/")[0] for name in lists}
    if len(first) == 1 and all("/" in name for name in lists):
        lists = {name.partition("/")[2]: cells for name, cells in lists.items()}
    lengths = Counter(len(cells) for cells in lists.values())
    if not lengths:
        return None
    length = max(lengths, key=lambda n: (lengths[n], n))
    if length < 2:
        return None
    other = [name for name, cells in lists.items() if len(cells) != length]
    if other:
        told(
            f"lists of {length} numbers are read; {', '.join(map(printable, other[:6]))} "
            f"{'has' if len(other) == 1 else 'have'} another length, so their steps are unknown"
        )
    names = [name for name in lists if name not in other]
    columns = zip(*(lists[name] for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in columns]


def _lists(value: Mapping[str, Any], before: str, depth: int) -> Iterator[tuple[str, list[Any]]]:
    for name, part in value.items():
        if isinstance(part, list) and part and not any(isinstance(v, list | dict) for v in part):
            if any(as_number(v) is not None for v in part) or not before:
                yield f"{before}{name}", part
        elif isinstance(part, dict) and depth < _DEEP:
            yield from _lists(part, f"{before}{name}/", depth + 1)


def unwrapped(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record whose numbers stand below one name, as structured loggers write them, without it.

    Examples
    --------
    >>> unwrapped({"level": "info", "metrics": {"step": 3, "reward": 0.5}})
    {'level': 'info', 'step': 3, 'reward': 0.5}
    """
    for name in BY_POSITION:
        if isinstance(parts := record.get(name), list):
            numbered = {f"{name}/{n}": part for n, part in enumerate(parts[:MOST_PARTS])}
            record = {**record, **numbered}
    inside = [name for name in WRAPPERS if isinstance(record.get(name), dict)]
    if len(inside) != 1:
        return record
    rest = {name: value for name, value in record.items() if name != inside[0]}
    return rest | dict(record[inside[0]])


_SUMMARY = ("train_runtime", "train_loss", "total_flos", "train_steps_per_second",
            "train_samples_per_second", "epoch")  # fmt: skip


def trainer_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a Transformers log: eval_x is eval/x, the final summary is summary/x."""
    return {
        (f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else
         f"summary/{key}" if key in _SUMMARY else key): value
        for key, value in record.items()
    }  # fmt: skip


def told_apart(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row by the names it means: ``metric, value`` is one number, an evaluation's is eval/.

    Examples
    --------
    >>> told_apart({"step": 1, "metric": "reward", "value": 0.5})
    {'step': 1, 'reward': 0.5}
    >>> told_apart({"step": 1, "split": "val", "reward": 0.5})
    {'step': 1, 'eval/reward': 0.5}
    """
    names = [key for key in METRIC_KEYS if is_name(values.get(key))]
    held = [key for key in VALUE_KEYS if as_number(values.get(key)) is not None]
    if len(held) == 1 and names:
        rest = {key: v for key, v in values.items() if key not in (*names, held[0])}
        values = {**rest, str(values[names[0]]): values[held[0]]}
    split = next((k for k in SPLIT_KEYS if str(values.get(k)).strip().lower() in HELD_OUT), None)
    if split is None:
        return values
    return {
        key if "step" in key.lower() else f"eval/{key}": value
        for key, value in values.items()
        if key != split and value is not None
    }


def is_name(value: Any) -> bool:
    """Whether a cell holds a text that names something."""
    return isinstance(value, str) and bool(value.strip())


# ---- tables as text

_BARS = re.compile("[|\u2502\u2503\u2551]")
_RULER = re.compile(r"[\s|+:=.\-_\u2500-\u257f]*")
_WORD = re.compile(r"[A-Za-z_].*")


def text_tables(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of tables in a text, as Markdown, terminals and pandas print them, with their lines."""
    header: list[str] = []
    indexed = False
    for number, line in lines:
        if _RULER.fullmatch(line):
            header = header if line.strip() else []
            continue
        cells = _cells(line)
        if header and len(cells) in (len(header), len(header) + indexed):
            known = [as_number(cell) for cell in cells]
            if any(n is not None for n in known):
                mine = cells[-len(header) :]
                yield (
                    number,
                    {k: v for k, v in zip(header, mine, strict=True) if v not in ("", "-")},
                )
                continue
        barred = bool(_BARS.search(line))
        indexed = not barred or cells[:1] == [""]  # pandas prints an index without a name
        cells = cells[1:] if barred and indexed else cells
        names = len(cells) > 1 and len(set(cells)) == len(cells) and all(map(_WORD.match, cells))
        header = cells if names and all(as_number(cell) is None for cell in cells) else []


def _cells(line: str) -> list[str]:
    if not _BARS.search(line):
        return line.split()
    cells = [cell.strip().strip("*`") for cell in _BARS.split(line.strip())]
    return cells[not cells[0] : len(cells) - (not cells[-1])]


def holds_table(lines: Iterable[tuple[int, str]], least: int = 0) -> bool:
    """Whether any table of a text has a column that says something about a training run.

    ``least``: so many rows must have a step and a reward.
    """
    names = NameTable({})
    rows = (tuple(row) for _, row in text_tables(lines))
    if not least:
        return any(names.feeds(keys).keys() & set(VITAL) for keys in rows)
    logged = (keys for keys in rows if names.step_key(keys) and "reward" in names.feeds(keys))
    return len(list(islice(logged, least))) == least


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text with their numbers."""
    with open_regular(file) as stream:
        for number, line in enumerate(stream, start=1):
            yield number, line.decode("utf-8", "replace").rstrip("\r\n")


# ---- is it a log?


def may_be_log(file: Path, names: NameTable) -> bool:
    """Whether a table has a step, or a number that a log of a training holds."""
    if file.suffix == ".parquet":
        return True
    try:
        return any(
            names.step_key(keys) is not None
            or names.feeds(keys).keys() & {*VITAL, *names.mapping}
            or not {*keys}.isdisjoint(METRIC_KEYS)
            for keys in _table_keys(file)
        )
    except UserError:
        return True  # said when it is read


def _table_keys(file: Path) -> Iterator[tuple[str, ...]]:
    """Names in each of the first records of a table."""
    kind = table_kind(file)
    rows: Iterable[Mapping[str, Any]]
    if kind == "csv":
        rows = [dict.fromkeys(csv_header(file)[0])]
    elif kind == "lines":
        rows = (record.values for record in JsonLines(file).records())
    elif kind == "json":
        rows = json_rows(json_value(file, ImportReport("table", ""))) or ()
    else:
        rows = (row for _, row in text_tables(text_lines(file)))
    for row in islice(rows, _FIRST_ROWS):
        yield tuple(key for key, _ in flat(unwrapped(row)))
