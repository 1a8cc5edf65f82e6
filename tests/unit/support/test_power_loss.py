"""The states that a crash can leave, against a folder of two files."""

import os
from pathlib import Path

from tests.support.power_loss import Journal


def synced(path: Path, content: bytes = b"") -> None:
    """Write a file, or take a folder, and sync it."""
    if content:
        path.write_bytes(content)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def test_a_replaced_file_whose_folder_was_not_synced_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    journal = Journal(folder)
    with journal.written():
        synced(folder / "names", b"old")
        synced(folder)
        synced(folder / "new", b"new")
        os.replace(folder / "new", folder / "names")
        for number in range(6):  # one of them would be given the number of the replaced file
            synced(folder / f"other-{number}", b"other")
    assert dict(journal.last["unsynced"].files) == {"names": b"old"}
    assert dict(journal.last["killed"].files)["names"] == b"new"
    assert not any(dict(state.files).get("names") == b"other" for state in journal.states.values())
