"""What an import found, kept, left out, and why: for the terminal and for the manifest."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wapo_analysis.importers.jsonl import MAX_NAMED, JsonLines

_SHOWN_KEYS = 12


@dataclass
class ImportReport:
    """Account of one import.

    Attributes
    ----------
    format : str
        Format that was read.
    source : str
        Where it was read from.
    out : str
        Run folder that was written.
    steps, token_rows, rollouts : int
        Rows written.
    files : int
        Files read.
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
        Steps the source holds more than once; the last record wins.
    counts : Counter of str
        Other things left out or changed, by what they are.
    notes : list of str
        What a reader of the numbers has to know.
    cannot_feed : dict of str to str
        Figure to the reason why this source cannot feed it.
    """

    format: str
    source: str
    out: str = ""
    steps: int = 0
    token_rows: int = 0
    rollouts: int = 0
    files: int = 0
    mapped: dict[str, str] = field(default_factory=dict)
    kept_keys: Counter[str] = field(default_factory=Counter)
    unknown_keys: Counter[str] = field(default_factory=Counter)
    broken_lines: int = 0
    broken: list[str] = field(default_factory=list)
    half_lines: list[str] = field(default_factory=list)
    repeated_steps: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    cannot_feed: dict[str, str] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def bad_line(self, file: Path, number: int, reason: str) -> None:
        """Count a line that cannot be used, and name the first few."""
        self.broken_lines += 1
        if len(self.broken) < MAX_NAMED:
            self.broken.append(f"{file.name}:{number}: {reason}")

    def close_lines(self, log: JsonLines, half: bool) -> None:
        """Take over what a reader of JSON lines counted."""
        self.files += 1
        self.broken_lines += log.broken
        self.broken += log.named[: MAX_NAMED - len(self.broken)]
        if half:
            self.half_lines.append(log.path.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "format": self.format,
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
            "notes": self.notes,
            "cannot_feed": self.cannot_feed,
        }

    def to_text(self) -> str:
        """Plain text for a terminal, one fact a line."""
        many = f"{self.steps} steps, {self.token_rows} token rows, {self.rollouts} rollouts"
        lines = [f"{self.format}: {many} from {_files(self.files)} of {self.source}"]
        if self.repeated_steps:
            lines.append(
                f"repeated steps (resume): {_steps(sorted(self.repeated_steps))}; the last wins"
            )
        lines += [f"unfinished last line left out: {name}" for name in self.half_lines]
        if self.broken_lines:
            lines.append(f"broken lines left out: {self.broken_lines} ({'; '.join(self.broken)})")
        lines += [f"{what}: {count}" for what, count in sorted(self.counts.items())]
        if self.kept_keys:
            lines.append(f"no column of ours, kept in steps.jsonl: {_names(self.kept_keys)}")
        if self.unknown_keys:
            lines.append(f"not in the run: {_names(self.unknown_keys)}")
        lines += [f"note: {text}" for text in self.notes]
        for name, reason in self.cannot_feed.items():
            lines.append(f"cannot draw {name}: {reason}")
        return "\n".join(lines)


def _files(count: int) -> str:
    return f"{count} {'file' if count == 1 else 'files'}"


def _names(keys: Counter[str]) -> str:
    """Names in the order of the alphabet; a long list ends with how many more there are."""
    names = sorted(keys)
    more = len(names) - _SHOWN_KEYS
    shown = ", ".join(names[:_SHOWN_KEYS])
    return f"{shown} and {more} more (all in manifest.json)" if more > 0 else shown


def _steps(steps: list[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:_SHOWN_KEYS])
    return f"{shown}, ... ({len(steps)} in all)" if len(steps) > _SHOWN_KEYS else shown
