"""A fork: the rest of a run trained again from one of its steps, with one thing changed.

Prompts and sampling noise are functions of seed and step, and checkpoints hold the weights and the
optimizer's state bitwise. So a fork meets what the run met, and whatever comes out differently
comes from the change; with nothing changed it is bitwise the run's own continuation.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wapo_analysis.compare.fork import ForkComparison, compare_fork
from wapo_analysis.declare import declared_settings
from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.results import step_words
from wapo_analysis.settings import shown_value
from wapo_analysis.store import Run, open_run
from wapo_analysis.store.files import check_new
from wapo_analysis.store.manifest import write_manifest
from wapo_analysis.store.writer import copy_steps
from wapo_analysis.train.checkpoint import checkpoints, defect, save_checkpoint, step_of
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.lifecycle import new_manifest, nothing_left_if_refused
from wapo_analysis.train.loop import Progress, begin, train

_LABEL = 200
_REPEATED = ("reward", "entropy", "loss", "grad_norm")


@dataclass(frozen=True)
class Plan:
    """A fork that is going to be made; checked when made by `plan_fork`."""

    original: Run
    #: The change is in force after it.
    step: int
    #: Step it starts from, 0 for the policy before training; steps up to ``step`` are repeated.
    checkpoint: int
    #: Settings of the original and of the fork.
    before: TrainConfig
    config: TrainConfig
    #: Last step of the fork.
    last: int

    @property
    def change(self) -> dict[str, tuple[Any, Any]]:
        """Setting to its value in the original and in the fork."""
        pairs = {
            f.name: (getattr(self.before, f.name), getattr(self.config, f.name))
            for f in fields(TrainConfig)
        }
        beside = ("label", "steps")
        return {k: (a, b) for k, (a, b) in pairs.items() if a != b and k not in beside}

    @property
    def slug(self) -> str:
        """The change in a folder's name."""
        told = [f"{name}-{shown_value(new)}" for name, (_, new) in self.change.items()]
        return re.sub(r"[^\w.+-]+", "-", "-".join(told))[:80].strip("-") or "unchanged"

    @property
    def start(self) -> str:
        """Where it starts, in words."""
        if self.checkpoint == 0:
            where = "the policy before training"
        else:
            where = f"the checkpoint of step {self.checkpoint}"
        if self.step == self.checkpoint:
            return f"starts from {where}"
        return (
            f"starts from {where}, the nearest at or before step {self.step}; up to there the run "
            "is repeated unchanged"
        )


def plan_fork(run: Path, step: int, changes: Mapping[str, Any], steps: int | None = None) -> Plan:
    """Decide where a fork starts and what it trains.

    Raises UserError if the run cannot be forked there, naming its checkpoints, or a setting cannot
    change.

    Parameters
    ----------
    run : Path
        Folder of a run of the built-in trainer.
    step : int
        The change is in force from the step after it; 0 for the first.
    changes : mapping of str to object
        Settings to change, plain values; may be empty.
    steps : int, optional
        Steps to train after ``step``; None trains to the last step of the run.
    """
    original = open_run(run)
    if "recipe" in original.manifest.extra:
        raise UserError(f"{run} was trained on engine trl; only runs of engine built-in are forked")
    if original.manifest.source != "built-in":
        raise UserError(f"{run} was not written by wapo train, so it has no checkpoint to fork")
    before = TrainConfig.from_dict(original.manifest.config)
    reached = int(original.steps["step"].max()) if len(original.steps) else 0
    if not reached:
        raise UserError(f"{run} has no finished step to fork at")
    if not 0 <= step < reached:
        raise UserError(f"--at must be 0 to {reached - 1}: {run} has {reached} steps, got {step}")
    if steps is not None and steps < 1:
        raise UserError(f"--steps must be at least 1, got {steps}")
    last = reached if steps is None else step + steps
    config = _changed(before, changes, last)
    if "label" not in changes:
        config = replace(config, label=_label(original, step, before, config))
    return Plan(original, step, _start(original, step), before, config, last)


def _changed(before: TrainConfig, changes: Mapping[str, Any], last: int) -> TrainConfig:
    """Settings of the fork."""
    if "steps" in changes:
        raise UserError("the length of a fork is given by --steps, not by --set")
    declared = declared_settings(TrainConfig)
    for name in changes:
        if name in declared and not declared[name].forkable:
            raise UserError(
                f"{name} cannot change in a fork: it decides the prompts or the parameters; "
                "start a new run with wapo train"
            )
    bins = [name for name in ("include_bins", "exclude_bins") if name in changes]
    cleared = {"include_bins": (), "exclude_bins": ()} if len(bins) == 1 else {}
    longer = {"steps": last} if last > before.steps else {}
    if longer and before.lr_schedule != "constant":
        raise UserError(
            f"a fork of a run whose lr_schedule is {before.lr_schedule} ends with it, at step "
            f"{before.steps} or before; --steps leads to step {last}"
        )
    return TrainConfig.from_dict({**cleared, **changes, **longer}, before)


def _label(original: Run, step: int, before: TrainConfig, config: TrainConfig) -> str:
    """Name of the fork's setting: no seed of the original's."""
    changed = [
        f"{f.name} {shown_value(getattr(config, f.name))}"
        for f in fields(TrainConfig)
        if getattr(config, f.name) != getattr(before, f.name) and f.name != "steps"
    ]
    told = ", ".join(changed) or "unchanged"
    return f"{original.label}, after step {step}: {told}"[:_LABEL]


def _start(original: Run, step: int) -> int:
    """Step of the nearest whole checkpoint at or before ``step``; 0 for the first policy."""
    held = checkpoints(original.path)
    found = [step_of(c) for c in held if step_of(c) <= step and defect(c) is None]
    if found:
        return found[-1]
    forked = original.manifest.forked
    if step == 0 and not forked:
        return 0
    told = ", ".join(str(step_of(c)) for c in held) or "none"
    other = f"it was forked itself: fork {forked.get('run')}" if forked else "--at 0 starts anew"
    raise UserError(
        f"{original.path} has no whole checkpoint at or before step {step} (it has: {told}); "
        f"{other}. More are kept with --set checkpoint_every=10 --set keep_checkpoints=100"
    )


def fork_run(
    plan: Plan,
    out: Path,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> ForkComparison:
    """Make a fork and compare it to its original.

    The new folder holds the original's steps up to the fork and is a run like any other: it can be
    diagnosed, and continued with ``wapo train --resume``. Raises UserError if the folder is not
    empty or the original's checkpoint cannot be used; NonFiniteLogits if the fork's policy can no
    longer be sampled from; its run is closed as ``diverged``.

    Parameters
    ----------
    out : Path
        Folder of the fork; new or empty.
    progress : callable, optional
        Called with the step's row after every step, repeated ones among them.
    threads : int, optional
        CPU threads of this process; None leaves torch's own choice.
    """
    check_new(out)
    if threads is not None:
        torch.set_num_threads(threads)
    with nothing_left_if_refused(out):
        _branch(plan, out, progress)
    train(plan.config, out, resume=True, until=plan.last, progress=progress)
    return compare_fork(open_run(out), plan.original)


def _branch(plan: Plan, out: Path, progress: Progress | None) -> None:
    """Write the fork's folder as it is before its first own step."""
    original = plan.original
    start = original.path if plan.checkpoint else None
    trainer, done = begin(plan.before, start, plan.checkpoint)
    rows = []
    for step in range(done + 1, plan.step + 1):
        rows.append(trainer.step(step, Recorder(None)))
        if progress is not None:
            progress(rows[-1])
    copy_steps(original.path, out, plan.step)
    save_checkpoint(out, plan.step, trainer.policy, trainer.optimizer)
    told = new_manifest(plan.config, trainer.policy, trainer.capture)
    forked = {
        "run": str(original.path.resolve()),
        "step": plan.step,
        "checkpoint": plan.checkpoint,
        "change": {name: list(pair) for name, pair in plan.change.items()},
        "notes": _notes(original, told.versions, told.device, rows),
    }
    entries = {"forked": forked, "eval_before": original.manifest.eval_before}
    write_manifest(out, told.changed(entries))


def _notes(
    original: Run, versions: Mapping[str, Any], device: str | None, rows: list[dict[str, Any]]
) -> list[str]:
    """What the reader must know of how alike the two runs are, in sentences."""
    notes = []
    if rows:
        span = step_words([int(row["step"]) for row in rows])
        equal = _equal(original, rows)
        notes.append(
            f"The repeated {span} came out as recorded, to the last digit."
            if equal
            else f"The repeated {span} came out otherwise than recorded, so the change is not the "
            "only difference: another machine, version or number of processes."
        )
    then = original.manifest
    pairs = {
        "torch": (then.versions.get("torch"), versions.get("torch")),
        "device": (then.device, device),
        "processes": (then.processes or 1, 1),
    }
    other = [f"{name} {a} then, {b} now" for name, (a, b) in pairs.items() if a != b]
    if other:
        notes.append(f"Rounding may differ from the original's: {', '.join(other)}.")
    return notes


def _equal(original: Run, rows: list[dict[str, Any]]) -> bool:
    """The repeated steps are bit by bit those recorded; NaN equals NaN."""
    recorded = original.steps.set_index("step")[list(_REPEATED)].astype(float)
    again = [[float(row[name]) for name in _REPEATED] for row in rows]
    before = recorded.loc[[int(row["step"]) for row in rows]].to_numpy()
    return bool(np.array_equal(before, np.array(again), equal_nan=True))
