"""One writer per run: a file in the run folder that says who writes it, and that it still lives.

``writer.json`` is created exclusively, names host, process and a token, and is rewritten every few
seconds through the handle it was created with. A process that takes a run over puts a new file in
its place: the old one's heartbeat then lands in a file without a name, and the next look at the
name shows the loser that the run is no longer its own. No advisory locks are used, so this works on
network file systems.
"""

import json
import logging
import os
import socket
import threading
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from time import sleep, time
from typing import Literal
from uuid import uuid4

from wapo_analysis.errors import UserError
from wapo_analysis.store.files import MANIFEST, STEP_LOG, open_regular, parse_json, read_json

log = logging.getLogger(__name__)

LOCK = "writer.json"
#: What a run is whose process ended without ending it.
DEAD = "probably dead"
#: Seconds between two heartbeats.
BEAT_SECONDS = 10.0
#: Seconds without a heartbeat after which the writer of another machine counts as gone.
SILENT_SECONDS = 120.0
#: Size of the file; it is rewritten in place, so it never changes.
_BYTES = 512
_TAIL_BYTES = 1 << 16

State = Literal["alive", "gone", "silent"]


class RunLost(UserError):
    """Another process has taken the run over."""


@dataclass(frozen=True)
class Owner:
    """Who writes a run."""

    #: Name of the machine.
    host: str
    #: Where process numbers mean the same: machine, boot, process namespace.
    place: str
    #: Process; 0 once it has dropped the run without ending it, -1 if it cannot be read.
    pid: int
    #: Start of the process in clock ticks since boot, which tells a reused number; 0 unknown.
    born: int
    #: Random name of this ownership.
    token: str

    @classmethod
    def me(cls) -> "Owner":
        """Return this process, with a new token."""
        pid = os.getpid()
        return cls(socket.gethostname(), _place(), pid, _born(pid), uuid4().hex)

    @classmethod
    def of(cls, path: Path) -> "Owner | None":
        """Return whom the file of a run names; None without a file."""
        try:
            entries = read_json(path / LOCK, 8 * _BYTES)
            kinds = {"host": str, "place": str, "pid": int, "born": int, "token": str}
            return cls(**{name: kind(entries[name]) for name, kind in kinds.items()})
        except FileNotFoundError:
            return None
        except (UserError, KeyError, TypeError, ValueError):
            return cls("an unknown host", "", -1, 0, "")  # just being created, or damaged

    def state(self, silence: float) -> State:
        """Whether it still writes; ``silence`` are the seconds since its last heartbeat."""
        if self.pid == 0:
            return "gone"
        if self.place == _place():
            return "alive" if _runs(self.pid, self.born) else "gone"
        return "silent" if silence > SILENT_SECONDS else "alive"

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}" if self.pid > 0 else f"a process on {self.host}"


def probably_dead(path: Path) -> bool:
    """Whether the process that wrote a run has ended without ending the run."""
    owner = Owner.of(path)
    try:
        silence = time() - (path / LOCK).stat().st_mtime
    except OSError:
        return False
    return owner is not None and owner.state(silence) != "alive"


def written_by_another(path: Path) -> bool:
    """Whether a run has a writer, and it is not this process."""
    owner = Owner.of(path)
    return owner is not None and (owner.place, owner.pid) != (_place(), os.getpid())


def check_free(path: Path) -> None:
    """Refuse a run that another process is writing.

    Raises UserError if one is, naming process, host and the last step.
    """
    owner = Owner.of(path)
    if owner is not None and owner.state(_silence(path)) == "alive":
        raise UserError(
            f"{path} is being written by {owner}{_last_step(path)}; --take-over (take_over=True) "
            "if that process is gone"
        )


class RunLock:
    """Ownership of a run folder, from its making to `release`.

    Raises UserError if another process writes the run; OSError if the folder cannot be written.
    ``path``: Run folder; must exist; ``take_over``: take it from whoever holds it.
    """

    def __init__(self, path: Path, take_over: bool = False) -> None:
        self._path, self._owner, self._name = path, Owner.me(), os.fspath(path / LOCK)
        self._file = _File(self._create(take_over), self._owner)
        _HEARTS.keep(self._file)
        # A writer that is dropped without being closed lets go of the run. One that dies with its
        # process leaves its file, which shows that the process is gone.
        self._dropped = weakref.finalize(self, self._file.drop)
        self._dropped.atexit = False

    def _create(self, take_over: bool) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        while True:
            with suppress(FileExistsError):
                return os.open(self._path / LOCK, flags, 0o644)
            before = Owner.of(self._path)
            if before is None:
                continue
            if not take_over:
                check_free(self._path)
            why = "as asked" if take_over else "that process is gone"
            log.warning("%s: taken over from %s (%s)", self._path, before, why)
            # Renamed, not deleted: of two processes that do this at once, one finds nothing.
            aside = self._path / f".{LOCK}.{self._owner.token[:8]}"
            with suppress(FileNotFoundError):
                os.rename(self._path / LOCK, aside)
                aside.unlink()

    def check(self) -> None:
        """Raise `RunLost` if another process has taken the run over."""
        try:
            there = os.stat(self._name)
            if (there.st_ino, there.st_dev) == self._file.identity:
                return
        except OSError:
            pass
        owner = Owner.of(self._path)
        if owner is None:
            if self._ended():
                raise RunLost(f"another process has taken over {self._path} and has ended")
            gone = f"{LOCK} of {self._path}" if self._path.exists() else self._path
            raise RunLost(f"{gone} was moved or deleted while the run was being written")
        if owner.token != self._owner.token:
            by = f"; it is written by {owner}" if owner.pid >= 0 else f", or changed its {LOCK}"
            raise RunLost(f"another process has taken over {self._path}{by}")

    def _ended(self) -> bool:
        """Whether the manifest says that the run has ended, which another process then wrote."""
        try:
            entries = read_json(self._path / MANIFEST)
        except (OSError, UserError):
            return False
        return isinstance(entries, dict) and entries.get("status") != "running"

    def release(self, ended: bool = True) -> None:
        """Give the run back; may be called twice.

        ``ended``: false leaves the file, to show that nobody writes a run that has not ended.
        """
        if self._dropped.detach() is None:
            return
        if ended and self._owner.pid == os.getpid():
            with suppress(RunLost):
                self.check()
                (self._path / LOCK).unlink(missing_ok=True)
        self._file.drop()


class _File:
    """The open file of a lock."""

    def __init__(self, handle: int, owner: Owner) -> None:
        self._handle, self._owner, self._mutex = handle, owner, threading.Lock()
        status = os.fstat(handle)
        self.identity: tuple[int, int] | None = (status.st_ino, status.st_dev)
        self._write(owner)

    def _write(self, owner: Owner) -> None:
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, json.dumps(asdict(owner)).ljust(_BYTES - 1).encode() + b"\n")
        os.fsync(self._handle)

    def beat(self) -> None:
        """Show that the process lives."""
        self._if_mine(self._owner)

    def drop(self) -> None:
        """Show that nobody writes the run any more, and close the file."""
        self._if_mine(replace(self._owner, pid=0))
        with self._mutex:
            if self._handle >= 0:
                os.close(self._handle)
            self._handle, self.identity = -1, None

    def _if_mine(self, owner: Owner) -> None:
        # A forked child shares the file, yet the run is its parent's.
        with self._mutex, suppress(OSError):
            if self._handle >= 0 and self._owner.pid == os.getpid():
                self._write(owner)


class _Hearts:
    """One thread that beats for every lock of this process, for as long as there is one."""

    def __init__(self) -> None:
        self._files: weakref.WeakSet[_File] = weakref.WeakSet()
        self._mutex = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, file: _File) -> None:
        with self._mutex:
            self._files.add(file)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="wapo-beat", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            sleep(BEAT_SECONDS)
            for file in list(self._files):
                file.beat()
            with self._mutex:
                if not self._files:
                    self._thread = None
                    return


_HEARTS = _Hearts()


@cache
def _place() -> str:
    """Machine, boot and process namespace; where there is no /proc the machine alone."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _stat(pid: int) -> list[str]:
    """State, parent, ... start of a process; empty where that cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _born(pid: int) -> int:
    found = _stat(pid)
    return int(found[19]) if found else 0


def _runs(pid: int, born: int) -> bool:
    found = _stat(pid)
    if found:
        return found[0] not in ("Z", "X") and (not born or int(found[19]) == born)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except OSError:
        return True  # it is another user's
    return True


def _silence(path: Path) -> float:
    """Seconds since the last heartbeat by the clock of the file system, if it can be asked."""
    beside = path / f".{LOCK}.{uuid4().hex[:8]}"
    now = time()
    with suppress(OSError):
        beside.touch(exist_ok=False)
        now = beside.stat().st_mtime
        beside.unlink()
    try:
        return now - (path / LOCK).stat().st_mtime
    except OSError:
        return 0.0


def _last_step(path: Path) -> str:
    """``, last step 12 4 s ago``, or nothing before the first step."""
    with suppress(OSError, ValueError, TypeError, LookupError):
        with open_regular(path / STEP_LOG, 1 << 40) as stream:
            status = os.fstat(stream.fileno())
            stream.seek(max(status.st_size - _TAIL_BYTES, 0))
            lines = stream.read().split(b"\n")
        step = int(parse_json(lines[-2].decode())["step"])
        return f", last step {step} {ago(time() - status.st_mtime)} ago"
    return ""


def ago(seconds: float) -> str:
    """Time span in the unit that fits, e.g. ``4 s`` or ``1.5 h``."""
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
