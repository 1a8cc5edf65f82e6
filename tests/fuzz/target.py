"""One damaged input, given to a reader or a command in this process: what came of it.

Allowed: success, or one line and exit code 2 (1 for a finding). Not allowed: a traceback, more than
ten seconds, or other numbers than the undamaged file gives without a word about it.
"""

import contextlib
import functools
import io
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pandas as pd
import typer.main

from tests.fuzz.damage import damaged
from tests.fuzz.draws import Draws
from tests.fuzz.sources import OTHERS, SOURCES, make_all
from wapo_analysis.cli import COMMANDS, run
from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run
from wapo_analysis.train.tasks import formats

LIMIT, WAITING = 10, 30
"""Seconds of computing, or of waiting for something, after which an input counts as a hang."""
TABLES = ("tokens", "classes", "rollouts", "probes")
_BYTES = ("flipped_bits", "zeroed", "piece_twice", "bytes_put_in", "piece_lost", "cut_short")


class Hang(BaseException):
    """An input took too long; no ``except Exception`` stops it."""


class SilentDifference(Exception):
    """Other numbers than the undamaged files give, and not a word about it."""


@dataclass
class Outcome:
    """What an input led to; ``fault`` is "" where it was handled."""

    input: str
    call: str
    fault: str = ""
    trace: str = ""


@dataclass
class Fuzz:
    """Undamaged inputs below a folder, and the place where a copy of one is damaged."""

    folder: Path
    places: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = make_all(self.folder / "whole")
        self.truth = {kind: _tables(self.places[kind] / "r") for kind in ("run", "merged run")}

    def play(self, data: bytes) -> Outcome:
        """Make the input that some bytes stand for and hand it over; what hangs, once more.

        On a machine with other work to do an input may wait for its turn as for a pipe.
        """
        outcome = self._played(data)
        return self._played(data) if outcome.fault == "hang" else outcome

    def _played(self, data: bytes) -> Outcome:
        draws = Draws(data)
        kind = draws.pick(_KINDS)
        place = self.folder / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.places[kind], place)
        damage = damaged(place, draws)
        call = draws.pick(CALLS[kind] if kind in CALLS else IMPORTS)
        if call is _read:
            work: Callable[[], None] = lambda: self._compare(kind, damage, place)  # noqa: E731
        else:
            work = lambda: call(place, self)  # noqa: E731
        return _judged(Outcome(f"{kind}: {damage}", call.__name__.strip("_")), work)

    def _compare(self, kind: str, damage: str, place: Path) -> None:
        """Read everything; damage to the bytes of a part may cost rows, never change a number."""
        found = _tables(place / "r")
        of_bytes = all(word.split()[0] in _BYTES and word.endswith(".parquet")
                       for word in damage.split(", "))  # fmt: skip
        if not of_bytes:
            return
        for name, rows in found.items():
            if rows.equals(self.truth[kind][name]):
                continue
            rows, truth = _texts(rows), _texts(self.truth[kind][name])
            same = rows.merge(truth, how="inner")
            if len(same) != len(rows) or len(rows) != len(truth):
                raise SilentDifference(
                    f"{name}: {len(rows)} rows instead of {len(truth)}, {len(same)} as they were"
                )


def _tables(path: Path) -> dict[str, pd.DataFrame]:
    """Tables of a run."""
    opened = open_run(path)
    return {name: opened.table(name) for name in TABLES}


def _texts(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows as text, each once, so that they can be compared."""
    return rows.astype(str).drop_duplicates()


def _judged(outcome: Outcome, work: Callable[[], None]) -> Outcome:
    started = time.process_time()
    with _quiet() as ignored:
        try:
            with _limited():
                work()
        except UserError:
            pass
        except Hang:
            outcome.fault, outcome.trace = "hang", traceback.format_exc()
        except SilentDifference as error:
            outcome.fault, outcome.trace = "silent difference", str(error)
        except BaseException as error:
            outcome.fault, outcome.trace = type(error).__name__, traceback.format_exc()
    if ignored and not outcome.fault:
        outcome.fault, outcome.trace = "ignored exception", "\n".join(ignored)
    if not outcome.fault and time.process_time() - started > LIMIT:
        outcome.fault = "hang"
    return outcome


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Nothing on the terminal; exceptions that Python only prints are collected."""
    ignored: list[str] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda told: ignored.append(f"{told.object!r}: {told.exc_value!r}")
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield ignored
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, LIMIT),
        signal.SIGALRM: (signal.ITIMER_REAL, WAITING),
    }
    held = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, held[number])


# The commands are the same for every input: building them takes a fifth of a call.
typer.main.get_command = functools.cache(typer.main.get_command)
# So is the process that grades answers; starting it takes longer than ten calls.
formats.MathJudge = functools.cache(formats.MathJudge)


# ---- calls ---------------------------------------------------------------------------------------


def _wapo(*arguments: str | Path) -> None:
    code = run([str(argument) for argument in arguments])
    if code not in (0, 1, 2):
        raise AssertionError(f"exit code {code}")


def import_(place: Path, fuzz: Fuzz) -> None:
    out = fuzz.folder / "imported"
    shutil.rmtree(out, ignore_errors=True)
    _wapo("import", place, "--out", out)


def import_and_diagnose(place: Path, fuzz: Fuzz) -> None:
    import_(place, fuzz)
    if (fuzz.folder / "imported" / "manifest.json").exists():
        _wapo("diagnose", fuzz.folder / "imported")


def import_and_read(place: Path, fuzz: Fuzz) -> None:
    import_(place, fuzz)
    if (fuzz.folder / "imported" / "manifest.json").exists():
        for rows in _tables(fuzz.folder / "imported").values():
            _texts(rows)


def import_as_table(place: Path, fuzz: Fuzz) -> None:
    out = fuzz.folder / "imported"
    shutil.rmtree(out, ignore_errors=True)
    for file in sorted(place.iterdir())[:1]:
        _wapo("import", file, "--format", "table", "--out", out)


def diagnose_source(place: Path, fuzz: Fuzz) -> None:
    _wapo("diagnose", place)


def _read(place: Path, fuzz: Fuzz) -> None:
    raise NotImplementedError("see Fuzz.play")


def read_more(place: Path, fuzz: Fuzz) -> None:
    opened = open_run(place / "r")
    for look in (lambda: opened.steps, lambda: opened.vocab, opened.token_steps, opened.summary,
                 lambda: opened.tokens([2])):  # fmt: skip
        with contextlib.suppress(UserError):
            look()


def watch(place: Path, fuzz: Fuzz) -> None:
    _wapo("watch", place / "r", "--once")


def diagnose(place: Path, fuzz: Fuzz) -> None:
    _wapo("diagnose", place / "r")


def diagnose_step(place: Path, fuzz: Fuzz) -> None:
    _wapo("diagnose", place / "r", "--step", "3", "-f", "json")


def whatif(place: Path, fuzz: Fuzz) -> None:
    _wapo("whatif", place / "r", "--exclude-bins", "neg_peak")


def compact(place: Path, fuzz: Fuzz) -> None:
    _wapo("compact", place / "r", "--take-over")


def check(place: Path, fuzz: Fuzz) -> None:
    _wapo(*(("check", place / "r") if "check" in COMMANDS else ("compact", place / "r")))


def compare(place: Path, fuzz: Fuzz) -> None:
    _wapo("compare", place / "r", fuzz.places["run"] / "r")


def figure(place: Path, fuzz: Fuzz) -> None:
    _wapo("figures", place / "r", "--only", "entropy", "-f", "svg", "--out", fuzz.folder / "drawn")


def report(place: Path, fuzz: Fuzz) -> None:
    _wapo("report", place / "r", "--out", fuzz.folder / "page.html")


def eval_(place: Path, fuzz: Fuzz) -> None:
    _wapo("eval", place / "r", "--samples", "1")


def settings(place: Path, fuzz: Fuzz) -> None:
    from wapo_analysis.train.config import TrainConfig

    TrainConfig.from_toml(place / "train.toml")


def tasks(place: Path, fuzz: Fuzz) -> None:
    for task, name in (
        ("gsm8k", "gsm8k.jsonl"),
        ("math", "math.jsonl"),
        ("hotpotqa", "hotpotqa.json"),
    ):
        _wapo("tasks", task, "--data", place / name, "--show", "1")


Call = Callable[[Path, Fuzz], None]
IMPORTS: tuple[Call, ...] = (
    import_, import_, import_, import_and_read, import_and_diagnose, import_as_table,
    diagnose_source,
)  # fmt: skip
_RUN: tuple[Call, ...] = (
    *(_read,) * 12, *(read_more,) * 10, watch, watch, diagnose, diagnose, diagnose_step, whatif,
    compact, compact, check, check, compare, figure, report, eval_,
)  # fmt: skip
CALLS: dict[str, tuple[Call, ...]] = {
    "run": _RUN, "merged run": _RUN, "settings": (settings,), "tasks": (tasks,),
}  # fmt: skip
_KINDS = (*SOURCES, "run", "run", "merged run", "merged run", *OTHERS)
