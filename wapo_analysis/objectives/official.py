"""Where the published WAPO code (layer6ai-labs/wapo) does otherwise than the safe default.

One object of named rules, read by `wapo_analysis.objectives` alone: whoever trains, watches or
replays calls the same functions either way. docs/objectives.md tells each rule in words;
tests/unit/objectives/test_hazards.py holds both sides of every known defect. Loads no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wapo_analysis.objectives.table import MAX_LOG_RATIO


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is done where the published code has a defect; the defaults are the safe side."""

    exact_deviations: bool = True
    """r - mean of rounding size is exactly 0; else sums run left to right and residues stay."""
    zero_has_no_class: bool = True
    """A zero advantage belongs to no class; else it is positive in bins."""
    max_log_ratio: float = MAX_LOG_RATIO
    """Largest |log-ratio| (nats) that is exponentiated."""
    masks_select: bool = True
    """Nothing outside the kept tokens reaches value or gradient; else masks multiply, NaN too."""
    kept_per_minibatch: bool = True
    """Kept tokens are counted over the mini-batch; else per micro-batch, with phantom tokens."""
    fair_units: bool = True
    """The mean is over the units of all ranks, float64; else held at one unit a rank, float32."""
    strict_names: bool = True
    """Unknown bins and levels, and settings that keep no token, are refused; else ignored."""


SAFE = Rules()
OFFICIAL = Rules(
    exact_deviations=False,
    zero_has_no_class=False,
    max_log_ratio=math.inf,
    masks_select=False,
    kept_per_minibatch=False,
    fair_units=False,
    strict_names=False,
)


def rules(official: bool) -> Rules:
    """Rules in force: the published code's own, or the safe ones."""
    return OFFICIAL if official else SAFE
