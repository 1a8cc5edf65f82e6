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
from wapo_analysis.results import Grid, Items, Result, Say, Section
from wapo_analysis.settings import Setting, recorded_settings, settings_of, shown_value
from wapo_analysis.store import Run

COMPARED = frozenset(
    {
        "objective", "loss_type", "clip_eps", "mask_ratio_low", "mask_ratio_high", "epsilon",
        "epsilon_high", "delta", "bounds", "use_importance_sampling", "include_bins",
        "exclude_bins", "loss_mean_level", "normalize_by_kept_tokens", "official", "max_seq_len",
        "importance_sampling_level", "scale_rewards",
    }
)  # fmt: skip
"""Settings of the objective: that they differ is what a comparison is made for."""


@dataclass(frozen=True)
class Comparison(Result):
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

    def diagnoses_of(self, label: str) -> list[Diagnosis]:
        """Diagnoses of the runs of one setting."""
        both = zip(self.label_of, self.diagnoses, strict=True)
        return [found for name, found in both if name == label]

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
        for label in self.labels:
            mine = self.diagnoses_of(label)
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

    @cached_property
    def heads_up(self) -> tuple[str, ...]:
        """What has to be known before the table is read: runs that are no seeds of one setting."""
        return (*self._split(), *self._repeated(), *self._unlike())

    def _split(self) -> list[str]:
        told = []
        for given, settings in self._by_given_label().items():
            if len(settings) > 1:
                names = _values(settings[0].differs, [run for s in settings for run in s.runs])
                told.append(
                    f"Runs labelled {given} differ in {names}; they are not seeds of one setting, "
                    "so each setting has its own column."
                )
        return told

    def _repeated(self) -> list[str]:
        """Runs of one setting and one seed are no independent draws."""
        told = []
        for setting in self.settings:
            counts = Counter(run.seed for run in setting.runs if run.seed is not None)
            twice = [f"{seed} ({count} runs)" for seed, count in counts.items() if count > 1]
            if twice:
                told.append(
                    f"{setting.label} holds runs of one seed: {', '.join(twice)}; they are not "
                    "independent, so its intervals are too narrow."
                )
        return told

    def _by_given_label(self) -> dict[str, list[Setting]]:
        found: dict[str, list[Setting]] = {}
        for setting in self.settings:
            found.setdefault(setting.given, []).append(setting)
        return found

    def _unlike(self) -> list[str]:
        """Settings in which the runs differ although a comparison wants them equal."""
        named = {name for setting in self.settings for name in setting.differs}
        known = [recorded_settings(run) for run in self.runs]
        names = [
            name
            for name in dict.fromkeys(name for values in known for name in values)
            if name not in COMPARED | named
            and len({shown_value(values[name]) for values in known if name in values}) > 1
        ]
        done = dict.fromkeys(str(len(run.steps)) for run in self.runs)
        differ = [_values(names, self.runs)] if names else []
        differ += [f"steps done ({', '.join(done)})"] if len(done) > 1 else []
        return [f"Not like with like: the runs differ in {'; '.join(differ)}."] if differ else []

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
        found = zip(self.label_of, self.runs, self.diagnoses, strict=True)
        mine = [(run.name, diagnosis.verdict) for name, run, diagnosis in found if name == label]
        return {
            "label": label,
            "n": len(mine),
            "runs": [name for name, _ in mine],
            "verdicts": [verdict for _, verdict in mine],
            "metrics": {m.name: self.interval(label, m).to_dict() for m in METRICS},
        }

    def page(self) -> Section:
        """What to know before reading, the table, and the sentences below it."""
        above = [Say(told) for told in self.heads_up]
        return Section(self.title, [*above, Grid(self.rows()), Items(self.notes())])


def _values(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Settings with the values they take, such as ``lr (5e-5, 1e-4)``."""
    known = [recorded_settings(run) for run in runs]
    return "; ".join(
        f"{name} ({', '.join(dict.fromkeys(shown_value(values.get(name)) for values in known))})"
        for name in names
    )


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
