"""Following a run that is being written: each poll reads only what was added since the last one."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from wapo_analysis.errors import UserError
from wapo_analysis.schema import TABLES
from wapo_analysis.store.files import (
    LOG_BYTES,
    MANIFEST,
    STEP_LOG,
    LineReader,
    open_regular,
    steps_frame,
)
from wapo_analysis.store.manifest import Manifest, read_manifest
from wapo_analysis.store.parts import Key, joined, read_rows
from wapo_analysis.store.reader import Run, parts_frame, summed_classes

_FOLLOWED = ("classes", "probes")


@dataclass
class Tail:
    """A run folder being followed.

    ``notes``: lines and parts that could not be read and were left out, one sentence each;
    ``bytes_read``: bytes of the step log read so far; a log that only grows is read once.
    """

    path: Path
    notes: list[str] = field(default_factory=list)
    bytes_read: int = 0
    _inode: int | None = None
    _offset: int = field(init=False)
    _lines: int = field(init=False)
    _manifest: Manifest = field(default_factory=Manifest)
    _manifest_seen: tuple[int, int] | None = None
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _have: dict[str, set[Key]] = field(default_factory=dict)
    _broken: dict[str, dict[str, UserError]] = field(default_factory=dict)
    _frames: dict[str, pd.DataFrame] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._restart(None)

    def _restart(self, inode: int | None) -> None:
        """Forget the tables; a resumed run replaces its log, and drops steps and parts."""
        self._inode, self._offset, self._lines = inode, 0, 0
        self._reader = LineReader()
        self._rows.clear()
        self.notes.clear()
        self._have = {name: set() for name in _FOLLOWED}
        self._broken = {name: {} for name in _FOLLOWED}
        self._frames = {name: parts_frame([], TABLES[name]) for name in _FOLLOWED}

    def poll(self) -> bool:
        """Read what is new; returns whether anything was.

        Raises UserError if the folder is no run or its schema version is another one.
        """
        changed = self._read_manifest()
        if self._read_log():
            # The log line of a step is written last, so its parts are there.
            for name in _FOLLOWED:
                self._read_parts(name)
            changed = True
        return changed

    def run(self) -> Run:
        """Return the run as it was at the last poll; its step and class tables are in memory."""
        run = Run(self.path, self._manifest)
        # Cached properties of a run read what is already there.
        vars(run).update(
            steps=steps_frame(self._rows),
            classes=summed_classes(self._frames["classes"]),
            probes=self._frames["probes"],
        )
        return run

    def last_written(self) -> float | None:
        """Time of the last change of the step log, seconds since 1970; None without a log."""
        try:
            return (self.path / STEP_LOG).stat().st_mtime
        except OSError:
            return None

    def _read_manifest(self) -> bool:
        try:
            status = (self.path / MANIFEST).stat()
            seen = status.st_mtime_ns, status.st_ino
        except OSError:
            seen = None  # said by what reads it
        if seen is not None and seen == self._manifest_seen:
            return False
        self._manifest = read_manifest(self.path)
        self._manifest_seen = seen
        return True

    def _read_log(self) -> bool:
        """Take the whole lines that were appended; half a line waits for the next poll."""
        try:
            with open_regular(self.path / STEP_LOG, LOG_BYTES) as log:
                status = os.fstat(log.fileno())
                restarted = status.st_ino != self._inode or status.st_size < self._offset
                if restarted:
                    self._restart(status.st_ino)
                log.seek(self._offset)
                added = log.read()
        except FileNotFoundError:
            return False
        self.bytes_read += len(added)
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.split(b"\n")[:-1]:
            self._lines += 1
            self._take_line(line)
        return restarted or bool(whole)

    def _take_line(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            self._rows.append(self._reader.row(line))
        except ValueError as error:
            told = f"line {self._lines} of {STEP_LOG} is no step record ({error}); left out"
            self.notes.append(told)

    def _read_parts(self, name: str) -> None:
        """Add the rows of a table that have not been read, up to the last step of the log."""
        if not self._rows:
            return
        last = max(row["step"] for row in self._rows)
        broken = self._broken[name]
        before = set(broken)
        new = read_rows(
            self.path / name, lambda step: step <= last, have=self._have[name], broken=broken
        )
        self._have[name].update(new)
        self.notes += [f"{error}; left out" for file, error in broken.items() if file not in before]
        if new:
            added = parts_frame(joined(new.values()), TABLES[name])
            held = self._frames[name]
            whole = added if held.empty else pd.concat([held, added], ignore_index=True)
            self._frames[name] = whole
