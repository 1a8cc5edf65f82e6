"""A CUDA device that is not there: faults of devices, and waits for them, found without one.

`install` gives a CPU-only torch one GPU for the rest of the process. A tensor on it wraps a CPU
tensor (`DeviceTensor`): Python sees ``cuda:0``, C++ the Python-backed device that torch keeps for
extensions, so that autograd has a device thread. A dispatch mode sees every operation and

- raises `DeviceFault`, with file and line, where devices are mixed as CUDA would not allow, also
  for a generator of the other device;
- holds a non-blocking copy to pinned memory back, its target poisoned, until something waits;
- counts every wait of the host for the device, by the line of this project that caused it;
- raises `torch.OutOfMemoryError` for a single result larger than `Ledger.most_bytes`.

The device is as slow as can be: an event is over only once somebody has waited for it. It has one
stream and no kernels of its own: what Triton, NCCL or a choice of attention kernel would do stays
unseen. As a pytest plugin (``-p tests.support.pretend_device``) it is installed before collection.
"""

import contextlib
import ctypes
import functools
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.support.pretend_stream import (
    CUDA,
    LEDGER,
    NAME,
    STREAM,
    DeviceFault,
    Event,
    Stream,
    aten,
    installed,
)
from tests.support.pretend_tensors import BACKEND, OF_DEVICE, DeviceTensor, Mode, kind_of

__all__ = ["LEDGER", "DeviceFault", "install", "installed"]
_GIB = 1 << 30

_RealGenerator = torch.Generator


class Generator(_RealGenerator):
    """A generator that knows its device; its numbers are a CPU's."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        self = _RealGenerator.__new__(cls, "cpu")
        self.kind = kind_of(device)
        OF_DEVICE[self._cdata] = self.kind == "cuda"
        return self

    def __init__(self, device: Any = "cpu") -> None:
        """Made whole by ``__new__``."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA if self.kind == "cuda" else torch.device("cpu")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _state(*args: Any) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)


_PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=80 * _GIB, multi_processor_count=132
)
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: _PROPERTIES,
    "mem_get_info": lambda device=None: (70 * _GIB, 80 * _GIB),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "is_current_stream_capturing": lambda: False,
    "synchronize": STREAM.synchronize,
    "current_stream": lambda device=None: STREAM,
    "default_stream": lambda device=None: STREAM,
    "stream": contextlib.nullcontext,
    "device": lambda device: contextlib.nullcontext(),
    "Event": Event,
    "Stream": Stream,
    "get_rng_state": _state,
    "get_rng_state_all": lambda: [_state()],
    "_is_in_bad_fork": lambda: False,
    "_sleep": lambda cycles: setattr(STREAM, "launched", STREAM.launched + 1),
    **dict.fromkeys(
        ("_lazy_init", "init", "set_device", "empty_cache", "reset_peak_memory_stats"), _nothing
    ),
    **dict.fromkeys(
        ("set_rng_state", "set_rng_state_all", "manual_seed", "manual_seed_all"), _nothing
    ),
}


class _Guard:
    """Give a CPU-only torch the do-nothing CUDA device guard that its fake tensors use.

    ``_ensureCUDADeviceGuardSet`` puts it in place of a guard that counts no devices. A CPU-only
    build has no guard at all, so one that answers 0 to everything is put there first.
    """

    kept: list[Any] = []  # noqa: RUF012

    @classmethod
    def set(cls) -> None:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        name = "_ZN3c104impl26device_guard_impl_registryE"
        registry = (ctypes.c_void_p * 22).in_dll(library, name)
        if not registry[1]:
            zero = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda this: 0)
            table = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
            guard = (ctypes.c_void_p * 1)(ctypes.addressof(table))
            cls.kept += [zero, table, guard]
            registry[1] = ctypes.addressof(guard)
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]


def _set_backend() -> None:
    from torch.utils import backend_registration as registration

    class Backend(registration._DummyBackendModule):  # type: ignore[misc, name-defined]
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        get_rng_state, set_rng_state = staticmethod(_state), staticmethod(_nothing)
        device = staticmethod(lambda device: contextlib.nullcontext())

    registration._setup_privateuseone_for_python_backend(BACKEND, backend_module=Backend())


_LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
_libraries: list[Any] = []


def _set_autocast() -> None:
    """Let autocast of "cuda" reach tensors that C++ takes for those of another device."""
    for name in ("set_autocast_enabled", "set_autocast_dtype"):
        plain = getattr(torch, name)

        def both(device: str, value: Any, plain: Any = plain) -> None:
            plain(device, value)
            if device == "cuda":
                plain(BACKEND, value)

        setattr(torch, name, both)
    key = "AutocastPrivateUse1"
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, key)
    library = torch.library.Library("aten", "IMPL")
    for name in _LOWERED:
        library.impl(name, functools.partial(_lowered, getattr(aten, name).default), key)
    _libraries.extend((others, library))


def _lowered(func: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(BACKEND)

    def lower(value: Any) -> Any:
        wide = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(dtype) if wide else value

    with torch.autocast("cuda", enabled=False):
        return func(*tree_map(lower, args), **tree_map(lower, kwargs))


def _set_libraries() -> None:
    """Teach what looks into tensors from outside that these hold theirs elsewhere."""
    import safetensors.torch as safe
    from torch.optim import optimizer
    from torch.utils import _foreach_utils
    from transformers import modeling_utils  # noqa: F401

    for module in (_foreach_utils, optimizer):
        known = getattr(module, "_foreach_supported_types", None)
        if known is not None and DeviceTensor not in known:
            known.append(DeviceTensor)
    flatten = safe._flatten_as_ptr

    def flattened(tensors: dict[str, Any], *more: Any) -> Any:
        return flatten({name: tensor.cpu() for name, tensor in tensors.items()}, *more)

    safe._flatten_as_ptr = flattened  # type: ignore[assignment]
    # Beside a torch with CUDA Triton is installed, and would look for a driver.
    sys.modules["triton"] = None  # type: ignore[assignment]


def _set_threads() -> None:
    """Let threads, the autograd engine's too, see the device as the one that installs it."""

    def within(run: Any) -> Any:
        def run_in_mode(self: Any, *args: Any) -> Any:
            torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
            with Mode():
                return run(self, *args)

        return run_in_mode

    threading.Thread.run = within(threading.Thread.run)  # type: ignore[method-assign]
    backward = torch.autograd.function.BackwardCFunction
    backward.apply = within(backward.apply)  # type: ignore[method-assign]


def install() -> None:
    """Give this process a GPU, for good; before anything has run a backward pass."""
    _set_libraries()  # first: what they import looks at torch.cuda as it is
    _Guard.set()
    _set_backend()
    # torch.tensor(..., device="cuda") then copies where the mode sees it.
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]

    def cuda(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
        return self.to("cuda", non_blocking=non_blocking)

    torch.Tensor.cuda = cuda  # type: ignore[assignment, method-assign]
    _set_autocast()
    _set_threads()
    Mode().__enter__()


def pytest_configure(config: Any) -> None:
    """As a pytest plugin: tests that need CUDA then run."""
    install()
