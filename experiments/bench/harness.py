"""Timing side by side, peak memory in a fresh process, and what machine it was."""

import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

Work = Callable[[], Any]
Clock = Callable[[Work], float]
"""Runs a piece of work once and returns the seconds it took."""


@dataclass(frozen=True)
class Measure:
    """One measured number.

    Attributes
    ----------
    value : float
        Median over rounds; of several cases the worst one.
    low, high : float or None
        Least and greatest round, where there were rounds.
    note : str
        Case the number belongs to.
    """

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""

    def inverse(self) -> "Measure":
        """Measure of the reciprocal; low and high change places."""
        low, high = (None if bound is None else 1 / bound for bound in (self.high, self.low))
        return Measure(1 / self.value, low, high, self.note)

    def shifted(self, by: float) -> "Measure":
        """Measure with a constant added to value, low and high."""
        low, high = (None if bound is None else bound + by for bound in (self.low, self.high))
        return Measure(self.value + by, low, high, self.note)


Measures = dict[str, Measure]


def worst(measures: Iterable[Measure]) -> Measure:
    """Measure of the greatest value."""
    return max(measures, key=lambda measure: measure.value)


@dataclass(frozen=True)
class Timings:
    """Seconds of each variant in each round."""

    seconds: Mapping[str, Sequence[float]]

    def best(self, name: str) -> float:
        """Least seconds of a variant."""
        return min(self.seconds[name])

    def ratio(self, name: str, base: str, note: str = "") -> Measure:
        """Median, least and greatest of a variant's time over the base's time, round by round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        ratios = [own / other for own, other in pairs]
        return Measure(median(ratios), min(ratios), max(ratios), note)


def cpu_clock(work: Work) -> float:
    """Seconds of CPU time the whole process used, so other programs and waiting do not count."""
    started = process_time()
    work()
    return process_time() - started


def cuda_clock(work: Work) -> float:
    """Seconds between two CUDA events around the work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def interleave(
    variants: Mapping[str, Work], rounds: int, clock: Clock = cpu_clock, warm: bool = False
) -> Timings:
    """Time all variants in turn, round after round, each round starting with another one.

    A slow minute of the machine hits all variants of a round alike, so ratios within a round hold.
    Every variant runs once before, untimed, unless all are ``warm`` from a check of their numbers.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in () if warm else names:
        variants[name]()
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(clock(variants[name]))
    return Timings(seconds)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt(3)


def keep_memory() -> bool:
    """Let this process keep what it frees, so that temporaries cost no page faults from then on.

    Otherwise it depends on the layout of the heap whether a temporary of 100 MB is mapped anew at
    every call, which makes the official passes two to three times slower: a ratio would be a matter
    of chance. Returns False where the allocator (not glibc) cannot be told.
    """
    return _mallopt(_MMAP_MAX, 0) and _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def map_memory() -> bool:
    """Let this process map large temporaries anew at every call, as glibc does by default."""
    return _mallopt(_MMAP_MAX, 1 << 16) and _mallopt(_MMAP_THRESHOLD, 1 << 20)


def _mallopt(option: int, value: int) -> bool:
    return _glibc() and bool(ctypes.CDLL(None).mallopt(option, value))


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def peak_bytes(work: Work) -> int:
    """Peak of resident memory during the work above that before it, in this process.

    Linux resets its high-water mark on request; where it does not, memory touched before the call
    hides a part of the peak. What the allocator holds of freed memory is given back first: work
    that takes it again would seem to need none.
    """
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        pass
    before = _resident()
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str = "VmRSS") -> int:
    """Bytes of a memory field of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {status}")


def in_fresh_process(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a module of the library in a process of its own and return the JSON it writes.

    Raises
    ------
    RuntimeError
        If it fails; the message ends with its last line.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{module} {' '.join(arguments)} failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


_PACKAGES = ("torch", "transformers", "numpy", "pandas", "pyarrow", "duckdb", "trl", "triton")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load, versions: what the numbers belong to."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "system": f"{platform.system()} {platform.machine()}",
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = (line.partition(":") for line in info.read_text().splitlines())
        found = {key.strip(): value.strip() for key, _, value in fields}
        # Arm kernels give no name; the part number is still something.
        return found.get("model name") or found.get("CPU part") or platform.processor()
    return platform.processor() or platform.machine()


def release_memory() -> None:
    """Give freed memory of large tensors back before the next area begins."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
