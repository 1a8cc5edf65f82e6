"""Official counts and sums per bin as rows of the ``classes`` table, where they determine them.

The official "pos" of ``token_bins`` is A >= 0. Tokens without advantage can be told apart where the
trainer keeps positive sequences alone (then kept = A > 0), or where no such token exists, which
``token_count`` (A > 0) or a complete scatter shows. Elsewhere they stay
among pos, and that is said.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.rows import all_missing
from wapo_analysis.schema import CLASSES, PAPER_EDGES, PROB_EDGES
from wapo_analysis.table import Array, Records

_REGIMES = {"peak": 1, "valley": 0}
_PAPER_BINS = tuple(PROB_EDGES.index(edge) for edge in PAPER_EDGES[:-1])


@dataclass
class StepCounts:
    """What the official files count in one step.

    Attributes
    ----------
    bins : dict of str to int
        ``<pos|neg>_<valley|peak>_<eligible|kept>``.
    filtered : bool
        Bins were included or excluded by a setting, so kept says nothing about the sign.
    token_count, grad_mass : dict of int to ndarray, shape (5,)
        By sign of A (1, -1), over the paper's bins of p; grad_mass is a mean per token.
    sampled : int
        Tokens of the scatter, and in ``zeros`` those of them without advantage.
    """

    bins: dict[str, int] = field(default_factory=dict)
    filtered: bool = False
    token_count: dict[int, Array] = field(default_factory=dict)
    grad_mass: dict[int, Array] = field(default_factory=dict)
    sampled: int = 0
    zeros: int = 0

    @staticmethod
    def gated(steps: "Iterable[StepCounts]") -> bool:
        """Whether the trainer drops sequences with A <= 0: no negative token is ever kept."""
        told = [s for s in steps if s.bins and not s.filtered and s.count("neg", "eligible") > 0]
        return bool(told) and all(s.count("neg", "kept") == 0 for s in told)

    def count(self, sign: str, what: str) -> int:
        """Tokens of a sign, "eligible" or "kept", both regimes."""
        return sum(self.bins.get(f"{sign}_{regime}_{what}", 0) for regime in _REGIMES)

    def without_zero(self) -> bool:
        """Whether no token of the step has zero advantage, as far as the files can show."""
        if self.token_count and int(self.token_count[1].sum()) == self.count("pos", "eligible"):
            return True
        total = self.count("pos", "eligible") + self.count("neg", "eligible")
        return self.sampled == total and self.zeros == 0


def class_table(step: int, counts: StepCounts, gated: bool, report: ImportReport) -> Records:
    """Rows of the ``classes`` table of one step.

    Class rows have a regime and the bin -1 (not known); bin rows have a bin and the regime -1. A
    token is counted once: bin rows carry the proxy alone where class rows exist. The paper's last
    bin [0.5, 1) is stored under the first of ours that lie in it.
    """
    rows = _class_cells(counts, gated, report) + _bin_cells(counts)
    if not rows:
        return Records.build(CLASSES, {name: [] for name in CLASSES.required})
    names = ("sign", "regime", "prob_bin", "tokens", "kept", "grad_mass_proxy")
    sign, regime, prob_bin, tokens, kept, proxy = (
        np.array([np.nan if v is None else v for v in column], np.float64)
        for column in zip(*rows, strict=True)
    )
    built = dict(zip(names, (sign, regime, prob_bin, tokens, kept, proxy), strict=True))
    columns = {name: _whole(built[name]) for name in names[:-1]}
    absent = all_missing(len(rows))
    return Records.build(
        CLASSES,
        {
            **columns,
            "step": np.full(len(rows), step),
            "rank": np.zeros(len(rows)),
            "grad_mass_proxy": proxy,
            "clipped": absent,
            "rule_breaks": absent,
        },
    )


_Cell = tuple[int, int, int, int | None, int | None, float | None]


def _whole(values: Array) -> Array:
    missing = np.isnan(values)
    filled = np.where(missing, 0, values).astype(np.int64)
    return np.ma.masked_array(filled, mask=missing) if missing.any() else filled


def _class_cells(counts: StepCounts, gated: bool, report: ImportReport) -> list[_Cell]:
    if not counts.bins:
        return []
    exact = counts.without_zero()
    split = gated and not counts.filtered and not exact
    if not exact and not split:
        report.counts["steps whose pos counts include tokens without advantage (A >= 0)"] += 1
    cells: list[_Cell] = []
    for name, regime in _REGIMES.items():
        eligible = counts.bins.get(f"pos_{name}_eligible", 0)
        kept = counts.bins.get(f"pos_{name}_kept", 0)
        if split:
            cells += [(1, regime, -1, kept, kept, None), (0, regime, -1, eligible - kept, 0, None)]
        else:
            cells.append((1, regime, -1, eligible, kept, None))
            cells += [(0, regime, -1, 0, 0, None)] if exact else []
        negative = counts.bins.get(f"neg_{name}_eligible", 0)
        cells.append((-1, regime, -1, negative, counts.bins.get(f"neg_{name}_kept", 0), None))
    # Zeros stay: a class without tokens is known to be empty, although bin rows lack a regime.
    return cells


def _bin_cells(counts: StepCounts) -> list[_Cell]:
    """Proxy of the gradient mass per bin: the official mean times the official count."""
    cells: list[_Cell] = []
    for sign, per_bin in counts.token_count.items():
        means = counts.grad_mass.get(sign)
        for place, prob_bin in enumerate(_PAPER_BINS):
            tokens = int(per_bin[place])
            if not tokens:
                continue
            mass = None if means is None else float(means[place]) * tokens
            counted = None if counts.bins else tokens
            if mass is not None or counted is not None:
                cells.append((sign, -1, prob_bin, counted, None, mass))
    return cells
