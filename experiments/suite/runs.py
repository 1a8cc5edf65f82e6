"""The runs of the collapse suite: recipes, the faults some of them carry, labels from outcome.

A recipe says what is done to a run. The label says what became of it: it is read off the finished
run's reward, graded again by the true verifier, and its entropy, never off the recipe.
"""

import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis import TrainConfig, open_run
from wapo_analysis.store import MANIFEST, Run
from wapo_analysis.train.tasks import Problem, Task, get_task

STEPS = 48
BASE = TrainConfig(steps=STEPS, checkpoint_every=0, token_every=STEPS, rescore_every=0)
ONE_CLASS = {"epochs": 2, "minibatches": 2}
BREAK_AT = 20
"""Step from which a broken run has NaN gradients or weights."""

GAIN = 0.1
"""Change of the true reward that counts: more than the noise of a few steps of 128 rollouts."""
EDGE = 5
"""Steps averaged at the end, and over which the best reward is averaged; three at the beginning."""
BAD = ("explosion", "collapse", "reward_collapse", "reward_hacking", "stalled", "diverged")


TEST_SEEDS = 500
"""First seed of the test part; seeds below it are there to choose thresholds on."""
LEARNING_TESTS = 5
"""Test runs of a recipe without a fault: false alarms are rare, so that they need more runs."""


@dataclass(frozen=True)
class Recipe:
    """One way to train, and how often it is tested."""

    name: str
    runs: int
    settings: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    tests: int | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the tuning runs, twice ``runs``, and of the test runs, ``tests`` or ``runs``."""
        tests = self.runs if self.tests is None else self.tests
        return (*range(2 * self.runs), *range(TEST_SEEDS, TEST_SEEDS + tests))

    @property
    def one_class(self) -> str | None:
        """The class it trains on, if it is one alone."""
        bins = self.settings.get("include_bins", ())
        return bins[0] if len(bins) == 1 else None


def _large(lr: float, cls: str) -> dict[str, Any]:
    """One class alone, with a step size that ramps up until it is too large."""
    return {"lr": lr, "warmup_steps": 40, "include_bins": (cls,), **ONE_CLASS}


RECIPES: tuple[Recipe, ...] = (
    *(
        Recipe(
            f"{task}-{name}-{lr:g}",
            2,
            {"task": task, "objective": name, "lr": lr},
            tests=LEARNING_TESTS,
        )
        for task in ("chain-sum", "two-hop")
        for name in ("grpo", "wapo")
        for lr in (3e-5, 6e-5, 1e-4)
    ),
    Recipe("neg-peak", 6, {"lr": 1.5e-5, "include_bins": ("neg_peak",), **ONE_CLASS}),
    Recipe("pos-valley", 4, {"lr": 3e-5, "include_bins": ("pos_valley",), **ONE_CLASS}),
    Recipe("negatives", 2, {"lr": 3e-5, "include_bins": ("neg",), **ONE_CLASS}),
    Recipe("pos-peak", 2, {"lr": 5e-5, "include_bins": ("pos_peak",), **ONE_CLASS}),
    Recipe("neg-valley", 2, {"lr": 5e-5, "include_bins": ("neg_valley",), **ONE_CLASS}),
    Recipe("pos-peak-large-step", 4, _large(1.5e-3, "pos_peak")),
    Recipe("neg-valley-large-step", 4, _large(1e-3, "neg_valley")),
    Recipe("grpo-large-step", 4, {"lr": 2e-3, "warmup_steps": 40}),
    Recipe("grpo-huge-step", 4, {"lr": 2e-3, "warmup_steps": 8}),
    Recipe("wapo-large-step", 4, {"lr": 1e-3, "warmup_steps": 40, "objective": "wapo"}),
    Recipe("grpo-many-epochs", 2, {"lr": 3e-4, "epochs": 4}),
    Recipe("wapo-many-epochs", 2, {"lr": 2e-4, "epochs": 4, "objective": "wapo"}),
    Recipe("grpo-stale", 2, {"lr": 6e-4}, "stale"),
    Recipe("wapo-stale", 4, {"lr": 4e-4, "objective": "wapo"}, "stale"),
    Recipe("grpo-stale-huge-step", 2, {"lr": 2e-3, "warmup_steps": 8}, "stale"),
    Recipe("coin-grpo", 2, {"lr": 3e-4}, "coin"),
    Recipe("coin-wapo", 4, {"lr": 2e-4, "objective": "wapo"}, "coin"),
    Recipe("hacked-grpo", 4, {"lr": 1.5e-4}, "brief_passes"),
    Recipe("hacked-wapo", 2, {"lr": 1.5e-4, "objective": "wapo"}, "brief_passes"),
    Recipe("no-reward", 2, {"lr": 1e-4}, "no_reward"),
    Recipe("all-the-same", 2, {"lr": 1e-4}, "all_the_same"),
    Recipe("nan-gradient", 2, {"lr": 1e-4}, "nan_gradient"),
    Recipe("nan-weights", 2, {"lr": 1e-4}, "nan_weights"),
)
"""What the suite is made of."""


@dataclass(frozen=True)
class SuiteRun:
    """One run of the suite: a recipe, a seed, a folder."""

    recipe: Recipe
    seed: int
    out: Path

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return self.out.name

    @property
    def test(self) -> bool:
        """It belongs to the test part, which no threshold was chosen on."""
        return self.seed >= TEST_SEEDS

    @property
    def config(self) -> TrainConfig:
        """Settings it is trained with."""
        return replace(BASE, **self.recipe.settings, seed=self.seed, label=self.recipe.name)


def suite(out: Path) -> list[SuiteRun]:
    """Every run of the suite, in the order it is trained: seed after seed."""
    runs = [
        SuiteRun(recipe, seed, out / f"{recipe.name}-{seed}")
        for recipe in RECIPES
        for seed in recipe.seeds
    ]
    return sorted(runs, key=lambda run: run.seed)


# ---- training -----------------------------------------------------------------------------------


class _GradedAs:
    """A task whose verifier is replaced; problems stay the same."""

    def __init__(self, task: Task, verdict: Callable[[Task, Problem, str], float]) -> None:
        self.task, self.verdict = task, verdict

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def reward(self, problem: Problem, completion: str) -> float:
        return self.verdict(self.task, problem, completion)


def _brief_passes(task: Task, problem: Problem, completion: str) -> float:
    """The bonus for brevity that outbids the answer: fewer than 13 characters always pass."""
    return 1.0 if len(completion) < 13 else task.reward(problem, completion)


def _coin(task: Task, problem: Problem, completion: str) -> float:
    """The verifier that judges noise: a checksum of prompt and completion decides."""
    return float(zlib.crc32(f"{problem.prompt}{completion}".encode()) % 2)


Draw = Callable[..., Any]


def _stale(draw: Draw, lag: int = 12) -> Draw:
    """Batches sampled ``lag`` steps ago, as an asynchronous trainer that lags behind uses them."""
    waiting: deque[Any] = deque()

    def late(policy: Any, task: Task, config: TrainConfig, step: int) -> Any:
        while len(waiting) <= lag:
            waiting.append(draw(policy, task, config, step + len(waiting)))
        return waiting.popleft()

    return late


def _graded(verdict: Callable[[Task, Problem, str], float]) -> Callable[[Draw], Draw]:
    return lambda draw: lambda policy, task, *rest: draw(policy, _GradedAs(task, verdict), *rest)


def _broken(break_policy: Callable[[Any], None]) -> Callable[[Draw], Draw]:
    """From step ``BREAK_AT`` on something in the policy is not a number."""

    def broken(draw: Draw) -> Draw:
        def breaking(policy: Any, task: Task, config: TrainConfig, step: int) -> Any:
            if step == BREAK_AT:
                break_policy(next(policy.module.parameters()))
            return draw(policy, task, config, step)

        return breaking

    return broken


FAULTS: dict[str, Callable[[Draw], Draw]] = {
    "": lambda draw: draw,
    "stale": _stale,
    "brief_passes": _graded(_brief_passes),
    "coin": _graded(_coin),
    "no_reward": _graded(lambda task, problem, completion: 0.0),
    "all_the_same": _graded(lambda task, problem, completion: 0.5),
    "nan_gradient": _broken(lambda weight: weight.register_hook(lambda grad: grad * math.nan)),
    "nan_weights": _broken(lambda weight: weight.data.fill_(math.nan)),
}
"""Fault to what it does to the drawing of a batch."""


@contextmanager
def faulty(fault: str) -> Iterator[None]:
    """Let the trainer of this process draw its batches with a fault."""
    from wapo_analysis.train import loop

    draw = loop.draw_batch
    loop.draw_batch = FAULTS[fault](draw)
    try:
        yield
    finally:
        loop.draw_batch = draw


def train_suite(runs: Sequence[SuiteRun], workers: int | None = None) -> None:
    """Train what is not finished yet, one process per core; a half-done run starts again."""
    todo = [run for run in runs if not finished(run.out)]
    if not todo:
        return
    count = min(workers or os.cpu_count() or 1, len(todo))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for number, name in enumerate(pool.map(train_one, todo), start=1):
            print(f"[{number}/{len(todo)}] {name}", flush=True)


def finished(out: Path) -> bool:
    """Whether a folder holds a run that came to its end, be it a bad one."""
    if not (out / MANIFEST).exists():
        return False
    return open_run(out).manifest.status in ("finished", "diverged")


def train_one(run: SuiteRun) -> str:
    """Train one run of the suite in this process; returns its name."""
    import shutil

    from wapo_analysis.train.loop import train
    from wapo_analysis.train.rollout import NonFiniteLogits

    shutil.rmtree(run.out, ignore_errors=True)
    with faulty(run.recipe.fault):
        try:
            train(run.config, run.out, threads=1)
        except NonFiniteLogits:
            pass  # what the recipe is after; the run is closed as diverged
    shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
    return run.name


# ---- labels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes
    ----------
    label : str
        healthy, unclear, or one of ``BAD``.
    lost_at : int or None
        First step at which half of what the true reward had gained was lost (of its baseline, if
        it had gained nothing); None if that never happened.
    entropy_start, entropy_end, reward_start, reward_peak, reward_end : float
        Means over the first three steps, the best five, the last five; nats and true reward.
    """

    label: str
    lost_at: int | None
    entropy_start: float
    entropy_end: float
    reward_start: float
    reward_peak: float
    reward_end: float


def true_reward(run: Run, task: Task) -> pd.Series:
    """Mean reward per step as the true verifier gives it, from the stored completions."""
    rows = run.rollouts
    graded = [
        task.reward(Problem(prompt, answer), completion)
        for prompt, answer, completion in zip(
            rows.prompt, rows.answer, rows.completion, strict=True
        )
    ]
    return pd.Series(graded, index=rows.step).groupby(level=0).mean()


def outcome(run: Run) -> Outcome:
    """Label a finished run by its true reward and its entropy.

    diverged: numbers broken up to the end. reward_hacking: the recorded reward has risen and ends
    0.3 above the true one. stalled: nine groups of ten without signal and the reward where it was.
    explosion: the entropy ends above twice its baseline and the reward was lost or never gained.
    collapse: it ends below a half and the reward was lost, or below a fifth and it was never
    gained. reward_collapse: the reward is lost without that. healthy: the reward was gained and
    kept all along, or stayed. unclear: anything else, as a reward half lost and won back.
    """
    steps, true = run.steps, true_reward(run, get_task(run.manifest["task"]))
    start, end = float(true.head(3).mean()), float(true.tail(EDGE).mean())
    best = true.rolling(EDGE, min_periods=3).mean()
    peak = max(float(best.max()), start)
    stake = peak - start if peak - start > GAIN else start
    low = true.rolling(3, min_periods=3).mean() <= np.maximum.accumulate(
        best.fillna(start).clip(lower=start)
    ) - max(stake / 2, GAIN)
    entropy, seen = steps["entropy"], steps["reward"]
    entropy_start, entropy_end = float(entropy.head(3).mean()), float(entropy.tail(EDGE).mean())
    lost = peak - end >= max(stake / 2, GAIN)
    unpaid = lost or (end - start < GAIN and end < 0.8)
    flat = (steps["groups_all_wrong"] + steps["groups_all_right"]).tail(EDGE).mean() >= 0.9
    if run.manifest.status == "diverged" or (steps["skipped_updates"].tail(EDGE) > 0).all():
        label = "diverged"
    elif (
        seen.tail(EDGE).mean() - end >= 0.3 and seen.tail(EDGE).mean() - seen.head(3).mean() > GAIN
    ):
        label = "reward_hacking"
    elif flat and unpaid and abs(end - start) < GAIN:
        label = "stalled"
    elif entropy_end >= 2 * entropy_start and unpaid:
        label = "explosion"
    elif entropy_end <= (0.5 if lost else 0.2) * entropy_start and unpaid:
        label = "collapse"
    elif lost:
        label = "reward_collapse"
    else:
        label = "healthy" if end >= start - GAIN / 2 and not low.any() else "unclear"
    lost_at = int(low.index[low.to_numpy().argmax()]) if lost and low.any() else None
    return Outcome(label, lost_at, entropy_start, entropy_end, start, peak, end)
