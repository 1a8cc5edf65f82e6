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
def test_logits_that_are_kept_give_what_logits_made_again_give(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows up to certainty, single columns far above all others; the backward pass twice."""
    *inputs, targets = problem(60, 300, 16, dtype=dtype)
    inputs[0].data[40:] *= torch.logspace(0, 2, 20).unsqueeze(1).to(dtype)
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
    assert torch.equal(kept[0], again[0])
    for ours, theirs in zip(kept[1], again[1], strict=True):
        assert not torch.equal(ours, theirs)  # two ways, each with its own rounding
        away = (ours - theirs).norm() / theirs.norm()
        assert away <= (2e-6 if dtype == torch.float32 else 1e-14)


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
