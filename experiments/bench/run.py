"""Running the areas and putting their numbers into one result."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from experiments.bench.errors import GateError
from experiments.bench.harness import Measures, keep_memory, machine, release_memory
from experiments.bench.options import Options
from wapo_analysis import __version__
from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.store import write_atomic

QUICK_AREAS = ("errors", "stats", "memory", "head", "step", "store", "read")
AREAS = (*QUICK_AREAS, "attribution", "passive", "waiting")
"""Modules of this package that measure, each with ``measure(options)``."""


def run_bench(
    options: Options,
    only: Iterable[str] = (),
    threads: int = 1,
    command: str = "python -m experiments.bench",
) -> dict[str, Any]:
    """Measure all areas, or some.

    Parameters
    ----------
    options : Options
    only : iterable of str
        Areas; none takes all (of a quick bench those of the headline numbers).
    threads : int
        CPU threads of torch while measuring.
    command : str
        What the user typed, for the page.

    Returns
    -------
    dict
        ``machine``, ``measures`` and ``failures`` (area -> why it gave no numbers);
        every measure also stands at the top level by its name.

    Raises
    ------
    UserError
        On an unknown area.
    """
    areas = tuple(only) or (QUICK_AREAS if options.quick else AREAS)
    for area in areas:
        if area not in AREAS:
            raise unknown_name("area", area, AREAS)
    before, started = torch.get_num_threads(), perf_counter()
    torch.set_num_threads(threads)
    facts = {**machine(), "memory": "kept" if keep_memory() else "default allocator"}
    try:
        measures, failures = _measure(areas, options)
    finally:
        torch.set_num_threads(before)
    return {
        "version": __version__,
        "command": command,
        "quick": options.quick,
        "seconds": round(perf_counter() - started, 1),
        "machine": {**facts, "load_after": machine()["load"]},
        "failures": failures,
        "measures": {name: asdict(found) for name, found in measures.items()},
        **{name: found.value for name, found in measures.items()},
    }


def _measure(areas: tuple[str, ...], options: Options) -> tuple[Measures, dict[str, str]]:
    """Numbers of each area; one that fails says why, the others go on."""
    measures: Measures = {}
    failures: dict[str, str] = {}
    for area in areas:
        work: Callable[[Options], Measures] = import_module(f"experiments.bench.{area}").measure
        try:
            measures |= work(options)
        except UserError:
            raise
        except Exception as error:  # minutes of other areas must not be lost with it
            failures[area] = str(error) if isinstance(error, GateError) else repr(error)
            options.say(f"{area} gave no numbers: {failures[area]}")
        release_memory()
    return measures, failures


def save(results: dict[str, Any], file: Path) -> None:
    """Write results as JSON.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    try:
        write_atomic(file, (json.dumps(results, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def load(file: Path) -> dict[str, Any]:
    """Read results written by `save` or by `experiments.bench.gpu`.

    Raises
    ------
    UserError
        If the file is missing or is no result of a bench.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read bench results from {file}: {error}") from error
    if not isinstance(found, dict) or "measures" not in found or "machine" not in found:
        raise UserError(f"{file} holds no bench results: no 'measures' and 'machine'")
    return found


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of several benches on one machine as one: of a number that two have the later one.

    Raises
    ------
    UserError
        If they are of several processors.
    """
    if len({part["machine"].get("cpu") for part in parts}) > 1:
        raise UserError("these results are of several processors; --second takes the other one")
    found: dict[str, Any] = {}
    for part in parts:
        found = {
            **found,
            **part,
            **{name: found.get(name, {}) | part[name] for name in ("failures", "measures")},
            "machine": {**part["machine"], **found.get("machine", {})},
            "seconds": found.get("seconds", 0) + part["seconds"],
        }
    found["machine"]["load_after"] = parts[-1]["machine"]["load_after"]
    found["command"] = "; ".join(dict.fromkeys(part["command"] for part in parts))
    return found
