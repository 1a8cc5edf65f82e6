"""Where the golden vectors are: the small copy in the repository, and the full set if present."""

import os
from pathlib import Path

import pytest

SMALL = Path(__file__).parents[1] / "data" / "gold"
_BESIDE = Path(__file__).parents[3] / "shared" / "gold"


def full_gold() -> Path:
    """Folder of the full set: WAPO_GOLD, else shared/gold beside the repository, else a skip."""
    named = os.environ.get("WAPO_GOLD")
    folder = Path(named) if named else _BESIDE
    if not named and not folder.is_dir():
        pytest.skip("full golden set not present (set WAPO_GOLD); the small copy is tested")
    return folder
