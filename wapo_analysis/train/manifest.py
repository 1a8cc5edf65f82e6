"""What the manifest of a built-in run says, and the recorder that keeps it."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from wapo_analysis.capture.mode import CaptureMode
from wapo_analysis.declare import declared_settings
from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.store import Manifest, read_manifest
from wapo_analysis.train.checkpoint import drop_later
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.distributed import World
from wapo_analysis.train.models import Policy
from wapo_analysis.train.trust import recorded_settings


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

    Raises
    ------
    UserError
        If the task's data are not those the run began with.
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

    Raises
    ------
    UserError
        If one of them has changed, naming it and both values.
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
    world: World,
    resume_after: int | None,
    take_over: bool = False,
) -> Recorder:
    """Recorder of a new run or of one that is continued after a step; without folder, of none.

    Raises
    ------
    UserError
        If the folder cannot be used, or the task's data are not those the run began with.
    """
    if run is None:
        return Recorder(None)
    if resume_after is None:
        manifest = new_manifest(config, policy, capture)
    else:
        manifest = resumed_manifest(read_manifest(run), config, capture)
    recorder = Recorder(
        run,
        {**manifest, "processes": world.size},
        token_every=config.token_every,
        token_fraction=config.token_fraction,
        store_bits=config.store_bits,
        rescore_every=config.rescore_every,
        topk=config.topk,
        audit=config.audit,
        on_warning=_action(config.on_warning, world),
        on_critical=_action(config.on_critical, world),
        probe_every=config.probe_every,
        temperature=config.temperature,
        rank=world.rank,
        resume_after=resume_after,
        take_over=take_over,
    )
    if resume_after is not None and world.first:
        drop_later(run, resume_after)  # of a process the run was just taken from
    return recorder


def _action(word: str, world: World) -> str | None:
    """What the guard is to do; one process cannot stop the others, so several have none."""
    return None if word == "none" or world.size > 1 else word
