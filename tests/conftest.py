"""Shared fixtures: seeded runs that are built once, and a quiet, single-threaded torch."""

import gc
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from wapo_analysis.diagnose import detectors
from wapo_analysis.train.config import TrainConfig

torch.set_num_threads(1)
with suppress(ImportError):  # other environments need not have it
    from hypothesis import settings

    # The same examples everywhere; `make test-slow` tries others.
    settings.register_profile("same", deadline=None, derandomize=True, database=None)
    settings.register_profile("others", deadline=None)
    settings.load_profile("same")

# Scripts for other environments: they import what this one need not have.
collect_ignore = [
    *(f"compat/{name}.py" for name in ("check_trl", "neighbours", "run_matrix")),
    "unit/stats/triton_cases.py",
]


def pytest_collection_finish() -> None:
    """What the imports made stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


TINY = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "minibatches": 2, "steps": 3}


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_as_in_a_terminal() -> Iterator[None]:
    """A shell starts ``make test &`` with Ctrl-C ignored; tests of interrupts need it heard."""
    held = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, held)


@pytest.fixture(scope="session", autouse=True)
def _faults_of_checks_are_seen() -> None:
    detectors.FAULTS_RAISE = True


@pytest.fixture(scope="session")
def tiny_config() -> TrainConfig:
    """Three steps of GRPO on the embedded task, re-scored at every step."""
    return TrainConfig.from_dict({**TINY, "rescore_every": 1, "lr": 1e-4})


@pytest.fixture(scope="session")
def tiny_run(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of three steps, written once; tests must not change it."""
    from wapo_analysis.train.loop import train

    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config, out)
    return out
