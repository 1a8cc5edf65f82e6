"""Is a run folder whole? Every checksum, every line, every row; and what is lost if it is not."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from wapo_analysis.errors import UserError
from wapo_analysis.results import Items, Result, Section, step_words
from wapo_analysis.store.files import MANIFEST, PART_TABLES, STEP_LOG, log_lines
from wapo_analysis.store.lock import probably_dead
from wapo_analysis.store.manifest import Manifest, read_manifest
from wapo_analysis.store.parquet import named, verify
from wapo_analysis.store.parts import Key, list_parts, read_steps, read_vocab, settled

#: Sources whose steps follow each other.
_COUNTS_ON = ("built-in", "trl", "verl")

Row = Mapping[str, Any]


@dataclass
class Check(Result):
    """What there is of a run, and what is damaged or missing."""

    #: Folder.
    run: str
    #: What is broken or lost, one sentence each; empty if the run is whole.
    damage: list[str] = field(default_factory=list)
    #: What is worth knowing and costs nothing.
    notes: list[str] = field(default_factory=list)
    #: Lines of the step log; files of tables; those of them without checksums.
    lines: int = 0
    files: int = 0
    unsealed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "whole": not self.damage}

    def page(self) -> Section:
        """Verdict, damage, notes."""
        verdict = f"{len(self.damage)} damaged or missing" if self.damage else "whole"
        read = f"{self.lines:,} step lines and {self.files:,} files of tables read"
        parts = [Items(self.damage)] if self.damage else []
        notes = [Section("notes", [Items(self.notes)])] if self.notes else []
        return Section(f"{self.run}: {verdict} ({read})", [*parts, *notes])


def check(path: Path) -> Check:
    """Read everything of a run folder, and compare what must agree.

    Raises UserError if it is no run folder at all. ``path``: Run folder; it is only read. One that
    is being written is checked up to its last step.
    """
    found = Check(str(path))
    manifest = _manifest(path, found)
    rows = _steps(path / STEP_LOG, manifest, found)
    held = {name: _table(path / name, found) for name in PART_TABLES}
    try:
        read_vocab(path)
    except UserError as error:
        found.damage.append(_brief(error, path))
    if manifest.source != "import":
        _compare(rows, held, manifest, found)
    if found.unsealed:
        found.notes.append(
            f"{found.unsealed:,} of {found.files:,} files of tables have no checksums: version "
            "0.1 or another tool wrote them"
        )
    return found


def _manifest(path: Path, found: Check) -> Manifest:
    try:
        manifest = read_manifest(path, tell=False)
    except UserError as error:
        if not (path / MANIFEST).exists():
            raise
        found.damage.append(_brief(error, path))
        return Manifest()
    found.damage += [f"{MANIFEST}: {told}" for told in manifest.problems]
    if manifest.status == "running":
        dead = ", its process is probably dead" if probably_dead(path) else ""
        found.notes.append(f"the run has not ended{dead}")
    return manifest


def _steps(log: Path, manifest: Manifest, found: Check) -> dict[int, Row]:
    """Rows of the step log by step."""
    rows, written = Counter[int](), manifest.step_lines
    kept: dict[int, Row] = {}
    try:
        with named(log):
            for number, line, row in log_lines(log):
                if isinstance(row, ValueError):
                    told = f"{log.name}: line {number} is lost ({row})"
                    unfinished = written is None and not line.endswith(b"\n")
                    (found.notes if unfinished else found.damage).append(told)
                else:
                    rows[row["step"]] += 1
                    kept[row["step"]] = row
    except FileNotFoundError:
        pass
    except UserError as error:
        found.damage.append(_brief(error, log.parent))
    found.lines += rows.total()
    if written is not None and found.lines != written:
        found.damage.append(f"{log.name}: {found.lines:,} of {written:,} lines can be read")
    twice = [step for step, count in rows.items() if count > 1]
    if twice:
        found.damage.append(f"{log.name}: two lines of {step_words(twice)}; the last counts")
    return kept


def _table(folder: Path, found: Check) -> set[Key]:
    """Step and rank of all rows of a table that can be read."""
    held, damage = Counter[Key](), []
    try:
        files = settled(partial(_read_files, folder))
    except UserError as error:
        files = {}
        damage.append(_brief(error, folder.parent))
    for read in files.values():
        if isinstance(read, str):
            damage.append(read)
        else:
            held.update(read[1])
            found.unsealed += not read[0]
    found.files += len(files)
    found.damage += damage
    strays = sorted(p.name for p in folder.glob("*.parquet") if p.name not in files)
    if strays and not damage:
        found.notes.append(f"{folder.name}: {', '.join(strays)} is not named as a part; left out")
    double = [step for (step, _), count in held.items() if count > 1]
    if double:
        found.notes.append(
            f"{folder.name}: {step_words(double)} in two files, as an interrupted merge leaves "
            "them; one is read"
        )
    return set(held)


def _read_files(folder: Path) -> dict[str, str | tuple[bool, list[Key]]]:
    """Files of a table: what is broken of one, or whether it has checksums and what it holds."""
    read: dict[str, str | tuple[bool, list[Key]]] = {}
    for part in list_parts(folder):
        try:
            sealed, steps = verify(part.path), read_steps(part, set(part.steps()))
            read[part.path.name] = sealed, [(step, part.rank) for step in steps]
        except UserError as error:
            span = f"steps {part.first} to {part.last}" if part.merged else f"step {part.first}"
            read[part.path.name] = f"{_brief(error, folder.parent)}; its rows of {span} are lost"
    return read


def _compare(
    rows: Mapping[int, Row], held: Mapping[str, set[Key]], manifest: Manifest, found: Check
) -> None:
    """Compare steps and parts of a run that we recorded."""
    steps = sorted(rows)
    if steps:
        gaps = sorted(set(range(steps[0], steps[-1])) - set(steps))
        if gaps:
            certain = manifest.source in _COUNTS_ON
            (found.damage if certain else found.notes).append(
                f"{STEP_LOG}: no line of {step_words(gaps)}"
            )
    # A step line comes after its parts, and its token_fraction says which there were.
    shares = {step: row.get("token_fraction") for step, row in rows.items()}
    expected = {
        "classes": [step for step, share in shares.items() if share is not None],
        "tokens": [step for step, share in shares.items() if share == 1],
    }
    for name, there in expected.items():
        missing = [step for step in there if (step, 0) not in held[name]]
        if missing:
            found.damage.append(f"{name}: no rows of {step_words(missing)}")
    for rank in sorted({rank for _, rank in held["classes"] if rank}):
        mine = {step for step, other in held["classes"] if other == rank}
        missing = [s for s in expected["classes"] if s in range(max(mine)) and s not in mine]
        if missing:
            found.damage.append(f"classes: no rows of process {rank} of {step_words(missing)}")
    later = {step for name in PART_TABLES for step, rank in held[name] if rank == 0} - set(rows)
    if later and steps:
        found.notes.append(f"rows of {step_words(later)} without a line in {STEP_LOG}")


def _brief(error: UserError, run: Path) -> str:
    """What an error says of a file of the run, without the folder and the advice."""
    return str(error).replace(f"{run}{os.sep}", "").partition("; move it away")[0]
