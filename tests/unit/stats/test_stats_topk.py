"""The most probable tokens: those of torch.topk, equal ones by ascending id."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.exact_stats import drawn
from wapo_analysis.stats import token_stats

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=120, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    vocabulary=st.one_of(st.integers(2, 700), st.sampled_from([2560, 5000])),
    k=st.integers(1, 40),
    levels=st.sampled_from([None, 1, 3, 40]),
    padding=st.sampled_from([0, 1, 300]),
    seed=st.integers(0, 10_000),
)
def test_are_exactly_the_largest_with_ties_by_id(
    dtype: torch.dtype, vocabulary: int, k: int, levels: int | None, padding: int, seed: int
) -> None:
    k = min(k, vocabulary)
    logits = drawn(5, vocabulary, seed) * 3
    if levels is not None:  # few different values: ties, within blocks and across them
        logits = (logits * levels / 9).round() * 9 / levels
    logits[:, vocabulary - min(padding, vocabulary - 1) :] = -torch.inf
    logits = logits.to(dtype)
    targets = torch.zeros(5, dtype=torch.long)
    stats = token_stats(logits, targets, 0.7, topk=k, chunk_rows=2)
    want, ids = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(stats.top_ids, ids[:, :k])
    assert torch.equal(logits.gather(1, stats.top_ids), logits.topk(k).values)
    logps = torch.log_softmax(want.double() / 0.7, 1)[:, :k]
    rtol = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(stats.top_logp.double(), logps, rtol=rtol, atol=rtol)


def test_minus_zero_ties_with_zero() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -2.0]])
    stats = token_stats(logits, torch.tensor([0]), topk=4)
    assert stats.top_ids.tolist() == [[1, 2, 3, 0]]


def test_the_smallest_difference_decides() -> None:
    logits = torch.tensor([[0.0, 1e-30, 2e-30, -1e-30, -2e-30]])
    stats = token_stats(logits, torch.tensor([0]), topk=5)
    assert stats.top_ids.tolist() == [[2, 1, 0, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_large_vocabulary_in_any_block(dtype: torch.dtype) -> None:
    logits = drawn(40, 151_936, 1).to(dtype)
    logits[0, -1] = logits[1, 0] = 50.0  # in the last block and in the first
    logits[2, 1000:1128] += 30  # all in one block
    stats = token_stats(logits, torch.zeros(40, dtype=torch.long), topk=20)
    ids = logits.sort(dim=1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(stats.top_ids, ids)


def test_the_statistics_do_not_depend_on_it() -> None:
    logits = drawn(9, 900, 4, 7.0).float()
    targets = torch.arange(9)
    for part, other in zip(
        token_stats(logits, targets)[:5], token_stats(logits, targets, topk=9)[:5], strict=True
    ):
        assert torch.equal(part, other)


def test_none_are_looked_for_unless_asked() -> None:
    found = token_stats(torch.zeros(2, 5), torch.tensor([0, 1]))
    assert (found.top_ids, found.top_logp) == (None, None)
