"""Step columns over the updates of a step, and copies of the step log for other tools.

The run folder stays the truth. A logger that fails is switched off with one warning; training goes
on.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from wapo_analysis.derive import step_columns, token_sums
from wapo_analysis.errors import UserError
from wapo_analysis.record.recorder import TokenPass
from wapo_analysis.train.config import TrainConfig

log = logging.getLogger(__name__)

_PROJECT = "wapo-analysis"
_WANDB_ID = "wandb-id"


class Sink(Protocol):
    """Where scalars go."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Take the scalars of a step."""

    def close(self, status: str) -> None:
        """Flush and end."""


class Loggers:
    """The loggers of a run; none is a valid number of them.

    ``sinks``: by the name a warning uses.
    """

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def log(self, row: Mapping[str, float]) -> None:
        """Copy a row of the step table; numbers that are not finite are left out."""
        step = int(row["step"])
        scalars = {
            _tag(name): float(value)
            for name, value in row.items()
            if name != "step" and math.isfinite(value)
        }
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(scalars, step)
            except Exception as error:
                self._drop(name, error)

    def close(self, status: str) -> None:
        """End every logger; ``status`` is the run's."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.close(status)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        del self._sinks[name]
        log.warning("logging to %s stopped (%s: %s)", name, type(error).__name__, error)


def check_loggers(kind: str) -> None:
    """Check that the packages of the loggers are installed. Raises UserError if one is not."""
    for package in _wanted(kind):
        if find_spec(package) is None:
            raise UserError(
                f"log_to {kind} needs {package}, which is not installed: "
                f'pip install "wapo-analysis[{package}]"'
            )


def open_loggers(
    kind: str, run: Path | None, config: TrainConfig, after: int | None = None
) -> Loggers:
    """Open the loggers of a run; one that cannot be opened is left out with a warning.

    Parameters
    ----------
    run : Path, optional
        Run folder; without one nothing is logged.
    config : TrainConfig
        Settings, given to W&B as its config.
    after : int, optional
        The run is continued after this step; what was logged of later ones is replaced.
    """
    sinks: dict[str, Sink] = {}
    for name in _wanted(kind) if run is not None else ():
        assert run is not None
        try:
            sinks[name] = _OPENED[name](run, config, after)
        except Exception as error:
            log.warning("cannot log to %s (%s: %s)", name, type(error).__name__, error)
    return Loggers(sinks)


def _wanted(kind: str) -> tuple[str, ...]:
    return {"none": (), "both": ("tensorboard", "wandb")}.get(kind, (kind,))


def _tag(column: str) -> str:
    """Name of a column in a logger: grouped by what it is about."""
    if "/" in column:
        return column
    return f"seconds/{column}" if column.startswith("seconds") else f"train/{column}"


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: TrainConfig, after: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        purge = None if after is None else after + 1
        _await_later_name(folder)
        self._writer = SummaryWriter(folder, purge_step=purge)
        if after is None:
            settings = "\n".join(f"    {k} = {v!r}" for k, v in config.to_dict().items())
            self._writer.add_text("settings", settings)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


def _await_later_name(folder: Path) -> None:
    """Wait out the second in which the newest event file was begun.

    TensorBoard reads event files in the order of their names, which begin with that second; of one
    second, those of another process or its tenth file would come first, and the steps that a
    resumed run replaces would stay.
    """
    stamps = [file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")]
    if begun := [int(stamp) for stamp in stamps if stamp.isdigit()]:
        time.sleep(min(max(max(begun) + 1 - time.time(), 0.0), 1.0))


class _Wandb:
    """A run of Weights & Biases; its own variables (WANDB_MODE, WANDB_PROJECT ...) decide where."""

    def __init__(self, run: Path, config: TrainConfig, after: int | None) -> None:
        import wandb

        held = run / _WANDB_ID
        known = held.read_text().strip() if after is not None and held.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=f"{config.shown_label} seed {config.seed}",
            group=config.shown_label,
            dir=run,
            config=config.to_dict(),
            id=known,
            resume="allow" if known else None,
        )
        held.write_text(f"{self._run.id}\n")

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("finished", "interrupted") else 1)


_OPENED: Mapping[str, Callable[[Path, TrainConfig, int | None], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}


class StepTally:
    """Sums of one step; each token counts once per gradient pass that saw it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._loss: Tensor | float = 0.0
        self._norms: list[float] = []

    def add_tokens(self, tokens: TokenPass, ratio: Tensor, loss: Tensor) -> None:
        """Add the tokens of one micro-batch, their ratio in the loss, shape (N,), and its loss."""
        sums = token_sums({**tokens.given(), "ratio": ratio})
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()}
        self._loss = self._loss + loss.detach().double()  # nobody waits for it

    def add_update(self, grad_norm: float) -> None:
        """Add one optimizer update with its gradient norm before clipping."""
        self._norms.append(grad_norm)

    def columns(self, rollouts: Mapping[str, float]) -> dict[str, float]:
        """Columns of the steps table; what no token was seen for is left out.

        ``rollouts``: sums over the rollouts, of `wapo_analysis.derive.rollout_sums`.
        """
        own = [torch.as_tensor(self._loss), *self._sums.values()]
        loss, *summed = torch.stack([value.double() for value in own]).tolist()
        sums = dict(zip(self._sums, summed, strict=True))
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        return {
            "loss": loss,
            "grad_norm": sum(finite) / len(finite) if finite else math.nan,
            **step_columns({**sums, **rollouts}),
            "skipped_updates": len(self._norms) - len(finite),
            "updates": len(self._norms),
        }
