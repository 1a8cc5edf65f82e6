r"""What a guard would have done for the runs of the collapse suite.

Replays finished runs step by step to the guard with ``on_warning="checkpoint"`` and
``on_critical="stop"``: which failed runs then had a checkpoint better than 90% of their best true
reward, and which healthy runs were touched. Trains nothing; a few seconds a run.

    python experiments/suite/collapse_suite.py --out runs/collapse_suite
    python experiments/suite/guard.py runs/collapse_suite neg-peak-300 chain-sum-grpo-3e-05-300

Without names every finished run of the test part is replayed.
"""

import argparse
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.suite.judging import Beginning
from experiments.suite.runs import BAD, Outcome, SuiteRun, finished, outcome, suite, true_reward
from wapo_analysis import open_run
from wapo_analysis.beside import BesideTraining
from wapo_analysis.record import beside
from wapo_analysis.record.beside import Ring
from wapo_analysis.train.tasks import get_task

GOOD = 0.9
"""Share of the best true reward that a checkpoint must keep."""
beside.PAUSE = 0.0  # a replay has no time that writing could take


@dataclass(frozen=True)
class Guarded:
    """One run as a guard would have treated it; shares are of the run's best true reward.

    Attributes
    ----------
    stopped : int or None
        Step after which the run would have stopped.
    touched : bool
        The guard found anything to act on.
    held : tuple of int
        Steps of the checkpoints that were there then, or at the end.
    kept : float or None
        Share that the best of them is worth; None without one that was sampled from, or without
        any reward.
    before : float or None
        The same of those that a finding protected.
    """

    name: str
    outcome: Outcome
    stopped: int | None
    touched: bool
    held: tuple[int, ...]
    kept: float | None
    before: float | None


def guarded(run: SuiteRun, delay: int) -> Guarded:
    """Replay a run; the guard is ``delay`` steps behind the training, as a busy writer would be.

    The checkpoint after step s is worth the true reward of step s + 1, which it samples; the best
    reward is the best mean over five steps, as in the suite's labels.
    """
    whole = open_run(run.out)
    did: list[dict[str, Any]] = []
    manifest = whole.manifest.changed({"status": "running"})
    stopped = None
    with tempfile.TemporaryDirectory() as folder:
        ring = Ring(Path(folder) / "checkpoints", {})
        note: Callable[..., None] = lambda guard: did.__setitem__(slice(None), guard)  # noqa: E731
        guard = BesideTraining(run.out, note, False, "checkpoint", "stop", ring)
        for step, reward in zip(whole.steps["step"], whole.steps["reward"], strict=True):
            ring.earned(float(reward))
            if ring.due(int(step)):
                ring.write(int(step), lambda place: (place / "weights").touch())
            seen = int(step) - delay
            if seen > 0:
                guard.judge(seen, Beginning(whole.path, manifest, whole, seen))
            if guard.asked("stop"):
                stopped = int(step)
                break
    result, protected = outcome(whole), ring.entry()["protected"]
    reward = true_reward(whole, get_task(whole.manifest["task"]))
    kept = (_kept(reward, steps, result) for steps in (ring.held, protected))
    return Guarded(run.name, result, stopped, bool(did), tuple(sorted(ring.held)), *kept)


def _kept(reward: pd.Series, saved: Collection[int], result: Outcome) -> float | None:
    worth = [float(reward[step + 1]) for step in saved if step + 1 in reward.index]
    if not worth or result.reward_peak <= 0:
        return None
    return max(worth) / result.reward_peak


def line(run: Guarded) -> str:
    """What became of one run."""
    return (
        f"{run.name:26} {run.outcome.label:16} lost at {run.outcome.lost_at}, stop {run.stopped}, "
        f"checkpoints {list(run.held)} hold {_percent(run.kept)}, "
        f"protected {_percent(run.before)}"
    )


def summary(runs: Sequence[Guarded]) -> str:
    """The shares."""
    bad = [run for run in runs if run.outcome.label in BAD]
    losers = [run for run in bad if run.outcome.lost_at is not None]
    healthy = [run for run in runs if run.outcome.label == "healthy"]
    shares = [
        f"failed runs with a checkpoint above {GOOD:.0%} of their best reward: "
        f"{_share([r.kept for r in bad])}",
        f"of those that lost a reward they had: {_share([r.kept for r in losers])}",
        f"with one that a finding protected: {_share([r.before for r in bad])}, "
        f"{_share([r.before for r in losers])}",
        f"healthy runs touched: {sum(r.touched for r in healthy)} of {len(healthy)}, "
        f"stopped: {sum(r.stopped is not None for r in healthy)}",
    ]
    return "\n".join(shares)


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
    done = []
    for run in runs:
        done.append(guarded(run, options.delay))
        print(line(done[-1]), flush=True)
    print(summary(done))


if __name__ == "__main__":
    main()
