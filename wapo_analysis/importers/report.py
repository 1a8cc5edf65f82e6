"""What an import found, kept, left out, and why: for the terminal and for the manifest."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wapo_analysis.errors import UserError, counted, few, first_line, printable
from wapo_analysis.importers.jsonl import MAX_NAMED, JsonLines
from wapo_analysis.results import Items, Result, Section

_SHOWN_KEYS = 12
#: Share of the lines that, when it is lost, makes an import an alarm.
MOST = 0.5


def shown(path: Path | str) -> str:
    """A path as text that any encoding can hold."""
    return os.fsencode(path).decode("utf-8", "replace")


@dataclass
class ImportReport(Result):
    """Account of one import.

    Attributes
    ----------
    format : str
        Format that was read.
    source : str
        Where it was read from.
    out : str
        Run folder that was written.
    trainer : str, optional
        Trainer whose names it uses.
    steps, token_rows, rollouts : int
        Rows written.
    files : int
        Files read.
    lines : int
        Lines and records seen, where a line is a record.
    mapped : dict of str to str
        Column of ours to the name it had in the source.
    kept_keys : dict of str to int
        Numbers without a column of ours, kept in the step log under their own name; how often.
    unknown_keys : dict of str to int
        Keys that are not in the run; how often.
    broken_lines : int
        Lines that could not be read; the first of them are in ``broken``.
    half_lines : list of str
        Files whose last line was unfinished.
    repeated_steps : set of int
        Steps the source holds more than once with different numbers.
    counts : Counter of str
        Other things left out or changed, by what they are.
    places : dict of str to list of str
        Where the first of them are, as ``file:line``.
    alarms : list of str
        Said first: the run is not what one would take it for.
    events : list of str
        What was done with repeated, counted or combined records.
    notes : list of str
        What a reader of the numbers has to know.
    cannot_feed : dict of str to str
        Figure to the reason why this source cannot feed it.
    """

    format: str
    source: str
    out: str = ""
    trainer: str | None = None
    steps: int = 0
    token_rows: int = 0
    rollouts: int = 0
    files: int = 0
    lines: int = 0
    mapped: dict[str, str] = field(default_factory=dict)
    kept_keys: Counter[str] = field(default_factory=Counter)
    unknown_keys: Counter[str] = field(default_factory=Counter)
    broken_lines: int = 0
    broken: list[str] = field(default_factory=list)
    half_lines: list[str] = field(default_factory=list)
    repeated_steps: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cannot_feed: dict[str, str] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def told(self, text: str) -> None:
        """Add what was done with some records, once."""
        if text not in self.events:
            self.events.append(text)

    def bad_line(self, file: Path, number: int, reason: str) -> None:
        """Count a line that cannot be used, and name the first few."""
        self.broken_lines += 1
        if len(self.broken) < MAX_NAMED:
            self.broken.append(f"{shown(file.name)}:{number}: {reason}")

    def count(self, what: str, file: Path, number: int, times: int = 1) -> None:
        """Count values that were left out or changed, and name the place of the first few."""
        self.counts[what] += times
        named = self.places.setdefault(what, [])
        if len(named) < 3:
            named.append(f"{shown(file.name)}:{number}")

    @contextmanager
    def record(self, file: Path, number: int) -> Iterator[None]:
        """Whatever a record of a strange shape raises costs this record alone, and is named."""
        try:
            yield
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            known = type(error) is ValueError
            said = printable(first_line(error)) if known else "its entries have another shape"
            self.bad_line(file, number, said)

    def close_lines(self, log: JsonLines, half: bool) -> None:
        """Take over what a reader of JSON lines counted."""
        self.files += 1
        self.lines += log.line
        self.broken_lines += log.broken
        self.broken += log.named[: MAX_NAMED - len(self.broken)]
        for number, what in log.changed:
            self.count(what, log.path, number)
        if half:
            self.half_lines.append(shown(log.path.name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "format": self.format,
            "trainer": self.trainer,
            "source": self.source,
            "files": self.files,
            "steps": self.steps,
            "token_rows": self.token_rows,
            "rollouts": self.rollouts,
            "mapped": dict(sorted(self.mapped.items())),
            "kept_keys": sorted(self.kept_keys),
            "unknown_keys": sorted(self.unknown_keys),
            "broken_lines": self.broken_lines,
            "broken": self.broken,
            "half_lines": self.half_lines,
            "repeated_steps": sorted(self.repeated_steps),
            "counts": dict(sorted(self.counts.items())),
            "places": self.places,
            "alarms": self.alarms,
            "events": self.events,
            "notes": self.notes,
            "said": [self.headline(), *self.warnings()],
            "cannot_feed": self.cannot_feed,
        }

    def warnings(self) -> list[str]:
        """What must be said wherever the run is used, one sentence each."""
        lines = [f"! {text}" for text in self.alarms]
        lines += self.events
        lines += [f"unfinished last line left out: {name}" for name in self.half_lines]
        if self.broken_lines:
            lines.append(f"broken lines left out: {self.broken_lines} ({'; '.join(self.broken)})")
        for what, count in sorted(self.counts.items()):
            where = f" ({', '.join(self.places[what])})" if what in self.places else ""
            lines.append(f"{what}: {count}{where}")
        return [printable(line) for line in lines]

    def headline(self) -> str:
        """What was read, in one line."""
        counts = {"step": self.steps, "token row": self.token_rows, "rollout": self.rollouts}
        many = ", ".join(counted(count, what) for what, count in counts.items() if count)
        whose = f" ({self.trainer}'s names)" if self.trainer else ""
        text = f"{self.format}: {many} from {counted(self.files, 'file')} of {self.source}{whose}"
        return printable(text)

    def page(self) -> Section:
        """What was read, then one fact a line."""
        lines = self.warnings()
        if self.kept_keys:
            lines.append(f"no column of ours, kept in steps.jsonl: {_names(self.kept_keys)}")
        if self.unknown_keys:
            lines.append(f"not in the run: {_names(self.unknown_keys)}")
        lines += [f"note: {text}" for text in self.notes]
        if self.cannot_feed:
            lines.append(f"figures that need what is not here: {_names(self.cannot_feed)}")
        return Section(self.headline(), [Items(lines)] if lines else [])


def _names(keys: Iterable[str]) -> str:
    names = sorted(keys)
    text = few(names, _SHOWN_KEYS)
    return f"{text} (all in manifest.json)" if len(names) > _SHOWN_KEYS else text


def say_penalty(rows: Mapping[int, Mapping[str, Any]], report: ImportReport) -> None:
    """Say that the logged reward holds a KL penalty, where a plain score stands beside it."""
    pairs = [(r["reward"], r["reward_penalised"]) for r in rows.values()
             if "reward" in r and "reward_penalised" in r]  # fmt: skip
    if not pairs:
        return
    score, penalised = np.array(pairs, np.float64).T
    gap = np.abs(score - penalised)
    scale = max(float(np.nanmax(np.abs(score), initial=0.0)), 1e-9)
    if np.nanmax(gap, initial=0.0) > 0.02 * scale:
        worst = int(np.nanargmax(gap))
        report.told(
            f"reward is {report.mapped['reward']}; {report.mapped['reward_penalised']}, which "
            f"holds the KL penalty, differs from it by up to {gap[worst]:.3g} and is "
            "reward_penalised"
        )
