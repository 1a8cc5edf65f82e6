"""A metrics log as it is read: numbers by name and step, until the whole of it is known.

Which name feeds which column, and what several records of one step mean, can only be read off the
whole log. A resumed run goes back and repeats a range of steps: the later run is read. Ranks or
micro-batches alternate: their numbers are averaged. Both are said.
"""

import os
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from wapo_analysis.errors import UserError, few, printable
from wapo_analysis.importers.jsonl import as_number, flat
from wapo_analysis.importers.mapping import (
    Feed,
    NameTable,
    drop_impossible,
    function_column,
    likely_trainer,
    set_names,
    shares_of_counts,
)
from wapo_analysis.importers.repeats import Epochs, Repeats, way_of, whole
from wapo_analysis.importers.report import ImportReport, say_penalty, shown
from wapo_analysis.results import spans
from wapo_analysis.schema import STEPS
from wapo_analysis.table import Array

#: Names kept beside the column they feed, as runs watched by us have them.
KEPT_TOO = ("sampling/sampling_logp_difference/mean",)
#: slime's number of an update; beside it ``rollout/step`` counts batches.
UPDATE_STEP = "train/step"
RANK_KEYS = ("rank", "process_index", "local_rank", "dp_rank", "worker_id")
_MANY_FILES = 500
_RANK_FILE = re.compile(r"(?:rank|worker|proc|process|gpu|dp)[_-]?\d+", re.IGNORECASE)
#: What grows beside the steps and counts none.
_NO_COUNTER = re.compile(r"token|sample|second|flop|flos|byte", re.IGNORECASE)
_STEPLIKE = re.compile(r"step|iter|update|round|batch|episode|epoch|when|time", re.IGNORECASE)
_BOOKKEEPING = re.compile(
    r"(?:.*/)?(?:epoch|global_step|_?step|_?runtime|_?timestamp|wall_?time|percentage"
    r"|memory(?:\(GiB\))?|train_speed\(.*\))",
    re.I,
)


@dataclass
class _Numbers:
    """Numbers of one name in the order they were logged."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def arrays(self) -> tuple[Array, Array]:
        return np.array(self.steps), np.array(self.values)


@dataclass
class StepLog:
    """Numbers of a metrics log, by name."""

    report: ImportReport
    _numbers: dict[str, _Numbers] = field(default_factory=dict)
    _prefix: dict[str, str] = field(default_factory=dict)
    _files: list[tuple[Path, int, int]] = field(default_factory=list)
    _ranks: dict[int, set[Any]] = field(default_factory=dict)
    _of_updates: set[str] = field(default_factory=set)
    _no_numbers: dict[str, list[tuple[Path, int]]] = field(default_factory=dict)
    _epochs: Epochs = field(default_factory=Epochs)

    def __bool__(self) -> bool:
        return bool(self._numbers)

    @property
    def names(self) -> list[str]:
        """Names of all numbers, in the order they came."""
        return list(self._numbers)

    def add(
        self, record: Mapping[str, Any], step: int, prefix: str, place: tuple[Path, int], *,
        step_key: str | None = None, null_is_nan: bool = False,
    ) -> int:  # fmt: skip
        """Take one record, and return its step of the run.

        Parameters
        ----------
        record : mapping
            Names to values; nested objects are joined with a slash.
        step : int
            Its step.
        prefix : str
            Put before a kept name that has no slash.
        place : (Path, int)
            File and line, named where a value cannot be used.
        step_key : str, optional
            Name of the step, which is no number of its own.
        null_is_nan : bool
            The writer turns numbers that are not finite into null.
        """
        step = self._epochs.through(_epoch(record), step)
        for key, value in flat(record):
            if key == step_key:
                continue
            if key in RANK_KEYS and isinstance(value, int | str):
                self._ranks.setdefault(step, set()).add(value)
                continue
            number = float("nan") if value is None and null_is_nan else as_number(value)
            if number is not None:
                self.number(key, step, number, prefix)
                if step_key == UPDATE_STEP:
                    self._of_updates.add(key)
                if not isfinite(number):
                    self.report.count("numbers that were not finite, now null", *place)
            elif value is not None:
                self._no_numbers.setdefault(key, []).append(place)
        return step

    def number(self, key: str, step: int, value: float, prefix: str) -> None:
        """Take one number."""
        held = self._numbers.get(key)
        if held is None:
            held = self._numbers[key] = _Numbers()
            self._prefix[key] = prefix
        held.steps.append(step)
        held.values.append(value)

    def counts(self, key: str, files: int) -> bool:
        """Whether a name counts: whole numbers, one a record, that rise in each of some files."""
        values = np.array(self._numbers[key].values) if key in self._numbers else np.array([])
        if not whole(values):
            return False
        moves = np.sign(np.diff(values))
        return bool((moves == -1).sum() < files and (moves == 1).any() and moves.all())

    def step_candidates(self) -> dict[str, list[float]]:
        """Names whose whole numbers never fall and do rise, most steplike first, with the first."""
        found: list[tuple[bool, bool, str, list[float]]] = []
        for key, held in self._numbers.items():
            if _NO_COUNTER.search(key) and not _STEPLIKE.search(key):
                continue
            values = np.array(held.values)
            if not whole(values):
                continue
            moves = np.diff(values)
            if (moves >= 0).all() and moves.any():
                found.append((not _STEPLIKE.search(key), not (moves == moves[0]).all(), key,
                              values[:3].tolist()))  # fmt: skip
        return {key: first for _, _, key, first in sorted(found)}

    def count_by(self, key: str) -> None:
        """Take the numbers of one name as the steps; numbers of records without it are left out."""
        counter = self._numbers[key]
        steps = dict(zip(counter.steps, map(int, counter.values), strict=True))
        for held in self._numbers.values():
            pairs = [
                (steps[n], v) for n, v in zip(held.steps, held.values, strict=True) if n in steps
            ]
            held.steps = array("q", [step for step, _ in pairs])
            held.values = array("d", [value for _, value in pairs])

    def end_of_file(self, file: Path, first: int, last: int) -> None:
        """Note which steps a file held, to tell two runs in one folder from one that went on."""
        self._files.append((file, first, last))

    def finish(self, names: NameTable) -> dict[int, dict[str, Any]]:
        """Rows of the ``steps`` table by step.

        Raises UserError if two files hold different numbers for the same steps from their first
        step on.
        """
        self._tell_no_numbers(names)
        if any(self._epochs.before.values()):
            self.report.told("the step counts within each epoch: the epochs follow each other")
        columns = self._settled()
        rows: dict[int, dict[str, Any]] = {}
        feeds = names.feeds(list(columns))
        self.report.trainer = self.report.trainer or likely_trainer(columns)
        drop_impossible(feeds, columns, self.report)
        used: set[str] = set()
        for ours, feed in feeds.items():
            self.report.mapped[ours] = ", ".join(feed.names)
            used.update(feed.names)
            if ours == "eval_reward" and len(feed.names) > 1:
                self.report.note(f"eval_reward is the mean of {self.report.mapped[ours]}")
                for name, part in set_names(feed.names).items():
                    for step, value in columns[name].items():
                        rows.setdefault(step, {})[f"eval_reward/{part}"] = value
            for step, value in _fed(feed, columns).items():
                rows.setdefault(step, {})[ours] = value
        shares_of_counts(columns, feeds, rows)
        for key, name in self._kept_names(columns, used).items():
            self.report.kept_keys[key] += len(columns[key])
            for step, value in columns[key].items():
                rows.setdefault(step, {})[name] = value
        say_penalty(rows, self.report)
        bare = [step for step, row in rows.items() if all(map(_BOOKKEEPING.fullmatch, row))]
        for step in bare:
            del rows[step]
        return rows

    def _tell_no_numbers(self, names: NameTable) -> None:
        """Names without any number are not in the run; a text where we need one is a bad value."""
        looked_for = names.read_by(list(self._no_numbers))
        for key, places in self._no_numbers.items():
            if key in self._numbers or key in looked_for:
                what = f"values of {key} that are no number, left out"
                for place in places:
                    self.report.count(what, *place)
            else:
                self.report.unknown_keys[key] += len(places)
        self._no_numbers.clear()

    def _kept_names(self, columns: Mapping[str, Any], used: set[str]) -> dict[str, str]:
        """Names without a column of ours, as the step log calls them; no two become one."""
        kept: dict[str, str] = {}
        taken = set(STEPS.names)
        for key in columns:
            if key in used and key not in KEPT_TOO:
                continue
            name = function_column(key)
            name = name if "/" in name else f"{self._prefix[key]}/{name}"
            while name in taken:
                name += "_"
            kept[key] = name
            taken.add(name)
        return kept

    # ---- several records of one step

    def _settled(self) -> dict[str, dict[int, float]]:
        """One number for each name and step."""
        found = {key: held.arrays() for key, held in self._numbers.items()}
        found |= self._by_batch(found)
        repeats = {key: r for key, held in found.items() if (r := Repeats.of(*held)) is not None}
        told = {key: r for key, r in repeats.items() if not _BOOKKEEPING.fullmatch(key)}
        differing = sorted({s for r in told.values() for s in r.differing.tolist()})
        later = bool(repeats) and self._is_resume(list(repeats.values()))
        if differing:
            self._say(differing, later, repeats)
        settled = {key: r.settled(later, way_of(key) if differing else "one")
                   for key, r in repeats.items()}  # fmt: skip
        return {
            key: settled.get(key) or dict(zip(s.tolist(), v.tolist(), strict=True))
            for key, (s, v) in found.items()
        }

    def _by_batch(self, found: Mapping[str, tuple[Array, Array]]) -> dict[str, tuple[Array, Array]]:
        """Numbers of updates at the step of their batch, where a batch has several."""
        batches = [s.max() for key, (s, _) in found.items() if key.startswith("rollout/")]
        updates = [found[key][0].max() for key in self._of_updates]
        if not batches or not updates:
            return {}
        each = round((int(max(updates)) + 1) / (int(max(batches)) + 1))
        if each < 2:
            return {}
        self.report.told(
            f"train/step counts updates, {each} a batch: they are at the step of their batch"
        )
        return {key: (found[key][0] // each, found[key][1]) for key in self._of_updates}

    def _is_resume(self, repeats: list[Repeats]) -> bool:
        """Whether steps were repeated by a later run, not by ranks that take turns."""
        if any(len(ranks) > 1 for ranks in self._ranks.values()):
            return False
        if any(_RANK_FILE.search(file.name) for file, _, _ in self._files):
            return False
        most = max(repeats, key=lambda r: len(r.back))
        return most.jumps > 0 and (most.jumps < len(self._files) or not most.alternates)

    def _say(self, differing: list[int], later: bool, repeats: Mapping[str, Repeats]) -> None:
        self.report.repeated_steps.update(differing)
        where = spans(differing)
        if later and (runs := self._several_runs()):
            place = Path(os.path.commonpath([file.parent for file in runs]))
            names = few(printable(shown(file.relative_to(place))) for file in runs)
            raise UserError(
                f"{len(runs)} files of {printable(shown(place))} hold different numbers for the "
                f"same steps, so they look like {len(runs)} runs; name one of them: {names}"
            )
        if later:
            first = min(int(r.steps.min()) for r in repeats.values())
            why = "by a later start" if differing[0] == first else "after a resume"
            self.report.told(f"steps {where} were logged again {why}: the later run is read")
            return
        summed = sorted(key for key in repeats if way_of(key) == "sum")
        said = f"; summed instead: {', '.join(map(printable, summed[:6]))}" if summed else ""
        self.report.told(
            f"steps {where} have several records each (ranks or micro-batches): averaged{said}"
        )

    def _several_runs(self) -> list[Path]:
        """Files that share steps, if any of them begins no later than one before it."""
        pairs = [(one[0], two[0], two[1] <= one[1])
                 for one, two in combinations(self._files[:_MANY_FILES], 2)
                 if min(one[2], two[2]) > max(one[1], two[1])]  # fmt: skip
        shared = dict.fromkeys(file for *both, _ in pairs for file in both)
        return list(shared) if any(again for *_, again in pairs) else []


def _epoch(record: Mapping[str, Any]) -> float | None:
    return as_number(record.get("epoch", record.get("summary/epoch")))


def _fed(feed: Feed, columns: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Numbers of a column by step; the mean over several names where all of them are there."""
    parts = [columns[name] for name in feed.names]
    shared = set(parts[0]).intersection(*parts[1:])
    if not shared:
        parts = [max(parts, key=len)]
        shared = set(parts[0])
    values = {step: sum(part[step] for part in parts) / len(parts) for step in sorted(shared)}
    for name in feed.fallbacks:
        values = {**columns[name], **values}
    if feed.complement or feed.negative:
        return {step: float(feed.complement) - value for step, value in values.items()}
    return values
