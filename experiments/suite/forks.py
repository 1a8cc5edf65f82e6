r"""Whether the advice that ``wapo diagnose`` prints saves a run: its fork command, run and judged.

Takes the runs of the collapse suite's test part one after another, runs the command that the
diagnosis of a failed one prints, under the same fault, and labels the fork by its outcome as the
suite labels runs. Of healthy runs it counts those that are told to change their training. About
twenty seconds of one idle core a fork; a second call goes on where the last one stopped.

    python experiments/suite/forks.py runs/collapse_suite --count 20

Writes ``forks.jsonl`` into the folder and prints the share saved with its 95% interval.
"""

import argparse
import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import beta

from experiments.suite.runs import BAD, SuiteRun, faulty, finished, outcome, suite
from wapo_analysis import open_run
from wapo_analysis.diagnose import diagnose
from wapo_analysis.store import Run

FILE = "forks.jsonl"


def interval(hits: int, total: int) -> tuple[float, float]:
    """Clopper-Pearson, 95% two-sided.

    Examples
    --------
    >>> [round(end, 3) for end in interval(10, 20)]
    [0.272, 0.728]
    """
    low = float(beta.ppf(0.025, hits, total - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, total - hits)) if hits < total else 1.0
    return low, high


def advised(run: Run) -> dict[str, Any]:
    """Verdict, the command that tests the advice, and whether any finding changes the training."""
    found = diagnose(run)
    changes = any(
        finding.severity != "info" and (finding.advice.change or finding.advice.steps)
        for finding in found.findings
    )
    return {
        "verdict": found.verdict,
        "command": found.command,
        "changes": changes or found.command is not None,
    }


def forked(run: SuiteRun, command: str) -> dict[str, Any]:
    """Run a fork command under the fault of the run; label and last reward of what came of it."""
    from wapo_analysis.cli import run as wapo

    with tempfile.TemporaryDirectory(prefix="wapo-fork-") as folder, faulty(run.recipe.fault):
        target = Path(folder) / "fork"
        shutil.rmtree(target, ignore_errors=True)
        code = wapo([*shlex.split(command)[1:], "--out", str(target), "--threads", "1"])
        if not finished(target):
            return {"fork": "diverged", "code": code}
        came = outcome(open_run(target))
        return {"fork": came.label, "code": code, "reward": came.reward_end}


def judged(runs: Sequence[SuiteRun], known: set[str], count: int) -> Iterator[dict[str, Any]]:
    """One row a run: label and advice, and of a failed one with a command what its fork became."""
    left = count
    for run in runs:
        if run.name in known or not finished(run.out):
            continue
        whole = open_run(run.out)
        came = outcome(whole)
        if came.label not in (*BAD, "healthy"):
            continue
        row = {"run": run.name, "label": came.label, "was": came.reward_end, **advised(whole)}
        if came.label in BAD and row["command"]:
            if not left:
                continue
            left -= 1
            row |= forked(run, row["command"])
        yield row


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """What came of the forks, and what healthy runs were told, in Markdown."""
    forks = [row for row in rows if "fork" in row]
    saved = [row for row in forks if row["fork"] == "healthy"]
    silent = [row for row in rows if row["label"] in BAD and not row["command"]]
    calm = [row for row in rows if row["label"] == "healthy"]
    told = [row["run"] for row in calm if row["changes"]]
    low, high = interval(len(saved), len(forks)) if forks else (0.0, 1.0)
    kinds = sorted({row["label"] for row in forks})
    lines = [
        f"Forked as advised: {len(forks)} failed runs, of which {len(saved)} end healthy "
        f"({len(saved) / max(len(forks), 1):.0%}, 95% interval {low:.0%} to {high:.0%}).",
        "",
        "| outcome | forked | healthy after the advice | else |",
        "| --- | --- | --- | --- |",
    ]
    for kind in kinds:
        mine = [row for row in forks if row["label"] == kind]
        good = [row for row in mine if row["fork"] == "healthy"]
        rest = sorted({row["fork"] for row in mine} - {"healthy"})
        lines.append(f"| {kind} | {len(mine)} | {len(good)} | {', '.join(rest) or 'none'} |")
    lines += [
        "",
        f"{len(silent)} failed runs were told what to look at, with no command, as no setting of "
        "the trainer is at fault or the verdict is healthy.",
        f"Healthy runs: {len(told)} of {len(calm)} were told to change the training"
        + (f" ({', '.join(told)})." if told else "."),
    ]
    return "\n".join(lines)


def read(out: Path) -> list[dict[str, Any]]:
    """Rows that were written already."""
    file = out / FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/collapse_suite"))
    parser.add_argument("--count", type=int, default=20, help="failed runs to fork")
    options = parser.parse_args()
    rows = read(options.out)
    left = options.count - sum("fork" in row for row in rows)
    runs = [run for run in suite(options.out) if run.test]
    with (options.out / FILE).open("a") as file:
        for row in judged(runs, {row["run"] for row in rows}, max(left, 0)):
            file.write(json.dumps(row) + "\n")
            file.flush()
    print(summary(read(options.out)))


if __name__ == "__main__":
    main()
