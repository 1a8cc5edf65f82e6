"""One import from beginning to end: detect, read, write beside the target, rename."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wapo_analysis.errors import UserError
from wapo_analysis.importers import official, prime_rl, trl_files, verl
from wapo_analysis.importers.detect import Found, detect
from wapo_analysis.importers.names import NameTable, check_mapping
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.sink import Sink
from wapo_analysis.importers.tabular import read_tables
from wapo_analysis.store import Manifest, Need, RunWriter, open_run
from wapo_analysis.version import __version__

Reader = Callable[[tuple[Path, ...], Sink, ImportReport], None]


def _read_tables(files: tuple[Path, ...], sink: Sink, report: ImportReport) -> None:
    read_tables(list(files), sink, report)


_READERS: Mapping[str, Reader] = {
    "official": official.read_official,
    "prime-rl": prime_rl.read_prime_rl,
    "verl": verl.read_verl,
    "trl": trl_files.read_trl,
    "table": _read_tables,
}
_LACKS: Mapping[str, Mapping[str, str]] = {
    "official": official.LACKS,
    "prime-rl": prime_rl.LACKS,
    "verl": verl.LACKS,
    "trl": trl_files.LACKS,
    "table": {},
}


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What a source does not say about itself.

    Attributes
    ----------
    format : str
        ``"auto"`` or one of ``FORMATS``.
    mapping : mapping of str to str
        Column of ours to the name it has in the source; goes before the known names.
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
    mapping: Mapping[str, str]
    name: str | None = None
    label: str | None = None
    objective: str = "unknown"
    temperature: float = 1.0
    seed: int | None = None


def import_run(
    source: str | Path,
    out: str | Path,
    settings: ImportSettings | None = None,
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
    chosen = settings or ImportSettings(mapping={})
    check_mapping(chosen.mapping)
    if not chosen.temperature > 0:
        raise UserError(f"temperature must be positive, got {chosen.temperature}")
    origin, target = Path(source), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; choose another --out or delete it")
    found = detect(origin.resolve(), chosen.format)
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
        os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return report


def _write(
    folder: Path, found: Found, origin: Path, target: Path, chosen: ImportSettings
) -> ImportReport:
    report = ImportReport(found.format, str(origin), str(target))
    names = NameTable(chosen.mapping)
    writer = RunWriter(folder, _manifest(chosen, target))
    sink = Sink(writer, report, names, chosen.temperature)
    try:
        _READERS[found.format](found.files, sink, report)
        sink.finish()
    finally:
        writer.close("finished")
    if not (report.steps or report.token_rows or report.rollouts):
        raise UserError(_nothing(origin, report))
    lost = names.never_seen()
    if lost:
        raise UserError(f"--map {lost[0]}: no such name in {origin}; names there: {_some(report)}")
    report.cannot_feed = _cannot_feed(folder, found.format)
    writer.update_manifest(**{"import": report.to_dict()})
    return report


def _manifest(chosen: ImportSettings, target: Path) -> Manifest:
    name = chosen.name or target.name
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


def _nothing(origin: Path, report: ImportReport) -> str:
    broken = f"; first broken line: {report.broken[0]}" if report.broken else ""
    notes = f"; {report.notes[0]}" if report.notes else ""
    return f"nothing to import from {origin}: no step, token row or rollout{broken}{notes}"


def _some(report: ImportReport) -> str:
    names = sorted({*report.mapped.values(), *report.kept_keys, *report.unknown_keys})
    return ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")


def _cannot_feed(folder: Path, format: str) -> dict[str, str]:
    """Figures the run cannot feed, each with the reason."""
    from wapo_analysis.plots import FIGURES, unavailable

    run = open_run(folder)
    reasons: dict[str, str] = {}
    for name, spec in FIGURES.items():
        lack = unavailable(spec, [run])
        if lack is None:
            continue
        why = [_why(need, _LACKS[format]) for need in spec.needs]
        told = next((reason for reason in why if reason), None)
        reasons[name] = f"{lack} ({told})" if told else lack
    return reasons


def _why(need: Need, lacks: Mapping[str, str]) -> str | None:
    """Reason of a format for a need, said of the column or of its table."""
    return lacks.get(f"{need.table}.{need.column}") or lacks.get(need.table)
