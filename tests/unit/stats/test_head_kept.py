"""Which logits the fused head keeps for the backward pass, and that both ways give the same."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.exact_stats import head_problem as problem
from wapo_analysis.stats import fused_head_stats, head


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that every test crosses their borders, in both directions."""
    monkeypatch.setattr(head, "_CPU_BLOCK", (60, 12))
    monkeypatch.setattr(head, "_NARROWEST", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [0, 2])
def test_logits_that_are_kept_give_what_logits_made_again_give(
    dtype: torch.dtype, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows up to certainty, single columns far above all others; the backward pass twice.

    A processor may add up the products of a narrower block in another order, so the two ways may
    differ by what rounding the largest logit does to its probability.
    """
    *inputs, targets = problem(60, 300, 16, dtype=dtype)
    inputs[0].data[40:] *= torch.logspace(0, largest, 20).unsqueeze(1).to(dtype)
    upstream = torch.linspace(-1, 1, 60, dtype=dtype)
    hidden, weight, bias = inputs

    def both() -> tuple[Tensor, list[Tensor]]:
        logp = fused_head_stats(hidden, weight, targets, bias, 0.8).logp
        found = torch.autograd.grad(logp, inputs, upstream, retain_graph=True)
        for once, twice in zip(found, torch.autograd.grad(logp, inputs, upstream), strict=True):
            torch.testing.assert_close(once, twice, rtol=0, atol=0)
        return logp, list(found)

    kept = both()
    monkeypatch.setattr(head, "memory", lambda: 0)
    again = both()
    summed = (hidden.abs() @ weight.abs().T + bias.abs()).max() / 0.8
    rounding = summed.item() * torch.finfo(dtype).eps
    assert torch.equal(kept[0], again[0])
    for ours, theirs in zip(kept[1], again[1], strict=True):
        assert not torch.equal(ours, theirs)  # two ways, each with its own rounding
        away = (ours - theirs).norm() / theirs.norm()
        assert away <= rounding


@pytest.mark.parametrize("chunk", [None, 5])
def test_no_block_of_logits_outlives_the_forward_pass(chunk: int | None) -> None:
    """What waits for the backward pass are the logits that are kept, or nothing of their width."""
    hidden, weight, _, targets = problem(40, 300, 2, dtype=torch.float32)
    held: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_head_stats(hidden, weight, targets, chunk_rows=chunk).logp.sum().backward()
    assert max(held) == (40 * 300 if chunk is None else weight.numel())
    assert (0 in held) is (chunk is not None), "in their place an empty tensor"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("short", "kept"), [(0, True), (1, False)])
def test_logits_are_kept_up_to_a_32nd_of_the_memory(
    dtype: torch.dtype, short: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, targets = problem(40, 300, 2, dtype=dtype)
    monkeypatch.setattr(head, "memory", lambda: 32 * (40 * 300 * dtype.itemsize) - 32 * short)
    held: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_head_stats(hidden, weight, targets)
    assert (max(held) >= 40 * 300) is kept


@pytest.mark.parametrize("chunk", [None, 256])
def test_logits_are_never_whole(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made on the way is far smaller than (N, V), where memory is short."""
    monkeypatch.undo()  # real block sizes
    monkeypatch.setattr(head, "memory", lambda: 4096 * 8192 if chunk is None else 1 << 60)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, tuple) else (out,):
                if isinstance(made, Tensor):
                    largest = max(largest, made.numel())
            return out

    rows, vocab = 4096, 8192
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    with Sizes():
        fused_head_stats(hidden, weight, torch.arange(rows), chunk_rows=chunk).logp.sum().backward()
    assert 0 < largest <= rows * vocab / 8


def products(monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int, **how: Any) -> list[Any]:
    """Sizes (rows, columns) of the logits that are made, forward and, after None, backward."""
    made: list[Any] = []
    real = head._product

    def product(rows: Tensor, weight: Tensor, bias: Any, out: Tensor) -> Tensor:
        made.append((len(rows), len(weight)))
        return real(rows, weight, bias, out)

    monkeypatch.setattr(head, "_product", product)
    monkeypatch.setattr(head, "memory", lambda: 0)
    dtype = how.pop("dtype", torch.float32)
    hidden = torch.rand(rows, 2, dtype=dtype, requires_grad=True)
    stats = fused_head_stats(
        hidden, torch.rand(vocabulary, 2, dtype=dtype), torch.zeros(rows), **how
    )
    made.append(None)
    stats.logp.sum().backward()
    return made


@pytest.mark.parametrize(
    ("rows", "vocabulary", "how", "forward"),
    [
        (600, 2000, {}, [256, 256, 88]), (600, 2000, {"dtype": torch.float64}, [256, 256, 88]),
        (600, 2000, {"dtype": torch.bfloat16}, [512, 88]), (600, 50, {}, [600]),
        (600, 2000, {"chunk_rows": 400}, [400, 200]), (300, 600, {}, [273, 27]),
        (600, 2000, {"softcap": 9.0}, [256, 256, 88]),
    ],
)  # fmt: skip
def test_rows_go_through_the_head_in_blocks(
    rows: int, vocabulary: int, how: Any, forward: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 of them, 512 of half precision, more of a small vocabulary."""
    monkeypatch.undo()
    made = products(monkeypatch, rows, vocabulary, **how)
    assert made[: made.index(None)] == [(count, vocabulary) for count in forward]


@pytest.mark.parametrize(
    ("block", "narrowest", "rows", "backward"),
    [
        (60, 4, 5, [12, 12, 6]), (60, 20, 5, [20, 10]), (60, 4, 60, [4] * 7 + [2]),
        (90, 4, 2, [30]), (30, 1, 1, [30]), (29, 1, 1, [29, 1]),
    ],
)  # fmt: skip
def test_the_backward_pass_makes_blocks_of_the_vocabulary(
    block: int, narrowest: int, rows: int, backward: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many columns as all rows leave room for, and never fewer than the narrowest."""
    monkeypatch.setattr(head, "_CPU_BLOCK", (block, 12))
    monkeypatch.setattr(head, "_NARROWEST", narrowest)
    made = products(monkeypatch, rows, 30)
    assert made[made.index(None) + 1 :] == [(rows, width) for width in backward]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "backward"), [(2048, 1500, [1024, 476]), (512, 3000, [2048, 952])]
)
def test_a_block_of_the_vocabulary_has_a_million_logits_and_1024_columns_at_least(
    rows: int, vocabulary: int, backward: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    made = products(monkeypatch, rows, vocabulary)
    assert made[made.index(None) + 1 :] == [(rows, width) for width in backward]


@pytest.mark.parametrize(
    ("rows", "columns", "parts"),
    [(7, 4, [3, 3, 1]), (2, 12, [1, 1]), (2, 13, [1, 1]), (3, 6, [2, 1]), (0, 6, [0])],
)
def test_a_part_of_a_block_is_exponentiated_at_once(
    rows: int, columns: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[int] = []

    def push(block: Tensor, *_: Any) -> Tensor:
        pushed.append(len(block))
        return block + 1

    monkeypatch.setattr(head, "_push", push)
    numbers = torch.zeros(rows)
    found = head._push_all(torch.zeros(rows, columns), numbers, numbers, numbers, None)  # type: ignore[arg-type]
    assert pushed == parts, "twelve elements"
    assert (found == 1).all()


def test_slices_cover_a_length_and_nothing_is_one_empty_slice() -> None:
    assert list(head._slices(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(head._slices(1, 1)) == [slice(0, 1)]
    assert list(head._slices(2, 1)) == [slice(0, 1), slice(1, 2)]
    assert list(head._slices(0, 1)) == list(head._slices(0, 3)) == [slice(0, 0)]
