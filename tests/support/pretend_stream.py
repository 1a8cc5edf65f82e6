"""What the pretended GPU has seen: its stream, the waits for it, the faults of a line."""

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda:0")
NAME = "Pretend GPU"
_OWN = str(Path(__file__).with_name("pretend_"))
_POISON = 0x5A
aten = torch.ops.aten


class DeviceFault(RuntimeError):
    """What CUDA would refuse, with the line of this project that did it."""


@dataclass
class Ledger:
    """What the device has seen.

    Attributes
    ----------
    waits : Counter
        Waits of the host, by (kind, file:line).
    to_host : int
        Bytes of tensors that were copied to the host.
    most_bytes : int or None
        Largest result the device has room for.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    to_host: int = 0
    most_bytes: int | None = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[tuple[str, str]]]:
        """Waits within the block alone."""
        held, self.waits = self.waits, Counter()
        try:
            yield self.waits
        finally:
            self.waits = held

    @contextlib.contextmanager
    def room(self, most_bytes: int) -> Iterator[None]:
        """A block in which no result may be larger."""
        self.most_bytes = most_bytes
        try:
            yield
        finally:
            self.most_bytes = None


LEDGER = Ledger()


def installed() -> bool:
    """Whether the GPU of this process is the pretended one."""
    return torch.cuda.is_available() and torch.cuda.get_device_name() == NAME


def place() -> str:
    """File and line of this project that is being executed, innermost first."""
    frame, outside = sys._getframe(2), "?"
    while frame is not None:
        file = frame.f_code.co_filename
        own = file.startswith(_OWN)
        if not own and file.startswith(str(ROOT)) and "site-packages" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        if outside == "?" and "/torch/" not in file and not own:
            outside = f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return outside


def refuse(what: str) -> None:
    """Raise the fault of this line."""
    raise DeviceFault(f"{what} at {place()}")


# ---- the stream -------------------------------------------------------------------------------


class Stream:
    """Everything that was launched, in order, and how far the host has waited."""

    device = CUDA

    def __init__(self) -> None:
        self.launched = self.done = 0
        self._held: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._lock = threading.RLock()

    def hold_back(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Poison the target; the value arrives once somebody waits."""
        with self._lock:
            self.launched += 1
            target.view(torch.uint8).fill_(_POISON)
            self._held.append((self.launched, target.detach(), value))

    def wait(self, kind: str, upto: int | None = None) -> None:
        """Let the host wait for all that was launched, or the first ``upto``."""
        with self._lock:
            LEDGER.waits[kind, place()] += 1
            self.done = max(self.done, self.launched if upto is None else upto)
            for number, target, value in self._held:
                if number <= self.done:
                    aten.copy_.default(target, value)
            self._held = [each for each in self._held if each[0] > self.done]

    def synchronize(self, device: Any = None) -> None:
        self.wait("synchronize")

    def wait_stream(self, other: "Stream") -> None:
        """There is but one."""

    wait_event = wait_stream

    def query(self) -> bool:
        return self.done >= self.launched

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *raised: object) -> None:
        """Nothing to restore."""


STREAM = Stream()


class Event:
    def __init__(self, **options: Any) -> None:
        self.at, self.seconds = 0, 0.0

    def record(self, stream: Any = None) -> None:
        self.at, self.seconds = STREAM.launched, time.perf_counter()

    def synchronize(self) -> None:
        STREAM.wait("event", self.at)

    def query(self) -> bool:
        return STREAM.done >= self.at

    def elapsed_time(self, later: "Event") -> float:
        return (later.seconds - self.seconds) * 1e3
