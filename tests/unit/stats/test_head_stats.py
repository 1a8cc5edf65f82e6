"""fused_head_stats against token_stats on whole logits, in value, gradient and tangent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.exact_stats import head_problem as problem
from wapo_analysis import UserError
from wapo_analysis.stats import fused_head_stats, head, token_stats

# torch itself uses what it warns of, the first time a forward-mode derivative is taken.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that every test crosses their borders, in both directions."""
    monkeypatch.setattr(head, "_CPU_BLOCK", (60, 12))
    monkeypatch.setattr(head, "_NARROWEST", 4)


def whole_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    logits = hidden @ weight.T
    logits = scale * (logits if bias is None else logits + bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 12),
    vocab=st.integers(2, 40),
    temperature=st.floats(0.3, 3.0),
    scale=st.floats(0.2, 3.0),
    softcap=st.none() | st.floats(2.0, 40.0),
    with_bias=st.booleans(),
    masked=st.booleans(),
    chunk=st.none() | st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_equals_token_stats_in_value_and_gradient(
    rows: int,
    vocab: int,
    temperature: float,
    scale: float,
    softcap: float | None,
    with_bias: bool,
    masked: bool,
    chunk: int | None,
    seed: int,
) -> None:
    hidden, weight, bias, targets = problem(rows, vocab, 5, seed)
    mask = torch.arange(rows) % 3 != 1 if masked else None
    given_bias = bias if with_bias else None
    fused = fused_head_stats(
        hidden, weight, targets, given_bias, temperature, mask,
        scale=scale, softcap=softcap, chunk_rows=chunk,
    )  # fmt: skip
    logits = whole_logits(hidden, weight, given_bias, scale, softcap)
    direct = token_stats(logits, targets, temperature, mask)
    for ours, theirs in zip(fused[:4], direct[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(fused.top1, direct.top1)
    assert not any(column.requires_grad for column in fused[1:5])
    inputs = (hidden, weight, *((bias,) if with_bias else ()))
    upstream = torch.linspace(-1, 2, len(fused.logp), dtype=torch.float64)
    expected = torch.autograd.grad(direct.logp, inputs, upstream)
    for ours, theirs in zip(
        torch.autograd.grad(fused.logp, inputs, upstream), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_derivatives_pass_gradcheck_both_ways(softcap: float | None) -> None:
    hidden, weight, bias, targets = problem(7, 11, 3)
    mask = torch.arange(7) != 4

    def logp(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_head_stats(
            hidden, weight, targets, bias, 0.7, mask, scale=1.3, softcap=softcap, chunk_rows=2
        ).logp

    assert torch.autograd.gradcheck(logp, (hidden, weight, bias), check_forward_ad=True)


@pytest.mark.parametrize("name", ["jvp", "jacfwd", "jacrev", "vmap", "vmap of grad", "vmap of jvp"])
def test_functional_transforms_give_what_they_give_on_whole_logits(name: str) -> None:
    hidden, weight, bias, targets = problem(6, 9, 4)
    hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    func, moved = torch.func, torch.randn(3, 6, 4, dtype=torch.float64)

    def fused(hidden: Tensor) -> Tensor:
        return fused_head_stats(hidden, weight, targets, bias, 0.8, softcap=5.0, chunk_rows=4).logp

    def direct(hidden: Tensor) -> Tensor:
        logits = whole_logits(hidden, weight, bias, 1.0, 5.0) / 0.8
        return torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)

    transforms: dict[str, Callable[[Any], Tensor]] = {
        "jvp": lambda f: func.jvp(f, (hidden,), (moved[0],))[1],
        "jacfwd": lambda f: func.jacfwd(f)(hidden),
        "jacrev": lambda f: func.jacrev(f)(hidden),
        "vmap": lambda f: func.vmap(f)(moved),
        "vmap of grad": lambda f: func.vmap(func.grad(lambda h: f(h).square().sum()))(moved),
        "vmap of jvp": lambda f: func.vmap(lambda m: func.jvp(f, (hidden,), (m,))[1])(moved),
    }
    torch.testing.assert_close(transforms[name](fused), transforms[name](direct))


def test_dual_numbers_go_through_all_three_inputs() -> None:
    hidden, weight, bias, targets = (t.detach() for t in problem(5, 8, 3))
    moves = [torch.randn_like(t) for t in (hidden, weight, bias)]
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(t, m)
            for t, m in zip((hidden, weight, bias), moves, strict=True)
        ]
        out = fused_head_stats(duals[0], duals[1], targets, duals[2])
        tangent = torch.autograd.forward_ad.unpack_dual(out.logp).tangent
        assert torch.autograd.forward_ad.unpack_dual(out.entropy).tangent is None
    step = 1e-6
    ends = [
        fused_head_stats(
            hidden + s * moves[0], weight + s * moves[1], targets, bias + s * moves[2]
        ).logp
        for s in (step, -step)
    ]
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    hidden, weight, _, targets = problem(4, 6, 3)

    def loss(hidden: Tensor) -> Tensor:
        return fused_head_stats(hidden, weight, targets).logp.square().sum()

    (first,) = torch.autograd.grad(loss(hidden), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative only"):
        torch.autograd.grad(first.sum(), hidden)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match="first derivative only"):
            outer(torch.func.grad(loss))(hidden.detach())


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_asks_for_no_gradient_gets_none_and_costs_nothing(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = set()
    for product, of in (("_add_product", "hidden"), ("_put_product", "weight")):
        real = getattr(head, product)
        monkeypatch.setattr(
            head, product, lambda *args, real=real, of=of: (made.add(of), real(*args))[1]
        )
    hidden, weight, bias, targets = problem()
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    inputs[frozen].requires_grad_(False)
    fused_head_stats(hidden, weight, targets, bias).logp.sum().backward()
    assert made == {"hidden", "weight"} - {frozen}
    direct = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    logits = whole_logits(direct["hidden"], direct["weight"], direct["bias"], 1.0, None)
    token_stats(logits, targets).logp.sum().backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(tensor.grad, direct[name].grad)


def test_masked_rows_are_not_even_looked_at() -> None:
    hidden, weight, _, targets = problem(6)
    mask = torch.tensor([True, False, True, True, False, True])
    poisoned = hidden.detach().clone()
    poisoned[~mask] = torch.nan
    poisoned.requires_grad_()
    chosen = torch.where(mask, targets, 10**6)
    stats = fused_head_stats(poisoned, weight, chosen, mask=mask)
    torch.testing.assert_close(stats.logp, fused_head_stats(hidden, weight, targets).logp[mask])
    stats.logp.sum().backward()
    assert poisoned.grad is not None
    assert weight.grad is not None
    assert (poisoned.grad[~mask] == 0).all()
    assert torch.isfinite(weight.grad).all()


def test_nothing_to_score_gives_nothing_and_zero_gradient() -> None:
    hidden, weight, _, targets = problem(4)
    stats = fused_head_stats(hidden, weight, targets, mask=torch.zeros(4, dtype=torch.bool))
    assert [len(column) for column in stats[:5]] == [0] * 5
    stats.logp.sum().backward()
    for tensor in (hidden, weight):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_texts_by_positions_and_views_that_are_not_contiguous() -> None:
    hidden, weight, _, targets = problem(24, width=6)
    by_text = hidden.detach().view(4, 6, 6).transpose(0, 1)[:, :, ::2]
    ids = targets.view(4, 6).t()
    narrow = weight.detach().t()[::2].t()  # strides of a transposed head
    assert not by_text.is_contiguous()
    assert not narrow.is_contiguous()
    leaves = [
        t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (by_text, narrow)
    ]
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    stats = fused_head_stats(leaves[0], leaves[1], ids, mask=mask)
    direct = token_stats((leaves[0] @ leaves[1].T)[mask], ids[mask])
    torch.testing.assert_close(stats.logp, direct.logp)
    found, expected = (torch.autograd.grad(s.logp.sum(), leaves) for s in (stats, direct))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tied_weights_collect_both_gradients() -> None:
    _, weight, _, targets = problem(9)
    gradients = []
    for score in (
        lambda hidden: fused_head_stats(hidden, weight, targets),
        lambda hidden: token_stats(hidden @ weight.T, targets),
    ):
        hidden = torch.tanh(torch.nn.functional.embedding(targets, weight))
        gradients.append(torch.autograd.grad(score(hidden).logp.sum(), weight)[0])
    torch.testing.assert_close(*gradients)


def test_near_certain_rows_keep_their_digits_in_value_and_gradient() -> None:
    """float32 against float64: 1 - p and with it the gradient, where p is within 1e-6 of 1."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(500, 16, generator=generator)
    targets = torch.randint(500, (40,), generator=generator)
    hidden = weight[targets] * torch.linspace(0.8, 1.6, 40).unsqueeze(1)
    exact, rough = [], []
    for dtype, kept in ((torch.float64, exact), (torch.float32, rough)):
        leaf = hidden.to(dtype).requires_grad_()
        stats = fused_head_stats(leaf, weight.to(dtype), targets)
        (grad,) = torch.autograd.grad(stats.logp.sum(), leaf)
        kept += [-torch.expm1(stats.logp.detach()), stats.entropy, stats.collision_rest, grad]
    assert float(exact[0].min()) < 1e-6
    for got, want in zip(rough[:3], exact[:3], strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=5e-5, atol=1e-30)
    away = (rough[3].double() - exact[3]).norm(dim=1) / exact[3].norm(dim=1)
    assert float(away.max()) < 1e-4


@pytest.mark.parametrize("chunk_rows", [None, 16], ids=["kept", "made again"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_the_models_own_head(
    dtype: torch.dtype, chunk_rows: int | None
) -> None:
    hidden, weight, bias, targets = problem(40, 300, 32, dtype=dtype)
    upstream = torch.linspace(-1, 1, 40)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    truth = torch.autograd.grad(
        token_stats(exact[0] @ exact[1].T + exact[2], targets).logp, exact, upstream.double()
    )
    logits = torch.nn.functional.linear(hidden, weight, bias)
    plain = torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    theirs = torch.autograd.grad(plain, (hidden, weight, bias), upstream.to(plain.dtype))
    stats = fused_head_stats(hidden, weight, targets, bias, chunk_rows=chunk_rows)
    assert stats.logp.dtype == torch.float32
    ours = torch.autograd.grad(stats.logp, (hidden, weight, bias), upstream)
    for got, other, want in zip(ours, theirs, truth, strict=True):
        assert got.dtype == dtype
        error, reference = ((g.double() - want).norm() / want.norm() for g in (got, other))
        assert error <= 1.1 * reference


def test_autocast_decides_the_precision_of_the_products() -> None:
    hidden, weight, _, targets = problem(20, 50, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = fused_head_stats(hidden, weight, targets)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(cast.logp, token_stats(logits, targets).logp)
    assert not torch.equal(cast.logp, fused_head_stats(hidden, weight, targets).logp)
    cast.logp.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_a_bad_row_stays_alone_in_value() -> None:
    hidden, weight, _, targets = problem(6, dtype=torch.float32)
    good = fused_head_stats(hidden, weight, targets)
    spoiled = hidden.detach().clone()
    spoiled[2] = torch.nan
    bad = fused_head_stats(spoiled, weight, targets)
    others = [0, 1, 3, 4, 5]
    for was, now in zip(good[:4], bad[:4], strict=True):
        assert now[2].isnan()
        torch.testing.assert_close(now[others], was[others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, "need"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "mask"),
        ({"weight": torch.zeros(31, 9)}, "does not fit"),
        ({"bias": torch.zeros(30)}, "bias"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": 0.0}, "softcap"),
        ({"scale": float("inf")}, "scale"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    given = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(31, 8)}
    given |= {"targets": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(UserError, match=message) as caught:
        fused_head_stats(**{**given, **change})
    assert "\n" not in str(caught.value)


def test_a_token_certain_beyond_float32_has_no_collision_rest_left() -> None:
    hidden = torch.tensor([[120.0, 0.0]])
    stats = fused_head_stats(hidden, torch.eye(2), torch.tensor([0]))
    assert stats.logp.item() == 0
    assert stats.top1.item()
    assert stats.collision_rest.item() == 0, "1 - p = 0 beside a positive rest is a valley"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_value_and_gradient_are_the_cpus(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    hidden, weight, bias, targets = problem(700, 5000, 64, dtype=dtype)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.detach().to(device).requires_grad_() for t in (hidden, weight, bias)]
        stats = fused_head_stats(*leaves[:2], targets.to(device), leaves[2], softcap=30.0)
        grads = torch.autograd.grad(stats.logp.sum(), leaves)
        results.append([c.detach().cpu().float() for c in (*stats[:4], *grads)])
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    )
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, **tolerance)
