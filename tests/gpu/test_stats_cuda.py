"""token_stats on a GPU: the Triton kernel and its fallback give what the CPU gives."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.support.exact_stats import assert_close, by_float64, consequences, drawn, some_targets
from tests.support.pretend_device import installed
from wapo_analysis.stats import TokenStats, fused_head_stats, head, token_stats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
BACKENDS = (pytest.param("triton", marks=needs_triton), "eager")
# Plain blocks may add up the squares of a whole row one after the other, in float32.
ROUNDING = {"triton": 5e-6, "eager": 1e-5}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(logits: torch.Tensor, targets: torch.Tensor, *args: object, **how: object) -> TokenStats:
    stats = token_stats(logits.cuda(), targets.cuda(), *args, **how)  # type: ignore[arg-type]
    return stats.map(torch.Tensor.cpu)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 37, 2048, 32_000, 50_257, 151_936])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_equals_float64(
    backend: str, dtype: torch.dtype, vocabulary: int, temperature: float
) -> None:
    logits = drawn(16, vocabulary, vocabulary, 6.0 * temperature).to(dtype)
    targets = some_targets(logits, 1)
    stats = on_gpu(logits, targets, temperature, backend=backend)
    assert_close(stats, by_float64(logits, targets, temperature), ROUNDING[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [0, 12, 30, 50, 80])
@pytest.mark.parametrize("who", ["mode", "other"])
def test_near_certain_rows_keep_their_digits_and_signs(backend: str, gap: int, who: str) -> None:
    logits = drawn(60, 20_000, gap).float() * 2
    at = torch.arange(60) * 97
    logits[torch.arange(60), at] = logits.amax(1) + gap + 1
    targets = at if who == "mode" else at + 1
    stats, exact = on_gpu(logits, targets, backend=backend), by_float64(logits, targets)
    assert_close(stats, exact, ROUNDING[backend])
    (norm, change), (exact_norm, exact_change) = consequences(stats), consequences(exact)
    torch.testing.assert_close(norm, exact_norm, rtol=5e-6, atol=0)
    assert torch.equal(change.sign(), exact_change.sign())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_views_bad_rows_and_the_largest_columns(backend: str) -> None:
    inf = torch.inf
    whole = drawn(60, 3000, 8, 4.0).float().view(6, 10, 3000)
    whole[..., 2900:] = -inf
    whole[1, 3, 7], whole[2, 3, 8], whole[3, 3] = torch.nan, inf, -inf
    mask = torch.rand(6, 7) < 0.7
    mask[1:4, 2] = True
    targets = torch.arange(42).view(6, 7)
    for take in (lambda z: z[:, 1:8], lambda z: z[:, 1:8, ::2], lambda z: z[:, 1:8].half()):
        there = take(whole.cuda())
        found = token_stats(there, targets.cuda(), 0.8, mask.cuda(), 20, backend=backend)
        found = found.map(torch.Tensor.cpu)
        want = token_stats(take(whole), targets, 0.8, mask, 20)
        for got, expected in zip(found, want, strict=True):
            if got.is_floating_point():
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-12, equal_nan=True)
            else:
                assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_that_of_the_cpu(backend: str) -> None:
    logits, targets = drawn(50, 5000, 1, 8.0).float(), torch.arange(50)
    mask = torch.rand(50) < 0.5
    grads = []
    for device, how in (("cpu", "eager"), ("cuda", backend)):
        leaf = logits.to(device).requires_grad_()
        stats = token_stats(leaf, targets.to(device), 0.7, mask.to(device), backend=how)
        grads.append(torch.autograd.grad(stats.logp.sum(), leaf)[0].cpu())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-9)


def test_auto_takes_the_kernel_and_needs_no_memory_but_its_outputs() -> None:
    pytest.importorskip("triton")
    logits = torch.randn(4096, 151_936, device="cuda", dtype=torch.bfloat16)
    targets = torch.zeros(4096, device="cuda", dtype=torch.long)
    token_stats(logits[:8], targets[:8])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_stats(logits, targets)
    assert torch.cuda.max_memory_allocated() - before < 8 << 20  # of 1.2 GB


def test_more_rows_than_a_grid_axis_but_the_first_may_have() -> None:
    logits = torch.randn(70_000, 64, device="cuda")
    targets = torch.arange(70_000, device="cuda") % 64
    stats = token_stats(logits, targets)
    torch.testing.assert_close(
        stats.logp, logits.log_softmax(1).gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("wide", [False, True])
def test_the_fused_head_trains_in_bfloat16_with_and_without_wide_products(
    wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide and not head._HALF_IN_FLOAT_OUT:
        pytest.skip("this torch has no product of half precision in float32")
    monkeypatch.setattr(head, "_HALF_IN_FLOAT_OUT", wide)
    draws = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 32, generator=draws), torch.randn(3000, 32, generator=draws)
    targets, found = torch.arange(40), []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.bfloat16().to("cuda", dtype).requires_grad_() for t in (hidden, weight)]
        fused_head_stats(leaves[0], leaves[1], targets.cuda()).logp.sum().backward()
        found.append([leaf.grad.float().cpu() for leaf in leaves])
    for exact, rounded in zip(*found, strict=True):
        assert float((rounded - exact).norm() / exact.norm()) < 2e-2


def test_a_target_that_is_no_column_ends_the_program() -> None:
    script = (
        "import torch; from wapo_analysis.stats import token_stats\n"
        "token_stats(torch.zeros(2, 5, device='cuda'), torch.tensor([1, 5], device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    if installed():
        with pytest.raises(RuntimeError, match=r"targets must be in 0\.\.4"):
            exec(script)
        return
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
