"""TensorBoard and W&B: event folders, run folders, and what their web pages let one download.

Event files and ``.wandb`` files are read by their own libraries (extra tensorboard; wandb up to
0.29, later ones have no reader in Python).
"""

import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wapo_analysis.errors import UserError, few, printable, unknown_name
from wapo_analysis.importers.console import read_console
from wapo_analysis.importers.jsonl import as_number, as_step, parse_json
from wapo_analysis.importers.mapping import map_option, rows_of
from wapo_analysis.importers.readers import csv_frames, csv_header, json_value
from wapo_analysis.importers.report import ImportReport, shown
from wapo_analysis.importers.shapes import text_lines
from wapo_analysis.importers.sink import Sink
from wapo_analysis.store.files import read_json

#: Header of a scalar downloaded from TensorBoard.
DOWNLOAD = ["Wall time", "Step", "Value"]
_PANEL = re.compile(r"(?P<run>.+?) - (?P<metric>.+?)(?P<end>__MIN|__MAX)?")
_LONG_ENOUGH = 8
#: Name, step and number.
Scalar = tuple[str, int, float]
_TIMES = ("Relative", "Wall Time")


# ---- choosing one of several runs


def pick(runs: Sequence[str], chosen: str | None, where: Path) -> str:
    """The one run of a source, or the one that was chosen.

    Raises UserError if there are several and none was chosen, or the chosen one is not there.
    """
    fits, said = list(runs), ""
    if chosen is not None:
        fits = [run for run in runs if run == chosen] or [run for run in runs if chosen in run]
        said = f" that fit {chosen!r}"
        if not fits:
            raise unknown_name(f"--run of {shown(where)}", chosen, map(shown, runs))
    if len(fits) > 1:
        names = few(printable(shown(run)) for run in fits)
        raise UserError(
            f"{shown(where)} holds {len(fits)} runs{said}; choose one with --run NAME: {names}"
        )
    return fits[0]


# ---- TensorBoard


def read_tensorboard(
    files: tuple[Path, ...], sink: Sink, report: ImportReport, chosen: str | None = None
) -> None:
    """Read the scalars of event files; those of one folder are one run.

    Raises UserError if the library is not installed, there are several runs, or nothing can be
    read.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ImportError as error:
        raise UserError(
            "TensorBoard's event files are read by its own library: "
            "pip install 'wapo-analysis[tensorboard]'"
        ) from error
    folders = {str(file.parent): [f for f in files if f.parent == file.parent] for file in files}
    folder = pick(sorted(folders), chosen, _common(folders))
    begun: list[tuple[float, str, Path]] = []
    scalars: dict[Path, list[Scalar]] = {}
    for file in folders[folder]:
        with _listening("tensorboard") as remarks:
            time, scalars[file] = _event_file(EventFileLoader(str(file)).Load())
        if any("Truncated record" in text for text in remarks):
            last = max((step for _, step, _ in scalars[file]), default=0)
            report.told(f"{shown(file.name)} is cut or damaged after step {last}")
        report.files += 1
        begun.append((time, file.name, file))
    # In time, not by name: by name, the tenth file of a second comes before its ninth.
    for file in _last_start({file: scalars[file] for *_, file in sorted(begun)}, report):
        for tag, step, number in scalars[file]:
            sink.log.number(tag, step, number, "tensorboard")


def _event_file(events: Iterable[Any]) -> tuple[float, list[Scalar]]:
    """When an event file was begun, seconds since 1970, and its scalars of steps from 0 on."""
    begun, found = 0.0, []
    for event in events:
        begun = begun or event.wall_time
        for value in event.summary.value if event.step >= 0 else ():
            number = _scalar(value)
            if number is not None:
                found.append((value.tag, event.step, number))
    return begun, found


def _last_start(scalars: Mapping[Path, Sequence[Scalar]], report: ImportReport) -> list[Path]:
    """Event files of the last start in a folder that has a log to judge, with what it went on from.

    A file that begins later than those before it, or has other names, is of the same start.
    """
    steps = {file: {step for _, step, _ in found} for file, found in scalars.items()}
    names = {file: {name for name, _, _ in found} for file, found in scalars.items()}
    starts: list[list[Path]] = [[]]
    for file, found in steps.items():
        alike = [min(steps[f]) for f in starts[-1] if names[f] & names[file]]
        if found and alike and min(found) <= min(alike):
            starts.append([])
        starts[-1].append(file)
    sizes = [len(set().union(*(steps[f] for f in files))) for files in starts]
    long = [n for n, size in enumerate(sizes) if size >= _LONG_ENOUGH]
    best = long[-1] if long else max(range(len(starts)), key=lambda n: (sizes[n], n))
    others = [f.name for n, files in enumerate(starts) for f in files if n != best and steps[f]]
    if others:
        report.told(
            f"{len(starts)} starts are in this folder; read is {shown(starts[best][-1].name)}, the "
            f"last with {min(sizes[best], _LONG_ENOUGH)} steps or more; name another file to read "
            f"it: {few(map(shown, others), 3)}"
        )
    return starts[best]


def _scalar(value: Any) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor") and value.metadata.plugin_data.plugin_name in ("", "scalars"):
        from tensorboard.util import tensor_util

        array = tensor_util.make_ndarray(value.tensor)
        return float(array.item()) if array.size == 1 and array.dtype.kind in "fiu" else None
    return None


def _common(folders: Iterable[str]) -> Path:
    paths = [Path(folder) for folder in folders]
    return next(
        (p for p in [paths[0], *paths[0].parents] if all(q.is_relative_to(p) for q in paths)),
        paths[0],
    )


@contextmanager
def _listening(name: str) -> Iterator[list[str]]:
    """What a library remarks, not shown: it ends at a damaged record without an error."""
    remarks: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: remarks.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield remarks
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def read_download(file: Path, sink: Sink, report: ImportReport, alone: bool = True) -> None:
    """Read one scalar downloaded from TensorBoard: the metric is in the name of the file alone.

    Raises UserError if neither the name nor ``--map`` tells the metric of a file that is alone.
    """
    column = next((ours for ours, theirs in sink.names.mapping.items() if theirs == "Value"), None)
    metric = "Value" if column else metric_of(file.stem)
    if metric is None and not alone:
        metric = file.stem.rpartition("-tag-")[2]
    if metric is None:
        raise UserError(
            f"{printable(shown(file.name))} is a scalar downloaded from TensorBoard, and its name "
            f"does not tell which; say so, as in {map_option({'entropy': 'Value'})}"
        )
    report.told(f"{printable(shown(file.name))} is read as {column or metric}")
    for number, step, value in _download(file, report):
        row = {"step": step, metric: value}
        if as_step(step) is None or as_number(value) is None:
            report.bad_line(file, number, "no step or no value")
        else:
            sink.add_log(row, "tensorboard", (file, number))


def _download(file: Path, report: ImportReport) -> Iterator[tuple[int, Any, Any]]:
    """Rows of a downloaded scalar, CSV or JSON: number, step, value."""
    if file.suffix == ".csv":
        for first, frame in csv_frames(file, report):
            pairs = zip(frame["Step"], frame["Value"], strict=True)
            yield from ((n, s, v) for n, (s, v) in enumerate(pairs, start=first))
        return
    report.files += 1
    for number, row in enumerate(json_value(file, report), start=1):
        report.lines += 1
        cells = row if isinstance(row, list) and len(row) == 3 else (None, None, None)
        yield number, cells[1], cells[2]


#: Names that end those of other metrics: val_acc, prompt_len.
LOOSE = {"acc", "accuracy", "len", "success_rate", "solve_rate"}


def metric_of(stem: str) -> str | None:
    """Known metric that a file name ends with; slashes are written as underscores there."""
    low = re.sub(r"[^a-z0-9]+", "_", stem.lower())
    best = ""
    for row in rows_of("steps"):
        for name in (row.column, *row.names):
            name = name.replace("*/", "all/", 1) if name.startswith("*/") else name
            if row.column == "step" or any(
                mark in name for mark in ("*", "NAME", "1 - ", "DATASET")
            ):
                continue
            tail = re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("all/"))
            before = ("_tag_", "train_") if name in LOOSE else ("_",)
            fits = low == tail or low.endswith(tuple(word + tail for word in before))
            # A name that begins with anything counts where no other fits.
            better = len(name) > len(best) and not (best and name.startswith("all/"))
            best = name if fits and (better or best.startswith("all/")) else best
    return best or None


# ---- MLflow


def read_mlflow(
    files: tuple[Path, ...], sink: Sink, report: ImportReport, chosen: str | None = None
) -> None:
    """Read a run of MLflow's file store: ``metrics/NAME``, a line ``time value step`` a number.

    Raises UserError if there are several runs and none was chosen.
    """
    runs: dict[str, list[tuple[str, Path]]] = {}
    for file in files:
        above = [parent.name for parent in file.parents]
        inside = "metrics" in above
        folder = file.parents[above.index("metrics")] if inside else file.parent
        name = file.relative_to(folder).as_posix()
        runs.setdefault(str(folder.parent if inside else folder), []).append((name, file))
    run = pick(sorted(runs), chosen, _common(runs))
    for name, file in runs[run]:
        report.files += 1
        for number, line in text_lines(file):
            report.lines += 1
            parts = line.split()
            value = as_number(parts[1]) if len(parts) == 3 else None
            step = as_step(parts[2]) if len(parts) == 3 else None
            if value is None or step is None:
                report.bad_line(file, number, "not a time, a number and a step")
            else:
                sink.log.number(name, step, value, "mlflow")


# ---- W&B


def is_panel(names: Sequence[str]) -> bool:
    """Whether the columns of a table are those of a chart downloaded from W&B."""
    rest = [name for name in names if name not in ("Step", "_step") and not name.startswith(_TIMES)]
    return bool(rest) and all(_PANEL.fullmatch(name) for name in rest) and len(rest) < len(names)


def read_panel(file: Path, sink: Sink, report: ImportReport, chosen: str | None = None) -> None:
    """Read a chart downloaded from W&B: columns ``run - metric``, with ``__MIN`` and ``__MAX``.

    Raises UserError if it holds several runs and none was chosen.
    """
    names, _ = csv_header(file)
    parts = {name: found for name in names if (found := _PANEL.fullmatch(name))}
    runs = list(dict.fromkeys(found["run"] for found in parts.values()))
    run = pick(runs, chosen, file)
    wanted = {
        name: found["metric"] for name, found in parts.items()
        if found["run"] == run and found["end"] is None
    }  # fmt: skip
    counters = [name for name in names if name not in parts and not name.startswith(_TIMES)]
    counters += [name for name, metric in wanted.items() if metric == "_step"]
    counter = (counters or names)[0]
    for first, frame in csv_frames(file, report):
        for number, values in enumerate(frame.to_dict("records"), start=first):
            row = {metric: values[name] for name, metric in wanted.items() if _there(values[name])}
            row.pop("_step", None)
            if row and _there(values[counter]):
                sink.add_log({**row, "step": values[counter]}, "wandb", (file, number))


def _there(value: Any) -> bool:
    return value is not None and value == value


def read_wandb(
    files: tuple[Path, ...], sink: Sink, report: ImportReport, chosen: str | None = None
) -> None:
    """Read a run folder of W&B: its ``.wandb`` file, else what is under ``files/``.

    Raises UserError if there are several runs and none was chosen.
    """
    runs: dict[str, list[Path]] = {}
    for file in files:
        folder = file.parent.parent if file.parent.name == "files" else file.parent
        runs.setdefault(str(folder.resolve()), []).append(file)
    mine = runs[pick(sorted(runs), chosen, _common(runs))]
    binary = [file for file in mine if file.suffix == ".wandb"]
    if binary and _read_binary(binary[0], sink, report):
        return
    if binary:
        beside = [binary[0].parent / "files" / n for n in ("output.log", "wandb-summary.json")]
        mine = list(dict.fromkeys([*mine, *(file for file in beside if file.is_file())]))
    logs = [file for file in mine if file.name == "output.log"]
    if binary:
        report.note(
            f"{binary[0].name} is read by wandb 0.19 to 0.29 (0.30 took its reader away): "
            "pip install 'wandb<0.30', or export the history from its page"
        )
    if logs:
        report.told("the run's history is in its .wandb file; read is what the trainer printed")
        read_console(tuple(logs), sink, report)
        return
    for file in [file for file in mine if file.name == "wandb-summary.json"]:
        summary = read_json(file)
        report.told("only the summary was found: the last value of each metric, one step")
        sink.add_log(summary if isinstance(summary, dict) else {}, "wandb", (file, 1))
        report.files += 1


def _read_binary(file: Path, sink: Sink, report: ImportReport) -> bool:
    """Read the history of a ``.wandb`` file; returns whether the library is there."""
    try:
        from wandb.proto import wandb_internal_pb2
        from wandb.sdk.internal.datastore import DataStore
    except ImportError:
        return False
    store = DataStore()
    number = 0
    folder = tempfile.TemporaryDirectory(prefix="wapo-wandb-")
    try:
        # It opens a file for writing as well; ours is only read, and may be read-only.
        store.open_for_scan(shutil.copyfile(file, Path(folder.name) / "run.wandb"))
        while (data := store.scan_data()) is not None:
            number += 1
            entry = wandb_internal_pb2.Record()
            entry.ParseFromString(data)
            if entry.WhichOneof("record_type") == "history":
                row = _history(entry.history, file, number, report)
                if row:
                    report.lines += 1
                    sink.add_log(row, "wandb", (file, number))
    except Exception as error:  # a file cut in its last block raises assertions of the library
        why = type(error).__name__
        report.told(f"{shown(file.name)} ends after record {number} ({why}): read up to there")
    finally:
        store.close()
        folder.cleanup()
    report.files += 1
    return True


def _history(history: Any, file: Path, number: int, report: ImportReport) -> Mapping[str, Any]:
    row: dict[str, Any] = {}
    for item in history.item:
        name = item.key or "/".join(item.nested_key)
        try:
            row[name] = parse_json(item.value_json)
        except ValueError:
            report.count("values of a W&B history that are no JSON", file, number)
    if "_step" not in row and history.HasField("step"):
        row["_step"] = history.step.num
    media = [name for name, value in row.items() if isinstance(value, dict) and "_type" in value]
    return {name: value for name, value in row.items() if name not in media}
