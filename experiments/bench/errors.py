"""Errors against float64: the gate every timed variant passes, and the numbers on precision.

Relative errors of logp, H, the gradient norm g = sqrt((1-p)^2 + C_o) and of B, the change of the
entropy per unit step with reversed sign, B = p(1-p)(ln p + H) - (Q_o + C_o H). g and B come from
the statistics by `wapo_taxonomy`, in float64, as when a run is read.

B is a sum of four products that passes through zero, where no relative error exists: even
statistics that are right to the last bit of float32 cannot give it there. Its error is divided by
|B|, or, where |B| is less than a tenth of the sizes of the four products together, by that tenth.
Beside it stand the greatest and the 99th percentile of the error over |B| alone, and what the
exact statistics, rounded to float32, give. Wrong signs are counted over all tokens, none left out.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import wapo_taxonomy as tax
from torch import Tensor

from experiments.bench.data import Rows, load_rows, model_rows, rlvr_rows
from experiments.bench.harness import Measure, Measures
from experiments.bench.options import Options
from experiments.bench.reference import exact_stats, four_pass
from wapo_analysis.stats import TokenStats, token_stats

MUST = 1e-4
"""Greatest relative error a variant may have to be timed."""
_NEAR_ZERO = 0.1


class GateError(AssertionError):
    """A variant's numbers are wrong, so its time says nothing."""


@dataclass(frozen=True)
class Errors:
    """Greatest relative error of each quantity over N tokens, and wrong signs of B.

    ``dentropy_alone`` and ``dentropy_alone_p99``: error of B over |B| alone.
    """

    logp: float
    entropy: float
    grad_norm: float
    dentropy: float
    dentropy_alone: float
    dentropy_alone_p99: float
    wrong_signs: int

    @property
    def worst(self) -> float:
        """Greatest of the relative errors."""
        return max(self.logp, self.entropy, self.grad_norm, self.dentropy)

    def __str__(self) -> str:
        return (
            f"logp {self.logp:.1e}, H {self.entropy:.1e}, g {self.grad_norm:.1e}, "
            f"B {self.dentropy:.1e}, wrong signs {self.wrong_signs}"
        )


def _grad_norm(stats: TokenStats) -> Tensor:
    complement = -torch.expm1(stats.logp.double())
    norm: Tensor = tax.grad_norm(1.0, complement, stats.collision_rest.double())
    return norm


def _dentropy(stats: TokenStats) -> Tensor:
    logp, entropy = stats.logp.double(), stats.entropy.double()
    rest, logp_rest = stats.collision_rest.double(), stats.collision_logp_rest.double()
    change: Tensor = tax.dentropy(
        1.0, logp.exp(), -torch.expm1(logp), logp, entropy, rest, logp_rest
    )
    return change


def _dentropy_scale(exact: TokenStats) -> Tensor:
    """What the error of B is divided by, shape (N,)."""
    sampled = exact.logp.exp() * -torch.expm1(exact.logp) * (exact.logp.abs() + exact.entropy)
    rest = exact.collision_logp_rest.abs() + exact.collision_rest * exact.entropy
    return torch.maximum(_dentropy(exact).abs(), _NEAR_ZERO * (sampled + rest))


def _relative(found: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    """|found - true| / scale; 0 where both are equal, inf where found is not finite."""
    off = (found.double() - true).abs()
    relative = torch.where(off == 0, 0.0, off / scale)
    return torch.where(torch.isfinite(found.double()), relative, torch.inf)


def _greatest(found: Tensor, true: Tensor, scale: Tensor) -> float:
    return float(_relative(found, true, scale).max()) if len(true) else 0.0


def errors_of(stats: TokenStats, exact: TokenStats) -> Errors:
    """Errors of statistics against those in float64 on the same logits; see the module's head."""
    change, true_change = _dentropy(stats), _dentropy(exact)
    true_norm, alone = _grad_norm(exact), _relative(change, true_change, true_change.abs())
    return Errors(
        logp=_greatest(stats.logp, exact.logp, exact.logp.abs()),
        entropy=_greatest(stats.entropy, exact.entropy, exact.entropy.abs()),
        grad_norm=_greatest(_grad_norm(stats), true_norm, true_norm),
        dentropy=_greatest(change, true_change, _dentropy_scale(exact)),
        dentropy_alone=float(alone.max()) if len(alone) else 0.0,
        dentropy_alone_p99=float(alone.quantile(0.99)) if len(alone) else 0.0,
        wrong_signs=int((change.sign() != true_change.sign()).sum()),
    )


def gate(name: str, stats: TokenStats, exact: TokenStats, must: float = MUST) -> Errors:
    """Check a variant's statistics before it is timed.

    Raises
    ------
    GateError
        If a relative error exceeds ``must`` or a sign of B is wrong.
    """
    found = errors_of(stats, exact)
    if not found.worst <= must or found.wrong_signs:
        raise GateError(f"{name} is not timed, its numbers are off: {found}")
    return found


def gate_close(name: str, found: Tensor, exact: Tensor, tolerance: float) -> None:
    """Check that a reference program computes the same quantity: mean |difference| in nats.

    Raises
    ------
    GateError
        If it does not. Its own rounding, which may be coarse, is not held against it.
    """
    away = float((found.double() - exact).abs().mean())
    if not away <= tolerance:
        raise GateError(f"{name} is not timed, it is {away:.1e} nats off on average")


@dataclass(frozen=True)
class Textbook:
    """How the textbook forms fare on the same float32 logits, shares of the tokens.

    ``grad_norm_off`` and ``dentropy_off`` are more than 1% wrong; ``negative`` have
    1 - 2p + sum p^2 < 0, NaN under the root; ``wrong_signs`` of B.
    """

    grad_norm_off: float
    negative: float
    dentropy_off: float
    wrong_signs: float


def textbook_errors(rows: Rows, exact: TokenStats) -> Textbook:
    """Errors of sqrt(1 - 2p + S) and p(ln p + H) - (Q + S H) in the precision of the logits."""
    logp, entropy, collision, collision_logp = (
        x.double() for x in four_pass(rows.logits, rows.targets, rows.temperature)
    )
    prob = logp.exp()
    square = 1 - 2 * prob + collision
    norm, true_norm = square.clamp(min=0).sqrt(), _grad_norm(exact)
    change = -(prob * (logp + entropy) - (collision_logp + collision * entropy))
    true_change = _dentropy(exact)
    off = (change - true_change).abs() > 0.01 * _dentropy_scale(exact)
    return Textbook(
        grad_norm_off=_share((norm - true_norm).abs() > 0.01 * true_norm),
        negative=_share(square < 0),
        dentropy_off=_share(off),
        wrong_signs=_share(change.sign() != true_change.sign()),
    )


def _share(condition: Tensor) -> float:
    return float(condition.double().mean())


def measure(options: Options) -> Measures:
    """Errors of the default path on synthetic near-certain rows and, where given, on real ones."""
    found: Measures = {}
    total: list[Errors] = []
    for key, rows in _sets(options):
        options.say(f"errors: {len(rows.targets)} rows of {rows.source}")
        exact = exact_stats(rows.logits, rows.targets, rows.temperature)
        with torch.no_grad():
            stats = token_stats(rows.logits, rows.targets, rows.temperature)
        errors = errors_of(stats, exact)
        total.append(errors)
        note = f"{rows.source}, {len(rows.targets)} x {rows.logits.shape[1]}"
        found |= _named(key, errors, note)
        rounded = errors_of(exact.map(_as_float32), exact)
        found[f"error_{key}_dentropy_rounded"] = Measure(rounded.dentropy_alone, note=note)
        if rows.logits.dtype == torch.float32:
            found |= _textbook(key, rows, exact, note)
    found["max_rel_error"] = Measure(max(e.worst for e in total), note="worst of all sets")
    found["sign_errors"] = Measure(sum(e.wrong_signs for e in total), note="over all sets")
    return found


def _as_float32(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values


def _sets(options: Options) -> list[tuple[str, Rows]]:
    count = options.size(512 if options.quick else 2048)
    synthetic = rlvr_rows(count, 32_000 if options.quick else 49_152)
    sets = [("synthetic", synthetic), ("synthetic_bf16", synthetic.to(torch.bfloat16))]
    if options.logits is not None:
        sets.append(("recorded", load_rows(Path(options.logits))))
    if options.model is not None:
        options.say(f"errors: sampling from {options.model}")
        sets.append(("rollout", model_rows(options.model)))
    return sets


def _named(key: str, errors: Errors, note: str) -> Measures:
    """Each quantity's error of one set."""
    names = ("logp", "entropy", "grad_norm", "dentropy", "dentropy_alone", "dentropy_alone_p99")
    return {f"error_{key}_{name}": Measure(getattr(errors, name), note=note) for name in names}


def _textbook(key: str, rows: Rows, exact: TokenStats, note: str) -> Measures:
    forms = textbook_errors(rows, exact)
    certain = _share(exact.logp.exp() > 0.99)
    return {
        f"textbook_{key}_grad_norm_off_1pct": Measure(forms.grad_norm_off, note=note),
        f"textbook_{key}_square_negative": Measure(forms.negative, note=note),
        f"textbook_{key}_dentropy_off_1pct": Measure(forms.dentropy_off, note=note),
        f"textbook_{key}_wrong_signs": Measure(forms.wrong_signs, note=note),
        f"near_certain_share_{key}": Measure(certain, note=note),
    }
