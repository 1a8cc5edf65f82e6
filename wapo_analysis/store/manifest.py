"""The manifest of a run: what was run, as one typed object with one reader and one writer.

An entry has one name whatever wrote the run (built-in trainer, TRL, a loop, verl, an import). What
a file holds in another shape than declared is left out and told, never passed on.
"""

import errno
import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import numpy as np

from wapo_analysis.errors import UserError
from wapo_analysis.schema import SCHEMA_VERSION
from wapo_analysis.store.files import (
    CHECKSUM,
    MANIFEST,
    STEP_LOG,
    encodable,
    read_json,
    write_atomic,
)

log = logging.getLogger(__name__)

#: Entry, in memory alone, of a run that was made of a source where that lies: its path.
OPENED_FROM = "opened_from"
#: Entry beside it: the words after the path that say of the source what it does not.
OPENED_WITH = "opened_with"
_OLD_NAMES = {"trainable": "trainable_parameters"}
_INT64 = 2**63
T = TypeVar("T", int, float, str)


# ---- shapes: a value as it is kept, or ValueError with what it should be -------------------------


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError("a text")
    return encodable(str(value))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError("a whole number")
    number = int(value)
    if not -_INT64 <= number < _INT64:
        raise ValueError("a whole number of 64 bits")
    return number


def _count(value: Any) -> int:
    number = _whole(value)
    if number < 0:
        raise ValueError("a whole number from 0")
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError("a number")
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not isfinite(number):
        raise ValueError("a finite number")
    return number


def _positive(value: Any) -> float:
    number = _number(value)
    if not number > 0:
        raise ValueError("a positive number")
    return number


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list | tuple):
        raise ValueError("a list of texts")
    return [_text(item) for item in value]


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _entries(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("a table of entries")
    return {encodable(str(name)): plain(item) for name, item in value.items()}


def _numbers(value: Any) -> dict[str, float]:
    return {name: _number(item) for name, item in _entries(value).items() if item is not None}


def _objective(value: Any) -> dict[str, Any]:
    entries = {"name": value} if isinstance(value, str) else _entries(value)
    shapes: dict[str, Callable[[Any], Any]] = {
        "name": _text,
        "clip_eps": _number,
        "bounds": _bounds,
        "include_bins": _texts,
        "exclude_bins": _texts,
    }
    for name, shape in shapes.items():
        if entries.get(name) is not None:
            try:
                entries[name] = shape(entries[name])
            except ValueError as error:
                raise ValueError(f"a table whose {name} is {error}") from error
    return {name: item for name, item in entries.items() if name != "name" or item is not None}


def _bounds(value: Any) -> list[float | None]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("two numbers")
    return [None if item is None else _number(item) for item in value]


def plain(value: Any) -> Any:
    """Value as JSON has it; what is not finite is null, what JSON has not is its text."""
    if isinstance(value, Mapping):
        return {encodable(str(name)): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, bool | int | None) else encodable(str(value))


def _entry(shape: Callable[[Any], Any], doc: str, *, key: str = "", empty: Any = None) -> Any:
    told = {"shape": shape, "doc": doc, "key": key}
    if isinstance(empty, dict):
        return field(default_factory=dict, metadata=told)
    return field(default=empty, metadata=told)


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest(Mapping[str, Any]):
    """What is known of a run; None or empty where a source does not say.

    It is also a mapping of the entries that are set, under their names in the file, so that
    ``manifest["seed"]`` and ``manifest.get("seed")`` read what ``manifest.seed`` reads. Entries of
    the user's own are in ``extra`` and in the mapping.
    """

    name: str | None = _entry(_text, "name of the run, shown in figures")
    label: str | None = _entry(_text, "name of the setting in legends; seeds of one setting share")
    source: str | None = _entry(_text, "what wrote it: built-in, trl, loop, verl, import")
    trainer: str | None = _entry(_text, "class of the watched trainer")
    objective: dict[str, Any] = _entry(_objective, "name, bounds of the ratio, settings", empty={})
    task: str | None = _entry(_text, "task that was trained on")
    data: dict[str, Any] = _entry(_entries, "data of the task: file, SHA-256, rows", empty={})
    model: str | None = _entry(_text, "model that was trained")
    tokenizer: str | None = _entry(_text, "class of the tokenizer")
    vocabulary: int | None = _entry(_count, "entries of the softmax")
    parameters: int | None = _entry(_count, "parameters of the model")
    trainable_parameters: int | None = _entry(_count, "those that are trained")
    seed: int | None = _entry(_whole, "seed, which pairs runs in a comparison")
    device: str | None = _entry(_text, "device of the first process")
    processes: int | None = _entry(_count, "processes that train together")
    started: str | None = _entry(_text, "time of the start, UTC")
    resumed: list[str] | None = _entry(_texts, "times it was continued, UTC")
    forked: dict[str, Any] = _entry(_entries, "run, step and change of a fork", empty={})
    versions: dict[str, Any] = _entry(_entries, "versions of Python and packages", empty={})
    planned_steps: int | None = _entry(_count, "rollout steps the run is to have")
    config: dict[str, Any] = _entry(_entries, "settings, by the trainer's own names", empty={})
    capture: dict[str, Any] = _entry(_entries, "how statistics are taken: mode, rule", empty={})
    statistics_from: str | None = _entry(_text, "what of a watched trainer gave the statistics")
    tokens_hidden_by: str | None = _entry(_text, "why a trainer's tokens cannot be seen")
    not_in_coef: list[str] | None = _entry(_texts, "parts of the loss that coef does not hold")
    temperature: float | None = _entry(_positive, "softmax temperature of the statistics")
    token_every: int | None = _entry(_count, "token rows of every n-th step; 0 none")
    token_fraction: float | None = _entry(_number, "share of the rollouts with token rows")
    rescore_every: int | None = _entry(_count, "second scoring of every n-th step; 0 none")
    probe_every: int | None = _entry(_count, "probe of every n-th step; 0 none")
    store_bits: int | None = _entry(_count, "mantissa bits of stored float32 columns")
    eval_before: dict[str, float] = _entry(_numbers, "held-out numbers before training", empty={})
    thinned_steps: int | None = _entry(_count, "steps whose token rows were sampled down")
    imported: dict[str, Any] = _entry(
        _entries, "what an import read, kept and left out", key="import", empty={}
    )
    status: str = _entry(_text, "running, or how the run ended", empty="running")
    step_lines: int | None = _entry(_count, "lines of the step log, once the run has ended")
    extra: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, entries: Mapping[str, Any], problems: list[str] | None = None) -> "Manifest":
        """Manifest of plain entries.

        Raises UserError on an entry of another shape, unless ``problems`` is given. ``entries``: by
        their names in the file; older names are understood; ``problems``: takes one sentence for
        each entry of another shape, which is then left out.
        """
        known = {shape.metadata["key"] or shape.name: shape for shape in _declared()}
        given: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for old, value in entries.items():
            name = _OLD_NAMES.get(old, old)
            if name not in known:
                extra[encodable(str(name))] = plain(value)
                continue
            if value is None:
                continue
            try:
                given[known[name].name] = known[name].metadata["shape"](value)
            except ValueError as error:
                told = f"{name} is {_brief(value)}, not {error}"
                if problems is None:
                    raise UserError(f"manifest entry {told}") from error
                problems.append(told)
        for name in ("schema_version", CHECKSUM):
            extra.pop(name, None)
        return cls(**given, extra=extra, problems=tuple(problems or ()))

    @classmethod
    def begun(cls, source: str, packages: tuple[str, ...] = (), **entries: Any) -> "Manifest":
        """Manifest of a run that starts now, with the versions of packages that are installed."""
        found = {"python": platform.python_version()}
        for package in ("wapo-analysis", *packages):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return cls.of({"source": source, "started": started, "versions": found, **entries})

    def changed(self, changes: Mapping[str, Any]) -> "Manifest":
        """Manifest with entries replaced; raises as `of`."""
        return Manifest.of({**self, **changes})

    def setting(self, name: str, default: T, least: Any = None, below: Any = None) -> T:
        """Setting of the trainer, of the kind of its default; the default where it has none.

        Raises UserError if the run gives another kind of value, or one that is not in [least,
        below).
        """
        value = self.config.get(name)
        if value is None:
            return default
        shapes: dict[type, Callable[[Any], Any]] = {int: _whole, float: _number, str: _word}
        try:
            found: T = shapes[type(default)](value)
            if (least is not None and found < least) or (below is not None and found >= below):
                raise ValueError(f"in [{least}, {below})")
        except ValueError as error:
            told = f"setting {name} of run {self.name} is {_brief(value)}, not {error}"
            raise UserError(told) from error
        return found

    def to_dict(self) -> dict[str, Any]:
        """Entries that are set, as JSON has them."""
        named = {
            shape.metadata["key"] or shape.name: getattr(self, shape.name) for shape in _declared()
        }
        kept = {name: value for name, value in named.items() if value not in (None, {})}
        return {"schema_version": SCHEMA_VERSION, **kept, **self.extra}

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())


def described(path: Path, entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Entries of a run that begins; where no source is named it is a loop, named as its folder."""
    if "source" in entries:
        return entries
    begun = Manifest.begun("loop", ("torch",), name=path.name, label=path.name)
    return begun.changed(entries)


def _declared() -> "list[Any]":
    return [shape for shape in fields(Manifest) if shape.metadata]


def _brief(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return "a table" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


# ---- the file ------------------------------------------------------------------------------------


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a run folder atomically, with a checksum of its entries."""
    entries = manifest.to_dict()
    text = json.dumps({**entries, CHECKSUM: _checksum(entries)}, indent=1).encode()
    try:
        write_atomic(path / MANIFEST, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (path / MANIFEST).exists():
            raise
        # No room for a second file: how the run ended is worth more than the old manifest.
        with (path / MANIFEST).open("r+b") as there:
            there.write(text)
            there.truncate()


def read_manifest(path: Path, tell: bool = True) -> Manifest:
    """Manifest of a run folder; entries of another shape are left out and, with ``tell``, logged.

    Raises UserError if the folder is missing, is no run, is broken, is of another schema version,
    or gives a temperature that is none.
    """
    file = path / MANIFEST
    if not path.exists():
        raise UserError(f"no run folder at {path}: there is no such file or folder")
    if not path.is_dir():
        raise UserError(f"no run folder at {path}; give a folder written by wapo train or attach")
    if not file.exists():
        inside = sorted(p.parent.name for p in path.glob(f"*/{MANIFEST}"))
        hint = f"; runs inside it: {', '.join(inside)}" if inside else ""
        raise UserError(f"{path} is not a run: it has no {MANIFEST}{hint}")
    entries = read_json(file)
    found = entries.get("schema_version") if isinstance(entries, dict) else None
    if not isinstance(entries, dict) or not isinstance(found, int) or isinstance(found, bool):
        raise UserError(f"{file} has no schema_version; it is no manifest of a run")
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {found}; this installation reads version {SCHEMA_VERSION}"
        )
    for name in (OPENED_FROM, OPENED_WITH):
        entries.pop(name, None)
    problems: list[str] = []
    if CHECKSUM in entries and entries[CHECKSUM] != _checksum(entries):
        problems.append("its entries do not match their checksum: edited or damaged")
    manifest = Manifest.of(entries, problems)
    wrong = next((told for told in problems if told.startswith("temperature ")), None)
    if wrong is not None:  # every derived number depends on it
        raise UserError(f"{file}: {wrong}")
    for told in problems if tell else ():
        log.warning("%s: %s", file, told)
    return manifest


def is_run(path: Path) -> bool:
    """Whether a folder is a run of ours, be it a damaged one.

    Other tools write a ``manifest.json`` too; theirs has neither our entries nor a step log.
    """
    if not (path / MANIFEST).exists():
        return False
    try:
        entries = read_json(path / MANIFEST)
    except UserError:
        return True
    ours = not isinstance(entries, dict) or bool({"source", "objective", CHECKSUM} & entries.keys())
    return ours or (path / STEP_LOG).exists()


def _checksum(entries: Mapping[str, Any]) -> str:
    """CRC-32 of the entries, whatever their order and spacing."""
    named = {name: value for name, value in entries.items() if name != CHECKSUM}
    return f"{crc32(json.dumps(named, sort_keys=True).encode()):08x}"
