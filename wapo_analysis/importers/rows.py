"""Rows of other tools to records of ours: missing stays missing, totals are exact."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.derive import class_totals, derive
from wapo_analysis.importers.jsonl import as_number
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.schema import CLASSES, PAPER_EDGES, PROB_EDGES, Column, Table
from wapo_analysis.table import Array, Records

_ABOVE_ONE = 1e-5


def filled_records(table: Table, frame: pd.DataFrame, report: ImportReport) -> Records:
    """Rows as records: absent or null integers and flags are masked, other absences are NaN.

    Parameters
    ----------
    table : Table
        Declaration to follow.
    frame : DataFrame
        Columns of the table; NaN, None and infinite numbers count as missing.
    report : ImportReport
        Counts the numbers that the column cannot hold.
    """
    rows = len(frame)
    columns: dict[str, Any] = {}
    for column in table.stored:
        given = frame[column.name] if column.name in frame else None
        if column.dtype == "str":
            columns[column.name] = _texts(given, rows)
        elif given is None and column.name in ("rank", "minibatch"):
            columns[column.name] = np.zeros(rows, dtype=column.dtype)
        else:
            values = _fitting(given, column, rows, report)
            floats = column.dtype.startswith("float")
            columns[column.name] = values if floats else _masked(values, column.dtype)
    return Records.build(table, columns)


def numbers(given: pd.Series | None, rows: int) -> Array:
    """Values as float64, shape (rows,); what no column can hold is NaN."""
    if given is None:
        return np.full(rows, np.nan)
    values = _floats(given)
    return np.where(np.abs(values) <= _most("float32"), values, np.nan)


def _fitting(given: pd.Series | None, column: Column, rows: int, report: ImportReport) -> Array:
    """Values as float64 that a column can hold; others are NaN and counted."""
    if given is None:
        return np.full(rows, np.nan)
    values, name = _floats(given), column.name
    lost: dict[str, Array] = {
        f"values of {name} that are no number, left out": given.notna().to_numpy()
        & np.isnan(values),
        f"{name} beyond {column.dtype}, now null": np.abs(values) > _most(column.dtype),
    }
    if column.dtype.startswith("int"):
        part = np.isfinite(values) & (values != np.rint(values))
        lost[f"{name} that is no whole number, now null"] = part
    for what, places in lost.items():
        if places.any():
            report.counts[what] += int(places.sum())
            values = np.where(places, np.nan, values)
    return values


def _most(dtype: str) -> float:
    """Largest finite number of a column."""
    if dtype == "bool":
        return 1.0
    return float(np.iinfo(dtype).max if dtype.startswith("int") else np.finfo(dtype).max)


def _floats(given: pd.Series) -> Array:
    """Values as float64; whatever is no number is NaN."""
    try:
        return pd.to_numeric(given, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError, OverflowError):  # lists, objects, integers beyond all floats
        found = (as_number(value) for value in given)
        return np.array([np.nan if n is None else n for n in found], np.float64)


def _masked(values: Array, dtype: str) -> Array:
    missing = np.isnan(values)
    whole: Array = np.ma.masked_array(np.nan_to_num(values).astype(dtype), mask=missing)
    return whole if missing.any() else np.asarray(whole)


def _texts(given: pd.Series | None, rows: int) -> list[str | None]:
    if given is None:
        return [None] * rows
    return [value if isinstance(value, str) else None for value in given]


def all_missing(rows: int) -> Array:
    """An integer column in which every entry is missing, shape (rows,)."""
    return np.ma.masked_array(np.zeros(rows, np.int64), mask=np.ones(rows, bool))


def clean_tokens(frame: pd.DataFrame, report: ImportReport) -> pd.DataFrame:
    """Token rows that have an advantage, with log-probabilities of at most zero.

    ``prob``, ``prob_old`` and ``collision`` are turned into ``logp``, ``logp_old`` and
    ``collision_rest``. A row without advantage has no sign and is left out; everything is counted.
    """
    frame = _from_probabilities(_in_mask(frame), report)
    for name in ("logp", "logp_old", "logp_after", "entropy", "advantage"):
        if name in frame:
            frame = frame.assign(**{name: _counted(frame[name], report)})
    for name in ("logp", "logp_old", "logp_after"):
        if name in frame:
            frame = frame.assign(**{name: _at_most_zero(frame[name].to_numpy(), name, report)})
    signed = frame["advantage"].notna()
    if not signed.all():
        report.counts["token rows without an advantage left out"] += int((~signed).sum())
    return frame[signed]


def _in_mask(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the loss mask: prompt and environment tokens take no part in anything here."""
    if "loss_mask" not in frame:
        return frame
    inside = numbers(frame["loss_mask"], len(frame)) != 0
    return frame.loc[inside, [name for name in frame if name != "loss_mask"]]


def _from_probabilities(frame: pd.DataFrame, report: ImportReport) -> pd.DataFrame:
    for prob, name in (("prob", "logp"), ("prob_old", "logp_old")):
        if prob in frame and name not in frame:
            values = numbers(frame[prob], len(frame))
            zero = int((values <= 0).sum())
            if zero:
                report.counts[f"{prob} of 0 or less, {name} null"] += zero
            frame = frame.assign(**{name: np.log(np.where(values > 0, values, np.nan))})
    if "collision" in frame and "collision_rest" not in frame:
        logp = numbers(frame["logp"], len(frame))
        rest = numbers(frame["collision"], len(frame)) - np.exp(2 * logp)
        # S - p^2 loses its digits where p is near 1; rest is at most (1 - p)^2 and never negative.
        rest = np.clip(rest, 0.0, np.expm1(logp) ** 2)
        frame = frame.assign(collision_rest=rest)
        report.note(
            "collision_rest is the given sum of p_v^2 minus p^2, so it has few digits where p is "
            "close to 1; it is kept within [0, (1 - p)^2]"
        )
    return frame.drop(columns=["prob", "prob_old", "collision"], errors="ignore")


def _counted(given: pd.Series, report: ImportReport) -> Array:
    values = _floats(given)
    wild = np.abs(values) > _most("float32")
    if wild.any():
        report.counts["numbers that were not finite, now null"] += int(wild.sum())
    missing = given.notna().to_numpy() & np.isnan(values)
    if missing.any():
        report.counts["values that are no number, now null"] += int(missing.sum())
    return np.where(wild, np.nan, values)


def _at_most_zero(values: Array, name: str, report: ImportReport) -> Array:
    impossible = values > _ABOVE_ONE
    if impossible.any():
        report.counts[f"{name} above 0, now null"] += int(impossible.sum())
    return np.where(impossible, np.nan, np.minimum(values, 0.0))


def class_rows(tokens: Records, temperature: float) -> Records:
    """Class totals of token records; a total of a flag or rule the source cannot give is masked.

    ``tokens``: rows of :func:`filled_records`; ``kept`` and ``clipped`` may be masked;
    ``temperature``: softmax temperature of the statistics.
    """
    lacking = {name: bool(np.ma.getmaskarray(tokens[name]).any()) for name in ("kept", "clipped")}
    plain = tokens.with_columns(
        {name: np.ma.filled(tokens[name], name == "kept") for name in lacking}
        | {name: np.ma.filled(tokens[name], 0) for name in ("step", "rank")}
    )
    derived = derive(plain, temperature)
    unknown = np.isnan(tokens["logp"])
    bins = np.where(unknown, -1, derived["prob_bin"]).astype(np.int8)
    totals = class_totals(derived.with_columns({"prob_bin": bins}))
    masked = {name: all_missing(len(totals)) for name, so in lacking.items() if so}
    blind = np.isnan(totals["pred_dentropy_sum"])
    masked["rule_breaks"] = np.ma.masked_array(totals["rule_breaks"], mask=blind)
    return totals.with_columns(masked)


_REGIMES = {"peak": 1, "valley": 0}
_PAPER_BINS = tuple(PROB_EDGES.index(edge) for edge in PAPER_EDGES[:-1])


@dataclass
class StepCounts:
    """What the official files count in one step."""

    #: ``<pos|neg>_<valley|peak>_<eligible|kept>``.
    bins: dict[str, int] = field(default_factory=dict)
    #: Bins were included or excluded by a setting, so kept says nothing about the sign.
    filtered: bool = False
    #: (5,): by sign of A (1, -1), over the paper's bins of p; grad_mass is a mean per token.
    token_count: dict[int, Array] = field(default_factory=dict)
    grad_mass: dict[int, Array] = field(default_factory=dict)
    #: Tokens of the scatter, and in ``zeros`` those of them without advantage.
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
    columns = {name: _masked(built[name], "int64") for name in names[:-1]}
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
