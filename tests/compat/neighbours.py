"""Four tools on one trainer at the same time: rl-doctor, rlprobe, martingale and this one.

The other three come from PyPI, into an environment that has TRL and this package:

    pip install rldoctor==0.2.0 rlprobe==0.1.0 martingale==0.2.0
    python -m tests.compat.neighbours --out compat-out

martingale's extra pins trl==1.13.0 and rlprobe's trl<1.8; neither extra is needed, and both work
with TRL 1.16.0, martingale with a warning.
"""

import argparse
import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tests.support.trl_toy import run, toy_tokenizer, toy_trainer
from wapo_analysis import attach, open_run

STEPS = 10
"""rl-doctor judges nothing before its eighth record."""


@dataclass
class Result:
    """What every tool saw of one run.

    Attributes
    ----------
    weights : dict of str to Tensor
        After training.
    ours, doctor, probe, martingale : dict of str to number
        Counts each tool reports; empty where the tool was not attached.
    """

    weights: dict[str, torch.Tensor]
    ours: dict[str, Any] = field(default_factory=dict)
    doctor: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    martingale: dict[str, Any] = field(default_factory=dict)


def train(out: Path, *, neighbours: bool, ours: str | None) -> Result:
    """Train ``STEPS`` steps with the neighbours attached or not, and with ours.

    Parameters
    ----------
    out : Path
        Folder for everything that is written, new.
    neighbours : bool
        Attach the other three.
    ours : {"first", "last"} or None
        Attach this tool before the others, after them, or not at all.
    """
    out.mkdir(parents=True)
    settings = {"max_steps": STEPS, "num_iterations": 2}
    handles: dict[str, Any] = {}
    if neighbours:
        trainer = _with_martingale(out, handles, settings)
    else:
        trainer = toy_trainer(out / "hf", **settings)
    watch = attach(trainer, out / "wapo", token_every=1) if ours == "first" else None
    if neighbours:
        _attach_others(trainer, out, handles)
    if ours == "last":
        watch = attach(trainer, out / "wapo", token_every=1)
    result = Result(run(trainer))
    if watch is not None:
        watch.close()
        result.ours = _ours(out / "wapo", watch, trainer)
    if neighbours:
        _read_others(result, out, handles)
    return result


def _with_martingale(out: Path, handles: dict[str, Any], settings: dict[str, Any]) -> Any:
    from martingale.integrations.trl import MartingaleRecorder, build_trainer_class

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = build_trainer_class()
        handles["martingale"] = MartingaleRecorder(str(out / "martingale"), toy_tokenizer())

        def build(*args: Any, **kwargs: Any) -> Any:
            return kind(*args, flight_recorder=handles["martingale"], halt_on_error=False, **kwargs)

        return toy_trainer(out / "hf", build, **settings)  # type: ignore[arg-type]


def _attach_others(trainer: Any, out: Path, handles: dict[str, Any]) -> None:
    from rl_doctor.integrations.trl import RLDoctorCallback
    from rlprobe.integrations.trl import attach as attach_rlprobe

    handles["doctor"] = RLDoctorCallback(check_every=2, min_steps=2)
    trainer.add_callback(handles["doctor"])
    handles["probe"] = attach_rlprobe(trainer, out / "rlprobe")


def _ours(path: Path, watch: Any, trainer: Any) -> dict[str, Any]:
    opened = open_run(path)
    tokens = opened.tokens()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "failure": watch.recorder.failure,
        "steps": len(opened.steps),
        "tokens": len(tokens),
        "coef_missing": int(tokens["coef"].isna().sum()),
        "coef_sum": float(tokens["coef"].abs().sum()),
        "unknown_class": int((tokens["cls"] == "unknown").sum()),
        "logged": min(sum(name.startswith("wapo/") for name in row) for row in logged),
    }


def _read_others(result: Result, out: Path, handles: dict[str, Any]) -> None:
    result.martingale = dict(handles["martingale"].stats)
    monitor = handles["doctor"].monitor
    verdict = None if monitor.latest is None else monitor.latest.worst.name
    result.doctor = {"records": len(monitor.records), "worst": verdict}
    steps = pd.read_parquet(out / "rlprobe" / "steps.parquet")
    samples = pd.read_parquet(out / "rlprobe" / "samples")
    result.probe = {
        "steps": len(steps),
        "entropies": int(steps["entropy_mean"].notna().sum()),
        "samples": len(samples),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for ours in (None, "first", "last"):
        result = train(options.out / str(ours), neighbours=True, ours=ours)
        print(json.dumps({k: v for k, v in vars(result).items() if k != "weights"}, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
