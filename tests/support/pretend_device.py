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
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda:0")
NAME = "Pretend GPU"
_BACKEND = "pretend"
_POISON = 0x5A
_GIB = 1 << 30
aten = torch.ops.aten

_BY_INDEX = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._unsafe_index.Tensor,
    aten._index_put_impl_.default,
}
# What CUDA can only answer by looking at the values.
_WAITING = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
_TAKES_HOST_SCALARS = {"where", "masked_fill", "masked_fill_", "clamp", "lerp", "addcmul"}
_RESHAPES_IN_PLACE = {"squeeze_", "unsqueeze_", "t_", "transpose_", "resize_", "set_"}


class DeviceFault(RuntimeError):
    """What CUDA would refuse, with the line of this project that did it."""


@dataclass
class Ledger:
    """What the device has seen.

    Attributes
    ----------
    waits : Counter
        Waits of the host, by (kind, file:line).
    most_bytes : int or None
        Largest result the device has room for.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
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
        if file != __file__ and file.startswith(str(ROOT)) and "site-packages" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        if outside == "?" and "/torch/" not in file and file != __file__:
            outside = f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return outside


def refuse(what: str) -> None:
    """Raise the fault of this line."""
    raise DeviceFault(f"{what} at {place()}")


# ---- the stream -------------------------------------------------------------------------------


class _Stream:
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

    def wait_stream(self, other: "_Stream") -> None:
        """There is but one."""

    wait_event = wait_stream

    def query(self) -> bool:
        return self.done >= self.launched

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *raised: object) -> None:
        """Nothing to restore."""


STREAM = _Stream()


class _Event:
    def __init__(self, **options: Any) -> None:
        self.at, self.seconds = 0, 0.0

    def record(self, stream: Any = None) -> None:
        self.at, self.seconds = STREAM.launched, time.perf_counter()

    def synchronize(self) -> None:
        STREAM.wait("event", self.at)

    def query(self) -> bool:
        return STREAM.done >= self.at

    def elapsed_time(self, later: "_Event") -> float:
        return (later.seconds - self.seconds) * 1e3


# ---- tensors ----------------------------------------------------------------------------------


class DeviceTensor(torch.Tensor):
    """A tensor on the device; ``host`` holds its numbers."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(_BACKEND, 0),
        )
        made.host = host
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        STREAM.wait("tolist")
        return self.host.detach().tolist()

    def numpy(self, **options: Any) -> Any:
        refuse("a tensor of the device cannot become a numpy array")

    __array__ = numpy

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Make modules that move keep their parameters, tied ones tied."""
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *rest: Any) -> "DeviceTensor":
        return DeviceTensor(inner["host"])

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.host!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return DeviceTensor, (self.host.detach(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        new: torch.Tensor = DeviceTensor(self.host.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, self.requires_grad)
        memo[id(self)] = new
        return new


DeviceTensor.__module__ = "torch"  # as a real one's: libraries are told by it


def to_device(value: Any) -> Any:
    """Wrap a tensor that came out of an operation; anything else stays."""
    if not isinstance(value, torch.Tensor) or isinstance(value, DeviceTensor):
        return value
    size = value.numel() * value.element_size()
    if LEDGER.most_bytes is not None and size > LEDGER.most_bytes:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
    return DeviceTensor(value)


def to_host(value: Any) -> Any:
    """What a tensor of the device wraps; anything else stays."""
    return value.host if isinstance(value, DeviceTensor) else value


# ---- operations -------------------------------------------------------------------------------

_pinned: set[int] = set()


def _kind(device: Any) -> str:
    found = torch.device(device).type
    return "cuda" if found in ("cuda", _BACKEND, "privateuseone") else found


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do one operation as a GPU would, or refuse it."""
    special = _SPECIAL.get(func)
    if special is not None:
        return special(*args, **kwargs)
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, DeviceTensor)]
    here = [t for t in tensors if not isinstance(t, DeviceTensor)]
    asked = None if kwargs.get("device") is None else _kind(kwargs["device"])
    options = {name: to_host(value) for name, value in kwargs.items() if name != "pin_memory"}
    if asked == "cuda":
        options["device"] = torch.device("cpu")
    on_device = bool(there) if asked is None else asked == "cuda"
    if kwargs.get("generator") is not None:
        _check_generator(func, kwargs["generator"], on_device)
    if not there and not on_device:
        made = func(*args, **options)
        if kwargs.get("pin_memory"):
            _pinned.add(made.data_ptr())
        return made
    _check(func, args, kwargs, there, here)
    STREAM.launched += 1
    made = func(*tree_map(to_host, args), **tree_map(to_host, options))
    if func._schema.is_mutable:
        return _changed(func, args, kwargs, made, there)
    return tree_map(to_device, made) if on_device else made


def _check_generator(func: Any, generator: Any, on_device: bool) -> None:
    there = _of_device.get(generator._cdata, False)
    if there != on_device:
        sides = ("cpu", "cuda")
        refuse(f"{func}: tensor on {sides[on_device]}, generator on {sides[there]}")


def _check(func: Any, args: Any, kwargs: Any, there: list[Any], here: list[Any]) -> None:
    """Refuse what CUDA would; count a wait where it would wait."""
    name = func._overloadpacket.__name__
    if name in _RESHAPES_IN_PLACE and there:
        raise NotImplementedError(f"not on the pretend device: {func}")  # torch then does without
    if func in _BY_INDEX and there:
        _check_index(func, args)
    elif there and here and not name.startswith("_foreach"):
        scalars = torch.Tag.pointwise in func.tags or name in _TAKES_HOST_SCALARS
        written = any(t is _argument(func, args, kwargs, a) for a in _writes(func) for t in here)
        if written or any(t.dim() > 0 or not scalars for t in here):
            shapes = ", ".join(str(tuple(t.shape)) for t in here)
            refuse(f"{func}: tensors on cuda:0 and, of shape {shapes}, on the cpu")
    if func in _WAITING:
        STREAM.wait(name)


def _check_index(func: Any, args: Any) -> None:
    index = [t for t in args[1] if t is not None]
    if not isinstance(args[0], DeviceTensor):
        refuse(f"{func}: an index on cuda:0 into a tensor on the cpu")
    if len(args) > 2 and not isinstance(args[2], DeviceTensor) and args[2].dim() > 0:
        refuse(f"{func}: values on the cpu for a tensor on cuda:0")
    if any(t.dtype in (torch.bool, torch.uint8) for t in index):
        STREAM.wait("index by a mask")
    elif not all(isinstance(t, DeviceTensor) for t in index):
        STREAM.wait("index from the host")


def _writes(func: Any) -> list[Any]:
    return [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _argument(func: Any, args: Any, kwargs: Any, argument: Any) -> Any:
    place = [a.name for a in func._schema.arguments].index(argument.name)
    return args[place] if place < len(args) else kwargs.get(argument.name)


def _changed(func: Any, args: Any, kwargs: Any, made: Any, there: list[Any]) -> Any:
    """Results of an operation that writes into its arguments: those, not new tensors."""
    if any(t.host.shape != t.shape for t in there):
        raise NotImplementedError(f"not on the pretend device: {func} reshapes in place")
    if not func._schema.returns:
        return made
    given = list(made) if isinstance(made, tuple | list) else [made]
    for at, returned in enumerate(func._schema.returns):
        same = [
            a
            for a in _writes(func)
            if returned.alias_info is not None
            and a.alias_info.before_set == returned.alias_info.before_set
        ]
        given[at] = _argument(func, args, kwargs, same[0]) if same else to_device(given[at])
    return tuple(given) if isinstance(made, tuple | list) else given[0]


def _item(tensor: Any) -> Any:
    if isinstance(tensor, DeviceTensor):
        STREAM.wait("item")
    return aten._local_scalar_dense.default(to_host(tensor))


def _is_pinned(tensor: Any, device: Any = None) -> bool:
    return not isinstance(tensor, DeviceTensor) and tensor.data_ptr() in _pinned


def _pin(tensor: Any, device: Any = None) -> Any:
    copy = tensor.clone()
    _pinned.add(copy.data_ptr())
    return copy


def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    there, from_there = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
    STREAM.launched += there or from_there
    if there != from_there and source.numel():
        free = non_blocking and _is_pinned(source if there else target)
        if free and from_there:
            STREAM.hold_back(target, source.host.detach().clone())
            return target
        if not free:
            STREAM.wait("copy to the device" if there else "copy to the host")
    aten.copy_.default(to_host(target), to_host(source))
    return target


def _to_copy(tensor: Any, *, device: Any = None, non_blocking: bool = False, **how: Any) -> Any:
    how.pop("pin_memory", None)
    from_there = isinstance(tensor, DeviceTensor)
    there = from_there if device is None else _kind(device) == "cuda"
    if tensor.numel() == 0:
        pass  # nothing to copy, nothing to wait for
    elif from_there and not there:
        STREAM.wait("copy to the host")
    elif there and not from_there and not (non_blocking and _is_pinned(tensor)):
        STREAM.wait("copy to the device")
    STREAM.launched += 1
    if there:
        return to_device(aten._to_copy.default(to_host(tensor), **how))
    return aten._to_copy.default(to_host(tensor), device=torch.device(device or "cpu"), **how)


def _float_product(total: Any, left: Any, right: Any, dtype: Any, *, out: Any, **how: Any) -> Any:
    """CUDA's addmm of half precision that is not rounded to it."""
    made = torch.addmm(to_host(total), to_host(left).float(), to_host(right).float(), **how)
    out.host.copy_(made.to(dtype))
    return out


_SPECIAL: dict[Any, Any] = {
    aten._local_scalar_dense.default: _item,
    aten.is_pinned.default: _is_pinned,
    aten._pin_memory.default: _pin,
    aten.copy_.default: _copy,
    aten._to_copy.default: _to_copy,
    aten._fused_sdp_choice.default: lambda *args, **how: 0,  # plain attention: the rest is CUDA's
}
if hasattr(aten.addmm, "dtype_out"):  # since torch 2.10
    _SPECIAL[aten.addmm.dtype_out] = _float_product


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


# ---- torch.cuda -------------------------------------------------------------------------------

_RealGenerator = torch.Generator
_of_device: dict[int, bool] = {}  # by address: an operation sees the generator torch made of it


class Generator(_RealGenerator):
    """A generator that knows its device; its numbers are a CPU's."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        self = _RealGenerator.__new__(cls, "cpu")
        self.kind = _kind(device)
        _of_device[self._cdata] = self.kind == "cuda"
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
    "Event": _Event,
    "Stream": _Stream,
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

    registration._setup_privateuseone_for_python_backend(_BACKEND, backend_module=Backend())


_LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
_libraries: list[Any] = []


def _set_autocast() -> None:
    """Let autocast of "cuda" reach tensors that C++ takes for those of another device."""
    for name in ("set_autocast_enabled", "set_autocast_dtype"):
        plain = getattr(torch, name)

        def both(device: str, value: Any, plain: Any = plain) -> None:
            plain(device, value)
            if device == "cuda":
                plain(_BACKEND, value)

        setattr(torch, name, both)
    key = "AutocastPrivateUse1"
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, key)
    library = torch.library.Library("aten", "IMPL")
    for name in _LOWERED:
        library.impl(name, functools.partial(_lowered, getattr(aten, name).default), key)
    _libraries.extend((others, library))


def _lowered(func: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(_BACKEND)

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


def _set_threads() -> None:
    """Let threads, the autograd engine's too, see the device as the one that installs it."""

    def within(run: Any) -> Any:
        def run_in_mode(self: Any, *args: Any) -> Any:
            torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
            with _Mode():
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
    _Mode().__enter__()


def pytest_configure(config: Any) -> None:
    """As a pytest plugin: tests that need CUDA then run."""
    install()
