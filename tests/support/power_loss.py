"""What a crash can leave of a folder: every state between two system calls of whoever writes it.

`Journal` wraps the calls that name, sync or remove files, and looks at the folder before and after
each; content that arrived in between (by whatever library) is seen at the next look. From every
look follow these states:

    killed        the process ended there: all that was done is there
    unsynced      the power went: what was not fsynced is not there, neither bytes nor names
    names only    names are there, bytes that were not fsynced are not
    zeros         as before, but what was appended without fsync reads as zeros
    reordered     of the names that were not fsynced only the latest change is there

A name lasts once its folder has been fsynced, bytes once their file has.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

_CALLS = ("open", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "truncate")
Folders = dict[int, dict[str, int]]
"""Folder -> the names in it and what they name; numbers are inodes."""


@dataclass(frozen=True)
class State:
    """What a folder may look like after a crash."""

    kind: str
    after: str
    files: tuple[tuple[str, bytes | None], ...]

    def write(self, folder: Path) -> Path:
        """Make the folder look so."""
        folder.mkdir(parents=True)
        for name, content in self.files:
            if content is None:
                (folder / name).mkdir(parents=True, exist_ok=True)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return folder


@dataclass
class Journal:
    """States of a folder, in order, each once."""

    folder: Path
    states: dict[tuple[tuple[str, bytes | None], ...], State] = field(
        default_factory=dict, repr=False
    )

    last: dict[str, State] = field(default_factory=dict, repr=False)
    """The state that each kind of crash leaves at the end."""

    def __post_init__(self) -> None:
        self._mutex = threading.RLock()
        self._root = self.folder.stat().st_ino
        self._folders: Folders = {self._root: {}}
        self._lasting_folders: Folders = {self._root: {}}
        self._changed = (self._root, "")
        self._content: dict[int, bytes] = {}
        self._lasting: dict[int, bytes] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        self._open: dict[int, BinaryIO] = {}
        """What keeps the number of a removed file from being given to a new one."""

    @contextmanager
    def written(self) -> Iterator[None]:
        """A block whose writes are followed."""
        with ExitStack() as stack:
            for name in _CALLS:
                stack.enter_context(patch.object(os, name, self._around(name, getattr(os, name))))
            stack.enter_context(patch.object(os, "fsync", self._fsync(os.fsync)))
            try:
                yield
                self._look("end")
            finally:
                for file in self._open.values():
                    file.close()

    def _around(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._mutex:
                self._look(f"before {name}")
                try:
                    return real(*args, **kwargs)
                finally:
                    self._look(f"after {name}")

        return call

    def _fsync(self, real: Any) -> Any:
        def call(handle: Any) -> None:
            with self._mutex:
                self._look("before fsync")
                number = handle if isinstance(handle, int) else handle.fileno()
                path = Path(os.readlink(f"/proc/self/fd/{number}"))
                real(handle)
                if path == self.folder or self.folder in path.parents:
                    self._synced(os.fstat(number).st_ino)
                self._look(f"after fsync {path.name}")

        return call

    def _synced(self, inode: int) -> None:
        if inode in self._folders:
            self._lasting_folders[inode] = dict(self._folders[inode])
        elif inode in self._content:
            self._lasting[inode] = self._content[inode]

    def _look(self, after: str) -> None:
        """Notice what has changed, and keep the states that a crash here can leave."""
        with self._mutex:
            folders: Folders = {}
            self._scan(self.folder, self._root, folders)
            for number, names in folders.items():
                before = self._folders.get(number, {})
                for name in sorted({*names, *before}):
                    if names.get(name) != before.get(name):
                        self._changed = (number, name)
            self._folders = folders
            self._forget()
            self._keep(after)

    def _scan(self, path: Path, inode: int, folders: Folders) -> None:
        names = folders[inode] = {}
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                try:
                    status = entry.stat(follow_symlinks=False)
                    number = names[entry.name] = status.st_ino
                    if entry.is_dir(follow_symlinks=False):
                        self._scan(Path(entry.path), number, folders)
                    elif self._seen.get(number) != (status.st_size, status.st_mtime_ns):
                        self._seen[number] = (status.st_size, status.st_mtime_ns)
                        self._read(Path(entry.path), number)
                except FileNotFoundError:  # gone since, by another thread
                    names.pop(entry.name, None)

    def _read(self, path: Path, number: int) -> None:
        if number not in self._open:
            file = path.open("rb")
            if os.fstat(file.fileno()).st_ino != number:  # another took its name
                file.close()
                raise FileNotFoundError(path)
            self._open[number] = file
        self._open[number].seek(0)
        self._content[number] = self._open[number].read()

    def _forget(self) -> None:
        """Drop what no name leads to: its number may be given to another file."""
        held = {self._root}
        for folders in (self._folders, self._lasting_folders):
            held |= {number for names in folders.values() for number in names.values()}
        for table in (self._content, self._lasting, self._seen, self._lasting_folders):
            for number in set(table) - held:
                del table[number]
        for number in set(self._open) - held:
            self._open.pop(number).close()

    def _keep(self, after: str) -> None:
        lasting, content = self._lasting, self._content
        zeros = {
            inode: lasting[inode] + bytes(len(content[inode]) - len(lasting[inode]))
            for inode in content
            if inode in lasting and content[inode].startswith(lasting[inode])
        }
        number, name = self._changed
        latest = self._lasting_folders | {number: dict(self._lasting_folders.get(number, {}))}
        latest[number].pop(name, None)
        if name in self._folders.get(number, {}):
            latest[number][name] = self._folders[number][name]
        for kind, folders, held in (
            ("killed", self._folders, content),
            ("unsynced", self._lasting_folders, lasting),
            ("names only", self._folders, lasting),
            ("zeros", self._folders, lasting | zeros),
            ("reordered", latest, lasting),
        ):
            files = tuple(sorted(self._files(self._root, "", folders, held)))
            self.last[kind] = self.states.setdefault(files, State(kind, after, files))

    def _files(
        self, number: int, inside: str, folders: Folders, held: dict[int, bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        for name, inode in folders.get(number, {}).items():
            if inode in self._content:
                yield inside + name, held.get(inode, b"")
            else:
                yield inside + name, None
                yield from self._files(inode, f"{inside}{name}/", folders, held)
