"""GRPO against WAPO from one base policy on the same prompts, gentle and stressed.

``gentle`` is the demo's setting. ``stress`` does sixteen updates on every batch (four epochs of
four mini-batches), where steps are too large for the ratio clip to hold. About ten minutes on two
CPU cores for three seeds.

    python experiments/grpo_vs_wapo.py --setting stress --out runs/stress

Writes the runs, prints the comparison, and writes figures and report.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from wapo_analysis import TrainConfig, open_run
from wapo_analysis.cli import show
from wapo_analysis.cli.figures import write_figures
from wapo_analysis.compare import compare
from wapo_analysis.errors import UserError
from wapo_analysis.report import build_report
from wapo_analysis.train.jobs import Job, train_all

SETTINGS = {
    "gentle": TrainConfig(lr=5e-5, steps=200, checkpoint_every=0),
    "stress": TrainConfig(lr=1e-4, epochs=4, steps=150, checkpoint_every=0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", choices=SETTINGS, default="gentle")
    parser.add_argument("--out", type=Path, default=Path("runs/grpo_vs_wapo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--task", default="chain-sum")
    options = parser.parse_args()
    base = replace(SETTINGS[options.setting], task=options.task)
    if options.steps is not None:
        base = replace(base, steps=options.steps)
    jobs = [
        Job(replace(base, objective=name, seed=seed), options.out / f"{name}-{seed}")
        for seed in range(options.seeds)
        for name in ("grpo", "wapo")
    ]
    try:
        failures = train_all(jobs)
        for job, failure in zip(jobs, failures, strict=True):
            if failure:
                print(f"{job.out}: {failure}", file=sys.stderr)
        runs = [open_run(job.out) for job in jobs]
        show(compare(runs), "text")
        write_figures(runs, options.out / "figures", "png", None)
        build_report(runs, options.out / "report.html")
    except UserError as error:
        sys.exit(f"grpo_vs_wapo: {error}")


if __name__ == "__main__":
    main()
