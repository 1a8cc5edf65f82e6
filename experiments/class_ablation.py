"""Train on one class of updates only: the taxonomy seen live.

Four settings from one base policy, GRPO with ``include_bins`` set to one class each, several seeds.
Expected: pos_peak and neg_valley lower entropy, pos_valley and neg_peak raise it; those two ruin
the reward. About four minutes for five seeds on two CPU cores.

    python experiments/class_ablation.py --out runs/class_ablation

Writes the runs, ``class_ablation.png`` and ``class_ablation.csv``, and prints the table.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from wapo_taxonomy import CLASS_CODES, CLASSES, rule_dentropy_sign

from wapo_analysis import TrainConfig, open_run
from wapo_analysis.errors import UserError
from wapo_analysis.train.jobs import Job, train_all

SETTING = TrainConfig(lr=5e-5, epochs=2, minibatches=2, steps=60, checkpoint_every=0)
WINDOW = 3  # steps averaged at either end


@dataclass(frozen=True)
class Outcome:
    """One run's beginning and end."""

    cls: str
    seed: int
    entropy_start: float
    entropy_end: float
    reward_start: float
    reward_end: float

    @property
    def as_predicted(self) -> bool:
        """Entropy moved the way the taxonomy says."""
        moved = self.entropy_end - self.entropy_start
        return moved * rule_dentropy_sign(CLASS_CODES[self.cls]) > 0


def jobs(out: Path, seeds: int, steps: int) -> list[Job]:
    """One job per class and seed."""
    return [
        Job(replace(SETTING, include_bins=(cls,), seed=seed, steps=steps), out / f"{cls}-{seed}")
        for seed in range(seeds)
        for cls in CLASSES
    ]


def run(out: Path, seeds: int = 5, steps: int = SETTING.steps) -> list[Outcome]:
    """Train every class and seed; returns what became of each.

    Raises
    ------
    UserError
        If a run failed.
    """
    todo = jobs(out, seeds, steps)
    failures = [failure for failure in train_all(todo) if failure]
    if failures:
        raise UserError(f"{len(failures)} runs failed, the first with {failures[0]}")
    return [outcome(job) for job in todo]


def outcome(job: Job) -> Outcome:
    """Means over the first and last steps of a run."""
    steps = open_run(job.out).steps
    first, last = steps.head(WINDOW), steps.tail(WINDOW)
    return Outcome(
        job.config.include_bins[0],
        job.config.seed,
        first.entropy.mean(),
        last.entropy.mean(),
        first.reward.mean(),
        last.reward.mean(),
    )


def draw(out: Path, file: Path) -> None:
    """Entropy and reward over steps, one column per class, one line per seed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from wapo_analysis.plots.style import CLASS_INK, save_figure, theme

    with mpl.rc_context(theme()):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        axes = figure.subplots(2, len(CLASSES), sharex=True, sharey="row")
        for column, cls in enumerate(CLASSES):
            for folder in sorted(out.glob(f"{cls}-*")):
                steps = open_run(folder).steps
                for axis, quantity in zip(axes[:, column], ("entropy", "reward"), strict=True):
                    axis.plot(steps.step, steps[quantity], color=CLASS_INK[cls], lw=1.2, alpha=0.8)
            expected = "falls" if rule_dentropy_sign(CLASS_CODES[cls]) < 0 else "rises"
            axes[0, column].set_title(f"{cls} only", color=CLASS_INK[cls])
            axes[0, column].text(
                0.97, 0.4, f"predicted: {expected}", ha="right", va="top",
                transform=axes[0, column].transAxes,
            )  # fmt: skip
            axes[1, column].set_xlabel("rollout step (4 updates)")
        axes[0, 0].set(ylabel="entropy (nats)", ylim=(0, None))
        axes[1, 0].set(ylabel="reward", ylim=(0, 1))
        figure.suptitle("What does training on one class of updates alone do?", x=0.01, ha="left")
        save_figure(figure, file, "png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/class_ablation"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=SETTING.steps)
    options = parser.parse_args()
    try:
        outcomes = run(options.out, options.seeds, options.steps)
    except UserError as error:
        sys.exit(f"class_ablation: {error}")
    table = pd.DataFrame([vars(o) | {"as_predicted": o.as_predicted} for o in outcomes])
    table.to_csv(options.out / "class_ablation.csv", index=False)
    draw(options.out, options.out / "class_ablation.png")
    means = table.groupby("cls", sort=False).mean(numeric_only=True).drop(columns="seed")
    means["as_predicted"] = table.groupby("cls").as_predicted.agg(lambda s: f"{s.sum()}/{len(s)}")
    print(means.round(3).to_string())


if __name__ == "__main__":
    main()
