r"""How well ``wapo diagnose`` and its neighbours see a collapse coming.

Trains a suite of short runs that stay healthy or fail in known ways, labels each by its outcome,
replays it step by step to every tool, and scores who warned, when, and of what. Seeds split it into
a tuning part and a test part. About forty minutes on two idle CPU cores, fifteen with
``--part test``; a second call trains only what is missing.

    python experiments/suite/collapse_suite.py --out runs/collapse_suite
    rivals/bin/python experiments/suite/rivals.py runs/collapse_suite
    python experiments/suite/forks.py runs/collapse_suite
    python experiments/suite/collapse_suite.py --out runs/collapse_suite \
        --doc docs/collapse_suite.md

Prints the tables, and with ``--doc`` writes the page.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from scipy.stats import beta

from experiments.suite import forks
from experiments.suite.logs import KINDS, right, write_log
from experiments.suite.runs import (
    BAD,
    STEPS,
    TEST_SEEDS,
    Outcome,
    SuiteRun,
    outcome,
    suite,
    train_suite,
)
from wapo_analysis import open_run
from wapo_analysis.diagnose import diagnose
from wapo_analysis.store import Run

OURS = "wapo diagnose"
KIND_SEEDS = 20
"""Logs of each kind made by formula."""
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

    def table(self, name: str, steps: Iterable[int] | None = None) -> pd.DataFrame:
        """Rows up to the last step; those of the completions are read once for all beginnings."""
        assert self.whole is not None
        frame = self.whole.rollouts if name == "rollouts" else self.whole.table(name)
        wanted = frame if steps is None else frame[frame["step"].isin(set(steps))]
        return self._cut(wanted)


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


def write_scalars(runs: Sequence[SuiteRun], out: Path) -> None:
    """Step tables of all runs as one JSON file, for the other tools."""
    rows = {run.name: open_run(run.out).steps.to_dict("records") for run in runs}
    (out / "scalars.json").write_text(json.dumps(rows))


# ---- tables -------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def tools_table(judged: Sequence[Judged], others: dict[str, dict[str, Alarms]]) -> str:
    """One row per tool and severity."""
    ours = {j.run.name: j.alarms for j in judged}
    rows = [
        [tool, severity, *score(judged, alarms, severity).cells(), *_misnamed(judged, alarms)]
        for tool, alarms in ({OURS: ours} | others).items()
        for severity in ("warning", "critical")
    ]
    return markdown(
        ["tool", "alarm from", "recall", "false alarms", "median lead (steps)",
         "before the loss", "explosions called entropy collapse"],
        rows,
    )  # fmt: skip


def _misnamed(judged: Sequence[Judged], alarms: dict[str, Alarms]) -> list[str]:
    """Explosions for which a tool reported an entropy collapse."""
    exploded = [j for j in judged if j.outcome.label == "explosion"]
    wrong = [
        j
        for j in exploded
        if any(
            name.split(":")[1].lower() in ("entropy_collapse", "entropycollapse")
            for name in alarms[j.run.name].names
        )
    ]
    return [f"{len(wrong)}/{len(exploded)}"]


def labels_table(judged: Sequence[Judged]) -> str:
    """One row per label: how many, caught, named, lead."""
    rows = []
    for label in (*BAD, "healthy", "unclear"):
        mine = [j for j in judged if j.outcome.label == label]
        if not mine:
            continue
        alarmed = [j for j in mine if j.alarms.warning is not None]
        leads = [
            j.outcome.lost_at - j.alarms.warning
            for j in alarmed
            if j.outcome.lost_at is not None and j.alarms.warning is not None
        ]
        verdicts = Counter(j.verdict for j in mine)
        rows.append([
            label, len(mine), len(alarmed), sum(j.named for j in mine),
            f"{median(leads):+.1f}" if leads else "n/a",
            ", ".join(f"{name} {count}" for name, count in verdicts.most_common()),
        ])  # fmt: skip
    return markdown(["outcome", "runs", "alarm", "named", "median lead", "verdicts"], rows)


def drivers_line(judged: Sequence[Judged]) -> str:
    """How often the driver of a failed single-class run is that class."""
    single = [j for j in judged if j.run.recipe.one_class and j.bad]
    right = [j for j in single if j.driver == j.run.recipe.one_class]
    return f"{len(right)} of {len(single)} failed single-class runs name their class as the driver."


def bound_line(judged: Sequence[Judged]) -> str:
    """How many false alarms so few healthy runs can rule out (Clopper-Pearson, one-sided 95%)."""
    found = score(judged, {j.run.name: j.alarms for j in judged}, "warning")
    upper = 1.0
    if found.false < found.healthy:
        upper = float(beta.ppf(0.95, found.false + 1, found.healthy - found.false))
    return (
        f"False alarms in {found.false} of {found.healthy} healthy runs leave room for a true rate "
        f"of up to {upper:.0%} (95%, one-sided)."
    )


def misses(judged: Sequence[Judged]) -> str:
    """Every run that was missed, misnamed or falsely alarmed."""
    rows = [
        [
            j.run.name,
            j.outcome.label,
            j.verdict,
            ", ".join(f"{name} at {step}" for name, step in j.alarms.names.items()) or "nothing",
        ]
        for j in judged
        if not j.named
        or (j.bad and j.alarms.warning is None)
        or (j.outcome.label == "healthy" and j.alarms.warning is not None)
    ]
    if not rows:
        return "None."
    return markdown(["run", "outcome", "verdict", "what was said"], rows)


def kinds_table(seeds: Sequence[int]) -> str:
    """Kinds of logs made by formula: in how many the right thing is said, and in how many loudly.

    Parameters
    ----------
    seeds : sequence of int
        A log of each kind is made from every one.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="wapo-logs-") as folder:
        for kind, wanted in KINDS.items():
            found = [
                diagnose(open_run(write_log(Path(folder) / f"{kind}-{seed}", kind, seed)))
                for seed in seeds
            ]
            good = sum(right(kind, d) for d in found)
            loud = sum(any(f.severity != "info" for f in d.findings) for d in found)
            said = ", ".join(wanted.named) or "no warning" * wanted.silent or "no stall"
            rows.append([kind, said, f"{good}/{len(found)}", f"{loud}/{len(found)}"])
    return markdown(["kind", "what must be said", "said", "with a warning or worse"], rows)


def page(judged: Sequence[Judged], others: dict[str, dict[str, Alarms]], out: Path) -> str:
    """The documentation page."""
    test = [j for j in judged if j.run.test]
    tuning = [j for j in judged if not j.run.test]
    text = (Path(__file__).parent / "page.md").read_text()
    parts = {
        "runs": len(judged),
        "steps": STEPS,
        "tuning": len(tuning),
        "test": len(test),
        "test_seeds": TEST_SEEDS,
        "tools": tools_table(test, others),
        "labels": labels_table(test),
        "drivers": drivers_line(test),
        "misses": misses(test),
        "bound": bound_line(test),
        "tuning_tools": tools_table(tuning, others) if tuning else "No run of it was judged anew.",
        "kinds": kinds_table(range(TEST_SEEDS, TEST_SEEDS + KIND_SEEDS)),
        "kind_seeds": KIND_SEEDS,
        "forks": forks.summary(rows) if (rows := forks.read(out)) else "Not run.",
    }
    for name, value in parts.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/collapse_suite"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part", choices=("tuning", "test", "both"), default="both")
    parser.add_argument("--doc", type=Path, help="write the documentation page here")
    options = parser.parse_args()
    if options.doc is not None and options.part == "tuning":
        parser.error("--doc writes a page on the test part")
    runs = suite(options.out)
    chosen = [run for run in runs if options.part in ("both", "test" if run.test else "tuning")]
    train_suite(chosen, options.workers)
    write_scalars(chosen, options.out)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        judged = list(pool.map(watch, chosen))
    others = rivals(options.out)
    for part, mine in (
        ("tuning part", [j for j in judged if not j.run.test]),
        ("test part", [j for j in judged if j.run.test]),
    ):
        if mine:
            print(f"\n{part}\n\n{tools_table(mine, others)}\n\n{labels_table(mine)}\n")
            print(f"{drivers_line(mine)}\n\n{misses(mine)}")
    if options.doc is not None:
        options.doc.write_text(page(judged, others, options.out))


if __name__ == "__main__":
    main()
