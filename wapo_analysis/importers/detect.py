"""Which tool wrote a source, told by its files; two tools in one source are an error."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.importers.jsonl import JsonLines
from wapo_analysis.importers.tabular import SUFFIXES
from wapo_analysis.store import MANIFEST

Format = Literal["official", "prime-rl", "verl", "trl", "table"]
FORMATS: tuple[str, ...] = get_args(Format)
MAX_FILES = 200_000

_SCATTER = re.compile(r"scatter_step_\d+\.npz")
_OFFICIAL_FOLDERS = ("token_bins", "grad_mass", "token_count", "token_strength", "rewards")
_COMPLETIONS = re.compile(r"completions_\d+\.parquet")
_OFFICIAL_KEYS = ("groups/with_correct", "prob_train_mean", "masking/neg_adv_seq_fraction")


@dataclass(frozen=True)
class Found:
    """What a source is.

    Attributes
    ----------
    format : str
        One of ``FORMATS``.
    files : tuple of Path
        The files that tell it; for tables the files to read.
    """

    format: Format
    files: tuple[Path, ...]


def detect(source: Path, wanted: str = "auto") -> Found:
    """Format of a file or folder.

    Parameters
    ----------
    source : Path
        What the user named.
    wanted : str
        ``"auto"``, or a format that overrides what is found.

    Raises
    ------
    UserError
        If there is nothing to import, the source is a run already, the format is unknown or not
        there, or files of two formats are mixed (the message names one of each).
    """
    if wanted != "auto" and wanted not in FORMATS:
        raise unknown_name("format", wanted, ("auto", *FORMATS))
    if not source.exists():
        raise UserError(f"nothing at {source}")
    if (source / MANIFEST).exists():
        raise UserError(f"{source} is a run already; it needs no import")
    files = [source] if source.is_file() else list(_files(source))
    if not any(_size(file) for file in files):
        raise UserError(f"{source} is empty: there is nothing to import")
    found = _sorted_out(files)
    if wanted != "auto":
        return Found(cast(Format, wanted), _wanted_files(found, wanted, files, source))
    if not found:
        raise UserError(
            f"no known file in {source}; name the format with --format ({', '.join(FORMATS)})"
        )
    if len(found) > 1:
        (first, one), (second, two) = list(found.items())[:2]
        raise UserError(
            f"{source} mixes formats: {one[0].name} is {first}, {two[0].name} is {second}; "
            "name one of the folders, or choose with --format"
        )
    ((name, told),) = found.items()
    return Found(cast(Format, name), tuple(told))


def _wanted_files(
    found: Mapping[str, list[Path]], wanted: str, files: list[Path], source: Path
) -> tuple[Path, ...]:
    if wanted == "table":
        tables = [file for file in files if file.suffix in SUFFIXES and _size(file)]
        if not tables:
            raise UserError(f"no table in {source}; known: {', '.join(SUFFIXES)}")
        return tuple(tables)
    if wanted not in found:
        told = f"; it looks like {', '.join(found)}" if found else ""
        raise UserError(f"nothing of format {wanted!r} in {source}{told}")
    return tuple(found[wanted])


def _files(folder: Path) -> Iterator[Path]:
    """Files at or below a folder in the order of their names, hidden ones left out."""
    count = 0
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            yield file
            count += 1
            if count >= MAX_FILES:
                raise UserError(f"{folder} holds more than {MAX_FILES} files; name a part of it")


def _size(file: Path) -> int:
    return file.stat().st_size


def _sorted_out(files: list[Path]) -> dict[str, list[Path]]:
    """Files by the format they tell; a folder's minor files follow its telling ones."""
    found: dict[str, list[Path]] = {}
    for file in files:
        name = _by_name(file)
        if name is not None:
            found.setdefault(name, []).append(file)
    strong = [name for name in found if name != "state"]
    # A trainer_state.json is written by every trainer built on Transformers: it tells a tool only
    # where no other file does.
    states = found.pop("state", [])
    if strong == ["official"]:
        return found
    for file in states:
        found.setdefault(_state_format(file), []).append(file)
    if not found:
        for file in files:
            if file.suffix in SUFFIXES and _size(file):
                found.setdefault(_by_content(file), []).append(file)
    return found


def _by_name(file: Path) -> str | None:
    parents = [*(parent.name for parent in file.parents), "", ""]
    holder = parents[1] if file.parent.name in _OFFICIAL_FOLDERS else parents[0]
    telling = file.parent.name in _OFFICIAL_FOLDERS or _SCATTER.fullmatch(file.name)
    if telling and holder == "data":
        return "official"
    if file.name.endswith((".jsonl", ".jsonl.zst")) and _is_prime(file.name, parents):
        return "prime-rl"
    if file.name == "trainer_state.json":
        return "state"
    if _COMPLETIONS.fullmatch(file.name):
        return "trl"
    if file.suffix == ".jsonl" and _size(file) and _by_content(file) != "table":
        return _by_content(file)
    return None


def _is_prime(name: str, parents: list[str]) -> bool:
    if name.startswith("rank_"):
        return "token_exports" in parents[:2]
    if name == "metrics.jsonl":
        return parents[:2] == ["file", "monitors"]
    # traces/stream.jsonl, traces/annotations/trainer.jsonl, or folders of numbered parts.
    stream = name.startswith("stream.") or parents[0] == "stream"
    return "traces" in parents[:3] and (stream or "annotations" in parents[:2])


def _state_format(file: Path) -> Format:
    """Official trainers log names that TRL does not."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return "official" if any(f'"{key}"' in text for key in _OFFICIAL_KEYS) else "trl"


def _by_content(file: Path) -> Format:
    if file.suffix not in (".jsonl", ".ndjson"):
        return "table"
    first = first_record(file)
    if {"trainer_logprobs", "inference_logprobs", "loss_mask"} <= first.keys():
        return "prime-rl"
    if isinstance(first.get("data"), dict) and "step" in first:
        return "verl"
    if {"input", "output", "score"} <= first.keys():
        return "verl"
    return "table"


def first_record(file: Path) -> dict[str, Any]:
    """First object in a file of JSON lines; empty if there is none."""
    log = JsonLines(file)
    record = next(log.records(), None)
    return record.values if record is not None else log.tail()[0] or {}
