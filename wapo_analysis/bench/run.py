"""Running the areas and putting their numbers into one result."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from wapo_analysis.bench.errors import GateError
from wapo_analysis.bench.goals import judge
from wapo_analysis.bench.harness import Measures, keep_memory, machine, release_memory
from wapo_analysis.bench.options import Options
from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.store import write_atomic
from wapo_analysis.version import __version__

QUICK_AREAS = ("errors", "stats", "memory", "head", "step", "store", "read")
AREAS = (*QUICK_AREAS, "attribution", "passive")
"""Modules of this package that measure, each with ``measure(options)``."""


def run_bench(
    options: Options, only: Iterable[str] = (), threads: int = 1, command: str = "wapo bench"
) -> dict[str, Any]:
    """Measure all areas, or some, and judge the goals.

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
        ``machine``, ``goals``, ``measures`` and ``failures`` (area -> why it gave no numbers);
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
    rows = judge(measures)
    return {
        "version": __version__,
        "command": command,
        "quick": options.quick,
        "seconds": round(perf_counter() - started, 1),
        "machine": {**facts, "load_after": machine()["load"]},
        "goals": rows,
        "failures": failures,
        "measures": {name: asdict(found) for name, found in measures.items()},
        **{name: found.value for name, found in measures.items()},
    }


def _measure(areas: tuple[str, ...], options: Options) -> tuple[Measures, dict[str, str]]:
    """Numbers of each area; one that fails leaves its goals unmeasured and says why."""
    measures: Measures = {}
    failures: dict[str, str] = {}
    for area in areas:
        work: Callable[[Options], Measures] = import_module(f"wapo_analysis.bench.{area}").measure
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
    """Read results written by `save` or by experiments/gpu_bench.py.

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
