"""The official WAPO trainer: ``plots/<run>/data`` with its checkpoints, completions and eval.

The files are aggregates, so what a run gets is what they determine: exact token counts per class
from ``token_bins.jsonl``, sums per probability bin and sign from ``grad_mass`` and ``token_count``,
a sample of token rows from ``scatter_step_*.npz``. Files count steps from 0, logs and completions
from 1; steps of a run are from 1.
"""

import json
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.derive import reward_columns
from wapo_analysis.errors import UserError, first_line, printable
from wapo_analysis.importers.jsonl import as_number, as_step, message_text
from wapo_analysis.importers.logs import newest_state, read_log
from wapo_analysis.importers.readers import json_records, json_value
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import StepCounts, class_table, filled_records, numbers
from wapo_analysis.importers.sink import Sink
from wapo_analysis.importers.tables import Codes
from wapo_analysis.results import spans
from wapo_analysis.schema import TOKENS
from wapo_analysis.store.files import open_regular
from wapo_analysis.table import Array

SAMPLE_LIMIT = 10_000
MAX_ARRAY_BYTES = 1 << 30
#: Bins of p in the paper's files.
BINS = 5
_NUMBER = re.compile(r"step_(\d+)\.(?:npz|npy|json)$")
_TEXT_KEYS = ("step", "prompt", "completion", "reward")


@dataclass(frozen=True)
class OfficialTree:
    """The parts of one official run.

    ``run``: ``plots/<run>``, the folder of ``data``; None if there is only a trainer state;
    ``told``: files the run was told by.
    """

    run: Path | None
    told: tuple[Path, ...]

    @classmethod
    def of(cls, files: tuple[Path, ...]) -> "OfficialTree":
        """Tree of the files that tell a run. Raises UserError if they belong to several runs."""
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


def read_official(files: tuple[Path, ...], sink: Sink, report: ImportReport) -> None:
    """Read the output of one official run.

    Raises UserError if the source holds several runs, or a file that cannot be read.
    """
    tree = OfficialTree.of(files)
    report.trainer = "WAPO"
    names: set[str] = set()
    for file, records in newest_state(tree.states(), report):
        read_log(records, sink, report, file, "official")
        names.update(key for _, record in records for key in record)
    counts = _counts(tree, sink, report)
    for step in sorted(counts):
        _write_classes(step, counts, sink, report)
    sizes = _rewards(tree, sink, report)
    _completions(tree, sizes, sink, report)
    _eval(tree, sink, report)
    if "entropy_pos" in names:
        report.note(
            "entropy_pos and entropy_neg are the official means over sequences; sequences without "
            "advantage count as pos"
        )


def _by_sign(file: Path, report: ImportReport) -> dict[str, Array]:
    """Arrays pos, neg and bins of a file; empty, and said, unless pos and neg count the bins."""
    stored = stored_arrays(file, report)
    if not stored:
        return {}
    for name in ("pos", "neg"):
        values = stored.get(name)
        fits = values is not None and values.ndim == 1 and values.dtype.kind in "biuf"
        if not fits or (len(values) < BINS) or not np.isfinite(values).all():  # type: ignore[arg-type]
            report.bad_line(file, 1, f"{name} is not {BINS} or more finite numbers")
            return {}
    return stored


@dataclass
class _Counted:
    """Everything that counts tokens, per step from 1."""

    steps: dict[int, StepCounts] = field(default_factory=dict)

    def at(self, file: Path) -> StepCounts:
        return self.steps.setdefault(step_of(file) + 1, StepCounts())


def _counts(tree: OfficialTree, sink: Sink, report: ImportReport) -> dict[int, StepCounts]:
    counted = _Counted()
    _token_bins(tree, counted, report)
    for kind in ("token_count", "grad_mass"):
        for file in tree.data(f"{kind}/step_*.npz"):
            stored = _by_sign(file, report)
            if stored:
                getattr(counted.at(file), kind).update({1: stored["pos"], -1: stored["neg"]})
                _keep_bins(kind, step_of(file) + 1, stored, sink)
    for file in tree.data("token_strength/*step_*.npz"):
        stored = _by_sign(file, report)
        scale = "fine" if file.name.startswith("fine") else "coarse"
        if "bins" in stored:
            _keep_bins(f"token_strength_{scale}", step_of(file) + 1, stored, sink)
    for file in tree.data("scatter_step_*.npz"):
        _scatter(file, counted.at(file), sink, report)
    return counted.steps


def _keep_bins(kind: str, step: int, stored: dict[str, Array], sink: Sink) -> None:
    """The official numbers as they are, as step columns official/<kind>/<sign>/<bin>."""
    names = stored["bins"].ravel().astype(str).tolist() if "bins" in stored else []
    for sign in ("pos", "neg"):
        pairs = zip(names, stored[sign][: len(names)].tolist(), strict=False)
        sink.add_step(step, {f"official/{kind}/{sign}/{name}": value for name, value in pairs})


def _token_bins(tree: OfficialTree, counted: _Counted, report: ImportReport) -> None:
    seen: set[int] = set()
    again: list[int] = []
    for file in tree.bins():
        for number, values in json_records(file, report):
            step = as_step(values.get("step"))
            counts = values.get("counts")
            if step is None or not isinstance(counts, dict):
                report.bad_line(file, number, "no step or no counts")
                continue
            if step in seen:
                report.repeated_steps.add(step + 1)
                again = sorted(report.repeated_steps)
            seen.add(step)
            entry = counted.steps.setdefault(step + 1, StepCounts())
            numbers_of = {name: as_step(value) for name, value in counts.items()}
            for name in [name for name, number in numbers_of.items() if number is None]:
                report.count(f"counts of tokens that are no count, now 0 ({name})", file, number)
            entry.bins = {name: count or 0 for name, count in numbers_of.items()}
            chosen = values.get("hyperparams")
            chosen = chosen if isinstance(chosen, dict) else {}
            entry.filtered = any(chosen.get(k) for k in ("include_bins", "exclude_bins"))
    if again:
        report.told(f"steps {spans(again)} were counted again after a resume: the later is read")


def _scatter(file: Path, counts: StepCounts, sink: Sink, report: ImportReport) -> None:
    """Token rows of a step: probabilities and advantage of at most ``SAMPLE_LIMIT`` tokens."""
    stored = stored_arrays(file, report)
    names = ("prob_train", "prob_inference", "advantages")
    if not all(name in stored for name in names):
        return
    shapes = {stored[name].shape for name in names}
    if (
        len(shapes) > 1
        or len(next(iter(shapes))) != 1
        or any(stored[n].dtype.kind in "SU" for n in names)
    ):
        report.bad_line(file, 1, f"{', '.join(names)} are not lists of as many numbers")
        return
    step, rows = step_of(file) + 1, len(stored["advantages"])
    counts.sampled, counts.zeros = rows, int((stored["advantages"] == 0).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = {
            "step": np.full(rows, step),
            "advantage": stored["advantages"],
            "logp": np.log(stored["prob_train"].astype(np.float64)),
            "logp_old": np.log(stored["prob_inference"].astype(np.float64)),
        }
    frame = pd.DataFrame(columns)
    lost = sum(int(np.isnan(numbers(frame[name], rows)).sum()) for name in ("logp", "logp_old"))
    if lost:
        report.counts["probabilities of 0 or not finite, now null"] += lost
    if rows:
        sink.write_records(filled_records(TOKENS, frame, report), step)
        report.token_rows += rows
    report.mapped |= {"logp": "prob_train", "logp_old": "prob_inference", "advantage": "advantages"}
    if rows >= SAMPLE_LIMIT:
        report.note(f"token rows are the official random sample of {SAMPLE_LIMIT} tokens a step")


def _write_classes(
    step: int, counts: dict[int, StepCounts], sink: Sink, report: ImportReport
) -> None:
    gated = StepCounts.gated(counts.values())
    entry = counts[step]
    records = class_table(step, entry, gated, report)
    if len(records):
        sink.write_records(records, step)
    if entry.bins:
        eligible = sum(v for name, v in entry.bins.items() if name.endswith("_eligible"))
        kept = sum(v for name, v in entry.bins.items() if name.endswith("_kept"))
        sink.add_step(step, {"tokens": eligible, "kept_tokens": kept})


def _rewards(tree: OfficialTree, sink: Sink, report: ImportReport) -> dict[int, int]:
    """Rewards of the batch; returns the number of completions per step."""
    sizes: dict[int, int] = {}
    for file in tree.data("rewards/*_step_*.npy"):
        stored = next(iter(stored_arrays(file, report).values()), np.empty(0))
        fits = stored.dtype.kind not in "SU" and stored.ndim == 1 and len(stored)
        if not fits or not np.isfinite(stored).all():
            report.bad_line(file, 1, "not a list of finite numbers")
            continue
        values = stored.astype(np.float64)
        step, name = step_of(file) + 1, file.name.split("_step_")[0]
        if name == "reward":
            sizes[step] = len(values)
            sink.add_step(step, reward_columns(values, None))
        else:
            sink.add_step(step, {f"reward/{name}": float(values.mean())})
    return sizes


def _rows_of(file: Path, report: ImportReport) -> list[dict[str, Any]] | None:
    """Objects of a list; None, and said, if the file is no JSON."""
    report.files += 1
    try:
        content = json_value(file, report)
    except UserError:
        report.bad_line(file, 1, "no JSON; still being written?")
        return None
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def _completions(
    tree: OfficialTree, sizes: dict[int, int], sink: Sink, report: ImportReport
) -> None:
    codes = Codes()
    for file in tree.texts("completions"):
        step, rows = step_of(file), _rows_of(file, report)
        if rows is None:
            continue
        if not rows:
            report.note(f"{file.name} of the completions is empty, as the official trainer leaves "
                        "its last one")  # fmt: skip
        if tree.shared and len(rows) != sizes.get(step, len(rows)):
            report.note(f"{file.name} holds evaluation rows: without 'checkpoints' in the output "
                        "path they overwrite the completions")  # fmt: skip
            continue
        for row in rows:
            _add_completion(step, row, codes, sink, report)


def _add_completion(
    step: int, row: dict[str, Any], codes: Codes, sink: Sink, report: ImportReport
) -> None:
    reward = as_number(row.get("reward"))
    if reward is None:
        report.counts["completions without a reward left out"] += 1
        return
    sink.add_rollout(
        {
            "step": step,
            "group": codes.code("group", step, json.dumps(row.get("prompt"))),
            "rollout": codes.next("rollout", step),
            "prompt": message_text(row.get("prompt")),
            "completion": message_text(row.get("completion")),
            "reward": reward,
        }
    )
    for key in row.keys() - set(_TEXT_KEYS):
        # Means of these are in the log as reward/<name>; single values have no column.
        report.unknown_keys[f"completions: {key}"] += 1


def _eval(tree: OfficialTree, sink: Sink, report: ImportReport) -> None:
    if tree.shared:
        return
    for file in tree.texts("eval"):
        columns: dict[str, list[float]] = {}
        for row in _rows_of(file, report) or ():
            for key, value in row.items():
                number = as_number(value)
                if key != "step" and number is not None:
                    columns.setdefault(f"eval/{key}", []).append(number)
        sink.add_step(step_of(file), {k: sum(v) / len(v) for k, v in columns.items()})


def stored_arrays(file: Path, report: ImportReport) -> dict[str, Array]:
    """Arrays of an ``.npz`` or ``.npy`` file by name; empty, and said, if it cannot be read.

    Only numbers and texts are returned; nothing in the file is run, and nothing is unpacked that is
    larger than ``MAX_ARRAY_BYTES``.
    """
    report.files += 1
    try:
        # numpy leaves a file open that it cannot read, so it is opened here.
        with open_regular(file) as stream:
            if zipfile.is_zipfile(stream):
                size = sum(part.file_size for part in zipfile.ZipFile(stream).infolist())
            else:
                size = file.stat().st_size
            if size > MAX_ARRAY_BYTES:
                raise ValueError(f"larger than {MAX_ARRAY_BYTES >> 20} MiB unpacked")
            stream.seek(0)
            found = np.load(stream, allow_pickle=False)
            arrays = {file.stem: found} if isinstance(found, np.ndarray) else dict(found.items())
    except (ValueError, OSError, EOFError, LookupError, TypeError, MemoryError, SyntaxError,
            zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
            NotImplementedError, RuntimeError) as error:  # fmt: skip
        report.bad_line(file, 1, printable(f"not readable ({first_line(error)})"))
        return {}
    kinds = {name: values.dtype.kind for name, values in arrays.items()}
    for name in [name for name, kind in kinds.items() if kind not in "biufSU"]:
        report.bad_line(file, 1, f"{name} holds {arrays.pop(name).dtype}, no numbers")
    return arrays
