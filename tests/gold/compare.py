"""Comparing a recomputed quantity with a stored one under a stated tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Passes where ``|a - b| <= rtol * |b| + atol``; both 0 means exact equality."""

    rtol: float = 0.0
    atol: float = 0.0

    def error(self, found: ArrayLike, stored: ArrayLike) -> float:
        """Largest ``|a - b| / (|b| + atol / rtol)``, to be compared with ``rtol``.

        Non-finite values must agree exactly (NaN equals NaN); any that does not, and any
        difference where equality is asked, is an infinite error.
        """
        a = np.atleast_1d(np.asarray(found, dtype=np.float64))
        b = np.atleast_1d(np.asarray(stored, dtype=np.float64))
        finite = np.isfinite(a) & np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return math.inf
        gap, size = np.abs(a[finite] - b[finite]), np.abs(b[finite])
        if self.rtol == 0:
            return math.inf if gap.any() else 0.0
        floor = max(self.atol / self.rtol, np.finfo(np.float64).tiny)
        return float(np.max(gap / (size + floor), initial=0.0))


EXACT = Tolerance()
PARTITION = Tolerance(1e-12, 0.0)
"""Advantages and weights before any logit: bit-exact up to the platform's square root."""

_FLOAT64 = Tolerance(1e-6, 1e-8)
_FLOAT32 = Tolerance(1e-4, 1e-6)
_STATISTIC64 = Tolerance(1e-9, 1e-11)
_STATISTIC32 = Tolerance(1e-4, 3e-6)
_SUM64 = Tolerance(1e-5, 1e-7)
_SUM32 = Tolerance(2e-4, 2e-6)

_BY_QUANTITY: dict[str, tuple[Tolerance, Tolerance]] = {
    **dict.fromkeys(("advantages", "seq_loss_weights"), (PARTITION, PARTITION)),
    **dict.fromkeys(("trainer_logprobs", "entropies", "sum_p_sq"), (_STATISTIC64, _STATISTIC32)),
    # The float32 log-probability's own rounding (official: logit - logsumexp) is the error here.
    "per_token_loss": (_FLOAT64, _STATISTIC32),
    **dict.fromkeys(
        (
            "mb_summary_sum",
            "mb_grad_mass_sum",
            "step_grad_mass",
            "step_token_strength_coarse",
            "step_token_strength_fine",
            "rank0_logged_metrics",
            "batch_metrics",
            "summaries",
            "grad_mass",
        ),
        (_SUM64, _SUM32),
    ),
    **dict.fromkeys(
        (
            "shifted_loss_mask",
            "keep_mask",
            "is_valley",
            "is_clipped",
            "mb_summary_count",
            "mb_grad_mass_count",
            "mb_token_count",
            "mb_bin_counts",
            "step_token_count",
            "rank0_bin_counts",
            "loss_normalizer",
            "items",
            "signed_groups",
            "bin_counts",
            "token_counts",
            "summary_counts",
        ),
        (EXACT, EXACT),
    ),
}


def tolerance_of(quantity: str, double: bool) -> Tolerance:
    """Tolerance of a quantity in float64 (``double``) or float32.

    Integers and masks are exact; advantages and first weights 1e-12; log-probability, entropy and
    collision 1e-9; losses, gradients and ratios rtol 1e-6 + atol 1e-8; metric sums 1e-5, because
    they are float32 even in the float64 run. In float32 runs the limits are those of float32.
    """
    return _BY_QUANTITY.get(quantity, (_FLOAT64, _FLOAT32))[0 if double else 1]


@dataclass(frozen=True, slots=True)
class Check:
    """One compared quantity of one golden item."""

    quantity: str
    precision: str
    error: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Within the limit; NaN is not."""
        return self.error <= self.limit

    def __str__(self) -> str:
        """Return one line for a failure list."""
        detail = self.note or f"error {self.error:.3g}, limit {self.limit:.3g}"
        return f"{self.quantity} ({self.precision}): {detail}"


def check(quantity: str, precision: str, found: Any, stored: Any) -> Check:
    """Compare one quantity; a missing one, another shape or other keys fail with a note.

    Parameters
    ----------
    quantity : str
        Name that picks the tolerance and labels the result.
    precision : {"float64", "float32"}
        Precision of the run.
    found : array_like or mapping of str to number
        Recomputed.
    stored : array_like, mapping or None
        From the golden file; None if it is not there.
    """
    limit = tolerance_of(quantity, precision == "float64")
    if stored is None:
        return Check(quantity, precision, math.inf, limit.rtol, "missing from the golden file")
    if isinstance(found, Mapping):
        if not isinstance(stored, Mapping) or set(found) != set(stored):
            return Check(quantity, precision, math.inf, limit.rtol, "its keys differ")
        found, stored = [found[k] for k in sorted(found)], [stored[k] for k in sorted(found)]
    a, b = np.asarray(found, dtype=np.float64), np.asarray(stored, dtype=np.float64)
    if a.shape != b.shape:
        note = f"shape {a.shape} recomputed, {b.shape} stored"
        return Check(quantity, precision, math.inf, limit.rtol, note)
    return Check(quantity, precision, limit.error(a, b), limit.rtol)
