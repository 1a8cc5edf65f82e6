"""token_stats and head_stats against the naive program, in value and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wapo_analysis.stats import TokenStats, head_stats, token_stats


def naive(logits: Tensor, targets: Tensor, temperature: float) -> list[Tensor]:
    logp = torch.log_softmax(logits.double() / temperature, dim=-1)
    p = logp.exp()
    y = torch.nn.functional.one_hot(targets, logits.shape[-1]).bool()
    plogp = torch.where(p > 0, p * logp, 0.0)
    return [
        logp[y],
        -plogp.sum(-1),
        torch.where(y, 0.0, p**2).sum(-1),
        torch.where(y, 0.0, p * plogp).sum(-1),
    ]


def rows(n: int, vocab: int, peak: float, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits whose first half is near-certain of token 1 by ``peak`` nats."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    logits[: n // 2, min(1, vocab - 1)] += peak
    return logits.to(dtype)


def assert_matches(stats: TokenStats, expected: list[Tensor], rtol: float) -> None:
    for got, want in zip(stats[:4], expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(2, 300),
    temperature=st.floats(0.2, 5.0),
    peak=st.floats(0.0, 12.0),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 10_000),
)
def test_equals_the_naive_program(
    vocab: int, temperature: float, peak: float, chunk: int, seed: int
) -> None:
    logits = rows(8, vocab, peak, seed)
    targets = torch.randint(vocab, (8,), generator=torch.Generator().manual_seed(seed))
    assert_matches(
        token_stats(logits, targets, temperature, chunk),
        naive(logits, targets, temperature),
        rtol=1e-7,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_certain_rows_keep_their_digits(dtype: torch.dtype) -> None:
    logits = rows(400, 1000, 17.0, 3, dtype)
    targets = torch.full((400,), 1)
    targets[100:150] = 7  # a target that is not the mode of a near-certain row
    stats, expected = token_stats(logits, targets), naive(logits, targets, 1.0)
    assert float(expected[0][:100].exp().min()) > 0.99
    assert_matches(stats, expected, rtol=3e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_gradient_flows_through_logp_alone_and_is_exact(temperature: float) -> None:
    logits, targets = rows(12, 40, 9.0, 5), torch.arange(12)
    ours = logits.clone().requires_grad_()
    reference = logits.clone().requires_grad_()
    weights = torch.linspace(-2, 2, 12, dtype=torch.float64)
    stats = token_stats(ours, targets, temperature, chunk_rows=5)
    (stats.logp * weights).sum().backward()
    plain = torch.log_softmax(reference / temperature, -1).gather(1, targets[:, None])[:, 0]
    (plain * weights).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-12, atol=1e-14)
    assert not any(column.requires_grad for column in stats[1:5])


def test_head_stats_equal_token_stats_in_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(31, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(31, (23,), generator=generator)
    direct = token_stats(hidden @ weight.T + bias, targets, 0.8)
    fused = head_stats(hidden, weight, targets, bias, 0.8, chunk_rows=4)
    for a, b in zip(direct, fused, strict=True):
        torch.testing.assert_close(a, b)
    upstream = torch.randn(23, generator=generator, dtype=torch.float64)
    inputs = (hidden, weight, bias)
    expected = torch.autograd.grad(direct.logp, inputs, upstream)
    for a, b in zip(torch.autograd.grad(fused.logp, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_uniform_one_hot_and_padded_rows() -> None:
    logits = torch.zeros(3, 6)
    logits[1, 2] = 200.0
    logits[2, 4:] = -torch.inf
    stats = token_stats(logits, torch.tensor([0, 2, 0]))
    torch.testing.assert_close(stats.entropy, torch.tensor([6.0, 1.0, 4.0]).log())
    torch.testing.assert_close(stats.collision_rest, torch.tensor([5 / 36, 0.0, 3 / 16]))
    torch.testing.assert_close(stats.logp.exp(), torch.tensor([1 / 6, 1.0, 0.25]))
    assert stats.top1.tolist() == [True, True, True]


def test_a_bad_row_stays_alone() -> None:
    logits = rows(5, 9, 0.0, 1, torch.float32)
    good = token_stats(logits, torch.zeros(5, dtype=torch.long))
    logits[1, 3], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    stats = token_stats(logits, torch.zeros(5, dtype=torch.long))
    for bad, column in zip(good[:4], stats[:4], strict=True):
        assert column[1:4].isnan().all()
        torch.testing.assert_close(column[[0, 4]], bad[[0, 4]])


@pytest.mark.parametrize(
    ("logits", "targets", "temperature"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), 1.0),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), 1.0),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), 0.0),
    ],
)
def test_wrong_shapes_and_temperature_are_refused(
    logits: Tensor, targets: Tensor, temperature: float
) -> None:
    with pytest.raises(ValueError, match="need|temperature"):
        token_stats(logits, targets, temperature)
