"""token_stats against textbook formulas with 200 digits, and at the edges of what logits can be."""

import os
import subprocess
import sys

import pytest
import torch
import wapo_taxonomy as tax
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.exact_stats import (
    assert_close,
    by_decimal,
    by_float64,
    consequences,
    drawn,
    some_targets,
)
from wapo_analysis import UserError
from wapo_analysis.stats import fused_head_stats, token_stats
from wapo_analysis.stats.formulas import Reduced, finish

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("gap", [0.0, 3.0, 17.0, 43.0, 80.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_equals_the_textbook_with_two_hundred_digits(gap: float, temperature: float) -> None:
    logits = drawn(6, 9, 1, gap)
    targets = some_targets(logits, 2)
    stats = token_stats(logits, targets, temperature)
    rows = zip(logits.tolist(), targets.tolist(), strict=True)
    want = torch.tensor([by_decimal(row, y, temperature) for row, y in rows], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(stats[:4], 1), want, rtol=1e-13, atol=1e-300)
    assert_close(by_float64(logits, targets, temperature), stats, 1e-13)


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    vocabulary=st.one_of(st.integers(2, 400), st.sampled_from([1000, 4096, 5001])),
    temperature=st.floats(0.1, 10.0),
    nats=st.sampled_from([0.0, 1.0, 8.0, 20.0, 60.0]),
    padding=st.integers(0, 200),
    rows_at_once=st.sampled_from([None, 1, 3]),
    step=st.sampled_from([1, 2]),
    seed=st.integers(0, 10_000),
)
def test_equals_float64_on_whatever_logits(
    dtype: torch.dtype,
    vocabulary: int,
    temperature: float,
    nats: float,
    padding: int,
    rows_at_once: int | None,
    step: int,
    seed: int,
) -> None:
    logits = drawn(8, vocabulary, seed, nats * temperature).to(dtype)
    padded = torch.nn.functional.pad(logits, (0, padding), value=-torch.inf)
    strided = padded.repeat_interleave(step, 1)[:, ::step]
    targets = some_targets(logits, seed)
    stats = token_stats(strided, targets, temperature, chunk_rows=rows_at_once)
    exact = by_float64(logits, targets, temperature)
    rtol = 1e-11 if dtype == torch.float64 else 3e-6
    norm, change = consequences(stats)
    exact_norm, exact_change = consequences(exact)
    torch.testing.assert_close(norm, exact_norm, rtol=rtol, atol=1e-300)
    away = exact_change.abs() > 1e-3 * exact.entropy  # from the zero between peak and valley
    assert torch.equal(change.sign()[away], exact_change.sign()[away])
    assert_close(stats, exact, rtol)


@pytest.mark.parametrize("vocabulary", [50_257, 151_936, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies_keep_their_digits(vocabulary: int, dtype: torch.dtype) -> None:
    logits = drawn(6, vocabulary, 3, 12.0).to(dtype)
    targets = some_targets(logits, 4)
    assert_close(token_stats(logits, targets), by_float64(logits, targets), 5e-6)


@pytest.mark.parametrize("gap", [0, 5, 12, 20, 35, 42, 43, 44, 50, 65, 80, 86])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("who", ["mode", "other"])
def test_near_certain_rows_keep_five_digits_and_every_sign(
    gap: int, dtype: torch.dtype, who: str
) -> None:
    draw = torch.Generator().manual_seed(gap)
    logits = torch.randn(64, 5000, generator=draw) * 2
    modes = torch.randint(5000, (64, 1), generator=draw)
    logits.scatter_(1, modes, logits.amax(1, keepdim=True) + gap + 1)
    targets = modes[:, 0] if who == "mode" else torch.randint(5000, (64,), generator=draw)
    logits = logits.to(dtype)
    stats, exact = token_stats(logits, targets), by_float64(logits, targets)
    assert_close(stats, exact, 5e-6)
    (norm, change), (exact_norm, exact_change) = consequences(stats), consequences(exact)
    torch.testing.assert_close(norm, exact_norm, rtol=5e-6, atol=0)
    assert torch.equal(change.sign(), exact_change.sign())
    if gap or who == "mode":
        torch.testing.assert_close(change, exact_change, rtol=1e-5, atol=0)


def test_past_the_range_of_float32_everything_fades_together() -> None:
    logits = torch.tensor([[0.0, -95.0], [0.0, -120.0]])
    for temperature in (1.0, 0.9):
        stats = token_stats(logits, torch.tensor([0, 0]), temperature)
        exact = by_float64(logits, torch.tensor([0, 0]), temperature)
        near = 1 if temperature == 1.0 else 0  # 95 nats are still there, 95 / 0.9 are not
        assert [float(part[1]) for part in stats[:4]] == [0, 0, 0, 0]
        assert float(stats.logp[0]) == pytest.approx(float(exact.logp[0]) * near, rel=1e-2)
        assert float(stats[2][0]) == pytest.approx(float(exact[2][0]) * near, rel=1e-6)
        assert tax.is_peak(stats.logp.exp(), -torch.expm1(stats.logp), stats.collision_rest).all()
    assert stats.collision_rest.dtype == stats.collision_logp_rest.dtype == torch.float64


def test_uniform_tied_one_hot_and_padded_rows() -> None:
    inf = torch.inf
    logits = torch.tensor([[2.0] * 4, [5.0, 5.0, -inf, -inf], [-inf, 3.0, -inf, -inf]])
    for target, expected in (
        (0, [(0.25, 4, 3 / 16, True), (0.5, 2, 1 / 4, True), (0.0, 1, 1.0, False)]),
        (1, [(0.25, 4, 3 / 16, True), (0.5, 2, 1 / 4, True), (1.0, 1, 0.0, True)]),
        (3, [(0.25, 4, 3 / 16, True), (0.0, 2, 1 / 2, False), (0.0, 1, 1.0, False)]),
    ):
        stats = token_stats(logits, torch.full((3,), target), 0.3)
        prob, tokens, rest, top1 = (torch.tensor(column) for column in zip(*expected, strict=True))
        torch.testing.assert_close(stats.logp.exp(), prob)
        torch.testing.assert_close(stats.entropy, tokens.log(), atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(stats.collision_rest.float(), rest.float())
        assert torch.equal(stats.top1, top1)
        assert bool((stats.collision_logp_rest <= 0).all())


@pytest.mark.parametrize("below", [-30.0, -90.0, -torch.inf])
def test_many_columns_far_below_add_nothing(below: float) -> None:
    logits = torch.full((2, 100_000), below)
    logits[:, [7, 70_000, 99_999]] = torch.tensor([[20.0, 3.0, 2.0], [5.0, 4.5, 4.0]])
    for target in (7, 70_000):
        targets = torch.tensor([target, target])
        assert_close(token_stats(logits, targets), by_float64(logits, targets), 2e-6)


def test_two_tokens_and_one_token() -> None:
    stats = token_stats(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([0, 1]))
    assert_close(stats, by_float64(torch.tensor([[1.0, -1.0]] * 2), torch.tensor([0, 1])), 1e-6)
    only = token_stats(torch.tensor([[3.0]]), torch.tensor([0]))
    assert [float(part) for part in only[:4]] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [9, 300])
def test_a_bad_row_stays_alone(dtype: torch.dtype, vocabulary: int) -> None:
    logits = drawn(8, vocabulary, 1).to(dtype)
    targets = torch.tensor([0, 3, 0, 5, 1, 3, 2, 0])
    good = token_stats(logits, targets, topk=2)
    logits[1, 3], logits[2, 5], logits[3] = torch.nan, torch.nan, -torch.inf
    logits[4, 0], logits[5, 3], logits[6] = torch.inf, torch.inf, torch.inf
    stats = token_stats(logits, targets, topk=2)
    for part, whole in zip(stats, good, strict=True):
        torch.testing.assert_close(part[[0, 7]], whole[[0, 7]], rtol=0, atol=0)
    assert all(part[1:7].isnan().all() for part in (*stats[:4], stats.top_logp))
    assert not stats.top1[1:7].any()
    assert bool((stats.top_ids[1:7] == -1).all())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    layout=st.sampled_from(["whole", "shifted", "transposed", "expanded"]),
    rows_at_once=st.sampled_from([None, 1, 2]),
    topk=st.sampled_from([0, 3]),
    seed=st.integers(0, 1000),
)
def test_masked_rows_in_any_layout_are_those_of_a_copy(
    shape: list[int], share: float, layout: str, rows_at_once: int | None, topk: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, 150, generator=draw)
    if layout == "shifted":
        logits = torch.randn(*shape[:-1], shape[-1] + 2, 150, generator=draw)[..., 1:-1, :]
    elif layout == "transposed":
        logits = torch.randn(150, *reversed(shape), generator=draw).permute(
            *range(len(shape), -1, -1)
        )
    elif layout == "expanded":
        logits = torch.randn(*shape[:-1], 1, 150, generator=draw).expand(*shape, 150)
    mask = torch.rand(shape, generator=draw) < share
    targets = torch.randint(150, shape, generator=draw)
    plain = token_stats(logits[mask].contiguous(), targets[mask], 0.9, topk=topk)
    # Targets that the mask hides are not looked at, and logits neither.
    logits = logits.clone() if layout == "expanded" else logits
    logits[~mask] = torch.nan
    hidden = targets.masked_fill(~mask, -100)
    masked = token_stats(logits, hidden, 0.9, mask, topk, chunk_rows=rows_at_once)
    for part, want in zip(masked, plain, strict=True):
        if part is not None:
            # Blocks of other sizes add up in another order.
            torch.testing.assert_close(part, want, rtol=2e-6, atol=0)
        assert (part is None) == (want is None)
    assert masked.logp.shape == (int(mask.sum()),)


def test_no_rows_give_no_statistics() -> None:
    none = torch.zeros(3, 4, dtype=torch.bool)
    logits = torch.randn(3, 4, 7, requires_grad=True)
    stats = token_stats(logits, torch.zeros(3, 4, dtype=torch.long), 1.0, none, topk=2)
    assert [tuple(part.shape) for part in stats] == [(0,)] * 5 + [(0, 2)] * 2
    stats.logp.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert token_stats(torch.empty(0, 5), torch.empty(0, dtype=torch.long)).logp.shape == (0,)


def test_logits_are_only_read_and_nothing_random_is_drawn() -> None:
    logits = drawn(20, 700, 0, 9.0).float()
    before, state = logits.clone(), torch.get_rng_state()
    token_stats(logits, some_targets(logits, 1), 0.8, topk=5)
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
def test_gradient_flows_through_logp_alone_and_is_exact(
    temperature: float, share: float | None
) -> None:
    values = drawn(12, 40, 5, 9.0).view(3, 4, 40)
    targets = torch.arange(12).view(3, 4)
    mask = None if share is None else torch.rand(3, 4) < share
    logits, reference = values.clone().requires_grad_(), values.clone().requires_grad_()
    weights = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4)
    every = torch.ones(3, 4, dtype=torch.bool) if mask is None else mask
    stats = token_stats(logits[:, :], targets, temperature, mask, topk=2, chunk_rows=5)
    (stats.logp * weights[every]).sum().backward()
    plain = torch.log_softmax(reference / temperature, -1).gather(2, targets[..., None])[..., 0]
    (plain * weights)[every].sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-12, atol=1e-14)
    assert not logits.grad[~every].any()
    assert stats.logp.requires_grad
    assert not any(part.requires_grad for part in stats[1:])


def test_gradient_flows_exactly_when_asked_for() -> None:
    logits, targets = torch.randn(4, 6, requires_grad=True), torch.arange(4)
    with torch.no_grad():
        assert not token_stats(logits, targets).logp.requires_grad
    assert not token_stats(logits.detach(), targets).logp.requires_grad
    assert token_stats(logits, targets).logp.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_near_certain_row_keeps_its_digits(dtype: torch.dtype) -> None:
    values = drawn(8, 3000, 7, 16.0).to(dtype)
    targets = values.argmax(1)
    logits = values.clone().requires_grad_()
    token_stats(logits, targets).logp.sum().backward()
    logps = values.double().log_softmax(1)
    want = -logps.exp()
    complement = -torch.expm1(by_float64(values, targets).logp)
    want.scatter_(1, targets[:, None], complement[:, None])
    assert logits.grad is not None
    rtol = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(logits.grad.double(), want, rtol=rtol, atol=1e-30)


# The first use of forward mode in a process scripts its decompositions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_mode_gives_the_directional_derivative() -> None:
    logits, tangent = drawn(6, 30, 1, 4.0), drawn(6, 30, 2)
    targets, mask = torch.arange(6), torch.tensor([1, 0, 1, 1, 0, 1]).bool()

    def ours(z: Tensor) -> Tensor:
        return token_stats(z, targets, 0.7, mask, chunk_rows=2).logp

    def plain(z: Tensor) -> Tensor:
        return torch.log_softmax(z / 0.7, 1).gather(1, targets[:, None])[mask, 0]

    found = torch.func.jvp(ours, (logits,), (tangent,))
    for got, want in zip(found, torch.func.jvp(plain, (logits,), (tangent,)), strict=True):
        torch.testing.assert_close(got, want)
    inputs = (logits.clone().requires_grad_(),)
    assert torch.autograd.gradcheck(ours, inputs, check_forward_ad=True, check_batched_grad=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, "need"),
        ({"logits": torch.zeros(2)}, "need"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"mask": torch.ones(2)}, "need a bool mask of shape"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "need a bool mask of shape"),
        ({"topk": 4}, r"topk must be in 0\.\.3"),
        ({"topk": -1}, r"topk must be in 0\.\.3"),
        ({"backend": "fast"}, "unknown backend 'fast'; allowed: auto, eager, compile, triton"),
        ({"backend": "triton", "logits": torch.zeros(2, 3).double()}, "'triton' cannot run here"),
    ],
)
def test_wrong_input_is_refused_in_one_line(arguments: dict[str, object], message: str) -> None:
    given_ = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(UserError, match=message) as caught:
        token_stats(**{**given_, **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


MEMORY = """
import torch
from pathlib import Path
from wapo_analysis.stats import token_stats
torch.set_num_threads(1)
logits = torch.full((160, 151936), 0.5, dtype=torch.{dtype})
targets, some = torch.arange(160), torch.arange(160) % 3 > 0
for mask, topk in ((None, 0), (some, 0), (None, 20), (some, 20)):
    token_stats(logits[:2], targets[:2], topk=topk)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    token_stats(logits, targets, 1.0, mask, topk)
    print(peak() - before)
"""
PEAK = """
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_logits(dtype: str) -> None:
    code = PEAK + MEMORY.format(dtype=dtype)
    # Freed blocks go back at once, so that each peak is its call's own.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    # Where the logits take 93 MiB, or 46: two blocks of 1.2 MiB, and little more for the rest.
    assert all(int(kilobytes) < 4096 for kilobytes in done.stdout.split())
    assert len(done.stdout.split()) == 4


@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_that_is_no_column_is_refused(target: int) -> None:
    logits, targets = torch.zeros(3, 7), torch.tensor([0, target, 1])
    for score in (
        lambda: token_stats(logits, targets),
        lambda: fused_head_stats(torch.zeros(3, 2), torch.zeros(7, 2), targets),
    ):
        with pytest.raises(UserError, match=rf"targets must be in 0\.\.6, got {target}"):
            score()
    hidden = torch.tensor([True, False, True])
    assert len(token_stats(logits, targets, mask=hidden).logp) == 2, "a masked target is not read"


def test_numbers_of_rows_do_what_a_mask_does() -> None:
    logits = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))[:, 1:5]
    targets, mask = torch.arange(16).view(4, 4) % 9, torch.arange(16).view(4, 4) % 3 > 0
    by_mask = token_stats(logits, targets, mask=mask)
    by_number = token_stats(logits, targets, kept=mask.reshape(-1).nonzero()[:, 0])
    for one, other in zip(by_mask[:5], by_number[:5], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("at", "value"), [(1, torch.nan), (1, torch.inf), (3, torch.nan)])
def test_a_row_with_a_number_that_is_not_finite_is_missing_throughout(
    at: int, value: float
) -> None:
    """Also where a kernel's maximum passes a NaN over, which its sums do not."""
    numbers = torch.tensor([[2.0, 2.0, 1.0, 1.5, -0.5, 1.0, -0.25]]).repeat(2, 1)
    numbers[1, at] = value
    done = finish(Reduced(numbers, numbers[:, :1], torch.zeros(2, 1, dtype=torch.long)), 1.0)
    for column in (*done[:4], *done[5:7]):
        assert column.isnan().tolist() == [False, True]
    assert done.top1.tolist() == [True, False]
    assert done.top_ids is not None
    assert done.top_ids.tolist() == [[0], [-1]]
