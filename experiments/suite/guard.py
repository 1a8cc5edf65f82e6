r"""What a guard would have done for the runs of the collapse suite.

Replays finished runs step by step to the guard with ``on_warning="checkpoint"`` and
``on_critical="stop"``: which failed runs then had a checkpoint better than 90% of their best true
reward, and which healthy runs were touched. Trains nothing; a few seconds a run.

    python experiments/suite/collapse_suite.py --out runs/collapse_suite
    python experiments/suite/guard.py runs/collapse_suite neg-peak-300 chain-sum-grpo-3e-05-300

Without names every finished run of the test part is replayed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.suite.collapse_suite import Beginning
from experiments.suite.runs import BAD, Outcome, SuiteRun, finished, outcome, suite, true_reward
from wapo_analysis import open_run
from wapo_analysis.beside import BesideTraining
from wapo_analysis.train.tasks import get_task

GOOD = 0.9
"""Share of the best true reward that a checkpoint must keep."""
EVERY = 5
"""Steps between the regular checkpoints the guard's are set beside."""


@dataclass(frozen=True)
class Guarded:
    """One run as a guard would have treated it.

    Attributes
    ----------
    saved : tuple of int
        Steps after which a checkpoint would have been written.
    stopped : int or None
        Step after which the run would have stopped.
    kept : float or None
        True reward of the best of those checkpoints over the best one of the whole run; None
        without a checkpoint that was sampled from, or without any reward.
    before : int or None
        Last multiple of ``EVERY`` before the onset of the first finding; 0 is the untrained policy.
    kept_before : float or None
        The same ratio for a checkpoint of that step, had one been kept all along.
    """

    name: str
    outcome: Outcome
    saved: tuple[int, ...]
    stopped: int | None
    kept: float | None
    before: int | None
    kept_before: float | None


def guarded(run: SuiteRun, delay: int) -> Guarded:
    """Replay a run; actions come ``delay`` steps after the finding, as a busy writer's would.

    The checkpoint after step s is worth the true reward of step s + 1, which it samples; the best
    reward is the best mean over five steps, as in the suite's labels.
    """
    whole = open_run(run.out)
    warned: list[dict[str, Any]] = []
    critical: list[dict[str, Any]] = []
    guard = BesideTraining(run.out, lambda **_: None, False, warned.append, critical.append)
    manifest = whole.manifest.changed({"status": "running"})
    steps = whole.steps["step"].tolist()
    for last in steps:
        guard.judge(last, Beginning(whole.path, manifest, whole, last))
        if critical:
            break
    saved = sorted({found["at"] + delay for found in (*warned, *critical)} & set(steps))
    before = (warned[0]["step"] - 1) // EVERY * EVERY if warned else None
    result = outcome(whole)
    reward = true_reward(whole, get_task(whole.manifest["task"]))
    return Guarded(
        run.name,
        result,
        tuple(saved),
        critical[0]["at"] if critical else None,
        _kept(reward, saved, result),
        before,
        None if before is None else _kept(reward, [before], result),
    )


def _kept(reward: pd.Series, saved: Sequence[int], result: Outcome) -> float | None:
    worth = [float(reward[step + 1]) for step in saved if step + 1 in reward.index]
    if not worth or result.reward_peak <= 0:
        return None
    return max(worth) / result.reward_peak


def summary(runs: Sequence[Guarded]) -> str:
    """The two shares, and one line a run."""
    bad = [run for run in runs if run.outcome.label in BAD]
    losers = [run for run in bad if run.outcome.lost_at is not None]
    healthy = [run for run in runs if run.outcome.label == "healthy"]
    rows = [
        f"{run.name:26} {run.outcome.label:16} lost at {run.outcome.lost_at}, checkpoints "
        f"{list(run.saved)} hold {_percent(run.kept)}, stop {run.stopped}, "
        f"before the onset {run.before} holds {_percent(run.kept_before)}"
        for run in runs
    ]
    touched = [run for run in healthy if run.saved or run.stopped is not None]
    shares = [
        f"failed runs with a checkpoint above {GOOD:.0%} of their best reward: "
        f"{_share([r.kept for r in bad])}",
        f"of those that lost a reward they had: {_share([r.kept for r in losers])}",
        f"the same with the last of a checkpoint every {EVERY} steps before the onset: "
        f"{_share([r.kept_before for r in bad])}, {_share([r.kept_before for r in losers])}",
        f"healthy runs touched: {len(touched)} of {len(healthy)}, "
        f"stopped: {sum(r.stopped is not None for r in healthy)}",
    ]
    return "\n".join([*rows, "", *shares])


def _percent(kept: float | None) -> str:
    return "nothing" if kept is None else f"{kept:.0%}"


def _share(kept: Sequence[float | None]) -> str:
    return f"{sum(k is not None and k >= GOOD for k in kept)} of {len(kept)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the suite's runs")
    parser.add_argument("names", nargs="*", help="runs to replay")
    parser.add_argument("--delay", type=int, default=1, help="steps from finding to action")
    options = parser.parse_args()
    runs = [
        run
        for run in suite(options.out)
        if (run.name in options.names if options.names else run.test) and finished(run.out)
    ]
    print(summary([guarded(run, options.delay) for run in runs]))


if __name__ == "__main__":
    main()
