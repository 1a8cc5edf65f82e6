"""A run of the suite shown step after step to a diagnosis: what was said, when, how it scores."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from experiments.suite.runs import BAD, Outcome, SuiteRun, outcome
from wapo_analysis import open_run
from wapo_analysis.diagnose import diagnose
from wapo_analysis.store import Run

OURS = "wapo diagnose"
VERDICTS = {
    "explosion": {"entropy_explosion"},
    "collapse": {"entropy_collapse"},
    "reward_collapse": {"reward_collapse", "reward_without_answer"},
    "stalled": {"stalled"},
    "diverged": {"diverged"},
}
"""Label to the verdicts that name it; a loss of the true reward alone shows in the answers."""
GAMED = {
    "degenerate_completions", "length_drift", "reward_pays_for_length", "reward_without_answer",
}  # fmt: skip
"""Findings that point to a gamed verifier; there is no verdict of that name."""


@dataclass(frozen=True, repr=False)
class Beginning(Run):
    """The first steps of a finished run, as a reader would have found it then."""

    whole: Run | None = None
    last: int = 0

    def _cut(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame[frame["step"] <= self.last].reset_index(drop=True)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Step table up to the last step."""
        assert self.whole is not None
        return self._cut(self.whole.steps)

    @cached_property
    def classes(self) -> pd.DataFrame:
        """Class totals up to the last step."""
        assert self.whole is not None
        return self._cut(self.whole.classes)

    def recorded_steps(self, table: str) -> list[int]:
        """Steps with rows in a table, up to the last step."""
        assert self.whole is not None
        return [step for step in self.whole.recorded_steps(table) if step <= self.last]

    def table(
        self, name: str, steps: Iterable[int] | None = None, columns: list[str] | None = None
    ) -> pd.DataFrame:
        """Rows up to the last step; those of the completions are read once for all beginnings."""
        assert self.whole is not None
        frame = self.whole.rollouts if name == "rollouts" else self.whole.table(name)
        wanted = frame if steps is None else frame[frame["step"].isin(set(steps))]
        return self._cut(wanted if columns is None else wanted[columns])


@dataclass(frozen=True)
class Alarms:
    """What one tool said about one run, and when.

    Attributes
    ----------
    warning, critical : int or None
        First step after which it reported something at least that severe.
    names : dict of str to int
        Everything at warning or worse, as ``severity:name``, with its first step.
    """

    warning: int | None
    critical: int | None
    names: dict[str, int]


@dataclass(frozen=True)
class Judged:
    """A run with its outcome and what we say about it."""

    run: SuiteRun
    outcome: Outcome
    alarms: Alarms
    verdict: str
    driver: str | None
    findings: tuple[str, ...]

    @property
    def bad(self) -> bool:
        """It failed."""
        return self.outcome.label in BAD

    @property
    def named(self) -> bool:
        """The verdict is that of its label; of a gamed verifier, a finding that points to it."""
        if self.outcome.label == "reward_hacking":
            return bool(GAMED & set(self.findings))
        return self.verdict in VERDICTS.get(self.outcome.label, {"healthy"})


def watch(run: SuiteRun) -> Judged:
    """Diagnose a run after every step, and once more when it is over."""
    whole = open_run(run.out)
    names: dict[str, int] = {}
    for last in whole.steps["step"].tolist():
        manifest = whole.manifest.changed({"status": "running"})
        _note(names, diagnose(Beginning(whole.path, manifest, whole, last)).findings, last)
    final = diagnose(whole)
    _note(names, final.findings, int(whole.steps["step"].iloc[-1]))
    critical = [step for name, step in names.items() if name.startswith("critical")]
    return Judged(
        run=run,
        outcome=outcome(whole),
        alarms=Alarms(min(names.values(), default=None), min(critical, default=None), names),
        verdict=final.verdict,
        driver=final.drivers[0].cls if final.drivers else None,
        findings=tuple(f.name for f in final.findings),
    )


def _note(names: dict[str, int], findings: Sequence[Any], step: int) -> None:
    for finding in findings:
        if finding.severity != "info":
            names.setdefault(f"{finding.severity}:{finding.name}", step)


@dataclass(frozen=True)
class Score:
    """One tool at one severity on one part.

    Attributes
    ----------
    caught, bad : int
        Failed runs with an alarm, failed runs.
    false, healthy : int
        Healthy runs with an alarm at any step, healthy runs.
    leads : tuple of int
        Steps from the alarm to the loss of half the gain, of every caught run that lost it;
        negative if the alarm came after.
    losses : int
        Failed runs that lost it, caught or not.
    """

    caught: int
    bad: int
    false: int
    healthy: int
    leads: tuple[int, ...]
    losses: int

    def cells(self) -> list[str]:
        """Recall, false alarms, median lead and alarms before the loss as text."""
        early = sum(lead > 0 for lead in self.leads)
        lead = f"{median(self.leads):+.1f} (n={len(self.leads)})" if self.leads else "n/a"
        return [
            f"{self.caught}/{self.bad} ({self.caught / max(self.bad, 1):.0%})",
            f"{self.false}/{self.healthy} ({self.false / max(self.healthy, 1):.0%})",
            lead,
            f"{early}/{self.losses}",
        ]


def score(judged: Sequence[Judged], alarms: dict[str, Alarms], severity: str) -> Score:
    """Score a tool's alarms, by run name, at one severity."""
    bad = [j for j in judged if j.bad]
    healthy = [j for j in judged if j.outcome.label == "healthy"]
    first = {name: getattr(alarm, severity) for name, alarm in alarms.items()}
    caught = [j for j in bad if first[j.run.name] is not None]
    return Score(
        caught=len(caught),
        bad=len(bad),
        false=sum(first[j.run.name] is not None for j in healthy),
        healthy=len(healthy),
        leads=tuple(
            j.outcome.lost_at - first[j.run.name] for j in caught if j.outcome.lost_at is not None
        ),
        losses=sum(j.outcome.lost_at is not None for j in bad),
    )


def rivals(out: Path) -> dict[str, dict[str, Alarms]]:
    """What the other tools said, if ``rivals.py`` has run."""
    file = out / "rivals.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {
        tool: {
            name: Alarms(said["warning"], said["critical"], dict.fromkeys(said["names"], 0))
            for name, said in runs.items()
        }
        for tool, runs in found.items()
    }


FILE = "judged.jsonl"


def judge(runs: Sequence[SuiteRun], out: Path, workers: int) -> list[Judged]:
    """Judge every run once: what was judged before is read from ``judged.jsonl`` in the folder."""
    file = out / FILE
    lines = file.read_text().splitlines() if file.exists() else []
    known = {row["run"]: row for row in map(json.loads, lines)}
    todo = [run for run in runs if run.name not in known]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        with file.open("a") as stream:
            for found in pool.map(watch, todo):
                known[found.run.name] = asdict(found) | {"run": found.run.name}
                stream.write(json.dumps(known[found.run.name]) + "\n")
                stream.flush()
    return [_judged(run, known[run.name]) for run in runs]


def _judged(run: SuiteRun, row: dict[str, Any]) -> Judged:
    told = {"outcome": Outcome(**row["outcome"]), "alarms": Alarms(**row["alarms"])}
    return Judged(**(row | told | {"run": run, "findings": tuple(row["findings"])}))
