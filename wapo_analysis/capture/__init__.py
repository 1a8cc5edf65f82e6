"""Watching a live trainer: changing its objects and putting them back, and how logits are read.

*passive*: the model makes its logits, the trainer uses them, statistics are read off them.
*replace*: log-probabilities and statistics come straight from hidden states and head.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from wapo_analysis.errors import UserError

_ABSENT = object()


class Hook:
    """A function of ours inside an object of somebody else; in a copy of that it does nothing.

    A policy is copied for an average or a reference, and pickled whole: neither shall take its
    watcher along, nor need this package to be read.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")  # takes anything and returns None


class Patches:
    """Owns every change made to foreign objects; `close` undoes them, last one first.

    A wrapper that another tool has wrapped in turn cannot be taken out from under it. It stays
    where it is and, once closed, does nothing but call what it wraps. So it does in a copy of the
    object, with the copy.

    Examples
    --------
    >>> class Clock:
    ...     def tick(self) -> int:
    ...         return 1
    >>> clock, patches = Clock(), Patches()
    >>> patches.wrap(clock, "tick", lambda tick: tick() + 1)
    >>> clock.tick()
    2
    >>> patches.close()
    >>> clock.tick(), vars(clock)
    (1, {})
    """

    def __init__(self) -> None:
        self.closed = False
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one object, to be restored or deleted on `close`.

        ``owner``: instance whose ``__dict__`` may hold the attribute; its class is never touched.
        """
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        put = vars(owner).get(name)

        def restore() -> None:
            if vars(owner).get(name) is not put:
                return
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(restore)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Call ``around(original, *args, **kwargs)`` in place of a method of one object.

        ``name``: name of the method; signature, and whether it is bound, stay as they are;
        ``around``: gets the original bound method first.
        """
        original = getattr(owner, name)
        if isinstance(original, MethodType):

            @functools.wraps(original.__func__)
            def method(bound: Any, *args: Any, **kwargs: Any) -> Any:
                if bound is not owner:
                    return original.__func__(bound, *args, **kwargs)
                return call(*args, **kwargs)

            replacement: Any = MethodType(method, owner)
        else:

            @functools.wraps(original)
            def replacement(*args: Any, **kwargs: Any) -> Any:
                return call(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.closed:
                return original(*args, **kwargs)
            return around(original, *args, **kwargs)

        self.set(owner, name, replacement)

    def on_close(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` on `close`, before everything that was done earlier is undone."""
        self._undo.append(undo)

    def close(self) -> None:
        """Undo everything; a second call does nothing."""
        self.closed = True
        while self._undo:
            self._undo.pop()()


def own_rank() -> int | None:
    """Number of this process among those that train on different tokens; None for a twin.

    Of Megatron's tensor-parallel processes, which see the same tokens, the first one records.
    """
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None and megatron.model_parallel_is_initialized():
        if megatron.get_tensor_model_parallel_rank() != 0:
            return None
        return int(megatron.get_data_parallel_rank(with_context_parallel=True))
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


PASSIVE, REPLACE, AUTO = "passive", "replace", "auto"
MODES = (PASSIVE, REPLACE, AUTO)
#: Share of the free memory that the logits of a micro-batch may take under ``auto``.
LARGEST_SHARE = 0.10


@dataclass(frozen=True)
class CaptureMode:
    """Mode of a run and why."""

    mode: str
    #: One line: who decided, with the numbers.
    rule: str
    #: Size of the logits of one micro-batch, and the memory that was free when it was decided.
    logits_bytes: int | None = None
    free_bytes: int | None = None
    #: Most tokens of a micro-batch, where the memory decides and not a setting.
    microbatch_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Entries of the manifest, under ``capture``."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def choose_mode(
    asked: str, logits_bytes: int, free_bytes: int | None, obstacle: str | None
) -> CaptureMode:
    """Decide the mode of a trainer that makes logits.

    Raises UserError if the mode does not exist, or "replace" was asked for and cannot be had.

    Parameters
    ----------
    asked : {"passive", "replace", "auto"}
        "auto" replaces if the logits take more than a tenth of the free memory.
    logits_bytes : int
        Logits of one micro-batch.
    free_bytes : int or None
        Memory free now; None is unknown, then "auto" stays passive.
    obstacle : str or None
        Why this model cannot do without logits.
    """
    if asked not in MODES:
        raise UserError(f"capture_mode must be one of {', '.join(MODES)}, got {asked!r}")
    numbers = logits_bytes, free_bytes
    if asked == REPLACE and obstacle is not None:
        raise UserError(f"capture_mode replace cannot be used with this model: {obstacle}")
    if asked != AUTO:
        return CaptureMode(asked, "as set", *numbers)
    if free_bytes is None:
        return CaptureMode(PASSIVE, "auto: free memory is not known here", *numbers)
    share = logits_bytes / max(free_bytes, 1)
    large = share > LARGEST_SHARE
    rule = (
        f"auto: logits of a micro-batch take {readable(logits_bytes)}, {share:.1%} of the "
        f"{readable(free_bytes)} free; the limit is {LARGEST_SHARE:.0%}"
    )
    if large and obstacle is not None:
        return CaptureMode(PASSIVE, f"{rule}, but {obstacle}", *numbers)
    return CaptureMode(REPLACE if large else PASSIVE, rule, *numbers)


def earlier_mode(asked: str, manifest: Mapping[str, Any]) -> CaptureMode | None:
    """Mode that "auto" chose when the run was started; None if it is to be chosen now.

    A resumed run continues bitwise, and free memory is not what it was.
    """
    entry = manifest.get("capture")
    if not entry or not asked == manifest["config"].get("capture_mode") == AUTO:
        return None
    return CaptureMode(**{name: entry.get(name) for name in CaptureMode.__dataclass_fields__})


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None


def readable(count: int) -> str:
    """Bytes in the unit that fits, e.g. ``1.5 GiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
