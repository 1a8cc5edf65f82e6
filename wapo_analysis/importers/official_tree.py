"""Where the files of an official run lie: four trees whose paths differ in one word."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wapo_analysis.errors import UserError

_NUMBER = re.compile(r"step_(\d+)\.(?:npz|npy|json)$")


@dataclass(frozen=True)
class OfficialTree:
    """The parts of one official run.

    Parameters
    ----------
    run : Path or None
        ``plots/<run>``, the folder of ``data``; None if there is only a trainer state.
    told : tuple of Path
        Files the run was told by.
    """

    run: Path | None
    told: tuple[Path, ...]

    @classmethod
    def of(cls, files: tuple[Path, ...]) -> "OfficialTree":
        """Tree of the files that tell a run.

        Raises
        ------
        UserError
            If they belong to several runs.
        """
        runs = {_data_folder(file).parent for file in files if file.name != "trainer_state.json"}
        if len(runs) > 1:
            names = ", ".join(sorted(str(run) for run in runs))
            raise UserError(f"several official runs here; name one of: {names}")
        return cls(next(iter(runs), None), files)

    def data(self, pattern: str) -> list[Path]:
        """Files of steps below ``data`` in the order of the steps."""
        return [] if self.run is None else _in_order((self.run / "data").glob(pattern))

    def bins(self) -> list[Path]:
        """The log of class counts, if there is one."""
        return [] if self.run is None else list(self.run.glob("data/token_bins/token_bins.jsonl"))

    def states(self) -> list[Path]:
        """Trainer states of all checkpoints."""
        given = [file for file in self.told if file.name == "trainer_state.json"]
        return given or sorted(self._beside("checkpoints").glob("**/trainer_state.json"))

    def texts(self, kind: str) -> list[Path]:
        """Files of "completions" or "eval" in the order of their steps."""
        return _in_order(self._beside(kind).glob("step_*.json"))

    @property
    def shared(self) -> bool:
        """Whether the trees coincide, as they do when the output path lacks "checkpoints"."""
        return self.run is not None and self._beside("eval") == self.run

    def _beside(self, kind: str) -> Path:
        """The same run in the tree of another kind; the last part with the word is tried first."""
        word = "checkpoints" if self.run is None else "plots"
        run = self.run or self.states()[0].parent.parent
        parts = list(run.parts)
        places = [place for place, part in enumerate(parts) if word in part]
        if not places:
            return run
        last = [*parts]
        last[places[-1]] = parts[places[-1]].replace(word, kind)
        every = [part.replace(word, kind) for part in parts]
        return Path(*last) if Path(*last).exists() else Path(*every)


def step_of(file: Path) -> int:
    """Step in the name of a file, -1 without one."""
    found = _NUMBER.search(file.name)
    return int(found.group(1)) if found else -1


def _data_folder(file: Path) -> Path:
    return next(parent for parent in file.parents if parent.name == "data")


def _in_order(files: Iterable[Path]) -> list[Path]:
    return sorted((file for file in files if step_of(file) >= 0), key=lambda f: (step_of(f), f))
