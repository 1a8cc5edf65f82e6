"""Tensors of the pretended GPU, and what an operation on them may do."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.pretend_stream import CUDA, LEDGER, STREAM, aten, refuse

BACKEND = "pretend"
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
            device=torch.device(BACKEND, 0),
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
OF_DEVICE: dict[int, bool] = {}
"""Whether a generator is of the device, by address: an operation sees what torch made of it."""


def kind_of(device: Any) -> str:
    found = torch.device(device).type
    return "cuda" if found in ("cuda", BACKEND, "privateuseone") else found


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """Change what the arguments or results of an operation hold: values, and lists of them."""
    if isinstance(value, tuple | list):
        return type(value)([_each(change, part) for part in value])
    return change(value)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do one operation as a GPU would, or refuse it."""
    special = _SPECIAL.get(func)
    if special is not None:
        return special(*args, **kwargs)
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    there = [t for t in tensors if isinstance(t, DeviceTensor)]
    here = [t for t in tensors if not isinstance(t, DeviceTensor)]
    asked = None if kwargs.get("device") is None else kind_of(kwargs["device"])
    options = {name: _each(to_host, v) for name, v in kwargs.items() if name != "pin_memory"}
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
    made = func(*_each(to_host, args), **options)
    if func._schema.is_mutable:
        return _changed(func, args, kwargs, made, there)
    return _each(to_device, made) if on_device else made


def _check_generator(func: Any, generator: Any, on_device: bool) -> None:
    there = OF_DEVICE.get(generator._cdata, False)
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
    if from_there and not there:
        LEDGER.to_host += source.host.nbytes
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
    there = from_there if device is None else kind_of(device) == "cuda"
    if tensor.numel() == 0:
        pass  # nothing to copy, nothing to wait for
    elif from_there and not there:
        LEDGER.to_host += tensor.host.nbytes
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


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})
