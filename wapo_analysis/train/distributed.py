"""Several processes that train one policy; the only module that knows ranks.

Data parallel over rollouts: every process derives the same batch of prompts, samples, grades and
back-propagates its share of each mini-batch, and gradients are summed. The weights in a loss are
those of the whole batch, so the sum is the gradient one process would have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.train.rollout import NonFiniteLogits

_BUCKET = 1 << 25  # gradient elements summed at a time

T = TypeVar("T")


class ProcessFailed(RuntimeError):
    """Another process of the run has ended, failed, or holds other weights."""


class World:
    """One process: nothing to share, nobody to wait for.

    Attributes
    ----------
    rank : int
        Number of this process.
    size : int
        Processes of the run.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what a run has once."""
        return self.rank == 0

    def share(self, rows: int, runs: int = 1) -> Tensor:
        """Rows of this process: its slice of each of ``runs`` equal runs of rows, in order.

        Slices of a run differ in length by one at most.
        """
        every = torch.arange(rows).split(rows // runs)
        return torch.cat([run.tensor_split(self.size)[self.rank] for run in every])

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave well, or none; no other method may be called in it.

        Raises
        ------
        UserError, NonFiniteLogits
            What was raised here, or else by the first process that raised.
        ProcessFailed
            If another process raised anything else.
        """
        yield

    def in_turn(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the first process, then in the others; raises as `together`."""
        with self.together():
            return make()

    def gather(self, value: T) -> list[T]:
        """A value of each process, in the order of ranks, on every process."""
        return [value]

    def collect(self, values: Tensor, rows: Tensor, total: int) -> Tensor:
        """Rows of all processes as one tensor, on every process.

        Parameters
        ----------
        values : Tensor, shape (b, ...)
            Rows of this process; beyond the first, dimensions are the same on all.
        rows : Tensor of int64, shape (b,)
            Where they go; no row is given twice.
        total : int
            Rows of the result, B.

        Returns
        -------
        Tensor, shape (B, ...)
            0 (False) in rows that no process gave.
        """
        whole = values.new_zeros((total, *values.shape[1:]))
        whole[rows.to(values.device)] = values
        return whole

    def total(self, sums: Tensor) -> Tensor:
        """Sum over processes of a tensor of numbers."""
        return sums

    def longest(self, length: int) -> int:
        """Largest of a whole number of each process."""
        return length

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its sum over processes.

        A parameter without gradient on some process counts as zero there; one without gradient on
        all of them stays without, as it would in one process.
        """

    def start_alike(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's tensors, in place."""

    def check_alike(self, tensors: Sequence[Tensor]) -> None:
        """Check that all processes hold the same tensors, by sums over their bits.

        Raises
        ------
        ProcessFailed
            If they do not.
        """


class _Processes(World):
    """One of the processes of a run; the process group must exist.

    Raises
    ------
    ProcessFailed
        From any method, if another process has ended or does not answer.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @contextmanager
    def together(self) -> Iterator[None]:
        raised: Exception | None = None
        try:
            yield
        except ProcessFailed:  # there is nobody to talk to
            raise
        except Exception as error:
            raised = error
        said = self.gather(None if raised is None else _words(raised))
        if raised is not None:
            raise raised
        for rank, words in enumerate(said):
            if words is not None:
                raise _as_raised(rank, *words)

    def in_turn(self, make: Callable[[], T]) -> T:
        made: list[T] = []
        for turn in (self.first, not self.first):
            with self.together():
                if turn:
                    made.append(make())
        return made[0]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with _listening():
            dist.all_gather_object(values, value)
        return values

    def collect(self, values: Tensor, rows: Tensor, total: int) -> Tensor:
        kind = torch.uint8 if values.dtype == torch.bool else values.dtype
        whole = super().collect(values.to(kind), rows, total)
        return self.total(whole).to(values.dtype)

    def total(self, sums: Tensor) -> Tensor:
        whole = sums.clone()
        with _listening():
            dist.all_reduce(whole)
        return whole

    def longest(self, length: int) -> int:
        return max(self.gather(length))

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        moved = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        held = self.total(moved).tolist()
        with _listening():
            for bucket in _buckets([p for p, count in zip(parameters, held, strict=True) if count]):
                _sum_bucket(bucket)

    def start_alike(self, tensors: Sequence[Tensor]) -> None:
        with _listening():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def check_alike(self, tensors: Sequence[Tensor]) -> None:
        sums = torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in tensors])
        of_all = self.gather(sums.tolist())
        for rank, other in enumerate(of_all):
            if other != of_all[0]:
                raise ProcessFailed(f"processes 0 and {rank} no longer hold the same weights")


ALONE: Final = World()


def all_processes() -> World:
    """Processes of the process group, which must exist."""
    return _Processes()


@contextmanager
def _listening() -> Iterator[None]:
    """Turn what a broken connection raises into one clear error."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProcessFailed(
            f"another process of this run has ended or does not answer ({first})"
        ) from error


_SHARED: Final[dict[str, type[Exception]]] = {
    "UserError": UserError,
    "NonFiniteLogits": NonFiniteLogits,
}
"""Errors that end the run on every process as they do in one."""


def _words(error: Exception) -> tuple[str, str]:
    """What another process needs to know of an error: its kind and its text."""
    kinds = [name for name, kind in _SHARED.items() if isinstance(error, kind)]
    return (kinds[0] if kinds else type(error).__name__), str(error)


def _as_raised(rank: int, kind: str, text: str) -> Exception:
    """The error to raise for one of another process."""
    if kind in _SHARED:
        return _SHARED[kind](text)
    return ProcessFailed(f"process {rank} failed ({kind}: {text})")


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of parameters of about `_BUCKET` elements."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _sum_bucket(parameters: Sequence[Tensor]) -> None:
    """Sum some gradients over processes, in float32 at least."""
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    pieces = [piece.to(torch.promote_types(piece.dtype, torch.float32)) for piece in pieces]
    flat = torch.cat([piece.flatten() for piece in pieces])
    dist.all_reduce(flat)
    summed = flat.split([piece.numel() for piece in pieces])
    for parameter, values in zip(parameters, summed, strict=True):
        parameter.grad = values.view_as(parameter).to(parameter.dtype)


def _bits(values: Tensor) -> Tensor:
    """The bits of a tensor as whole numbers."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.detach().contiguous().view(kinds[values.element_size()])
