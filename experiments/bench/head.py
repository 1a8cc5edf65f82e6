"""Time of the fused head, all statistics included, against a head that captures nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.bench.errors import GateError, gate, gate_close
from experiments.bench.harness import Measures, Timings, Work, interleave, worst
from experiments.bench.options import Options
from experiments.bench.reference import (
    chunked_entropy,
    exact_stats,
    three_pass,
    trl_selective,
)
from wapo_analysis.stats import fused_head_stats, token_stats

_QUICK = ((512, 49_152, 576, torch.float32),)
_FULL = (
    *_QUICK,
    (1024, 49_152, 576, torch.bfloat16),
    (512, 151_936, 896, torch.bfloat16),
)
# The logits themselves are rounded differently by differently shaped products, so the gate is wider
# than that on given logits; a coarser bound in nats holds where they are rounded to bfloat16.
_GATE, _GATE_BF16 = 5e-3, 0.05
_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of the materialised gradient


@dataclass(frozen=True)
class Head:
    """Hidden states, head weight and targets of N tokens, with the weights of their logp."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    coef: Tensor

    @classmethod
    def random(
        cls, rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: str = "cpu"
    ) -> "Head":
        """Random head whose logits have a deviation of about 3, like those of a language model."""
        draw = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(rows, width, generator=draw, device=device)
        weight = torch.randn(vocabulary, width, generator=draw, device=device) * 3 / width**0.5
        targets = torch.randint(vocabulary, (rows,), generator=draw, device=device)
        coef = torch.randn(rows, generator=draw, device=device)
        return cls(
            hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, coef
        )

    def gradients(self, logp: Tensor) -> tuple[Tensor, ...]:
        """Backward pass of the weighted sum of logp."""
        return torch.autograd.grad((logp * self.coef).sum(), (self.hidden, self.weight))

    def plain(self) -> tuple[Tensor, ...]:
        """Materialised logits and logp, forward and backward; captures nothing."""
        return self.gradients(trl_selective(self.hidden @ self.weight.T, self.targets))

    def official(self) -> tuple[Tensor, ...]:
        """`plain` with the official entropy and sum of p^2."""
        logits = self.hidden @ self.weight.T
        logp = trl_selective(logits, self.targets)
        with torch.no_grad():
            chunked_entropy(logits)
            logits.softmax(dim=-1).pow(2).sum(dim=-1)
        return self.gradients(logp)

    def beside(self) -> tuple[Tensor, ...]:
        """`plain` with our statistics read beside its logp."""
        logits = self.hidden @ self.weight.T
        logp = trl_selective(logits, self.targets)
        with torch.no_grad():
            token_stats(logits, self.targets)
        return self.gradients(logp)

    def fused(self) -> tuple[Tensor, ...]:
        """All statistics and a differentiable logp, logits never whole."""
        return self.gradients(fused_head_stats(self.hidden, self.weight, self.targets).logp)

    def again(self) -> tuple[Tensor, ...]:
        """`fused` where memory is short: the backward pass makes the logits again."""
        stats = fused_head_stats(self.hidden, self.weight, self.targets, chunk_rows=256)
        return self.gradients(stats.logp)

    @torch.no_grad()
    def products(self) -> tuple[Tensor, ...]:
        """The matrix products of a head that makes its logits twice, and nothing else."""
        logits = self.hidden @ self.weight.T
        torch.mm(self.hidden, self.weight.T, out=logits)
        return logits @ self.weight, logits.T @ self.hidden

    def official_forward(self) -> tuple[Tensor, ...]:
        """Product and official three passes, forward only."""
        return three_pass(self.hidden @ self.weight.T, self.targets)

    def fused_forward(self) -> Tensor:
        """Fused head, forward only."""
        return fused_head_stats(self.hidden, self.weight, self.targets).logp


def measure(options: Options) -> Measures:
    """Ratios of all cases, the worse one of each dtype; keys of bfloat16 end in _bf16."""
    found: dict[str, list[Measures]] = {}
    for rows, vocabulary, width, dtype in _QUICK if options.quick else _FULL:
        count = options.size(rows)
        short = str(dtype).removeprefix("torch.")
        note = f"{count} x {vocabulary}, width {width}, {short}"
        options.say(f"head: {note}")
        head = Head.random(count, vocabulary, width, dtype)
        check(head)
        suffix = "" if dtype == torch.float32 else "_bf16"
        found.setdefault(suffix, []).append(_ratios(_timed(head, options), note))
    return {
        f"{key}{suffix}": worst(case[key] for case in cases)
        for suffix, cases in found.items()
        for key in cases[0]
    }


def check(head: Head) -> None:
    """Compare statistics and gradients of the fused head with those of materialised logits.

    Raises
    ------
    GateError
        If they differ by more than rounding.
    """
    with torch.no_grad():
        stats = fused_head_stats(head.hidden, head.weight, head.targets)
        exact = exact_stats(head.hidden @ head.weight.T, head.targets)
    if head.hidden.dtype == torch.bfloat16:
        gate_close("fused head logp", stats.logp, exact.logp, _GATE_BF16)
        gate_close("fused head entropy", stats.entropy, exact.entropy, _GATE_BF16)
    else:
        gate("fused head", stats, exact, _GATE)
    limit = _GRADIENT[head.hidden.dtype]
    for name, found, base in zip(("hidden", "weight"), head.fused(), head.plain(), strict=True):
        away = float((found.float() - base.float()).norm() / base.float().norm())
        if not away <= limit:
            raise GateError(f"fused head is not timed, gradient of {name} is {away:.1e} off")


def _timed(head: Head, options: Options) -> Timings:
    variants: dict[str, Work] = {"plain": head.plain, "fused": head.fused}
    if not options.quick:
        variants["official"], variants["beside"] = head.official, head.beside
        variants["products"], variants["again"] = head.products, head.again
        variants["official forward"] = _without_grad(head.official_forward)
        variants["fused forward"] = _without_grad(head.fused_forward)
    # In a quick bench the check has just run both variants.
    return interleave(variants, options.rounds_or(2, 5), warm=options.quick)


def _without_grad(work: Work) -> Work:
    def run() -> None:
        with torch.no_grad():
            work()

    return run


def _ratios(times: Timings, note: str) -> Measures:
    found = {"fused_head_vs_no_capture": times.ratio("fused", "plain", note)}
    if "official" in times.seconds:
        found["official_head_vs_no_capture"] = times.ratio("official", "plain", note)
        found["beside_head_vs_no_capture"] = times.ratio("beside", "plain", note)
        found["fused_head_again_vs_no_capture"] = times.ratio("again", "plain", note)
        found["head_products_vs_no_capture"] = times.ratio("products", "plain", note)
        forward = times.ratio("fused forward", "official forward", note)
        found["fused_forward_vs_official_forward"] = forward
    return found
