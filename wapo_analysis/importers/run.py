"""One import from beginning to end: detect, read, write beside the target, rename."""

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wapo_analysis import __version__
from wapo_analysis.errors import UserError, few, printable, unknown_name
from wapo_analysis.importers import boards, logs, official, prime_rl
from wapo_analysis.importers.console import read_console
from wapo_analysis.importers.detect import Found, detect
from wapo_analysis.importers.mapping import (
    VITAL,
    NameTable,
    check_mapping,
    is_supervised,
    map_option,
    nearest,
)
from wapo_analysis.importers.report import MOST, ImportReport, shown
from wapo_analysis.importers.sink import Sink
from wapo_analysis.importers.tables import read_tables
from wapo_analysis.store import Manifest, RunWriter, open_run
from wapo_analysis.store.files import check_new


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What a source does not say about itself.

    Attributes
    ----------
    format : str
        ``"auto"`` or one of ``FORMATS``.
    mapping : mapping of str to str
        Column of ours to the name it has in the source; goes before the known names.
    run : str, optional
        Which of several runs of a source, by its name or a part of it.
    name, label : str, optional
        Name of the run, and of its setting in legends.
    objective : str
        Name of the objective.
    temperature : float
        Softmax temperature the statistics were taken at.
    seed : int, optional
        Seed, which pairs runs in a comparison.
    """

    format: str = "auto"
    mapping: Mapping[str, str] = field(default_factory=dict)
    run: str | None = None
    name: str | None = None
    label: str | None = None
    objective: str = "unknown"
    temperature: float = 1.0
    seed: int | None = None

    def options(self) -> tuple[str, ...]:
        """The options that say the same of the source on a command line."""
        pairs = (f"{ours}={theirs}" for ours, theirs in self.mapping.items())
        chosen = () if self.run is None else ("--run", self.run)
        return (*(word for pair in pairs for word in ("--map", pair)), *chosen)


def import_run(
    source: str | Path, out: str | Path, settings: ImportSettings | None = None
) -> ImportReport:
    """Turn what another tool wrote into a run folder.

    Parameters
    ----------
    source : str or Path
        File or folder; never changed.
    out : str or Path
        Run folder to make; must not exist or be empty.
    settings : ImportSettings, optional
        What the source does not say.

    Returns
    -------
    ImportReport
        What was found, kept and left out; also in the manifest under ``import``.

    Raises
    ------
    UserError
        If the source is empty, mixed, unknown or broken as a whole, holds nothing usable, or the
        folder exists. Nothing is left behind then.
    """
    chosen = settings or ImportSettings()
    check_mapping(chosen.mapping)
    if not chosen.temperature > 0:
        raise UserError(f"temperature must be positive, got {chosen.temperature}")
    origin, target = Path(source), Path(out)
    if not origin.exists():  # nor can a link that leads to itself be resolved
        raise UserError(f"nothing at {printable(shown(origin))}")
    check_new(target)
    with tempfile.TemporaryDirectory(prefix="wapo-import-") as unpacked:
        names = NameTable(chosen.mapping)
        found = detect(origin.resolve(), chosen.format, Path(unpacked), names)
        if origin.is_dir() and target.resolve().is_relative_to(origin.resolve()):
            raise UserError(f"{target} lies inside the source, which is only read; choose another")
        return _into(target, lambda folder: _write(folder, found, origin, target, chosen))


def _into(target: Path, write: Callable[[Path], ImportReport]) -> ImportReport:
    """Write a folder beside its place and rename it, so that it is whole or absent."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    try:
        beside.chmod(0o755)
        report = write(beside)
        try:
            os.replace(beside, target)
        except OSError as error:  # another process may have been faster
            raise UserError(f"cannot write {target}: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return report


def _write(
    folder: Path, found: Found, origin: Path, target: Path, chosen: ImportSettings
) -> ImportReport:
    report = ImportReport(found.format, shown(origin), shown(target))
    names = NameTable(chosen.mapping)
    writer = RunWriter(folder, _manifest(chosen, target))
    sink = Sink(writer, report, names, chosen.temperature)
    try:
        _read(found, sink, report, chosen.run)
        sink.finish()
        _check(report, sink)
        report.events += [text for text in found.told if text not in report.events]
        if found.left:
            left = ", ".join(shown(file.name) for file in found.left[:4])
            report.told(f"also there, not read: {left}; name one to read it instead")
        report.cannot_feed = _cannot_feed(folder, sink.held)
        writer.update_manifest(**{"import": report.to_dict(), "trainer": report.trainer})
    finally:
        writer.close("finished")
    return report


def _check(report: ImportReport, sink: Sink) -> None:
    """Refuse an import that holds nothing; say first what its reader must know.

    Raises UserError if there is no row at all, or a name of the user's mapping does not occur.
    """
    if not (report.steps or report.token_rows):  # completions make steps
        raise UserError(_nothing(report, sink))
    if lost := sink.names.never_seen():
        name = lost[0].partition("=")[2]
        raise unknown_name(f"name of {report.source} in --map", name, _names(report))
    _raise_alarms(report)


def _read(found: Found, sink: Sink, report: ImportReport, run: str | None) -> None:
    """Hand the files of a source to their readers."""
    if found.format == "official":
        official.read_official(found.files, sink, report)
    elif found.format == "prime-rl":
        prime_rl.read_prime_rl(found.files, sink, report)
    read_tables(_named(found.of("table"), run), sink, report, run)
    read_console(_named(found.of("console"), run), sink, report)
    for file in found.of("verl-metrics"):
        logs.read_verl_metrics(file, sink, report)
    for file in found.of("verl-rollouts"):
        logs.read_verl_rollouts(file, sink, report)
    kinds = {kind: found.of(kind) for kind in ("state", "swift-log", "trainer-log")}
    if found.format == "trl":
        functions = sorted(logs.read_trainer_logs(kinds, sink, report))
        reader = logs.TrainerCompletions(sink, report, functions)
        for file in found.of("completions"):
            reader.read(file)
    _read_boards(found, sink, report, run)


def _named(files: tuple[Path, ...], run: str | None) -> tuple[Path, ...]:
    """Of several files the one whose name is the chosen run, else those that have it in theirs."""
    if run is None or len(files) < 2:
        return files
    same = tuple(file for file in files if run in (file.name, file.stem, str(file)))
    return same or tuple(file for file in files if run in str(file)) or files


def _read_boards(found: Found, sink: Sink, report: ImportReport, run: str | None) -> None:
    events, wandb = found.of("tensorboard"), found.of("wandb", "wandb-file")
    if events:
        boards.read_tensorboard(events, sink, report, run)
    elif metrics := found.of("mlflow"):
        boards.read_mlflow(metrics, sink, report, run)
    elif wandb:
        boards.read_wandb(wandb, sink, report, run)
    else:
        for file in (downloads := found.of("download")):
            boards.read_download(file, sink, report, alone=len(downloads) == 1)
        for file in found.of("panel"):
            boards.read_panel(file, sink, report, run)


def _manifest(chosen: ImportSettings, target: Path) -> Manifest:
    name = chosen.name or shown(target.name)
    known = chosen.objective != "unknown"
    return Manifest(
        name=name,
        source="import",
        label=chosen.label or (chosen.objective.upper() if known else name),
        objective={"name": chosen.objective},
        temperature=chosen.temperature,
        seed=chosen.seed,
        versions={"wapo-analysis": __version__},
    )


#: Likeness of a name that holds a word of the column, not letters alone.
HINTED = 0.9
#: Names that every preference objective of TRL logs (trl/trainer/dpo_trainer.py).
PREFERENCE = {"rewards/chosen", "rewards/rejected"}


def _raise_alarms(report: ImportReport) -> None:
    """Say first what makes an import another thing than its reader would think."""
    kept = report.kept_keys
    if report.broken_lines > MOST * max(report.lines, 1):
        report.alarms.append(
            f"{report.broken_lines} of {max(report.lines, report.broken_lines)} lines were not read"
        )
    if report.token_rows or report.rollouts:
        return
    if not report.mapped.keys() & {"reward", "entropy"} and is_supervised(kept):
        report.alarms.append(
            "this is the log of supervised fine-tuning (it holds the accuracy of given tokens and "
            "no reward): nothing is sampled there, so there is no reward or entropy of a policy "
            "to diagnose"
        )
        return
    if "reward" not in report.mapped and PREFERENCE <= {k.removeprefix("train/") for k in kept}:
        report.alarms.append(
            "rewards/chosen and rewards/rejected are of a preference objective (as DPO): nothing "
            "is sampled there, so there is no reward or entropy of a policy to diagnose"
        )
        return
    if report.mapped.keys() & set(VITAL):
        if "reward" in report.mapped:
            return
        if "entropy" in report.mapped:
            said, likely = "no reward", nearest(report.kept_keys, ("reward",), HINTED)
        else:
            said = "neither reward nor entropy"
            likely = nearest(report.kept_keys, ("reward", "entropy"))
        if likely:
            asked = "these are what they look" if len(likely) > 1 else "this is what it looks"
            report.alarms.append(f"{said} was found; if {asked} like: {map_option(likely)}")
        return
    text = f"no column of {', '.join(VITAL)} was found, so there is nothing to diagnose"
    if report.kept_keys:
        text += f"; numbers there: {few(map(printable, _names(report)), 30)}"
        if likely := nearest(report.kept_keys):
            text += f"; if they are what they look like: {map_option(likely)}"
    report.alarms.append(text)


def _nothing(report: ImportReport, sink: Sink) -> str:
    """Why nothing was imported, and the option that would change that."""
    said = f"nothing to import from {report.source}: "
    if sink.step_candidates:
        (key, first), *others = sink.step_candidates.items()
        shown_first = ", ".join(f"{number:g}" for number in first)
        likely = nearest(
            [name for name in sink.unstepped_names if name not in sink.step_candidates]
        )
        also = f" {map_option(likely)}" if likely and not sink.knows_any else ""
        more = f"; or one of {', '.join(printable(k) for k, _ in others[:5])}" if others else ""
        return (
            f"{said}no record has a step (looked for step, global_step, ...); "
            f"{map_option({'step': key})}{also} takes {printable(key)} ({shown_first}, ...){more}"
        )
    why = "".join(f"; {text}" for text in [*report.events, *report.notes][:2])
    if sink.stepless and sink.stepless == report.broken_lines:
        many = f"its {sink.stepless} records have" if sink.stepless > 1 else "its record has"
        hold = ", ".join(sink.unstepped_names[:6])
        hold = f" (numbers: {hold})" if hold else " and no number"
        said += f"{many} no step{hold}, so it is no log of a training: results or data{why}"
        return printable(said)
    if report.broken:
        why = f"; first broken line: {report.broken[0]}{why}"
    return printable(f"{said}no step, token row or rollout{why}")


def _names(report: ImportReport) -> list[str]:
    return sorted({*report.mapped.values(), *report.kept_keys, *report.unknown_keys})


def _cannot_feed(folder: Path, held: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Figures the run cannot feed, each with the reason; ``held`` are its columns by table."""
    from wapo_analysis.plots import FIGURES, unavailable

    run = open_run(folder)
    for table in ("steps", "classes"):  # need not be read to be known
        run.held[table] = frozenset(held[table]) if table in held else None
    if "logp_after" not in held.get("tokens", ()):
        run.held["tokens re-scored"] = None
    reasons = {name: unavailable(spec, [run]) for name, spec in FIGURES.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
