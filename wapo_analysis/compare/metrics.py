"""What is compared: one number per run and metric, and its interval over seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import wapo_taxonomy as tax
from scipy import special

from wapo_analysis.derive import class_codes
from wapo_analysis.store import Run
from wapo_analysis.table import Array

EDGE = 0.1
"""Part of the steps that counts as first and as last."""
CONFIDENCE = 0.95
MAX_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean of a few numbers with the half-width of its interval; NaN half-width below two."""

    n: int
    mean: float
    half: float

    @classmethod
    def of(cls, values: Array) -> "Interval":
        """Mean and 95% Student-t half-width of the finite values, shape (n,)."""
        known = np.asarray(values, np.float64)
        known = known[np.isfinite(known)]
        n = len(known)
        if n == 0:
            return cls(0, float("nan"), float("nan"))
        spread = float(np.std(known, ddof=1)) / np.sqrt(n) if n > 1 else float("nan")
        quantile = float(special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) if n > 1 else float("nan")
        return cls(n, float(known.mean()), quantile * spread)

    @property
    def clear(self) -> bool:
        """The interval leaves out zero."""
        return bool(np.isfinite(self.half) and abs(self.mean) > self.half)

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values for JSON; what is not known is None."""
        ends = {"mean": self.mean, "low": self.mean - self.half, "high": self.mean + self.half}
        return {"n": self.n} | {k: v if np.isfinite(v) else None for k, v in ends.items()}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the comparison.

    Attributes
    ----------
    name : str
        Key in data frames and JSON.
    title : str
        Words in tables, unit included.
    value : callable
        Run to number, NaN if the run cannot give it.
    percent : bool
        It is a share, shown in percent.
    """

    name: str
    title: str
    value: Callable[[Run], float]
    percent: bool = False

    def show(self, interval: Interval, signed: bool = False) -> str:
        """Mean and half-width to two digits of the latter, such as ``0.52 ± 0.03``.

        A signed share is a difference of shares, in percentage points; no value is ``n/a``.
        """
        if interval.n == 0:
            return "n/a"
        scale = 100.0 if self.percent else 1.0
        unit = "" if not self.percent else " pp" if signed else "%"
        mean, half = interval.mean * scale, interval.half * scale
        plus = "+" if signed else ""
        if not np.isfinite(half):
            return _unsigned_zero(f"{mean:{plus}{'.1f' if self.percent else '.3g'}}") + unit
        digits = 1 - int(np.floor(np.log10(half))) if half > 0 else 2
        decimals = min(max(digits, 0), 1 if self.percent else MAX_DECIMALS)
        shown = _unsigned_zero(f"{mean:{plus}.{decimals}f}")
        return f"{shown} ± {half:.{decimals}f}{unit}"


def _unsigned_zero(number: str) -> str:
    """A number that rounds to zero has no sign."""
    return number.lstrip("+-") if not number.strip("+-0.") else number


def _edge_mean(run: Run, column: str, last: bool) -> float:
    """Mean of a step column over the first or last tenth of its finite values."""
    numbers = pd.to_numeric(run.steps[column], errors="coerce").to_numpy(np.float64)
    known = numbers[np.isfinite(numbers)]
    count = max(1, int(len(known) * EDGE))
    part = known[-count:] if last else known[:count]
    return float(part.mean()) if len(part) else float("nan")


def _class_sums(run: Run, column: str) -> pd.Series:
    """Sum of a class total over the whole run, per class code; NaN where none was recorded."""
    cells = run.classes
    sums = cells[column].groupby(class_codes(cells["cls"])).sum(min_count=1)
    return pd.to_numeric(sums)


def _token_share(run: Run, code: int) -> float:
    sums = _class_sums(run, "tokens")
    known = sums.drop(tax.CLASS_CODES[tax.UNKNOWN], errors="ignore")
    return float(known.get(code, 0.0) / sums.sum()) if len(known) else float("nan")


def _flow_share(run: Run, code: int) -> float:
    """Signed predicted dH of a class over the sum of the sizes of all four."""
    sums = _class_sums(run, "pred_dentropy_sum").reindex(range(len(tax.CLASSES)))
    gross = float(sums.abs().sum())
    return float(sums.fillna(0.0)[code]) / gross if gross > 0 else float("nan")


METRICS: tuple[Metric, ...] = (
    Metric("reward_first", "reward, first 10% of steps",
           partial(_edge_mean, column="reward", last=False)),
    Metric("reward_last", "reward, last 10%", partial(_edge_mean, column="reward", last=True)),
    Metric("entropy_first", "entropy, first 10% (nats)",
           partial(_edge_mean, column="entropy", last=False)),
    Metric("entropy_last", "entropy, last 10% (nats)",
           partial(_edge_mean, column="entropy", last=True)),
    Metric("grad_norm_last", "gradient norm, last 10%",
           partial(_edge_mean, column="grad_norm", last=True)),
    *(Metric(f"tokens_{name}", f"tokens in {name}",
             partial(_token_share, code=tax.CLASS_CODES[name]), percent=True)
      for name in tax.CLASSES),
    Metric("tokens_none", "tokens without advantage",
           partial(_token_share, code=tax.CLASS_CODES[tax.NONE]), percent=True),
    *(Metric(f"flow_{name}", f"predicted dH, share of {name}",
             partial(_flow_share, code=tax.CLASS_CODES[name]), percent=True)
      for name in tax.CLASSES),
)  # fmt: skip
