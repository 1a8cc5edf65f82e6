"""The comparison of settings: means over seeds, paired differences, the sentences they allow."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from wapo_analysis.compare.divergence import Divergence, divergence
from wapo_analysis.compare.metrics import METRICS, Interval, Metric
from wapo_analysis.diagnose import VERDICT_WORDS, Diagnosis, diagnose
from wapo_analysis.errors import UserError
from wapo_analysis.store import Run

SAME_SETTINGS = ("task", "model", "temperature")
SAME_CONFIG = ("steps", "prompts_per_step", "rollouts_per_prompt", "epochs", "minibatches", "lr")


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes
    ----------
    runs : tuple of Run
        The runs, in the order given.
    """

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
                "label": run.label,
                "objective": run.objective,
                "seed": run.seed,
                "run": run.name,
                "verdict": found.verdict,
                **{metric.name: metric.value(run) for metric in METRICS},
            }
            for run, found in zip(self.runs, self.diagnoses, strict=True)
        ]
        return pd.DataFrame(rows)

    @property
    def labels(self) -> tuple[str, ...]:
        """Settings, in the order of their first run."""
        return tuple(dict.fromkeys(run.label for run in self.runs))

    @property
    def title(self) -> str:
        """What is compared."""
        steps = max(len(run.steps) for run in self.runs)
        names = self.labels
        many = " against ".join(names) if len(names) < 4 else f"{len(names)} settings"
        return f"{many}, {steps} steps, {len(self.runs)} run{'s' if len(self.runs) > 1 else ''}"

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

        Raises
        ------
        UserError
            If there are fewer than two settings.
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
            [[run for run in self.runs if run.label == label] for label in self.labels[:2]]
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
        counts = Counter(run.label for run in self.runs)
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
        """What the table says in words, and what limits it."""
        parting = self.divergence.sentences() if self.divergence is not None else []
        return [
            *self._verdict_sentences(),
            *self._pair_sentence(),
            *parting,
            *self._unlike(),
            self._note(),
        ]

    def _verdict_sentences(self) -> list[str]:
        found = list(zip(self.runs, self.diagnoses, strict=True))
        sentences = []
        for label in self.labels:
            mine = [d for run, d in found if run.label == label]
            bad = [d for d in mine if d.onset_step is not None]
            told = bad or mine
            many = f" in {len(told)} of {len(mine)} runs" if len(mine) > 1 else ""
            name = f" {told[0].run}:" if len(mine) > 1 else ""
            verdict = VERDICT_WORDS[told[0].verdict]
            sentences.append(f"{label}: {verdict}{many}.{name} {told[0].sentence}")
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

    def _unlike(self) -> list[str]:
        """Settings in which the runs differ although a comparison wants them equal."""
        seen: dict[str, list[Any]] = {
            **{name: [run.manifest.get(name) for run in self.runs] for name in SAME_SETTINGS},
            **{name: [_config(run).get(name) for run in self.runs] for name in SAME_CONFIG},
            "steps done": [len(run.steps) for run in self.runs],
        }
        differ = [
            f"{name} ({', '.join(dict.fromkeys(str(value) for value in values))})"
            for name, values in seen.items()
            if len({str(value) for value in values}) > 1
        ]
        return [f"Not like with like: the runs differ in {'; '.join(differ)}."] if differ else []

    def _note(self) -> str:
        note = "Entropy flow is first order and signed, each class as part of all four together."
        if max(Counter(run.label for run in self.runs).values()) < 2:
            return f"{note} One run per setting: no interval; train more seeds."
        return (
            f"{note} ± is the 95% interval of the mean over seeds (Student t); * marks a paired "
            "difference whose interval leaves out zero."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "title": self.title,
            "settings": [self._setting(label) for label in self.labels],
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

    def _setting(self, label: str) -> dict[str, Any]:
        found = zip(self.runs, self.diagnoses, strict=True)
        mine = [(run.name, diagnosis.verdict) for run, diagnosis in found if run.label == label]
        return {
            "label": label,
            "n": len(mine),
            "runs": [name for name, _ in mine],
            "verdicts": [verdict for _, verdict in mine],
            "metrics": {m.name: self.interval(label, m).to_dict() for m in METRICS},
        }

    def to_markdown(self) -> str:
        """Markdown table with the sentences below it."""
        header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in self.rows())
        rule = ["---", *("---:" for _ in header[1:])]
        table = "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
        told = "\n".join(f"- {sentence}" for sentence in self.sentences())
        return f"## {self.title}\n\n{table}\n\n{told}\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def _config(run: Run) -> dict[str, Any]:
    config = run.manifest.get("config")
    return config if isinstance(config, dict) else {}


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs side by side; those that share a label are seeds of one setting.

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
