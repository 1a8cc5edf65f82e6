"""``make mutants``: small plausible faults, one at a time, that the nearest tests should notice.

A mutant flips a comparison or a sign, swaps an operator, drops a term, changes a constant or a
reduction, in a copy of the checkout. The tests of its package (`NEAREST`) run once under coverage;
then each mutant meets the tests that reach its line, the quickest first, and after them the other
tests of their files, until one fails. Survivors are listed, with the reason where
`tests/mutants_explained.toml` gives one (mostly: no result can differ). One process, and only the
changed line differs from what you have:

    python -m tests.mutants --sample 100 --seed 0
    python -m tests.mutants --only store,derive --sample 20
    python -m tests.mutants --only store --files check,tail --sample 60
"""

import argparse
import ast
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
NEAREST = {
    "taxonomy/wapo_taxonomy": ["tests/unit/taxonomy"],
    "wapo_analysis/derive.py": [
        "tests/unit/test_derive.py",
        "tests/unit/test_step_columns.py",
        "tests/unit/record",
        "tests/unit/importers/test_import_tables.py",
    ],
    "wapo_analysis/stats": ["tests/unit/stats"],
    "wapo_analysis/objectives": ["tests/unit/objectives", "tests/gold"],
    "wapo_analysis/record": [
        "tests/unit/record",
        "tests/unit/capture",
        "tests/integration/test_beside.py",
        "tests/integration/test_training.py",
        "tests/integration/test_torch_loop.py",
    ],
    "wapo_analysis/capture": [
        "tests/unit/capture",
        "tests/integration/test_torch_loop.py",
        "tests/integration/test_verl.py",
        "tests/integration/test_capture_mode.py",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/integration/test_trl_*.py")),
    ],
    "wapo_analysis/store": [
        "tests/unit/store",
        "tests/unit/watch",
        "tests/unit/record",
        "tests/unit/test_run.py",
        "tests/integration/test_crash_matrix.py",
        "tests/integration/test_fork.py",
        "tests/integration/test_two_writers.py",
    ],
    "wapo_analysis/diagnose": ["tests/unit/diagnose", "tests/unit/experiments"],
    "wapo_analysis/importers": ["tests/unit/importers"],
    "wapo_analysis/audit": ["tests/unit/audit"],
}
# Sizes of blocks, limits of memory and waiting times: no result depends on them.
_NO_RESULT = re.compile(
    r"ROWS|BYTES|BLOCK|ELEMENTS|CHUNK|SECONDS|TIMEOUT|WIDTH|SIZE|QUEUE|CACHE|MEMORY"
)
_OPERATORS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
_CALLS = {"max": "min", "min": "max", "any": "all", "all": "any", "sum": "mean", "floor": "ceil"}


class Mutant(NamedTuple):
    """A change of bytes in one file."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: `{self.old}` -> `{self.new}`"


def mutants(file: str) -> list[Mutant]:
    """Every mutant of one source file, in order."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))

    def span(node: ast.expr) -> tuple[int, int]:
        first, last = starts[node.lineno - 1], starts[(node.end_lineno or node.lineno) - 1]
        return first + node.col_offset, last + (node.end_col_offset or 0)

    found = []
    for node, start, end, new in _changes(ast.parse(source), source, span):
        found.append(Mutant(file, node.lineno, start, end, source[start:end].decode(), new))
    return sorted(set(found)) if _runs_here(source) else []


def _runs_here(source: bytes) -> bool:
    return b"import triton" not in source or importlib.util.find_spec("triton") is not None


def _changes(tree: ast.AST, source: bytes, span) -> Iterator[tuple[ast.expr, int, int, str]]:
    signs = {id(node.left) for node in ast.walk(tree) if _is_sign(node)}
    for node in _code(tree):
        pairs = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = list(zip(sides[:-1], sides[1:], node.ops, strict=True))
        elif isinstance(node, ast.BinOp) and not (_is_text(node.left) or _is_text(node.right)):
            pairs = [(node.left, node.right, node.op)]
        elif isinstance(node, ast.BoolOp):
            pairs = [(a, b, node.op) for a, b in zip(node.values, node.values[1:], strict=False)]
        for left, right, operator in pairs:
            old, new = _OPERATORS.get(type(operator), ("", ""))
            start, end = span(left)[1], span(right)[0]
            gap = source[start:end].decode()
            same = id(node) in signs and isinstance(operator, ast.Mult | ast.Div)
            if old and old in gap and not same:
                yield node, start, end, gap.replace(old, new, 1)
            if isinstance(operator, ast.Add | ast.Mult) and isinstance(node, ast.BinOp):
                yield node, *span(node), ast.unparse(left)  # drops a term or factor
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
            yield node, *span(node), f"({ast.unparse(node.operand)})"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, *span(node), repr(2 * node.value if node.value else 1)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in _CALLS:
                end = span(node.func)[1]
                yield node, end - len(name), end, _CALLS[name]


def _is_sign(node: ast.AST) -> bool:
    """A product compared with 0: a quotient has the same sign."""
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return len(sides) == 2 and isinstance(sides[1], ast.Constant) and sides[1].value == 0


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes whose value a result may depend on: no annotations, messages or block sizes."""
    for name, child in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for node in child if isinstance(child, list) else [child]:
            if not isinstance(node, ast.AST) or isinstance(node, ast.Raise | ast.JoinedStr):
                continue
            target = getattr(node, "target", (getattr(node, "targets", None) or [None])[0])
            if isinstance(target, ast.Name) and _NO_RESULT.search(target.id):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "cast"):
                continue  # types, joined by |
            yield node
            yield from _code(node)


class Reach:
    """Which tests of a room run which of its lines, and how long each takes."""

    def __init__(self, room: str, written: Path) -> None:
        import coverage  # in the extra [dev]; this module is looked through for doctests

        self.room, self.written = room, written
        self.seconds: dict[str, float] = {}
        self.uses: dict[str, list[str]] = {}
        self._now = ""
        place = ["*/" + room + ("" if room.endswith(".py") else "/*")]
        self.cover = coverage.Coverage(data_file=None, config_file=False, include=place)
        self.cover.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        started, self._now = time.monotonic(), item.nodeid
        self.cover.switch_context(item.nodeid)
        self.uses[item.nodeid] = list(getattr(item, "fixturenames", ()))
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.monotonic() - started

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[None]:
        if fixturedef.scope != "function":  # made once: reached by all who use it
            self.cover.switch_context(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.cover.switch_context(self._now)

    def pytest_sessionfinish(self) -> None:
        self.cover.stop()
        data = self.cover.get_data()
        lines = {
            Path(file).resolve().relative_to(Path.cwd().resolve()).as_posix(): {
                line: self._tests(by) for line, by in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        self.written.write_text(json.dumps({"seconds": self.seconds, "lines": lines}))

    def _tests(self, contexts: list[str]) -> list[str]:
        made = {name.removeprefix("fixture ") for name in contexts if name.startswith("fixture ")}
        users = {test for test, names in self.uses.items() if made.intersection(names)}
        return sorted(users | {name for name in contexts if name in self.seconds})


def near(mutant: Mutant, reach: dict) -> list[list[str]]:
    """Tests that reach the line, the quickest first; then the rest of their files."""
    seconds, lines = reach["seconds"], reach["lines"].get(mutant.file, {})
    first, last = _statement(mutant)
    reached = {test for line in range(first, last + 1) for test in lines.get(str(line), ())}
    if not reached:  # run by import, or where no tracer looks: a library's thread, a process
        reached = {test for tests in lines.values() for test in tests}
    files = {test.split("::")[0] for test in reached}
    rest = [test for test in seconds if test.split("::")[0] in files and test not in reached]
    quick_first = sorted(reached, key=lambda test: seconds[test])
    return [quick_first[:400], quick_first[400:], rest]


def _statement(mutant: Mutant) -> tuple[int, int]:
    """First and last line of the innermost statement, of a compound one its head alone."""
    best = (mutant.line, mutant.line)
    for node in ast.walk(ast.parse((ROOT / mutant.file).read_bytes())):
        if isinstance(node, ast.stmt) and node.lineno <= mutant.line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            end = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
            if mutant.line <= end:
                best = (node.lineno, end)
    return best


def passes(
    copy: Path, tests: list[str], limit: float, watched: Callable[[], Reach] | None = None
) -> bool:
    """Whether all tests pass within the limit; in a process of its own."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # not a session: its niceness would count for nothing beside others
        os.chdir(copy)
        with (copy.parent / "printed").open("w") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        sys.path[:0] = [str(copy), str(copy / "taxonomy")]
        plugins = [watched()] if watched else []
        if not watched:  # compiled files are of the code without a mutant
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True
        quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        os._exit(int(pytest.main(["-x", *quiet, *tests], plugins=plugins)))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, default=100, help="mutants, evenly over the rooms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rooms, comma-separated, e.g. store,derive")
    parser.add_argument("--files", default="", help="of these modules alone, e.g. check,tail")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    rooms = [r for r in NEAREST if not only or Path(r).stem.removeprefix("wapo_") in only]
    files = [name for name in options.files.split(",") if name]
    chosen = _chosen(rooms, options.sample, random.Random(options.seed), files)
    known = tomllib.loads((ROOT / "tests/mutants_explained.toml").read_text())["mutant"]
    os.environ["OMP_NUM_THREADS"] = "1"
    for heavy in ("pandas", "pyarrow.parquet", "scipy.stats", "torch", "transformers"):
        importlib.import_module(heavy)  # once, not in every child

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        os.environ["PYTHONPATH"] = f"{copy}:{copy}/taxonomy"
        survivors = []
        for room in rooms:
            some, written = [m for r, m in chosen if r == room], Path(folder) / "reach"
            tests = list(dict.fromkeys(NEAREST[room]))
            if not passes(copy, tests, 3600, partial(Reach, room, written)):
                print((copy.parent / "printed").read_text()[-2000:])
                print(f"{room}: its tests fail without a mutant", flush=True)
                return 2
            reach, left = json.loads(written.read_text()), []
            for mutant in some:
                if not _killed_in(copy, mutant, reach):
                    left.append(mutant)
                    print(f"survived {mutant}", flush=True)
            print(f"{room}: {_score(len(some) - len(left), len(some))}", flush=True)
            survivors += left
    for mutant in survivors:
        print(f"survived {mutant}\n    {_why(mutant, known)}")
    killed_all = len(chosen) - len(survivors)
    print(f"score: {_score(killed_all, len(chosen))}")
    return 0 if killed_all >= 0.92 * len(chosen) else 1


def _why(mutant: Mutant, known: list[dict[str, str]]) -> str:
    line = (ROOT / mutant.file).read_text().splitlines()[mutant.line - 1]
    entry = {"file": mutant.file, "old": mutant.old, "new": mutant.new}
    for one in known:
        if entry.items() <= one.items() and one.get("at", "") in line:
            return one["why"]
    return "NOT EXPLAINED"


def _score(dead: int, number: int) -> str:
    """Share of mutants killed, with Wilson's 95% interval for what all of them would give."""
    z, share = 1.96, dead / number
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = (
        z
        / (1 + z * z / number)
        * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    )
    return f"{share:.1%} ({centre - half:.0%} to {centre + half:.0%}), {dead} of {number} killed"


def _chosen(
    rooms: list[str], number: int, draw: random.Random, only: Sequence[str] = ()
) -> list[tuple[str, Mutant]]:
    """Mutants drawn alike from every room, and within a room alike from every file."""
    chosen = []
    for index, room in enumerate(rooms):
        place = ROOT / room
        files = [place] if place.suffix else sorted(place.rglob("*.py"))
        files = [file for file in files if not only or file.stem in only]
        most = max(12, number // max(1, len(only))) if only else 12
        drawn = [m for f in files for m in _shuffled(mutants(str(f.relative_to(ROOT))), draw, most)]
        share = number * (index + 1) // len(rooms) - number * index // len(rooms)
        draw.shuffle(drawn)
        chosen += [(room, mutant) for mutant in drawn[:share]]
    return chosen


def _shuffled(found: list[Mutant], draw: random.Random, most: int) -> list[Mutant]:
    draw.shuffle(found)
    return found[:most]  # of a file, so that long ones do not fill the sample


def _killed_in(copy: Path, mutant: Mutant, reach: dict) -> bool:
    file = copy / mutant.file
    source = file.read_bytes()
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()
    file.write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])
    try:
        for tests in near(mutant, reach):
            limit = 60 + 5 * sum(reach["seconds"][test] for test in tests)
            if tests and not passes(copy, tests, limit):
                return True
        return False
    finally:
        file.write_bytes(source)


if __name__ == "__main__":
    sys.exit(main())
