"""The comparison of settings: means over seeds, paired differences, the sentences they allow."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import wapo_taxonomy as tax
from scipy import special

from wapo_analysis.compare.divergence import Divergence, divergence
from wapo_analysis.derive import class_codes, per_class
from wapo_analysis.diagnose import VERDICT_WORDS, Diagnosis, diagnose
from wapo_analysis.errors import UserError, counted
from wapo_analysis.results import Grid, Items, Result, Say, Section
from wapo_analysis.settings import Setting, heads_up, settings_of
from wapo_analysis.store import Run
from wapo_analysis.table import Array

#: Part of the steps that counts as first and as last.
EDGE = 0.1
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
    numbers = run.column(column)
    known = numbers[np.isfinite(numbers)]
    count = max(1, int(len(known) * EDGE))
    part = known[-count:] if last else known[:count]
    return float(part.mean()) if len(part) else float("nan")


def _token_share(run: Run, code: int) -> float:
    cells = run.classes
    sums = pd.to_numeric(cells["tokens"].groupby(class_codes(cells["cls"])).sum(min_count=1))
    known = sums.drop(tax.CLASS_CODES[tax.UNKNOWN], errors="ignore")
    return float(known.get(code, 0.0) / sums.sum()) if len(known) else float("nan")


def _dentropy_share(run: Run, name: str) -> float:
    """Signed predicted dH of a class over the sum of the sizes of all four."""
    sums = per_class(run.classes, "pred_dentropy_sum").sum()
    gross = float(sums.abs().sum())
    return float(sums[name]) / gross if gross > 0 else float("nan")


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
    *(Metric(f"pred_dentropy_{name}", f"predicted dH, share of {name}",
             partial(_dentropy_share, name=name), percent=True)
      for name in tax.CLASSES),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs side by side. ``runs``: the runs, in the order given."""

    runs: tuple[Run, ...]

    @cached_property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Diagnosis of every run, in the order of the runs."""
        return tuple(diagnose(run) for run in self.runs)

    @cached_property
    def per_run(self) -> pd.DataFrame:
        """One row per run: label, objective, seed, run, verdict, and every metric."""
        rows = [
            {
                "label": label,
                "objective": run.objective,
                "seed": run.seed,
                "run": run.name,
                "verdict": found.verdict,
                **{metric.name: metric.value(run) for metric in METRICS},
            }
            for label, run, found in zip(self.label_of, self.runs, self.diagnoses, strict=True)
        ]
        return pd.DataFrame(rows)

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """Runs that are seeds of one setting, in the order of their first run."""
        return settings_of(self.runs)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the settings."""
        return tuple(setting.label for setting in self.settings)

    @cached_property
    def label_of(self) -> tuple[str, ...]:
        """Label of the setting of every run, in the order of the runs."""
        by_place = {place: s.label for s in self.settings for place in s.places}
        return tuple(by_place[place] for place in range(len(self.runs)))

    @property
    def title(self) -> str:
        """What is compared."""
        steps = max(len(run.steps) for run in self.runs)
        names = self.labels
        many = " against ".join(names) if len(names) < 4 else f"{len(names)} settings"
        return f"{many}, {counted(steps, 'step')}, {counted(len(self.runs), 'run')}"

    def interval(self, label: str, metric: Metric) -> Interval:
        """Mean of a metric over the seeds of a setting."""
        rows = self.per_run[self.per_run["label"] == label]
        return Interval.of(rows[metric.name].to_numpy())

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per setting and metric: label, metric, title, n, mean, low, high."""
        rows = [
            {
                "label": label,
                "metric": metric.name,
                "title": metric.title,
                **self.interval(label, metric).to_dict(),
            }
            for label in self.labels
            for metric in METRICS
        ]
        return pd.DataFrame(rows).astype({"mean": float, "low": float, "high": float})

    def difference(self, metric: Metric) -> Interval:
        """Second setting minus the first, seed by seed over the seeds both have.

        Raises UserError if there are fewer than two settings.
        """
        if len(self.labels) < 2:
            raise UserError("a difference needs runs of two labels; give a second setting")
        by_seed = self.per_run.dropna(subset=["seed"]).groupby(["label", "seed"])[metric.name]
        means = by_seed.mean()
        first, second = (means.get(label, pd.Series(dtype=float)) for label in self.labels[:2])
        shared = first.index.intersection(second.index)
        return Interval.of((second[shared] - first[shared]).to_numpy())

    @cached_property
    def divergence(self) -> Divergence | None:
        """Where the second setting parts from the first; None for one setting alone.

        Runs are paired by seed, or in the order given where no seed is shared. Two runs of one
        label are compared with each other.
        """
        if len(self.labels) < 2 and len(self.runs) != 2:
            return None
        sides = (
            [list(setting.runs) for setting in self.settings[:2]]
            if len(self.labels) > 1
            else [[run] for run in self.runs]
        )
        names = self.labels[:2] if len(self.labels) > 1 else [run.name for run in self.runs]
        by_seed = {run.seed: run for run in sides[1] if run.seed is not None}
        pairs = [(run, by_seed[run.seed]) for run in sides[0] if run.seed in by_seed]
        unlike = pairs or list(zip(*sides, strict=False))
        return divergence((names[0], names[1]), unlike, by_seed=bool(pairs))

    def rows(self) -> list[list[str]]:
        """The table as text: a header, then one row per quantity, one column per setting.

        With two settings or more a last column gives second minus first, paired by seed; an
        asterisk marks an interval that leaves out zero.
        """
        paired = len(self.labels) > 1
        counts = Counter(self.label_of)
        header = ["", *(f"{label} (n={counts[label]})" for label in self.labels)]
        verdicts = ["verdict", *(self._verdict_cell(label) for label in self.labels)]
        if paired:
            header.append(f"{self.labels[1]} minus {self.labels[0]}")
            verdicts.append("")
        return [header, verdicts, *(self._row(metric, counts, paired) for metric in METRICS)]

    def _row(self, metric: Metric, counts: Counter[str], paired: bool) -> list[str]:
        row = [metric.title]
        for label in self.labels:
            interval = self.interval(label, metric)
            fewer = f" (n={interval.n})" if 0 < interval.n < counts[label] else ""
            row.append(metric.show(interval) + fewer)
        if paired:
            gap = self.difference(metric)
            row.append(metric.show(gap, signed=True) + (" *" if gap.clear else ""))
        return row

    def _verdict_cell(self, label: str) -> str:
        verdicts = Counter(self.per_run.loc[self.per_run["label"] == label, "verdict"])
        if len(verdicts) == 1:
            return VERDICT_WORDS[next(iter(verdicts))]
        return ", ".join(f"{n} {VERDICT_WORDS[name]}" for name, n in verdicts.most_common())

    def sentences(self) -> list[str]:
        """All that is said beside the table: what to know first, its words, its limits."""
        return [*self.heads_up, *self.notes()]

    def notes(self) -> list[str]:
        """What the table says in words, one verdict per setting first, and what limits it."""
        parting = self.divergence.sentences() if self.divergence is not None else []
        return [*self._verdict_sentences(), *self._pair_sentence(), *parting, self._note()]

    def _verdict_sentences(self) -> list[str]:
        sentences = []
        for setting in self.settings:
            mine = [self.diagnoses[place] for place in setting.places]
            bad = [d for d in mine if d.onset_step is not None]
            counts = Counter(d.verdict for d in bad or mine).most_common()
            first = next(d for d in mine if d.verdict == counts[0][0])
            if len(mine) == 1:
                told = f"{VERDICT_WORDS[first.verdict]}."
            else:
                told = ", ".join(f"{VERDICT_WORDS[name]} in {n}" for name, n in counts)
                told += f" of {len(mine)} runs. {first.run}:"
            sentences.append(f"{setting.label}: {told} {first.sentence}")
        return sentences

    def _pair_sentence(self) -> list[str]:
        if len(self.labels) < 2:
            return []
        metric = next(m for m in METRICS if m.name == "reward_last")
        gap = self.difference(metric)
        first, second = self.labels[:2]
        if gap.n == 0:
            return [f"{second} and {first} share no seed, so they are not paired."]
        told = "clear of zero" if gap.clear else "zero lies inside" if gap.n > 1 else "no interval"
        return [
            f"Reward at the end, {second} minus {first} over {gap.n} shared "
            f"{'seeds' if gap.n > 1 else 'seed'}: {metric.show(gap, signed=True)} ({told})."
        ]

    @cached_property
    def heads_up(self) -> tuple[str, ...]:
        """What has to be known before the table is read: runs that are no seeds of one setting."""
        return heads_up(self.runs, self.settings)

    def _note(self) -> str:
        note = "Predicted dH is first-order and signed, each class as part of all four together."
        if max(len(setting.runs) for setting in self.settings) < 2:
            return f"{note} One run per setting: no interval; train more seeds."
        return (
            f"{note} ± is the 95% interval of the mean over seeds (Student t); * marks a paired "
            "difference whose interval leaves out zero."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "title": self.title,
            "settings": [
                {
                    "label": setting.label,
                    "n": len(setting.runs),
                    "runs": [run.name for run in setting.runs],
                    "verdicts": [self.diagnoses[place].verdict for place in setting.places],
                    "metrics": {m.name: self.interval(setting.label, m).to_dict() for m in METRICS},
                }
                for setting in self.settings
            ],
            "difference": {
                "second": self.labels[1],
                "first": self.labels[0],
                "metrics": {m.name: self.difference(m).to_dict() for m in METRICS},
            }
            if len(self.labels) > 1
            else None,
            "parting": self.divergence.to_dict() if self.divergence is not None else None,
            "sentences": self.sentences(),
        }

    def page(self) -> Section:
        """What to know before reading, the table, and the sentences below it."""
        above = [Say(told) for told in self.heads_up]
        return Section(self.title, [*above, Grid(self.rows()), Items(self.notes())])


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs side by side; which are seeds of one setting, `settings_of` says.

    Parameters
    ----------
    runs : sequence of Run
        Opened runs. Nothing is read before it is asked for.

    Raises
    ------
    UserError
        If there are no runs.
    """
    if not runs:
        raise UserError("nothing to compare; give at least one run folder")
    return Comparison(tuple(runs))
