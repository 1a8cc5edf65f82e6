"""How built-in runs begin and end: what a manifest says, when one stops early."""

import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import torch

from wapo_analysis.capture import CaptureMode
from wapo_analysis.declare import declared_settings
from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.store import Manifest, read_manifest
from wapo_analysis.store.files import MANIFEST
from wapo_analysis.store.lock import written_by_another
from wapo_analysis.train.checkpoint import drop_later, recorded_settings
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.policy import Policy
from wapo_analysis.train.rollout import NonFiniteLogits

log = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Whether somebody asked the run to stop."""

    asked: bool = False


@contextmanager
def stop_between_steps(announce: bool = True) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one interrupts at once.

    Only in the main thread, and only signals nobody else handles; elsewhere they stay as they are.
    ``announce``: say so in the log.
    """
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        if announce:
            log.warning(
                "%s: the run stops after this step; once more stops it at once",
                signal.Signals(number).name,
            )

    held = {}
    if threading.current_thread() is threading.main_thread():
        ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        held = {
            number: plain for number, plain in ours.items() if signal.getsignal(number) == plain
        }
    for number in held:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, plain in held.items():
            signal.signal(number, plain)


@dataclass
class Ended:
    """How a run ended."""

    status: str = "failed"


@contextmanager
def closed_as_it_ended(
    closes: Sequence[Callable[[str], None]], config: TrainConfig
) -> Iterator[Ended]:
    """A block that trains; after it each of ``closes`` is told the status of the run.

    Raises UserError if the GPU has no memory for a step, naming what to change.
    """
    ended = Ended()
    try:
        yield ended
    except KeyboardInterrupt:
        ended.status = "interrupted"
        raise
    except NonFiniteLogits:
        ended.status = "diverged"
        raise
    except torch.OutOfMemoryError as error:
        ended.status = "out_of_memory"
        raise _out_of_memory(config) from error
    finally:
        for close in closes:
            close(ended.status)


def _out_of_memory(config: TrainConfig) -> UserError:
    size = config.microbatch_size or "as many as fit by estimate"
    at_once = config.sample_batch_size or "all"
    return UserError(
        f"the GPU has no memory for a step: set microbatch_size (now {size}) or sample_batch_size "
        f"(now {at_once}) lower, or gradient_checkpointing to true (now "
        f"{str(config.gradient_checkpointing).lower()})"
    )


@dataclass
class Begun:
    """Whether a run has finished a step."""

    yes: bool = False


@contextmanager
def nothing_left_if_refused(run: Path | None) -> Iterator[Begun]:
    """Take away what was written of a new run that a mistake ends before its first step.

    So the corrected command can have the same folder. What else lies in it stays.
    """
    begun = Begun()
    fresh = run is not None and not (run / MANIFEST).exists()
    before = set(run.iterdir()) if run is not None and run.is_dir() else None
    try:
        yield begun
    except UserError:
        mine = run is not None and fresh and not begun.yes and not written_by_another(run)
        if run is not None and mine and run.is_dir():
            for path in set(run.iterdir()) - (before or set()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if before is None:
                run.rmdir()
        raise


def new_manifest(config: TrainConfig, policy: Policy, capture: CaptureMode) -> Manifest:
    """Manifest of a new run: what was trained, on what, with which versions."""
    task = config.load_task()
    objective = config.objective_config(config.max_new_tokens or task.max_new_tokens)
    return Manifest.begun(
        "built-in",
        ("torch", "transformers", "numpy", "pandas", "pyarrow"),
        name=f"{config.shown_label} seed {config.seed}",
        label=config.shown_label,
        objective={
            "name": objective.name,
            **asdict(objective),
            "bounds": [objective.bounds.low, objective.bounds.high],
        },
        task=config.task,
        data=task.data_record(),
        model=config.model,
        tokenizer=type(policy.tokenizer).__name__,
        vocabulary=int(policy.model.config.vocab_size),
        parameters=sum(p.numel() for p in policy.module.parameters()),
        trainable_parameters=sum(p.numel() for p in policy.trainable().values()),
        seed=config.seed,
        device=str(policy.device),
        planned_steps=config.steps,
        config=config.to_dict(),
        capture=capture.to_dict(),
    )


def resumed_manifest(before: Manifest, config: TrainConfig, capture: CaptureMode) -> Manifest:
    """Manifest of a continued run; a changed step count is the only change it may carry.

    Raises UserError if the task's data are not those the run began with.
    """
    data, now = before.data, config.load_task().data_record()
    for name in ("sha256", "reward_sha256", "train", "held_out"):
        if data and data.get(name) != now.get(name):
            raise UserError(
                f"cannot resume: the data of task {config.task} changed since the run began "
                f"({name} was {str(data.get(name))[:12]}, is {str(now.get(name))[:12]})"
            )
    return before.changed(
        {
            "planned_steps": config.steps,
            "config": config.to_dict(),
            "capture": capture.to_dict(),
            "resumed": [*(before.resumed or []), datetime.now(UTC).isoformat(timespec="seconds")],
            "step_lines": None,
        }
    )


def check_resumed(run: Path, config: TrainConfig) -> None:
    """Check that a run is continued with the settings that made it what it is.

    Raises UserError if one of them has changed, naming it and both values.
    """
    before = recorded_settings(run)
    for name, declared in declared_settings(TrainConfig).items():
        old, new = getattr(before, name), getattr(config, name)
        if old != new and not declared.resumable:
            raise UserError(
                f"{name} of a run that is continued cannot change from {old!r} to {new!r}; "
                "start a new run with another --out"
            )


def open_recorder(
    run: Path | None,
    config: TrainConfig,
    policy: Policy,
    capture: CaptureMode,
    resume_after: int | None,
    take_over: bool = False,
) -> Recorder:
    """Recorder of a new run or of one that is continued after a step; without folder, of none.

    Raises UserError if the folder cannot be used, or the task's data are not those the run began
    with.
    """
    if run is None:
        return Recorder(None)
    if resume_after is None:
        manifest = new_manifest(config, policy, capture)
    else:
        manifest = resumed_manifest(read_manifest(run), config, capture)
    recorder = Recorder(
        run,
        {**manifest, "processes": 1},
        token_every=config.token_every,
        token_fraction=config.token_fraction,
        store_bits=config.store_bits,
        rescore_every=config.rescore_every,
        topk=config.topk,
        audit=config.audit,
        on_warning=guard_action(config.on_warning),
        on_critical=guard_action(config.on_critical),
        probe_every=config.probe_every,
        temperature=config.temperature,
        resume_after=resume_after,
        take_over=take_over,
    )
    if resume_after is not None:
        drop_later(run, resume_after)  # of a process the run was just taken from
    return recorder


def guard_action(word: str) -> str | None:
    """What the guard is to do."""
    return None if word == "none" else word
