"""Reading what other tools wrote: logs of every trainer in use, completions, tokens, tables.

Every source becomes a normal run folder that all commands read. Sources are only read; the run
appears under its name once it is whole.

`open_source` reads somebody's log as a run without a word of import: kept in a cache that follows
its growth. A source is imported again when the path, size or time of one of its files has changed.
The cache is ``$WAPO_CACHE``, else in the user's cache folder; entries that were not used for a
month go.
"""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from time import monotonic, time

from wapo_analysis import __version__
from wapo_analysis.errors import UserError, printable
from wapo_analysis.importers.detect import FORMATS, MAX_FILES, Found, detect
from wapo_analysis.importers.jsonl import JsonLines, Line, Record
from wapo_analysis.importers.mapping import parse_mapping
from wapo_analysis.importers.report import ImportReport, shown
from wapo_analysis.importers.run import ImportSettings, import_run
from wapo_analysis.store import MANIFEST, Run, open_run
from wapo_analysis.store.manifest import OPENED_FROM, OPENED_WITH

__all__ = [
    "FORMATS",
    "Found",
    "ImportReport",
    "JsonLines",
    "Line",
    "Record",
    "SourceTail",
    "account",
    "detect",
    "import_run",
    "open_source",
    "parse_mapping",
]


KEPT_SECONDS = 30 * 86400.0
#: Names of our entries: ``$WAPO_CACHE`` may be a folder that holds other things too.
_ENTRY = re.compile("[0-9a-f]{16}")
#: A log that has not grown for so long when one begins to watch it has ended.
IDLE_SECONDS = 1800.0
#: A growing log is read again after this many times the seconds that reading it takes.
RATE = 5


def cache_folder() -> Path:
    """Folder of imported sources; a temporary one where the user's cannot be written."""
    given = os.environ.get("WAPO_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given) if given else Path(base) / "wapo-analysis" / "imports"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    own = (
        Path(tempfile.gettempdir()) / f"wapo-imports-{os.getuid() if hasattr(os, 'getuid') else 0}"
    )
    own.mkdir(mode=0o700, exist_ok=True)
    return own


def stamp(source: Path) -> tuple[str, float]:
    """What tells a grown source from the one that was read, and the time of its last change."""
    files = [source]
    if source.is_dir():
        files = [f for f in source.rglob("*") if not f.name.startswith(".")][:MAX_FILES]
    told, last = [__version__], 0.0
    for file in sorted(files):
        try:
            status = file.stat()
        except OSError:
            continue
        if not file.is_dir():
            told.append(f"{shown(file)} {status.st_size} {status.st_mtime_ns}")
            last = max(last, status.st_mtime)
    return sha256("\n".join(told).encode()).hexdigest()[:16], last


def open_source(source: str | Path, settings: ImportSettings | None = None) -> Run:
    """Open what another tool wrote as a run.

    Parameters
    ----------
    source : str or Path
        File or folder that :func:`import_run` reads; never changed.
    settings : ImportSettings, optional
        What the source does not say.

    Returns
    -------
    Run
        The import of the source as it is now; ``run.manifest["import"]`` is the account of it.

    Raises
    ------
    UserError
        As :func:`import_run`.

    Examples
    --------
    >>> open_source("no/such/file.log")
    Traceback (most recent call last):
    wapo_analysis.errors.UserError: nothing at ...
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"nothing at {printable(shown(path))}")
    chosen = settings or ImportSettings()
    if chosen.name is None:
        stem = path.resolve().name if path.is_dir() else path.resolve().stem
        name = stem if chosen.run is None else f"{stem} {chosen.run}"
        chosen = replace(chosen, name=printable(shown(name)) or "imported")
    where = sha256(f"{shown(path.resolve())} {chosen}".encode()).hexdigest()[:16]
    entry = cache_folder() / where
    target = entry / stamp(path)[0]
    if not (target / MANIFEST).exists():
        try:
            import_run(path, target, chosen)
        except UserError:
            if not (target / MANIFEST).exists():  # another process may have been faster
                raise
        _forget(entry, target)
    os.utime(entry)
    found = open_run(target)
    opened = {OPENED_FROM: shown(path), OPENED_WITH: list(chosen.options())}
    return Run(found.path, found.manifest.changed(opened))


def _forget(entry: Path, kept: Path) -> None:
    """Drop older states of a source, and sources that nobody looked at for long.

    A name that begins with a dot is what another process is writing, or died of writing long ago.
    """
    states = [state for state in entry.iterdir() if state != kept]
    old = [state for state in states if state.name[:1] != "." or _idle(state)]
    others = [other for other in entry.parent.iterdir() if _ENTRY.fullmatch(other.name)]
    old += [other for other in others if other != entry and _idle(other)]
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)


def _idle(folder: Path) -> bool:
    with suppress(OSError):  # another process may have dropped it
        return time() - folder.stat().st_mtime > KEPT_SECONDS
    return False


def account(run: Run) -> list[str]:
    """What must be said of an import wherever its run is used: what was read, and what was lost."""
    told = run.manifest.get("import", {})
    lines = [str(line) for line in told.get("said", ())]
    return lines[:_SAID] + (
        [f"{len(lines) - _SAID} more: wapo import"] if len(lines) > _SAID else []
    )


_SAID = 6


class SourceTail:
    """A source being followed as a run: each poll reads it again if it has grown.

    ``settings``: what the source does not say. ``notes``: what an import says of the source.
    """

    def __init__(self, path: Path, settings: ImportSettings | None = None) -> None:
        self.path, self._settings = path, settings
        self.notes: list[str] = []
        self._run: Run | None = None
        self._stamp, self._last = "", 0.0
        self._next = 0.0
        self._live = True

    def poll(self) -> bool:
        """Read the source again if it has changed; returns whether it was read.

        Raises UserError if it cannot be read at the first time; later the last state stays, and
        that is noted.
        """
        now, last = stamp(self.path)
        if now == self._stamp or monotonic() < self._next:
            return False
        begun = monotonic()
        try:
            run = open_source(self.path, self._settings)
        except UserError as error:
            if self._run is None:
                raise
            self.notes = [str(error)]
            return False
        finally:
            self._next = monotonic() + RATE * (monotonic() - begun)
        if self._run is None:
            self._live = time() - last < IDLE_SECONDS
        self._stamp, self._last, self._run = now, last, run
        self.notes = account(run)
        return True

    def run(self) -> Run:
        """Return the run as it was at the last poll; it goes on unless it was idle at the first."""
        assert self._run is not None
        if not self._live:
            return self._run
        run = Run(
            self._run.path, self._run.manifest.changed({"status": "running", "step_lines": None})
        )
        vars(run).update(steps=self._run.steps)
        return run

    def last_written(self) -> float | None:
        """Time of the last change of the source, seconds since 1970."""
        return self._last or None
