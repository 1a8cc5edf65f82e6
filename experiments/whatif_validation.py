"""Check what ``wapo whatif`` foretells against runs in which a class is really taken out.

Probed GRPO runs, an estimate for each class from their probes alone, and a re-run of the same seed
with ``exclude_bins`` set. Three minutes for four seeds on two CPU cores.

    python experiments/whatif_validation.py --out runs/whatif

Writes the runs and ``whatif.csv``, prints the table of docs/attribution.md.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pandas as pd
from wapo_taxonomy import CLASSES

from wapo_analysis import TrainConfig, open_run
from wapo_analysis.attribute.whatif import ENDS, what_if
from wapo_analysis.errors import UserError
from wapo_analysis.train.jobs import Job, train_all

SETTING = TrainConfig(
    steps=30, probe_every=2, probe_rows=None, rescore_every=0, token_every=0, checkpoint_every=0
)
EXCLUDED = (*CLASSES, "neg")
NOISE = 0.01  # nats; a change of the path below it has no direction


def jobs(out: Path, seeds: int, steps: int, lr: float) -> list[Job]:
    """The probed run of every seed, and one re-run without each class; finished ones are kept."""
    todo = []
    for seed in range(seeds):
        base = replace(SETTING, seed=seed, steps=steps, lr=lr)
        todo.append(Job(base, out / f"all-{seed}"))
        for name in EXCLUDED:
            without = replace(base, exclude_bins=(name,), probe_every=0)
            todo.append(Job(without, out / f"without-{name}-{seed}"))
    for job in todo:
        if job.out.exists() and open_run(job.out).manifest["status"] != "finished":
            rmtree(job.out)
    return [job for job in todo if not job.out.exists()]


def change(path: Path) -> float:
    """Entropy of the last steps less that of the first, nats."""
    entropy = open_run(path).steps.entropy
    return float(entropy.tail(ENDS).mean() - entropy.head(ENDS).mean())


def table(out: Path, seeds: int) -> pd.DataFrame:
    """Estimated and real effect of taking each class out, one row per class and seed."""
    rows = []
    for seed in range(seeds):
        base = open_run(out / f"all-{seed}")
        for name in EXCLUDED:
            told = what_if(base, [name])
            rerun = change(out / f"without-{name}-{seed}")
            rows.append(
                {
                    "excluded": name,
                    "seed": seed,
                    "recorded": told.recorded_change,
                    "estimated": told.estimated_change,
                    "low": told.low,
                    "high": told.high,
                    "re-run": rerun,
                    "says": told.to_dict()["says"] or "nothing",
                    "direction": _same_side(told.effect, rerun - told.recorded_change),
                    "in_band": told.low <= rerun <= told.high,
                }
            )
    return pd.DataFrame(rows)


def _same_side(estimated: float, real: float) -> str:
    """Whether two effects have one sign; a real effect within the noise has none."""
    if abs(real) < NOISE:
        return "no effect"
    return "right" if estimated * real > 0 else "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/whatif"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=SETTING.steps)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    try:
        todo = jobs(options.out, options.seeds, options.steps, options.lr)
        results = train_all(todo, options.workers) if todo else []
        failures = [failure for failure in results if failure]
        if failures:
            raise UserError(f"{len(failures)} runs failed, the first with {failures[0]}")
        found = table(options.out, options.seeds)
    except UserError as error:
        sys.exit(f"whatif_validation: {error}")
    found.to_csv(options.out / "whatif.csv", index=False)
    print(found.round(3).to_string(index=False))
    said = found[found["says"] != "nothing"]
    print(
        f"{len(said)} of {len(found)} estimates say something: direction right in "
        f"{(said['direction'] == 'right').sum()}, re-run inside the band in {said['in_band'].sum()}"
    )


if __name__ == "__main__":
    main()
