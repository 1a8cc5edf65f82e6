"""Courses of a log, and what is told of them."""

import numpy as np

from tests.support.step_logs import Columns, ramp
from wapo_analysis.diagnose import Diagnosis, Finding
from wapo_analysis.diagnose.reward import RewardState, reward_state
from wapo_analysis.series import Series

N = 60
FLAT = np.full(N, 0.3)
GAINS = ramp(0.2, 0.7, N, 5, 55)
WAVE = np.random.default_rng(5).normal(0, 1, N)
CALM = 0.002 * np.random.default_rng(3).normal(0, 1, 200)
OTHER = np.random.default_rng(8).normal(0, 1, N)
FORMAT, CONTENT = ramp(0.2, 0.9, N, 20, 15) + 0.05 * WAVE, 0.25 + 0.05 * OTHER


def then(count: int, before: float, after: float, records: int = N) -> np.ndarray:
    return np.r_[np.full(count, before), np.full(records - count, after)]


def levels(*lengths_and_levels: tuple[int, float]) -> np.ndarray:
    """Levels one after the other, exactly."""
    return np.concatenate([np.full(length, float(level)) for length, level in lengths_and_levels])


def parts(*lengths_and_levels: tuple[int, float]) -> np.ndarray:
    """Levels one after the other, with a little noise."""
    exact = levels(*lengths_and_levels)
    return exact + CALM[: len(exact)]


def functions(reward: np.ndarray, **means: np.ndarray) -> Columns:
    return {"reward": reward, **{f"rewards/{name}/mean": values for name, values in means.items()}}


def summed(**means: np.ndarray) -> Columns:
    """Functions whose weights are 1."""
    return functions(np.sum(list(means.values()), axis=0), **means)


def told(diagnosis: Diagnosis, name: str) -> Finding | None:
    return next((f for f in diagnosis.findings if f.name == name), None)


def series(values: np.ndarray) -> Series:
    return Series(np.arange(1, len(values) + 1), np.asarray(values, float))


def state(values: np.ndarray, solved: bool = False) -> RewardState:
    return reward_state(series(values), solved)
