"""Token statistics by other means: textbook formulas with 200 digits, and their float64 twin."""

from decimal import Decimal, localcontext

import torch
import wapo_taxonomy as tax
from torch import Tensor

from wapo_analysis.stats import TokenStats


def by_decimal(logits: list[float], target: int, temperature: float) -> list[float]:
    """Textbook formulas of one row; with 200 digits their cancellation does no harm."""
    with localcontext() as context:
        context.prec, context.Emin = 200, -(10**6)
        weights = [(Decimal(z) / Decimal(temperature)).exp() for z in logits]
        probs = [weight / sum(weights) for weight in weights]
        terms = [p * p.ln() if p else Decimal(0) for p in probs]
        rest = [i for i in range(len(probs)) if i != target]
        return [
            float(probs[target].ln()) if probs[target] else float("-inf"),
            float(-sum(terms)),
            float(sum(probs[i] ** 2 for i in rest)),
            float(sum(probs[i] * terms[i] for i in rest)),
        ]


def by_float64(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
    """Every probability in float64; nothing is subtracted but from the largest logit."""
    scaled, at = logits.double() / temperature, targets.unsqueeze(1)
    highest, mode = scaled.max(1, keepdim=True)
    top1 = scaled.gather(1, at) == highest
    mode = torch.where(top1, at, mode)
    below = scaled - highest
    others = below.exp().scatter(1, mode, 0.0)
    logps = below - torch.log1p(others.sum(1, keepdim=True))
    probs = logps.exp()
    terms = torch.where(probs > 0, probs * logps, 0.0)
    rest = probs.scatter(1, at, 0.0)
    return TokenStats(
        logps.gather(1, at).squeeze(1),
        -terms.sum(1),
        (rest * rest).sum(1),
        (rest * terms).sum(1),
        top1.squeeze(1),
    )


def assert_close(found: TokenStats, exact: TokenStats, rtol: float) -> None:
    """The five statistics agree, missing rows too."""
    for name in ("logp", "entropy", "collision_rest", "collision_logp_rest"):
        got, want = getattr(found, name).double(), getattr(exact, name).double()
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-300, equal_nan=True, msg=name)
    assert torch.equal(found.top1, exact.top1)


def consequences(stats: TokenStats) -> tuple[Tensor, Tensor]:
    """Norm of the gradient of logp over the logits, and the entropy change per unit step."""
    logp, entropy, rest, logp_rest = (part.double() for part in stats[:4])
    prob, complement = logp.exp(), -torch.expm1(logp)
    ones = torch.ones_like(prob)
    norm: Tensor = tax.grad_norm(ones, complement, rest, 1.0)
    change: Tensor = tax.dentropy(ones, prob, complement, logp, entropy, rest, logp_rest)
    return norm, change


def drawn(rows: int, vocabulary: int, seed: int, gap: float = 0.0) -> Tensor:
    """Normal logits in float64; the first half of the rows with one column ``gap`` above all."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64)
    peak = torch.randint(vocabulary, (rows // 2, 1), generator=draw)
    top = logits[: rows // 2].amax(1, keepdim=True)
    if gap:
        logits[: rows // 2].scatter_(1, peak, top + gap)
    return logits


def some_targets(logits: Tensor, seed: int) -> Tensor:
    """Random targets, every second one the mode of its row."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(logits.shape[1], (len(logits),), generator=draw)
    targets[::2] = logits.argmax(1)[::2]
    return targets


def head_problem(
    rows: int = 23,
    vocab: int = 31,
    width: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, bias and targets; the first third of the rows is near-certain."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,), generator=generator)
    hidden[: rows // 3] += 2 * weight[targets[: rows // 3]]
    return *(t.to(dtype).requires_grad_() for t in (hidden, weight, bias)), targets
