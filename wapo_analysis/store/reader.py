"""Reading a run folder, finished or still being written."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from wapo_analysis.derive import class_names, derived_columns, with_class
from wapo_analysis.errors import UserError, counted, few, printable, unknown_name
from wapo_analysis.schema import TABLES, Table
from wapo_analysis.store.files import MANIFEST, PART_TABLES, STEP_LOG, step_lines, steps_frame
from wapo_analysis.store.lock import DEAD, probably_dead
from wapo_analysis.store.manifest import Manifest, is_run, read_manifest
from wapo_analysis.store.needs import Need, lack
from wapo_analysis.store.parquet import named
from wapo_analysis.store.parts import joined, listed_keys, read_rows, read_vocab, scan_step
from wapo_analysis.store.summary import Engine, class_summary
from wapo_analysis.table import Array, Records

_LOG = logging.getLogger(__name__)
#: Recorded steps that an error message names.
_NAMED_STEPS = 5


@dataclass(frozen=True, repr=False)
class Run:
    """A run opened for reading; tables are pandas data frames.

    Parameters
    ----------
    path : Path
        Run folder.
    manifest : Manifest
    """

    path: Path
    manifest: Manifest = field(default_factory=Manifest)

    @property
    def name(self) -> str:
        """Name shown in figures: the manifest's, else the folder's."""
        return printable(self.manifest.name or self.path.name)

    @property
    def objective(self) -> str:
        """Name of the objective, or ``"unknown"``."""
        return printable(self.manifest.objective.get("name", "unknown"))

    @property
    def label(self) -> str:
        """Name of the setting in legends; runs that share it are seeds of one setting."""
        return printable(self.manifest.label or self.objective.upper())

    @property
    def seed(self) -> int | None:
        """Seed of the run, None if the source gave none."""
        return self.manifest.seed

    @property
    def status(self) -> str:
        """How the run ended, or ``running``; ``probably dead`` if its process ended before it."""
        if self.manifest.status == "running" and probably_dead(self.path):
            return DEAD
        return self.manifest.status

    @property
    def temperature(self) -> float:
        """Softmax temperature of the recorded statistics."""
        return self.manifest.temperature or 1.0

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Step table, one row per step, last record of a repeated step; NaN where missing."""
        log, rows = self.path / STEP_LOG, []
        with suppress(FileNotFoundError):
            rows = list(step_lines(log))
        written = self.manifest.step_lines
        if written is not None and len(rows) != written:
            _LOG.warning("%s has %d lines of the %d that were written", log, len(rows), written)
        return steps_frame(rows)

    def column(self, name: str) -> Array:
        """A step column as float64, shape (steps,); what is not there or not finite is NaN."""
        if name not in self.steps:
            return np.full(len(self.steps), np.nan)
        numbers = pd.to_numeric(self.steps[name], errors="coerce").to_numpy(np.float64)
        return np.where(np.isfinite(numbers), numbers, np.nan)

    @cached_property
    def classes(self) -> pd.DataFrame:
        """Class totals with the name of the class, ``cls``, summed over ranks."""
        return summed_classes(self.table("classes"))

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        """Completions with rewards and advantages."""
        return self.table("rollouts")

    @cached_property
    def probes(self) -> pd.DataFrame:
        """Counterfactual probes; empty if the run had none."""
        return self.table("probes")

    @cached_property
    def vocab(self) -> dict[int, str]:
        """Token id to text."""
        return read_vocab(self.path)

    def tokens(self, steps: Iterable[int] | None = None, derived: bool = True) -> pd.DataFrame:
        """Token rows, by default of the whole run and with derived columns; ``cls`` is a name.

        Parameters
        ----------
        steps : iterable of int, optional
            Only these steps; parts of other steps are not opened.
        derived : bool
            Add the derived columns of the schema.

        Raises
        ------
        UserError
            If a step that is asked for has no token rows; the message names those that have.
        """
        if steps is not None:
            steps = list(steps)
            self._check_token_steps(steps)
        frame = self.table("tokens", steps)
        if not derived:
            return frame
        columns = {name: frame[name].to_numpy() for name in frame.columns}
        derived_values = derived_columns(columns, self.temperature)
        return frame.assign(**derived_values).assign(cls=class_names(derived_values["cls"]))

    def topk(self, steps: Iterable[int] | None = None) -> pd.DataFrame:
        """The most probable tokens at the positions of a few rollouts, before and after updates.

        Parameters
        ----------
        steps : iterable of int, optional
            Only these steps.

        Returns
        -------
        DataFrame
            The ``topk`` table with ``prob`` = exp(logp) and ``prob_after``, NaN where the tokens
            were not scored again; empty if none were recorded.
        """
        frame = self.table("topk", steps)
        return frame.assign(prob=np.exp(frame["logp"]), prob_after=np.exp(frame["logp_after"]))

    def scan_tokens(
        self,
        step: int,
        columns: Sequence[str],
        keep: Callable[[dict[str, Array]], dict[str, Array]],
    ) -> dict[str, Array]:
        """What is kept of a step's token rows, a block at a time; see `parts.scan_step`.

        Raises
        ------
        UserError
            If the step has no token rows, or a part is broken.
        """
        self._check_token_steps([step])
        return scan_step(self.path / "tokens", step, columns, keep)

    def summary(self, by: Sequence[str] = ("step", "cls"), engine: Engine = "auto") -> pd.DataFrame:
        """Tokens, entropy, predicted entropy change and gradient mass of the token rows.

        Parameters and result are those of :func:`wapo_analysis.store.summary.class_summary`. Unlike
        ``classes``, which is exact over all tokens, it covers the rows that were written.
        """
        return class_summary(self.path, self.temperature, engine, by)

    def token_steps(self) -> list[int]:
        """Steps that have token rows."""
        return self.recorded_steps("tokens")

    def rescored_steps(self) -> list[int]:
        """Steps that have token rows scored a second time after the update."""
        scored = set(self.classes.loc[self.classes["rescored"] > 0, "step"].astype(int))
        return [step for step in self.token_steps() if step in scored]

    def recorded_steps(self, table: str) -> list[int]:
        """Steps that have rows in a table of parts, from the names of its files."""
        return sorted({step for step, _ in listed_keys(self.path / table)})

    @cached_property
    def held(self) -> dict[str, frozenset[str] | None]:
        """What `lacks` found so far: table to its columns with values, None for no rows."""
        return {}

    def lacks(self, need: Need) -> str | None:
        """Why the run cannot give a column, as one clause; None if it can."""
        return lack(self, need)

    def _check_token_steps(self, asked: list[int]) -> None:
        recorded = self.token_steps()
        absent = sorted(set(asked) - set(recorded))
        if not absent:
            return
        if not recorded:
            raise UserError(
                f"{self.name} has no token rows; record them with token_every (wapo train) or "
                "attach"
            )
        near = sorted(sorted(recorded, key=lambda step: abs(step - absent[0]))[:_NAMED_STEPS])
        raise UserError(
            f"step {absent[0]} of {self.name} has no token rows; nearest of the {len(recorded)} "
            f"steps that have: {', '.join(map(str, near))}"
        )

    def table(
        self, name: str, steps: Iterable[int] | None = None, columns: list[str] | None = None
    ) -> pd.DataFrame:
        """Stored columns of a table of parts; others than ``columns``, if given, are not read.

        Raises
        ------
        UserError
            On an unknown table or a broken part (the message names the file).
        """
        if name not in PART_TABLES:
            raise unknown_name("table", name, PART_TABLES)
        wanted = None if steps is None else set(steps)
        rows = read_rows(self.path / name, None if wanted is None else wanted.__contains__, columns)
        with named(self.path / name):
            return parts_frame(joined(rows.values()), TABLES[name], columns)

    def __repr__(self) -> str:
        steps = counted(len(self.steps), "step")
        return f"Run({self.name!r}, {self.objective}, {steps}, {self.status})"

    def _repr_html_(self) -> str:
        from html import escape

        shown = self.steps[["step", "reward", "entropy", "grad_norm"]].tail(5)
        return f"<b>{escape(repr(self))}</b>{shown.to_html(index=False)}"


def summed_classes(frame: pd.DataFrame) -> pd.DataFrame:
    """Class totals of all ranks as one table; see :attr:`Run.classes`."""
    keys = ["step", "sign", "regime", "prob_bin"]
    frame = frame.drop(columns="rank")
    if not _ascending(frame[keys].to_numpy(np.int64)):  # of several processes
        frame = frame.groupby(keys, as_index=False).sum(min_count=1)
    return with_class(frame)


def _ascending(rows: Array) -> bool:
    """Whether each row of (rows, keys) comes after the one before it: none is there twice."""
    change = rows[1:] - rows[:-1]
    first = (change != 0).argmax(axis=1)
    return bool((change[np.arange(len(change)), first] > 0).all())


def parts_frame(
    tables: list[pa.Table], declared: Table, columns: list[str] | None = None
) -> pd.DataFrame:
    """Concatenate parts; null floats become NaN and absent columns are filled."""
    if not tables:
        empty = Records.build(declared, {name: [] for name in declared.required}).to_frame()
        return empty if columns is None else empty[columns]
    whole = pa.concat_tables(tables, promote_options="default")
    for column in declared.stored:
        if column.name not in whole.schema.names and (columns is None or column.name in columns):
            empty_of = pa.float64() if column.dtype.startswith("float") else pa.null()
            whole = whole.append_column(column.name, pa.nulls(len(whole), empty_of))
    frame: pd.DataFrame = whole.to_pandas()
    return frame


def open_run(path: str | Path) -> Run:
    """Open a run folder for reading, finished or still being written.

    Parameters
    ----------
    path : str or Path
        Run folder.

    Raises
    ------
    UserError
        If it is no run, is broken, or has another schema version.

    Examples
    --------
    >>> open_run("no/such/folder")
    Traceback (most recent call last):
    wapo_analysis.errors.UserError: no run folder at no/such/folder: there is no such ...
    """
    folder = Path(path)
    return Run(folder, read_manifest(folder))


def run_folders(folder: Path) -> list[Path]:
    """Run folders of ours at or below a folder, by name; what other tools left is none."""
    return sorted(filter(is_run, (file.parent for file in folder.glob(f"**/{MANIFEST}"))))


def find_run(path: Path) -> Path:
    """Run folder at or below a path. Raises UserError if there is none, or several."""
    found = find_runs(path)
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} runs; name one of: {few(found, 6)}")
    return found[0]


def find_runs(path: str | Path) -> list[Path]:
    """Run folders at or below a path: the path itself if it is a run, else its run subfolders.

    Raises UserError if there is none.
    """
    folder = Path(path)
    if is_run(folder):
        return [folder]
    found = run_folders(folder) if folder.is_dir() else []
    if not found:
        read_manifest(folder)
    return found
