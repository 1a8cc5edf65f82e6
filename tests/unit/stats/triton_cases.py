"""Cases of the Triton kernel for its interpreter; test_stats_backends.py runs them apart."""

import pytest
import torch

from tests.support.exact_stats import assert_close, by_float64, consequences, drawn, some_targets
from wapo_analysis.stats import token_stats, triton_kernel

BLOCK = triton_kernel.BLOCK

# A misleading first block overflows the sums before the row is read again.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 37, BLOCK, BLOCK + 1, 3 * BLOCK, 9001])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_equals_float64(dtype: torch.dtype, vocabulary: int, temperature: float) -> None:
    logits = drawn(6, vocabulary, vocabulary, 6.0).to(dtype)
    targets = some_targets(logits, 1)
    stats = token_stats(logits, targets, temperature, backend="triton")
    assert_close(stats, by_float64(logits, targets, temperature), 5e-6)


@pytest.mark.parametrize("gap", [12, 30, 50, 80])
@pytest.mark.parametrize("who", ["mode", "other"])
def test_near_certain_rows_keep_their_digits_and_signs(gap: int, who: str) -> None:
    logits = drawn(8, 5000, gap, 0.0).float() * 2
    at = torch.arange(8) * 600
    logits[torch.arange(8), at] = logits.amax(1) + gap
    targets = at if who == "mode" else at + 1
    stats, exact = token_stats(logits, targets, backend="triton"), by_float64(logits, targets)
    assert_close(stats, exact, 5e-6)
    (norm, change), (exact_norm, exact_change) = consequences(stats), consequences(exact)
    torch.testing.assert_close(norm, exact_norm, rtol=5e-6, atol=0)
    torch.testing.assert_close(change, exact_change, rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", [-300.0, -60.0, 60.0, 300.0])
@pytest.mark.parametrize("target", [7, BLOCK + 7])
def test_a_first_block_that_misleads_is_read_again(first: float, target: int) -> None:
    logits = drawn(3, 2 * BLOCK + 5, 2).float()
    logits[:, :BLOCK] += first
    targets = torch.full((3,), target)
    stats = token_stats(logits, targets, backend="triton")
    exact = by_float64(logits, targets)
    assert_close(stats, exact, 5e-6)


def test_the_two_largest_may_share_a_lane_or_tie() -> None:
    logits = drawn(4, 3 * BLOCK, 5).float()
    logits[0, [5, 5 + BLOCK]] = torch.tensor([70.0, 90.0])
    logits[1, [5, 5 + BLOCK]] = torch.tensor([90.0, 70.0])
    logits[2, [5, 5 + BLOCK, 9]] = 40.0
    logits[3] = 1.0
    for targets in (torch.full((4,), 5), torch.full((4,), 5 + BLOCK), torch.full((4,), 77)):
        stats = token_stats(logits, targets, backend="triton")
        assert_close(stats, by_float64(logits, targets), 5e-6)


def test_padding_one_hot_rows_and_bad_rows() -> None:
    inf = torch.inf
    logits = drawn(8, 3000, 3, 4.0).float()
    logits[:, 2500:] = -inf
    logits[1] = torch.full((3000,), -inf).index_fill(0, torch.tensor([9]), -50.0)
    targets = torch.tensor([3, 9, 2900, 1, 1, 1, 1, 2999])
    exact = by_float64(logits, targets)
    logits[3, 5], logits[4, 1], logits[5, 7], logits[6] = torch.nan, torch.nan, inf, -inf
    stats = token_stats(logits, targets, topk=3, backend="triton")
    for part, want in zip(stats[:4], exact[:4], strict=True):
        torch.testing.assert_close(part[[0, 1, 2, 7]].double(), want[[0, 1, 2, 7]].double())
        assert part[3:7].isnan().all()
    assert float(stats.logp[1]) == float(stats.entropy[1]) == 0
    eager = token_stats(logits, targets, topk=3, backend="eager")
    assert torch.equal(stats.top_ids, eager.top_ids)
    torch.testing.assert_close(stats.top_logp, eager.top_logp, equal_nan=True)


def test_masks_strides_and_gradient_are_those_of_eager() -> None:
    whole = drawn(20, 400, 8).float().view(4, 5, 400)
    mask = torch.rand(4, 3) < 0.6
    targets = torch.arange(12).view(4, 3)
    for logits in (whole[:, 1:4], whole[:, 1:4, ::2], whole.transpose(0, 1)[1:4].transpose(0, 1)):
        logits = logits.detach().requires_grad_()
        found = []
        for backend in ("triton", "eager"):
            stats = token_stats(logits, targets, 0.8, mask, backend=backend)
            found.append((*stats[:5], torch.autograd.grad(stats.logp.sum(), logits)[0]))
        for part, want in zip(*found, strict=True):
            torch.testing.assert_close(part, want)
    none = token_stats(whole[:, :3], targets, 1.0, mask & False, topk=2, backend="triton")
    assert [len(part) for part in none] == [0] * 7
